"""`smlt lambda-local`."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smlt.cli.common import AsJson, app, examples
from smlt.errors import ConfigError

_writing = threading.Lock()

if TYPE_CHECKING:
    from smlt.emulator import Faults, LambdaLocal, Record


@app.command(
    "lambda-local",
    epilog=examples(
        "smlt lambda-local --port 4566",
        "smlt lambda-local --throttle 0.2 --duplicate 0.1 --kill 0.05 --seed 7",
        "smlt lambda-local --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/smlt:1=/home/me/venv",
    ),
)
def lambda_local(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of 127.0.0.1.", show_default="a free one")] = 0,
    throttle: Annotated[float, typer.Option(help="Fraction of the invocations that are refused with 429.")] = 0.0,
    duplicate: Annotated[float, typer.Option(help="Fraction that run a second time at the same time.")] = 0.0,
    kill: Annotated[float, typer.Option(help="Fraction whose sandbox is killed while it works.")] = 0.0,
    kill_after: Annotated[str, typer.Option(metavar="FROM:TO", help="When it is killed, seconds from its start.")] = "0:5",
    cold_start: Annotated[float, typer.Option(metavar="SECONDS", help="What each cold start takes longer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0,
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="URI=PREFIX", help="Python environment that stands for an image; may be given several times."),
    ] = None,
    idle: Annotated[float, typer.Option(metavar="SECONDS", help="How long a warm sandbox is kept.")] = 300.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent executions of the account.")] = 1000,
    retry_delays: Annotated[
        str, typer.Option(metavar="S,S", help="Seconds before asynchronous invocations that failed are tried again.")
    ] = "60,120",
    init_timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long a handler may load.")] = 10.0,
    settle: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a new function is Pending, and an update in progress.")
    ] = 1.0,
    authorize: Annotated[bool, typer.Option("--authorize", help="Enforce IAM policies.")] = False,
    as_json: AsJson = False,
) -> None:
    """AWS on this machine, to try a deployment before paying for it: Lambda, S3, IAM, CloudWatch Logs at one endpoint.

    Prints the endpoint, then a line for each invocation. Set AWS_ENDPOINT_URL to it, and deploy and train as on AWS. The
    uploaded zip and layers are unpacked and run by the genuine runtime client, in processes that are frozen between
    invocations and have Lambda's timeouts, memory, concurrency and logs. Everything is forgotten at the end (Ctrl-C).

    There are no containers: a function made of an image runs in a Python environment of this machine that stands for the image,
    by default the one that lambda-local runs in.
    """
    try:
        from smlt.emulator import LambdaLocal
    except ImportError as error:
        raise ConfigError(f"lambda-local needs {error.name}: pip install 'smlt[lambda-local]'") from error
    _allow_files()
    with LambdaLocal(
        port=port,
        faults=_faults(throttle, duplicate, kill, kill_after, cold_start),
        seed=seed,
        images=dict(_image(text) for text in image or []),
        idle_s=idle,
        account_limit=concurrency,
        retry_delays_s=_numbers("--retry-delays", retry_delays, ","),
        init_timeout_s=init_timeout,
        settle_s=settle,
        authorize=authorize,
        on_invocation=_say_json if as_json else _say,
    ) as local:
        try:
            _introduce(local, as_json=as_json)
            threading.Event().wait()
        except KeyboardInterrupt:
            return  # asked to end: that is success


def _allow_files() -> None:
    """A sandbox takes seven open files here; the usual 1024 would end at some 140 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _faults(throttle: float, duplicate: float, kill: float, kill_after: str, cold_start: float) -> Faults:
    from smlt.emulator import Faults

    moments = _numbers("--kill-after", kill_after, ":")
    if len(moments) != 2:
        raise ConfigError(f"--kill-after is a range of seconds such as 0:5, not {kill_after}")
    return Faults(throttle, duplicate, kill, (moments[0], moments[1]), cold_start)


def _numbers(option: str, text: str, separator: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(separator)]
    except ValueError:
        raise ConfigError(f"{option} {text}: numbers with {separator} between them, please") from None
    if any(not 0 <= number < 1e6 for number in found):
        raise ConfigError(f"{option} {text}: the seconds must not be negative")
    return found


def _image(text: str) -> tuple[str, Path]:
    uri, separator, prefix = text.partition("=")
    if not (uri and separator and prefix):
        raise ConfigError(f"--image {text}: give URI=PREFIX, where PREFIX is the folder of a Python environment")
    return uri, Path(prefix).expanduser().absolute()


def _introduce(local: LambdaLocal, *, as_json: bool) -> None:
    """The endpoint on stdout; what to do with it on stderr."""
    needed = local.environment(os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1")
    if as_json:
        print(json.dumps({"endpoint_url": local.endpoint_url, "environment": needed}), flush=True)
        return
    print(local.endpoint_url, flush=True)
    exports = " ".join(f"{name}={value}" for name, value in needed.items())
    print(f"In another terminal: export {exports}\nCtrl-C ends it.", file=sys.stderr, flush=True)


def _say(record: Record) -> None:
    parts = [time.strftime("%H:%M:%S"), f"{record.function}:{record.version}", record.request_id, record.status]
    if record.status != "throttled":
        parts.append(
            f"{record.duration_ms:.0f} ms, billed {record.billed_ms} ms, {record.max_memory_mb} of {record.memory_mb} MB"
        )
    if record.init_ms is not None:
        parts.append(f"cold {record.init_ms:.0f} ms")
    parts += ["event"] if record.kind == "Event" else []
    parts += [f"attempt {record.attempt}"] if record.attempt > 1 else []
    parts += ["duplicate"] if record.duplicate else []
    _write("  ".join(parts))


def _say_json(record: Record) -> None:
    _write(json.dumps(asdict(record)))


def _write(line: str) -> None:
    """In one piece: invocations end at the same time, in threads of their own."""
    with _writing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
