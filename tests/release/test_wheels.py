"""The released wheel for this machine's architecture, made by zig's compiler, and a layer of it on a bare Python."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from smlt.client.elf import read_library
from smlt.collective import _native
from smlt.store.embedded import EmbeddedStore

ARCH = platform.machine()

#: A digest for each kernel on each path: the bits of encoding, reducing, finishing and decoding.
KERNELS = """
import hashlib, itertools, numpy
from smlt.collective import _native
rng = numpy.random.default_rng(7)
values = (rng.standard_normal(5003) * 2.0 ** rng.integers(-60, 60, 5003)).astype("f4")
values[::97], values[5::101], values[7::103] = numpy.inf, numpy.nan, -0.0
for path, dtype, codec, operation in itertools.product(_native.codec_paths(), range(16), range(8), range(4)):
    _native.use_codec_path(path)
    try:
        kernel = _native.Kernel(dtype, codec, operation)
    except ValueError:
        continue
    source = numpy.frombuffer(values.tobytes()[: 5000 * 4 // kernel.element_bytes * kernel.element_bytes], "u1")
    n = len(source) // kernel.element_bytes
    wire, sums = numpy.zeros(kernel.wire_size(n), "u1"), numpy.zeros(n * kernel.accumulator_bytes, "u1")
    exponent = kernel.encode(source, wire)
    back = numpy.zeros_like(source)
    kernel.decode(wire, exponent, back)
    for first in (True, False):
        kernel.reduce(sums, wire, exponent, 0, first)
    kernel.finish(sums, 3, 0)
    print(path, dtype, codec, operation, exponent, hashlib.sha256(wire.tobytes() + back.tobytes() + sums.tobytes()).hexdigest())
"""

WORKER = """
import sys
rank, url, opt = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import numpy, smlt, safetensors.numpy, smlt.worker.main
from smlt.collective import _native
assert all(module.__file__.startswith(opt) for module in (numpy, smlt, safetensors, _native))
with_layer = smlt.Communicator(url, job="layer", rank=rank, world_size=2, timeout_s=60)
print(with_layer.allreduce(numpy.full(1000, rank + 1.0, "f4")).sum())
with_layer.close()
"""


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_is_small_and_runs_on_every_python_and_linux_of_lambda(wheel: Path, unpacked: Path) -> None:
    assert wheel.stat().st_size <= 1_000_000
    assert "-cp311-abi3-" in wheel.name
    libraries = sorted(unpacked.rglob("*.so"))
    assert [library.name for library in libraries] == ["_native.abi3.so", "_shared.abi3.so"]
    for library in libraries:
        read = read_library(library.read_bytes())
        assert (read.machine, read.glibc <= (2, 17)) == (ARCH, True)
    left = {path.suffix for path in unpacked.rglob("*") if path.is_file() and "dist-info" not in str(path)}
    assert left == {".py", ".pyi", ".so", ".typed", ".Dockerfile", ".sh", ".tf", ".yaml"}
    assert not (unpacked / "release").exists()


def test_zig_s_kernels_are_all_there_and_give_the_bits_of_this_machine_s_compiler(unpacked: Path) -> None:
    def digests(package: Path) -> str:
        environment = {**os.environ, "PYTHONPATH": str(package)}
        ran = subprocess.run([sys.executable, "-c", KERNELS], cwd=package, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    released = digests(unpacked)
    assert {line.split()[0] for line in released.splitlines()} == set(_native.codec_paths())
    assert released == digests(Path(_native.__file__).parents[2])


def test_a_layer_alone_on_a_bare_python_takes_part_in_a_collective(layer: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(layer) as archive:
        archive.extractall(tmp_path / "opt")
    bare = getattr(sys, "_base_executable", sys.executable)
    opt = str(tmp_path / "opt/python")
    with EmbeddedStore() as store:
        command = [bare, "-S", "-s", "-B", "-c", WORKER]
        workers = [
            subprocess.Popen(
                [*command, str(rank), store.tcp_url, opt],
                cwd="/",
                env={"PYTHONPATH": opt},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [worker.communicate(timeout=90) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert [out for out, _ in said] == ["1500.0\n", "1500.0\n"]
