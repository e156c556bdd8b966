"""The command line: train, launch, status, runs, trace, doctor, acl."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from smlt._version import __version__
from smlt.client.artifacts import local_modules
from smlt.client.progress import make_progress, metrics_text, resume_line
from smlt.client.request import RunRequest, check_request, check_workers
from smlt.client.runs import DEFAULT_RUNS_DIR, Run, list_runs
from smlt.client.scheduler import TaskScheduler, take_over
from smlt.errors import CheckpointError, ConfigError, SmltError, TaskError
from smlt.store.object import open_object_store
from smlt.store.parameter import ParameterStore
from smlt.store.secrets import resolve_store_url
from smlt.worker.checkpoint import latest_step


def _examples(*commands: str) -> str:
    """The end of a command's --help; the \\b keeps the lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


app = typer.Typer(
    name="smlt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train models on serverless workers: gradients averaged through a Redis or Valkey store.",
)


def _resolved(store: str | None) -> str | None:
    """The store's URL with its password, or that of SMLT_STORE_FILE: the one place where the command line looks it up."""
    return resolve_store_url(store)


RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder that holds the run folders.")]
_STORE: dict[str, Any] = {
    "envvar": "SMLT_STORE",
    "help": "Parameter store: redis://, rediss:// or unix:// URL, or a secret URL that leads to it. Its password: see "
    "`smlt doctor --help`.",
    "show_default": "embedded",
}
StoreUrl = Annotated[str | None, typer.Option("--store", callback=_resolved, **_STORE)]
StoreReference = Annotated[str | None, typer.Option("--store", **_STORE)]  # as it was given: to say where all comes from
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines on stdout, nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smlt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "smlt train examples/digits.py --workers 4 --epochs 25",
        "smlt train task.py --target-accuracy 0.97 --codec fp32 --data ./images",
        "smlt train task.py --codec int8 --no-error-feedback",
        "smlt train task.py --on-failure shrink --liveness 5 --spares 1",
        "SMLT_STORE_PASSWORD=... smlt train task.py --store rediss://store.example:6380",
        "smlt train task.py --store 'rediss://store.example:6380?password_file=/run/secrets/store' --json",
    )
)
def train(
    script: Annotated[str | None, typer.Argument(help="Script that defines a smlt.Task. Not needed with --resume.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.", show_default="4")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="10")] = None,
    global_batch_size: Annotated[
        int | None, typer.Option(help="Samples a step, all workers together.", show_default="64")
    ] = None,
    target_accuracy: Annotated[float | None, typer.Option(help='End when evaluate() gives this "accuracy", 0 to 1.')] = None,
    seed: Annotated[int | None, typer.Option(help="Of the model, the sample order and the workers.", show_default="0")] = None,
    codec: Annotated[
        str | None, typer.Option(help="What gradients travel as: fp32, fp16, bf16 or int8.", show_default="fp16")
    ] = None,
    error_feedback: Annotated[
        bool | None,
        typer.Option(help="Add to the next gradient what the codec cut off from this one.", show_default="with int8"),
    ] = None,
    bucket_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MB", help="Gradients sent together while backward computes more; 0: all at its end.", show_default="4"
        ),
    ] = None,
    store: StoreUrl = None,
    object_store: Annotated[
        str | None, typer.Option(help="Code, data, checkpoints: a directory.", show_default="the runs folder")
    ] = None,
    memory: Annotated[int | None, typer.Option(metavar="MB", help="End the run when a worker holds more.")] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Files for the task (its data_dir).")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    name: Annotated[str | None, typer.Option(help="The run's name.", show_default="time and script")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Longest wait for a worker or the store.", show_default="300"),
    ] = None,
    on_failure: Annotated[
        str | None,
        typer.Option(
            help="When a worker is lost: restart another in its place, shrink to those who are left, or stop.",
            show_default="restart",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(metavar="K", help="Give up after so many failures in a row without a step between.", show_default="5"),
    ] = None,
    liveness: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="A worker that gives no sign of life for so long is lost.", show_default="10"),
    ] = None,
    spares: Annotated[
        int | None, typer.Option(metavar="K", help="Workers kept ready to take a lost one's place.", show_default="0")
    ] = None,
    replace_stragglers: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help="Replace a worker whose steps take so many times the others'.", show_default="shown only"
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Invoke the workers anew after so long, as a function's time limit makes it.",
            show_default="none",
        ),
    ] = None,
    warm: Annotated[
        bool | None,
        typer.Option(
            "--warm/--cold",
            help="Invoked anew, a worker still has model and data in memory, or has to load them.",
            show_default="warm",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(metavar="K", help="How many checkpoints are kept.", show_default="3")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="As `smlt resume RUN`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the task in SCRIPT with n workers on this machine.

    Workers average their gradients through the parameter store: the embedded one, which needs no setting up, or --store.
    A worker that is lost is replaced, and training goes on where it was. Ctrl-C stops all workers behind the same step
    and leaves a checkpoint to go on from.
    """
    given: dict[str, Any] = {
        "workers": workers,
        "epochs": epochs,
        "global_batch_size": global_batch_size,
        "target_accuracy": target_accuracy,
        "seed": seed,
        "codec": codec,
        "error_feedback": error_feedback,
        "bucket_mb": bucket_mb,
        "object_store": object_store,
        "memory_mb": memory,
        "data": data,
        "timeout_s": timeout,
        "on_failure": on_failure,
        "max_restarts": max_restarts,
        "liveness_s": liveness,
        "spares": spares,
        "replace_stragglers": replace_stragglers,
        "time_limit_s": time_limit,
        "warm": warm,
        "keep_checkpoints": keep_checkpoints,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    if resume is not None:
        if script is not None or data is not None or name is not None:
            raise ConfigError("--resume goes on with the run's own script and data: give no SCRIPT, --data or --name")
        _resume(Run.open(runs_dir, resume), chosen, store, as_json)
        return
    if script is None:
        raise ConfigError("give a SCRIPT, or --resume RUN")
    request = RunRequest(script, **{"workers": 4, **chosen})
    check_request(request)
    _check_surroundings(request, store)  # what cannot work leaves no run folder behind
    run = Run.create(runs_dir, Path(script), asdict(request), name)
    TaskScheduler(run, request, make_progress(as_json=as_json), store_url=store).run()


def _resume(run: Run, chosen: dict[str, Any], store: str | None, as_json: bool) -> None:
    request = _resumed(run, chosen)
    if store is not None:
        take_over(run, store)
    TaskScheduler(run, request, make_progress(as_json=as_json), store_url=store, resume=True).run()


@app.command(epilog=_examples("smlt resume 20260102-153000-digits", "smlt resume 20260102-153000-digits --epochs 50 --json"))
def resume(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.", show_default="as before")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="as before")] = None,
    store: StoreUrl = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, has failed, or has lost its scheduler.

    It goes on at the very sample behind its newest checkpoint. Workers that are still there without a scheduler are given
    time to stop at a checkpoint of their own. All else is as the run was asked for; `smlt train --resume` can change more.
    """
    chosen = {key: value for key, value in {"workers": workers, "epochs": epochs}.items() if value is not None}
    _resume(Run.open(runs_dir, run), chosen, store, as_json)


@app.command(epilog=_examples("smlt scale 20260102-153000-digits --workers 8"))
def scale(
    run: Annotated[str, typer.Argument(help="The name or folder of a run that is under way.")],
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of workers from now on.")],
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Change the number of workers of a run that is under way.

    The global batch, the order of the samples and the optimizer's state stay as they are. New workers are started first;
    training goes on meanwhile.
    """
    found = Run.open(runs_dir, run)
    check_workers(workers, int(found.config["global_batch_size"]))
    if found.status["state"] != "running":
        raise ConfigError(
            f"run {found.name} is not under way (it is {found.status['state']}): smlt resume {run} --workers {workers}"
        )
    found.request_scale(workers)


def _check_surroundings(request: RunRequest, store: str | None) -> None:
    """Raise what is wrong with the script, the data, the object store or the store."""
    local_modules(Path(request.script))
    if request.data is not None and not Path(request.data).is_dir():
        raise TaskError(f"--data {request.data}: no such folder")
    if request.object_store is not None:
        open_object_store(request.object_store)
    if store is not None:
        with contextlib.closing(ParameterStore(store, job="check")) as parameters:
            parameters.check()


def _resumed(run: Run, chosen: dict[str, Any]) -> RunRequest:
    """What the run was asked for, with what is asked for now in its place."""
    state = run.status
    if state.get("state") == "running":
        raise ConfigError(f"run {run.name} is still running (process {state['pid']})")
    try:
        before = RunRequest(**run.config)
        check_request(before)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"run {run.name}: {run.path / 'config.json'} is not a run's configuration: {error}") from error
    request = replace(before, **chosen)
    for key in ("seed", "global_batch_size"):
        if getattr(request, key) != getattr(before, key):
            raise ConfigError(f"--resume keeps the run's {key} ({getattr(before, key)}): the samples' order hangs on it")
    check_request(request)
    return request


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=_examples("smlt launch -n 4 script.py", "smlt launch -n 2 --store redis://10.0.0.5 script.py --steps 100"),
)
def launch(
    script: Annotated[str, typer.Argument(help="Any Python script that calls smlt.init() and the collectives.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.")] = None,
    workers: Annotated[int, typer.Option("--workers", "-n", help="Number of processes.")] = 4,
    store: StoreUrl = None,
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
    code = launch_processes(script, arguments or [], workers, store, timeout)
    if code:
        raise typer.Exit(code)


@app.command(epilog=_examples("smlt status", "smlt status 20260102-153000-digits --json"))
def status(
    run: Annotated[str | None, typer.Argument(help="A run's name or folder.", show_default="the latest")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
) -> None:
    """Show how a run stands or ended."""
    if run is None:
        runs = list_runs(runs_dir)
        if not runs:
            raise CheckpointError(f"there are no runs in {runs_dir}")
        found = Run.open(runs_dir, runs[-1].name)
    else:
        found = Run.open(runs_dir, run)
    state, config = found.status, found.config
    if as_json:
        typer.echo(json.dumps({"run": found.name, "folder": str(found.path), "config": config, **state}))
        return
    typer.echo(f"run      {found.name}")
    typer.echo(f"folder   {found.path}")
    typer.echo(f"state    {state['state']}{' (its process is gone)' if state['state'] == 'lost' else ''}")
    typer.echo(f"progress epoch {state.get('epoch', 0)} of {config['epochs']}, step {state.get('step', 0)}")
    if state.get("metrics"):
        typer.echo(f"metrics  {metrics_text(state['metrics'])}")
    end = state.get("ended") if state["state"] != "running" else time.time()
    if end is not None and "started" in state:
        typer.echo(f"time     {max(0.0, end - state['started']):.1f} s")
    if state.get("error"):
        typer.echo(f"error    {state['error'].splitlines()[0]}")
    if state["state"] in ("stopped", "lost", "failed"):
        objects = open_object_store(config.get("object_store") or str(found.runs_dir))
        typer.echo(resume_line(found, {"checkpoint_step": latest_step(objects, f"{found.name}/checkpoints")}))


@app.command(epilog=_examples("smlt runs", "smlt runs --json | jq .state"))
def runs(runs_dir: RunsDir = DEFAULT_RUNS_DIR, as_json: AsJson = False) -> None:
    """List the runs, oldest first."""
    rows = [("run", "state", "workers", "epoch", "step", "metrics")]
    for run in list_runs(runs_dir):
        try:
            state, config = run.status, run.config
        except CheckpointError as error:
            state, config = {"state": "incomplete", "error": str(error)}, {}
        if as_json:
            typer.echo(json.dumps({"run": run.name, **state}))
        epoch = f"{state.get('epoch', 0)}/{config.get('epochs', '?')}"
        metrics = metrics_text(state.get("metrics") or {})
        rows.append((run.name, state["state"], str(config.get("workers", "?")), epoch, str(state.get("step", 0)), metrics))
    if as_json:
        return
    if len(rows) == 1:
        typer.echo(f"no runs in {runs_dir}")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command(
    epilog=_examples(
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
    epilog=_examples(
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
    epilog=_examples(
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


def run() -> int:
    """Run the command line; returns the exit code. An expected error is one line on stderr, a traceback means a bug."""
    interrupted_by = _end_in_order()
    try:
        # Not standalone, typer returns the code of a typer.Exit, and None behind a command that came to its end.
        code = app(prog_name="smlt", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except SmltError as error:
        if os.environ.get("SMLT_DEBUG"):
            raise
        print(f"smlt: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own: a wrong option or argument
        if usage is None:
            raise
        print(usage() if usage().startswith("Usage:") else f"smlt: {usage()}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return 128 + interrupted_by[0] if code == 130 and interrupted_by else code


def _end_in_order() -> list[int]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: no process and no key is left. Returns those that came."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored, and stays so
            signal.signal(number, interrupt)
    return came
