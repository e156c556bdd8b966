"""Every block of the documents is of a kind that is checked, and every command in them is one."""

from __future__ import annotations

import ast
import doctest
import json
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from typing import Any

import pytest
from commandline import REPOSITORY
from documented import LANGUAGES, SHELL, Block, blocks, inline_code, options_of, pages, problem, script_exists, smlt_lines

import smlt
import smlt.errors

ALL = [block for page in pages() for block in blocks(page)]
#: Programs beside `smlt` that the documents tell to run.
PROGRAMS = {
    *("aws", "bash", "cd", "cibuildwheel", "docker", "echo", "export", "gh", "git", "ls", "mkdocs", "open", "output", "pip"),
    *("accelerate", "check-jsonschema", "python", "python3", "rm", "torchrun", "twine", "zizmor"),
}
SHELL_WORDS = (".", "}", "do", "done", "for", "set")
NAMES: dict[str, Any] = {"argvalues": ALL, "ids": [block.place for block in ALL]}


@pytest.mark.parametrize("block", **NAMES)
def test_a_block_says_what_it_is_and_why_when_it_is_not_run(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.place}: fence it as one of {', '.join(LANGUAGES)}"
    reason = block.notes.get("not run")
    assert reason is None or len(reason.split()) >= 2, f"{block.place}: say why it is not run"
    assert block.text.strip()


@pytest.mark.parametrize("block", **NAMES)
def test_a_block_is_well_formed_also_when_it_is_not_run(block: Block) -> None:
    match block.language:
        case "python":
            compile("\n" * block.line + block.text, block.page, "exec")
        case "json":
            json.loads(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            pytest.importorskip("yaml").safe_load(block.text)
        case "sh" | "console":
            assert block.commands(), f"{block.place}: no command"
            subprocess.run([shutil.which("bash") or "bash", "-n", "-c", "\n".join(block.commands())], check=True)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in ALL if b.language in SHELL])
def test_the_commands_of_a_block_are_those_of_the_programs(block: Block) -> None:
    for line in smlt_lines(block):
        assert problem(line) == "", f"{block.place}: smlt {line}"
    for line in block.commands():
        check_program(line, block.page)


@pytest.mark.parametrize("page", pages())
def test_the_commands_in_the_text_are_those_of_the_programs(page: str) -> None:
    for code in inline_code(page):
        if re.match(r"smlt [a-z-]", code) and not code.endswith("..."):
            # In a sentence a command stands for all its uses: it need not be complete.
            said = problem(code.removeprefix("smlt "))
            assert not said or said.startswith("missing") or "requires an argument" in said, f"{page}: `{code}`: {said}"
        elif re.match(r"python3? (-m )?(bench|examples|tests|release)\b", code):
            check_program(code, page)


def check_program(line: str, page: str) -> None:
    """The program of a command line is known; of the repository's own, also that it is there and has these options."""
    line = re.sub(r"^(?:[A-Z_]+=(\"[^\"]*\"|\S*) ?)+", "", re.sub(r"\$\([^)]*\)", "VALUE", line.strip()))
    words = shlex.split(line, comments=True)
    if not words or words[0] in (*SHELL_WORDS, "smlt") or "() {" in line:
        return
    program = words[0].removeprefix(".venv/bin/").removeprefix("$HOME/.venv/bin/")
    assert program in PROGRAMS, f"{page}: {program} is no program that a document may call: {line}"
    if program in ("python", "python3") and len(words) > 1:
        if words[1] == "-m" and words[2].partition(".")[0] == "bench":
            source = options_of(words[2])
            assert source is not None, f"{page}: there is no {words[2]}"
            for word in words[3:]:
                option = word.partition("=")[0]
                assert not option.startswith("--") or f'"{option}"' in source, f"{page}: {words[2]} has no {option}"
        elif words[1].endswith(".py"):
            assert script_exists(words[1], page), f"{page}: there is no {words[1]}"


def test_the_checks_see_what_is_wrong() -> None:
    assert "no command" in problem("logz RUN")
    assert "--folow" in problem("logs RUN --folow")
    assert "missing" in problem("logs --follow")
    assert "too many" in problem("logs RUN another")
    assert problem("store template --kind ec2 > store.yaml") == ""
    with pytest.raises(AssertionError, match=r"no bench\.nothing"):
        check_program("python -m bench.nothing --workers 2", "README.md")
    with pytest.raises(AssertionError, match="has no --wrokers"):
        check_program("python -m bench.compare --wrokers 2", "README.md")
    with pytest.raises(AssertionError, match="no program"):
        check_program("slmt train task.py", "README.md")


def test_the_readme_has_the_two_commands_that_ci_reads() -> None:
    assert len(re.findall(r"^```sh$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)) == 2


@pytest.mark.parametrize("page", pages())
def test_the_extras_that_a_page_tells_to_install_are_there(page: str) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"(?:smlt|'\.|\"\.)\[([a-z0-9, -]+)\]", (REPOSITORY / page).read_text()):
        for name in names.split(","):
            assert name.strip() in extras, f"{page}: there is no extra {name}"


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text() for path in (REPOSITORY / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    missing = [name for name in public_names() if name not in shown and name.rpartition(".")[0] not in shown]
    assert missing == []


def test_the_examples_in_docstrings_compile() -> None:
    found = 0
    for path in sorted((REPOSITORY / "smlt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for example in doctest.DocTestParser().get_examples(ast.get_docstring(node) or ""):
                    # What a method of the reader's holds may return: it is compiled as one.
                    compile("def method():\n" + textwrap.indent(example.source, "    "), str(path), "exec")
                    found += 1
    assert found > 5


def public_names() -> list[str]:
    """The public names by where they are defined; of modules that need a framework, as their `__all__` has them."""
    names = [f"{smlt._HOME[name]}.{name}" for name in smlt.__all__ if name != "__version__"]
    names += [f"smlt.errors.{name}" for name, value in vars(smlt.errors).items() if isinstance(value, type)]
    for path in [*(REPOSITORY / "smlt").glob("*.py"), *(REPOSITORY / "smlt" / "torch").glob("__init__.py")]:
        found = re.search(r"^__all__ = (\[.*?\])", path.read_text(), re.MULTILINE | re.DOTALL)
        if found and path.parts[-2:] != ("smlt", "__init__.py"):
            module = path.parent.name if path.name == "__init__.py" else path.stem
            names += [f"smlt.{module}.{name}" for name in ast.literal_eval(found[1])]
    return names
