"""`smlt train`, `smlt resume`, `smlt scale`, `smlt stop`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from smlt.cli.common import (
    AsJson,
    EndpointUrl,
    Profile,
    Region,
    RunsDir,
    StoreReference,
    app,
    examples,
    go_where,
    resolved,
    where_aws_is,
)
from smlt.cli.listening import Log, MetricsHost, MetricsPort, listened_to
from smlt.client.artifacts import local_modules
from smlt.client.executors.registry import find, parse_options
from smlt.client.lambda_runs import through
from smlt.client.loggers import check_log
from smlt.client.optimizer.goals import parse_duration, parse_usd
from smlt.client.request import FUNCTION, RunRequest, check_request, check_workers, smallest_batch, with_schedule
from smlt.client.runs import DEFAULT_RUNS_DIR, Run
from smlt.client.scheduler import TaskScheduler, take_over
from smlt.client.stopping import stop_run
from smlt.client.tuned_runs import chosen_line, steered, steered_again
from smlt.errors import CheckpointError, ConfigError, TaskError
from smlt.store.object import open_object_store
from smlt.store.parameter import ParameterStore
from smlt.worker.hyperparameters import parse_assignments


@app.command(
    epilog=examples(
        "smlt train examples/digits.py --workers 4 --epochs 25",
        "smlt train task.py --target-accuracy 0.97 --codec fp32 --data ./images",
        "smlt train task.py --set lr=0.05 --set width=128",
        "smlt train task.py --codec int8 --no-error-feedback",
        "smlt train task.py --batch-schedule 0:64,10:128,20:256 --lr-rule linear --patience 5",
        "AWS_PROFILE=me smlt train task.py --object-store s3://my-bucket/smlt --data ./images",
        "smlt train task.py --on-failure shrink --liveness 5 --spares 1",
        "SMLT_STORE_PASSWORD=... smlt train task.py --store rediss://store.example:6380",
        "smlt train task.py --store 'rediss://store.example:6380?password_file=/run/secrets/store' --json",
        "smlt train task.py --on lambda --function digits --workers 32 --memory 1769",
        "smlt train task.py --on ray --on-option address=auto --on-option num_cpus=2 --workers 8",
        "smlt train task.py --on lambda --deadline 2h --max-workers 64",
        "smlt train task.py --on lambda --budget 5.00 --on-miss stop",
        "smlt train task.py --deadline 10m --json",
        "smlt train task.py --log tensorboard --log mlflow=http://mlflow.example:5000 --metrics-port 9464",
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
    batch_schedule: Annotated[
        str | None,
        typer.Option(metavar="EPOCH:SAMPLES,...", help="Samples a step from which epoch on.", show_default="one global batch"),
    ] = None,
    lr_rule: Annotated[
        str | None,
        typer.Option(help="How the learning rate follows the global batch: none, linear or sqrt.", show_default="none"),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(metavar="K", help="End when K epochs have brought no better metric.", show_default="never")
    ] = None,
    stop_metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of evaluate()'s metrics.", show_default="accuracy")
    ] = None,
    stop_mode: Annotated[
        str | None, typer.Option(help="Whether more of it is better (max) or less (min).", show_default="max")
    ] = None,
    hyperparameters: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A hyper-parameter: a class attribute of the task; may be given several times."
        ),
    ] = None,
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
    store: StoreReference = None,
    store_window: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="How much of each store node's memory gradients may take; 0: as much as it comes to.",
            show_default="0.6 of what is free, if limited",
        ),
    ] = None,
    object_store: Annotated[
        str | None,
        typer.Option(help="Code, data, checkpoints: a directory, or s3://bucket/prefix.", show_default="the runs folder"),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="MB", help="End the run when a worker holds more; with --on lambda, what each function gets."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="K", help="Threads that each worker computes with.", show_default="the cores shared out"),
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Files for the task (its data_dir).")] = None,
    shared_data: Annotated[
        str | None, typer.Option(metavar="NAME", help="Files that lie in the object store below that name.", hidden=True)
    ] = None,
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
            help="With --time-limit: invoked anew, a local worker still has model and data in memory, or has to load them. "
            "With --on lambda it does nothing: which sandbox is warm is Lambda's choice.",
            show_default="warm",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(metavar="K", help="How many checkpoints are kept.", show_default="3")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="EXECUTOR",
            help="Where workers run: local, lambda, or what `smlt executors` lists.",
            show_default="local",
        ),
    ] = None,
    on_option: Annotated[
        list[str] | None,
        typer.Option("--on-option", metavar="KEY=VALUE", help="What the executor wants to know; may be repeated."),
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="NAME", help="The function that `smlt deploy` has made.", show_default=FUNCTION)
    ] = None,
    store_tunnel: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT[,...]", help="Where this machine reaches the store of the functions, when not by --store."
        ),
    ] = None,
    store_node: Annotated[
        str | None, typer.Option(metavar="NODE", help="What that store runs on, for the bill: cache.t4g.small, t4g.small, ...")
    ] = None,
    store_nodes: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="How many of them.", show_default="as many as the store's URL lists")
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End within 90m, 2h, 1h30m: workers are chosen, and changed, toward that."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="Cost no more than that: workers are chosen, and changed, toward that.")
    ] = None,
    tune: Annotated[
        bool | None,
        typer.Option("--tune", help="Choose workers, and change them: the best trade of time and cost."),
    ] = None,
    on_miss: Annotated[
        str | None,
        typer.Option(
            help="When the goal cannot be kept: ask, stop at a checkpoint, continue without it, or best-effort.",
            show_default="ask; where nobody is to be asked, best-effort",
        ),
    ] = None,
    max_workers: Annotated[
        int | None, typer.Option(metavar="K", help="No more than so many are chosen.", show_default="what there is room for")
    ] = None,
    learn_from: Annotated[
        str | None, typer.Option(metavar="RUN", help="Begin with what an earlier run of the same task has observed.")
    ] = None,
    log: Log = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    profile: Profile = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="As `smlt resume RUN`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the task in SCRIPT with n workers, on this machine, as Lambda functions, or by another executor.

    Workers average their gradients through the parameter store: the embedded one, which needs no setting up, or --store.
    A worker that is lost is replaced, and training goes on where it was. Ctrl-C stops all workers behind the same step
    and leaves a checkpoint to go on from.

    With --on lambda the workers are invocations of a function that `smlt deploy` has made. Code and data go to its bucket; its
    --store must be one that functions and this machine reach, its password in a secret manager.
    """
    given: dict[str, Any] = {
        "workers": workers,
        "epochs": epochs,
        "global_batch_size": global_batch_size,
        "target_accuracy": target_accuracy,
        "batch_schedule": batch_schedule,
        "lr_rule": lr_rule,
        "patience": patience,
        "stop_metric": stop_metric,
        "stop_mode": stop_mode,
        "hyperparameters": parse_assignments(hyperparameters) if hyperparameters else None,
        "seed": seed,
        "codec": codec,
        "error_feedback": error_feedback,
        "bucket_mb": bucket_mb,
        "store_window_mb": store_window,
        "object_store": object_store,
        "memory_mb": memory,
        "threads": threads,
        "data": data,
        "data_run": shared_data,
        "timeout_s": timeout,
        "on_failure": on_failure,
        "max_restarts": max_restarts,
        "liveness_s": liveness,
        "spares": spares,
        "replace_stragglers": replace_stragglers,
        "time_limit_s": time_limit,
        "warm": warm,
        "keep_checkpoints": keep_checkpoints,
        "on": on,
        "on_options": None if on_option is None else parse_options(on_option),
        "function": function,
        "store_tunnel": store_tunnel,
        "store_node": store_node,
        "store_nodes": store_nodes,
        "deadline_s": None if deadline is None else parse_duration(deadline),
        "budget_usd": None if budget is None else parse_usd(budget),
        "tune": tune or deadline is not None or budget is not None or None,
        "on_miss": on_miss,
        "max_workers": max_workers,
        "log": None if log is None else check_log(log),
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    if resume is not None:
        if script is not None or data is not None or name is not None:
            raise ConfigError("--resume goes on with the run's own script and data: give no SCRIPT, --data or --name")
        if learn_from is not None:
            raise ConfigError("--resume goes on with what the run has observed itself: give no --learn-from")
        _resume(Run.open(runs_dir, resume), chosen, store, as_json)
        return
    if script is None:
        raise ConfigError("give a SCRIPT, or --resume RUN")
    request = with_schedule(RunRequest(script, **{"workers": 4, **chosen}), global_batch_size)
    check_request(request)
    local_modules(Path(script))
    request, url = _placed(request, store)
    _check_surroundings(request, url)  # what cannot work leaves no run folder behind
    progress = listened_to(request, as_json=as_json)
    tuned = None
    if request.tune:
        before = None if learn_from is None else Run.open(runs_dir, learn_from)
        tuned = steered(request, workers=workers, learn_from=before, progress=progress)
        request = tuned.request
        progress.preparing(chosen_line(tuned))
    elif learn_from is not None:
        raise ConfigError("--learn-from is for a run that chooses its workers: give --deadline, --budget or --tune")
    run = Run.create(runs_dir, Path(script), asdict(request), name)
    if request.on == "lambda":
        run.write_status(aws=where_aws_is())
    steering = None if tuned is None else tuned.begin(run)
    TaskScheduler(run, request, progress, store_url=url, steering=steering).run()


def _placed(request: RunRequest, store: str | None) -> tuple[RunRequest, str | None]:
    """The request as it is carried out, and the store as this machine reaches it; None: the embedded one."""
    return find(request.on).place(request, store)


def _resume(run: Run, chosen: dict[str, Any], store: str | None, as_json: bool) -> None:
    go_where(run)
    request, url = _placed(_resumed(run, chosen), store)
    progress = listened_to(request, as_json=as_json)  # what cannot listen leaves workers that are still there alone
    if url is not None:
        take_over(run, url)
    steering = None
    if request.tune and "workers" not in chosen:
        steering = steered_again(run, request).go_on(run, anew="deadline_s" in chosen)
    elif request.tune:  # whoever says how many wants as many
        request = replace(request, tune=False, deadline_s=None, budget_usd=None)
    TaskScheduler(run, request, progress, store_url=url, resume=True, steering=steering).run()


@app.command(epilog=examples("smlt resume 20260102-153000-digits", "smlt resume 20260102-153000-digits --epochs 50 --json"))
def resume(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.", show_default="as before")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.", show_default="as before")] = None,
    store: StoreReference = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    profile: Profile = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, has failed, or has lost its scheduler.

    It goes on at the very sample behind its newest checkpoint. Workers that are still there without a scheduler are given
    time to stop at a checkpoint of their own. All else is as the run was asked for; `smlt train --resume` can change more.
    """
    chosen = {key: value for key, value in {"workers": workers, "epochs": epochs}.items() if value is not None}
    _resume(Run.open(runs_dir, run), chosen, store, as_json)


@app.command(epilog=examples("smlt scale 20260102-153000-digits --workers 8"))
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
    check_workers(workers, smallest_batch(_request_of(found), found.status))
    if found.status["state"] != "running":
        raise ConfigError(
            f"run {found.name} is not under way (it is {found.status['state']}): smlt resume {run} --workers {workers}"
        )
    found.request_scale(workers)


@app.command(epilog=examples("smlt stop 20260102-153000-digits", "smlt stop 20260102-153000-digits --now"))
def stop(
    run: Annotated[str, typer.Argument(help="A run's name or folder.")],
    now: Annotated[bool, typer.Option("--now", help="Do not wait for a checkpoint.")] = False,
    store: StoreReference = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    profile: Profile = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """End a run from another terminal: its workers stop behind the same step, at a checkpoint, and nothing is left.

    When its scheduler is gone, workers that are still there are stopped through the store.
    """
    found = Run.open(runs_dir, run)
    go_where(found)
    typer.echo(stop_run(found, lambda: _reached(found, store), now=now))


def _reached(run: Run, store: str | None) -> str | None:
    """A run's store as this machine reaches it; None: it was the embedded one, which goes with its last worker."""
    request = _request_of(run)
    reference = store or request.store
    if reference is not None and request.store_tunnel is not None:
        reference = through(reference, request.store_tunnel)
    return resolved(reference)


