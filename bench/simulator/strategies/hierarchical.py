"""SMLT's hierarchical all-reduce, as csrc does it: owners, chunks, arrival tokens, windows, full duplex.

With many workers there are too many chunks to follow each (a million of each kind for n = 1,000): then b neighbouring
owners form a *block*, and what one worker sends to a block in one round is one message of b chunks. Commands, tokens and
bytes are counted for what they are; only the moments at which they happen are as coarse as b chunks. An owner still
fetches, adds and publishes its own chunk by itself.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.simulator.cluster import Cluster, StoreNode, Worker
from bench.simulator.strategies import Done, Gradient
from smlt.collective.plan import CHUNK_BYTES, CHUNK_BYTES_TUNED_MIN
from smlt.collective.tuning import Tuning, choose, chunk_bytes, window_bytes

#: Bytes around a chunk on its way up (SET, its key and header; XADD with the token), around one on its way down, of a token
#: that is read, and of a command with nothing in it.
CHUNK_UP_BYTES, CHUNK_DOWN_BYTES, TOKEN_BYTES, SMALL_BYTES = 270, 50, 110, 150
KEY_BYTES = 60
FETCH_TOGETHER_BYTES = 64 * 1024  # csrc/collective.h
UPLOAD_QUEUE_BYTES = 64 * 1024
#: So many messages of each kind are followed; more workers make coarser ones.
MESSAGES_MAX = 60_000


def block_size(n: int, shards: int, rounds: int, nodes: int = 1, messages_max: int = MESSAGES_MAX) -> int:
    """How many owners form a block, so that no more than about `messages_max` messages go up: 1 when that is so anyway.

    No more than leave four blocks for each node of the store.
    """
    return max(1, min(-(-n * shards * rounds // messages_max), shards // (4 * nodes)))


class _Unit:
    """The chunks of one block of owners in one round."""

    __slots__ = ("arrived", "needed", "number", "owners", "published", "store")

    def __init__(self, number: int, owners: range, store: StoreNode, n: int) -> None:
        self.number, self.owners, self.store = number, owners, store
        self.arrived = self.published = 0
        self.needed = n if len(owners) > 1 else n - 1  # an owner alone in its block sends nothing to it


class _Member:
    """What a worker is doing in the collective."""

    __slots__ = (
        "aggregates",
        "contributions",
        "fetched",
        "fetching",
        "left",
        "missing",
        "read",
        "reading",
        "sending",
        "unconfirmed",
        "unread",
        "uploads",
        "worker",
    )

    def __init__(self, worker: Worker, uploads: list[tuple[_Unit, int]], left: int, nodes: int) -> None:
        self.worker, self.uploads, self.left = worker, uploads, left  # left: uploads unconfirmed, chunks missing
        self.unconfirmed = self.unread = self.fetching = self.fetched = 0.0  # bytes
        self.contributions: list[_Unit] = []  # to fetch
        self.aggregates: list[_Unit] = []
        self.sending = False
        self.missing = [0] * nodes  # tokens that are to come from this node: nobody waits for more
        self.reading: list[bool] = [False] * nodes  # blocked in XREAD at this node
        self.read: list[list[tuple[str, _Unit]]] = [[] for _ in range(nodes)]  # tokens there and not read yet


class Hierarchical:
    """One all-reduce with `tuning`, or with a `shards` and `chunk` of one's own."""

    def __init__(
        self,
        cluster: Cluster,
        gradient: Gradient,
        tuning: Tuning,
        done: Done,
        *,
        shards: int = 0,
        chunk_limit: int = 0,
        messages_max: int = MESSAGES_MAX,
    ) -> None:
        self.cluster, self.done, self.costs = cluster, done, cluster.costs
        n, size = cluster.n, gradient.wire_bytes
        shards = shards or choose(tuning, "hierarchical", n, size, -1, len(cluster.stores))[1]
        limit = chunk_limit or chunk_bytes(tuning, CHUNK_BYTES_TUNED_MIN, CHUNK_BYTES)
        rounds = max(1, -(-size // (shards * limit)))
        self.chunk = size / (shards * rounds)
        self.floats = gradient.floats / (shards * rounds)
        nodes = len(cluster.stores)
        self.block = block = block_size(n, shards, rounds, nodes, messages_max)
        blocks = -(-shards // block)
        # What is under way is bounded in bytes. With messages of whole blocks it must still be as many messages as there are
        # nodes, if chunks would be: else all workers would press on one node after the other.
        window = window_bytes(tuning)
        self.coarse = (block - 1) * self.chunk * max(1, min(nodes, int(window / self.chunk)))
        self.window = window + self.coarse
        self.units = [
            [
                _Unit(c * blocks + b, range(b * block, min(shards, (b + 1) * block)), cluster.stores[(b + c) % nodes], n)
                for b in range(blocks)
            ]
            for c in range(rounds)
        ]
        self.members = [self._member(worker) for worker in cluster.workers]

    def _member(self, worker: Worker) -> _Member:
        uploads, left, blocks = [], 0, len(self.units[0])
        first = worker.rank // self.block
        for units in self.units:
            for k in range(blocks):
                unit = units[(first + (k if self.block > 1 else k + 1)) % blocks]
                count = len(unit.owners) - (worker.rank in unit.owners)
                if count:
                    uploads.append((unit, count))
                    left += 2  # to be confirmed; its aggregates to be fetched
                left += worker.rank in unit.owners  # to be published and confirmed
        uploads.reverse()
        member = _Member(worker, uploads, left, len(self.cluster.stores))
        for units in self.units:
            for unit in units:
                is_owner = worker.rank in unit.owners
                member.missing[unit.store.number] += is_owner + (not is_owner or len(unit.owners) > 1)
        return member

    def begin(self, rank: int) -> None:
        member = self.members[rank]
        for store in self.cluster.stores:
            if member.missing[store.number]:
                self._wait(member, store)
        self._forget(member)
        self._send(member)

    def _forget(self, member: _Member) -> None:
        """Its aggregates of the collective before go, one UNLINK for those of a node."""
        keys: Counter[int] = Counter()
        for units in self.units:
            keys.update(unit.store.number for unit in units if member.worker.rank in unit.owners)
        for number, count in keys.items():
            store = self.cluster.stores[number]
            self.cluster.up(member.worker, store, "up", 30 + count * KEY_BYTES, 1, _deleted, calls=(("unlink", 1),))

    # ---- up ----

    def _upload_limit(self, member: _Member) -> float:
        least = (self.window - self.coarse) / 4 + self.coarse
        return least + min(member.fetched, self.window - least)

    def _send(self, member: _Member) -> None:
        """The next upload, when the windows allow one."""
        if member.sending or not member.uploads or member.unconfirmed >= self._upload_limit(member):
            return
        if member.unread >= self.cluster.place.socket_bytes + UPLOAD_QUEUE_BYTES:
            return
        unit, count = member.uploads.pop()
        size = count * (self.chunk + CHUNK_UP_BYTES)
        member.sending = True
        member.unconfirmed += size
        member.unread += size
        work_s = count * self.floats * self.costs.encode_s_per_float
        member.worker.thread.do("up", work_s, self._encoded, member, unit, count, size)

    def _encoded(self, member: _Member, unit: _Unit, count: int, size: float) -> None:
        # A token that is not read together with others wakes its owner: with blocks of one that is simulated, else counted.
        extra = count * (2.0 if self.block > 1 else 0.0)
        calls = (("set", count), ("xadd", count))
        self.cluster.up(member.worker, unit.store, "up", size, 2 * count + extra, self._stored, member, unit, size, calls=calls)
        member.sending = False
        self._send(member)

    def _stored(self, member: _Member, unit: _Unit, size: float) -> None:
        member.unread -= size
        self._answer(member, unit.store, size)
        unit.arrived += 1
        if unit.arrived == unit.needed:
            for owner in unit.owners:
                self._token(self.members[owner], unit.store, "contributions", unit)
        elif self.block == 1:
            self._token(self.members[unit.owners[0]], unit.store, "some", unit)
        self._send(member)

    def _answer(self, member: _Member, store: StoreNode, size: float) -> None:
        """+OK and the token's name go back."""
        self.cluster.down(store, member.worker, "up", SMALL_BYTES, 0.0, self._confirmed, member, size)

    def _confirmed(self, member: _Member, size: float) -> None:
        member.unconfirmed -= size
        self._less_left(member)
        self._send(member)

    # ---- tokens ----

    def _token(self, member: _Member, store: StoreNode, kind: str, unit: _Unit) -> None:
        """A token is in a stream of `store` that this worker reads."""
        member.read[store.number].append((kind, unit))
        if member.reading[store.number]:
            self._give_tokens(member, store)

    def _wait(self, member: _Member, store: StoreNode) -> None:
        self.cluster.up(member.worker, store, "tokens", SMALL_BYTES, 1, self._read, member, store, calls=(("xread", 1),))

    def _read(self, member: _Member, store: StoreNode) -> None:
        if member.read[store.number]:
            self._give_tokens(member, store)
        else:
            member.reading[store.number] = True

    def _give_tokens(self, member: _Member, store: StoreNode) -> None:
        tokens, member.read[store.number] = member.read[store.number], []
        member.reading[store.number] = False
        size = 60.0 + sum(TOKEN_BYTES * (len(unit.owners) if kind == "aggregates" else 1) for kind, unit in tokens)
        serve_s = self.costs.store_serve_s * (self.block if self.block > 1 else 1)
        self.cluster.down(store, member.worker, "tokens", size, 0.0, self._heard, member, store, tokens, store_s=serve_s)

    def _heard(self, member: _Member, store: StoreNode, tokens: list[tuple[str, _Unit]]) -> None:
        for kind, unit in tokens:
            if kind == "contributions":
                member.contributions.append(unit)
            elif kind == "aggregates":
                member.aggregates.append(unit)
            member.missing[store.number] -= kind in ("contributions", "aggregates")
        if member.missing[store.number]:
            self._wait(member, store)
        self._fetch(member)

    # ---- down ----

    def _fetch(self, member: _Member) -> None:
        """MGETs as the window allows; contributions first, others wait for what comes of them."""
        n = self.cluster.n
        while member.fetching < self.window and (member.contributions or member.aggregates):
            if member.contributions:
                units, count = [member.contributions.pop(0)], 1
                size, keys, commands = (n - 1) * (self.chunk + CHUNK_DOWN_BYTES), n - 1, 1.0
                work_s = (n - 1) * self.floats * self.costs.add_s_per_float
                then = self._contributions_there
            else:
                units, count = self._take_aggregates(member)
                size, keys = count * (self.chunk + CHUNK_DOWN_BYTES), count
                commands = max(1.0, min(float(count), size / FETCH_TOGETHER_BYTES)) if self.block > 1 else 1.0
                work_s = count * self.floats * self.costs.decode_s_per_float
                then = self._aggregates_there
            member.fetching += size
            asked, store = 30 + keys * KEY_BYTES, units[0].store
            what = (member, store, units, size, work_s, then)
            self.cluster.up(member.worker, store, "down", asked, commands, self._got, *what, calls=(("mget", commands),))

    def _take_aggregates(self, member: _Member) -> tuple[list[_Unit], int]:
        """Those of one node that share an MGET, and how many chunks they are."""
        units, count = [member.aggregates.pop(0)], 0
        while True:
            count += len(units[-1].owners) - (member.worker.rank in units[-1].owners)
            more = member.aggregates and member.aggregates[0].store is units[0].store
            if not more or count * self.chunk >= FETCH_TOGETHER_BYTES:
                return units, count
            units.append(member.aggregates.pop(0))

    def _got(self, member: _Member, store: StoreNode, units: list[_Unit], size: float, work_s: float, then: Any) -> None:
        self.cluster.down(store, member.worker, "down", size, work_s, self._fetched, member, units, size, then)

    def _fetched(self, member: _Member, units: list[_Unit], size: float, then: Any) -> None:
        member.fetching -= size
        member.fetched += size
        for unit in units:
            then(member, unit)
        self._fetch(member)
        self._send(member)

    def _contributions_there(self, member: _Member, unit: _Unit) -> None:
        work_s = self.floats * self.costs.publish_s_per_float
        member.worker.thread.do("down", work_s, self._publish, member, unit)

    def _publish(self, member: _Member, unit: _Unit) -> None:
        size = self.chunk + CHUNK_UP_BYTES
        member.unconfirmed += size
        calls = (("set", 1), ("xadd", 1))
        self.cluster.up(member.worker, unit.store, "up", size, 2, self._published, member, unit, size, calls=calls)

    def _published(self, member: _Member, unit: _Unit, size: float) -> None:
        self.cluster.down(unit.store, member.worker, "up", SMALL_BYTES, 0.0, self._clean_up, member, unit, size)
        unit.published += 1
        if unit.published == len(unit.owners):
            for other in self.members:
                if not (len(unit.owners) == 1 and other is member):
                    self._token(other, unit.store, "aggregates", unit)
                else:
                    self._token(other, unit.store, "own", unit)

    def _clean_up(self, member: _Member, unit: _Unit, size: float) -> None:
        """The aggregate is stored: its contributions go."""
        keys = 30 + (self.cluster.n - 1) * KEY_BYTES
        self.cluster.up(member.worker, unit.store, "up", keys, 1, _deleted, calls=(("unlink", 1),))
        self._confirmed(member, size)

    def _aggregates_there(self, member: _Member, unit: _Unit) -> None:
        self._less_left(member)

    def _less_left(self, member: _Member) -> None:
        member.left -= 1
        if member.left == 0:
            self.done(member.worker.rank)


def _deleted() -> None:
    """Nobody waits for it."""
