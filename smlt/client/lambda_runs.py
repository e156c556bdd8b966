"""A run on Lambda: which store URL goes where."""

from __future__ import annotations

import os
from dataclasses import replace
from urllib.parse import urlsplit

from smlt.client.deployment.lookup import find_deployment
from smlt.client.request import RunRequest
from smlt.errors import ConfigError
from smlt.store.parameter import redact
from smlt.store.secrets import resolve_store_url
from smlt.store.url import endpoints, is_cluster


def functions_run_here() -> bool:
    """Whether AWS_ENDPOINT_URL leads to this machine: `smlt lambda-local`, whose functions reach its loopback."""
    host = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname
    return host in ("127.0.0.1", "localhost", "::1")


def check_reference(url: str) -> None:
    """ConfigError when a store URL cannot be given to functions: it has a password, or leads to this machine's files."""
    for part in endpoints(url):
        _check_reference(part)


def _check_reference(url: str) -> None:
    parts = urlsplit(url)
    advice = "put the password into Secrets Manager and write ?password_secret=aws-secretsmanager://NAME"
    if parts.password or "password=" in parts.query:
        raise ConfigError(f"store {redact(url)}: functions are not given a password in their event: {advice}")
    for option in ("password_file", "password_env"):
        if f"{option}=" in parts.query:
            raise ConfigError(f"store {redact(url)}: functions do not have this machine's {option}: {advice}")
    if parts.scheme in ("unix", "file", "env"):
        raise ConfigError(f"store {redact(url)}: functions reach a store over the network only: redis:// or rediss://")


def through(url: str, tunnel: str) -> str:
    """The store's URL as this machine reaches it, at `tunnel`: "localhost:6379", with commas between those of several nodes.

    ConfigError when that is no HOST:PORT for each node, and for a cluster, whose nodes say themselves where they are.
    """
    if is_cluster(url):
        raise ConfigError(
            "--store-tunnel leads to single servers, and a cluster's tell their own addresses: route to its network (a VPN), "
            "or run smlt train there"
        )
    nodes, tunnels = endpoints(url), tunnel.split(",")
    if len(nodes) != len(tunnels):
        raise ConfigError(f"--store-tunnel {tunnel!r}: give HOST:PORT for each of the {len(nodes)} nodes of --store, in order")
    return ",".join(_through(node, end) for node, end in zip(nodes, tunnels, strict=True))


def _through(url: str, tunnel: str) -> str:
    host, colon, port = tunnel.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"--store-tunnel {tunnel!r}: give HOST:PORT")
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss"):
        raise ConfigError("--store-tunnel is for a --store redis:// or rediss:// URL")
    user, at, _ = parts.netloc.rpartition("@")
    query = parts.query
    if parts.scheme == "rediss":  # the certificate is for the store's own name; who signed it is still looked at
        query += ("&" if query else "") + "ssl_check_hostname=false"
    return parts._replace(netloc=f"{user}{at}{host}:{port}", query=query).geturl()


def place(request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
    """The request with what the deployment says, and the store as this machine reaches it; None: the embedded one.

    `store` is the reference that was given, with a password neither in it nor on this machine. ConfigError, DeployError.
    """
    deployment = find_deployment(request.function)
    object_store = request.object_store or deployment.object_store
    if not object_store.startswith("s3://"):
        raise ConfigError(f"--object-store {object_store}: functions need s3://bucket/prefix")
    reference = store or request.store or deployment.store
    if reference is None:
        if not functions_run_here():
            raise ConfigError(
                "functions cannot reach this machine's embedded store: give --store, or deploy the function with one "
                "(`smlt store template` makes a store on AWS)"
            )
        return replace(request, object_store=object_store), None
    check_reference(reference)
    placed = replace(request, object_store=object_store, store=reference)
    reached = through(reference, request.store_tunnel) if request.store_tunnel is not None else reference
    return placed, resolve_store_url(reached)
