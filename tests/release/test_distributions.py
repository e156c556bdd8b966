"""A release: what hinders one, what is in it, and that the same commit gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "release"))  # programs that stand beside each other

import contents  # noqa: E402
import distributions  # noqa: E402
import wheels  # noqa: E402

SECTION = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n"


def test_a_clean_commit_with_its_tag_and_its_section_is_released() -> None:
    assert distributions.hindrances("1.2.3", status="", tags=["v1.2.3"], changelog=SECTION) == []


@pytest.mark.parametrize(
    ("number", "status", "tags", "changelog", "said"),
    [
        ("1.2.3", " M smlt/errors.py\n", ["v1.2.3"], SECTION, "not as committed: smlt/errors.py"),
        ("1.2.3", "", ["v1.2.2"], SECTION, "no tag v1.2.3"),
        ("1.2.3", "", ["v1.2.3"], SECTION.replace(" - 2026-01-02", ""), "no section"),
        ("1.2.3", "", ["v1.2.3"], SECTION.replace("1.2.3", "11213"), "no section"),
        ("1.2.3.dev1", "", ["v1.2.3.dev1"], SECTION.replace("1.2.3", "1.2.3.dev1"), "is no version"),
    ],
)
def test_what_is_no_release_is_said_with_what_to_do(
    number: str, status: str, tags: list[str], changelog: str, said: str
) -> None:
    (found,) = distributions.hindrances(number, status=status, tags=tags, changelog=changelog)
    assert said in found


def test_a_release_is_checked_and_its_sums_are_those_of_its_files(released: Path) -> None:
    lines = (released / "SHA256SUMS").read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(digests) == {path.name for path in released.iterdir()} - {"SHA256SUMS"}
    assert sorted(name.rpartition(".")[2] for name in digests) == ["gz", "whl"]
    for name, digest in digests.items():
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


def test_the_same_commit_gives_the_same_bytes(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", wheels.commit_time())
    before = os.umask(0o077)
    try:
        distributions.make(tmp_path / "dist", [platform.machine()])
    finally:
        os.umask(before)
    for path in released.iterdir():
        assert (tmp_path / "dist" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_file_that_does_not_belong_in_a_wheel_or_is_another_or_is_missing_is_named(wheel: Path, tmp_path: Path) -> None:
    assert list(contents.of_wheel(wheel, distributions.version())) == []
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if name != "smlt/py.typed":
                new.writestr(name, old.read(name) + b"#" * (name == "smlt/errors.py"))
        new.writestr("smlt/secret.env", "x")
    found = "\n".join(contents.of_wheel(changed, distributions.version()))
    assert "holds smlt/secret.env, which does not belong there" in found
    assert "lacks smlt/py.typed" in found
    assert "holds another smlt/errors.py than the repository" in found
    assert "records another digest of smlt/errors.py" in found


def test_a_file_that_does_not_belong_in_a_source_distribution_is_named(released: Path, tmp_path: Path) -> None:
    (sdist,) = released.glob("*.tar.gz")
    assert list(contents.of_sdist(sdist, distributions.version())) == []
    changed, top = tmp_path / sdist.name, sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as old, tarfile.open(changed, "w:gz") as new:
        for member in old.getmembers():
            if member.name != f"{top}/csrc/codec.c":
                new.addfile(member, old.extractfile(member))
        new.addfile(tarfile.TarInfo(f"{top}/notes.txt"), io.BytesIO())
    assert list(contents.of_sdist(changed, distributions.version())) == [
        f"{sdist.name} holds notes.txt, which is no file of the repository",
        f"{sdist.name} lacks csrc/codec.c",
    ]


def test_a_commit_that_is_no_release_makes_nothing(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or distributions.git("tag", "--points-at", "HEAD").strip():
        pytest.skip("this commit may be a release")
    done = subprocess.run(
        [sys.executable, str(ROOT / "release/distributions.py"), "--out", str(tmp_path / "dist")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "release: " in done.stderr
    assert not (tmp_path / "dist").exists()
