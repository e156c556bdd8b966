"""What lies beside docs/ and belongs on the site: changelog, contributing, and the source files that pages point to.

A mkdocs hook. Pages link to files of the repository as they would on a code host (`../examples/digits.py`); here each such
file becomes a page of its own. So one link is right in both places, and a file that is not there is found by --strict.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

#: Files beside docs/ that are pages by themselves.
WHOLE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
#: Where links to the files beside docs/ lead that are no pages themselves.
INSTEAD = {**WHOLE, "README.md": "index.md"}
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".toml": "toml", ".sh": "sh", ".json": "json"}
EXAMPLES = "source/examples.md"
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs calls this when it has found the files."""
    root = Path(config.docs_dir).parent
    for name, uri in WHOLE.items():
        files.append(File.generated(config, uri, content=_seen_from_docs((root / name).read_text())))
    wanted = {path.relative_to(root).as_posix() for path in (root / "examples").rglob("*.py")}
    for file in list(files.documentation_pages()):
        wanted |= {path for path in map(lambda link: _outside(link[0], file.src_uri), LINK.findall(file.content_string)) if path}
    for path in sorted(wanted - set(INSTEAD)):
        if (root / path).is_file():
            page = File.generated(config, _page_of(path), content=_shown(root, path), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
    files.append(File.generated(config, EXAMPLES, content=_examples(root)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ to the pages made of what they name."""

    def pointed(match: re.Match[str]) -> str:
        path = _outside(match[1], page.file.src_uri)
        if path is None:
            return match[0]
        target = INSTEAD.get(path) or _page_of(path)
        if files.get_file_from_path(target) is None:
            return match[0]  # mkdocs will say that it is not there
        return f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{match[2] or ''})"

    return LINK.sub(pointed, markdown)


def _outside(link: str, page: str) -> str | None:
    """The path in the repository that a page's link leads to, when that is not below docs/."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith(("docs/", "..")) or path == "docs" else path


def _page_of(path: str) -> str:
    return f"source/{path.removesuffix('.md')}.md"


def _seen_from_docs(markdown: str) -> str:
    """A file that lies beside docs/, with its links as a page in docs/ would write them."""

    def moved(match: re.Match[str]) -> str:
        link = match[1]
        if "://" in link or link.startswith(("/", "#", "mailto:")):
            return match[0]
        return f"]({link.removeprefix('docs/') if link.startswith('docs/') else '../' + link}{match[2] or ''})"

    return LINK.sub(moved, markdown)


def _shown(root: Path, path: str) -> str:
    text = (root / path).read_text()
    if path.endswith(".md"):
        return _seen_from_docs(text)
    fence = "````" if "```" in text else "```"
    return f"# {Path(path).name}\n\n`{path}`\n\n{fence}{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}{fence}\n"


def _examples(root: Path) -> str:
    """A table of the examples, by the first paragraph of their docstrings."""
    rows = []
    for path in sorted((root / "examples").rglob("*.py")):
        document = ast.get_docstring(ast.parse(path.read_text())) or ""
        about = " ".join(document.split("\n\n")[0].split()).replace("|", r"\|")
        name = path.relative_to(root / "examples").as_posix()
        if about:
            rows.append(f"| [{name}](examples/{name}.md) | {about} |")
    return "\n".join(
        [
            "# Examples",
            "",
            "Whole programs, those of the repository's `examples/`.",
            "",
            "| file | what it is |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )
