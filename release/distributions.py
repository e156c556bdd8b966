"""Make a release: the source distribution, a wheel for each architecture and SHA256SUMS, checked and tried.

    .venv/bin/python release/distributions.py [--out dist] [--allow-dirty] [--arch x86_64] [--no-try]

The version is that of `smlt/_version.py`. Refused: a working tree that is not as committed, a version without a section in
CHANGELOG.md, a commit that does not carry the version's tag; `--allow-dirty` makes warnings of them, to try the whole. The
wheels are built from the source distribution (release/wheels.py); what is in either is compared with the repository
(release/contents.py); both are installed in empty environments and average over three processes (release/trial.py). The same
commit and tools give the same bytes. The extra `release` has the tools.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import contents
import trial
import wheels

ROOT = wheels.ROOT
TOOLS = {"abi3audit", "auditwheel", "build", "check_wheel_contents", "twine", "wheel", "ziglang"}


def version() -> str:
    """What `smlt/_version.py` says, the one place where it stands."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "smlt/_version.py").read_text(), re.MULTILINE)
    if found is None:
        raise wheels.Refused("smlt/_version.py has no line __version__ = ...")
    return found[1]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def hindrances(number: str, *, status: str, tags: list[str], changelog: str) -> list[str]:
    """Why this commit is no release. `status`: of `git status --porcelain`; `tags`: those of the commit."""
    found = []
    if re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", number) is None:
        found.append(f"{number} is no version such as 1.2.3 or 1.2.3rc1: change smlt/_version.py")
    if status.strip():
        found.append(f"the working tree is not as committed: {', '.join(line[3:] for line in status.splitlines()[:5])}")
    if not re.search(rf"^## \[{re.escape(number)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section ## [{number}] - DATE")
    if f"v{number}" not in tags:
        found.append(f"this commit has no tag v{number}: git tag -s v{number}")
    return found


def normalised(sdist: Path, time: int) -> None:
    """Give each file of a source distribution the same time, owner and mode wherever it was packed."""
    packed = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            content = old.extractfile(member)
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, content)
    with sdist.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=time) as zipped:
        zipped.write(packed.getvalue())


def source_distribution(folder: Path) -> Path:
    """Pack the checkout."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if made.returncode:
        raise wheels.Refused(f"the source distribution cannot be packed:\n{made.stdout[-4000:]}")
    (sdist,) = folder.glob("*.tar.gz")
    normalised(sdist, int(os.environ["SOURCE_DATE_EPOCH"]))
    return sdist


def make(out: Path, architectures: list[str]) -> tuple[Path, list[Path]]:
    """Build and check all; returns the source distribution and the wheels in `out`, where SHA256SUMS is beside them."""
    sdist = source_distribution(out)
    with tempfile.TemporaryDirectory(prefix="smlt-release-") as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).iterdir()
        made = [wheels.make(arch, out, unpacked) for arch in architectures]
    problems = [*contents.of_sdist(sdist, version()), *(text for one in made for text in contents.of_wheel(one, version()))]
    if problems:
        raise wheels.Refused("; ".join(problems[:5]))
    audit(sdist, made)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted((sdist, *made))]
    (out / "SHA256SUMS").write_text("".join(sums))
    return sdist, made


def audit(sdist: Path, made: list[Path]) -> None:
    """What the index would say to the metadata, and what is usually wrong in wheels."""
    for command in (["twine", "check", "--strict", str(sdist), *map(str, made)], ["check_wheel_contents", *map(str, made)]):
        asked = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        if asked.returncode:
            raise wheels.Refused(f"{command[0]}: {asked.stdout}{asked.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=wheels.ARCHITECTURES, help="a wheel for one of them only")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="an empty folder")
    parser.add_argument("--allow-dirty", action="store_true", help="only warn of what makes this commit no release")
    parser.add_argument("--no-try", action="store_true", help="install and run nothing")
    options = parser.parse_args()
    try:
        missing = sorted(name for name in TOOLS if importlib.util.find_spec(name) is None)
        if missing:
            raise wheels.Refused(f"not installed: {', '.join(missing)}: pip install -e '.[release]'")
        status, tags = git("status", "--porcelain"), git("tag", "--points-at", "HEAD").split()
        found = hindrances(version(), status=status, tags=tags, changelog=(ROOT / "CHANGELOG.md").read_text())
        for text in found:
            print(f"release: {text}", file=sys.stderr)
        if found and not options.allow_dirty:
            return 1
        os.environ.setdefault("SOURCE_DATE_EPOCH", wheels.commit_time())
        # What is published is what lies there: nothing older, and nothing that was refused.
        options.out.mkdir(parents=True, exist_ok=True)
        if any(options.out.iterdir()):
            raise wheels.Refused(f"{options.out} is not empty")
        with tempfile.TemporaryDirectory(prefix="smlt-dist-") as made_in:
            sdist, made = make(Path(made_in), options.arch or list(wheels.ARCHITECTURES))
            if not options.no_try:
                trial.run(sdist, made)
            for path in Path(made_in).iterdir():
                shutil.copy(path, options.out)
    except wheels.Refused as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    print((options.out / "SHA256SUMS").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
