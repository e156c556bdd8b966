"""The documents' Python is run: the blocks of a page in their order, in one namespace, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from documented import pages, workers
from prepared import of_page, prepare, shell

RUNNER = Path(__file__).with_name("run_blocks.py")
PAGES = [page for page in pages() if of_page(page, "python")]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    wanted = of_page(page, "python")
    environment = prepare(tmp_path, page, wanted)
    lacking = {name for block in wanted for name in needs(block.notes) if importlib.util.find_spec(name) is None}
    here = [block for block in wanted if not lacking.intersection(needs(block.notes))]
    parts = tmp_path / "blocks.json"
    parts.write_text(json.dumps({"name": page, "blocks": [(block.line, block.text) for block in here]}))
    n = workers(page)
    command = f"smlt launch -n {n} {RUNNER} {parts}" if n > 1 else f"python {RUNNER} {parts}"
    shell(command, tmp_path, environment)
    if lacking:
        pytest.skip(f"{', '.join(sorted(lacking))} is not installed: {len(wanted) - len(here)} blocks were compiled only")


def needs(notes: dict[str, str]) -> list[str]:
    return notes.get("needs", "").replace(",", " ").split()


def test_a_block_that_raises_is_seen_with_its_line(tmp_path: Path) -> None:
    parts = tmp_path / "blocks.json"
    parts.write_text(json.dumps({"name": "docs/some.md", "blocks": [(3, "x = 1\n"), (10, "assert x == 1\nassert x == 2\n")]}))
    with pytest.raises(AssertionError, match=r'docs/some\.md", line 12'):
        shell(f"python {RUNNER} {parts}", tmp_path, prepare(tmp_path, "README.md", []))
