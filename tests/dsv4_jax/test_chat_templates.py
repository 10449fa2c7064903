"""The texts of a release as data, and files that cannot be used."""

from __future__ import annotations

import shutil

import pytest
from chat_cases import FORMAT_TEXT, OPEN, SEARCH, TOOLS_TEXT, V0731, V4, system, user

import checkpoints
from dsv4_jax.chat import ChatFormat, ChatFormatError, encode_messages
from dsv4_jax.chat.templates import ENCODING_FILE, MAX_FILE_BYTES


@pytest.fixture
def read(tmp_path):
    """ChatFormat of a file with this content."""

    def write(content: str | bytes) -> ChatFormat:
        file = tmp_path / "encoding.py"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return ChatFormat.read(file)

    return write


@pytest.mark.parametrize(
    ("path", "release", "efforts"),
    [
        (V4, "V4", {None: "", "high": "", "max": "Effort: all of it.\nTwo literals.\n\n"}),
        (V0731, "0731", {None: "", "low": "", "high": "Effort: all of it.\n\n"}),
    ],
    ids=["V4", "0731"],
)
def test_texts_of_a_release(path, release, efforts):
    """The stand-in files would end the process if they ran."""
    found = ChatFormat.of_checkpoint(path)
    assert found.release == release
    assert {effort: found.effort_preamble(effort) for effort in efforts} == efforts
    assert found.render_tools([SEARCH["function"], OPEN["function"]]) == TOOLS_TEXT
    assert found.render_response_format({"type": "object"}) == FORMAT_TEXT


@pytest.mark.parametrize(("path", "effort"), [(V4, "low"), (V4, "none"), (V0731, "none"), (V0731, "HIGH")])
def test_efforts_of_another_release(path, effort):
    for thinking in (False, True):
        with pytest.raises(ValueError, match=f"effort='{effort}': the release of .*encoding_dsv4.py accepts "):
            encode_messages([user()], thinking=thinking, effort=effort, chat_format=ChatFormat.of_checkpoint(path))


@pytest.mark.parametrize(
    "ask",
    [
        {"messages": [system(tools=[SEARCH])]},
        {"messages": [system(response_format={"type": "object"})]},
        {"messages": [user()], "thinking": True, "effort": "high"},
    ],
    ids=["tools", "response format", "effort"],
)
def test_texts_that_are_needed_and_missing(ask, tmp_path):
    bare = ChatFormat.of_checkpoint(tmp_path)
    assert bare.release is None
    with pytest.raises(ChatFormatError, match=f"and {tmp_path} has none; copy encoding/encoding_dsv4.py"):
        encode_messages(**ask, chat_format=bare)
    assert encode_messages([user()], thinking=True, chat_format=bare).endswith("<think>")  # none is needed here


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('"a" "b" + "c"', "abc{schema}"),
        ('("a"\n"bc")', "abc{schema}"),
        ('f"a{B}c"', "abc{schema}"),
        ('"""abc"""', "abc{schema}"),
    ],
)
def test_constants_are_put_together(read, source, text):
    assert read(f'B = "b"\nC = {source}\nresponse_format_template: str = C + "{{schema}}"').response_format == text


@pytest.mark.parametrize(
    "source",
    [
        'open("x").read()',
        '"a{}".format(1)',
        'f"{B!r}"',
        "B * 2",
        "7",
        "None",
        '"a" if B else "b"',
        '["a"]',
        "unknown",
        "{**B}",
    ],
)
def test_what_would_have_to_run_is_no_text(read, source):
    """Also where a text stood before: the later assignment counts."""
    found = read(f'B = "b"\nresponse_format_template = "{{schema}}"\nresponse_format_template = {source}')
    assert found.response_format is None
    with pytest.raises(ChatFormatError, match="has none"):
        found.render_response_format({})


def test_texts_are_not_formatted_twice(read):
    found = read('TOOLS_TEMPLATE = "{{x}} {tool_schemas}"')
    assert found.render_tools([{"name": "{dsml_token} {{}}"}]) == '{x} {"name": "{dsml_token} {{}}"}'


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("def f(:", "cannot be parsed as Python"),
        (b"\x00", "cannot be parsed as Python"),
        (b"A = '\xff'", "cannot be parsed as Python"),
        ("(" * 5000, "cannot be parsed as Python"),
        ("A = " + "+".join(['"a"'] * 20000), "cannot be parsed as Python"),
        ('A = "a" * 1\nA = "aaaaaaaa"\n' + "A = A + A\n" * 60, "a text of more than"),
        (b"#" * (MAX_FILE_BYTES + 1), "larger than 4 MiB"),
        ('TOOLS_TEMPLATE = "{tool_schemas} {other}"', "TOOLS_TEMPLATE has the placeholders ['other', 'tool_schemas']"),
        ('TOOLS_TEMPLATE = "no place"', "TOOLS_TEMPLATE has the placeholders []"),
        ('TOOLS_TEMPLATE = "{tool_schemas.__class__}"', "TOOLS_TEMPLATE has the placeholders"),
        ('response_format_template = "{schema} {"', "response_format_template has the placeholders"),
        ('response_format_template = "{schema} {}"', "response_format_template has the placeholders"),
    ],
    ids=range(12),
)
def test_files_that_cannot_be_used(read, content, named):
    with pytest.raises(ChatFormatError) as error:
        read(content)
    assert named in str(error.value) and "encoding.py" in str(error.value)


def test_unreadable_file(tmp_path):
    with pytest.raises(ChatFormatError, match="absent.py: cannot be read"):
        ChatFormat.read(tmp_path / "absent.py")


def test_conversion_keeps_the_file(tmp_path):
    """A converted checkpoint chats as its source does."""
    source = shutil.copytree(checkpoints.bundled_path(), tmp_path / "source")
    shutil.copytree((V4 / ENCODING_FILE).parent, source / "encoding")
    checkpoints.convert(source, tmp_path / "converted")
    found = ChatFormat.of_checkpoint(tmp_path / "converted")
    assert found.release == "V4" and found.render_tools([SEARCH["function"], OPEN["function"]]) == TOOLS_TEXT
