"""A Lambda layer: smlt and what a worker imports, as a zip file for one architecture and one Python, built on any machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import smlt
from smlt._version import __version__
from smlt.client.layer_check import LayerPackage, LayerReport, check_layer, check_sizes, check_target
from smlt.client.wheels import Target, Wheel, collect, parsed
from smlt.errors import DeployError

#: The first time that a zip file can tell.
_TIME = (1980, 1, 1, 0, 0, 0)
HOW = "make it in a checkout: python release/wheels.py --out dist"


def build_layer(arch: str, python: str, out: Path, *, wheel: Path | None = None, packages: Iterable[str] = ()) -> LayerReport:
    """Build the layer for Lambda's python<python> on `arch` ("x86_64" or "arm64") into the file `out`, and check it.

    It holds python/ with smlt, NumPy, redis-py, hiredis, safetensors, what these need, and `packages` ("scikit-learn>=1.3").
    boto3 is not in it: Lambda's runtime has it. `wheel`: smlt's own, or a folder of wheels, into which pip then looks too;
    None: that in dist/ (of the checkout, where one is made if need be, or here). The same wheels give the same bytes: names
    in order, fixed times and modes.
    DeployError when a wheel is missing or the layer is too large or does not fit the runtime, ConfigError for a wrong
    argument; `out` is then as it was.
    """
    check_target(arch, python)
    target = Target(arch, python)
    extra = [parsed(package) for package in packages]
    own = find_wheel(wheel, arch, python) if wheel is not None else _own_wheel(arch, python)
    roots = [parsed(f"smlt[worker] @ {own.path.resolve().as_uri()}"), *extra]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smlt-layer-", dir=out.parent) as scratch:
        wheels = collect(target, roots, Path(scratch), wheel if wheel is not None and wheel.is_dir() else None)
        made = Path(scratch, out.name)
        write_layer(wheels, made)
        report = check_layer(made, arch, python, direct_upload=False)
        check_sizes(str(out), made.stat().st_size, report.unpacked_bytes, report.packages)
        made.replace(out)
    return LayerReport(**{**vars(report), "path": out})


def _own_wheel(arch: str, python: str) -> Wheel:
    """The wheel in dist/; in a checkout one is made when there is none that is of these sources."""
    try:
        return find_wheel(None, arch, python)
    except DeployError as error:
        checkout = Path(smlt.__file__).parents[1]
        script = checkout / "release" / "wheels.py"
        if not script.is_file():
            raise
        machine = {"arm64": "aarch64"}.get(arch, arch)
        command = [sys.executable, str(script), "--arch", machine, "--out", str(checkout / "dist")]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            said = (made.stderr.strip() or made.stdout.strip() or "it said nothing").splitlines()[-1]
            tools = "pip install 'smlt[wheels]' has the tools"
            raise DeployError(f"{error}; it could not be made just now: {said} ({tools})") from error
        return find_wheel(None, arch, python)


def find_wheel(where: Path | None, arch: str, python: str) -> Wheel:
    """smlt's own wheel for a runtime: the file `where`, or the best in that folder; None: in dist/.

    Client and worker must be of one version: DeployError when there is none that fits, or it is of another version or, found in
    the checkout's dist/, of other sources than those that run.
    """
    checkout = Path(smlt.__file__).parents[1]
    places = [where] if where is not None else [checkout / "dist", Path("dist")]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.glob("smlt-*.whl")))]
    target = Target(arch, python)
    wheels = [wheel for wheel in map(Wheel, files) if wheel.name == "smlt"]
    fitting = [(fit, str(one.path), one) for one in wheels if (fit := one.fit(target)) is not None]
    if not fitting:
        found = f"{', '.join(one.path.name for one in wheels)} there" if wheels else "no wheel of smlt there"
        raise DeployError(
            f"there is no wheel of smlt for {arch} and Python {python} in {' or '.join(map(str, places))} ({found}): {HOW}"
        )
    of_this_version = [one for one in fitting if one[2].version == __version__]
    if not of_this_version:
        raise DeployError(
            f"{fitting[0][1]} is smlt {fitting[0][2].version}, workers must be of this version, {__version__}: {HOW}"
        )
    wheel = min(of_this_version)[2]
    if where is None and wheel.path.parent == checkout / "dist" and (name := _differs(wheel, checkout)):
        raise DeployError(f"{wheel.path} is older or newer than the sources beside it ({name} differs): {HOW}")
    return wheel


def _differs(wheel: Wheel, checkout: Path) -> str | None:
    """The first of the package's modules that is not in the wheel as it is in the checkout, or the other way round."""
    with zipfile.ZipFile(wheel.path) as file:
        packed = {name for name in file.namelist() if name.startswith("smlt/") and name.endswith(".py")}
        here = {str(path.relative_to(checkout)) for path in (checkout / "smlt").rglob("*.py")}
        for name in sorted(packed ^ here) + sorted(packed & here):
            if name not in packed & here or file.read(name) != (checkout / name).read_bytes():
                return name
    return None


def write_layer(wheels: Iterable[Wheel], path: Path) -> None:
    """Write what of the wheels a function needs below python/ in a new zip file, the same bytes each time.

    DeployError, before anything is written, when it is larger than Lambda takes, or two wheels have the same file.
    """
    files: dict[str, tuple[Wheel, zipfile.ZipInfo | None]] = {}
    records: dict[str, bytes] = {}
    packages = []
    wheels = sorted(wheels, key=lambda one: one.name)
    for wheel in wheels:
        contents = wheel.contents()
        (info,) = {name.split("/")[0] for name in contents if name.split("/")[0].endswith(".dist-info")}
        for name, entry in contents.items():
            if name in files:
                raise DeployError(f"{wheel.path.name} and {files[name][0].path.name} both hold {name}")
            files[name] = (wheel, entry)
        record = f"{info}/RECORD"  # what is left: importlib.metadata and `check_layer` read it
        records[record] = "".join(f"{_quoted(name)},,\n" for name in sorted([*contents, record])).encode()
        files[record] = (wheel, None)
        size = sum(entry.file_size for entry in contents.values())
        packages.append(LayerPackage(wheel.name, wheel.version, sum(e.compress_size for e in contents.values()), size))
    packages.sort(key=lambda one: -one.unpacked_bytes)
    check_sizes("the layer", 0, sum(one.unpacked_bytes for one in packages), tuple(packages))
    with ExitStack() as stack:
        opened = {wheel.path: stack.enter_context(zipfile.ZipFile(wheel.path)) for wheel in wheels}
        layer = stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9))
        for name, (wheel, member) in sorted(files.items()):
            made = zipfile.ZipInfo(f"python/{name}", _TIME)
            made.create_system, made.compress_type = 3, zipfile.ZIP_DEFLATED
            made.external_attr = (0o100755 if ".so" in name.split("/")[-1] else 0o100644) << 16
            content = records[name] if member is None else opened[wheel.path].read(member)
            layer.writestr(made, content, compresslevel=9)


def _quoted(name: str) -> str:
    return f'"{name}"' if "," in name else name
