"""Against the published encoders, where they are at hand: their texts, their golden pairs, and what they do.

They are not part of this repository. Name their files, of one or more releases, in the environment:
`DSV4_ENCODING=Flash/encoding/encoding_dsv4.py:Flash-0731/encoding/encoding_dsv4.py pytest -m oracle ...`
Unlike the library, these tests execute the files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import pytest
from chat_cases import CASES, V0731
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.chat import ChatFormat, encode_messages, parse_reply

FILES = [Path(name) for name in os.environ.get("DSV4_ENCODING", "").split(os.pathsep) if name]
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not FILES, reason="DSV4_ENCODING names no published encoding file"),
]

# UTF-8 length and start of the SHA-256 of the published texts.
TOOLS, RESPONSE_FORMAT = (989, "c7d3159308f7d076"), (88, "012f31fcc1338bdf")
ABSOLUTE, BEYOND = (476, "f7a24f3b3050d4a8"), (528, "53fb31b8392ec5b4")
NOTHING = (0, "e3b0c44298fc1c14")
EFFORTS = {
    "V4": {"high": NOTHING, "max": ABSOLUTE},
    "0731": {"low": NOTHING, "high": ABSOLUTE, "max": BEYOND},
}


def check_value(text: str) -> tuple[int, str]:
    return len(text.encode()), hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.fixture(scope="module", params=FILES or [None], ids=str)
def file(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def chat_format(file) -> ChatFormat:
    return ChatFormat.read(file)


@pytest.fixture(scope="module")
def official(file):
    spec = importlib.util.spec_from_file_location("official_encoding", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_prompt(official, messages, *, thinking=False, effort=None, drop_thinking=True):
    mode = "thinking" if thinking else "chat"
    return official.encode_messages(messages, mode, drop_thinking=drop_thinking, reasoning_effort=effort)


def test_texts_have_their_check_values(chat_format):
    assert check_value(chat_format.render_tools([])) == TOOLS
    assert chat_format.response_format is not None and check_value(chat_format.response_format) == RESPONSE_FORMAT
    assert {effort: check_value(text) for effort, text in chat_format.efforts.items()} == EFFORTS[chat_format.release]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_golden_pairs(file, chat_format, number):
    pairs = file.parent / "tests"
    if not pairs.is_dir():
        pytest.skip(f"{pairs} is not there")
    messages = json.loads((pairs / f"test_input_{number}.json").read_text(encoding="utf-8"))
    if isinstance(messages, dict):
        messages, tools = messages["messages"], messages["tools"]
        messages[0]["tools"] = tools
    prompt = encode_messages(messages, thinking=number != 4, chat_format=chat_format)
    assert prompt == (pairs / f"test_output_{number}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", [c for c in CASES if "tools" not in c.options], ids=lambda case: case.name)
def test_cases(official, chat_format, case):
    if "effort" in case.options and (case.release == V0731) != (chat_format.release == "0731"):
        pytest.skip("an effort of the other release")
    messages = [{k: v for k, v in message.items() if v is not None} for message in case.messages]
    blocks = any(isinstance(m.get("content"), list) and m["role"] == "user" for m in messages)
    if blocks:
        pytest.skip("the encoder of V4 takes no content blocks in user messages")
    expected = official_prompt(official, messages, **case.options)
    assert encode_messages(case.messages, chat_format=chat_format, **case.options) == expected


TEXT = st.text(st.sampled_from('ab \n<>{}"/é你'), max_size=8)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
IDS = st.sampled_from(["c1", "c2", "c3", ""])
CALL = st.builds(
    lambda name, arguments, call_id: {"id": call_id, "function": {"name": name, "arguments": json.dumps(arguments)}},
    st.sampled_from(["f", "get_it"]),
    st.dictionaries(st.sampled_from(["k", "é", "a b"]), VALUE, max_size=3),
    IDS,
)
TOOL = st.builds(lambda name: {"function": {"name": name, "parameters": {"x": ["{schema}"]}}}, TEXT)
SECTIONS = {"tools": st.lists(TOOL, max_size=1), "response_format": st.none() | st.just({"type": "object"})}
TASK = st.sampled_from([None] * 6 + ["action", "query", "title"])


def message(role, **keys):
    keys = {"content": TEXT} | keys
    return st.fixed_dictionaries({"role": st.just(role), **keys, "task": TASK})


MESSAGES = st.lists(
    st.one_of(
        message("system", **SECTIONS),
        message("developer", content=TEXT.map("D".__add__), **SECTIONS),
        message("user"),
        message("user"),
        message("assistant", reasoning_content=TEXT, tool_calls=st.lists(CALL, max_size=3), wo_eos=st.booleans()),
        message("assistant", reasoning_content=TEXT, tool_calls=st.lists(CALL, max_size=3)),
        message("tool", tool_call_id=IDS),
        message("tool", tool_call_id=IDS),
        message("latest_reminder"),
    ),
    max_size=8,
)


@given(messages=MESSAGES, thinking=st.booleans(), drop_thinking=st.booleans(), level=st.integers(0, 3))
@settings(max_examples=1500, deadline=None)
def test_any_conversation(official, chat_format, messages, thinking, drop_thinking, level):
    efforts = [None, *chat_format.efforts]
    options = {"thinking": thinking, "drop_thinking": drop_thinking, "effort": efforts[level % len(efforts)]}
    expected = official_prompt(official, messages, **options)
    assert encode_messages(messages, chat_format=chat_format, **options) == expected


FRAGMENTS = [
    *("a", " ", "\n", "\n\n", ">", ">\n", "<", "</think>", "<think>", "<｜end▁of▁sentence｜>"),
    *("\n\n<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>", "<｜DSML｜tool_calls", '<｜DSML｜invoke name="f">\n'),
    *(
        "\n</｜DSML｜invoke>",
        "</｜DSML｜invoke",
        '<｜DSML｜parameter name="k" string="true">',
        ' name="k" string="false">',
    ),
    *("</｜DSML｜parameter>", "<｜DSML｜parameter", '[1, "é"]', "nonsense", "5"),
]


@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), thinking=st.booleans())
@settings(max_examples=5000, deadline=None)
def test_strict_accepts_nothing_that_the_official_parser_refuses(official, text, thinking):
    reply = parse_reply(text, thinking=thinking)
    if reply.problems:
        return
    expected = official.parse_message_from_completion_text(text, "thinking" if thinking else "chat")
    assert reply.to_message() == expected


@given(messages=MESSAGES, thinking=st.booleans())
@settings(max_examples=500, deadline=None)
def test_replies_parse_alike(official, chat_format, messages, thinking):
    """What either encoder writes for an assistant turn, both parsers read, and alike."""
    turn = next((m for m in messages if m["role"] == "assistant"), None)
    if turn is None:
        return
    turn = turn | {"task": None, "wo_eos": False}
    before, after = ([{"role": "user", "content": "a"}, *rest] for rest in ([], [turn]))
    options = {"thinking": thinking, "chat_format": chat_format}
    text = encode_messages(after, **options).removeprefix(encode_messages(before, **options))
    expected = official.parse_message_from_completion_text(text, "thinking" if thinking else "chat")
    assert parse_reply(text, thinking=thinking, strict=True).to_message() == expected
