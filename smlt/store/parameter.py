"""The parameter store's control plane: the server, a job's keys, the sessions of its workers.

Everything here is small and goes through redis-py; the chunks of the collectives go through csrc. What scheduler and
workers say to each other: `smlt.store.coordination`. Keys:

    smlt:{J.0}:session:<g>       name of the session of generation g that workers may still join
    smlt:{J.0}:roster:<g>.<s>    hash: rank -> who holds it; world_size; left, how many have left again;
                                 tuning, of whoever joined first
    smlt:{J.0}:generation        the membership's version
    smlt:{J.0}:ctl               stream that wakes blocked workers: kind ("abort" | "generation"), text
    smlt:{J.0}:<g>.<s>:...       the collectives of session s (csrc/wire.h)

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from smlt.errors import ConfigError, FencedError, StoreAuthError, StoreError, StoreFull, StoreUnavailable
from smlt.store.secrets import resolve_store_url
from smlt.store.url import redact as redact

#: Of control keys and of a session's keys: the generation they belong to.
_OF_A_GENERATION = re.compile(rb"^smlt:\{[^}]*\}:(?:(?:roster:|session:|acks:)?)(\d+)(?:[.:]|$)")
REPORTS_KEPT = 10_000
#: What a worker's entry in the roster has (`_holder`).
ENTRY = {"worker_id", "pid", "host", "time"}
#: What a store answers while it starts, fails over, is busy or short of something: it passes (as in csrc/receive.c).
PASSING = (
    "LOADING ",
    "READONLY ",
    "BUSY ",
    "MASTERDOWN ",
    "CLUSTERDOWN ",
    "TRYAGAIN ",
    "MISCONF ",
    "NOREPLICAS ",
    "UNBLOCKED ",
    "ERR max number of clients",
)

# KEYS: session pointer, roster prefix, current generation.
# ARGV: rank, world size, worker id, holder (JSON), fresh session name, ttl ms, the worker's generation, its tuning.
# The generation is compared here, not before: one opened in between must fence this worker too (invariant 4).
_REGISTER = """
local current = redis.call('GET', KEYS[3])
if current and tonumber(current) > tonumber(ARGV[7]) then return {'fenced', current} end
local session = redis.call('GET', KEYS[1])
local roster = session and KEYS[2] .. session
if not session or (tonumber(redis.call('HGET', roster, 'left') or '0') > 0) then
  session = ARGV[5]
  roster = KEYS[2] .. session
end
local size = redis.call('HGET', roster, 'world_size')
if size and size ~= ARGV[2] then return {'size', size} end
local holder = redis.call('HGET', roster, ARGV[1])
if holder and cjson.decode(holder)['worker_id'] ~= ARGV[3] then return {'taken', holder} end
redis.call('HSET', roster, 'world_size', ARGV[2], ARGV[1], ARGV[4])
redis.call('HSETNX', roster, 'tuning', ARGV[8])
redis.call('PEXPIRE', roster, ARGV[6])
redis.call('SET', KEYS[1], session, 'PX', ARGV[6])
return {'ok', session, redis.call('HGET', roster, 'tuning')}
"""

# KEYS: session pointer, roster. ARGV: rank, worker id, session. Returns 1 when nobody is left.
_LEAVE = """
local holder = redis.call('HGET', KEYS[2], ARGV[1])
if not holder or cjson.decode(holder)['worker_id'] ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[2], 'left', 1)
if redis.call('HLEN', KEYS[2]) > 3 then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('GET', KEYS[1]) == ARGV[3] then redis.call('DEL', KEYS[1]) end
return 1
"""


# After the store has lost its data: this worker's entry as it was. KEYS: session pointer, roster, current generation.
# ARGV: rank, world size, holder (JSON), session, ttl ms, the worker's generation, tuning.
# The pointer is never set over another session: who joins there has nothing to do with this one.
_RESTORE = """
local current = redis.call('GET', KEYS[3])
if current and tonumber(current) > tonumber(ARGV[6]) then return 0 end
redis.call('HSET', KEYS[2], 'world_size', ARGV[2], ARGV[1], ARGV[3])
redis.call('HSETNX', KEYS[2], 'tuning', ARGV[7])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('SET', KEYS[1], ARGV[4], 'NX', 'PX', ARGV[5])
return 1
"""


@dataclass(frozen=True)
class ServerInfo:
    """What the store says of itself. Memory is in bytes; a `maxmemory_bytes` of 0 means no limit.

    `run_id` is another after each restart and on each replica.
    """

    product: str
    version: tuple[int, int, int]
    cluster: bool
    maxmemory_bytes: int
    maxmemory_policy: str
    used_memory_bytes: int
    run_id: str = ""


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what redis-py raises into what SMLT promises; no message holds the password."""
    where = f"the store at {redact(url)}"
    try:
        yield
    except StoreError:  # translated already; one of them is an OSError
        raise
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise StoreAuthError(f"{where} refused the user, the password or a permission: {error}") from error
    except redis.exceptions.OutOfMemoryError as error:
        raise StoreFull(f"{where} is full: {error}; raise its maxmemory") from error
    except redis.exceptions.MaxConnectionsError as error:
        raise StoreUnavailable(f"{where} takes no more connections: {error}") from error
    except redis.exceptions.InvalidResponse as error:
        raise StoreUnavailable(f"{where} does not speak the Redis protocol: {error}") from error
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise StoreUnavailable(f"{where} cannot be reached: {error}") from error
    except (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError, redis.exceptions.TryAgainError) as error:
        raise StoreUnavailable(f"{where} takes no commands for now: {error}") from error
    except redis.ResponseError as error:
        text = str(error)
        reply = re.sub(r"^Command # \d+ \(.*?\) of pipeline caused error: ", "", text, flags=re.DOTALL)
        if reply.startswith(PASSING):
            raise StoreUnavailable(f"{where} takes no commands for now: {text}") from error
        if reply.startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
            raise StoreAuthError(f"{where} refused the user, the password or a permission: {text}") from error
        raise StoreError(f"{where} answered: {text}") from error
    except redis.RedisError as error:
        raise StoreError(f"{where}: {error}") from error


