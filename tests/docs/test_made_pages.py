"""What is made of code for the site: pictures, the command-line reference, docstrings as the reference shows them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from commandline import REPOSITORY

BUILD = REPOSITORY / "docs" / "_build"


def made_by(name: str) -> ModuleType:
    """A module of docs/_build, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_build_{name}", BUILD / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_what_their_program_draws() -> None:
    pictures = made_by("pictures")
    drawn = {f"concept-{picture.name}.svg": picture.svg() for picture in (draw() for draw in pictures.PICTURES)}
    there = {path.name: path.read_text() for path in (REPOSITORY / "docs" / "images").glob("concept-*.svg")}
    assert drawn == there


def test_a_picture_in_a_page_has_the_colours_of_the_file() -> None:
    sheet = "".join((REPOSITORY / "docs" / "stylesheets" / "site.css").read_text().split())
    for line in made_by("pictures").FIGURE.splitlines():
        for rule in line.split("}"):
            assert "".join(rule.replace(" }", "").split()).rstrip(";") in sheet.replace(";}", "}"), rule


def test_the_command_line_reference_has_every_command_and_option() -> None:
    pytest.importorskip("mkdocs")
    command_line = made_by("command_line")
    page = command_line.reference()
    commands = dict(command_line.commands())
    assert len(commands) > 20
    for name, command in commands.items():
        section = page.partition(f"\n## smlt {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                for word in parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]:
                    assert f"`{word}" in section, (name, word)


def test_a_docstrings_prose_comes_before_its_parameters_and_doctests_are_code() -> None:
    pytest.importorskip("griffe")
    parameters = "Parameters\n----------\nx\n    What.\ny, z\n    More.\n"
    text = f"Do it.\n\n{parameters}\nRaises ConfigError\nfor bad ones.\n\n>>> f(1)  # doctest: +SKIP\n"
    arranged = made_by("docstrings").arranged(text)
    assert arranged == f"Do it.\n\nRaises ConfigError\nfor bad ones.\n\n```python\nf(1)\n```\n\n{parameters}"


def test_links_that_leave_the_documents_lead_to_pages_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    repository = made_by("repository")
    assert repository._outside("../examples/digits.py", "tasks.md") == "examples/digits.py"
    assert repository._outside("../codecs.md", "concepts/words.md") is None
    assert repository._outside("https://example.org/x", "tasks.md") is None
    assert repository._seen_from_docs("[a](docs/aws.md#b) [c](examples/d.py)") == "[a](aws.md#b) [c](../examples/d.py)"
