"""Lambda layers from small wheels made here: what goes in, what is refused. The real pip looks into a folder."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import commandline
import pytest

from smlt import __version__
from smlt.client.elf import MAGIC, read_library
from smlt.client.images import dockerfile
from smlt.client.layer_check import check_layer
from smlt.client.layers import build_layer
from smlt.errors import ConfigError, DeployError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries are ELF files of this machine")
NEEDS = ("numpy", "redis", "hiredis")
Make = Callable[..., Path]


def write_wheel(
    folder: Path,
    name: str,
    files: Mapping[str, bytes],
    *,
    version: str = "1.0",
    tag: str = "py3-none-any",
    needs: tuple[str, ...] = (),
    year: int = 2020,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", "Provides-Extra: worker"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    every = {
        **files,
        f"{info}/METADATA": "\n".join(metadata).encode() + b"\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for key, content in every.items():
            file.writestr(zipfile.ZipInfo(key, (year, 1, 1, 0, 0, 0)), content)
    return path


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def wheels(tmp_path: Path) -> Make:
    """Make a folder with the wheels of smlt and what it needs; `more` are further requirements of smlt."""

    def make(name: str = "dist", *more: str, files: Mapping[str, bytes] | None = None, year: int = 2020) -> Path:
        folder = tmp_path / name
        for need in NEEDS:
            write_wheel(folder, need, {f"{need}/__init__.py": b"x = 1\n"}, version="9.0", year=year)
        write_wheel(folder, "safetensors", {"safetensors/__init__.py": b""}, year=year)
        own = {"smlt/__init__.py": b"", **(files or {})}
        needs = (*NEEDS, 'safetensors; extra == "worker"', 'never; extra == "train"', *more)
        write_wheel(folder, "smlt", own, version=__version__, needs=needs, year=year)
        return folder

    return make


@pytest.fixture(scope="session")
def library() -> bytes:
    """A library of this machine that needs little: safetensors' own, for every Python."""
    (found,) = [file for file in importlib.metadata.files("safetensors") or [] if file.name.endswith(".abi3.so")]
    return Path(str(found.locate())).read_bytes()


def names(layer: Path) -> set[str]:
    with zipfile.ZipFile(layer) as file:
        return set(file.namelist())


def test_the_same_wheels_give_the_same_layer(wheels: Make, tmp_path: Path) -> None:
    first = build_layer("x86_64", "3.12", tmp_path / "a.zip", wheel=wheels("one"))
    second = build_layer("x86_64", "3.12", tmp_path / "b.zip", wheel=wheels("two", year=2024))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert first.sha256 == second.sha256
    with zipfile.ZipFile(first.path) as layer:
        assert layer.namelist() == sorted(layer.namelist())
        assert {entry.external_attr >> 16 for entry in layer.infolist()} == {0o100644}
    assert {package.name for package in first.packages} == {"smlt", "safetensors", *NEEDS}


def test_what_a_function_does_not_need_is_left_out_and_licences_stay(wheels: Make, tmp_path: Path) -> None:
    needless = [
        "smlt/tests/test_a.py",
        "smlt/a.pyi",
        "smlt/include/a.h",
        "smlt/lib.a",
        "smlt-1.data/scripts/smlt",
        "smlt/a.pyx",
    ]
    needed = ["smlt/a.py", "smlt/tests/LICENSE.txt", "smlt/vendored/COPYING", "smlt/testing/a.py", "smlt/a.json"]
    folder = wheels(
        files={**dict.fromkeys(needless, b"-"), **dict.fromkeys(needed, b"+"), "smlt-1.data/purelib/moved.py": b"+"}
    )
    report = build_layer("arm64", "3.13", tmp_path / "layer.zip", wheel=folder)
    inside = names(report.path)
    assert not inside & {f"python/{name}" for name in needless}
    assert {f"python/{name}" for name in [*needed, "moved.py"]} <= inside
    with zipfile.ZipFile(report.path) as layer:
        layer.extractall(tmp_path / "opt")
    found = {one.name: one for one in importlib.metadata.distributions(path=[str(tmp_path / "opt/python")])}
    assert found["smlt"].version == __version__
    recorded = {f"python/{file}" for one in found.values() for file in one.files or []}
    assert recorded == inside


