"""The documents' fenced blocks and commands, as a Markdown parser sees them.

A block is run by a test unless an HTML comment right before it says why not:

    <!-- not run: needs an AWS account -->        it is still compiled, parsed, or checked against the command line
    <!-- needs: tensorflow -->                    run where that can be imported
    <!-- workers: 2 -->                           anywhere in a page: its Python is run by `smlt launch -n 2`
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
from commandline import REPOSITORY
from markdown_it import MarkdownIt

import smlt.cli

COMMENT = re.compile(r"<!--\s*(not run|needs|workers):\s*(.*?)\s*-->")
#: What a fence may say, and what is done with it. A language that is not here is an error, not a gap.
LANGUAGES = {
    "python": "run",
    "sh": "run, line by line",
    "console": "what stands behind $ is run",
    "json": "parsed",
    "toml": "parsed",
    "yaml": "parsed",
    "text": "nothing to run: a picture, a formula, what a program has printed",
}
SHELL = ("sh", "console")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    info: str
    text: str
    notes: dict[str, str]

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def title(self) -> str | None:
        """The file that a block is to be put in."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None

    @property
    def runs(self) -> bool:
        return "not run" not in self.notes

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """The command lines of a shell block, without comments; of a console block, those behind a prompt."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pages() -> list[str]:
    """README.md and all of docs/, by their paths in the repository."""
    found = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    return [path.relative_to(REPOSITORY).as_posix() for path in found]


@cache
def tokens(page: str) -> tuple[Any, ...]:
    return tuple(MarkdownIt().enable("table").parse((REPOSITORY / page).read_text()))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The code of a page, fenced or indented, in its order."""
    found: list[Block] = []
    notes: dict[str, str] = {}
    for token in tokens(page):
        if token.type == "html_block":
            notes = {**notes, **dict(COMMENT.findall(token.content))}
        elif token.type in ("fence", "code_block"):
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, notes))
            notes = {}
        elif token.type != "inline" or token.content:
            notes = {}
    return tuple(found)


def inline_code(page: str) -> list[str]:
    """What stands between backticks in the text."""
    inside = [child for token in tokens(page) for child in token.children or ()]
    return [" ".join(child.content.split()) for child in inside if child.type == "code_inline"]


def workers(page: str) -> int:
    """How many processes run a page's Python."""
    found = [value for name, value in COMMENT.findall((REPOSITORY / page).read_text()) if name == "workers"]
    return int(found[0]) if found else 1


def smlt_lines(block: Block) -> list[str]:
    """What follows `smlt` in a block's command lines, without what is before it and behind a pipe or redirection."""
    found = []
    for line in block.commands():
        match = re.match(r"(?:[A-Z_]+=\S* )*smlt (.*)", line)
        if match:
            found.append(match[1])
    return found


def problem(line: str) -> str:
    """Why the command line would refuse this, "" when it would not."""
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        if word in ("|", ">", "&&", ";", "&"):
            words = words[:index]
            break
    command: Any = typer.main.get_command(smlt.cli.app)
    context = command.context_class(command)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"there is no command {words[0]}"
        command = command.commands[words.pop(0)]
        context = command.context_class(command, parent=context, **command.context_settings)
    try:
        given, left, _ = command.make_parser(context).parse_args(words)
    except Exception as error:
        return str(error) or type(error).__name__
    if left:
        return f"too many arguments: {left}"
    missing = [one.name for one in command.params if one.required and given.get(one.name) in (None, ())]
    return f"missing: {missing}" if missing else ""


def written_files(page: str) -> dict[str, str]:
    """The files that the reader of a page makes."""
    return {block.title: block.text for block in blocks(page) if block.title}


def script_exists(name: str, page: str) -> bool:
    return name in written_files(page) or any((REPOSITORY / folder / name).is_file() for folder in (".", "examples"))


def options_of(module: str) -> str | None:
    """The source that declares a module's options, None when there is no such module."""
    path = REPOSITORY / module.replace(".", "/")
    folder = path if path.is_dir() else None
    files = sorted(folder.rglob("*.py")) if folder else [path.with_suffix(".py")]
    if folder is not None and not (folder / "__main__.py").is_file():
        return None
    return "".join(file.read_text() for file in files) if all(Path(file).is_file() for file in files) else None
