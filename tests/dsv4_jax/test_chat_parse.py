"""Replies: official ones, damaged ones, and any text at all."""

from __future__ import annotations

import json
import time

import pytest
from chat_cases import expand
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_jax.chat import ReplyError, ReplyReader, ToolCall, encode_messages, parse_reply

P_OPEN, P_CLOSE = '[D parameter name="q" string="true">', "[/D parameter>"
F_A = f'[D invoke name="f">\n{P_OPEN}a{P_CLOSE}\n[/D invoke>'
F_B = F_A.replace(">a[", ">b[")
A, B = ToolCall("f", '{"q": "a"}'), ToolCall("f", '{"q": "b"}')


def calls(*invokes: str) -> str:
    return "\n\n[D tool_calls>\n" + "\n".join(invokes) + "\n[/D tool_calls>"


# name: (reply, thinking, content, reasoning, calls, part of the first problem)
DAMAGED = {
    "cut off": ("Hello wor", False, "Hello wor", "", [], "no <｜end▁of▁sentence｜>"),
    "nothing": ("", False, "", "", [], "the reply was cut off"),
    "cut off while thinking": ("Hm, let", True, "", "Hm, let", [], "no </think>"),
    "ended while thinking": ("Hm.[eos]", True, "", "Hm.", [], "no </think>"),
    "begins with <think>": ("<think>Hm.</think>Hi[eos]", True, "Hi", "Hm.", [], "part of the prompt"),
    "thinks without being asked": ("<think>Hm.</think>Hi[eos]", False, "Hi", "Hm.", [], "part of the prompt"),
    "text after the end": ("Hi[eos] there", False, "Hi", "", [], "text after <｜end▁of▁sentence｜>"),
    "stray </think>": ("a</think>b[eos]", False, "a</think>b", "", [], "</think> inside the text"),
    "second </think>": ("x</think>a</think>b[eos]", True, "a</think>b", "x", [], "</think> inside the text"),
    "call while thinking": (f"x{calls(F_A)}[eos]", True, "", "x", [A], "no </think>"),
    "call in the reasoning": (
        f"x{calls(F_A)}</think>y[eos]",
        True,
        "y",
        expand(f"x{calls(F_A)}"),
        [],
        "before </think>",
    ),
    "no blank line": (f"Hi{calls(F_A)[2:]}[eos]", False, "Hi", "", [A], "no blank line"),
    "text after the calls": (f"Hi{calls(F_A)} bye[eos]", False, "Hi bye", "", [A], "text after the tool calls"),
    "two blocks": (f"Hi{calls(F_A)}{calls(F_B)}[eos]", False, "Hi", "", [A, B], "more than one block"),
    "block does not end": (f"Hi{calls(F_A)[:-16]}[eos]", False, "Hi", "", [A], "does not end"),
    "block with nothing": ("Hi\n\n[D tool_calls>\n[/D tool_calls>[eos]", False, "Hi", "", [], None),
    "bare opening": ("Hi\n\n[D tool_calls", False, "Hi", "", [], "does not end"),
    "cut off in the second call": (
        f'Hi{calls(F_A)[:-16]}\n[D invoke name="f">\n{P_OPEN}b',
        False,
        expand(f'Hi[D invoke name="f">\n{P_OPEN}b'),
        "",
        [A],
        "a parameter is cut off",
    ),
    "cut off before a call ends": (
        f'Hi\n\n[D tool_calls>\n[D invoke name="f">\n{P_OPEN}b{P_CLOSE}',
        False,
        expand(f'Hi\n\n[D tool_calls>\n[D invoke name="f">\n{P_OPEN}b{P_CLOSE}'),
        "",
        [],
        "a parameter of 'f' does not end",
    ),
    "call does not end": (
        f"Hi{calls(F_A.removesuffix('[/D invoke>') + F_B)}[eos]",
        False,
        "Hi",
        "",
        [A, B],
        "does not end",
    ),
    "last call does not end": (
        f"Hi{calls(F_A.removesuffix('[/D invoke>'))}[eos]",
        False,
        "Hi",
        "",
        [A],
        "does not end",
    ),
    "text between calls": (
        f"Hi{calls(F_A, 'and', F_B)}[eos]",
        False,
        "Hi\nand\n",
        "",
        [A, B],
        "between tool calls",
    ),
    "call without a name": (
        f"Hi{calls(F_A, '[D invoke>' + chr(10) + '[/D invoke>')}[eos]",
        False,
        expand("Hi[D invoke>\n[/D invoke>\n"),
        "",
        [A],
        "does not begin with a name",
    ),
    "nothing but a call without a name": (
        f"Hi{calls('[D invoke>[/D invoke>')}[eos]",
        False,
        expand(f"Hi{calls('[D invoke>[/D invoke>')}"),
        "",
        [],
        "does not begin with a name",
    ),
    "spaces for new lines": (
        f"Hi{calls(F_A).replace(chr(10), ' ')}[eos]",
        False,
        "Hi  ",
        "",
        [A],
        "no blank line",
    ),
    "no new lines": (f"Hi\n\n{calls(F_A).replace(chr(10), '')}[eos]", False, "Hi", "", [A], "text between tool calls"),
    "parameter without string": (
        calls(F_A.replace(' string="true"', "")) + "[eos]",
        False,
        "",
        "",
        [A],
        "whether it is a string",
    ),
    "parameter without a name": (
        calls(F_A.replace(' name="q"', "")) + "[eos]",
        False,
        expand(calls(F_A.replace(' name="q"', ""))),
        "",
        [],
        "a parameter does not begin",
    ),
    "parameter that is no JSON": (
        calls(F_A.replace("true", "false")) + "[eos]",
        False,
        "",
        "",
        [A],
        "parameter 'q' should be JSON",
    ),
    "parameter twice": (
        calls(F_A, F_B.replace(">b[", f">x[/D parameter>\n{P_OPEN}b[")) + "[eos]",
        False,
        expand(F_B.replace(">b[", f">x[/D parameter>\n{P_OPEN}b[") + "\n"),
        "",
        [A],
        "given twice",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_replies_keep_their_text(name):
    text, thinking, content, reasoning, wanted, problem = DAMAGED[name]
    text = expand(text)
    reply = parse_reply(text, thinking=thinking)
    assert (reply.content, reply.reasoning, list(reply.tool_calls)) == (content, reasoning, wanted)
    if problem is None:
        assert parse_reply(text, thinking=thinking, strict=True) == reply and not reply.problems
        return
    assert problem in reply.problems[0]
    with pytest.raises(ReplyError, match="not an official reply"):
        parse_reply(text, thinking=thinking, strict=True)


def test_leftover():
    reply = parse_reply(expand("Hi[eos] there[eos]"), thinking=False)
    assert (reply.ended, reply.leftover) == (True, expand(" there[eos]"))
    assert not parse_reply("Hi", thinking=False).ended


FRAGMENTS = [
    *("Ω", " ", "\n", "\n\n", ">", "<", '"', "=", "</think>", "<think>", "<｜end▁of▁sentence｜>", "｜DSML｜"),
    *(
        "\n\n<｜DSML｜tool_calls>\n",
        "\n</｜DSML｜tool_calls>",
        "<｜DSML｜tool_calls",
        "<｜DSML｜invoke",
        ' name="f">\n',
    ),
    *(
        "\n</｜DSML｜invoke>",
        "</｜DSML｜invoke",
        '<｜DSML｜parameter name="k" string="true">',
        ' name="k" string="false">',
    ),
    *("</｜DSML｜parameter>\n", "</｜DSML｜parameter", "[[1", "ΩΩ", "5", "[" * 3000, "9" * 5000),
]
# Whole blocks with one fragment too many, so that most of a block is understood.
OFFICIAL_LIKE = st.builds(
    lambda text, at, fragment: text[: int(at * len(text))] + fragment + text[int(at * len(text)) :],
    st.sampled_from([expand(f"Ω</think>Ω{calls(F_A, F_B)}[eos]"), expand(f"Ω{calls(F_A.replace('>a[', '>Ω['))}[eos]")]),
    st.floats(0, 1),
    st.sampled_from(FRAGMENTS),
)
ANY = st.text(max_size=60) | OFFICIAL_LIKE | st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join)


@given(text=ANY, thinking=st.booleans())
@settings(max_examples=1500, deadline=None)
@example(text='\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=">', thinking=False)
@example(text='<｜DSML｜tool_calls><｜DSML｜invoke name="">x</｜DSML｜invoke', thinking=False)
def test_any_text_is_parsed(text, thinking):
    """Never raises, arguments are JSON objects, and every word is somewhere in what it gives."""
    reply = parse_reply(text, thinking=thinking)
    for found in reply.tool_calls:
        assert isinstance(json.loads(found.arguments, parse_int=str), dict)
    kept = [reply.reasoning, reply.content, reply.leftover, *(c.name + c.arguments for c in reply.tool_calls)]
    assert "".join(kept).count("Ω") == text.count("Ω")
    assert encode_messages([{"role": "user", "content": "a"}, reply.to_message()], thinking=thinking)
    try:
        assert parse_reply(text, thinking=thinking, strict=True) == reply
    except ReplyError:
        assert reply.problems


@given(text=ANY, thinking=st.booleans(), data=st.data())
@settings(max_examples=600, deadline=None)
def test_any_text_streams(text, thinking, data):
    """In whatever pieces it comes, a reply streams to the same text, and an official one to what is parsed."""
    whole, cut = ReplyReader(thinking=thinking), ReplyReader(thinking=thinking)
    expected = [*whole.add(text), *whole.finish()]
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    found = [
        piece
        for start, end in zip([0, *places], [*places, len(text)], strict=True)
        for piece in cut.add(text[start:end])
    ]
    found += cut.finish()
    assert joined(found) == joined(expected)
    assert cut.reply() == whole.reply() == parse_reply(text, thinking=thinking)
    if not whole.reply().problems:
        streamed = joined(found)
        assert (streamed["content"], streamed["reasoning"]) == (whole.reply().content, whole.reply().reasoning)


def joined(pieces) -> dict[str, str]:
    texts = dict.fromkeys(("reasoning", "content", "tool_calls"), "")
    for piece in pieces:
        texts[piece.kind] += piece.text
    return texts


PLAIN = st.text(max_size=20).filter(lambda text: "<" not in text and "｜DSML｜" not in text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=6,
)
NAME = st.from_regex(r"[A-Za-z_][\w.-]{0,12}", fullmatch=True)
CALLS = st.lists(
    st.builds(lambda name, args: ToolCall(name, json.dumps(args)), NAME, st.dictionaries(NAME, JSON, max_size=3))
)


@given(content=PLAIN, reasoning=PLAIN, calls=CALLS, thinking=st.booleans())
@settings(max_examples=200, deadline=None)
def test_replies_come_back(content, reasoning, calls, thinking):
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [call.to_openai() for call in calls]
    question = [{"role": "user", "content": "a"}]
    prompt = encode_messages(question, thinking=thinking)
    text = encode_messages([*question, message], thinking=thinking).removeprefix(prompt)
    reply = parse_reply(text, thinking=thinking, strict=True)
    assert (reply.content, reply.reasoning) == (content, reasoning if thinking else "")
    assert [(c.name, c.parameters()) for c in reply.tool_calls] == [(c.name, c.parameters()) for c in calls]
    assert [list(c.parameters()) for c in reply.tool_calls] == [list(c.parameters()) for c in calls]
    reader = ReplyReader(thinking=thinking)
    pieces = joined([piece for character in text for piece in reader.add(character)] + list(reader.finish()))
    assert (pieces["content"], pieces["reasoning"]) == (reply.content, reply.reasoning)


@pytest.mark.slow
@given(content=PLAIN, calls=CALLS.filter(bool), cut=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_replies_cut_anywhere(content, calls, cut):
    """Calls that were whole before the cut are found, and only those."""
    question = [{"role": "user", "content": "a"}]
    message = {"role": "assistant", "content": content, "tool_calls": [call.to_openai() for call in calls]}
    text = encode_messages([*question, message]).removeprefix(encode_messages(question))
    whole = parse_reply(text, thinking=False)
    piece = text[: int(cut * len(text))]
    ended = piece.count("</｜DSML｜invoke")
    reply = parse_reply(piece, thinking=False)
    assert reply.tool_calls == whole.tool_calls[:ended]
    if "<｜DSML｜tool_calls" not in piece:
        assert reply.content == piece


@pytest.mark.parametrize(
    "unit",
    [
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="true">',
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="k" string="true">',
        '<｜DSML｜parameter name="k" string="true">x</｜DSML｜parameter>\n',
        '<｜DSML｜parameter name="',
        "<｜DSML｜invoke>\n",
    ],
)
def test_long_damage_takes_little_time(unit):
    """A model caught in a loop writes megabytes of such text; the slowest possible reading would take hours."""
    text = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n' + unit * (1_000_000 // len(unit))
    began = time.perf_counter()
    parse_reply(text, thinking=False)
    assert time.perf_counter() - began < 10
