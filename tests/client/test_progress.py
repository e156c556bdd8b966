"""What a run prints."""

from __future__ import annotations

import io
import json

import pytest

from smlt.client.progress import make_progress


class Pieces(io.StringIO):
    """Remembers what came at once: between two pieces a Ctrl-C may come."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_an_event_is_never_cut_off_from_its_lines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Pieces()
    monkeypatch.setattr("sys.stdout", out)
    progress = make_progress(as_json=True)
    progress.warning("one")
    progress.stopping()
    assert all(piece.endswith("\n") for piece in out.pieces)
    assert [json.loads(piece)["event"] for piece in out.pieces] == ["warning", "stopping"]
