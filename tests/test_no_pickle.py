"""No pickle: what comes off a wire or a disk is data, and loading it runs nothing."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import smlt as package

FOLDER = Path(package.__file__).parent
sys.path.insert(0, str(Path(__file__).parent / "client"))

from commandline import smlt, write_task  # noqa: E402

MODULES = {
    "multiprocessing",  # it pickles what it hands to its children
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "copyreg",
    "jsonpickle",
    "yaml",
}
#: Names of functions that unpickle unless they are told not to, and the argument that tells them.
CALLS = {
    "torch.load": ("weights_only", True),
    "torch.save": ("", None),
    "numpy.load": ("allow_pickle", False),
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "numpy.save": ("allow_pickle", False),
    "pd.read_pickle": ("", None),
    "pandas.read_pickle": ("", None),
}
#: Methods of NumPy and PyTorch that pickle.
METHODS = {"dump", "dumps", "send_object", "all_gather_object", "broadcast_object_list"}
#: File and module: why it may. Nothing here is on a network or a disk.
ALLOWED = {
    ("client/tracing.py", "multiprocessing"): "pipes between smlt trace and the children it has started itself",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(source: str) -> list[str]:
    """What in a Python source pickles or could."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in ("__import__", "importlib.import_module", "import_module") and node.args:
                first = node.args[0]
                names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    found.append(f"{called}(allow_pickle=...)")
            if called in CALLS:
                name, wanted = CALLS[called]
                given = [k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)]
                if given != [wanted] or not name:
                    found.append(called)
            if called.rpartition(".")[2] in METHODS and called.partition(".")[0] not in ("json", "ast"):
                found.append(called)
        found += [name for name in names if name.partition(".")[0] in MODULES]
    return found


def test_no_module_of_the_package_pickles() -> None:
    files = sorted(path for path in FOLDER.rglob("*.py*") if path.suffix in (".py", ".pyi"))
    assert len(files) > 40
    found = [(path.relative_to(FOLDER).as_posix(), use) for path in files for use in uses(path.read_text())]
    assert [(name, use) for name, use in found if (name, use) not in ALLOWED] == []
    assert set(ALLOWED) <= set(found), "allowed, but not there any more: take it out"
    for path in FOLDER.rglob("*.pyx"):
        assert not any(word in path.read_text() for word in ("pickle", "marshal"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import nn; import dill",
        "import os.path, shelve",
        "def f():\n    import marshal",
        "__import__('cloudpickle')",
        "import importlib\nimportlib.import_module('pickle')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(model, path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.lib.format.read_array(f, allow_pickle=flag)",
        "array.dump(f)",
        "torch.distributed.all_gather_object(a, b)",
        "from multiprocessing import Queue",
    ],
)
def test_what_pickles_is_seen(source: str) -> None:
    assert uses(source)


@pytest.mark.parametrize("source", ["torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "json.dumps(1)"])
def test_what_does_not_pickle_is_let_be(source: str) -> None:
    assert uses(source) == []


def test_a_runs_folder_holds_json_and_safetensors_and_text(tmp_path: Path) -> None:
    done = smlt(
        *("train", write_task(tmp_path), "--workers", 2, "--epochs", 2, "--global-batch-size", 16, "--codec", "int8"),
        *("--name", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "smlt-runs" / "run"
    files = [path for path in run.rglob("*") if path.is_file()]
    checkpoints = [path for path in files if "checkpoints" in path.parts]
    assert {path.suffix for path in checkpoints} == {".safetensors", ".json"}
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".lock", ".log", ".py"}
    for path in checkpoints:
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # a length, a JSON header, numbers: https://github.com/huggingface/safetensors
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert isinstance(json.loads(content), dict)
