"""The recipe of a container image for Lambda, for workers whose packages are too large for a layer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files

from smlt._version import __version__
from smlt.client.layer_check import check_target
from smlt.client.wheels import parsed

#: PyTorch without CUDA, for both architectures.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
_TORCH = ("torch", "torchvision", "torchaudio")
#: Packages that are imported under another name than they are installed by.
_IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL"}


def dockerfile(python: str = "3.12", packages: Sequence[str] = ("torch",)) -> str:
    """A Dockerfile whose image runs SMLT's worker on Lambda's Python image, with `packages` ("torch>=2.4", ...).

    PyTorch's packages come from PyTorch's index of builds for the CPU, all others from pip's. Nothing is built here.
    ConfigError for a Python that Lambda does not have, or what is no package.
    """
    check_target("x86_64", python)
    requirements = [parsed(package) for package in packages]
    torch = [str(one) for one in requirements if one.name.lower() in _TORCH]
    others = [str(one) for one in requirements if one.name.lower() not in _TORCH]
    lines = []
    for index, chosen in ((f" --index-url={TORCH_INDEX}", torch), ("", others)):
        if chosen:
            lines.append(f"RUN pip install --no-cache-dir{index} {' '.join(map(shlex.quote, chosen))}")
    preload = ",".join(_IMPORTED_AS.get(one.name.lower(), one.name.replace("-", "_")) for one in requirements)
    if preload:
        lines += [
            "",
            "# Imported while the function is initialised, before the first invocation.",
            f"ENV SMLT_PRELOAD={preload}",
        ]
    text = files("smlt.client").joinpath("lambda.Dockerfile").read_text()
    for name, value in (("PYTHON", python), ("VERSION", __version__), ("MORE", "\n".join(lines))):
        text = text.replace(f"@{name}@", value)
    return text
