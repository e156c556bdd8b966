"""Make the manylinux wheels, for x86-64 and aarch64, on any machine: zig's clang and libraries compile for either.

    .venv/bin/python release/wheels.py [--arch x86_64] [--arch aarch64] [--out dist]

One wheel an architecture serves every Python from 3.11 on (the stable ABI) and every Linux with glibc 2.17 or newer. The
wheel is built from the source distribution; auditwheel and abi3audit read from the binary what it needs of the system and of
Python, and no wheel is left when that is not what its name says. The extra `wheels` has the tools. The same sources and tools
give the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("x86_64", "aarch64")
#: manylinux2014: what CentOS 7 had, Amazon Linux 2 (glibc 2.26) and all later systems have it.
GLIBC = (2, 17)
WHEEL_BYTES_MAX = 1_000_000

# Python's headers are the same for every 64-bit Linux but for pyconfig.h, of which the stable ABI's headers take the sizes of
# C's types. Compiled for the target, this says whether the sizes of this machine's pyconfig.h are the target's.
SIZES = """
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
_Static_assert(SIZEOF_VOID_P == sizeof(void *), "pointers");
_Static_assert(SIZEOF_SIZE_T == sizeof(size_t), "size_t");
_Static_assert(SIZEOF_INT == sizeof(int) && SIZEOF_LONG == sizeof(long) && SIZEOF_LONG_LONG == sizeof(long long), "integers");
_Static_assert(SIZEOF_WCHAR_T == sizeof(wchar_t), "wchar_t");
#ifdef Py_GIL_DISABLED
#error "the headers are those of a free-threaded Python, which has no stable ABI"
#endif
"""


class Refused(Exception):
    """A wheel that is not what it should be."""


def compiler(arch: str) -> list[str]:
    # zig adds traps for undefined behaviour where it is not told to optimise.
    target = f"{arch}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", target, "-fno-sanitize=undefined"]


def check_headers(arch: str, folder: Path) -> None:
    """That this Python's headers describe the target too."""
    source = folder / "sizes.c"
    source.write_text(SIZES)
    command = [*compiler(arch), f"-I{sysconfig.get_path('include')}", "-c", str(source), "-o", str(folder / "sizes.o")]
    checked = subprocess.run(command, capture_output=True, text=True)
    if checked.returncode:
        raise Refused(f"this Python's headers do not do for {arch}:\n{checked.stderr}")


def build(arch: str, folder: Path, source: Path) -> Path:
    """The wheel as setuptools makes it, tagged linux_<arch>: of a checkout out of its source distribution."""
    command = " ".join(compiler(arch))
    environment = {
        **os.environ,
        "SMLT_ABI3": "1",
        "CC": command,
        "CFLAGS": "-g0",
        # Not this machine's library folders; stripped; without what nobody calls, which is most of zig's own library.
        "LDSHARED": f"{command} -shared -s -Wl,--gc-sections",
        "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
    }
    made = subprocess.run(
        [
            *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)),
            *(("--wheel",) if source != ROOT else ()),
            str(source),
        ],
        env=environment,
        umask=0o022,  # the modes of files are bytes of the wheel
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        raise Refused(f"the build for {arch} failed:\n{made.stdout[-4000:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def commit_time() -> str:
    """Seconds since 1970 of the last commit; 1980 outside of a checkout."""
    asked = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip() or "315532800"


def audited(wheel: Path, arch: str) -> Path:
    """The wheel under its manylinux tag. Refused when auditwheel finds that it needs more than that has, or it is large."""
    shown = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True)
    found = re.search(rf'"manylinux_(\d+)_(\d+)_{arch}"', " ".join(shown.stdout.split()))
    if shown.returncode or found is None:
        raise Refused(f"auditwheel: {shown.stdout}{shown.stderr}")
    needs = (int(found[1]), int(found[2]))
    if needs > GLIBC:
        raise Refused(
            f"{wheel.name} needs glibc {needs[0]}.{needs[1]}, it may need {GLIBC[0]}.{GLIBC[1]} at most:\n{shown.stdout}"
        )
    if importlib.util.find_spec("abi3audit") is None:
        print("wheels: abi3audit is not installed, the use of the stable ABI is not audited", file=sys.stderr)
    else:
        audit = subprocess.run([sys.executable, "-m", "abi3audit", "--strict", str(wheel)], capture_output=True, text=True)
        if audit.returncode:
            raise Refused(f"abi3audit: {audit.stdout}{audit.stderr}")
    if not wheel.name.endswith(f"-cp311-abi3-linux_{arch}.whl"):
        raise Refused(f"{wheel.name} is not for the stable ABI")
    if wheel.stat().st_size > WHEEL_BYTES_MAX:
        raise Refused(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {WHEEL_BYTES_MAX:,}")
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{arch}.manylinux2014_{arch}"
    renamed = subprocess.run(
        [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    )
    return wheel.with_name(renamed.stdout.strip().splitlines()[-1])


def make(arch: str, out: Path, source: Path = ROOT) -> Path:
    """Make one wheel; returns where it is. Refused, and nothing is left, when it is not what it should be.

    source: a checkout, whose source distribution is left beside the wheel, or the folder of an unpacked source distribution.
    """
    with tempfile.TemporaryDirectory(prefix="smlt-wheels-") as scratch:
        check_headers(arch, Path(scratch))
        wheel = audited(build(arch, Path(scratch), source), arch)
        out.mkdir(parents=True, exist_ok=True)
        for made in (wheel, *Path(scratch).glob("*.tar.gz")):
            part = out / f".{made.name}.part"
            part.write_bytes(made.read_bytes())
            part.replace(out / made.name)
    return out / wheel.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="one of them only")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    os.environ.setdefault("SOURCE_DATE_EPOCH", commit_time())  # the times of the files in the wheel
    for arch in options.arch or ARCHITECTURES:
        try:
            wheel = make(arch, options.out)
        except Refused as error:
            print(f"wheels: {error}", file=sys.stderr)
            return 1
        print(f"{wheel}  {wheel.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
