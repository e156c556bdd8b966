"""What scheduler and workers say to each other through the store, each with one atomic script. Keys:

    smlt:{J.0}:generation     the membership's version
    smlt:{J.0}:plan           the plan of that generation (JSON); missing between a freeze and the next plan
    smlt:{J.0}:scheduler      who schedules, with a TTL that it renews: its lease
    smlt:{J.0}:claims         hash: worker id -> the process that goes by it
    smlt:{J.0}:acks:<g>       hash: worker id -> its acknowledgement of generation g
    smlt:{J.0}:worker:<id>    a worker's metadata after its last iteration; expires when it is not renewed
    smlt:{J.0}:meta:<rank>    stream of a rank's reports
    smlt:{J.0}:events         stream: acknowledgements and faults, for the scheduler to wake up by
    smlt:{J.0}:ctl            stream that wakes workers: kind ("abort" | "generation" | "plan" | "released" | "over"), text
    smlt:{J.0}:control        "stop": end together at the next step boundary; "pause": the same, to be invoked again
    smlt:{J.0}:failure        the first error that ends the job, as JSON

Every write of a worker names its generation and is refused when a newer one has begun (invariant 4); every write of a
scheduler is refused when another one holds the lease. A missing generation key means that the store has lost the job.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from smlt.errors import ConfigError, FencedError, StoreDataLost, StoreError, StoreFull
from smlt.store.membership import Ack, Plan, Position
from smlt.store.parameter import REPORTS_KEPT, ParameterStore, redact, translated

#: A scheduler that has not renewed its lease for so long is taken for dead.
LEASE_S = 15.0
#: A store that refuses writes for want of memory is asked again for so long.
FULL_S = 15.0
#: Entries kept in the streams of control words.
WORDS_KEPT = 1000

_TELL = """
local function tell(key, kind, text, ttl)
  redis.call('XADD', key, 'MAXLEN', '~', 1000, '*', 'kind', kind, 'text', text)
  redis.call('PEXPIRE', key, ttl)
end
"""

# KEYS: generation, plan, scheduler, ctl, control. ARGV: generation, scheduler, ttl ms, lease ms.
_OPEN = (
    _TELL
    + """
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[2] then return {'taken', holder} end
local current = redis.call('GET', KEYS[1])
if current and tonumber(current) > tonumber(ARGV[1]) then return {'newer', current} end
if current == ARGV[1] and not holder then return {'newer', current} end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[4])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('DEL', KEYS[2])
tell(KEYS[4], 'generation', ARGV[1], ARGV[3])
return {'ok', ''}
"""
)

# KEYS: generation, plan, scheduler, ctl. ARGV: generation, scheduler, ttl ms, lease ms, plan.
_PUBLISH = (
    _TELL
    + """
local holder = redis.call('GET', KEYS[3])
if holder and holder ~= ARGV[2] then return {'taken', holder} end
local current = redis.call('GET', KEYS[1])
if not current then return {'lost', ''} end
if current ~= ARGV[1] then return {'newer', current} end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[5], 'PX', ARGV[3])
tell(KEYS[4], 'plan', ARGV[1], ARGV[3])
return {'ok', ''}
"""
)

# KEYS: generation, scheduler, plan, then worker keys. ARGV: scheduler, lease ms, ttl ms.
# One look, one moment: either the job is there, and a missing worker key means a lost worker, or it is not.
_LOOK = """
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {'taken', holder, '', ''} end
local current = redis.call('GET', KEYS[1])
if not current then return {'lost', '', '', ''} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
local there = {}
for i = 4, #KEYS do there[#there + 1] = tostring(redis.call('EXISTS', KEYS[i])) end
return {'ok', table.concat(there), current, tostring(redis.call('EXISTS', KEYS[3]))}
"""

# KEYS: generation, claims, acks, events, worker. ARGV: generation, worker id, process, ack, ttl ms, liveness ms, metadata.
_ACKNOWLEDGE = (
    _TELL
    + """
