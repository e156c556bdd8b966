"""A `torch.distributed.Store` in the parameter store, so that no worker has to listen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store as C10dStore

from smlt.store.parameter import ParameterStore, redact, translated

#: How long the keys live when nobody uses them any more.
TTL_S = 24 * 3600.0
#: A wait in the parameter store, at most.
WAIT_MS = 1000

#: torch.distributed keeps the C++ side of a store, which is nothing without this one: they live until they are closed.
_open: set[Store] = set()

# KEYS: the hash. ARGV: field, expected value, desired value. As TCPStore does it: an expectation of "" is met by no value.
_COMPARE_SET = """
local now = redis.call('HGET', KEYS[1], ARGV[1])
if now == ARGV[2] or (not now and ARGV[2] == '') then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
  return ARGV[3]
end
return now or ARGV[2]
"""
# KEYS: the hash. ARGV: field, value.
_APPEND = """
redis.call('HSET', KEYS[1], ARGV[1], (redis.call('HGET', KEYS[1], ARGV[1]) or '') .. ARGV[2])
return 1
"""
# KEYS: the hash of members, what to delete when all have left. ARGV: joined or left.
_LEAVE = """
local left = redis.call('HINCRBY', KEYS[1], 'left', 1)
if left < tonumber(redis.call('HGET', KEYS[1], 'joined') or '0') then return 0 end
redis.call('UNLINK', unpack(KEYS))
return 1
"""


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


class Store(C10dStore):
    """Keys and values of a group of workers who meet in the parameter store at `url` under the name `job`.

    For `init_process_group(store=)`, or wherever PyTorch takes a Store; `init_method="redis://..."` makes one. All
    workers give the same `job`, which no other job may have. `timeout` is for `get` and `wait`; `set_timeout` changes it.
    Keys are the fields of one hash, `smlt:{job.0}:c10d`; a stream beside it wakes who waits.

    Raises what `smlt.store.parameter.ParameterStore` raises, and `torch.distributed.DistStoreError` when a key does not
    come in time.
    """

    def __init__(self, url: str, *, job: str, timeout: timedelta = timedelta(seconds=300)) -> None:
        super().__init__()
        self._parameters = ParameterStore(url, job=job, ttl_s=TTL_S)
        self._hash, self._wake = self._parameters.key("c10d"), self._parameters.key("c10d-wake")
        self._members = self._parameters.key("c10d-members")
        self.set_timeout(timeout)
        _open.add(self)

    @property
    def url(self) -> str:
        """The parameter store's URL, with its password."""
        return self._parameters.url

    @property
    def job(self) -> str:
        """The name under which the workers meet."""
        return self._parameters.job

    def __repr__(self) -> str:
        return f"<smlt.torch.Store job={self.job!r} at {redact(self.url)}>"

    # ---- what torch.distributed calls ----

    def clone(self) -> Store:
        """Another face of the same store."""
        return self

    def set(self, key: str, value: bytes | str) -> None:
        """Set a key."""
        self._write("HSET", self._hash, key, _bytes(value))

    def get(self, key: str) -> bytes:
        """A key's value; waits for it."""
        self.wait([key])
        return self.multi_get([key])[0]

    def add(self, key: str, value: int) -> int:
        """Add to a number, which begins with 0; returns the sum."""
        return int(self._write("HINCRBY", self._hash, key, value))

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        """Set a key if it has the expected value, or none when "" is expected; returns the value it has then."""
        values = _bytes(expected_value), _bytes(desired_value)
        return bytes(self._write("EVAL", _COMPARE_SET, 1, self._hash, key, *values))

    def append(self, key: str, value: bytes | str) -> None:
        """Add to the end of a value."""
        self._write("EVAL", _APPEND, 1, self._hash, key, _bytes(value))

    def delete_key(self, key: str) -> bool:
        """Delete a key; whether it was there."""
        with translated(self.url):
            return bool(self._parameters.client.hdel(self._hash, key))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return all(self._there(keys))

    def num_keys(self) -> int:
        """How many keys there are."""
        with translated(self.url):
            return int(self._parameters.client.hlen(self._hash))

    def list_keys(self) -> list[str]:
        """Their names."""
        with translated(self.url):
            return [key.decode() for key in self._parameters.client.hkeys(self._hash)]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Several values; waits for all."""
        self.wait(keys)
        with translated(self.url):
            values = self._parameters.client.hmget(self._hash, list(keys)) if keys else []
        return [value or b"" for value in values]

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        """Set several keys."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """There are append, multi_get and multi_set."""
        return True

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are there; DistStoreError when they are not in time."""
        limit: timedelta = self.timeout if timeout is None else timeout  # type: ignore[attr-defined]  # the stub lacks it
        deadline = time.monotonic() + limit.total_seconds()
        seen = self._last_change()
        while missing := [key for key, there in zip(keys, self._there(keys), strict=True) if not there]:
            left_ms = int((deadline - time.monotonic()) * 1000)
            if left_ms <= 0:
                raise dist.DistStoreError(
                    f"key {', '.join(missing)} of job {self.job} was not set within {limit.total_seconds():g} s (store "
                    f"{redact(self.url)})"
                )
            for _, entries in self._parameters.read_streams({self._wake: seen}, min(left_ms, WAIT_MS)):
                seen = entries[-1][0].decode()

    # What the C++ side looks for.
    getNumKeys = num_keys  # noqa: N815
    deleteKey = delete_key  # noqa: N815

    # ---- a group's life ----

    def join(self) -> None:
        """Count this worker in."""
        with translated(self.url), self._parameters.client.pipeline(transaction=False) as pipe:
            pipe.hincrby(self._members, "joined", 1)
            pipe.pexpire(self._members, int(TTL_S * 1000))
            pipe.execute()

    def leave(self) -> bool:
        """Count this worker out; the last one deletes all keys. True for that one."""
        with translated(self.url):
            return bool(self._parameters.client.eval(_LEAVE, 3, self._members, self._hash, self._wake))

    def close(self) -> None:
        """Close the connections. They open again when needed, by whoever still has this object."""
        _open.discard(self)
        self._parameters.close()

    # ---- inside ----

    def _write(self, *command: Any) -> Any:
        """A command that changes the hash, and word of it to who waits."""
        ttl_ms = int(TTL_S * 1000)
        with translated(self.url), self._parameters.client.pipeline(transaction=False) as pipe:
            pipe.execute_command(*command)
            pipe.pexpire(self._hash, ttl_ms)
            pipe.xadd(self._wake, {"k": ""}, maxlen=100, approximate=True)
            pipe.pexpire(self._wake, ttl_ms)
            return pipe.execute()[0]

    def _there(self, keys: Sequence[str]) -> list[bool]:
        with translated(self.url), self._parameters.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hexists(self._hash, key)
            return [bool(answer) for answer in pipe.execute()]

    def _last_change(self) -> str:
        with translated(self.url):
            newest = self._parameters.client.xrevrange(self._wake, count=1)
        return newest[0][0].decode() if newest else "0-0"
