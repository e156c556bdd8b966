"""What a run writes down: a row in metrics.jsonl for each global step, each epoch and each change of the membership."""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, TextIO

from smlt.client.runs import Run
from smlt.client.watching import Progress

#: Rows that are kept for whoever looks at the last while only.
ROUND_ROWS = 100_000


class Records:
    """Puts the workers' reports together. Each step and each epoch is written once, in order, whoever reports it again."""

    def __init__(self, folder: Run, progress: Progress, world_size: int) -> None:
        self.folder, self.progress, self.world_size = folder, progress, world_size
        self.generation = 0
        self.done_step = 0
        self.epoch = 0
        self.epoch_step = 0  # the last step of the epoch before
        self.global_batch_size: int | None = None  # in force, as far as the workers have said
        self.metrics: dict[str, float] = {}
        self.ended: dict[int, str] = {}  # by rank: the state it ended in
        self._file: TextIO | None = None
        self._steps: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)  # by step, then rank: until all have reported
        self._epoch_rows: dict[int, dict[str, Any]] = {}  # by step: until that step is complete
        self._last_step_time = 0.0
        self._round: deque[dict[str, Any]] = deque(maxlen=ROUND_ROWS)
        self._warned = False  # of a loss that is not finite

    def begin_generation(self, generation: int) -> None:
        """Who has ended had ended in an older one; what still comes of that does not count."""
        self.generation = generation
        self.ended.clear()

    def take(self, row: dict[str, Any]) -> None:
        """Take a report."""
        rank, kind = int(row["rank"]), row.get("kind")
        if kind == "end":
            if int(row.get("generation", self.generation)) == self.generation:
                self.ended[rank] = str(row["state"])
        elif kind == "epoch":
            if int(row["epoch"]) >= self.epoch:
                self._epoch_rows.setdefault(int(row["step"]), row)
                self._complete_epochs()
        elif "loss" in row and int(row["step"]) > self.done_step:
            rows = self._steps[int(row["step"])]
            rows[rank] = row
            if len(rows) >= self.world_size:
                self.settle(int(row["step"]))

    @property
    def newest_step(self) -> int:
        """The newest step that any worker has reported."""
        return max(self.done_step, *self._steps, 0)

    def take_recent(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take rows that come with an acknowledgement: their reports may have been lost."""
        for row in rows:
            if row.get("kind") != "end":
                self.take(row)

    def settle(self, step: int) -> None:
        """All steps up to `step` are committed: write down what is known of them, whoever has not reported it."""
        for pending in sorted(number for number in self._steps if number <= step):
            self._complete_step(pending)
            self._complete_epochs()  # behind its last step, not behind all of them
        self._complete_epochs()

    def take_round(self) -> list[dict[str, Any]]:
        """The rows that were written since this was called last, the newest ROUND_ROWS of them."""
        rows = list(self._round)
        self._round.clear()
        return rows

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def go_back(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Training begins again behind `step`: what came later is not the run's any more."""
        self._steps.clear()
        self._epoch_rows.clear()
        self.close()
        self.folder.truncate_metrics(step)
        self.epoch_step = max((row["step"] for row in self.folder.metrics() if row.get("kind") == "epoch"), default=0)
        self.done_step, self.epoch, self.metrics = step, epoch, metrics

    def catch_up(self, step: int, epoch: int, metrics: dict[str, float], recent: Iterable[dict[str, Any]]) -> None:
        """Go back to a checkpoint, or on to it: workers whose scheduler was gone may have come further than it wrote down."""
        written = [row for row in self.folder.metrics() if row.get("kind") in ("step", "epoch") and row["step"] <= step]
        last_step = max((row["step"] for row in written if row["kind"] == "step"), default=0)
        last_epoch = max((row["epoch"] + 1 for row in written if row["kind"] == "epoch"), default=0)
        self.go_back(last_step, last_epoch, metrics)
        self.take_recent(row for row in recent if row["step"] <= step)
        self.settle(step)
        self.done_step, self.epoch, self.metrics = step, epoch, metrics

    def change(self, row: dict[str, Any]) -> None:
        """Write down a change of the membership."""
        self._record({"kind": "membership", **row})
        self.progress.membership(row)

    def _complete_step(self, step: int) -> None:
        rows = [row for _, row in sorted(self._steps.pop(step).items())]
        now = max(row["time"] for row in rows)
        seconds = now - self._last_step_time if self._last_step_time else rows[0]["compute_s"] + rows[0]["communication_s"]
        self._last_step_time, self.done_step = now, step
        record = {
            "kind": "step",
            "step": step,
            "epoch": rows[0]["epoch"],
            "loss": rows[0]["loss"],
            "samples": rows[0]["samples"],
            **_batch(rows[0]),
            **({"epoch_steps": rows[0]["epoch_steps"]} if "epoch_steps" in rows[0] else {}),
            "samples_per_s": rows[0]["samples"] / seconds if seconds > 0 else 0.0,
            "ranks": [row["rank"] for row in rows],
            "compute_s": [row["compute_s"] for row in rows],
            "communication_s": [row["communication_s"] for row in rows],
            "communication_total_s": [row["communication_total_s"] for row in rows],
            "data_s": [row["data_s"] for row in rows],
            "rss_mb": [row["rss_mb"] for row in rows],
            "time": now,
        }
        self.global_batch_size = rows[0].get("global_batch_size")
        self._record(record)
        self.progress.step(record)
        if not math.isfinite(record["loss"]) and not self._warned:
            self._warned = True
            self.progress.warning(f"the loss is {record['loss']} since step {step}: a smaller learning rate may help")

    def _complete_epochs(self) -> None:
        for step in sorted(number for number in self._epoch_rows if number <= self.done_step):
            row = self._epoch_rows.pop(step)
            if int(row["epoch"]) < self.epoch:
                continue
            self.epoch, self.epoch_step, self.metrics = int(row["epoch"]) + 1, int(row["step"]), row["metrics"]
            held = _batch(row)
            record = {"kind": "epoch", "epoch": row["epoch"], "step": row["step"], "metrics": row["metrics"], **held}
            self._record(record)
            self.folder.write_status(epoch=self.epoch, step=row["step"], metrics=self.metrics, **held)
            self.progress.epoch(record)

    def _record(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._file = (self.folder.path / "metrics.jsonl").open("a", buffering=1)
        self._file.write(json_line(row) + "\n")
        self._round.append(row)


def _batch(row: dict[str, Any]) -> dict[str, Any]:
    """The global batch in force, which an epoch's last step may not fill, and the factor of the learning rate."""
    return {name: row[name] for name in ("global_batch_size", "lr_factor") if name in row}


def json_line(value: Any) -> str:
    """JSON on one line. NaN and Inf, which JSON does not know, are null."""

    def known(item: Any) -> Any:
        if isinstance(item, dict):
            return {name: known(part) for name, part in item.items()}
        if isinstance(item, (list, tuple)):
            return [known(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(known(value))
