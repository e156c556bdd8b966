"""How the workers of a job find each other: in the parameter store, by URL or by environment variables.

`init_method` may be a URL of the parameter store (`smlt.store.url`). Its query may hold `rank`, `world_size`
and `job`; what is not there comes from the arguments, from RANK and WORLD_SIZE, or from SMLT_RANK and SMLT_WORLD_SIZE. The
job's name comes from `job`, SMLT_JOB or TORCHELASTIC_RUN_ID, else it is "torch".

`env://`, the default, is PyTorch's own where MASTER_ADDR is set (`torchrun`); without it, and with SMLT_STORE, the
workers meet in that store.

A *meeting* is complete when all ranks of the job are there at once; it gets a name of its own, under which everything
else is kept. So a job that is started again does not find what its predecessor left, and two jobs only need two names.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

from torch.distributed.constants import default_pg_timeout

from smlt.errors import ConfigError, FencedError, SmltError, StoreError, WorkerLostError
from smlt.store.parameter import ParameterStore, redact, translated
from smlt.store.secrets import resolve_store_url
from smlt.store.url import SCHEMES, endpoints
from smlt.torch.errors import as_torch
from smlt.torch.store import Store

#: A worker who waits says so this often at least; one who has said nothing for STALE_MS has gone.
PAUSE_S, PAUSE_MAX_S, STALE_MS = 0.01, 0.25, 3000
#: So long another process may hold this worker's rank in a meeting: it may be a predecessor that has just died.
TAKEN_S = 15.0
JOB_LETTERS_MAX = 40

# KEYS: those who wait (hash by rank), those who have met (hash by worker). ARGV: rank, world size, worker, who that is
# (JSON), name for the meeting, ms after which a worker has gone.
_MEET = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local met = redis.call('HGET', KEYS[2], ARGV[3])
if met then
  redis.call('HDEL', KEYS[2], ARGV[3])
  return {'met', met}
end
local rows, ranks, present = redis.call('HGETALL', KEYS[1]), {}, {}
for i = 1, #rows, 2 do
  local row = cjson.decode(rows[i + 1])
  if now - row.seen > tonumber(ARGV[6]) then
    redis.call('HDEL', KEYS[1], rows[i])
  elseif rows[i] == ARGV[1] and row.worker ~= ARGV[3] then
    return {'taken', row.who}
  elseif row.size ~= ARGV[2] then
    return {'size', row.size}
  elseif rows[i] ~= ARGV[1] then
    ranks[#ranks + 1] = rows[i]
    present[#present + 1] = row.worker
  end
end
if #ranks + 1 == tonumber(ARGV[2]) then
  for _, worker in ipairs(present) do redis.call('HSET', KEYS[2], worker, ARGV[5]) end
  if #present > 0 then redis.call('PEXPIRE', KEYS[2], 60000) end
  redis.call('DEL', KEYS[1])
  return {'met', ARGV[5]}
end
redis.call('HSET', KEYS[1], ARGV[1], cjson.encode({worker = ARGV[3], size = ARGV[2], who = ARGV[4], seen = now}))
redis.call('PEXPIRE', KEYS[1], 60000)
return {'waiting', table.concat(ranks, ',')}
"""
# KEYS: those who wait. ARGV: rank, worker.
_GO = """
local row = redis.call('HGET', KEYS[1], ARGV[1])
if row and cjson.decode(row).worker == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
"""


