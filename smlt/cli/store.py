"""`smlt store up`, `smlt store template`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smlt.cli.common import AsJson, app, examples
from smlt.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from smlt.store.embedded_cluster import EmbeddedCluster
    from smlt.store.embedded_set import EmbeddedStores

#: How often `up` looks whether its servers are alive.
LOOK_S = 0.5

store = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The parameter store: several nodes of it on this machine, or one on AWS.",
)
app.add_typer(store, name="store")


@store.callback(epilog=examples("smlt store up --nodes 3", "smlt store template --kind ec2 > store.yaml"))
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


@store.command(
    epilog=examples(
        "smlt store up --nodes 3",
        "smlt store up --nodes 3 --url-file store.url & SMLT_STORE_FILE=store.url smlt train task.py --workers 8",
        "smlt store up --nodes 3 --cluster --replicas 1",
        "smlt store up --nodes 2 --memory 8192 --bind 10.0.0.5",
    )
)
def up(
    nodes: Annotated[int, typer.Option("--nodes", help="Servers; of a cluster its primaries.")] = 1,
    cluster: Annotated[bool, typer.Option("--cluster", help="A Valkey Cluster, instead of independent servers.")] = False,
    replicas: Annotated[int, typer.Option("--replicas", help="Of each primary of the cluster.")] = 0,
    memory: Annotated[
        int | None,
        typer.Option("--memory", min=1, metavar="MB", help="Of each server.", show_default="half of this machine's, shared"),
    ] = None,
    bind: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="An address of this machine at which others may reach it, without TLS."),
    ] = None,
    url_file: Annotated[
        Path | None, typer.Option("--url-file", metavar="FILE", help="Write the URL there, for SMLT_STORE_FILE, not to stdout.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start a parameter store of several nodes on this machine, until Ctrl-C.

    Prints its URL, which holds a new password. It is for trying several nodes out, and for a machine of its own beside
    the workers; a store that outlives a terminal is a service of the system's, or AWS's. Nothing is written to disk.
    """
    from smlt.store.embedded_cluster import EmbeddedCluster
    from smlt.store.embedded_set import EmbeddedStores

    if replicas and not cluster:
        raise ConfigError("--replicas is for --cluster: independent servers have none")
    memory_bytes, addresses = memory << 20 if memory is not None else None, [bind] if bind else []
    with ExitStack() as stack:
        made: EmbeddedCluster | EmbeddedStores
        if cluster:
            made = stack.enter_context(EmbeddedCluster(nodes, replicas, memory_bytes=memory_bytes, bind=addresses))
            url = made.url
        else:
            made = stack.enter_context(EmbeddedStores(nodes, memory_bytes=memory_bytes, bind=addresses))
            url = made.tcp_url_at(bind) if bind else made.url
        if url_file is not None:
            _write(url_file, url)
            stack.callback(url_file.unlink, missing_ok=True)
        try:
            _introduce(made, url, url_file, as_json=as_json)
            _watch(made)
        except KeyboardInterrupt:
            return  # asked to end: that is success


def _write(path: Path, url: str) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(url + "\n")
    except FileExistsError:
        raise ConfigError(f"--url-file {path}: there is such a file; remove it, or give another name") from None
    except OSError as error:
        raise ConfigError(f"--url-file {path}: it cannot be written: {error.strerror}") from error


def _introduce(made: EmbeddedCluster | EmbeddedStores, url: str, url_file: Path | None, *, as_json: bool) -> None:
    """The URL on stdout unless it is in a file; what to do with it on stderr."""
    if as_json:
        rows = [{"pid": node.pid, "memory_bytes": node.memory_bytes} for node in made.nodes]
        where = {"url": url} if url_file is None else {"url_file": str(url_file)}
        print(json.dumps({**where, "nodes": rows}), flush=True)
        return
    if url_file is None:
        print(url, flush=True)
    variable = f"SMLT_STORE_FILE={shlex.quote(str(url_file.absolute()))}" if url_file is not None else "SMLT_STORE='<that URL>'"
    count, memory_mb = len(made.nodes), made.nodes[0].memory_bytes >> 20
    servers = f"{count} server{'s' if count > 1 else ''}, {memory_mb} MB each"
    print(f"{servers}. In another terminal: export {variable}\nCtrl-C ends it.", file=sys.stderr, flush=True)


def _watch(made: EmbeddedCluster | EmbeddedStores) -> None:
    """Wait for Ctrl-C. StoreUnavailable when a server has died that the store cannot do without."""
    told: set[int] = set()
    while True:
        for j, node in enumerate(made.nodes):
            if not node.alive and j not in told:
                told.add(j)
                said = f"server {j} (process {node.pid}) has died; the end of its log:\n{node.log_tail()}"
                if not made.outlives(told):
                    raise StoreUnavailable(said)
                print(f"smlt: {said}", file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