local current = redis.call('GET', KEYS[1])
if not current then return {'lost', ''} end
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
local holder = redis.call('HGET', KEYS[2], ARGV[2])
if holder ~= ARGV[3] then return {'taken', holder} end
if current ~= ARGV[1] then return {'newer', current} end
redis.call('HSET', KEYS[3], ARGV[2], ARGV[4])
redis.call('PEXPIRE', KEYS[3], ARGV[5])
redis.call('SET', KEYS[5], ARGV[7], 'PX', ARGV[6])
tell(KEYS[4], 'ack', ARGV[2], ARGV[5])
return {'ok', ''}
"""
)

# KEYS: generation, worker, reports, control, scheduler. ARGV: generation, row, ttl ms, liveness ms, reports kept.
_REPORT = """
local current = redis.call('GET', KEYS[1])
if not current then return {'lost', '', '0'} end
if current ~= ARGV[1] then return {'newer', current, '0'} end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'j', ARGV[2])
redis.call('PEXPIRE', KEYS[3], ARGV[3])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
return {'ok', redis.call('GET', KEYS[4]) or '', tostring(redis.call('EXISTS', KEYS[5]))}
"""

# KEYS: generation, claims, worker, scheduler. ARGV: worker id, process, metadata, liveness ms.
_BEAT = """
if not redis.call('GET', KEYS[1]) then return {'lost', '', '0'} end
local holder = redis.call('HGET', KEYS[2], ARGV[1])
if holder and holder ~= ARGV[2] then return {'taken', holder, '0'} end
redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[4])
return {'ok', '', tostring(redis.call('EXISTS', KEYS[4]))}
"""

# KEYS: generation, plan, ctl. ARGV: ttl ms. A generation that nobody can be of wakes whoever is in a collective.
_END = (
    _TELL
    + """
local current = redis.call('GET', KEYS[1])
if not current then return {'lost', ''} end
redis.call('SET', KEYS[1], string.format('%d', tonumber(current) + 1000000), 'PX', ARGV[1])
redis.call('DEL', KEYS[2])
tell(KEYS[3], 'over', '', ARGV[1])
tell(KEYS[3], 'generation', redis.call('GET', KEYS[1]), ARGV[1])
return {'ok', ''}
"""
)

# KEYS: generation, failure, ctl. ARGV: generation, failure, text, ttl ms. The job's first failure is the one to tell.
_FAIL = (
    _TELL
    + """
local current = redis.call('GET', KEYS[1])
if current and tonumber(current) > tonumber(ARGV[1]) and ARGV[1] ~= '0' then return {'newer', current} end
if not redis.call('SET', KEYS[2], ARGV[2], 'NX', 'PX', ARGV[4]) then return {'second', ''} end
tell(KEYS[3], 'abort', ARGV[3], ARGV[4])
return {'ok', ''}
"""
)


@dataclass(frozen=True)
class Look:
    """What a scheduler sees: whether the store still has the job and, if so, which workers are there."""

    intact: bool
    generation: int = 0
    has_plan: bool = False
    alive: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a worker hears when it reports: whether to stop, and whether a scheduler is there."""

    control: str = ""
    scheduled: bool = True


@dataclass(frozen=True)
class Events:
    """What came since the last look: reports (rank, row), and words (kind, text) of the workers to the scheduler."""

    reports: list[tuple[int, dict[str, Any]]]
    words: list[tuple[str, str]]


def ack_to_json(ack: Ack, recent: list[dict[str, Any]]) -> str:
    """An acknowledgement with the worker's last rows: reports may have been lost with the store's data."""
    place = None if ack.position is None else [ack.position.step, ack.position.phase]
    return json.dumps({"worker_id": ack.worker_id, "position": place, "finishing": ack.finishing, "recent": recent})


def ack_from_json(text: bytes) -> tuple[Ack, list[dict[str, Any]]]:
    """The inverse. ConfigError when the text is no acknowledgement."""
    try:
        row = json.loads(text)
        place = row["position"]
        position = None if place is None else Position(int(place[0]), int(place[1]))
        return Ack(str(row["worker_id"]), position, bool(row["finishing"])), list(row["recent"])
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise ConfigError(f"what the store holds as an acknowledgement is none: {error!r}") from error