def test_what_is_needed_is_decided_for_the_function_s_python_not_for_this_one(wheels: Make, tmp_path: Path) -> None:
    folder = wheels(
        "dist", 'late; python_version >= "3.14"', 'early; python_version < "3.14"', 'arm; platform_machine == "aarch64"'
    )
    for name in ("early", "arm", "later"):
        write_wheel(folder, name, {f"{name}.py": b""})
    write_wheel(folder, "late", {"late.py": b""}, needs=('later; python_version >= "3.14"',))
    new = names(build_layer("arm64", "3.14", tmp_path / "new.zip", wheel=folder).path)
    old = names(build_layer("x86_64", "3.12", tmp_path / "old.zip", wheel=folder).path)
    chosen = {f"python/{name}.py" for name in ("early", "late", "later", "arm")}
    assert new & chosen == {"python/late.py", "python/later.py", "python/arm.py"}
    assert old & chosen == {"python/early.py"}


def test_a_layer_larger_than_lambda_takes_is_refused_before_it_is_written(wheels: Make, tmp_path: Path) -> None:
    folder = wheels()
    write_wheel(folder, "bulk", {"bulk/weights.bin": bytes(251 * 2**20)})
    with pytest.raises(
        DeployError, match=r"252\.\d MB|251\.\d MB.*250\.0 MB unpacked.*largest unpacked: bulk 1\.0 \(251\.0 MB\)"
    ):
        build_layer("x86_64", "3.12", tmp_path / "layer.zip", wheel=folder, packages=["bulk"])
    assert {path.name for path in tmp_path.iterdir()} == {"dist"}


def test_what_is_too_large_for_a_request_may_still_come_through_s3(tmp_path: Path) -> None:
    path = tmp_path / "layer.zip"
    with zipfile.ZipFile(path, "w") as layer:
        layer.writestr("python/smlt/__init__.py", "")
        layer.writestr("python/bulk.bin", bytes(51 * 2**20))
        layer.writestr("python/bulk-2.0.dist-info/RECORD", "bulk.bin,,\nbulk-2.0.dist-info/RECORD,,\n")
    with pytest.raises(DeployError, match=r"51\.0 MB, Lambda takes 50\.0 MB zipped.*largest unpacked: bulk 2\.0"):
        check_layer(path, "x86_64", "3.12")
    assert check_layer(path, "x86_64", "3.12", direct_upload=False).unpacked_bytes > 51 * 2**20


