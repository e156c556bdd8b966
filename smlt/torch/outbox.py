"""The sending side of messages between two workers: in order for each receiver, and none too far ahead of its reader."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from smlt.errors import CollectiveError, SmltError
from smlt.store.parameter import ParameterStore, translated

if TYPE_CHECKING:
    from smlt.torch.point_to_point import Message

#: A message of up to so many bytes travels with its header; a larger one in pieces of so many.
INLINE_BYTES, PIECE_BYTES = 64 << 10, 4 << 20
#: Bytes sent to one worker that it has not read yet; more wait here.
UNREAD_BYTES_MAX = 64 << 20
#: How long to wait before looking again whether a reader has come nearer.
PAUSE_S = 0.01


class Outbox:
    """Sends messages in a thread of its own."""

    def __init__(self, store: ParameterStore, prefix: str, rank: int) -> None:
        self._store, self._prefix, self._rank = store, prefix, rank
        self._numbers: dict[tuple[int, int], int] = {}  # by receiver and tag
        self._waiting: dict[int, deque[tuple[Message, int]]] = {}  # by receiver: the messages with their numbers
        self._sent: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="smlt-send", daemon=True)
        self._thread.start()

    def put(self, message: Message, to: int) -> None:
        """Send `message` when those before it to the same receiver have been sent."""
        with self._changed:
            number = self._numbers.get((to, message.tag), 0)
            self._numbers[to, message.tag] = number + 1
            self._waiting.setdefault(to, deque()).append((message, number))
            self._changed.notify()

    def close(self, limit_s: float) -> None:
        """Send what is waiting, for at most `limit_s` seconds; the rest ends in error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(limit_s)
        with self._changed:
            left = [message for queue in self._waiting.values() for message, _ in queue]
            self._waiting.clear()
        for message in left:
            message.end(CollectiveError(f"{message.what}: this worker has left the group"))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not any(self._waiting.values()):
                    if self._closed:
                        return
                    self._changed.wait()
                heads = [(to, *queue[0]) for to, queue in self._waiting.items() if queue]
            moved = False
            for to, message, number in heads:
                if self._is_ready(message, to):
                    self._send(message, to, number)
                    moved = True
                message.expire()
                if message.done():
                    with self._changed, contextlib.suppress(KeyError, IndexError):
                        self._waiting[to].popleft()
            if not moved:
                time.sleep(PAUSE_S)

    def _is_ready(self, message: Message, to: int) -> bool:
        """Whether the receiver has read so much that this one may go out: one message may always lie there."""
        unread = self._sent.get(to, 0) - self._read.get(to, 0)
        if unread == 0 or unread + message.run.array.nbytes <= UNREAD_BYTES_MAX:
            return True
        try:
            with translated(self._store.url):
                self._read[to] = int(self._store.client.hget(f"{self._prefix}p-read:{to}", str(self._rank)) or 0)
        except SmltError as error:
            message.end(error)
            return False
        # What the reader has not told of yet is less than READ_BYTES.
        return self._sent.get(to, 0) - self._read[to] + message.run.array.nbytes <= UNREAD_BYTES_MAX or (
            self._sent.get(to, 0) - self._read[to] < 1 << 20
        )

    def _send(self, message: Message, to: int, number: int) -> None:
        content: Any = message.run.array.reshape(-1).view("uint8").data
        key, ttl_ms = f"{self._prefix}p:{self._rank}:{to}:{message.tag}:{number}", int(self._store.ttl_s * 1000)
        cuts = range(0, len(content), PIECE_BYTES) if len(content) > INLINE_BYTES else ()
        header = json.dumps({"tensor": message.tensor, "bytes": len(content), "pieces": len(cuts)}).encode() + b"\n"
        try:
            with translated(self._store.url):
                for index, at in enumerate(cuts):
                    self._store.client.set(f"{key}:{index}", content[at : at + PIECE_BYTES], px=ttl_ms)
                with self._store.client.pipeline(transaction=False) as pipe:
                    pipe.set(key, header if cuts else header + content, px=ttl_ms)
                    stream = f"{self._prefix}p-in:{to}"
                    entry: dict[Any, Any] = {"src": self._rank, "tag": message.tag, "number": number}
                    pipe.xadd(stream, entry)
                    pipe.pexpire(stream, ttl_ms)
                    pipe.execute()
        except SmltError as error:
            message.end(error)
            return
        self._sent[to] = self._sent.get(to, 0) + len(content)
        message.end()
