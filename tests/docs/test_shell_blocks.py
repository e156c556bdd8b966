"""The documents' commands are run as they stand there, page by page, in a folder that has what they name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from documented import SHELL, pages
from prepared import of_page, prepare, shell

from smlt.emulator import LambdaLocal

PAGES = [page for page in pages() if of_page(page, *SHELL)]
#: Pages whose commands ask AWS: the emulator answers.
ON_AWS = ("docs/lambda-local.md", "docs/deploying.md")


@pytest.fixture(scope="module")
def aws() -> Iterator[dict[str, str]]:
    with LambdaLocal() as local:
        yield {**local.environment(), "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    wanted = of_page(page, *SHELL)
    environment = prepare(tmp_path, page, wanted)
    if page in ON_AWS:
        environment |= request.getfixturevalue("aws")
    for block in wanted:
        if block.language == "sh":
            shell("set -e\n" + block.text, tmp_path, environment)
        else:
            for line in block.commands():
                shell(line, tmp_path, environment)


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="there is no run nowhere"):
        shell("smlt status nowhere | cat", tmp_path, prepare(tmp_path, "README.md", []))
