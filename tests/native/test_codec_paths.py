"""codec_paths.c on every instruction set that can be had here: this machine's, AVX-512 emulated, NEON under QEMU."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from smlt.collective import _native

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("codec*.c"))
PROGRAM = Path(__file__).with_name("codec_paths.c")
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", f"-I{ROOT / 'csrc'}"]
ROUNDS = 3000
#: Of all that the portable path writes in so many rounds: the same wire and the same sums on every machine.
CHECKSUM = "b3b4cce00634233f"

X86 = platform.machine() in ("x86_64", "AMD64")
CC = (sysconfig.get_config_var("CC") or "cc").split()[0]
CROSS, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def missing(*programs: str) -> str:
    return ", ".join(name for name in programs if shutil.which(name) is None)


def paths_compared(program: Path, *emulator: str) -> list[str]:
    ran = subprocess.run([*emulator, str(program), str(ROUNDS)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *paths, checksum = ran.stdout.split()
    assert checksum == CHECKSUM
    return paths


@pytest.mark.skipif(bool(missing(CC)), reason=f"no compiler: {missing(CC)}")
def test_every_path_of_this_machine_gives_the_portable_bits(tmp_path: Path) -> None:
    program = tmp_path / "codec_paths"
    subprocess.run([CC, *FLAGS, *SOURCES, PROGRAM, "-lm", "-o", program], check=True)
    assert paths_compared(program) == _native.codec_paths()


@pytest.mark.skipif(bool(missing(CC)), reason=f"no compiler: {missing(CC)}")
def test_the_sanitizers_find_nothing_on_any_path(tmp_path: Path) -> None:
    program, sanitizers = tmp_path / "codec_paths", ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run([CC, *FLAGS, *sanitizers, *SOURCES, PROGRAM, "-lm", "-o", program], capture_output=True, text=True)
    if built.returncode and "sanitize" in built.stderr + built.stdout:
        pytest.skip(f"{CC} has no sanitizers here")
    assert built.returncode == 0, built.stderr
    assert paths_compared(program) == _native.codec_paths()


@pytest.mark.skipif(not X86 or "avx2" not in _native.codec_paths(), reason="the emulation of AVX-512 is written with AVX2")
@pytest.mark.skipif("avx512" in _native.codec_paths(), reason="this machine has AVX-512: nothing to emulate")
@pytest.mark.skipif(bool(missing(CC)), reason=f"no compiler: {missing(CC)}")
def test_the_avx512_kernels_give_the_portable_bits_when_emulated(tmp_path: Path) -> None:
    emulated, program = tmp_path / "avx512.o", tmp_path / "codec_paths"
    emulation = ["-include", PROGRAM.with_name("avx512_emulated.h"), '-DTARGET=__attribute__((target("avx2,f16c")))']
    subprocess.run([CC, *FLAGS, "-Wno-psabi", *emulation, "-c", ROOT / "csrc/codec_avx512.c", "-o", emulated], check=True)
    others = [source for source in SOURCES if source.name != "codec_avx512.c"]
    subprocess.run([CC, *FLAGS, *others, emulated, PROGRAM, "-lm", "-o", program], check=True)
    assert paths_compared(program) == ["portable", "avx2", "avx512"]


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine's own paths are NEON's")
@pytest.mark.skipif(bool(missing(CROSS, QEMU)), reason=f"not installed: {missing(CROSS, QEMU)}")
def test_the_neon_kernels_give_the_portable_bits(tmp_path: Path) -> None:
    program = tmp_path / "codec_paths"
    subprocess.run([CROSS, "-static", *FLAGS, *SOURCES, PROGRAM, "-lm", "-o", program], check=True)
    assert paths_compared(program, QEMU) == ["portable", "neon"]
