from collections.abc import Sequence
from typing import Any

MEMBERS_MAX: int
DONE: int
AGAIN: int
MISMATCH: int
FAILED: int
LEFT: int
GARBLED: int
TAKEN: int
REDUCE: int
COPY: int
JOINED: int

def process_start(pid: int) -> int: ...
def process_namespace() -> int: ...
def size_of(local_size: int, block_bytes: int, blocks: int) -> int: ...
def format_file(memory: Any, local_size: int, block_bytes: int, blocks: int, key: int) -> None: ...
def finish_mean(accumulator: Any, target: Any, dtype: int, divisor: int) -> None: ...

class Member:
    state: int
    rank: int
    pid: int
    start: int
    pid_namespace: int
    digest: int
    description: str
    failure: str

class Group:
    def __init__(self, memory: Any, local_rank: int, local_size: int, key: int) -> None: ...
    def claim(self, rank: int) -> int: ...
    def gather(self, timeout_ms: int) -> int: ...
    def begin(
        self,
        *,
        kind: int,
        divisor: int = 1,
        root: int = 0,
        takers: int,
        digest: int,
        description: bytes,
        segments: Sequence[tuple[int, int, Any, Any, int]],
    ) -> None: ...
    def run(self, timeout_ms: int) -> int: ...
    def missing(self) -> list[int]: ...
    def culprit(self) -> int: ...
    def look(self, local_rank: int) -> Member: ...
    def fail(self, text: bytes) -> None: ...
    def leave(self) -> None: ...
