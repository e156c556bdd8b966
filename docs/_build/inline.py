"""Puts the pictures of the concepts into their pages, where they take the palette's colours. A mkdocs hook."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

IMAGE = re.compile(r'<img\b[^>]*\bsrc="[^"]*images/(concept-[a-z-]+\.svg)"[^>]*>')
STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """mkdocs calls this with a page's HTML."""

    def drawn(match: re.Match[str]) -> str:
        return STYLE.sub("", (Path(config.docs_dir) / "images" / match[1]).read_text()).strip()

    return IMAGE.sub(drawn, html)
