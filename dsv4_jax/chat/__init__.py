"""The chat format: conversations to prompts, replies to their parts, ids to text; and a chat in the terminal."""

from dsv4_jax.chat.detokenize import Detokenizer
from dsv4_jax.chat.dsml import ToolCall
from dsv4_jax.chat.encoding import encode_messages, encode_prompt
from dsv4_jax.chat.parse import Piece, Reply, ReplyError, ReplyReader, parse_reply
from dsv4_jax.chat.templates import ChatFormat, ChatFormatError

__all__ = [
    "ChatFormat",
    "ChatFormatError",
    "Detokenizer",
    "Piece",
    "Reply",
    "ReplyError",
    "ReplyReader",
    "ToolCall",
    "encode_messages",
    "encode_prompt",
    "parse_reply",
]
