"""`smlt layer build`, `smlt layer check`, `smlt layer dockerfile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smlt.cli.common import AsJson, app, examples

if TYPE_CHECKING:
    from smlt.client.layer_check import LayerReport

layer = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What a Lambda function runs on: layers and images.")
app.add_typer(layer, name="layer")

_HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
Arch = Annotated[str, typer.Option("--arch", metavar="x86_64|arm64", help="The function's architecture.")]
Python = Annotated[
    str, typer.Option("--python", metavar="3.11|3.12|3.13|3.14", help="Python of the function's runtime.", show_default=_HERE)
]


@layer.command(
    epilog=examples(
        "smlt layer build --arch arm64 --python 3.13 --wheel dist/",
        "smlt layer build --with 'scikit-learn>=1.5' --out layer.zip",
        "smlt layer build --json | jq -r .sha256",
    )
)
def build(
    arch: Arch = "x86_64",
    python: Python = _HERE,
    out: Annotated[
        Path | None, typer.Option("--out", help="The zip file.", show_default="smlt-layer-ARCH-pythonX.Y.zip")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel",
            help="smlt's wheel, or a folder of wheels that are taken before those of pip's index.",
            show_default="dist/",
        ),
    ] = None,
    packages: Annotated[
        list[str] | None, typer.Option("--with", metavar="PACKAGE", help="A package that your task needs; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build a Lambda layer: smlt, NumPy, redis, hiredis, safetensors and what they need, for any architecture on any machine.

    pip fetches the wheels, of which tests, type stubs and headers are left out, licences never. boto3 is not added: Lambda's
    runtime has it. The file is checked against Lambda's limits (50 MB zipped, 250 MB unpacked) and against the runtime's
    glibc. The same wheels give the same bytes. PyTorch is too large for a layer: smlt layer dockerfile.
    """
    from smlt.client.layers import build_layer

    where = out or Path(f"smlt-layer-{arch}-python{python}.zip")
    _tell(build_layer(arch, python, where, wheel=wheel, packages=packages or []), as_json)


@layer.command(epilog=examples("smlt layer check layer.zip --arch arm64 --python 3.13"))
def check(
    file: Annotated[Path, typer.Argument(help="A layer's zip file.")],
    arch: Arch = "x86_64",
    python: Python = _HERE,
    as_json: AsJson = False,
) -> None:
    """Look whether a layer fits a runtime: sizes, and the machine, Python and glibc of every library in it."""
    from smlt.client.layer_check import check_layer

    _tell(check_layer(file, arch, python), as_json)


@layer.command(
    epilog=examples(
        "smlt layer dockerfile > Dockerfile", "smlt layer dockerfile --python 3.13 --with torch --with scikit-learn"
    )
)
def dockerfile(
    python: Python = _HERE,
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="PACKAGE", help="A package that your task needs; may be repeated.", show_default="torch"
        ),
    ] = None,
) -> None:
    """Print the Dockerfile of a container image for what is too large for a layer, such as PyTorch.

    Its first lines say how to build it, for either architecture, beside dist/ with smlt's wheels. Nothing is built here.
    """
    from smlt.client.images import dockerfile as recipe

    typer.echo(recipe(python, packages or ["torch"]), nl=False)


def _tell(report: LayerReport, as_json: bool) -> None:
    from smlt.client.layer_check import UNPACKED_BYTES_MAX, ZIPPED_BYTES_MAX, as_row, megabytes

    if as_json:
        typer.echo(json.dumps(as_row(report)))
        return
    width = max(len(f"{one.name} {one.version}") for one in report.packages)
    typer.echo(f"{'':{width}}    zipped  unpacked")
    for one in report.packages:
        name = f"{one.name} {one.version}"
        typer.echo(f"{name:{width}}{megabytes(one.zipped_bytes):>10}{megabytes(one.unpacked_bytes):>10}")
    typer.echo(
        f"{report.path}: {megabytes(report.zipped_bytes)} of {megabytes(ZIPPED_BYTES_MAX)} zipped, "
        f"{megabytes(report.unpacked_bytes)} of {megabytes(UNPACKED_BYTES_MAX)} unpacked"
    )
    typer.echo(
        f"for python{report.python} on {report.arch}; its {report.libraries} libraries need glibc {report.glibc} or newer"
    )
    typer.echo(f"sha256 {report.sha256}")
