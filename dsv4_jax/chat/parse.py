"""Replies: split into reasoning, content and tool calls, whole (`parse_reply`) or as they arrive (`ReplyReader`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dsv4_jax.chat.dsml import CALLS_OPEN, CallReader, ToolCall
from dsv4_jax.chat.tokens import BOS, DSML, EOS, THINK_CLOSE, THINK_OPEN

CALLS_START = f"\n\n{CALLS_OPEN}"
_CONTROL = re.compile("|".join(map(re.escape, (BOS, EOS, THINK_OPEN, THINK_CLOSE, DSML))))


class ReplyError(ValueError):
    """A reply is not of the official form."""


@dataclass(frozen=True)
class Reply:
    """A reply taken apart; no text of it is lost.

    Attributes:
      content: the answer. Tool calls that cannot be understood stay in it as they were written.
      reasoning: what came before `</think>`.
      tool_calls: the calls that are whole; their arguments are always the text of a JSON object.
      ended: the end-of-sentence mark was there.
      leftover: text after that mark, which nothing should produce.
      problems: in what ways the reply departs from the official form, in words; empty for one that does not.
    """

    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    ended: bool = True
    leftover: str = ""
    problems: tuple[str, ...] = ()

    def to_message(self) -> dict[str, Any]:
        """The assistant message that `encode_messages` takes, in the OpenAI form."""
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_openai() for call in self.tool_calls],
        }


def parse_reply(text: str, *, thinking: bool, strict: bool = False) -> Reply:
    """Take apart what the model wrote after the prompt.

    Args:
      text: everything generated, control strings included.
      thinking: the prompt was encoded with `thinking=True`, so the reply begins inside the reasoning.
      strict: accept the official form only.
    Raises:
      ReplyError: with strict, for a reply that departs from that form; without it nothing is ever raised.
    """
    problems: list[str] = []
    body, end, leftover = text.partition(EOS)
    if leftover:
        problems.append(f"text after {EOS}")
    reasoning, body = _split_reasoning(body, thinking, problems)
    content, calls = _split_calls(body, problems)
    if not end and not calls:
        problems.append(f"no {EOS}: the reply was cut off")
    stray = {match[0] for part in (reasoning, content) for match in _CONTROL.finditer(part)}
    problems += [f"{mark} inside the text" for mark in sorted(stray)]
    if strict and problems:
        raise ReplyError(f"not an official reply: {'; '.join(problems[:3])}")
    return Reply(content, reasoning, tuple(calls), bool(end), leftover, tuple(problems))


def _split_reasoning(body: str, thinking: bool, problems: list[str]) -> tuple[str, str]:
    """(reasoning, the rest)."""
    if body.startswith(THINK_OPEN):
        problems.append(f"{THINK_OPEN} is part of the prompt, not of the reply")
        body, thinking = body.removeprefix(THINK_OPEN), True
    if not thinking:
        return "", body
    before, close, after = body.partition(THINK_CLOSE)
    calls_at = before.find(CALLS_START)
    if close:
        if calls_at >= 0:
            problems.append(f"tool calls before {THINK_CLOSE}")
        return before, after
    problems.append(f"no {THINK_CLOSE}")
    return (before, "") if calls_at < 0 else (before[:calls_at], before[calls_at:])


def _split_calls(body: str, problems: list[str]) -> tuple[str, list[ToolCall]]:
    """(content, calls). Blocks of calls are cut out of the content, as far as they can be understood."""
    pieces: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while (found := _find_calls(body, position)) is not None:
        start, tag = found
        if position:
            problems.append("more than one block of tool calls")
        reader = CallReader(body, tag)
        reader.read()
        if start == tag:
            problems.append("no blank line before the tool calls")
        problems += reader.problems
        pieces.append(body[position:start])
        if reader.calls or not reader.kept:
            pieces += reader.kept
        else:
            pieces.append(body[start : reader.position])
        calls += reader.calls
        position = reader.position
    if position and body[position:]:
        problems.append("text after the tool calls")
    pieces.append(body[position:])
    return "".join(pieces), calls


def _find_calls(body: str, position: int) -> tuple[int, int] | None:
    """Where the next block of calls begins, with its blank line, and where its tag does."""
    start = body.find(CALLS_START, position)
    if start >= 0:
        return start, start + 2
    tag = body.find(CALLS_OPEN, position)
    return (tag, tag) if tag >= 0 else None


Kind = Literal["reasoning", "content", "tool_calls"]


@dataclass(frozen=True)
class Piece:
    """Some text of a reply, and what it is part of. Tool calls are given as written."""

    kind: Kind
    text: str


class ReplyReader:
    """Splits a reply while it arrives, holding back what may become a control string.

    For a reply of the official form the pieces of a kind join to what `parse_reply` finds; for any other text they
    join to the text without its control strings, and `reply()` has the last word.
    """

    def __init__(self, *, thinking: bool):
        self._thinking = thinking
        self._kind: Kind = "reasoning" if thinking else "content"
        self._texts: list[str] = []
        self._held = ""
        self._started = self._ended = False

    def add(self, text: str) -> Iterator[Piece]:
        """The pieces that this text completes."""
        self._texts.append(text)
        if not self._ended:
            self._held += text
            yield from self._pieces(final=False)

    def finish(self) -> Iterator[Piece]:
        """What is still held back when no more text comes."""
        yield from self._pieces(final=True)

    def reply(self, *, strict: bool = False) -> Reply:
        """All that arrived, taken apart by `parse_reply`."""
        return parse_reply("".join(self._texts), thinking=self._thinking, strict=strict)

    def _pieces(self, final: bool) -> Iterator[Piece]:
        if not self._started and not self._start(final):
            return
        while (hit := _find_first(self._held, _MARKS[self._kind])) is not None:
            at, mark = hit
            if at:
                yield Piece(self._kind, self._held[:at])
            self._held = self._held[at + len(mark) :]
            if mark == EOS:
                self._ended, self._held = True, ""
            elif mark == THINK_CLOSE:
                self._kind = "content"
            else:
                self._kind = "tool_calls"
                yield Piece("tool_calls", CALLS_OPEN)
        keep = 0 if final else _held_back(self._held, _MARKS[self._kind])
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if text:
            yield Piece(self._kind, text)

    def _start(self, final: bool) -> bool:
        """Skip a leading <think>; False while it is undecided whether there is one."""
        if self._held.startswith(THINK_OPEN):
            self._held, self._kind = self._held.removeprefix(THINK_OPEN), "reasoning"
        elif THINK_OPEN.startswith(self._held) and not final:
            return False
        self._started = True
        return True


_MARKS: dict[Kind, tuple[str, ...]] = {
    "reasoning": (THINK_CLOSE, EOS),
    "content": (CALLS_START, CALLS_OPEN, EOS),
    "tool_calls": (EOS,),
}


def _find_first(text: str, marks: tuple[str, ...]) -> tuple[int, str] | None:
    return min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)


def _held_back(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that may begin one of the marks."""
    longest = min(len(text), max(map(len, marks)) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
