"""The native extensions: Cython over the plain C of csrc. Everything else stands in pyproject.toml.

SMLT_ABI3=1 in the environment builds it for the stable ABI of Python 3.11: one binary of each
for every Python from there on. The released wheels are made so (release/wheels.py).
"""

import os
import sysconfig
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

# Free-threaded Python has no stable ABI before 3.15: there the build is for that one version, whatever was asked for.
abi3 = os.environ.get("SMLT_ABI3", "0") == "1" and not sysconfig.get_config_var("Py_GIL_DISABLED")

SHARED = sorted(glob("csrc/shared*.c"))


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(
        f"smlt.collective.{name}",
        sources=[f"smlt/collective/{name}.pyx", *sources],
        depends=sorted(glob("csrc/*.h")),
        include_dirs=["csrc"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")] if abi3 else [],
        py_limited_api=abi3,
        # No contraction to fused multiply-add: every instruction set must give the same bits.
        extra_compile_args=[
            "-std=c11",
            "-O3",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-D_GNU_SOURCE",
        ],
    )


extensions = [
    extension("_native", sorted(set(glob("csrc/*.c")) - set(SHARED))),
    extension("_shared", [*SHARED, "csrc/codec_feedback.c", "csrc/codec_raw.c"]),
]

setup(
    ext_modules=cythonize(extensions, language_level=3, compiler_directives={"embedsignature": True}),
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if abi3 else {},
)
