"""The command-line reference, made from the commands themselves while the site is built: it cannot say what they do not.

A mkdocs hook: reference/command-line.md is no file, it is generated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import smlt.cli

PAGE = "reference/command-line.md"
OPENING = """# Command line

Every command and option of `smlt`, made from the program itself. `smlt COMMAND --help` says the same.

Exit codes: 0 done, 1 a bug, 2 usage, 3 store, 4 collective or lost worker, 5 the task, 6 run folder or checkpoint, 7 AWS and
deployments, 8 stopped for its deadline or budget, 130 Ctrl-C, 143 ended by `smlt stop`. With `SMLT_DEBUG=1` an expected error
shows its traceback.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this when it has found the files."""
    files.append(File.generated(config, PAGE, content=reference()))
    return files


def reference() -> str:
    """The page, in Markdown."""
    return "\n".join([OPENING, *(_section(name, command) for name, command in commands())])


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of all commands, those of groups by their full name, in the order of `smlt --help`."""
    app: Any = typer.main.get_command(smlt.cli.app)
    for name, command in app.commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", one) for inner, one in command.commands.items() if not one.hidden)
        elif not command.hidden:
            yield name, command


def _section(name: str, command: Any) -> str:
    parameters = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    options = [one for one in parameters if one.param_type_name == "option"]
    usage = " ".join(["smlt", name, *(_placeholder(one) for one in arguments), *(["[options]"] if options else [])])
    parts = [f"## smlt {name}", f"```text\n{usage}\n```", inspect.cleandoc(command.help or "")]
    if arguments:
        rows = [f"| `{_name(one)}` | {_escape(one.help or '')} |" for one in arguments]
        parts.append("\n".join(["| argument | |", "| --- | --- |", *rows]))
    if options:
        hints = get_type_hints(command.callback)
        rows = [f"| {_flags(one, hints[one.name])} | {_default(one)} | {_escape(one.help or '')} |" for one in options]
        parts.append("\n".join(["| option | default | |", "| --- | --- | --- |", *rows]))
    if command.epilog:
        lines = [line.strip() for line in command.epilog.splitlines()]
        parts.append("```sh\n" + "\n".join(line for line in lines if line not in ("\b", "Examples:", "")) + "\n```")
    return "\n\n".join(parts) + "\n"


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper()


def _placeholder(argument: Any) -> str:
    name = _name(argument) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _flags(option: Any, hint: Any) -> str:
    names = [*sorted(option.opts, key=len, reverse=True), *option.secondary_opts]
    value = "" if option.is_flag else f" {option.metavar or _kind(hint)}"
    return "<br>".join(f"`{name}{value}`" for name in names)


def _kind(hint: Any) -> str:
    """The name of an option's type: INT for int | None, TEXT for list[str]."""
    kinds = [one for one in get_args(hint) or (hint,) if one is not type(None)]
    name = getattr(kinds[0], "__name__", "value")
    return {"str": "TEXT", "list": "TEXT"}.get(name, name.upper())


def _default(option: Any) -> str:
    """What --help shows as the default; a text that was written for it comes before the value."""
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    nothing = shown is None or shown is False or callable(shown) or shown in ((), [])
    told = "" if nothing else "yes" if shown is True else _escape(str(shown))
    variable = option.envvar if isinstance(option.envvar, str) else None
    return "<br>".join(part for part in (told, f"`{variable}`" if variable else "") if part)


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;")