def _check_surroundings(request: RunRequest, store: str | None) -> None:
    """Raise what is wrong with the data, the object store or the store."""
    if request.data is not None and not Path(request.data).is_dir():
        raise TaskError(f"--data {request.data}: no such folder")
    if request.object_store is not None:
        open_object_store(request.object_store).list(".check/")  # whether it answers
    if store is not None:
        with contextlib.closing(ParameterStore(store, job="check")) as parameters:
            parameters.check()


def _resumed(run: Run, chosen: dict[str, Any]) -> RunRequest:
    """What the run was asked for, with what is asked for now in its place."""
    state = run.status
    if state.get("state") == "running":
        raise ConfigError(f"run {run.name} is still running (process {state['pid']})")
    before = _request_of(run)
    request = with_schedule(replace(before, **chosen), chosen.get("global_batch_size"))
    for key in ("seed", "global_batch_size", "batch_schedule", "lr_rule", "hyperparameters"):
        if getattr(request, key) != getattr(before, key):
            raise ConfigError(f"--resume keeps the run's {key} ({getattr(before, key)}): the loss curve hangs on it")
    check_request(request, state)
    return request


def _request_of(run: Run) -> RunRequest:
    try:
        request = RunRequest(**run.config)
        check_request(request, run.status)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"run {run.name}: {run.path / 'config.json'} is not a run's configuration: {error}") from error
    return request
