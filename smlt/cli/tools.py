"""`smlt launch`, `smlt trace`, `smlt doctor`, `smlt acl`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smlt.cli.common import AsJson, StoreReference, StoreUrl, app, examples
from smlt.errors import ConfigError


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=examples("smlt launch -n 4 script.py", "smlt launch -n 2 --store redis://10.0.0.5 script.py --steps 100"),
)
def launch(
    script: Annotated[str, typer.Argument(help="Any Python script that calls smlt.init() and the collectives.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of processes.")] = 4,
    store: StoreUrl = None,
    two_level: Annotated[
        bool, typer.Option("--two-level", help="Reduce in memory that the processes share; without --store there is none.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Longest wait for a process or the store.", show_default="300"),
    ] = None,
) -> None:
    """Run a script in n processes that share a job.

    Each process finds SMLT_STORE, SMLT_JOB, SMLT_RANK and SMLT_WORLD_SIZE in its environment; smlt.init() reads them.
    Lines of output are prefixed by rank. The first process that fails ends all. Options go before SCRIPT, its arguments behind.
    """
    from smlt.client.launch import launch as launch_processes

    if workers < 1:
        raise ConfigError(f"--workers {workers} is not positive")
    code = launch_processes(script, arguments or [], workers, store, timeout, two_level)
    if code:
        raise typer.Exit(code)


@app.command(
    epilog=examples(
        "smlt trace --workers 4 --out trace.json", "smlt trace --workers 2 --floats 1000 --store redis://10.0.0.5:6379"
    )
)
def trace(
    workers: Annotated[int, typer.Option("--workers", "-n", min=2, max=256, help="Processes on this machine.")] = 4,
    floats: Annotated[int, typer.Option("--floats", min=1, help="Elements of the float32 gradient.")] = 11_000_000,
    codec: Annotated[str, typer.Option("--codec", help="fp32, fp16, bf16 or int8.")] = "fp16",
    algorithm: Annotated[str, typer.Option("--algorithm", help="auto, one-shot, hierarchical or centralised.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Write a file for ui.perfetto.dev or chrome://tracing.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what the workers spend one all-reduce on: encode, send, wait, receive, add, publish, decode.

    The table gives milliseconds by phase and worker; what is left to the total is bookkeeping.
    """
    from smlt.client.tracing import trace_allreduce
    from smlt.collective.codecs import check_codec
    from smlt.collective.trace import PHASES, write_chrome
    from smlt.collective.tuning import check_algorithm

    traces, seconds = trace_allreduce(workers, floats, check_codec(codec), check_algorithm(algorithm), store)
    if out is not None:
        write_chrome(out, traces)
    if not as_json:
        typer.echo("worker   total" + "".join(f"{phase:>9}" for phase in PHASES) + "   ms")
    for one, total in zip(traces, seconds, strict=True):
        spent = one.seconds()
        if as_json:
            typer.echo(json.dumps({"rank": one.rank, "seconds": total, "phases_s": spent, "bytes": one.bytes()}))
        else:
            columns = "".join(f"{spent[phase] * 1e3:9.2f}" for phase in PHASES)
            typer.echo(f"{one.rank:6}{total * 1e3:8.2f}{columns}")
    if out is not None and not as_json:
        typer.echo(f"{out}: open it in ui.perfetto.dev or chrome://tracing")


@app.command(
    epilog=examples(
        "smlt doctor",
        "smlt doctor --store redis://10.0.0.5:6379",
        "smlt doctor --store redis://10.0.0.5 --tune",
        "smlt doctor --store 'rediss://store.example?password_secret=aws-secretsmanager://team/store%3Fkey=password'",
    )
)
def doctor(
    store: StoreReference = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure what a message costs on the way to the store, and keep it for later runs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at this machine and the store, and say what to fix.

    The store's password stands in the URL, or is found by ?password_file=PATH, ?password_env=NAME or
    ?password_secret=SECRET in it, else by SMLT_STORE_PASSWORD or SMLT_STORE_PASSWORD_FILE. SMLT_STORE_FILE names a file
    that holds the URL. A SECRET is file:///PATH, env:NAME, aws-secretsmanager://NAME or aws-ssm://NAME, and may stand for
    the whole URL too. SMLT_STORE_CA_CERTS, SMLT_STORE_CERTFILE and SMLT_STORE_KEYFILE are for rediss://.

    With --tune the measured constants are kept in a file; from then on they choose the algorithm, the number of
    shards and the size of chunks for that store. Exit code 3 when something cannot work.
    """
    from smlt.client.doctor import diagnose, tune_store

    findings = diagnose(store, in_process_list=store is not None and store != os.environ.get("SMLT_STORE"))
    if tune and not any(finding.status == "fail" for finding in findings):
        findings += tune_store(store)
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(asdict(finding)))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:4}  {finding.name:{width}}  {finding.text}")
            if finding.fix:
                typer.echo(f"      {'':{width}}  -> {finding.fix}")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(3)


@app.command(
    epilog=examples(
        "smlt acl --user trainer --run-prefix digits --generate trainer.password | valkey-cli -h store.example",
        "smlt train digits.py --name digits --store 'redis://trainer@store.example?password_file=trainer.password'",
        "smlt acl --user tools --run-prefix launch- --run-prefix doctor- --password-env TOOLS_PASSWORD",
        "smlt acl --job averaging --password-env WORKER_PASSWORD --json | jq -r .access_string",
    )
)
def acl(
    user: Annotated[str, typer.Option(help="The user's name.")] = "smlt",
    job: Annotated[list[str] | None, typer.Option(metavar="JOB", help="A job by name, as smlt.init() is given it.")] = None,
    run_prefix: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Jobs whose names begin so: a run, or several of its kind.")
    ] = None,
    password_env: Annotated[str | None, typer.Option(metavar="NAME", help="The variable that holds the password.")] = None,
    generate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a new password to a new file that only you can read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the ACL SETUSER line of a store's user that may do what SMLT needs with its own jobs' keys, nothing else.

    --job and --run-prefix may be given several times. The job of `smlt train` begins with the run's name (--name), that of
    launch, doctor, trace and doctor --tune with "launch-", "doctor-", "trace-" and "tune-". The password is in the line
    as its SHA-256 only. Nothing is sent to the store: whoever administers it does that.

    SCAN, which deletes what a job leaves, names the keys of other jobs too (their content stays closed), and INFO tells
    about the server. Where names are a secret, give each user a store of his own. A Redis older than 7.2 knows no
    client|setinfo: leave it out there.
    """
    from smlt.client.acl import COMMANDS, acl_user, password_of

    acl_user(user, job or [], run_prefix or [], "-")  # what is wrong is told before a file is made
    made = acl_user(user, job or [], run_prefix or [], password_of(password_env, generate))
    if as_json:
        row = {"user": made.name, "line": made.line, "access_string": made.access, "commands": COMMANDS}
        typer.echo(json.dumps({**row, "keys": made.patterns, "password_sha256": made.password_sha256}))
        return
    typer.echo(made.line)
