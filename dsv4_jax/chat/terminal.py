"""Chat in the terminal: reads lines, streams replies to stdout; everything else goes to stderr."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import closing

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from dsv4_jax.chat.parse import Kind, Piece
from dsv4_jax.chat.session import Session

HELP = """\
/help              this list
/clear             forget the conversation
/think [on|off]    let the model reason before it answers; /think alone switches
/think EFFORT      ... with an effort of this release: {efforts}
/system TEXT       another system message, and a fresh conversation; without TEXT none
/exit              leave; so does Ctrl-D
Ctrl-C             stop the reply; what came of it is kept
//...              says a line that begins with a slash"""

STYLES: dict[Kind, Style] = {
    "reasoning": Style(dim=True, italic=True),
    "content": Style.null(),
    "tool_calls": Style(color="cyan"),
}
BIDIRECTIONAL = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def converse(
    session: Session, *, out: Console | None = None, err: Console | None = None, read: Callable[[], str] | None = None
) -> None:
    """Talk until the end of input or /exit.

    Args:
      session: the model and the settings to begin with.
      out, err: where replies, and everything else, are written; default stdout and stderr.
      read: gives the next line; EOFError ends the chat, KeyboardInterrupt drops the line. Default: `input`.
    """
    _Terminal(session, out or Console(), err or Console(stderr=True), read or _read_line).run()


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters and changes of direction become U+FFFD."""
    return "".join(
        "\ufffd" if (unicodedata.category(c) == "Cc" and c not in "\n\t") or c in BIDIRECTIONAL else c for c in text
    )


def _read_line() -> str:
    """A line from stdin, with a prompt and editing where a person types."""
    if not sys.stdin.isatty():
        return input()
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # importing it gives `input` a history
    return input("> ")


class _Terminal:
    """The loop and its commands."""

    def __init__(self, session: Session, out: Console, err: Console, read: Callable[[], str]):
        self.session, self.out, self.err, self.read = session, out, err, read

    def run(self) -> None:
        if missing := self.session.missing_tokens:
            self.note(
                f"the tokenizer has no {' '.join(missing)}: this model was not made for chat, its text goes on freely"
            )
        self.note("/help lists the commands; Ctrl-D leaves")
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.note("")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/") and not line.startswith("//"):
                self.command(line)
            elif line:
                self.say(line.removeprefix("/") if line.startswith("//") else line)

    def note(self, text: str) -> None:
        self.err.print(Text(printable(text), style="dim"), soft_wrap=True)

    def command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        known = {"/help": self.help, "/clear": self.clear, "/think": self.think, "/system": self.system}
        if word not in known:
            self.note(f"{word}: no such command; /help lists them")
            return
        known[word](rest.strip())

    def help(self, _: str) -> None:
        efforts = self.session.chat_format.efforts
        self.note(HELP.format(efforts=", ".join(efforts) if efforts else "none known, its encoding/ file is missing"))

    def clear(self, _: str) -> None:
        self.session.clear()
        self.note("forgotten")

    def think(self, word: str) -> None:
        switches = {"": not self.session.thinking, "on": True, "off": False}
        try:
            self.session.set_thinking(*((switches[word],) if word in switches else (True, word)))
        except ValueError as error:
            self.note(str(error))
            return
        effort = f", effort {self.session.effort}" if self.session.effort else ""
        self.note(f"thinking {'on' if self.session.thinking else 'off'}{effort}")

    def system(self, text: str) -> None:
        self.session.system = text or None
        self.session.clear()
        self.note("system message set" if text else "no system message")

    def say(self, text: str) -> None:
        """One turn: the reply as it comes, then what it took. An interrupt ends the reply, not the chat."""
        stopped = False
        try:
            with closing(self.session.ask(text)) as pieces:
                self.show(pieces)
        except KeyboardInterrupt:
            stopped = True
        except ValueError as error:
            self.err.print(Text.assemble(("error:", "bold red"), f" {printable(str(error))}"), soft_wrap=True)
            return
        self.out.print()
        stats = self.session.last
        rate = f", {stats.tokens_per_second:.1f} tokens/s after it" if stats.tokens_per_second else ""
        counts = f"{stats.prompt_tokens} + {stats.new_tokens} tokens; first after {stats.first_seconds:.2f} s{rate}"
        self.note(f"stopped; {counts}" if stopped else counts)

    def show(self, pieces: Iterable[Piece]) -> None:
        kind: Kind | None = None
        for piece in pieces:
            if kind not in (None, piece.kind):
                self.out.print("\n")
            kind = piece.kind
            # Segments are written as they are; anything else would have its tabs expanded.
            written = Segments([Segment(printable(piece.text), STYLES[kind])])
            self.out.print(written, end="", soft_wrap=True)