class Coordination:
    """The words of one job. `ttl_s`: how long what nobody renews lives. Every method raises StoreError's children.

    StoreDataLost means that the store came back without the job; FencedError, that whoever asks is no longer who it was.
    """

    def __init__(self, parameters: ParameterStore) -> None:
        self.parameters = parameters
        self._ttl_ms = int(parameters.ttl_s * 1000)

    def _run(self, script: str, keys: list[str], *arguments: Any) -> list[str]:
        names = [self.parameters.key(key) for key in keys]
        answer = self._patiently(lambda: self.parameters.client.eval(script, len(names), *names, *arguments))
        return [part.decode() for part in answer]

    def _patiently(self, command: Callable[[], Any]) -> Any:
        """What the store answers. While it is full, which passes when others read, ask again for up to FULL_S."""
        deadline, pause_s = time.monotonic() + FULL_S, 0.02
        while True:
            try:
                with translated(self.parameters.url):
                    return command()
            except StoreFull:  # it refuses before anything is done
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, 0.5)

    def _lost(self) -> StoreDataLost:
        return StoreDataLost(
            f"the store at {redact(self.parameters.url)} no longer has job {self.parameters.job}: it lost its data"
        )

    # ---- the scheduler's ----

    def open_generation(self, generation: int, scheduler: str) -> None:
        """Freeze: workers of older generations are woken and fenced. Creates the job where the store has none.

        Saying it again, when the answer was lost, changes nothing. FencedError when another scheduler holds the lease, or
        the generation is not newer than the store's.
        """
        keys = ["generation", "plan", "scheduler", "ctl"]
        status, value = self._run(_OPEN, keys, generation, scheduler, self._ttl_ms, int(LEASE_S * 1000))
        self._check_scheduler(status, value, generation)

    def publish(self, plan: Plan, scheduler: str) -> None:
        """Resume: tell the workers the plan. FencedError as above, StoreDataLost when the generation is gone."""
        keys = ["generation", "plan", "scheduler", "ctl"]
        arguments = (plan.generation, scheduler, self._ttl_ms, int(LEASE_S * 1000), plan.to_json())
        status, value = self._run(_PUBLISH, keys, *arguments)
        self._check_scheduler(status, value, plan.generation)

    def _check_scheduler(self, status: str, value: str, generation: int) -> None:
        if status == "lost":
            raise self._lost()
        if status == "taken":
            raise FencedError(f"job {self.parameters.job} has another scheduler now ({value}): this one ends")
        if status == "newer":
            raise FencedError(f"job {self.parameters.job} is at generation {value}; this scheduler is at {generation}")

    def look(self, scheduler: str, worker_ids: Iterable[str]) -> Look:
        """Renew the lease, and see which workers have their metadata key. FencedError when another scheduler has the lease."""
        wanted = list(worker_ids)
        keys = ["generation", "scheduler", "plan", *(f"worker:{worker_id}" for worker_id in wanted)]
        status, value, generation, has_plan = self._run(_LOOK, keys, scheduler, int(LEASE_S * 1000), self._ttl_ms)
        if status == "lost":
            return Look(intact=False)
        self._check_scheduler(status, value, 0)
        alive = {worker_id: there == "1" for worker_id, there in zip(wanted, value, strict=True)}
        return Look(True, int(generation), has_plan == "1", alive)

    def read_events(self, ranks: Iterable[int], last_ids: dict[str, str], block_ms: int) -> Events:
        """Reports and words after `last_ids` (by stream; brought up to date), waiting up to `block_ms` for one."""
        store = self.parameters
        names: dict[bytes, int | None] = {store.key(f"meta:{rank}").encode(): rank for rank in ranks}
        names[store.key("events").encode()] = None
        streams: dict[Any, Any] = {key: last_ids.get(key.decode(), "0-0") for key in names}
        answer = store.read_streams(streams, block_ms)
        events = Events([], [])
        for key, entries in answer:
            for entry, fields in entries:
                last_ids[key.decode()] = entry.decode()
                rank = names[key]
                try:
                    if rank is None:
                        events.words.append((fields[b"kind"].decode(), fields[b"text"].decode()))
                    else:
                        events.reports.append((rank, json.loads(fields[b"j"])))
                except (KeyError, ValueError) as error:
                    raise StoreError(f"entry {entry.decode()} of {key.decode()} is none of a worker's: {error!r}") from error
        return events

    def acks(self, generation: int) -> list[tuple[Ack, list[dict[str, Any]]]]:
        """Who has acknowledged this generation so far, with the last rows of each."""
        with translated(self.parameters.url):
            rows: dict[bytes, bytes] = self.parameters.client.hgetall(self.parameters.key(f"acks:{generation}"))
        return [ack_from_json(row) for row in rows.values()]

    def delete_before(self, generation: int) -> None:
        """Delete what older generations have left. Their workers are fenced, and nobody needs it any more."""
        self.parameters.delete_generations_before(generation)

    def request_stop(self) -> None:
        """Ask the workers to stop together at the next step boundary."""
        self._patiently(lambda: self.parameters.client.set(self.parameters.key("control"), "stop", px=self._ttl_ms))

    def request_pause(self) -> None:
        """Ask the workers to pause together at the next step boundary, as before their time limit."""
        self._patiently(lambda: self.parameters.client.set(self.parameters.key("control"), "pause", px=self._ttl_ms))

    def withdraw_pause(self) -> None:
        """They have paused: those who go on are not to hear of it again."""
        self._patiently(lambda: self.parameters.client.delete(self.parameters.key("control")))

    def release(self, worker_id: str) -> None:
        """Let a worker go that waits for a place, and that nobody can end from outside."""
        self._say("released", worker_id, "ctl")

    def end_job(self) -> None:
        """The job is over: whoever still works for it is fenced, and leaves. Nothing where the store does not have the job."""
        self._run(_END, ["generation", "plan", "ctl"], self._ttl_ms)

    def failure(self) -> dict[str, Any] | None:
        """The first failure: rank, step, error, traceback; None when there is none."""
        with translated(self.parameters.url):
            row = self.parameters.client.get(self.parameters.key("failure"))
        return json.loads(row) if row is not None else None

    # ---- a worker's ----

    def generation(self) -> int | None:
        """The current generation, None when the store does not have the job."""
        with translated(self.parameters.url):
            value = self.parameters.client.get(self.parameters.key("generation"))
        return None if value is None else int(value)

    def acknowledge(
        self, generation: int, ack: Ack, process: str, recent: list[dict[str, Any]], metadata: str, liveness_s: float
    ) -> int:
        """Acknowledge `generation`; returns the current one, which may be newer: acknowledge that, then.

        FencedError when another process goes by this worker's id: this one is a duplicate. StoreDataLost.
        """
        keys = ["generation", "claims", f"acks:{generation}", "events", f"worker:{ack.worker_id}"]
        arguments = (
            generation,
            ack.worker_id,
            process,
            ack_to_json(ack, recent),
            self._ttl_ms,
            int(liveness_s * 1000),
            metadata,
        )
        status, value = self._run(_ACKNOWLEDGE, keys, *arguments)
        if status == "lost":
            raise self._lost()
        if status == "taken":
            raise FencedError(
                f"worker {ack.worker_id} of job {self.parameters.job} is another process already: this duplicate ends"
            )
        return int(value) if status == "newer" else generation

    def plan(self) -> Plan | None:
        """The plan in force, None while frozen."""
        with translated(self.parameters.url):
            text = self.parameters.client.get(self.parameters.key("plan"))
        return None if text is None else Plan.from_json(text)

    def wait_for_word(self, last_id: str, block_ms: int) -> tuple[str, list[tuple[str, str]]]:
        """Words to the workers (kind, text) after `last_id`, waiting up to `block_ms` for one; and the new last id."""
        words = []
        for _, entries in self.parameters.read_streams({self.parameters.key("ctl"): last_id}, block_ms):
            for entry, fields in entries:
                last_id = entry.decode()
                words.append((fields[b"kind"].decode(), fields[b"text"].decode()))
        return last_id, words

    def report(self, generation: int, worker_id: str, rank: int, row: dict[str, Any], liveness_s: float) -> Answer:
        """Add a report of `rank` and renew the worker's metadata key, in one round trip.

        FencedError when a newer generation has begun: nothing is written. StoreDataLost.
        """
        keys = ["generation", f"worker:{worker_id}", f"meta:{rank}", "control", "scheduler"]
        arguments = (generation, json.dumps(row), self._ttl_ms, int(liveness_s * 1000), REPORTS_KEPT)
        status, control, scheduled = self._run(_REPORT, keys, *arguments)
        if status == "lost":
            raise self._lost()
        if status == "newer":
            raise FencedError(f"generation {control} has begun; this worker is of generation {generation}")
        return Answer(control, scheduled == "1")

    def beat(self, worker_id: str, process: str, metadata: str, liveness_s: float) -> Answer:
        """Renew the metadata key between reports. FencedError when another process goes by this id; StoreDataLost."""
        keys = ["generation", "claims", f"worker:{worker_id}", "scheduler"]
        status, value, scheduled = self._run(_BEAT, keys, worker_id, process, metadata, int(liveness_s * 1000))
        if status == "lost":
            raise self._lost()
        if status == "taken":
            raise FencedError(f"worker {worker_id} is another process ({value})")
        return Answer("", scheduled == "1")

    def fault(self, worker_id: str, generation: int, text: str, blamed: Iterable[int] = ()) -> None:
        """Ask the scheduler for a new generation: this worker cannot go on in `generation`."""
        word = {"worker_id": worker_id, "generation": generation, "text": text[:1000], "ranks": list(blamed)}
        self._say("fault", json.dumps(word))

    def pause(self, worker_id: str) -> None:
        """Tell the scheduler that this worker's time limit comes before the next plan: it waits to be invoked again."""
        self._say("paused", worker_id)

    def _say(self, kind: str, text: str, stream: str = "events") -> None:
        key = self.parameters.key(stream)
        with self.parameters.client.pipeline(transaction=True) as pipe:
            pipe.xadd(key, {"kind": kind, "text": text}, maxlen=WORDS_KEPT, approximate=True)
            pipe.pexpire(key, self._ttl_ms)
            self._patiently(pipe.execute)

    def fail(self, generation: int, rank: int, step: int, error: str, traceback: str) -> bool:
        """Record an error that ends the job and wake everyone; only the first is kept. True when this was it.

        A worker of an older generation cannot; one that has acknowledged none yet says generation 0.
        """
        row = json.dumps({"rank": rank, "step": step, "error": error, "traceback": traceback[-100_000:]})
        text = f"rank {rank} failed at step {step}: {error}"[:1000]
        return self._run(_FAIL, ["generation", "failure", "ctl"], generation, row, text, self._ttl_ms)[0] == "ok"