def _holder(worker_id: str) -> str:
    return json.dumps({"worker_id": worker_id, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()})


class ParameterStore:
    """The control plane of job `job` in the store at `url` (redis://, rediss://, unix://, as redis-py takes them).

    The URL may leave the password to a file, a variable or a secret manager: see `smlt.store.secrets`.
    Connects when first used. `ttl_s`: how long a key lives that nobody renews. `timeout_s`: for one
    try of a command, of which there are `retries` + 1.
    Raises ConfigError for a URL or job name that cannot work; every method raises StoreError or one of its children.
    """

    def __init__(self, url: str, *, job: str, ttl_s: float = 1800.0, timeout_s: float = 10.0, retries: int = 3) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", job):
            raise ConfigError(f"job name {job!r}: use 1 to 64 letters, digits, '_' and '-'")
        url = resolve_store_url(url)  # here and nowhere else for the data plane, which takes `self.url`
        self.url, self.job, self.ttl_s, self.timeout_s = url, job, ttl_s, timeout_s
        try:
            # redis-py's own annotations differ from release to release
            self.client: Any = redis.Redis.from_url(
                url,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                client_name="smlt",
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), retries),
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"store {redact(url)}: {error}") from error
        # Options in the URL win over the arguments above: these two would change what the methods below are given.
        self.client.connection_pool.connection_kwargs.update(protocol=2, decode_responses=False)

    def __repr__(self) -> str:
        return f"<ParameterStore job={self.job!r} at {redact(self.url)}>"

    def impatient(self) -> ParameterStore:
        """The same store for last words: one second, one try. For a worker that is about to give up."""
        return ParameterStore(self.url, job=self.job, ttl_s=self.ttl_s, timeout_s=1.0, retries=0)

    # ---- the server ----

    def check(self) -> ServerInfo:
        """Reach the server and see that it will do: ServerInfo, or the error that says why not."""
        with translated(self.url):
            info: dict[str, Any] = self.client.info()
        if "redis_version" not in info:
            raise StoreUnavailable(f"the store at {redact(self.url)} is no Redis or Valkey: its INFO names no version")
        product = "Valkey" if info.get("server_name") == "valkey" or "valkey_version" in info else "Redis"
        text = str(info["valkey_version"] if "valkey_version" in info else info["redis_version"])
        numbers = [int(n) for n in re.findall(r"\d+", text)[:3]]
        major, minor, patch = [*numbers, 0, 0, 0][:3]
        oldest = (7, 2) if product == "Valkey" else (6, 2)
        if (major, minor) < oldest:
            raise ConfigError(
                f"the store at {redact(self.url)} is {product} {text}; SMLT needs {product} {oldest[0]}.{oldest[1]} or newer"
            )
        cluster = bool(int(info.get("cluster_enabled", 0)))
        if cluster:
            raise ConfigError(
                f"the store at {redact(self.url)} is a cluster, which SMLT does not support yet: use a single node"
            )
        return ServerInfo(
            product,
            (major, minor, patch),
            cluster,
            int(info.get("maxmemory", 0)),
            str(info.get("maxmemory_policy", "")),
            int(info.get("used_memory", 0)),
            str(info.get("run_id", "")),
        )

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    # ---- keys ----

    def key(self, name: str) -> str:
        """The full name of a control key."""
        return f"smlt:{{{self.job}.0}}:{name}"

    def session_prefix(self, session: str) -> str:
        """What the keys of a session's collectives begin with."""
        return self.key(f"{session}:")

    @property
    def _ttl_ms(self) -> int:
        return int(self.ttl_s * 1000)

    def sweep(self, *, derived: bool = False) -> int:
        """Delete every key of the job; returns how many there were.

        With `derived`, also of jobs whose names are this one's, a dash and more, as process groups have (`smlt.torch`).
        """
        return self._delete(f"smlt:{{{self.job}.*") + (self._delete(f"smlt:{{{self.job}-*") if derived else 0)

    def count_keys(self, pattern: str = "*") -> int:
        """How many keys the job has in the store; with a pattern, of those names."""
        with translated(self.url):
            return sum(1 for _ in self.client.scan_iter(match=f"smlt:{{{self.job}.[0-9]*}}:{pattern}", count=1000))

    def _delete(self, pattern: str) -> int:
        deleted = 0
        with translated(self.url):
            batch: list[bytes] = []
            for key in self.client.scan_iter(match=pattern, count=1000):
                batch.append(key)
                if len(batch) == 500:
                    deleted += int(self.client.unlink(*batch))
                    batch = []
            if batch:
                deleted += int(self.client.unlink(*batch))
        return deleted

    def delete_generations_before(self, generation: int) -> None:
        """Delete the sessions, rosters and acknowledgements of older generations."""
        older: list[bytes] = []
        with translated(self.url):
            for key in self.client.scan_iter(match=f"smlt:{{{self.job}.*", count=1000):
                found = _OF_A_GENERATION.search(key)
                if found is not None and int(found[1]) < generation:
                    older.append(key)
            for start in range(0, len(older), 500):
                self.client.unlink(*older[start : start + 500])

    def read_streams(self, last_ids: Mapping[str | bytes, str], block_ms: int) -> list[tuple[bytes, list[Any]]]:
        """Entries (id, fields) of streams, by key, behind the last ids, waiting up to `block_ms` for one."""
        socket_timeout_s = float(self.client.connection_pool.connection_kwargs["socket_timeout"])  # the URL may have set it
        block_ms = min(block_ms, int(socket_timeout_s * 500))
        with translated(self.url):
            answer: Any = self.client.xread(dict(last_ids), count=1000, block=max(1, block_ms))
        return list(answer or [])

    # ---- membership ----

    def register(self, *, rank: int, world_size: int, generation: int, worker_id: str, tuning: str = "{}") -> tuple[str, str]:
        """Take `rank` in the roster; returns the session's name, and the `tuning` of whoever joined first.

        The same worker may ask again: nothing changes.

        FencedError when another worker holds the rank or a newer generation has begun; ConfigError when the workers that
        are there expect another world size.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of the {world_size} workers: 0 to {world_size - 1}")
        with translated(self.url):
            answer: list[bytes] = self.client.eval(
                _REGISTER,
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
        return f"{generation}.{value}", answer[2].decode()

    def _entry(self, text: str | bytes) -> dict[str, Any]:
        """A worker's entry in the roster. StoreError when the store gives something else."""
        try:
            entry = json.loads(text)
            if isinstance(entry, dict) and entry.keys() >= ENTRY:
                return entry
        except ValueError:
            pass
        raise StoreError(f"the store at {redact(self.url)} gave no entry of job {self.job}'s roster, but {text[:100]!r}")

    def look(self, *, rank: int, session: str, worker_id: str) -> tuple[str, bool, int]:
        """After a lost connection: (the server's run id, whether `rank` is still this worker's, the current generation or 0).

        FencedError when the rank is another worker's.
        """
        with translated(self.url), self.client.pipeline(transaction=False) as pipe:
            pipe.info("server")
            pipe.hget(self.key(f"roster:{session}"), rank)
            pipe.get(self.key("generation"))
            info, holder, generation = pipe.execute()
        if holder is not None and self._entry(holder)["worker_id"] != worker_id:
            raise FencedError(f"rank {rank} of job {self.job} is held by another worker now")
        try:
            return str(info.get("run_id", "")), holder is not None, int(generation or 0)
        except (AttributeError, TypeError, ValueError) as error:
            raise StoreError(f"the store at {redact(self.url)} answered wrongly: INFO or GET gave no such thing") from error

    def restore(self, *, rank: int, world_size: int, generation: int, worker_id: str, session: str, tuning: str) -> bool:
        """Write this worker's entry in the roster again, after the store has lost it. False: a newer generation has begun."""
        with translated(self.url):
            return bool(
                self.client.eval(
                    _RESTORE,
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
                )
            )

    def leave(self, *, rank: int, generation: int, worker_id: str, session: str) -> bool:
        """Give the rank back. The last worker to leave deletes the session's keys; True for that one."""
        with translated(self.url):
            last = self.client.eval(
                _LEAVE,
                2,
                self.key(f"session:{generation}"),
                self.key(f"roster:{session}"),
                rank,
                worker_id,
                session.partition(".")[2],
            )
        if int(last):
            self._delete(f"smlt:{{{self.job}.[0-9]*}}:{session}:*")
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
