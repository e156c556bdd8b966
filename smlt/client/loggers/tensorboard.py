"""`--log tensorboard[=DIR]`: event files, by the tensorboard package's own writer of records. No TensorFlow, no torch.

Written record by record, here and now, and not by the package's EventFileWriter: that one writes in a thread of its own, whose
errors (a full disk) nobody hears of.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, BinaryIO

from smlt.client.loggers.curves import CurveLogger
from smlt.client.runs import Run
from smlt.errors import ConfigError
from smlt.store.parameter import ServerInfo


class TensorBoardLogger(CurveLogger):
    """Writes a run's scalars to DIR/<run>; without `folder` to tensorboard/ in the run's folder."""

    def __init__(self, folder: str | None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ConfigError(f"--log tensorboard needs {error.name}: pip install 'smlt[tensorboard]'") from error
        self._proto, self._summary, self._writer_of = event_pb2, summary_pb2, RecordWriter
        self.folder = None if folder is None else Path(folder).absolute()
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._step = 0

    def started(self, run: Run, config: dict[str, Any], server: ServerInfo) -> None:
        """Begin a file. A run that is resumed has another one; the steps that it does again take the place of the old ones."""
        path = self.folder / run.name if self.folder is not None else run.path / "tensorboard"
        path.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (path / name).open("xb")
        self._writer = self._writer_of(self._file)
        now = time.time()
        self._write(self._proto.Event(wall_time=now, file_version="brain.Event:2"))

    def step(self, row: dict[str, Any]) -> None:
        """See Progress."""
        if not self._step and row["step"] > 1:  # of a run that goes on: what an earlier file has from here on is void
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(self._proto.Event(wall_time=row["time"], step=row["step"], session_log=start))
        self._step = row["step"]
        super().step(row)

    def ended(self, run: Run, status: dict[str, Any]) -> None:
        """See Progress."""
        if status.get("cost_usd") is not None:
            self._add(self._step, time.time(), {"cost_usd": float(status["cost_usd"])})
        if self._file is not None:
            self._file.close()

    def flush(self) -> None:
        """What was written is there for others to read. OSError when it is not."""
        if self._file is not None and not self._file.closed:
            self._file.flush()

    def _add(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        summary = self._summary.Summary(
            value=[self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._write(self._proto.Event(wall_time=wall_time, step=step, summary=summary))

    def _write(self, event: Any) -> None:
        if self._writer is not None:
            self._writer.write(event.SerializeToString())
