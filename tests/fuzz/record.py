"""Make the fuzzers' corpus out of real traffic: two engines, a real store, every codec and algorithm.

    PYTHONPATH=tests/collective python tests/fuzz/record.py [FOLDER]

Writes below FOLDER (default: tests/fuzz/corpus) what `fuzz_engine.c`, `fuzz_resp.c` and `fuzz_wire.c` take.
"""

from __future__ import annotations

import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import redis
from by_hand import ByHand

from smlt.collective import _native
from smlt.collective.codecs import CODECS, OPERATIONS, WIRE_DTYPES
from smlt.store.embedded import EmbeddedStore

COUNT = 100
SHARDS = [(0, 0, 0, 0, 25), (0, 0, 25, 25, 25), (0, 1, 50, 50, 25), (0, 1, 75, 75, 25)]
ALGORITHMS = {"copy": _native.COPY, "hierarchical": _native.HIERARCHICAL, "one-shot": _native.ONE_SHOT}
LOST = 3
DATA_LOST, FENCED, COMPLETED = 1, 2, 3


class Recorded(ByHand):
    """An engine that notes what comes in, as `fuzz_engine.c` reads it."""

    def __init__(self, store: EmbeddedStore, rank: int) -> None:
        super().__init__(store, "fuzz", rank, 2, chunk_bytes=4096)
        self.records = b""
        self.replies: dict[int, bytes] = {}

    def receive(self, lane: int, limit: int | None = None, wait_s: float = 0.0) -> int:
        engine, outer = self.engine, self

        class Noted:
            """The engine, but for what it receives."""

            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            def input(self, lane: int) -> memoryview:
                self.room = engine.input(lane)
                return self.room

            def received(self, lane: int, count: int) -> int:
                data = bytes(self.room[:count])
                outer.records += bytes([lane]) + count.to_bytes(2, "little") + data
                outer.replies[lane] = outer.replies.get(lane, b"") + data
                return engine.received(lane, count)

        self.engine = Noted()  # type: ignore[assignment]
        try:
            return super().receive(lane, min(limit or 1000, 60_000), wait_s)
        finally:
            self.engine = engine

    def cut(self, what: int = 0) -> None:
        self._connections.open()
        self.engine.reconnected([0] if what == DATA_LOST else [])
        self.records += bytes([LOST, what, 0])

    def begin(self, algorithm: int, codec: int) -> int:
        x = np.arange(COUNT, dtype=np.float32)
        rows = [(0, 0, 0, 0, COUNT)] if algorithm == _native.ONE_SHOT else SHARDS
        return self.engine.submit(
            algorithm=algorithm,
            operation=OPERATIONS["mean"],
            digest=7,
            description=b"a fuzzed call",
            segments=[(WIRE_DTYPES["float32"], codec, x, np.empty_like(x), 4, None, None)],
            table=_native.ChunkTable(rows),
        )


def keep(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sha256(content).hexdigest()[:16]).write_bytes(content)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpus"
    for codec in CODECS.values():
        for number, algorithm in enumerate(ALGORITHMS.values()):
            for collectives, trouble in ((1, ""), (2, ""), (1, "cut"), (1, "data lost"), (1, "fenced")):
                with EmbeddedStore() as store:
                    workers = [Recorded(store, rank) for rank in range(2)]
                    steps = [[worker.begin(algorithm, codec) for _ in range(collectives)] for worker in workers]
                    deadline = time.monotonic() + 10
                    turn = 0
                    while not all(w.engine.has_ended(s) for w, mine in zip(workers, steps, strict=True) for s in mine):
                        assert time.monotonic() < deadline
                        for worker in workers:
                            worker.move()
                        if trouble == "cut" and turn == 2:
                            workers[0].cut()
                        if trouble == "data lost" and turn == 0:
                            with redis.Redis.from_url(store.url) as client:
                                client.flushall()
                            for worker in workers:
                                worker.cut(DATA_LOST)
                        if trouble == "fenced" and turn == 0:
                            workers[1].engine.fence(2)
                            workers[1].cut(FENCED)
                            workers[1].engine.complete_fenced(True)
                            workers[1].cut(COMPLETED)
                        turn += 1
                    for worker in workers:
                        assert [worker.status(step) for step in steps[worker.rank]] == [_native.OK] * collectives
                        settings = codec | number << 2 | worker.rank << 4 | (collectives - 1) << 5
                        keep(folder / "engine", bytes([settings]) + worker.records)
                        for reply in worker.replies.values() if codec == CODECS["fp16"] else ():
                            keep(folder / "resp", b"\x07" + reply[:1500])
                            for magic in (b"SMLT\x01\x00", b"\x01\x00\x01\x00"):
                                at = reply.find(magic)
                                if at >= 0:
                                    keep(folder / "wire", reply[at : at + 40])


if __name__ == "__main__":
    main()
