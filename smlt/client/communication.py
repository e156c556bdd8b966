"""What a step's all-reduces take: round trips, commands and bytes over links, the store's network and its thread."""

from __future__ import annotations

from functools import lru_cache

from smlt.client.platforms import Platform
from smlt.collective import _native
from smlt.collective.plan import CHUNK_BYTES, CHUNK_BYTES_TUNED_MIN
from smlt.collective.tuning import LOCAL, OVERHEAD_BYTES, choose, chunk_bytes

#: A value of some numbers: a barrier, metrics, a step's loss.
SMALL_BYTES = 64
#: Round trips of a collective in the critical path: contribution, token and fetch, aggregate, fetch.
ONE_SHOT_TRIPS, HIERARCHICAL_TRIPS = 2, 4

#: Encoded bytes/s that a worker's core encodes, adds or decodes, and what the store's thread moves over a unix socket, in and
#: out: from the table of `python -m bench.compare --workers 2 4 8` in docs/benchmarks.md; the store's is its last row.
CODEC_BYTES_PER_S = {"fp32": 4e9, "fp16": 3e9, "bf16": 3e9, "int8": 2e9}
SOCKET_BYTES_PER_S = 4.2e9
#: The same of a node over its network: the round figure of `tuning.LOCAL`.
NODE_BYTES_PER_S = LOCAL.store_bytes_per_s
#: What a collective takes of a worker's core beside its bytes: Python, system calls, wakings (`python -m bench.estimate
#: --constants`).
CALL_S = {"one-shot": 0.1e-3, "hierarchical": 0.2e-3}

#: Beside that, where workers share cores: whoever has waited for the others comes back to caches that are no longer its own
#: (`python -m bench.estimate`: what small steps take more than their parts).
WAKING_S = {"one-shot": 0.15e-3, "hierarchical": 0.45e-3}


class Communication:
    """The collectives of a step whose buckets have these encoded sizes, in bytes, in the order in which they leave."""

    def __init__(self, buckets: tuple[int, ...], platform: Platform, codec: str = "fp16") -> None:
        self.buckets, self.platform, self.codec = buckets, platform, codec
        self._collective = lru_cache(maxsize=None)(self._collective_s)

    def exposed_s(self, n: int, tail_s: float, core_speed: float) -> float:
        """Of a step's communication, what `tail_s` of computing behind the first bucket's departure does not hide.

        The last bucket leaves when backward has ended, behind those before it. `core_speed`: of the core that encodes.
        """
        if n == 1:
            return 0.0
        *early, last = self.buckets
        # Buckets follow one another without a pause: each costs its bytes and commands, the last one the round trips, too.
        before = sum(self._collective(n, size, core_speed)[0] for size in early)
        busy, waiting = self._collective(n, last, core_speed)
        return max(0.0, before - tail_s) + busy + waiting

    def on_shared_cores_s(self, n: int) -> float:
        """What a step's communication takes when the workers and the store share all cores: nothing is hidden there."""
        if n == 1:
            return 0.0
        cores, tuning = self.platform.cores, self.platform.tuning
        waves, total = max(1.0, n / cores), 0.0
        for number, size in enumerate(self.buckets, 1):
            algorithm, work, store, trips = self._work(n, size)
            total += max(store, (n * work + store) / cores) + waves * CALL_S[algorithm]
            if number == len(self.buckets):  # those before are on their way together
                total += waves * (trips * tuning.round_trip_s + WAKING_S[algorithm])
        return total

    def small_s(self, n: int) -> float:
        """A barrier, or an all-reduce of some numbers."""
        if n == 1:
            return 0.0
        busy, waiting = self._collective(n, SMALL_BYTES, 1.0)
        return busy + waiting

    def broadcast_s(self, n: int, size: int) -> float:
        """The model to everyone: once into the store, n - 1 times out of it."""
        if n == 1:
            return 0.0
        platform, tuning = self.platform, self.platform.tuning
        node = platform.node_bytes_per_s or tuning.store_bytes_per_s
        return 4 * tuning.round_trip_s + 2 * size / tuning.link_bytes_per_s + (n - 1) * size / (node * platform.store_nodes)

    def store_limited(self, n: int) -> bool:
        """Whether the store, not the workers' links, is what a step's communication waits for."""
        if n == 1 or self.platform.is_local:
            return False
        size = sum(self.buckets)
        link, network, thread = self._limits(n, size)
        return max(network, thread) > link

    # ---- one collective ----

    def _collective_s(self, n: int, size: int, core_speed: float) -> tuple[float, float]:
        """(seconds for which links or store are busy with it, seconds of round trips and owners' work around them)."""
        algorithm, work, _, trips = self._work(n, size)
        around = trips * self.platform.tuning.round_trip_s + (work + CALL_S[algorithm]) / core_speed
        return max(self._limits(n, size)), around

    def _limits(self, n: int, size: int) -> tuple[float, float, float]:
        """Seconds of a worker's link, of the store nodes' network, of their threads."""
        platform, tuning = self.platform, self.platform.tuning
        algorithm, shards = self._chosen(n, size)
        message: float = size + OVERHEAD_BYTES
        if algorithm == "one-shot":
            sent, received = message, n * message
            taken_in, given_out = n * sent, n * received
            commands, k = n * (n + 1), 1  # it takes one node, the next step another one
        else:
            pieces = self._pieces(size, shards)
            message = size / shards + OVERHEAD_BYTES * pieces
            sent = shards * message  # of its own shard the aggregate
            received = (n - 1) * message + (shards - 1) * message
            taken_in, given_out = n * shards * message, 2 * (n - 1) * shards * message
            commands = pieces * (2 * n * shards + 2 * shards + (n + 1) * shards) + 2 * n
            k = min(platform.store_nodes, shards * pieces)
        link = max(sent, received) / tuning.link_bytes_per_s
        rate = platform.node_bytes_per_s
        network = max(taken_in, given_out) / (rate * k) if rate else 0.0
        thread = ((taken_in + given_out) / self._thread_rate() + commands * tuning.command_s) / k
        return link, network, thread

    def _thread_rate(self) -> float:
        """Bytes/s of one store thread, in and out."""
        return max(self.platform.tuning.store_bytes_per_s, SOCKET_BYTES_PER_S if self.platform.is_local else NODE_BYTES_PER_S)

    def _work(self, n: int, size: int) -> tuple[str, float, float, int]:
        """(algorithm, seconds of a worker's core, seconds of the store's thread, round trips)."""
        algorithm, shards = self._chosen(n, size)
        if algorithm == "one-shot":
            return algorithm, n * size / CODEC_BYTES_PER_S[self.codec], self._limits(n, size)[2], ONE_SHOT_TRIPS
        # Encode for the others, add what comes from them and publish, decode what others publish.
        coded = 3 * size * (n - 1) / n + size / shards
        return algorithm, coded / CODEC_BYTES_PER_S[self.codec], self._limits(n, size)[2], HIERARCHICAL_TRIPS

    def _chosen(self, n: int, size: int) -> tuple[str, int]:
        return choose(self.platform.tuning, "auto", n, size, _native.ONE_SHOT_BYTES_MAX, self.platform.store_nodes)

    def _pieces(self, size: int, shards: int) -> int:
        """Chunks of a shard."""
        chunk = chunk_bytes(self.platform.tuning, CHUNK_BYTES_TUNED_MIN, CHUNK_BYTES)
        return max(1, -(-int(size / shards) // chunk))
