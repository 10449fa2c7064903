"""Conversations as prompts: the official encoding, from messages in the OpenAI form to text and token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv4_jax.chat.dsml import ToolCall, render_calls
from dsv4_jax.chat.templates import ChatFormat
from dsv4_jax.chat.tokens import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, THINK_CLOSE, THINK_OPEN, USER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
ASKING = ("user", "developer")  # roles that a reply answers


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    effort: str | None = None,
    drop_thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_format: ChatFormat | None = None,
) -> str:
    """The prompt text of a conversation, up to where the model goes on.

    Args:
      messages: dicts with `role` and `content` (text, or a list of {"type": "text", "text": ...}). By role:
        system, developer: `tools` (OpenAI form) and `response_format` (a JSON schema);
        assistant: `reasoning_content`, `tool_calls` (OpenAI form), `wo_eos` to leave the turn open;
        tool: `tool_call_id`, a result, which becomes part of a user message;
        any: `task`, one of `tokens.TASKS`, asks for a short auxiliary answer after this message. A user message joins
        the one before it, unless that has a task; its own task is then lost, as in the official encoder.
      thinking: let the model reason before it answers.
      effort: a word the release knows, see `ChatFormat.effort_preamble`; acts in thinking mode only.
      drop_thinking: leave out the reasoning of earlier replies, and earlier developer messages. Has no effect without
        `thinking`, nor where a message carries tools.
      tools: for the first system message, which is put in front where there is none.
      chat_format: the texts of the release; needed for tools, response formats and efforts.
    Returns:
      Text that holds the control strings literally. They are not escaped in what the messages say, so text from
      strangers can end its own turn; check it where that matters.
    Raises:
      ChatFormatError: a text of the release is needed and missing.
      ValueError: a message that cannot be encoded; the message says which and why.
    Source: the encoding file of the published checkpoints.
    """
    chat_format = ChatFormat() if chat_format is None else chat_format
    checks_effort = thinking or chat_format.efforts
    preamble = chat_format.effort_preamble(effort) if checks_effort else ""
    messages = messages if tools is None else _attach(tools, messages)
    turns = _sort_results(_merge([_read(index, message) for index, message in enumerate(messages)]))
    drop_thinking = drop_thinking and not any(turn.tools for turn in turns)
    if thinking and drop_thinking:
        turns = _drop_thinking(turns)
    conversation = _Conversation(turns, _last_asking(turns), thinking, drop_thinking, chat_format)
    return BOS + (preamble if thinking and turns else "") + "".join(map(conversation.render, range(len(turns))))


def encode_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, **options: Any) -> list[int]:
    """Token ids of `encode_messages(messages, **options)`; the text holds its own begin-of-sentence mark."""
    text = encode_messages(messages, **options)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the messages hold half a surrogate pair, {text[error.start]!r}, which is no text") from None
    return tokenizer.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True)
class _Part:
    """Text of a turn, or the result of a tool call."""

    text: str
    is_result: bool = False
    call_id: str | None = None

    def render(self) -> str:
        return f"<tool_result>{self.text}</tool_result>" if self.is_result else self.text


@dataclass(frozen=True)
class _Turn:
    """A message, checked. `where` names it in errors."""

    where: str
    role: str
    parts: tuple[_Part, ...]
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    is_open: bool = False  # no EOS

    @property
    def text(self) -> str:
        return "\n\n".join(part.render() for part in self.parts)


def _attach(tools: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages with these tools on the first system message."""
    place = next((place for place, message in enumerate(messages) if message.get("role") == "system"), None)
    if place is None:
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[place].get("tools"):
        raise ValueError(f"messages[{place}] has tools of its own; give them there or as tools=, not both")
    return [*messages[:place], {**messages[place], "tools": tools}, *messages[place + 1 :]]


def _read(index: int, message: Mapping[str, Any]) -> _Turn:
    """Check a message; every key that is not understood is left to whoever put it there."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"{where}: role {role!r} must be one of {', '.join(ROLES)}")
    role, task = message["role"], message.get("task")
    text = _text(where, message.get("content"), is_result=role == "tool")
    if role == "developer" and not text:
        raise ValueError(f"{where}: a developer message needs content")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where}: task {task!r} must be one of {', '.join(TASKS)}")
    if role not in ("system", "developer") and (message.get("tools") or message.get("response_format")):
        raise ValueError(f"{where}: tools and response_format belong to a system or developer message, not to {role}")
    if role != "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
        raise ValueError(f"{where}: tool_calls and reasoning_content belong to an assistant message, not to {role}")
    return _Turn(
        where,
        role,
        (_Part(text, role == "tool", message.get("tool_call_id")),),
        _text(where, message.get("reasoning_content")),
        _tool_calls(where, message.get("tool_calls") or ()),
        _tools(where, message.get("tools") or ()),
        message.get("response_format"),
        task,
        bool(message.get("wo_eos", False)) and role == "assistant",
    )


def _text(where: str, content: Any, is_result: bool = False) -> str:
    """Text, None, or a list of text blocks, which a blank line joins. A tool's blocks of other types are named."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or not all(isinstance(block, Mapping) for block in content):
        raise ValueError(f"{where}: content must be text or a list of text blocks, got {type(content).__name__}")
    texts = []
    for block in content:
        if block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif is_result:
            texts.append(f"[Unsupported {block.get('type')}]")
        else:
            raise ValueError(f"{where}: a content block of type {block.get('type')!r} is no text; the model reads text")
    return "\n\n".join(texts)


