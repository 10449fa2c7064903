"""Prompts: the table of cases, their way back through the parser, and messages that cannot be encoded."""

from __future__ import annotations

import pytest
from chat_cases import CASES, ONE_CALL, SEARCH, V4, assistant, call, expand, system, tool, user

from dsv4_jax.chat import ChatFormat, ToolCall, encode_messages, parse_reply

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_prompt(case):
    assert encode_messages(case.messages, chat_format=ChatFormat.of_checkpoint(case.release), **case.options) == expand(
        case.prompt
    )


def replies():
    """(case, place) of every assistant message that closes its turn and does not answer a task."""
    for case in CASES:
        for place, message in enumerate(case.messages):
            answers_task = place and case.messages[place - 1].get("task")
            if message["role"] == "assistant" and not message.get("wo_eos") and not answers_task:
                yield pytest.param(case, place, id=f"{case.name}, {place}")


@pytest.mark.parametrize(("case", "place"), list(replies()))
def test_replies_come_back(case, place):
    """What an assistant message adds to a prompt parses to that message, also strictly."""
    message = {key: value for key, value in case.messages[place].items() if key != "task"}
    chat_format, thinking = ChatFormat.of_checkpoint(case.release), case.options.get("thinking", False)
    options = case.options | {"chat_format": chat_format}
    before = encode_messages(case.messages[:place], **options)
    whole = encode_messages([*case.messages[:place], message], **options)
    assert whole.startswith(before)
    reply = parse_reply(whole.removeprefix(before), thinking=thinking, strict=True)
    assert reply == parse_reply(whole.removeprefix(before), thinking=thinking)
    assert (reply.content, reply.ended, reply.problems) == (message["content"] or "", True, ())
    assert reply.reasoning == ((message["reasoning_content"] or "") if thinking else "")
    wanted = [ToolCall.from_openai(entry) for entry in message.get("tool_calls", [])]
    assert [(c.name, c.parameters()) for c in reply.tool_calls] == [(c.name, c.parameters()) for c in wanted]
    assert encode_messages([*case.messages[:place], reply.to_message()], **options) == whole


def test_there_are_enough_cases():
    assert len(CASES) >= 40 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"role": "robot", "content": "a"}], "messages[0]: role 'robot' must be one of system"),
        ([user(), "Hi"], "messages[1]: role 'Hi'"),
        ([{"content": "a"}], "messages[0]: role None"),
        ([{"role": "developer", "content": ""}], "messages[0]: a developer message needs content"),
        ([user(task="sing")], "messages[0]: task 'sing' must be one of action"),
        ([user(7)], "messages[0]: content must be text or a list of text blocks, got int"),
        ([user([{"type": "image_url"}])], "type 'image_url' is no text"),
        ([user(["a"])], "content must be text"),
        ([user(tools=[SEARCH])], "belong to a system or developer message, not to user"),
        ([user(tool_calls=ONE_CALL)], "belong to an assistant message, not to user"),
        ([system(tools=[{"name": "search"}])], "messages[0]: a tool must be"),
        ([assistant(tool_calls=[{"name": "f"}])], "messages[0]: a tool call must be"),
        ([assistant(tool_calls=["f"])], "messages[0]: "),
        ([assistant(tool_calls=[call("f", "[1]")])], "arguments of 'f' must be a JSON object"),
        ([assistant(tool_calls=[call("f", None)])], "arguments of 'f' must be JSON text or an object"),
        ([tool("a"), {"role": "tool", "content": {"a": 1}}], "messages[1]: content must be text"),
    ],
)
def test_messages_that_cannot_be_encoded(messages, named):
    with pytest.raises(ValueError) as error:
        encode_messages(messages, chat_format=ChatFormat.of_checkpoint(V4))
    assert named in str(error.value)


def test_tools_from_two_places():
    with pytest.raises(ValueError, match="messages\\[0\\] has tools of its own"):
        encode_messages([system(tools=[SEARCH])], tools=[SEARCH], chat_format=ChatFormat.of_checkpoint(V4))


def test_messages_are_left_as_they_were():
    messages = [user("a"), assistant("", "x", tool_calls=ONE_CALL), tool("1", "c1"), user("b")]
    before = repr(messages)
    encode_messages(messages, thinking=True)
    assert repr(messages) == before


def test_arguments_as_an_object():
    texts = [[user(), assistant("", tool_calls=[call("f", arguments)])] for arguments in ({"k": "é"}, '{"k": "é"}')]
    assert encode_messages(texts[0]) == encode_messages(texts[1])
