"""Text from token ids as they arrive, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE spells a byte as one character: itself where printable in Latin-1, else U+0100 and up in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_of_character()


class Detokenizer:
    """The text of a byte-level tokenizer, id by id, in constant time each.

    A character whose bytes come in several tokens is given once it is whole. The pieces join to what the tokenizer
    decodes from all ids at once: bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing.

    Args:
      tokenizer: a `tokenizers.Tokenizer` with the byte-level decoder, as all of DeepSeek's have.
      skip: ids that give no text.
    Raises:
      ValueError: another kind of decoder.
    """

    def __init__(self, tokenizer: Tokenizer, skip: Collection[int] = ()):
        decoder = type(tokenizer.decoder).__name__
        if decoder != "ByteLevel":
            raise ValueError(f"only byte-level tokenizers can be streamed; tokenizer.json has the decoder {decoder}")
        self._tokenizer, self._skip = tokenizer, frozenset(skip)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """What this id completes, "" if nothing."""
        return self._decoder.decode(self._bytes(token))

    def rest(self) -> str:
        """What is still held back when no more ids come: U+FFFD for half a character."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        text = None if token in self._skip else self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        # A token with a character outside the byte alphabet is a control string, spelt as it is.
        spelt = [_BYTES.get(character) for character in text]
        return text.encode() if None in spelt else bytes(byte for byte in spelt if byte is not None)