def _tool_calls(where: str, entries: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    try:
        calls = tuple(ToolCall.from_openai(entry) for entry in entries)
        for call in calls:
            call.parameters()
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return calls


def _tools(where: str, tools: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    for tool in tools:
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise ValueError(f"{where}: a tool must be {{'type': 'function', 'function': {{...}}}}, got {tool!r}")
    return tuple(tool["function"] for tool in tools)


def _merge(turns: Sequence[_Turn]) -> list[_Turn]:
    """Results become parts of user turns, and neighbouring user turns one; text does not join a turn with a task."""
    merged: list[_Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        if last and last.role == "user" and (turn.role == "tool" or turn.role == "user" and last.task is None):
            merged[-1] = replace(last, parts=last.parts + turn.parts)
        else:
            merged.append(replace(turn, role="user", task=None) if turn.role == "tool" else turn)
    return merged


def _sort_results(turns: Sequence[_Turn]) -> list[_Turn]:
    """Put the results in each user turn in the order of the latest calls; what has no place there goes first."""
    order: dict[str, int] = {}
    result = []
    for turn in turns:
        if turn.role == "assistant" and turn.tool_calls:
            order = {call.id: place for place, call in enumerate(turn.tool_calls) if call.id}
        elif turn.role == "user" and order:
            results = (part for part in turn.parts if part.is_result)
            in_order = iter(sorted(results, key=lambda part: order.get(part.call_id or "", 0)))
            turn = replace(turn, parts=tuple(next(in_order) if part.is_result else part for part in turn.parts))
        result.append(turn)
    return result


def _last_asking(turns: Sequence[_Turn]) -> int:
    return max((place for place, turn in enumerate(turns) if turn.role in ASKING), default=-1)


def _drop_thinking(turns: Sequence[_Turn]) -> list[_Turn]:
    """Without the reasoning, and the developer messages, before the last user or developer message."""
    last = _last_asking(turns)
    kept = [turn for place, turn in enumerate(turns) if place >= last or turn.role != "developer"]
    last = _last_asking(kept)
    return [replace(turn, reasoning="") if place < last else turn for place, turn in enumerate(kept)]


@dataclass(frozen=True)
class _Conversation:
    """Turns ready to be written, and what decides about reasoning."""

    turns: Sequence[_Turn]
    last_asking: int
    thinking: bool
    drops: bool
    chat_format: ChatFormat

    def render(self, place: int) -> str:
        turn = self.turns[place]
        if turn.role == "assistant":
            text = self._assistant(place, turn)
        else:
            mark = {"system": "", "latest_reminder": LATEST_REMINDER}.get(turn.role, USER)
            text = "\n\n".join([mark + turn.text, *self._sections(turn)])
        follower = self.turns[place + 1].role if place + 1 < len(self.turns) else "assistant"
        return text + self._opening(place, turn) if follower in ("assistant", "latest_reminder") else text

    def _sections(self, turn: _Turn) -> list[str]:
        tools = [self.chat_format.render_tools(turn.tools)] if turn.tools else []
        schema = turn.response_format
        return tools + ([self.chat_format.render_response_format(schema)] if schema else [])

    def _assistant(self, place: int, turn: _Turn) -> str:
        answers_task = place > 0 and self.turns[place - 1].task is not None
        has_reasoning = self.thinking and not answers_task and (not self.drops or place > self.last_asking)
        reasoning = f"{turn.reasoning}{THINK_CLOSE}" if has_reasoning else ""
        calls = f"\n\n{render_calls(turn.tool_calls)}" if turn.tool_calls else ""
        return reasoning + turn.text + calls + ("" if turn.is_open else EOS)

    def _opening(self, place: int, turn: _Turn) -> str:
        """What comes after a turn that the model, or an assistant turn, answers."""
        if turn.task == "action":
            return ASSISTANT + (THINK_OPEN if self.thinking else THINK_CLOSE) + TASKS["action"]
        if turn.task is not None:
            return TASKS[turn.task]
        if turn.role not in ASKING:
            return ""
        thinks = self.thinking and (not self.drops or place >= self.last_asking)
        return ASSISTANT + (THINK_OPEN if thinks else THINK_CLOSE)
