"""The parameter store's control plane: the server, a job's keys, the sessions of its workers.

Everything here is small and goes through redis-py; the chunks of the collectives go through csrc. What scheduler and
workers say to each other: `smlt.store.coordination`. Keys:

    smlt:{J.0}:session:<g>       name of the session of generation g that workers may still join
    smlt:{J.0}:roster:<g>.<s>    hash: rank -> who holds it; world_size; left, how many have left again;
                                 tuning and nodes, of whoever joined first
    smlt:{J.0}:generation        the membership's version
    smlt:{J.0}:ctl               stream that wakes blocked workers: kind ("abort" | "generation"), text
    smlt:{J.j...}:<g>.<s>:...    the collectives of session s (csrc/wire.h), on node j (`smlt.store.nodes`)

A session is one meeting of the workers of a generation. When the first worker leaves, the session is closed: who joins
later (the same handler invoked again, say) opens the next one, whose keys are others. The last to leave deletes them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from smlt.errors import ConfigError, FencedError, StoreError
from smlt.store.cluster import ClusterNodes
from smlt.store.nodes import Nodes
from smlt.store.roster import LEAVE, REGISTER, RESTORE, WITHDRAW
from smlt.store.secrets import resolve_store_url
from smlt.store.server import ServerInfo as ServerInfo
from smlt.store.server import inspect
from smlt.store.sweeping import count_keys, delete_keys
from smlt.store.translation import PASSING as PASSING
from smlt.store.translation import translated as translated
from smlt.store.url import is_cluster
from smlt.store.url import redact as redact

#: Of control keys and of a session's keys: the generation they belong to.
_OF_A_GENERATION = re.compile(rb"^smlt:\{[^}]*\}:(?:(?:roster:|session:|acks:)?)(\d+)(?:[.:]|$)")
REPORTS_KEPT = 10_000
#: What a worker's entry in the roster has (`_holder`).
ENTRY = {"worker_id", "pid", "host", "time"}


def _holder(worker_id: str) -> str:
    return json.dumps({"worker_id": worker_id, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()})


def _nodes_row(places: Sequence[str], run_ids: Sequence[str]) -> str:
    return json.dumps({"places": list(places), "run_ids": list(run_ids)})


class ParameterStore:
    """The control plane of job `job` in the store at `url` (`smlt.store.url`), and where its nodes are.

    The URL may leave the password to a file, a variable or a secret manager: see `smlt.store.secrets`.
    Connects when first used. `ttl_s`: how long a key lives that nobody renews. `timeout_s`: for one
    try of a command, of which there are `retries` + 1.
    Raises ConfigError for a URL or job name that cannot work; every method raises StoreError or one of its children.
    """

    def __init__(
        self,
        url: str,
        *,
        job: str,
        ttl_s: float = 1800.0,
        timeout_s: float = 10.0,
        retries: int = 3,
        nodes: Nodes | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", job):
            raise ConfigError(f"job name {job!r}: use 1 to 64 letters, digits, '_' and '-'")
        url = resolve_store_url(url)  # here and nowhere else for the data plane, which takes `self.url`
        self.url, self.job, self.ttl_s, self.timeout_s = url, job, ttl_s, timeout_s
        self.nodes = nodes or (ClusterNodes if is_cluster(url) else Nodes)(url, job, timeout_s=timeout_s, retries=retries)
        self.client: Any = self.nodes.control

    def __repr__(self) -> str:
        return f"<ParameterStore job={self.job!r} at {redact(self.url)}>"

    def impatient(self) -> ParameterStore:
        """The same store for last words: one second, one try. For a worker that is about to give up."""
        nodes = self.nodes.impatient(1.0)
        return ParameterStore(self.url, job=self.job, ttl_s=self.ttl_s, timeout_s=1.0, retries=0, nodes=nodes)

    # ---- the servers ----

    def check(self) -> ServerInfo:
        """Reach every node and see that it will do: ServerInfo of the first, or the error that says why not."""
        return self.survey()[0]

    def survey(self) -> list[ServerInfo]:
        """Reach every node (of a cluster every primary) and see that it will do: what each says of itself, the first first.

        Raises StoreError's children, and ConfigError for a server that is too old or a URL of the wrong kind.
        """
        found = []
        for url in self.nodes.servers():
            with self.nodes.connected(url) as client:
                found.append(inspect(client, url, self.url))
        return found

    def close(self) -> None:
        """Close the connection."""
        self.nodes.close()

    # ---- the nodes ----

    def propose_places(self) -> list[str]:
        """A hash tag, without braces, for each node: "J.0" first. What the workers agree on is what `register` returns."""
        return self.nodes.propose()

    def locate(self, places: Sequence[str], within_s: float | None = None) -> list[str]:
        """For each place the URL (redis://, rediss:// or unix://) of the server that has it now.

        A cluster is asked anew, for `within_s` at most, by default `timeout_s`.
        """
        return self.nodes.locate(places, within_s)

    def run_ids(self, places: Sequence[str]) -> list[str]:
        """For each place the run id of the server that has it now: another one has not, or may not have, what that had."""
        return self.nodes.run_ids(places)

    # ---- keys ----

    def key(self, name: str) -> str:
        """The full name of a control key."""
        return f"smlt:{{{self.job}.0}}:{name}"

    def session_prefix(self, session: str, place: str | None = None) -> str:
        """What the keys of a session's collectives begin with, at a place (`propose_places`); by default the first."""
        return f"smlt:{{{place or f'{self.job}.0'}}}:{session}:"

    @property
    def _ttl_ms(self) -> int:
        return int(self.ttl_s * 1000)

    def sweep(self, *, derived: bool = False) -> int:
        """Delete every key of the job; returns how many there were.

        With `derived`, also of jobs whose names are this one's, a dash and more, as process groups have (`smlt.torch`).
        """
        patterns = [f"smlt:{{{self.job}.*", *([f"smlt:{{{self.job}-*"] if derived else [])]
        return sum(delete_keys(self.nodes, pattern) for pattern in patterns)

    def count_keys(self, pattern: str = "*") -> int:
        """How many keys the job has in the store; with a pattern, of those names."""
        return count_keys(self.nodes, f"smlt:{{{self.job}.[0-9]*}}:{pattern}")

    def delete_generations_before(self, generation: int) -> None:
        """Delete the sessions, rosters and acknowledgements of older generations."""

        def is_older(key: bytes) -> bool:
            found = _OF_A_GENERATION.search(key)
            return found is not None and int(found[1]) < generation

        delete_keys(self.nodes, f"smlt:{{{self.job}.*", is_older)

    def read_streams(self, last_ids: Mapping[str | bytes, str], block_ms: int) -> list[tuple[bytes, list[Any]]]:
        """Entries (id, fields) of streams, by key, behind the last ids, waiting up to `block_ms` for one."""
        socket_timeout_s = float(self.client.connection_pool.connection_kwargs["socket_timeout"])  # the URL may have set it
        block_ms = min(block_ms, int(socket_timeout_s * 500))
        with translated(self.url):
            answer: Any = self.client.xread(dict(last_ids), count=1000, block=max(1, block_ms))
        return list(answer or [])

    # ---- membership ----

    def register(
        self,
        *,
        rank: int,
        world_size: int,
        generation: int,
        worker_id: str,
        tuning: str = "{}",
        places: Sequence[str] | None = None,
    ) -> tuple[str, str, list[str]]:
        """Take `rank` in the roster; returns the session's name, and the `tuning` and `places` of whoever joined first.

        The same worker may ask again: nothing changes. `places`, by default `propose_places()`, is this worker's proposal.

        FencedError when another worker holds the rank or a newer generation has begun; ConfigError when the workers that
        are there expect another world size, or were given another list of nodes.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of the {world_size} workers: 0 to {world_size - 1}")
        proposed = list(places) if places is not None else self.propose_places()
        # Who is who matters for a list only: a cluster says itself who has which place.
        run_ids = self.run_ids(proposed) if len(proposed) > 1 and not is_cluster(self.url) else []
        with translated(self.url):
            answer: list[bytes] = self.client.eval(
                REGISTER,
                3,
                self.key(f"session:{generation}"),
                self.key(f"roster:{generation}."),
                self.key("generation"),
                rank,
                world_size,
                worker_id,
                _holder(worker_id),
                secrets.token_hex(4),
                self._ttl_ms,
                generation,
                tuning,
                _nodes_row(proposed, run_ids),
            )
        kind, value = answer[0].decode(), answer[1].decode()
        if kind == "fenced":
            raise FencedError(f"job {self.job} is at generation {value}; this worker is of generation {generation}")
        if kind == "size":
            raise ConfigError(f"job {self.job}: rank {rank} expects {world_size} workers, those already there expect {value}")
        if kind == "taken":
            other = self._entry(value)
            since = max(0.0, time.time() - float(other["time"]))
            raise FencedError(
                f"rank {rank} of job {self.job} is held by another worker (process {other['pid']} on {other['host']}, for "
                f"{since:.0f} s); give each worker its own rank, and each new run its own job name"
            )
        session = f"{generation}.{value}"
        try:
            agreed = self._agreed_places(answer[3], proposed, run_ids)
            self._check_first_node(generation)
        except ConfigError:
            self._withdraw(rank, generation, session)
            raise
        return session, answer[2].decode(), agreed

    def _withdraw(self, rank: int, generation: int, session: str) -> None:
        """As if this worker had never been here: to leave would close the session to those who are to come."""
        keys = self.key(f"session:{generation}"), self.key(f"roster:{session}")
        with translated(self.url):
            self.client.eval(WITHDRAW, 2, *keys, rank, session.partition(".")[2])

    def _agreed_places(self, text: bytes, proposed: list[str], run_ids: list[str]) -> list[str]:
        """The places in the roster. ConfigError when this worker's list of nodes is not the one that they were made for."""
        try:
            row = json.loads(text)
            agreed, theirs = [str(place) for place in row["places"]], [str(run_id) for run_id in row["run_ids"]]
        except (ValueError, LookupError, TypeError) as error:
            raise StoreError(f"the store at {redact(self.url)} gave no nodes of job {self.job}, but {text[:100]!r}") from error
        if not is_cluster(self.url) and len(agreed) != len(proposed):
            raise ConfigError(self.nodes.another_number(len(agreed)))
        for mine, (j, other) in zip(run_ids, enumerate(theirs), strict=False):
            # A node that was restarted meanwhile has a run id that is nowhere in the others' list.
            if mine != other and mine in theirs:
                raise ConfigError(self._another_order(j, theirs.index(mine)))
        return agreed

    def _check_first_node(self, generation: int) -> None:
        """ConfigError when other workers of the generation have registered at another node of the list than the first.

        To be called when this worker has registered itself: of two who do so at once, one at least sees the other.
        """
        if is_cluster(self.url):
            return
        for j, url in enumerate(self.nodes.servers()):
            if j > 0:
                with self.nodes.connected(url) as client, translated(url):
                    if client.exists(self.key(f"session:{generation}")):
                        raise ConfigError(self._another_order(j, 0))

    def _another_order(self, mine: int, theirs: int) -> str:
        return (
            f"job {self.job}: the nodes of the store stand in another order in this worker's URL ({redact(self.url)}) than in "
            f"that of the workers already there: its node {mine} is their node {theirs}; give every worker the same URL"
        )

    def _entry(self, text: str | bytes) -> dict[str, Any]:
        """A worker's entry in the roster. StoreError when the store gives something else."""
        try:
            entry = json.loads(text)
            if isinstance(entry, dict) and entry.keys() >= ENTRY:
                return entry
        except (ValueError, TypeError):
            pass
        raise StoreError(f"the store at {redact(self.url)} gave no entry of job {self.job}'s roster, but {text[:100]!r}")

    def look(self, *, rank: int, session: str, worker_id: str) -> tuple[str, bool, int]:
        """After a lost connection: (the server's run id, whether `rank` is still this worker's, the current generation or 0).

        FencedError when the rank is another worker's.
        """
        nonsense = f"the store at {redact(self.url)} answered wrongly: INFO or GET gave no such thing"
        with translated(self.url), self.client.pipeline(transaction=False) as pipe:
            pipe.info("server")
            pipe.hget(self.key(f"roster:{session}"), rank)
            pipe.get(self.key("generation"))
            try:
                info, holder, generation = pipe.execute()
            except (AttributeError, TypeError, ValueError) as error:  # redis-py's, of a reply that is no text
                raise StoreError(nonsense) from error
        if holder is not None and self._entry(holder)["worker_id"] != worker_id:
            raise FencedError(f"rank {rank} of job {self.job} is held by another worker now")
        try:
            return str(info.get("run_id", "")), holder is not None, int(generation or 0)
        except (AttributeError, TypeError, ValueError) as error:
            raise StoreError(nonsense) from error

    def restore(
        self,
        *,
        rank: int,
        world_size: int,
        generation: int,
        worker_id: str,
        session: str,
        tuning: str,
        places: Sequence[str] | None = None,
    ) -> bool:
        """Write this worker's entry in the roster again, after the store has lost it. False: a newer generation has begun.

        `tuning` and `places` are what `register` returned.
        """
        agreed = list(places) if places is not None else [f"{self.job}.0"]
        run_ids = self.run_ids(agreed) if len(agreed) > 1 and not is_cluster(self.url) else []
        with translated(self.url):
            return bool(
                self.client.eval(
                    RESTORE,
                    3,
                    self.key(f"session:{generation}"),
                    self.key(f"roster:{session}"),
                    self.key("generation"),
                    rank,
                    world_size,
                    _holder(worker_id),
                    session.partition(".")[2],
                    self._ttl_ms,
                    generation,
                    tuning,
                    _nodes_row(agreed, run_ids),
                )
            )

    def leave(self, *, rank: int, generation: int, worker_id: str, session: str) -> bool:
        """Give the rank back. The last worker to leave deletes the session's keys; True for that one."""
        with translated(self.url):
            last = self.client.eval(
                LEAVE,
                2,
                self.key(f"session:{generation}"),
                self.key(f"roster:{session}"),
                rank,
                worker_id,
                session.partition(".")[2],
            )
        if int(last):
            delete_keys(self.nodes, f"smlt:{{{self.job}.[0-9]*}}:{session}:*")
        return bool(last)

    def refresh(self, generation: int, session: str) -> None:
        """Renew the roster's time to live."""
        with translated(self.url), self.client.pipeline(transaction=False) as pipe:
            pipe.pexpire(self.key(f"session:{generation}"), self._ttl_ms)
            pipe.pexpire(self.key(f"roster:{session}"), self._ttl_ms)
            pipe.execute()

    def roster(self, session: str) -> dict[int, dict[str, Any]]:
        """Who holds which rank."""
        with translated(self.url):
            rows: dict[bytes, bytes] = self.client.hgetall(self.key(f"roster:{session}"))
        return {int(rank): self._entry(row) for rank, row in rows.items() if rank.isdigit()}

    # ---- words to every worker ----

    def _tell(self, kind: str, text: str) -> None:
        with translated(self.url), self.client.pipeline(transaction=False) as pipe:
            pipe.xadd(self.key("ctl"), {"kind": kind, "text": text[:1000]})
            pipe.pexpire(self.key("ctl"), self._ttl_ms)
            pipe.execute()

    def abort(self, text: str) -> None:
        """End every collective of the job: each blocked worker raises CollectiveError with `text`, at once."""
        self._tell("abort", text)

    def open_generation(self, generation: int) -> None:
        """Begin `generation`: workers of older ones raise FencedError."""
        with translated(self.url):
            self.client.set(self.key("generation"), generation, px=self._ttl_ms)
        self._tell("generation", str(generation))