def layer_of(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as layer:
        layer.writestr("python/smlt/__init__.py", "")
        layer.writestr(f"python/{name}", content)
    return path


def test_a_library_is_refused_that_the_runtime_cannot_load(library: bytes, tmp_path: Path) -> None:
    this = {"x86_64": "x86_64", "aarch64": "arm64"}[read_library(library).machine]
    other = {"x86_64": "arm64", "arm64": "x86_64"}[this]
    good = layer_of(tmp_path / "good.zip", "a.abi3.so", library)
    assert check_layer(good, this, "3.11").libraries == 1
    with pytest.raises(DeployError, match=rf"a\.abi3\.so is made for .*, the function's architecture is {other}"):
        check_layer(good, other, "3.11")

    newer, replaced = re.subn(rb"GLIBC_2\.\d\d\0", b"GLIBC_2.30\0", library)
    assert replaced
    new = layer_of(tmp_path / "new.zip", "libhidden.txt", newer)  # found by what it is, not by its name
    with pytest.raises(DeployError, match=r"libhidden\.txt needs glibc 2\.30, Lambda's python3\.11 has 2\.26"):
        check_layer(new, this, "3.11")
    assert check_layer(new, this, "3.12").glibc == "2.30"

    with pytest.raises(DeployError, match=r"is made for Python 3\.12, the function's is 3\.13"):
        check_layer(layer_of(tmp_path / "py.zip", "a.cpython-312-x86_64-linux-gnu.so", library), this, "3.13")
    for damaged in (library[:5000], MAGIC, library[:4] + b"\x01" + library[5:]):
        with pytest.raises(DeployError, match=r"a\.so is (a damaged|not a 64-bit)"):
            check_layer(layer_of(tmp_path / "bad.zip", "a.so", damaged), this, "3.12")


def test_our_reader_of_elf_finds_what_pyelftools_finds() -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    versions = pytest.importorskip("elftools.elf.gnuversions")
    every = [
        Path(str(file.locate()))
        for name in ("numpy", "safetensors", "hiredis")
        for file in importlib.metadata.files(name) or []
    ]
    libraries = [path for path in every if ".so" in path.name and path.read_bytes()[:4] == MAGIC]
    assert len(libraries) > 10
    for path in libraries:
        with path.open("rb") as file:
            sections = [one for one in elffile.ELFFile(file).iter_sections() if isinstance(one, versions.GNUVerNeedSection)]
            named = {aux.name for one in sections for _, auxiliaries in one.iter_versions() for aux in auxiliaries}
        numbers = [tuple(map(int, name[6:].split("."))) for name in named if re.fullmatch(r"GLIBC_[\d.]+", name)]
        assert read_library(path.read_bytes()).glibc == max(numbers, default=(0, 0)), path


def test_a_wheel_that_cannot_be_used_is_refused_with_what_to_do(wheels: Make, tmp_path: Path) -> None:
    out = tmp_path / "layer.zip"
    with pytest.raises(DeployError, match=r"no wheel of smlt for x86_64 and Python 3\.12 in .*nothing.*release/wheels\.py"):
        build_layer("x86_64", "3.12", out, wheel=tmp_path / "nothing")
    linux = write_wheel(tmp_path, "smlt", {}, version=__version__, tag="cp311-abi3-manylinux_2_17_aarch64")
    with pytest.raises(DeployError, match=r"no wheel of smlt for x86_64 .*aarch64\.whl there"):
        build_layer("x86_64", "3.12", out, wheel=linux)
    with pytest.raises(DeployError, match=r"is smlt 99, workers must be of this version"):
        build_layer("x86_64", "3.12", out, wheel=write_wheel(tmp_path, "smlt", {}, version="99"))
    with pytest.raises(DeployError, match=r"pip finds no wheels for Lambda's python3\.12 on arm64: .*nowhere"):
        build_layer("arm64", "3.12", out, wheel=wheels(), packages=["nowhere"])
    with pytest.raises(ConfigError, match="no package"):
        build_layer("arm64", "3.12", out, wheel=wheels(), packages=["--index-url=http://elsewhere"])
    with pytest.raises(ConfigError, match="no architecture 'i386'"):
        build_layer("i386", "3.12", out)
    assert not out.exists()


def test_the_command_prints_sizes_and_ends_with_7_when_a_layer_cannot_work(wheels: Make, tmp_path: Path) -> None:
    more = {"PIP_NO_INDEX": "1"}
    built = commandline.smlt("layer", "build", "--arch", "arm64", "--python", "3.13", "--wheel", wheels(), cwd=tmp_path, **more)
    assert (built.returncode, built.stderr) == (0, "")
    assert f"smlt {__version__}" in built.stdout
    checked = commandline.smlt(
        "layer", "check", "smlt-layer-arm64-python3.13.zip", "--arch", "arm64", "--python", "3.13", "--json", cwd=tmp_path
    )
    row = json.loads(checked.stdout)
    assert row["sha256"] in built.stdout
    assert {package["name"] for package in row["packages"]} == {"smlt", "safetensors", *NEEDS}
    (tmp_path / "no.zip").write_text("no")
    refused = commandline.smlt("layer", "check", "no.zip", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (7, "")
    assert re.fullmatch(r"smlt: no\.zip cannot be read as a zip file .*\n", refused.stderr)


def test_the_dockerfile_takes_torch_for_the_cpu_and_the_rest_from_pip_s_index() -> None:
    text = dockerfile("3.13", ["torch>=2.4", "scikit-learn"])
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "FROM public.ecr.aws/lambda/python:3.13"
    assert "RUN pip install --no-cache-dir --index-url=https://download.pytorch.org/whl/cpu 'torch>=2.4'" in lines
    assert "RUN pip install --no-cache-dir scikit-learn" in lines
    assert lines[-2:] == ["ENV SMLT_PRELOAD=torch,sklearn", 'CMD ["smlt.worker.handler.handler"]']
    assert "@" not in text.replace("smlt[worker] @ file", "")
    with pytest.raises(ConfigError):
        dockerfile("3.10")
