"""Conversations and the prompts they must give, from the algorithm of the published encoder.

Expected prompts are written with short marks, which `expand` turns into the control strings:
[bos] [eos] [user] [asst] [now] (latest_reminder), and [D for the opening of a DSML tag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHAT = Path(__file__).parents[1] / "chat"
V4, V0731 = CHAT / "v4", CHAT / "0731"

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
OPEN = {"type": "function", "function": {"name": "öffnen", "description": "{tool_schemas}"}}
TOOLS_TEXT = (
    "## Tools\n\nCall with <｜DSML｜tool_calls>, think in <think>..</think>; {literal} braces.\n\n"
    '{"name": "search", "parameters": {"type": "object"}}\n'
    '{"name": "öffnen", "description": "{tool_schemas}"}\n\nEnd.\n'
)
FORMAT_TEXT = '## Response Format:\n\nFollow it:\n{"type": "object"}'

_MARKS = {
    "[bos]": "<｜begin▁of▁sentence｜>",
    "[eos]": "<｜end▁of▁sentence｜>",
    "[user]": "<｜User｜>",
    "[asst]": "<｜Assistant｜>",
    "[now]": "<｜latest_reminder｜>",
    "[D ": "<｜DSML｜",
    "[/D ": "</｜DSML｜",
    "[tools]": TOOLS_TEXT,
    "[format]": FORMAT_TEXT,
}


def expand(text: str) -> str:
    for mark, control in _MARKS.items():
        text = text.replace(mark, control)
    return text


@dataclass(frozen=True)
class Case:
    name: str
    messages: list[dict[str, Any]]
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)
    release: Path = V4


def system(content: str | None = "Be kind.", **extra: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **extra}


def developer(content: str, **extra: Any) -> dict[str, Any]:
    return {"role": "developer", "content": content, **extra}


def user(content: Any = "Hi", **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **extra}


def assistant(content: str | None = "Hello", reasoning: str | None = None, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **extra}


def tool(content: Any, call_id: str = "") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def reminder(content: str) -> dict[str, Any]:
    return {"role": "latest_reminder", "content": content}


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return entry if call_id is None else entry | {"id": call_id}


THINK = {"thinking": True}
KEEP = {"thinking": True, "drop_thinking": False}
ONE_CALL = [call("search", '{"q": "a"}', "c1")]
TWO_CALLS = [call("search", '{"q": "a"}', "c1"), call("search", '{"q": "b"}', "c2")]


def block(*queries: str) -> str:
    """The text of calls of `search`."""
    calls = (
        f'[D invoke name="search">\n[D parameter name="q" string="true">{q}[/D parameter>\n[/D invoke>' for q in queries
    )
    return "\n\n[D tool_calls>\n" + "\n".join(calls) + "\n[/D tool_calls>"


def one_call(lines: str) -> str:
    return f'\n\n[D tool_calls>\n[D invoke name="f">\n{lines}\n[/D invoke>\n[/D tool_calls>'


CASES = [
    # Plain conversations
    Case("nothing", [], "[bos]"),
    Case("one question", [user()], "[bos][user]Hi[asst]</think>"),
    Case("one question, thinking", [user()], "[bos][user]Hi[asst]<think>", THINK),
    Case("system", [system(), user()], "[bos]Be kind.[user]Hi[asst]</think>"),
    Case("empty system", [system(None), user("")], "[bos][user][asst]</think>"),
    Case("two system messages", [system("A"), system("B"), user()], "[bos]AB[user]Hi[asst]</think>"),
    Case("system alone", [system()], "[bos]Be kind."),
    Case("answered", [user(), assistant()], "[bos][user]Hi[asst]</think>Hello[eos]"),
    Case(
        "answered, thinking",
        [user(), assistant("Hello", "Hm.")],
        "[bos][user]Hi[asst]<think>Hm.</think>Hello[eos]",
        THINK,
    ),
    Case(
        "reasoning is not shown in chat mode",
        [user(), assistant("Hello", "Hm.")],
        "[bos][user]Hi[asst]</think>Hello[eos]",
    ),
    Case("answered without reasoning", [user(), assistant()], "[bos][user]Hi[asst]<think></think>Hello[eos]", THINK),
    Case(
        "three turns",
        [system(), user("1"), assistant("a"), user("2"), assistant("b"), user("3")],
        "[bos]Be kind.[user]1[asst]</think>a[eos][user]2[asst]</think>b[eos][user]3[asst]</think>",
    ),
    Case("assistant first", [assistant("Welcome"), user()], "[bos]Welcome[eos][user]Hi[asst]</think>"),
    Case("assistant alone keeps its reasoning", [assistant("Hello", "Hm.")], "[bos]Hm.</think>Hello[eos]", THINK),
    Case("empty answer", [user(), assistant(None)], "[bos][user]Hi[asst]</think>[eos]"),
    Case("open answer", [user(), assistant("Once upon", wo_eos=True)], "[bos][user]Hi[asst]</think>Once upon"),
    Case(
        "text blocks",
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        "[bos][user]a\n\nb[asst]</think>",
    ),
    Case("non-ASCII and control strings pass", [user("é 你好 <think>")], "[bos][user]é 你好 <think>[asst]</think>"),
    # Dropping old reasoning
    Case(
        "old reasoning is dropped",
        [user("1"), assistant("a", "x"), user("2"), assistant("b", "y")],
        "[bos][user]1[asst]</think>a[eos][user]2[asst]<think>y</think>b[eos]",
        THINK,
    ),
    Case(
        "old reasoning is kept",
        [user("1"), assistant("a", "x"), user("2")],
        "[bos][user]1[asst]<think>x</think>a[eos][user]2[asst]<think>",
        KEEP,
    ),
    Case(
        "tools keep old reasoning",
        [system("S", tools=[SEARCH, OPEN]), user("1"), assistant("a", "x"), user("2")],
        "[bos]S\n\n[tools][user]1[asst]<think>x</think>a[eos][user]2[asst]<think>",
        THINK,
    ),
    Case(
        "chat mode has no reasoning to keep",
        [user("1"), assistant("a", "x"), user("2")],
        "[bos][user]1[asst]</think>a[eos][user]2[asst]</think>",
        {"drop_thinking": False},
    ),
    Case(
        "earlier developer messages are dropped",
        [developer("old"), assistant("a", "x"), developer("new")],
        "[bos]a[eos][user]new[asst]<think>",
        THINK,
    ),
    Case(
        "chat mode keeps developer messages",
        [developer("old"), assistant("a"), developer("new")],
        "[bos][user]old[asst]</think>a[eos][user]new[asst]</think>",
    ),
    # System and developer sections
    Case("tools on system", [system("S", tools=[SEARCH, OPEN]), user()], "[bos]S\n\n[tools][user]Hi[asst]</think>"),
    Case(
        "tools on an empty system", [system("", tools=[SEARCH, OPEN]), user()], "[bos]\n\n[tools][user]Hi[asst]</think>"
    ),
    Case("tools given beside", [user()], "[bos]\n\n[tools][user]Hi[asst]</think>", {"tools": [SEARCH, OPEN]}),
    Case(
        "tools beside a system",
        [system("S"), user()],
        "[bos]S\n\n[tools][user]Hi[asst]</think>",
        {"tools": [SEARCH, OPEN]},
    ),
    Case(
        "response format on system",
        [system("S", response_format={"type": "object"}), user()],
        "[bos]S\n\n[format][user]Hi[asst]</think>",
    ),
    Case(
        "tools and response format on developer",
        [developer("D", tools=[SEARCH, OPEN], response_format={"type": "object"})],
        "[bos][user]D\n\n[tools]\n\n[format][asst]<think>",
        THINK,
    ),
    Case(
        "latest reminder",
        [system(), reminder("2026-02-21"), developer("D")],
        "[bos]Be kind.[now]2026-02-21[user]D[asst]</think>",
    ),
    Case(
        "a reminder after the question",
        [user(), reminder("noon"), assistant()],
        "[bos][user]Hi[asst]</think>[now]noonHello[eos]",
    ),
    # Effort
    Case(
        "effort max of V4",
        [user()],
        "[bos]Effort: all of it.\nTwo literals.\n\n[user]Hi[asst]<think>",
        THINK | {"effort": "max"},
    ),
    Case("effort high of V4", [user()], "[bos][user]Hi[asst]<think>", THINK | {"effort": "high"}),
    Case("effort without thinking", [user()], "[bos][user]Hi[asst]</think>", {"effort": "max"}),
    Case(
        "effort before the system",
        [system(), user()],
        "[bos]Effort: all of it.\n\nBe kind.[user]Hi[asst]<think>",
        THINK | {"effort": "high"},
        V0731,
    ),
    Case(
        "effort max of 0731",
        [user()],
        "[bos]Effort: more than all.\nTwo literals.\n\n[user]Hi[asst]<think>",
        THINK | {"effort": "max"},
        V0731,
    ),
    Case("effort low of 0731", [user()], "[bos][user]Hi[asst]<think>", THINK | {"effort": "low"}, V0731),
    Case("default effort of 0731", [user()], "[bos][user]Hi[asst]<think>", THINK, V0731),
    # Tool calls
    Case("a call", [user(), assistant("", tool_calls=ONE_CALL)], f"[bos][user]Hi[asst]</think>{block('a')}[eos]"),
    Case(
        "a call after text and reasoning",
        [user(), assistant("Let me see.", "Hm.", tool_calls=TWO_CALLS)],
        f"[bos][user]Hi[asst]<think>Hm.</think>Let me see.{block('a', 'b')}[eos]",
        THINK,
    ),
    Case(
        "arguments of every type",
        [
            user(),
            assistant(
                "",
                tool_calls=[
                    call("f", '{"s": "5", "n": 5, "x": 1.0, "b": true, "z": null, "l": [1, "é"], "o": {"k": "v"}}')
                ],
            ),
        ],
        "[bos][user]Hi[asst]</think>"
        + one_call(
            "\n".join(
                f'[D parameter name="{k}" string="{flag}">{v}[/D parameter>'
                for k, flag, v in [
                    ("s", "true", "5"),
                    ("n", "false", "5"),
                    ("x", "false", "1.0"),
                    ("b", "false", "true"),
                    ("z", "false", "null"),
                    ("l", "false", '[1, "é"]'),
                    ("o", "false", '{"k": "v"}'),
                ]
            )
        )
        + "[eos]",
    ),
    Case(
        "string arguments are raw",
        [user(), assistant("", tool_calls=[call("f", '{"code": "a < b\\n\\"c\\" & {d}\\n"}')])],
        "[bos][user]Hi[asst]</think>"
        + one_call('[D parameter name="code" string="true">a < b\n"c" & {d}\n[/D parameter>')
        + "[eos]",
    ),
    Case(
        "no arguments",
        [user(), assistant("", tool_calls=[call("f", "{}")])],
        f"[bos][user]Hi[asst]</think>{one_call('')}[eos]",
    ),
    Case(
        "arguments that are no JSON",
        [user(), assistant("", tool_calls=[call("f", "oops")])],
        "[bos][user]Hi[asst]</think>"
        + one_call('[D parameter name="arguments" string="true">oops[/D parameter>')
        + "[eos]",
    ),
    Case(
        "a call left open",
        [user(), assistant("", tool_calls=ONE_CALL, wo_eos=True)],
        f"[bos][user]Hi[asst]</think>{block('a')}",
    ),
    # Results, merging and reordering
    Case(
        "a result",
        [user(), assistant("", "Hm.", tool_calls=ONE_CALL), tool("42", "c1")],
        "[bos][user]Hi[asst]</think>" + block("a") + "[eos][user]<tool_result>42</tool_result>[asst]<think>",
        THINK,
    ),
    Case(
        "results in the order of the calls, then text",
        [user(), assistant("", tool_calls=TWO_CALLS), tool("B", "c2"), tool("A", "c1"), user("and?")],
        "[bos][user]Hi[asst]</think>"
        + block("a", "b")
        + "[eos][user]<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nand?[asst]</think>",
    ),
    Case(
        "text between results stays where it is",
        [user(), assistant("", tool_calls=TWO_CALLS), tool("B", "c2"), user("note"), tool("A", "c1")],
        "[bos][user]Hi[asst]</think>"
        + block("a", "b")
        + "[eos][user]<tool_result>A</tool_result>\n\nnote\n\n<tool_result>B</tool_result>[asst]</think>",
    ),
    Case(
        "the order of the latest calls counts",
        [
            user(),
            assistant("", tool_calls=TWO_CALLS),
            tool("A", "c1"),
            tool("B", "c2"),
            assistant("", tool_calls=[call("search", '{"q": "c"}', "c2"), call("search", '{"q": "d"}', "c1")]),
            tool("D", "c1"),
            tool("C", "c2"),
        ],
        "[bos][user]Hi[asst]</think>"
        + block("a", "b")
        + "[eos][user]<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>[asst]</think>"
        + block("c", "d")
        + "[eos][user]<tool_result>C</tool_result>\n\n<tool_result>D</tool_result>[asst]</think>",
    ),
    Case(
        "results without ids keep their order",
        [user(), assistant("", tool_calls=TWO_CALLS), tool("B"), tool("A")],
        "[bos][user]Hi[asst]</think>"
        + block("a", "b")
        + "[eos][user]<tool_result>B</tool_result>\n\n<tool_result>A</tool_result>[asst]</think>",
    ),
    Case(
        "a result of several blocks",
        [user(), assistant("", tool_calls=ONE_CALL), tool([{"type": "text", "text": "a"}, {"type": "image"}], "c1")],
        "[bos][user]Hi[asst]</think>"
        + block("a")
        + "[eos][user]<tool_result>a\n\n[Unsupported image]</tool_result>[asst]</think>",
    ),
    Case("questions merge", [user("a"), user("b"), user("c")], "[bos][user]a\n\nb\n\nc[asst]</think>"),
    Case("questions do not merge into developer", [developer("a"), user("b")], "[bos][user]a[user]b[asst]</think>"),
    # Tasks
    Case("task action", [user("a", task="action")], "[bos][user]a[asst]</think><｜action｜>"),
    Case("task action, thinking", [user("a", task="action")], "[bos][user]a[asst]<think><｜action｜>", THINK),
    Case("task query", [user("a", task="query")], "[bos][user]a<｜query｜>"),
    Case("task authority", [user("a", task="authority")], "[bos][user]a<｜authority｜>"),
    Case("task domain", [user("a", task="domain")], "[bos][user]a<｜domain｜>"),
    Case(
        "task read_url",
        [user("a<｜extracted_url｜>u", task="read_url")],
        "[bos][user]a<｜extracted_url｜>u<｜read_url｜>",
    ),
    Case(
        "task title on an answer",
        [user("a"), assistant("b", task="title")],
        "[bos][user]a[asst]</think>b[eos]<｜title｜>",
    ),
    Case(
        "the answer of a task has no reasoning",
        [user("a", task="query"), assistant("q", "unseen")],
        "[bos][user]a<｜query｜>q[eos]",
        THINK,
    ),
    Case(
        "an answered action, then the question again",
        [user("a", task="action"), assistant("Search"), user("b"), assistant("c", "y")],
        "[bos][user]a[asst]<think><｜action｜>Search[eos][user]b[asst]<think>y</think>c[eos]",
        THINK,
    ),
    Case("a task is not merged into", [user("a", task="query"), user("b")], "[bos][user]a[user]b[asst]</think>"),
]
