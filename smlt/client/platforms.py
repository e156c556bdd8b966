"""Where workers run, in numbers: functions beside a store in AWS, or processes of this machine that share its cores."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields, replace

from smlt.client.bill import ARCHITECTURES, FREE_EPHEMERAL_MB, LONGEST_INVOCATION_S
from smlt.client.prices import store_price_name
from smlt.collective.tuning import LOCAL, NETWORK, Tuning
from smlt.errors import ConfigError
from smlt.store.url import endpoints, groups_of, is_cluster
from smlt.worker.processors import MB_PER_VCPU, threads_of

#: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
MEMORY_MB_MIN, MEMORY_MB_MAX = 128, 10_240
#: At 10,240 MB. https://aws.amazon.com/about-aws/whats-new/2020/12/aws-lambda-supports-10gb-memory-6-vcpu-cores-lambda-functions/
VCPUS_MAX = 6.0
#: Baseline network rate of EC2 nodes, Gbit/s each way: what stays when the credits for bursts are spent.
#: https://docs.aws.amazon.com/ec2/latest/instancetypes/gp.html, .../co.html, .../mo.html ("Network specifications").
#: ElastiCache's nodes are those instances.
BASELINE_GBIT = {
    "t4g.micro": 0.064,
    "t4g.small": 0.128,
    "t4g.medium": 0.256,
    "m7g.medium": 0.52,
    "m7g.large": 0.937,
    "m7g.xlarge": 1.876,
    "c7g.large": 0.937,
    "c6gn.large": 3.0,
    "c6gn.xlarge": 6.3,
    "c6gn.2xlarge": 12.5,
    "r7g.large": 0.937,
    "r7g.xlarge": 1.876,
}
#: 10 Gbit/s each way and more than one of Valkey's threads needs: the store that DESIGN speaks of.
STORE_NODE = "c6gn.2xlarge"
#: First request to first collective of a cold function of 1,769 MB, without the user's own imports: median of
#: `python -m bench.cold_start --layer ...` under `smlt lambda-local`. Starting the sandbox itself is AWS's, see below.
COLD_START_S = 0.192
#: What AWS takes for a sandbox before our code runs: not billed, not measured here; published measurements of Python functions
#: from a zip lie between 0.1 s and 0.4 s (https://maxday.github.io/lambda-perf/).
SANDBOX_S = 0.25
#: First byte of S3's answer. https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html
OBJECT_TRIP_S = 0.03
#: Locally a choice's memory is this one value, and a worker's shadow price that of such a function.
LOCAL_MEMORY_MB = MB_PER_VCPU


@dataclass(frozen=True)
class Platform:
    """`on`: "lambda" or "local".

    `tuning`: the way between a worker and the store. `node_bytes_per_s`: what the network of one of the store's nodes carries
    each way; 0: the tuning's store rate is the limit. `core_speed`: of a whole vCPU there, against the core that profiled.
    `cores`: shared by all workers and the store, 0 when each has its own. `object_bytes_per_s`: between a worker and the
    object store.
    """

    on: str
    architecture: str = "x86_64"
    tuning: Tuning = NETWORK
    store_node: str = ""
    store_nodes: int = 1
    node_bytes_per_s: float = 0.0
    core_speed: float = 1.0
    cores: int = 0
    ephemeral_mb: int = FREE_EPHEMERAL_MB
    invocation_s: float = LONGEST_INVOCATION_S
    object_bytes_per_s: float = NETWORK.link_bytes_per_s
    threads_each: int = 0  # of a local worker; 0: the cores are shared out
    month_gb_s: float = 0.0  # what the account has used this month before: prices fall above some billions

    def __post_init__(self) -> None:
        if self.on not in ("lambda", "local"):
            raise ConfigError(f"platform {self.on!r}: lambda or local")
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"architecture {self.architecture!r}: {' or '.join(ARCHITECTURES)}")
        if self.store_nodes < 1 or not self.core_speed > 0 or self.cores < 0 or not self.invocation_s > 0:
            raise ConfigError("platform: store_nodes, core_speed and invocation_s must be positive")
        if self.on == "local" and self.cores < 1:
            raise ConfigError("platform: a machine has cores")

    @classmethod
    def on_lambda(
        cls,
        architecture: str = "x86_64",
        store_node: str = STORE_NODE,
        *,
        store_nodes: int = 1,
        ephemeral_mb: int = FREE_EPHEMERAL_MB,
        tuning: Tuning = NETWORK,
        core_speed: float = 1.0,
        month_gb_s: float = 0.0,
    ) -> Platform:
        """Functions beside `store_nodes` nodes of a type such as "c6gn.xlarge" or "cache.m7g.large".

        ConfigError for a node whose network rate is not known.
        """
        rate = node_rate(store_node)
        return cls(
            "lambda",
            architecture,
            tuning,
            store_node,
            store_nodes,
            rate,
            core_speed,
            ephemeral_mb=ephemeral_mb,
            month_gb_s=month_gb_s,
        )

    @classmethod
    def local(cls, cores: int | None = None, *, tuning: Tuning = LOCAL, threads: int = 0) -> Platform:
        """Processes on this machine, or on one of so many cores like it. `threads` of each; 0: the cores are shared out."""
        found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        return cls("local", tuning=tuning, cores=cores or found, object_bytes_per_s=1e9, threads_each=threads)

    @property
    def is_local(self) -> bool:
        """Whether workers share this machine's cores."""
        return self.on == "local"

    def threads(self, workers: int, memory_mb: int) -> int:
        """The threads that a worker's framework gets: as its executor gives them."""
        if self.is_local:
            return self.threads_each or max(1, self.cores // workers)
        return threads_of(memory_mb)

    def vcpus(self, memory_mb: int) -> float:
        """A function's share of processors."""
        return min(VCPUS_MAX, memory_mb / MB_PER_VCPU)

    def speed(self, workers: int, memory_mb: int, parallel_fraction: float) -> float:
        """How many times as fast as one profiled core a worker computes: Amdahl's law above one vCPU, in proportion below.

        Lambda gives a share of time, not cores: with two threads and 1.5 vCPUs, 1.5 is what the parallel part gets. One thread
        cannot take more than one. Cores that workers share are counted by `CostModel`, not here.
        """
        threads = self.threads(workers, memory_mb)
        share = float(threads) if self.is_local else self.vcpus(memory_mb)
        if share <= 1:
            return self.core_speed * share
        return self.core_speed / (1 - parallel_fraction + parallel_fraction / min(share, threads))

    @property
    def store_price(self) -> str:
        """The name of the store node's price."""
        return store_price_name(self.store_node)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Platform:
        """The inverse of `to_json`. ConfigError when it is no such thing."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or set(values) - {field.name for field in fields(cls)}:
                raise ConfigError("platform: not what to_json wrote")
            return cls(**{**values, "tuning": Tuning(**values["tuning"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"platform: {error}") from error

    def changed(self, **values: object) -> Platform:
        """The same with something else."""
        return replace(self, **values)  # type: ignore[arg-type]


def nodes_of(store: str | None) -> int:
    """How many nodes a store's URL lists (of a cluster: its `groups`), 1 when it does not say."""
    if not store:
        return 1
    return (groups_of(store) or 1) if is_cluster(store) else len(endpoints(store))


def node_rate(node: str) -> float:
    """Bytes/s that a store's node carries each way in the long run. ConfigError when it is not in the table."""
    name = node.removeprefix("cache.")
    try:
        return BASELINE_GBIT[name] * 1e9 / 8
    except KeyError:
        raise ConfigError(f"the network rate of a store node {node!r} is not known: {', '.join(BASELINE_GBIT)}") from None
