"""Reads SMLT's docstrings as mkdocstrings wants them. A griffe extension.

Docstrings here have NumPy's section of parameters, then go on in prose ("Returns ...", "Raises ..."), and show examples as
doctests anywhere. NumPy's style knows no end of a section but the next one: so the prose comes before the parameters, and
doctests become code blocks.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import griffe

SECTION = re.compile(r"^Parameters\n-{3,}\n", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """griffe calls this with each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = arranged(obj.docstring.value)


def arranged(text: str) -> str:
    """The docstring, its prose before its parameters and its doctests fenced."""
    found = SECTION.search(text)
    if found is None:
        return fenced(text)
    lines = text[found.end() :].splitlines()
    end = next((i for i, line in enumerate(lines) if _is_prose(lines, i)), len(lines))
    before, parameters, behind = text[: found.start()], "\n".join(lines[:end]), "\n".join(lines[end:])
    return f"{fenced(before).rstrip()}\n\n{fenced(behind).strip()}\n\n{found[0]}{parameters.rstrip()}\n"


def _is_prose(lines: list[str], index: int) -> bool:
    """A parameter's name is followed by its indented text; prose is not."""
    line = lines[index]
    behind = lines[index + 1] if index + 1 < len(lines) else ""
    return bool(line.strip()) and not line.startswith(" ") and not behind.startswith(" ")


def fenced(text: str) -> str:
    """Doctests as code blocks, without what is for doctest alone."""
    parts = []
    for doctest, lines in groupby(text.splitlines(), lambda line: line.lstrip().startswith((">>>", "..."))):
        part = "\n".join(re.sub(r"\s*# doctest:.*", "", line.lstrip()[4:]) if doctest else line for line in lines)
        parts.append(f"```python\n{part}\n```" if doctest else part)
    return "\n".join(parts)
