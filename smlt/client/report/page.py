"""A report as one HTML file: nothing is fetched from anywhere, nothing runs in it, light or dark as the reader's system is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from smlt._version import __version__
from smlt.client.report.contents import Section
from smlt.client.report.pictures import COLOURS, Picture, Table, drawing, inline_svg, plain
from smlt.errors import StoreError

#: What a browser is told too, should anything of this ever slip through: no scripts, no requests.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --line: #d0d7de; --shade: #f6f8fa; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --line: #30363d; --shade: #161b22; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.5rem 0 .3rem; font-size: 1.05rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; list-style: none; }
a { color: var(--blue); } a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--blue); }
figure { margin: 0 0 1.5rem; } figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption, .note, footer { color: var(--text); opacity: .85; font-size: .9rem; }
summary { cursor: pointer; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td { white-space: pre-wrap; min-width: 4rem; } thead th { background: var(--shade); }
@media print { details > * { display: block; } nav { display: none; } }
"""


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file. Every word in it is escaped, wherever it comes from."""
    light = " ".join(f"--{name}: {colour};" for name, (colour, _) in COLOURS.items())
    dark = " ".join(f"--{name}: {colour};" for name, (_, colour) in COLOURS.items())
    links = "".join(f'<li><a href="#{section.name}">{_text(section.title)}</a></li>' for section in sections)
    with drawing():
        body = "".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY, quote=True)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n"
        f"<style>{_STYLE.replace('LIGHT', light).replace('DARK', dark)}</style>\n</head>\n<body>\n"
        f'<header><h1>{_text(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n<footer><p>Made by smlt {_text(__version__)}.</p></footer>\n</body>\n</html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Write the file, whole or not at all. StoreError when it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error


def _section(section: Section) -> str:
    parts = [_figure(picture) for picture in section.pictures]
    parts += [(f"<h3>{_text(title)}</h3>" if title else "") + _table(table) for title, table in section.tables]
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    name = section.name
    return f'<section id="{name}" aria-labelledby="{name}-heading"><h2 id="{name}-heading">{_text(section.title)}</h2>\n' + (
        "\n".join(parts) + "</section>\n"
    )


def _figure(picture: Picture) -> str:
    numbers = f"<details><summary>Numbers</summary>{_table(picture.table)}</details>" if picture.table is not None else ""
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    drawn = f'<div class="wide" tabindex="0">{inline_svg(picture)}</div>'
    return f"<h3>{_text(picture.title)}</h3><figure>{drawn}{caption}</figure>{numbers}"


def _table(table: Table) -> str:
    """The first column names the row."""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header) if any(table.header) else ""
    rows = "".join(
        f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in table.rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide" tabindex="0"><table>{top}<tbody>{rows}</tbody></table></div>'


def _text(text: str) -> str:
    return escape(plain(text), quote=True)
