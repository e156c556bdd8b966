"""What a worker's process keeps from one run to the next, and what it forgets."""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest

from smlt.worker.main import Sandbox


class Obliging(types.ModuleType):
    """Has whatever it is asked for, as torch.classes has."""

    def __getattr__(self, name: str) -> Any:
        return object()


def test_a_runs_modules_are_forgotten_and_a_module_that_answers_to_any_name_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox()
    sandbox.scratch = tempfile.TemporaryDirectory(prefix="smlt-worker-")
    folder = Path(sandbox.scratch.name)
    own, package = types.ModuleType("own_module"), types.ModuleType("own_package")
    own.__file__, package.__path__ = str(folder / "code" / "own_module.py"), [str(folder / "code" / "own_package")]
    obliging = Obliging("obliging")
    for module in (own, package, obliging):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sandbox.forget()
    assert "own_module" not in sys.modules
    assert "own_package" not in sys.modules
    assert sys.modules["obliging"] is obliging
    assert not folder.exists()
