"""A conversation with a model: what was said, how it is encoded, and the next reply as it comes."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4_jax.chat.detokenize import Detokenizer
from dsv4_jax.chat.encoding import encode_prompt
from dsv4_jax.chat.parse import Piece, ReplyReader
from dsv4_jax.chat.templates import ChatFormat
from dsv4_jax.chat.tokens import EOS, TURN_TOKENS
from dsv4_jax.generate import Sampler, StreamEvent, stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsv4_jax.model import DeepseekV4


@dataclass(frozen=True)
class TurnStats:
    """One reply: its tokens, those of its prompt, seconds to its first token, and seconds from there to its last."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Rate after the first token, None where there was no second."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else None


class Session:
    """Settings that a person may change between turns, and the messages so far (without the system message).

    Args:
      model, tokenizer, chat_format: of one checkpoint.
      system: the system message, None for none.
      thinking, effort: see `encode_messages`.
      sampler: `Greedy()` or `Sample(...)`; the model card says temperature 1, top_p 1.
      max_new_tokens: limit on a reply; what is left of the cache is another.
      seed: of the first turn; each turn takes the next.
      drafts: speculative drafts per step.
    Raises:
      ValueError: a tokenizer that is not byte-level, or an effort the release does not know.
    """

    def __init__(
        self,
        model: DeepseekV4,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        *,
        system: str | None = None,
        thinking: bool = False,
        effort: str | None = None,
        sampler: Sampler | None = None,
        max_new_tokens: int = 1024,
        seed: int = 0,
        drafts: int = 0,
    ):
        Detokenizer(tokenizer)  # refuses other kinds now, not at the first reply
        self.model, self.tokenizer, self.chat_format = model, tokenizer, chat_format
        self.system, self.sampler = system, sampler
        self.max_new_tokens, self.seed, self.drafts = max_new_tokens, seed, drafts
        self.thinking = False
        self.effort: str | None = None
        self.set_thinking(thinking, effort)
        self.messages: list[dict[str, Any]] = []
        self.last = TurnStats()

    @property
    def missing_tokens(self) -> list[str]:
        """Control strings of a plain conversation that the vocabulary lacks; such a model has not learnt the format."""
        return [token for token in TURN_TOKENS if self.tokenizer.token_to_id(token) is None]

    def set_thinking(self, thinking: bool, effort: str | None = None) -> None:
        """Raises ValueError for an effort that the release does not know, and leaves things as they were."""
        if thinking:
            self.chat_format.effort_preamble(effort)
        self.thinking, self.effort = thinking, effort if thinking else None

    def clear(self) -> None:
        """Forget what was said; the system message and the settings stay."""
        self.messages = []

    def ask(self, text: str) -> Generator[Piece]:
        """Say something and give the reply in pieces, as it comes.

        Closing the generator, or an interrupt, ends the reply there; what came of it is part of the conversation, and
        a turn of which nothing came is forgotten.

        Raises:
          ValueError: the conversation does not fit the cache, or cannot be encoded; it then stays as it was.
        """
        history = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(history)
        room = self.model.max_tokens - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and the cache holds {self.model.max_tokens}; "
                "start again, or load the model with a larger max_tokens"
            )
        return self._reply(history, len(ids), self._events(ids, min(self.max_new_tokens, room)))

    def _reply(
        self, history: list[dict[str, Any]], prompt_tokens: int, events: Iterator[StreamEvent]
    ) -> Generator[Piece]:
        reader, text = ReplyReader(thinking=self.thinking), Detokenizer(self.tokenizer)
        began, count, first = time.perf_counter(), 0, 0.0
        try:
            for event in events:
                count += 1
                if count == 1:
                    first = time.perf_counter() - began
                yield from reader.add(text.add(int(event.tokens[0])))
            yield from reader.add(text.rest())
            yield from reader.finish()
        finally:
            if count:
                self.messages = [*history, reader.reply().to_message()]
            decode = time.perf_counter() - began - first if count else 0.0
            self.last = TurnStats(prompt_tokens, count, first, decode)
            self.seed += 1

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        options = {"thinking": self.thinking, "effort": self.effort, "chat_format": self.chat_format}
        return encode_prompt(messages, self.tokenizer, **options)

    def _events(self, ids: list[int], limit: int) -> Iterator[StreamEvent]:
        eos = self.tokenizer.token_to_id(EOS)
        return stream(
            self.model,
            [ids],
            max_new_tokens=limit,
            sampler=self.sampler,
            seed=self.seed,
            stop_ids=[] if eos is None else [eos],
            drafts=self.drafts,
        )
