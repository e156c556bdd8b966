"""What goes into the function's zip: the same bytes from the same input, nothing that no function needs, wheels that fit."""

from __future__ import annotations

import csv
import io
import os
import stat
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from smlt.client.deployment.extras import install_extras
from smlt.client.deployment.function import wanted_environment
from smlt.client.deployment.limits import MB, check_unpacked, size_text
from smlt.client.deployment.names import Place, RoleName
from smlt.client.deployment.package import Package, collect, imports_of, pack
from smlt.client.deployment.request import DeployRequest
from smlt.errors import DeployError


def packed(package: Path, target: Path) -> Package:
    return pack(collect(package), target)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


FILES = {"train.py": "import models.net\nimport sklearn\n", "models/net.py": "", "models/deep/__init__.py": "import torch\n"}


def test_the_same_files_give_the_same_bytes_whatever_their_times_modes_and_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", FILES), write(tmp_path / "two", dict(reversed(FILES.items())))
    for number, path in enumerate(two.rglob("*.py")):
        os.utime(path, (number, number))
        path.chmod(0o600)
    first, second = packed(one, tmp_path / "1.zip"), packed(two, tmp_path / "2.zip")
    assert first.sha256 == second.sha256 == sha256((tmp_path / "1.zip").read_bytes()).hexdigest()
    (two / "train.py").write_text("import json\n")
    assert packed(two, tmp_path / "3.zip").sha256 != first.sha256


def test_lambdas_user_may_read_every_file_and_run_what_could_be_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "code", {"run.py": "", "tool": ""})
    (folder / "run.py").chmod(0o600)
    (folder / "tool").chmod(0o700)
    with zipfile.ZipFile(packed(folder, tmp_path / "x.zip").zip) as archive:
        modes = {info.filename: stat.S_IMODE(info.external_attr >> 16) for info in archive.infolist()}
    assert modes == {"run.py": 0o644, "tool": 0o755}


def test_a_script_brings_its_local_modules_and_a_folder_all_but_caches_and_runs(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "code",
        {
            **FILES,
            "notes.txt": "",
            "other.py": "",
            ".git/config": "",
            "smlt-runs/one/config.json": "",
            "models/__pycache__/net.pyc": "",
            "old.pyc": "",
        },
    )
    assert set(collect(folder / "train.py")) == set(FILES)
    assert set(collect(folder)) == {*FILES, "notes.txt", "other.py"}
    assert imports_of(collect(folder)) == {"models", "sklearn", "torch"}


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "code", FILES)
    (tmp_path / "secret").write_text("x")
    (folder / "linked").symlink_to(tmp_path / "secret")
    with pytest.raises(DeployError, match="linked is a link that leads out of the folder"):
        collect(folder)


def test_too_much_is_refused_with_what_is_largest() -> None:
    check_unpacked({"a.py": 50 * MB}, {"python/x": 200 * MB})
    with pytest.raises(DeployError) as caught:
        check_unpacked({"torch/lib/a.so": 150 * MB, "torch/b": 1 * MB, "a.py": 1}, {"python/numpy/x": 100 * MB})
    assert str(caught.value) == (
        "too large: 251 of 250 MB unpacked; the largest are torch (151 MB), layer: numpy (100 MB), a.py (0.0 MB); "
        "build a container image: smlt layer dockerfile"
    )
    assert [size_text(size) for size in (300, 5 * MB, 50 * MB)] == ["0.3 kB", "5.0 MB", "50 MB"]


def test_what_is_imported_early_is_what_the_package_imports_and_the_function_has() -> None:
    request = DeployRequest("f", Place("bucket"), Path("x"), RoleName("r"), store="redis://h")
    imports = frozenset({"torch", "sklearn", "json"})
    assert wanted_environment(request, imports, frozenset({"sklearn", "pandas"})) == {
        "SMLT_OBJECT_STORE": "s3://bucket",
        "SMLT_STORE": "redis://h",
        "SMLT_PRELOAD": "sklearn",
    }


# ---- --with ----


def wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", needs: str = "", module: str = "") -> Path:
    """A wheel with one module and one command."""
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{module or name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name}=" + f"{module or name}:main\n",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": "".join(f"{file},,\n" for file in files)}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's only source: a folder."""
    folder = tmp_path / "wheels"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel(folder, "boost", "1.0", "cp312-cp312-manylinux_2_28_aarch64", needs="bytes_tools>=1")
    wheel(folder, "boost", "1.0", "cp312-cp312-manylinux_2_28_x86_64", needs="bytes_tools>=1")
    wheel(folder, "bytes_tools", "1.0")
    wheel(folder, "bytes_tools", "2.0")
    return folder


@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_extras_are_wheels_for_the_functions_machine_without_this_machines_traces(
    index: Path, tmp_path: Path, arch: str
) -> None:
    files = install_extras(["boost"], arch, "3.12", {}, tmp_path)
    assert set(files) == {
        "boost/__init__.py",
        "bytes_tools/__init__.py",
        *(f"boost-1.0.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
        *(f"bytes_tools-2.0.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")),
    }
    machine = {"arm64": "aarch64"}.get(arch, arch)
    assert machine in files["boost-1.0.dist-info/WHEEL"].read_text()
    for record in (name for name in files if name.endswith("RECORD")):
        assert {row[0] for row in csv.reader(io.StringIO(files[record].read_text()))} <= set(files)


def test_what_the_layer_holds_is_taken_as_it_is_and_not_packed_again(index: Path, tmp_path: Path) -> None:
    files = install_extras(["boost"], "x86_64", "3.12", {"bytes-tools": "1.0"}, tmp_path)
    assert {name.partition("/")[0] for name in files} == {"boost", "boost-1.0.dist-info"}
    wheel(index, "modern", "1.0", needs="bytes_tools>=2")
    with pytest.raises(DeployError, match="pip cannot install it beside the layer's packages") as caught:
        install_extras(["modern"], "x86_64", "3.12", {"bytes-tools": "1.0"}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_package_without_a_wheel_that_fits_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="--with boost: pip cannot install it: "):
        install_extras(["boost"], "x86_64", "3.13", {}, tmp_path)
    with pytest.raises(DeployError, match="--with nowhere: pip cannot install it: "):
        install_extras(["nowhere"], "x86_64", "3.12", {}, tmp_path)
