"""The released wheel and a layer of it, made once a session."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from smlt.client.layer_check import GLIBC
from smlt.client.layers import build_layer

ROOT = Path(__file__).parents[2]
TOOLS = ("abi3audit", "auditwheel", "build", "check_wheel_contents", "twine", "wheel", "ziglang")


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a release with the wheel for this machine. About 10 s of one core."""
    missing = sorted(name for name in TOOLS if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    arch = platform.machine()
    if sys.platform != "linux" or arch not in ("x86_64", "aarch64"):
        pytest.skip("no wheel for this machine is made")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: what belongs in a wheel is what git has")
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        str(ROOT / "release/distributions.py"),
        "--allow-dirty",
        "--no-try",
        "--arch",
        arch,
        "--out",
        str(out),
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return out


@pytest.fixture(scope="session")
def wheel(released: Path) -> Path:
    return next(released.glob("*.whl"))


@pytest.fixture(scope="session")
def layer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this machine and this Python; what smlt needs comes from pip's index."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if python not in GLIBC:
        pytest.skip(f"Lambda has no Python {python}")
    asked = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "safetensors"], capture_output=True)
    if asked.returncode:
        pytest.skip("pip's index cannot be reached")
    arch = {"x86_64": "x86_64", "aarch64": "arm64"}[platform.machine()]
    out = tmp_path_factory.mktemp("layer") / "layer.zip"
    report = build_layer(arch, python, out, wheel=wheel)
    assert report.zipped_bytes <= 40 * 2**20
    return out
