"""Tool calls in DSML, DeepSeek's markup: rendered for prompts, read back from replies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4_jax.chat.tokens import DSML

CALLS_OPEN = f"<{DSML}tool_calls"
CALLS_CLOSE = f"</{DSML}tool_calls>"
INVOKE_OPEN = f"<{DSML}invoke"
INVOKE_CLOSE = f"</{DSML}invoke"
PARAMETER_OPEN = f"<{DSML}parameter"
PARAMETER_CLOSE = f"</{DSML}parameter"
SEPARATOR = ">\n"  # what the format puts after every tag it cuts at

_HEAD = re.compile(r' name="([^\n]*?)" string="(true|false)">')
_LOOSE_HEAD = re.compile(r'\s*name="([^"\n]*)"(?:\s+string="(true|false)")?\s*>')
_BLOCK_TAGS = re.compile(f"{INVOKE_OPEN}|{CALLS_CLOSE}")
_CALL_TAGS = re.compile(f"{PARAMETER_OPEN}|{INVOKE_CLOSE}|{INVOKE_OPEN}|{CALLS_CLOSE}")


def to_json(value: Any) -> str:
    """JSON as the format writes it: non-ASCII kept, ", " and ": " between."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is the text of a JSON object, as in the OpenAI format; `id` ties results to it."""

    name: str
    arguments: str
    id: str | None = None

    @classmethod
    def from_openai(cls, entry: Mapping[str, Any]) -> ToolCall:
        """From {"id": ..., "function": {"name": ..., "arguments": JSON text or an object}}. Raises ValueError."""
        function = entry.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call must be {{'function': {{'name': ..., 'arguments': ...}}}}, got {entry!r}")
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = to_json(dict(arguments))
        if not isinstance(arguments, str):
            raise ValueError(f"arguments of {function['name']!r} must be JSON text or an object, got {arguments!r}")
        return cls(function["name"], arguments, entry.get("id") or function.get("id"))

    def to_openai(self) -> dict[str, Any]:
        """The inverse of from_openai; without an id there is no "id" key."""
        named = {} if self.id is None else {"id": self.id}
        return named | {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def parameters(self) -> dict[str, Any]:
        """The arguments as an object. Text that is no JSON is one parameter called "arguments", as in the official
        encoder; JSON that is no object raises ValueError."""
        try:
            value = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return {"arguments": self.arguments}
        if not isinstance(value, dict):
            raise ValueError(f"arguments of {self.name!r} must be a JSON object, got {self.arguments!r}")
        return value


def render_calls(calls: Iterable[ToolCall]) -> str:
    """The block of calls, without the blank line that comes before it."""
    return f"{CALLS_OPEN}>\n" + "\n".join(map(_render_call, calls)) + f"\n{CALLS_CLOSE}"


def _render_call(call: ToolCall) -> str:
    lines = []
    for name, value in call.parameters().items():
        is_string = isinstance(value, str)
        text = value if is_string else to_json(value)
        flag = "true" if is_string else "false"
        lines.append(f'{PARAMETER_OPEN} name="{name}" string="{flag}">{text}{PARAMETER_CLOSE}>')
    return f'{INVOKE_OPEN} name="{call.name}">\n' + "\n".join(lines) + f"\n{INVOKE_CLOSE}>"


class _MalformedError(Exception):
    """A call that cannot be understood."""


class CallReader:
    """Reads one block of calls, keeping the text of what it cannot understand; takes time linear in the text.

    After `read()`: `calls` that are whole, `kept` the text of everything else, `problems` in words, and `position`
    just past the block.
    """

    def __init__(self, text: str, position: int):
        """`position` is that of the block's opening tag in `text`."""
        self.text, self.position = text, position + len(CALLS_OPEN)
        self.calls: list[ToolCall] = []
        self.kept: list[str] = []
        self.problems: list[str] = []
        self._last_close = text.rfind(PARAMETER_CLOSE)

    def read(self) -> None:
        separator = SEPARATOR  # due before the next tag
        while True:
            gap, mark = self._until(_BLOCK_TAGS)
            if mark is None:
                self._keep(gap, "the block of tool calls does not end")
            elif gap != separator:
                self._keep(gap, "text between tool calls")
            if mark != INVOKE_OPEN:
                return
            start = self.position - len(INVOKE_OPEN)
            try:
                call, ended = self._call()
                self.calls.append(call)
            except _MalformedError as error:
                self._to(_BLOCK_TAGS)
                self._keep(self.text[start : self.position], str(error))
                ended = False
            separator = SEPARATOR if ended else ""

    def _keep(self, text: str, problem: str) -> None:
        self.problems.append(problem)
        if text.strip("> \n"):
            self.kept.append(text.removeprefix(">"))

    def _until(self, tags: re.Pattern[str]) -> tuple[str, str | None]:
        """The text up to the nearest of some tags, and the tag; moves past it, or to the end."""
        start, hit = self.position, tags.search(self.text, self.position)
        self.position = hit.end() if hit else len(self.text)
        return (self.text[start : hit.start()], hit[0]) if hit else (self.text[start:], None)

    def _to(self, tags: re.Pattern[str]) -> None:
        """Move to the nearest of some tags, or to the end."""
        hit = tags.search(self.text, self.position)
        self.position = hit.start() if hit else len(self.text)

    def _call(self) -> tuple[ToolCall, bool]:
        """What follows an opening `invoke`, and whether its closing tag was there to be read."""
        head, mark = self._until(_CALL_TAGS)
        name = self._name(head, has_parameters=mark == PARAMETER_OPEN)
        values: dict[str, str] = {}
        while mark == PARAMETER_OPEN:
            key, value = self._parameter()
            if key in values:
                raise _MalformedError(f"parameter {key!r} of {name!r} is given twice")
            values[key] = value
            gap, mark = self._until(_CALL_TAGS)
            if gap != SEPARATOR:
                self.problems.append(f"a parameter of {name!r} does not end in '>' and a new line")
            if gap.strip("> \n"):
                raise _MalformedError(f"text between the parameters of {name!r}")
        if mark is None:
            raise _MalformedError(f"the call of {name!r} is cut off")
        if mark != INVOKE_CLOSE:
            self.problems.append(f"the call of {name!r} does not end")
            self.position -= len(mark)  # the tag is the block's
        arguments = ", ".join(f"{to_json(key)}: {value}" for key, value in values.items())
        return ToolCall(name, f"{{{arguments}}}"), mark == INVOKE_CLOSE

    def _name(self, head: str, has_parameters: bool) -> str:
        body = head.strip()
        quoted = body[:-1].rstrip()
        if not body.endswith(">") or not quoted.startswith('name="') or not quoted.endswith('"') or len(quoted) < 7:
            raise _MalformedError(f"a tool call does not begin with a name: {head[:60]!r}")
        name = quoted[6:-1]
        if head != f' name="{name}">\n' and (has_parameters or head != f' name="{name}">\n\n'):
            self.problems.append(f"white space around the name {name!r}")
        return name

    def _parameter(self) -> tuple[str, str]:
        """(name, JSON text of the value) of what follows an opening `parameter`; moves past its closing tag."""
        head = _HEAD.match(self.text, self.position)
        if head is None or DSML in head[1]:
            self.problems.append("a parameter does not begin with its name and whether it is a string")
            head = _LOOSE_HEAD.match(self.text, self.position)
        if head is None or self._last_close < head.end():
            shown = self.text[self.position : self.position + 60]
            raise _MalformedError(f"a parameter {'cannot be read' if head is None else 'is cut off'}: {shown!r}")
        end = self.text.index(PARAMETER_CLOSE, head.end())
        value, self.position = self.text[head.end() : end], end + len(PARAMETER_CLOSE)
        if head[2] != "false":
            return head[1], to_json(value)
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            self.problems.append(f"parameter {head[1]!r} should be JSON: {value[:60]!r}")
            value = to_json(value)
        return head[1], value
