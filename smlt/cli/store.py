"""`smlt store template`."""

from __future__ import annotations

from typing import Annotated

import typer

from smlt.cli.common import app, examples

store = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The parameter store on AWS.",
)
app.add_typer(store, name="store")


@store.callback(epilog=examples("smlt store template --kind ec2 > store.yaml"))
def _store() -> None:
    pass


@store.command(
    epilog=examples(
        "smlt store template --kind ec2 > store.yaml",
        "smlt store template --kind elasticache --format terraform > store.tf",
        "aws cloudformation deploy --template-file store.yaml --stack-name smlt-store --capabilities CAPABILITY_IAM",
    )
)
def template(
    kind: Annotated[str, typer.Option(help="ec2 (a machine with Valkey) or elasticache (kept by AWS).")] = "ec2",
    template_format: Annotated[str, typer.Option("--format", help="cloudformation or terraform.")] = "cloudformation",
) -> None:
    """Print a template of a private network with a Valkey in it, for functions to train through.

    TLS, a password that Secrets Manager makes up, a port that only the functions' security group reaches, no way to the
    internet. The outputs have the URL for --store, the subnets and security group for `smlt deploy`, and the hourly price
    (SMLT_PRICES: a file with your own prices).
    """
    from smlt.client.prices import load_prices
    from smlt.client.store_template import store_template

    typer.echo(store_template(kind, template_format, load_prices()), nl=False)
