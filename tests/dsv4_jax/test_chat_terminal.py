"""The terminal chat: sessions over a scripted model, commands, interrupts; and once over a real one."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from chat_cases import V4, expand
from rich.console import Console

import checkpoints
from checkpoints.synth import with_layers
from dsv4_jax import Sample, StreamEvent, generate
from dsv4_jax.chat import ChatFormat, encode_messages, encode_prompt, parse_reply, session
from dsv4_jax.chat.session import Session
from dsv4_jax.chat.terminal import converse, printable
from dsv4_jax.presets import PRESETS

EOS = expand("[eos]")


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoints.load_tokenizer(checkpoints.bundled_path())


class Script:
    """Stands in for `stream`: gives prepared replies, and notes what it was asked."""

    def __init__(self, tokenizer, *replies: str | Exception | list):
        self.tokenizer, self.replies = tokenizer, list(replies)
        self.prompts: list[str] = []
        self.requests: list[dict] = []

    def __call__(self, model, ids, **request):
        reply = self.replies.pop(0)
        self.prompts.append(self.tokenizer.decode(ids[0], skip_special_tokens=False))
        self.requests.append(request)
        if isinstance(reply, ValueError):
            raise reply
        return self.events(reply)

    def events(self, reply):
        for part in reply if isinstance(reply, list) else [reply]:
            if isinstance(part, BaseException):
                raise part
            for token in self.tokenizer.encode(part, add_special_tokens=False).ids:
                yield StreamEvent(0, np.asarray([token]), np.asarray([False]))


@pytest.fixture
def talk(tokenizer, monkeypatch) -> Callable:
    """Run a chat of these lines against these replies; gives (stdout, stderr, session, script)."""

    def run(lines, replies=(), *, max_tokens=100_000, chat_format=None, **options):
        script = Script(tokenizer, *replies)
        monkeypatch.setattr(session, "stream", script)
        model = SimpleNamespace(max_tokens=max_tokens)
        chat = Session(model, tokenizer, chat_format or ChatFormat(), **options)
        out, err = (Console(file=io.StringIO(), width=40) for _ in range(2))
        converse(chat, out=out, err=err, read=reader(lines))
        return out.file.getvalue(), err.file.getvalue(), chat, script

    return run


def reader(lines):
    remaining = iter(lines)

    def read() -> str:
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_two_turns(talk):
    out, err, chat, script = talk(["Hi", "", "  and? "], [f"Hello\tthere 😀{EOS}", f"Bye{EOS}"], system="Be kind.")
    assert out == "Hello\tthere 😀\nBye\n"
    assert script.prompts == [
        expand("[bos]Be kind.[user]Hi[asst]</think>"),
        expand("[bos]Be kind.[user]Hi[asst]</think>Hello\tthere 😀[eos][user]and?[asst]</think>"),
    ]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert err.count("tokens; first after") == 2
    assert [request["seed"] for request in script.requests] == [0, 1]


def test_requests(talk):
    sampler = Sample(temperature=0.5)
    options = {"sampler": sampler, "max_new_tokens": 7, "seed": 5, "drafts": 2}
    _, _, _, script = talk(["Hi"], [EOS], **options)
    assert script.requests == [options | {"stop_ids": [1]}]


def test_reasoning_and_calls_are_set_apart(talk):
    block = expand('\n\n[D tool_calls>\n[D invoke name="f">\n\n[/D invoke>\n[/D tool_calls>')
    out, _, chat, script = talk(["Hi"], [f"Hm.</think>Let me see.{block}{EOS}"], thinking=True)
    assert out == f"Hm.\n\nLet me see.\n\n{block.strip()}\n"
    assert script.prompts == [expand("[bos][user]Hi[asst]<think>")]
    said = chat.messages[-1]
    assert (said["reasoning_content"], said["content"], len(said["tool_calls"])) == ("Hm.", "Let me see.", 1)


def test_thinking_command(talk):
    lines = ["/think max", "a", "/think off", "b", "/think", "c", "/think low"]
    replies = [f"x</think>1{EOS}", f"2{EOS}", f"y</think>3{EOS}"]
    _, err, chat, script = talk(lines, replies, chat_format=ChatFormat.of_checkpoint(V4))
    assert script.prompts == [
        expand("[bos]Effort: all of it.\nTwo literals.\n\n[user]a[asst]<think>"),
        expand("[bos][user]a[asst]</think>1[eos][user]b[asst]</think>"),
        expand("[bos][user]a[asst]</think>1[eos][user]b[asst]</think>2[eos][user]c[asst]<think>"),
    ]
    assert "thinking on, effort max" in err and "thinking off" in err
    assert "effort='low': the release of" in " ".join(err.split()) and (chat.thinking, chat.effort) == (True, None)


def test_other_commands(talk):
    lines = ["/help", "a", "/clear", "b", "/system  Be brief. ", "c", "/system", "//d", "/nonsense", "/exit", "never"]
    _, err, chat, script = talk(lines, [f"1{EOS}"] * 4)
    assert script.prompts == [
        expand("[bos][user]a[asst]</think>"),
        expand("[bos][user]b[asst]</think>"),
        expand("[bos]Be brief.[user]c[asst]</think>"),
        expand("[bos][user]/d[asst]</think>"),
    ]
    assert "/nonsense: no such command" in err and chat.system is None
    assert all(command in err for command in ("/clear", "/think", "/system", "Ctrl-C"))


def test_interrupt_stops_the_reply(talk):
    """What came is kept and part of the next prompt; a turn of which nothing came is forgotten."""
    replies = [["Once upon", KeyboardInterrupt()], [KeyboardInterrupt()], f"Yes{EOS}"]
    out, err, chat, script = talk(["a", "b", "c"], replies)
    assert out == "Once upon\n\nYes\n"
    assert script.prompts[2] == expand("[bos][user]a[asst]</think>Once upon[eos][user]c[asst]</think>")
    assert err.count("stopped;") == 2 and len(chat.messages) == 4


def test_interrupt_while_printing(tokenizer, monkeypatch):
    """The reply is closed there and then, not when it is collected."""
    monkeypatch.setattr(session, "stream", Script(tokenizer, "Once upon"))
    chat = Session(SimpleNamespace(max_tokens=1000), tokenizer, ChatFormat())
    pieces = chat.ask("a")
    assert next(pieces).text == "O"
    pieces.close()
    assert chat.messages[-1]["content"] == "O" and chat.last.new_tokens == 1


def test_interrupt_of_a_line(talk):
    out, _, _, _ = talk([KeyboardInterrupt(), "a"], [f"1{EOS}"])
    assert out == "1\n"


def test_conversation_that_outgrows_the_cache(talk):
    """The limit of a reply shrinks with what is left; then the turn is refused and forgotten."""
    prompt = len(encode_messages([{"role": "user", "content": "abcd"}]).encode())
    lines, replies = ["a", "x" * 200, "/clear", "b"], [f"1{EOS}", f"2{EOS}"]
    out, err, chat, script = talk(lines, replies, max_tokens=prompt + 2, max_new_tokens=1000)
    assert out == "1\n2\n" and len(chat.messages) == 2
    rooms = [request["max_new_tokens"] for request in script.requests]
    assert rooms[0] == rooms[1] < prompt
    assert "error: the conversation has" in err and "start again" in err


def test_refused_requests_leave_the_conversation(talk):
    _, err, chat, _ = talk(["a", "b"], [f"1{EOS}", ValueError("seed must be one integer")])
    assert len(chat.messages) == 2 and "error: seed must be one integer" in err


def test_settings_are_checked_at_once(tokenizer):
    model = SimpleNamespace(max_tokens=100)
    with pytest.raises(ValueError, match="effort='max' means a different text in each release"):
        Session(model, tokenizer, ChatFormat(), thinking=True, effort="max")
    with pytest.raises(ValueError, match="effort='low'.*accepts high, max"):
        Session(model, tokenizer, ChatFormat.of_checkpoint(V4), thinking=True, effort="low")


def test_terminal_gets_no_control_characters(talk):
    out, _, _, _ = talk(["a"], [f"a\x1b[2Jb\u202ec\nd\x9b [b]no markup[/b]{EOS}"])
    assert out == "a\ufffd[2Jb\ufffdc\nd\ufffd [b]no markup[/b]\n"
    assert printable("👩\u200d🚀\u00a0é\t\n") == "👩\u200d🚀\u00a0é\t\n"


def test_foreign_vocabulary_is_told(talk, tokenizer):
    _, err, chat, _ = talk([])
    assert all(tokenizer.token_to_id(token) is None for token in chat.missing_tokens)
    assert ("was not made for chat" in " ".join(err.split())) == bool(chat.missing_tokens)


@pytest.mark.slow
def test_a_model_chats(tmp_path, tokenizer):
    """The pieces join to what `generate` gives for the same prompt."""
    checkpoints.synth(with_layers(PRESETS["tiny"], 3) | {"vocab_size": 768}, tmp_path / "small", seed=7)
    model = checkpoints.load(tmp_path / "small", max_tokens=256)
    chat = Session(model, tokenizer, ChatFormat.of_checkpoint(tmp_path / "small"), max_new_tokens=12)
    text = "".join(piece.text for piece in chat.ask("Who are you?"))
    ids = encode_prompt([{"role": "user", "content": "Who are you?"}], tokenizer)
    out = generate(model, [ids], max_new_tokens=12, stop_ids=[1])
    expected = tokenizer.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=False)
    assert text == expected.replace(EOS, "")
    assert chat.messages[1]["content"] == parse_reply(expected, thinking=False).content
    assert (chat.last.prompt_tokens, chat.last.new_tokens) == (len(ids), out.lengths[0])