def job_name(asked: str | None = None) -> str:
    """The job's name: as asked for, else SMLT_JOB, else torchrun's run id, else "torch"; of letters that keys may have."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    name = asked or os.environ.get("SMLT_JOB") or ("" if run_id == "none" else run_id) or "torch"
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:JOB_LETTERS_MAX]


def meet(url: str, job: str, rank: int, world_size: int, timeout_s: float) -> str:
    """Wait until all workers of `job` are there; returns the name of their meeting.

    Raises WorkerLostError with the ranks that did not come in time, FencedError when another process holds this rank,
    ConfigError when workers expect different world sizes, and what `ParameterStore` raises.
    """
    worker, fresh = secrets.token_hex(8), f"{job}-{secrets.token_hex(4)}"
    who = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    parameters = ParameterStore(url, job=job)
    keys = parameters.key("meeting"), parameters.key("met")
    began, pause, there = time.monotonic(), PAUSE_S, ""
    try:
        parameters.check()
        while True:
            with translated(parameters.url):
                arguments = (rank, world_size, worker, who, fresh, STALE_MS)
                kind, value = (part.decode() for part in parameters.client.eval(_MEET, 2, *keys, *arguments))
            if kind == "met":
                return str(value)
            waited = time.monotonic() - began
            there = value if kind == "waiting" else there
            if kind != "waiting" and waited > min(TAKEN_S, timeout_s):
                raise _turned_away(kind, value, job, rank, world_size)
            if waited > timeout_s:
                raise _alone(there, job, rank, world_size, timeout_s, parameters.url)
            time.sleep(min(pause, max(0.0, timeout_s - waited)))
            pause = min(2 * pause, PAUSE_MAX_S)
    except BaseException:
        with contextlib.suppress(StoreError), translated(parameters.url):
            parameters.client.eval(_GO, 1, keys[0], rank, worker)
        raise
    finally:
        parameters.close()


def _turned_away(kind: str, value: str, job: str, rank: int, world_size: int) -> SmltError:
    if kind == "size":
        return ConfigError(f"rank {rank} of job {job} expects {world_size} workers, others who wait expect {value}")
    other = json.loads(value)
    return FencedError(
        f"rank {rank} of job {job} is held by another process that waits (process {other['pid']} on {other['host']}): give "
        "each worker its own rank, and each job its own name (SMLT_JOB, or ?job= in the URL)"
    )


def _alone(there: str, job: str, rank: int, world_size: int, timeout_s: float, url: str) -> SmltError:
    present = {rank, *(int(text) for text in there.split(",") if text)}
    missing = [other for other in range(world_size) if other not in present]
    names = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    return WorkerLostError(
        f"rank{'s' if len(missing) > 1 else ''} {names} of job {job} did not come to the store at {redact(url)} within "
        f"{timeout_s:g} s (this is rank {rank} of {world_size}): started, with the same URL and job name?",
        missing,
    )


def _number(name: str, given: str | None, *variables: str) -> int:
    for source, text in ((f"?{name}=", given), *((variable, os.environ.get(variable)) for variable in variables)):
        if text:
            try:
                return int(text)
            except ValueError:
                raise ConfigError(f"{source} {text!r} is not a whole number") from None
    raise ConfigError(
        f"the {name.replace('_', ' ')} is not known: give init_process_group({name}=), ?{name}= in the URL, or "
        f"{' or '.join(variables)}"
    )


def _parted(url: str) -> tuple[str, dict[str, str]]:
    """The store's own URL, and what the query says of this worker."""
    ours = dict[str, str]()
    parts = endpoints(url)
    return ",".join(_without(part, ours, listed=len(parts) > 1) for part in parts), ours


def _without(url: str, ours: dict[str, str], *, listed: bool) -> str:
    """One node's URL less what its query says of this worker, which goes into `ours`."""
    base, _, query = url.partition("?")
    if base.startswith("unix:/") and not base.startswith("unix://"):  # as urllib puts it together
        base = f"unix://{base.removeprefix('unix:')}"
    rest = []
    for option in filter(None, query.split("&")):
        name, equals, value = option.partition("=")
        if listed and not equals:  # PyTorch, adding rank and world_size, reads a list of URLs as one, and cuts the rest off
            raise ConfigError(
                f"option {name.partition(',')[0]!r} in the URL has no value; nodes that have options of their own are listed "
                "in SMLT_STORE, with init_method='env://'"
            )
        if name in ("rank", "world_size", "job"):
            ours[name] = unquote(value)
        else:
            rest.append(option)
    return base + (f"?{'&'.join(rest)}" if rest else "")


def store_rendezvous(url: str, timeout: timedelta = default_pg_timeout, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """For `torch.distributed`: meet in the store at `url`."""
    try:
        base, ours = _parted(url)
    except SmltError as error:
        raise as_torch(error) from error
    yield _met(base, ours, timeout)
    raise RuntimeError("a meeting takes place once: call init_process_group again")


def _met(url: str, ours: dict[str, str], timeout: timedelta) -> tuple[Store, int, int]:
    try:
        rank = _number("rank", ours.get("rank"), "RANK", "SMLT_RANK")
        world_size = _number("world_size", ours.get("world_size"), "WORLD_SIZE", "SMLT_WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of the {world_size} workers: 0 to {world_size - 1}")
        url = resolve_store_url(url)
        run = meet(url, job_name(ours.get("job")), rank, world_size, timeout.total_seconds())
        return Store(url, job=run, timeout=timeout), rank, world_size
    except SmltError as error:
        raise as_torch(error) from error


def _environment_rendezvous(original: Any) -> Any:
    def rendezvous(url: str, timeout: timedelta = default_pg_timeout, **kwargs: Any) -> Iterator[Any]:
        chosen = os.environ.get("SMLT_STORE") or None
        if os.environ.get("MASTER_ADDR") or (chosen is None and not os.environ.get("SMLT_STORE_FILE")):
            yield from original(url, timeout=timeout, **kwargs)
            return
        _, ours = _parted(url)
        try:
            store_url = resolve_store_url(chosen)
        except SmltError as error:
            raise as_torch(error) from error
        assert store_url is not None  # there is one of the two variables
        yield _met(store_url, ours, timeout)
        raise RuntimeError("a meeting takes place once: call init_process_group again")

    return rendezvous


def register() -> None:
    """Tell torch.distributed of the schemes, once."""
    # The function `rendezvous` hides its module; the table is private, and the way to see what is registered.
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    handlers = module._rendezvous_handlers
    for scheme in SCHEMES:
        if scheme not in handlers:
            module.register_rendezvous_handler(scheme, store_rendezvous)
    if handlers["env"].__module__ != __name__:
        handlers["env"] = _environment_rendezvous(handlers["env"])
