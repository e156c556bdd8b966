"""The run under attack: its processes, how far it is, what it has left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from smlt.client.request import RunRequest
from smlt.errors import SmltError

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from proxy import Proxy  # noqa: E402  (the tests' own proxy, which is no package)

from smlt.store.embedded import EmbeddedStore  # noqa: E402

#: A run that has not gone on so long after a fault is lost.
SURVIVAL_S = 120.0


class LostRun(Exception):
    """A fault that the run did not survive."""


class Run:
    """A paced digits run in `folder`, whose workers and scheduler reach the store through a proxy."""

    def __init__(self, folder: Path, request: dict[str, Any], *, pace_s: float, seed: int) -> None:
        self.folder, self.name, self.chance = folder, "chaos", random.Random(seed)
        for part in ("workers", "immortal"):
            (folder / part).mkdir(parents=True)
        self.request = RunRequest(str(HERE / "task.py"), **request)
        self.store = EmbeddedStore(log_path=folder / "store.log")
        self.proxy = Proxy(self.store, seed=seed)
        self.pace = folder / "pace"
        self.set_pace(pace_s)
        self.process: subprocess.Popen[bytes] | None = None
        self.started: list[psutil.Process] = []  # everything that ever ran for it

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    def set_pace(self, seconds: float) -> None:
        self.pace.write_text(str(seconds))

    def start(self, *, resume: bool = False) -> None:
        """Start a scheduler; with `resume`, it takes the run up where the one before left it."""
        settings = self.folder / "settings.json"
        settings.write_text(
            json.dumps(
                {
                    "request": self.request.__dict__,
                    "runs_dir": str(self.folder / "runs"),
                    "name": self.name,
                    "folder": str(self.folder),
                    "resume": resume,
                }
            )
        )
        environment = {
            **os.environ,
            "SMLT_STORE": self.proxy.url,
            "CHAOS_PACE": str(self.pace),
            "CHAOS_EXAMPLES": str(REPOSITORY / "examples"),
        }
        with (self.folder / "scheduler.out").open("ab") as out, (self.folder / "scheduler.err").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.chaos.scheduler", str(settings)],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )
        self.started.append(psutil.Process(self.process.pid))

    # ---- how it stands ----

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl as it stands; a last line that is half written is left out."""
        rows = []
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def step(self) -> int:
        """The last step that is written down."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
                lines = file.read().split(b"\n")
        except OSError:
            return 0
        for line in reversed(lines):
            if line.startswith(b'{"kind": "step"') and line.endswith(b"}"):
                return int(json.loads(line)["step"])
        return 0

    def workers(self) -> list[psutil.Process]:
        """Workers that run, not those left for dead."""
        found = []
        for file in (self.folder / "workers").iterdir():
            if file.suffix or (self.folder / "immortal" / file.name).exists():
                continue
            try:
                process = psutil.Process(int(file.name))
                if process.status() == psutil.STATUS_ZOMBIE or "smlt.worker.main" not in process.cmdline():
                    continue
            except psutil.Error:
                continue
            found.append(process)
            if process not in self.started:
                self.started.append(process)
        return found

    def ended(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def wait_for_progress(self, beyond: int, what: str) -> float:
        """Until a step after `beyond` is complete; returns the seconds that took. LostRun when none comes."""
        began = time.monotonic()
        while self.step() <= beyond:
            code = self.ended()
            if code == 0:
                break
            if code is not None:
                raise LostRun(f"{what}: the scheduler ended with exit code {code}:\n{self.errors()}")
            if time.monotonic() - began > SURVIVAL_S:
                raise LostRun(f"{what}: no step within {SURVIVAL_S:g} s behind step {beyond}\n{self.errors()}")
            time.sleep(0.005)
        return time.monotonic() - began

    def errors(self) -> str:
        return (self.folder / "scheduler.err").read_text()[-3000:]

    # ---- what it has left behind ----

    def left_behind(self) -> dict[str, Any]:
        """Keys in the store, processes, snapshots. All must be none when it has ended."""
        deadline = time.monotonic() + 30
        while (alive := [p.pid for p in self.started if lives(p)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        import redis

        with redis.Redis.from_url(self.store.url) as client:
            keys = [key.decode() for key in client.scan_iter(match="smlt:*", count=1000)]
        snapshots = [str(path) for path in self.path.glob("snapshots/**/*") if path.is_file()]
        return {"keys": keys, "processes": alive, "snapshots": snapshots}

    def result(self) -> tuple[list[tuple[int, float]], str, dict[str, float]]:
        """Losses by step, SHA-256 of the last checkpoint's tensors, last metrics."""
        losses = [(row["step"], row["loss"]) for row in self.rows() if row["kind"] == "step"]
        newest = max((self.path / "checkpoints").iterdir())
        status = json.loads((self.path / "status.json").read_text())
        return losses, sha256((newest / "tensors.safetensors").read_bytes()).hexdigest(), status["metrics"]

    def close(self) -> None:
        """End everything."""
        for process in self.started:
            try:
                if "smlt" in " ".join(process.cmdline()) or "bench.chaos" in " ".join(process.cmdline()):
                    process.kill()
            except (psutil.Error, SmltError):
                continue
        if self.process is not None:
            self.process.wait()
        self.proxy.close()
        self.store.close()


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
