"""The documents: their code runs, their pictures and links are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
def test_the_example_of_a_strategy_runs():
    page = (ROOT / "docs" / "kernel_strategy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/kernel_strategy.md", "exec"), names)
    assert names["plain"].shape == (1, 160, 64)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all((page.parent / link).exists() for link in links), links
    rooms = "dsv4_jax|checkpoints|pallas_kernels|training|benchmarks|tests|notebooks|docs"
    files = re.findall(rf"`((?:{rooms})/[\w./-]+)`", text)
    missing = [name for name in files if not (ROOT / name).exists()]
    assert not missing
