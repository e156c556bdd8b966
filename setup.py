"""The native extension: Cython over the plain C of csrc. Everything else stands in pyproject.toml."""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

extension = Extension(
    "smlt.collective._native",
    sources=["smlt/collective/_native.pyx", *sorted(glob("csrc/*.c"))],
    depends=sorted(glob("csrc/*.h")),
    include_dirs=["csrc"],
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

setup(ext_modules=cythonize([extension], language_level=3, compiler_directives={"embedsignature": True}))
