"""send and recv: messages from one worker to another, through keys of the parameter store.

Between two workers the messages of one tag are numbered on both sides, so a message's key is known to both; an entry in
the receiver's stream says that it is there. As in the collectives the keys are the truth and the entries hints: a command
that is repeated after a lost connection changes nothing. Keys, below the session's prefix:

    p:<src>:<dst>:<tag>:<number>[:<piece>]   a header and the elements; large ones in pieces
    p-in:<dst>                               stream of what has come: src, tag, number
    p-read:<dst>                             hash: src -> how many bytes of its messages have been read

The last worker to leave deletes them with the rest of the session.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from smlt.collective.communicator import Communicator
from smlt.errors import CollectiveError, CollectiveTimeout, ConfigError, MismatchError, SmltError, StoreError, WorkerLostError
from smlt.store.parameter import ParameterStore, translated
from smlt.torch.outbox import Outbox
from smlt.torch.tensors import Run, check_tensor, describe, dtype_name, moved

#: A wait in the store, at most; then the listener looks after deadlines and after who has left.
LISTEN_MS = 500
#: Entries of a stream that have been read are trimmed after so many.
TRIM_ENTRIES = 1000
#: The sender hears of what was read after so many bytes.
READ_BYTES = 1 << 20
FAREWELL_S = 5.0


class Message:
    """A message under way; what `smlt.torch.work.CollectiveWork` waits for."""

    def __init__(self, what: str, run: Run, timeout_s: float, source: int | None, tag: int) -> None:
        self.what, self.run, self.source_rank, self.tag = what, run, -1 if source is None else source, tag
        self.tensor = ""  # in words
        self._limit_s, self.deadline = timeout_s, time.monotonic() + timeout_s
        self._ended = threading.Event()
        self._error: SmltError | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def end(self, error: SmltError | None = None) -> None:
        """It has come, or gone; or it never will. The first word counts."""
        with self._lock:
            if self._ended.is_set():
                return
            if error is None and self.run.give is not None:
                self.run.give()
            self._error = error
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` when it has ended: now, when it has."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def expire(self) -> None:
        """End it when its deadline has passed."""
        if time.monotonic() >= self.deadline:
            self.end(CollectiveTimeout(f"{self.what}: not done within {self._limit_s:g} s"))

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has ended; raise how it failed, TimeoutError after `timeout_s`."""
        until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._ended.wait(max(0.0, min(until, self.deadline) - time.monotonic())):
            self.expire()
            if time.monotonic() >= until:
                raise TimeoutError(f"{self.what}: not done after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()


@dataclass
class _Box:
    """What has come from one worker with one tag, by number; and how many have been given away."""

    there: int = 0
    taken: int = 0
    waiting: list[Message] = field(default_factory=list)


class PointToPoint:
    """The messages of one worker of a group. Its threads start with the first message."""

    def __init__(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._outbox: Outbox | None = None
        self._listener: threading.Thread | None = None
        self._fetcher: threading.Thread | None = None
        self._fetches: queue.SimpleQueue[tuple[Message, str] | None] = queue.SimpleQueue()
        self._boxes: dict[tuple[int, int], _Box] = defaultdict(_Box)
        self._anyones: list[Message] = []
        self._absent: set[int] = set()
        self._read: dict[int, tuple[int, int]] = {}  # by sender: bytes read, bytes it knows of
        self._closed = False
        self._lock = threading.RLock()

    # ---- for the process group ----

    def send(self, tensor: torch.Tensor, to: int, tag: int) -> Message:
        """Send a tensor; ended when the store has it. Its memory must be left alone until then."""
        store, prefix = self._begin(tensor, "send", to)
        what = f"send({describe(tensor)}) with tag {tag} to rank {to} of job {self._comm.job}, rank {self._comm.rank}"
        message = Message(what, Run(moved(tensor).array), self._comm.timeout_s, None, tag)
        message.tensor = f"{dtype_name(tensor)}[{tensor.numel()}]"
        with self._lock:
            if self._outbox is None:
                self._outbox = Outbox(store, prefix, self._comm.rank)
            self._outbox.put(message, to)
        return message

    def receive(self, tensor: torch.Tensor, source: int | None, tag: int) -> Message:
        """Receive a tensor from rank `source`, or from whoever has sent one."""
        self._begin(tensor, "recv", source or 0)
        whom = "any rank" if source is None else f"rank {source}"
        what = f"recv({describe(tensor)}) with tag {tag} from {whom} of job {self._comm.job}, rank {self._comm.rank}"
        message = Message(what, moved(tensor, read=False), self._comm.timeout_s, source, tag)
        message.tensor = f"{dtype_name(tensor)}[{tensor.numel()}]"
        with self._lock:
            (self._anyones if source is None else self._boxes[source, tag].waiting).append(message)
            self._match()
            if self._listener is None:
                self._listener = threading.Thread(target=self._listen, name="smlt-recv", daemon=True)
                self._fetcher = threading.Thread(target=self._fetch_all, name="smlt-fetch", daemon=True)
                self._listener.start()
                self._fetcher.start()
        return message

    def close(self) -> None:
        """Let what is being sent go out, end what is awaited in error."""
        with self._lock:
            self._closed = True
            outbox, listener, fetcher = self._outbox, self._listener, self._fetcher
        if outbox is not None:
            outbox.close(FAREWELL_S)
        if listener is not None and fetcher is not None:
            self._fetches.put(None)
            with contextlib.suppress(StoreError):
                store, prefix = self._store()
                with translated(store.url):
                    store.client.xadd(f"{prefix}p-in:{self._comm.rank}", {"src": -1, "tag": 0, "number": 0})
            listener.join(LISTEN_MS / 1000 + 1)
            fetcher.join(FAREWELL_S)
        self._fail_all(lambda _: CollectiveError("this worker has left the group"))

    # ---- inside ----

    def _begin(self, tensor: torch.Tensor, what: str, peer: int) -> tuple[ParameterStore, str]:
        check_tensor(tensor, what)
        if not 0 <= peer < self._comm.world_size:
            raise ConfigError(f"{what}: rank {peer} is not one of the {self._comm.world_size} workers")
        if self._closed or not self._comm.usable:
            raise CollectiveError(f"{what}: this worker has left the group, or it has failed: make a new one")
        return self._store()

    def _store(self) -> tuple[ParameterStore, str]:
        store, prefix = self._comm.parameter_store, self._comm.session_prefix
        if store is None or prefix is None:
            raise ConfigError("a worker alone has nobody to exchange messages with")
        return store, prefix

    def _match(self) -> None:
        """Give what is there to those who wait for it, in the order in which they came."""
        for (source, tag), box in list(self._boxes.items()):
            while box.taken < box.there:
                if box.waiting:
                    message = box.waiting.pop(0)
                else:
                    found = [other for other in self._anyones if other.tag == tag]
                    if not found:
                        break
                    message = found[0]
                    self._anyones.remove(message)
                if message.done():  # given up
                    continue
                message.source_rank = source
                self._fetches.put((message, f"p:{source}:{self._comm.rank}:{tag}:{box.taken}"))
                box.taken += 1

    def _listen(self) -> None:
        store, prefix = self._store()
        stream, last, entries = f"{prefix}p-in:{self._comm.rank}", "0-0", 0
        while not self._closed:
            try:
                found = store.read_streams({stream: last}, LISTEN_MS)
                with self._lock:
                    for entry_id, fields in found[0][1] if found else ():
                        last, entries = entry_id.decode(), entries + 1
                        box = self._boxes[int(fields[b"src"]), int(fields[b"tag"])]
                        box.there = max(box.there, int(fields[b"number"]) + 1)
                    self._boxes.pop((-1, 0), None)  # only woke this thread
                    self._match()
                if entries > TRIM_ENTRIES:
                    entries = 0
                    with translated(store.url):
                        store.client.xtrim(stream, minid=last, approximate=True)
                if not found:
                    self._look_around(store)
            except StoreError as error:
                self._fail_all(lambda message, error=error: type(error)(f"{message.what}: {error}"))  # type: ignore[misc]
                time.sleep(0.1)

    def _awaited(self) -> list[tuple[Message, int]]:
        with self._lock:
            named = [(message, source) for (source, _), box in self._boxes.items() for message in box.waiting]
            return [*named, *((message, -1) for message in self._anyones)]

    def _look_around(self, store: ParameterStore) -> None:
        """Nothing has come for a while: end what has run out of time, and what comes from somebody who has left."""
        awaited = self._awaited()
        for message, _ in awaited:
            message.expire()
        sources = {source for _, source in awaited if source >= 0}
        session = self._comm.session_number
        if not sources or session is None:
            return
        absent = sources - set(store.roster(session))
        gone, self._absent = absent & self._absent, absent  # looked for twice, with a look into the stream between
        for message, source in awaited:
            if source in gone:
                message.end(WorkerLostError(f"{message.what}: rank {source} is not in the job, or has left it", [source]))

    def _fail_all(self, why: Callable[[Message], SmltError]) -> None:
        for message, _ in self._awaited():
            message.end(why(message))

    def _fetch_all(self) -> None:
        while (item := self._fetches.get()) is not None:
            message, key = item
            try:
                self._fetch(message, key)
                message.end()
            except SmltError as error:
                message.end(error)
            del item, message

    def _fetch(self, message: Message, name: str) -> None:
        store, prefix = self._store()
        key = prefix + name
        with translated(store.url):
            value = store.client.get(key)
        if value is None:
            raise StoreError(f"{message.what}: key {key} was announced and is gone: evicted, expired or flushed")
        line, _, rest = value.partition(b"\n")
        header = json.loads(line)
        target = message.run.array.reshape(-1).view("uint8")
        pieces = [f"{key}:{index}" for index in range(int(header["pieces"]))]
        fits = header["tensor"] == message.tensor
        at = len(rest)
        if fits:
            target[:at] = memoryview(rest)
        for piece in pieces if fits else ():
            with translated(store.url):
                content = store.client.get(piece)
            if content is None or at + len(content) > target.size:
                raise StoreError(f"{message.what}: key {piece} is gone, or not as announced")
            target[at : at + len(content)] = memoryview(content)
            at += len(content)
        self._has_read(store, prefix, message.source_rank, int(header["bytes"]), [key, *pieces])
        if not fits:
            raise MismatchError(f"{message.what}: rank {message.source_rank} has sent {header['tensor']}")

    def _has_read(self, store: ParameterStore, prefix: str, source: int, count: int, keys: list[str]) -> None:
        read, known = self._read.get(source, (0, 0))
        read += count
        with translated(store.url), store.client.pipeline(transaction=False) as pipe:
            pipe.unlink(*keys)
            if read - known >= READ_BYTES:
                known = read
                pipe.hset(f"{prefix}p-read:{self._comm.rank}", str(source), read)
                pipe.pexpire(f"{prefix}p-read:{self._comm.rank}", int(store.ttl_s * 1000))
            pipe.execute()
        self._read[source] = read, known
