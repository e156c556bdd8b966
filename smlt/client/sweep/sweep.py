"""Runs a sweep: gives jobs to trial processes as the controller says, hears how they fare, writes it down."""

from __future__ import annotations

import os
import queue
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from smlt.client.artifacts import ArtifactManager
from smlt.client.executors import account_of
from smlt.client.spent import spent_so_far
from smlt.client.sweep.controller import Controller, Job, Limits
from smlt.client.sweep.display import Display
from smlt.client.sweep.folder import SweepFolder
from smlt.client.sweep.halving import LEFT_OUT, Halving, Trial
from smlt.client.sweep.processes import Events, TrialProcess, arguments_of, metric_of
from smlt.client.sweep.request import SweepRequest
from smlt.errors import CheckpointError, ConfigError, SmltError, TaskError
from smlt.store.embedded import EmbeddedStore
from smlt.store.object import open_object_store

#: A look at limits, money and the store at least this often.
TICK_S = 0.1
#: Money is asked for no more often than that: it is counted from the events of every trial.
MONEY_EVERY_S = 1.0
#: A trial that stops finishes its step and writes a checkpoint; then its process is killed.
STOP_S = 60.0
#: What a process ends with that a signal has stopped in order.
STOPPED = (130, 143, 129)


class Sweep:
    """One sweep, from its beginning or from where its folder says it stands. `run()` returns the final state of sweep.json.

    `store`: a reference to the parameter store that all trials share, as `smlt train --store` takes it; "embedded": this
    process starts one for all of them; None: what the trials find by themselves.
    """

    def __init__(self, folder: SweepFolder, request: SweepRequest, display: Display, *, store: str | None) -> None:
        self.folder, self.request, self.display, self.store = folder, request, display, store
        self._processes: dict[int, TrialProcess] = {}
        self._events: Events = queue.SimpleQueue()
        self._spent: dict[int, Callable[[], float]] = {}
        self._embedded: EmbeddedStore | None = None
        self._asked_for_money = 0.0
        self._stopping = ""  # why: "interrupted", "deadline", "budget", "failed"
        self._environment: Mapping[str, str] = dict(os.environ)
        self._shared: list[str] = []  # options of every trial: where code and data are

    def run(self) -> dict[str, Any]:
        """Train until nothing is left to try, or no limit leaves room for it.

        On Ctrl-C all trials stop at checkpoints, and KeyboardInterrupt is raised; a second one ends them at once. Raises
        ConfigError for what would fail in every trial, TaskError when all have failed.
        """
        with self.folder.hold(), ExitStack() as stack:
            self._begin(stack)
            state = "failed"
            try:
                self._loop()
                state = "done"
            except (KeyboardInterrupt, BrokenPipeError):
                state = "stopped"
                raise
            finally:
                self._stop_all()
                self._write(state=state, ended=time.time())
                if state != "failed":
                    self.display.ended(self.folder, self.request, self.controller.halving, state)
            if not any(trial.values for trial in self.halving.trials.values()):
                self._raise_for_nothing()
            return self.folder.state

    def _begin(self, stack: ExitStack) -> None:
        request, now = self.request, time.time()
        before = self.folder.state
        self._began_at = float(before.get("began") or now)
        if request.deadline_s is not None and before.get("deadline_at") is None:
            before["deadline_at"] = now + request.deadline_s
        deadline_at = before.get("deadline_at")
        self._offset_s = now - self._began_at - time.monotonic()
        limits = Limits(
            request.slots,
            **({} if deadline_at is None else {"deadline_s": deadline_at - self._began_at}),
            **({} if request.budget_usd is None else {"budget_usd": request.budget_usd}),
        )
        trials = self.folder.trials()
        self.halving = Halving(trials, request.rungs, request.halving, maximize=request.maximize)
        self.halving.resume()
        self.controller = Controller(self.halving, limits)
        self._share_data()
        if self.store == "embedded":
            self._embedded = stack.enter_context(EmbeddedStore(log_path=self.folder.path / "logs" / "store.log"))
            self._environment = {**self._environment, "SMLT_STORE": self._embedded.url}
        elif self.store is not None:
            self._environment = {**self._environment, "SMLT_STORE": self.store}
        self._write(
            state="running",
            pid=os.getpid(),
            host=socket.gethostname(),
            began=self._began_at,
            deadline_at=deadline_at,
            ended=None,
        )
        self.display.started(self.folder, request, self.halving)

    def _share_data(self) -> None:
        """The data go to the object store once, below the sweep's name; what lies there already is not sent again."""
        url = self.request.object_store
        self._shared = [] if url is None else ["--object-store", url]
        if self.request.data is None:
            return
        objects = open_object_store(str(self.folder.path) if url is None else url)
        leave_out = (self.folder.path.parent, Path(objects.url))
        ArtifactManager(objects, self.folder.name).upload_data(Path(self.request.data), leave_out)
        self._shared += ["--shared-data", self.folder.name]

    # ---- the loop ----

    def _loop(self) -> None:
        while True:
            if not self._stopping and (why := self.controller.exhausted(self._now_s())):
                self._stopping = why
                self.display.warning(f"the {why} is used up: trials under way stop at checkpoints")
                self._ask_to_stop()
            if not self._stopping or not self._processes:
                while job := self.controller.next_job(self._now_s()):
                    self._start(job)
                    self._write()
            if self.halving.complete:
                self._write()
                return
            self._take_events()
            self._mend_store()
            self._count_money()

    def _now_s(self) -> float:
        """Since the sweep began, on the clock: also while it was stopped."""
        return time.monotonic() + self._offset_s

    def _start(self, job: Job) -> None:
        trial, request = self.halving.trials[job.number], self.request
        run = self.folder.run(job.number)
        options = [*request.options, *self._shared]
        if "seed" not in trial.hyperparameters:
            options += ["--seed", str(request.seed)]
        self._processes[job.number] = TrialProcess(
            job.number,
            arguments_of(run, self.folder.script, trial.hyperparameters, request.workers, job.epochs, options),
            self._environment,
            self.folder.path / "logs" / f"{run.name}.log",
            [self._embedded.life_line] if self._embedded is not None else [],
            self._events,
        )
        self._spent.setdefault(job.number, spent_so_far(run))
        self.display.begun(trial, job.epochs)

    def _take_events(self) -> None:
        """What the trials have said; waits a little for the first of it."""
        timeout: float | None = TICK_S
        while True:
            try:
                number, event = self._events.get(timeout=timeout) if timeout else self._events.get_nowait()
            except queue.Empty:
                return
            timeout = None
            if event is None:
                self._over(number)
            else:
                if event.get("event") in ("step", "epoch"):
                    self._processes[number].trains()
                self.display.event(self.halving.trials[number], event)

    def _over(self, number: int) -> None:
        """A trial's process has ended: its rung is finished, or it has failed, or it was stopped."""
        process = self._processes.pop(number)
        code, trial = process.finish(), self.halving.trials[number]
        trial.usd = self._usd(number)
        self.controller.ended(number, self._now_s(), process.start_s())
        if code == 0:
            self._finished(trial)
        elif self._stopping and (code in STOPPED or code < 0):  # below 0: before it knew how to stop in order, or killed
            self.halving.put_back(number)
        else:
            self._failed(trial, code, process.last_words())
        self._write()
        if not self._stopping or code == 0 or trial.error:
            self.display.trial(trial, self.halving)

    def _finished(self, trial: Trial) -> None:
        run = self.folder.run(trial.number)
        try:
            value, status = metric_of(run, self.request.metric), run.status
        except ConfigError:
            self.halving.put_back(trial.number)  # with another --metric it may go on
            raise
        self.halving.finish(trial.number, value, over=int(status["epoch"]) < self.request.rungs[trial.rung])

    def _failed(self, trial: Trial, code: int, said: str) -> None:
        if code in STOPPED:
            error = "stopped from outside (smlt stop)"
        else:
            try:
                error = str(self.folder.run(trial.number).status.get("error") or said or account_of(code))
            except CheckpointError:
                error = said or account_of(code)
        error = error.splitlines()[0]
        self.halving.fail(trial.number, error)
        if code == ConfigError.exit_code:
            raise ConfigError(f"trial {trial.number}: {error.removeprefix('ConfigError: ')}")

    # ---- limits, store, end ----

    def _usd(self, number: int) -> float:
        """What the trial has cost; never less than was counted before."""
        return max(self._spent[number](), self.halving.trials[number].usd)

    def _count_money(self) -> None:
        if self.request.budget_usd is None or time.monotonic() - self._asked_for_money < MONEY_EVERY_S:
            return
        self._asked_for_money = time.monotonic()
        for number in self._processes:
            self.halving.trials[number].usd = self._usd(number)

    def _mend_store(self) -> None:
        """The embedded store has died: trials wait for it, and do again what it had of their steps."""
        if self._embedded is not None and not self._embedded.alive:
            self.display.warning("the embedded store has died and is started again")
            self._embedded.restart()

    def _ask_to_stop(self) -> None:
        for process in self._processes.values():
            process.stop()

    def _stop_all(self) -> None:
        """No trial is left: they stop at checkpoints, on another Ctrl-C at once, and are killed after STOP_S."""
        if not self._processes:
            return
        if not self._stopping:
            self._stopping = "interrupted"
            self.display.warning("all trials stop at checkpoints; Ctrl-C again ends them at once")
            self._ask_to_stop()
        deadline = time.monotonic() + STOP_S
        while self._processes:
            try:
                if time.monotonic() > deadline:
                    for process in self._processes.values():
                        process.process.kill()
                self._take_events()
                self._mend_store()
            except KeyboardInterrupt:
                self._ask_to_stop()
            except SmltError as error:  # what ends the sweep is under way already
                self.display.warning(str(error))

    def _raise_for_nothing(self) -> None:
        """No trial has finished a rung: there is nothing to tell but why."""
        errors = [trial.error for trial in self.halving.trials.values() if trial.error]
        if errors:
            raise TaskError(f"all trials have failed, the first with: {errors[0]}")
        raise ConfigError("no trial has finished its first rung: the deadline or the budget leaves no room for one")

    def _write(self, **state: Any) -> None:
        best = self.halving.best()
        self.folder.write_trials(self.halving.trials.values())
        self.folder.write(
            self.request,
            best=None if best is None else {"trial": best.number, "run": self.folder.run_name(best.number), **best.as_json()},
            left_out=sum(trial.state == LEFT_OUT for trial in self.halving.trials.values()),
            spent_usd=self.controller.spent_usd,
            **state,
        )


def resumed(folder: SweepFolder, limits: Mapping[str, Any]) -> SweepRequest:
    """What the sweep was asked for, with those limits in place of its own that are not None. A deadline begins anew."""
    request = replace(folder.request, **{name: value for name, value in limits.items() if value is not None})
    if limits.get("deadline_s") is not None:
        folder.write(request, deadline_at=None)
    return request
