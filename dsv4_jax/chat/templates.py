"""The long prompt texts of a release, read from the checkpoint's `encoding/` Python file: parsed, never executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_jax.chat.dsml import to_json
from dsv4_jax.chat.tokens import DSML, THINK_CLOSE, THINK_OPEN

ENCODING_FILE = Path("encoding") / "encoding_dsv4.py"
MAX_FILE_BYTES = 4 << 20  # the published file has 40 KB
MAX_TEXT = 1 << 20  # characters of one constant; a few lines of A = B + B could ask for any amount

TOOLS_NAME = "TOOLS_TEMPLATE"
RESPONSE_FORMAT_NAME = "response_format_template"
EFFORTS_NAME = "REASONING_EFFORT_PROMPTS"  # 0731 and 0813: a text for each effort
DEFAULT_EFFORT_NAME = "DEFAULT_REASONING_EFFORT"
MAX_EFFORT_NAME = "REASONING_EFFORT_MAX"  # V4: one text

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class ChatFormatError(ValueError):
    """A text of the chat format is needed and missing, or the file that should hold it cannot be used."""


@dataclass(frozen=True)
class ChatFormat:
    """What differs between releases: three texts. Without a file they are missing, which matters once one is needed.

    Attributes:
      tools: template of the tools section, with a place for the schemas.
      response_format: template of the response-format section, with a place for the schema.
      efforts: preamble for each accepted effort, "" where it adds nothing; empty where no file was read.
      default_effort: the effort meant by None, or None where that is no effort at all.
      source: where the texts come from, or should have; for errors.
    """

    tools: str | None = None
    response_format: str | None = None
    efforts: Mapping[str, str] = field(default_factory=dict)
    default_effort: str | None = None
    source: str = "this chat format"

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> ChatFormat:
        """The texts of a checkpoint directory; none where it has no encoding/ file. Raises ChatFormatError."""
        path = Path(path)
        if (path / ENCODING_FILE).is_file():
            return cls.read(path / ENCODING_FILE)
        return cls(source=str(path))

    @classmethod
    def read(cls, file: str | Path) -> ChatFormat:
        """The texts of one encoding file.

        Its string constants are found by name in the syntax tree: joined literals, `+`, earlier names, f-strings of
        those and dicts of those are understood. Nothing in the file runs.

        Raises:
          ChatFormatError: the file is no Python, too large, or has a text whose placeholders are not the known ones.
        """
        found = _constants(Path(file))
        efforts, default = _efforts(found)
        texts = cls(_text(found, TOOLS_NAME), _text(found, RESPONSE_FORMAT_NAME), efforts, default, str(file))
        _check_places(file, TOOLS_NAME, texts.tools, {"tool_schemas"}, {*_TOOL_WORDS, "tool_schemas"})
        _check_places(file, RESPONSE_FORMAT_NAME, texts.response_format, {"schema"}, {"schema"})
        return texts

    @property
    def release(self) -> str | None:
        """ "0731" (also 0813) or "V4" by the efforts it knows, None without a file."""
        if not self.efforts:
            return None
        return "0731" if "low" in self.efforts else "V4"

    def effort_preamble(self, effort: str | None) -> str:
        """The text before the first message in thinking mode. The same word means another text in another release.

        Raises:
          ChatFormatError: an effort is asked for and no file says what it means.
          ValueError: the release does not know it.
        """
        effort = self.default_effort if effort is None else effort
        if effort is None:
            return ""
        if not self.efforts:
            raise self._missing(f"effort={effort!r} means a different text in each release")
        if effort not in self.efforts:
            raise ValueError(f"effort={effort!r}: the release of {self.source} accepts {', '.join(self.efforts)}")
        return self.efforts[effort]

    def render_tools(self, schemas: Sequence[Mapping[str, Any]]) -> str:
        """The tools section for a list of function schemas (the OpenAI `function` objects), one JSON line each."""
        if self.tools is None:
            raise self._missing("tools are described by a text")
        return _fill(self.tools, _TOOL_WORDS | {"tool_schemas": "\n".join(map(to_json, schemas))})

    def render_response_format(self, schema: Any) -> str:
        """The section that asks for replies of a JSON schema."""
        if self.response_format is None:
            raise self._missing("a response format is asked for by a text")
        return _fill(self.response_format, {"schema": to_json(schema)})

    def _missing(self, why: str) -> ChatFormatError:
        return ChatFormatError(
            f"{why} that ships with the checkpoint, and {self.source} has none; "
            f"copy {ENCODING_FILE} of the same release beside its config.json"
        )


_TOOL_WORDS = {"dsml_token": DSML, "thinking_start_token": THINK_OPEN, "thinking_end_token": THINK_CLOSE}


def _efforts(found: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """(text by effort, default) of either release."""
    table = found.get(EFFORTS_NAME)
    if isinstance(table, dict) and table:
        default = found.get(DEFAULT_EFFORT_NAME, "low")
        return table, default if default in table else None
    text = _text(found, MAX_EFFORT_NAME)
    return ({}, None) if text is None else ({"high": "", "max": text}, None)


def _text(found: Mapping[str, Any], name: str) -> str | None:
    value = found.get(name)
    return value if isinstance(value, str) else None


def _check_places(file: str | Path, name: str, template: str | None, needed: set[str], known: set[str]) -> None:
    if template is None:
        return
    places = {match[1] or match[0] for match in _BRACES.finditer(template) if match[0] not in ("{{", "}}")}
    if not needed <= places <= known:
        raise ChatFormatError(
            f"{file}: {name} has the placeholders {sorted(places)}; expected {sorted(needed)} among {sorted(known)}"
        )


def _fill(template: str, values: Mapping[str, str]) -> str:
    """As str.format for plain names, without its attribute access; what is filled in is not looked at again."""
    return _BRACES.sub(lambda match: values[match[1]] if match[1] else match[0][0], template)


class _NotDataError(Exception):
    """An expression that would have to run to have a value."""


def _constants(file: Path) -> dict[str, str | dict[str, str]]:
    """Top-level string constants, and dicts of them, by name."""
    try:
        with file.open("rb") as stream:
            source = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ChatFormatError(f"{file}: cannot be read ({error.strerror})") from None
    if len(source) > MAX_FILE_BYTES:
        raise ChatFormatError(f"{file}: larger than {MAX_FILE_BYTES >> 20} MiB, which no encoding file is")
    try:
        body = ast.parse(source).body
        found: dict[str, Any] = {}
        for node in body:
            _assign(node, found)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ChatFormatError(f"{file}: cannot be parsed as Python ({error or type(error).__name__})") from None
    return found


def _assign(node: ast.stmt, found: dict[str, Any]) -> None:
    """Note what a top-level assignment gives its names; a value that is no data makes them unknown."""
    if isinstance(node, ast.AnnAssign):
        targets: Sequence[ast.expr] = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    try:
        value = None if node.value is None else _value(node.value, found)
    except _NotDataError:
        value = None
    for name in names:
        found[name] = value


def _value(node: ast.expr, found: Mapping[str, Any]) -> str | dict[str, str]:
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_string(key, found): _string(value, found) for key, value in pairs}
    return _string(node, found)


def _string(node: ast.expr | None, found: Mapping[str, Any]) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if isinstance(found.get(name), str):
            return found[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _bounded(_string(left, found) + _string(right, found))
        case ast.JoinedStr(values=values):
            return _bounded("".join(_string(value, found) for value in values))
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _string(value, found)
    raise _NotDataError


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text of more than {MAX_TEXT} characters")
    return text
