"""What a deployment is made of, and what it sends: the wheel, the layer, a first and a second `smlt deploy`.

    python -m bench.deployment [--script examples/digits.py] [--wheel FILE] [--json FILE]

Makes this machine's wheel (release/wheels.py, about 10 s; --wheel takes one that is made), a layer of it for this Python,
whose other wheels come from pip's index, and deploys the script twice with that layer to an emulator that is empty before
(`smlt lambda-local`). Sizes of layers are in MB of 2^20 bytes, as Lambda counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from smlt.client.layer_check import LayerReport, as_row, megabytes
from smlt.client.layers import build_layer
from smlt.emulator import LambdaLocal

ROOT = Path(__file__).parents[1]
#: Machines as Lambda names them.
ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "arm64"}


def make_wheel(into: Path) -> Path:
    """The release's wheel for this machine."""
    command = [sys.executable, str(ROOT / "release/wheels.py"), "--arch", platform.machine(), "--out", str(into)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = into.glob("*.whl")
    return wheel


def deploy(script: Path, layer: Path, environment: dict[str, str]) -> dict[str, Any]:
    """`smlt deploy`; its last row: how many things were changed and how many bytes were sent."""
    where = ("bench", "smlt-bench", script, "smlt-bench-role", "--create-bucket", "--create-role")
    done = subprocess.run(
        [sys.executable, "-m", "smlt", "deploy", *map(str, where), "--layer", str(layer), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: last[name] for name in ("changed", "sent_bytes")}


def show(wheel: Path, layer: LayerReport, deployments: list[dict[str, Any]]) -> None:
    """The rows for people."""
    print(f"wheel {wheel.name}: {wheel.stat().st_size:,} bytes")
    print(
        f"layer for python{layer.python} on {layer.arch}: {megabytes(layer.zipped_bytes)} zipped "
        f"({layer.zipped_bytes:,} bytes), {megabytes(layer.unpacked_bytes)} unpacked"
    )
    for name, row in zip(("first", "second"), deployments, strict=True):
        print(f"{name} smlt deploy: {row['sent_bytes']:,} bytes sent, {row['changed']} things changed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, default=ROOT / "examples" / "digits.py")
    parser.add_argument("--wheel", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smlt-bench-") as name:
        folder = Path(name)
        wheel = options.wheel or make_wheel(folder)
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        layer = build_layer(ARCHITECTURES[platform.machine()], python, folder / "layer.zip", wheel=wheel)
        with LambdaLocal() as local:
            deployments = [deploy(options.script.resolve(), layer.path, local.environment()) for _ in range(2)]
        show(wheel, layer, deployments)
        if options.json is not None:
            options.json.write_text(
                json.dumps({"wheel_bytes": wheel.stat().st_size, "layer": as_row(layer), "deploys": deployments})
            )


if __name__ == "__main__":
    main()
