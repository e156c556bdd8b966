"""The backend's process group beside the collectives' results: handles, groups, options, and how it ends."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from processes import Ended, keys_left, run_all, start_all, wait_all

from smlt.store.embedded import EmbeddedStore

BEGIN = """
import os, sys, signal, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
import smlt, smlt.torch
from smlt.errors import CollectiveError, CollectiveTimeout, ConfigError, MismatchError, StoreUnavailable, WorkerLostError

def raises(kind, match, function, *arguments, **named):
    import re
    try:
        function(*arguments, **named)
    except kind as error:
        assert re.search(match, str(error)), str(error)
        return error
    raise AssertionError(f"no {kind.__name__}")

def begin(timeout_s=30, **more):
    dist.init_process_group("smlt", init_method=sys.argv[1], timeout=timedelta(seconds=timeout_s), **more)
    return dist.get_rank(), dist.get_world_size()

"""


@pytest.fixture
def name(store: EmbeddedStore) -> str:
    return f"g-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def left(store: EmbeddedStore, name: str) -> Iterator[None]:
    """Afterwards no key of the job may be left."""
    yield
    assert keys_left(store, name) == []


def all_well(ended: list[Ended]) -> None:
    for worker in ended:
        assert worker.code == 0, worker.err


@pytest.mark.usefixtures("left")
def test_handles_groups_and_options(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin()
group = dist.group.WORLD
assert isinstance(group, smlt.torch.ProcessGroup) and dist.get_backend() == "smlt"

# Handles.
if rank == 0:
    time.sleep(0.5)
work = dist.all_reduce(x := torch.ones(300_000), async_op=True)
future = work.get_future()
if rank != 0:
    raises(TimeoutError, "not ended after 0.01 s", work.wait, timedelta(seconds=0.01))
    assert not work.is_completed() and not future.done()
assert work.wait() and work.is_completed() and work.is_success() and work.exception() is None
assert future.wait()[0] is not None and x[0] == n and work.result()[0] is x
seen = []
work = dist.all_reduce(x, async_op=True)
work.get_future().then(lambda done: seen.append(done.value())).wait()
assert len(seen) == 1
for _ in range(50):  # handles that nobody keeps
    dist.all_reduce(half := torch.ones(70_000, dtype=torch.bfloat16), async_op=True)
dist.barrier()
assert half[0] == n

# Several groups at once, some without this rank.
pairs = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
mine = [pair for pair in pairs if pair is not dist.GroupMember.NON_GROUP_MEMBER]
assert len(mine) == 2
works = [dist.all_reduce(torch.ones(50_000), group=pair, async_op=True) for pair in mine]
assert [work.result()[0][0].item() for work in works if work.wait()] == [2.0, 2.0]
assert dist.all_reduce(torch.ones(1), group=pairs[(rank + 1) % 3]) is None
dist.destroy_process_group(mine[0])

# The communicator's collectives and the group's are numbered together, from two threads too.
comm = smlt.torch.group_communicator()
step = comm.step
feedback = smlt.ErrorFeedback()
first = dist.all_reduce(a := torch.ones(100_000), async_op=True)
second = comm.allreduce_async(b := torch.ones(100_000), codec="int8", out=b, feedback=feedback)
dist.broadcast(c := torch.full((5,), float(rank)), 2)
assert comm.step == step + 3
second.wait(), first.wait()
assert a[0] == n and abs(b[0] - 1) < 0.01 and c[0] == 2.0
raises(ConfigError, "not of the backend", smlt.torch.group_communicator, dist.new_group(backend="gloo"))

# What is added up: as it is by default, compressed where the group was asked to.
exact = torch.arange(1000, dtype=torch.float32) * 1.0001
lossy = dist.new_group(pg_options=smlt.torch.Options(codec="fp16"))
dist.all_reduce(one := exact.clone())
dist.all_reduce(two := exact.clone(), group=lossy)
dist.all_reduce(small := exact[:64].clone(), group=lossy)
assert torch.allclose(one, exact * n, rtol=1e-6)
assert 0 < (two - exact * n).abs().max() < 2.0**-9 * 1000 * n and torch.equal(small, one[:64])
assert torch.equal(exact.max().reshape(1), two.new_tensor([exact.max()]))
raises(ConfigError, "unknown codec 'fp8'", smlt.torch.Options, codec="fp8")
raises(ConfigError, "smlt.torch.Options", dist.new_group, pg_options={"codec": "fp16"})

# What compiled programs call.
import torch.distributed._functional_collectives as functional
assert functional.all_reduce(torch.ones(3), "sum", group).tolist() == [n] * 3
assert functional.all_gather_tensor(torch.ones(2) * rank, 0, group).tolist() == [0, 0, 1, 1, 2, 2]
assert functional.reduce_scatter_tensor(torch.ones(6), "sum", 0, group).tolist() == [n] * 2
assert functional.all_to_all_single(torch.ones(3) * rank, None, None, group).tolist() == [0, 1, 2]
assert functional.broadcast(torch.ones(3) * rank, 1, group).tolist() == [1] * 3

# Booleans, factors, what has no meaning.
flag = torch.tensor([rank == 1, False])
dist.all_reduce(flag)
assert flag.tolist() == [True, False]
dist.all_reduce(x := torch.ones(5), op=dist._make_nccl_premul_sum(0.5))
assert x[0] == 0.5 * n
raises(ConfigError, "band has no meaning for float32", dist.all_reduce, torch.ones(1), op=dist.ReduceOp.BAND)
raises(ConfigError, "have no mean", dist.all_reduce, torch.tensor([True]), op=dist.ReduceOp.AVG)
raises(ConfigError, "sparse", dist.all_reduce, torch.ones(1).to_sparse())
raises(ConfigError, "on meta", dist.all_reduce, torch.ones(1, device="meta"))
raises(ConfigError, "2 output tensors for 3 ranks", dist.all_gather, [torch.ones(1)] * 2, torch.ones(1))
raises(ConfigError, r"where float32\\[2\\] belongs", dist.all_gather, [torch.ones(1)] * 3, torch.ones(2))
raises(ConfigError, "split sizes", dist.all_to_all_single, torch.ones(3), torch.ones(3), [1, 1, 2], [1, 1, 1])

group.monitored_barrier(timedelta(seconds=10))
dist.destroy_process_group()
raises(CollectiveError, "it was closed", group.allreduce, [torch.ones(1)])
raises(CollectiveError, "left the group", group.send, [torch.ones(1)], 0, 0)
raises(ValueError, "not been initialized", dist.all_reduce, torch.ones(1))
"""
    all_well(run_all(3, BEGIN + script, f"{store.tcp_url}?job={name}"))


@pytest.mark.usefixtures("left")
def test_a_given_store_carries_one_group_after_the_other(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
store = smlt.torch.Store(sys.argv[1], job=sys.argv[2])
for turn in range(3):
    dist.init_process_group("smlt", store=store, rank=rank, world_size=n)
    dist.all_reduce(x := torch.ones(3))
    assert x[0] == n
    dist.destroy_process_group()
"""
    all_well(run_all(2, BEGIN + script, store.url, name))


@pytest.mark.usefixtures("left")
def test_two_jobs_at_once_on_one_store(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin()
for _ in range(30):
    dist.all_reduce(x := torch.full((20_000,), float(sys.argv[2])))
    assert x[0] == n * float(sys.argv[2])
dist.destroy_process_group()
"""
    workers = []
    for job in (1, 2):
        arguments = ["-c", BEGIN + script, f"{store.tcp_url}?job={name}-{job}", str(job)]
        workers += start_all(2, arguments)
    all_well(wait_all(workers))


@pytest.mark.usefixtures("left")
def test_calls_that_differ_raise_on_all_and_all_go_on(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin()
size = 4 if rank == 1 else 3
def call(kind):
    x, two = torch.ones(size), [torch.ones(size) for _ in range(2)]
    if kind == "all_reduce":
        dist.all_reduce(x)
    elif kind == "op":
        dist.all_reduce(torch.ones(3), op=dist.ReduceOp.MAX if rank else dist.ReduceOp.MIN)
    elif kind == "dtype":
        dist.all_reduce(torch.ones(3, dtype=torch.float64 if rank else torch.float32))
    elif kind == "reduce_scatter":
        dist.reduce_scatter(x, two)
    elif kind == "all_gather":
        dist.all_gather(two, x)
    elif kind == "kind":
        dist.all_reduce(x) if rank else dist.all_gather(two, x)
    elif kind == "root":
        dist.broadcast(torch.ones(3), rank)
    elif kind == "all_to_all":
        dist.all_to_all_single(torch.ones(2), torch.ones(2), [1, 1], [2, 0] if rank else [1, 1])
for kind in ("all_reduce", "op", "dtype", "reduce_scatter", "all_gather", "kind", "all_to_all"):
    error = raises(MismatchError, "rank", call, kind)
    assert isinstance(error, RuntimeError) and isinstance(error, dist.DistBackendError), error
    dist.all_reduce(x := torch.ones(2))
    assert x[0] == n, kind
    print(error)
dist.destroy_process_group()
"""
    ended = run_all(2, BEGIN + script, f"{store.tcp_url}?job={name}")
    all_well(ended)
    assert "all_reduce: collective " in ended[0].out
    assert "rank 1 called all_reduce(float32[4], sum); rank 0 called all_reduce(float32[3], sum)" in ended[0].out


@pytest.mark.usefixtures("left")
def test_messages(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin(timeout_s=20)
peer = 1 - rank
# Large ones both ways at once, tags out of order, many small ones.
mine, theirs = torch.full((9_000_000,), float(rank)), torch.empty(9_000_000)
sent = dist.isend(mine, peer, tag=3)
dist.isend(torch.full((2,), 10.0 + rank), peer, tag=4)
dist.recv(last := torch.empty(2), peer, tag=4)
dist.recv(theirs, peer, tag=3)
assert theirs.eq(peer).all() and last[0] == 10 + peer
sent.wait()
works = [dist.isend(torch.tensor([i]), peer) for i in range(200)]
found = [torch.empty(1, dtype=torch.int64) for _ in range(200)]
for work in [dist.irecv(x, peer) for x in found]:
    work.get_future().wait()
assert [int(x) for x in found] == list(range(200))
assert dist.recv(x := torch.zeros(1), tag=9) == peer if rank else dist.send(torch.ones(1), 1, tag=9) is None
# To itself, and strided.
dist.isend(torch.arange(6.0)[::2], rank, tag=1)
wide = torch.zeros(3, 2)
dist.irecv(wide[:, 1], rank, tag=1).wait()
assert wide[:, 1].tolist() == [0.0, 2.0, 4.0]
# What does not fit.
dist.isend(torch.ones(3, dtype=torch.float16), peer, tag=5)
raises(MismatchError, "with tag 5 from rank .* has sent float16", dist.recv, torch.ones(3), peer, tag=5)
# What does not come.
raises(TimeoutError, "not done after 0.2 s", dist.irecv(torch.ones(1), peer, tag=6).wait, timedelta(seconds=0.2))
dist.barrier()
if rank == 0:
    raises(WorkerLostError, "rank 1 is not in the job, or has left it", dist.recv, torch.ones(1), 1, tag=7)
dist.destroy_process_group()
"""
    all_well(run_all(2, BEGIN + script, f"{store.tcp_url}?job={name}"))


def test_who_does_not_come_or_dies_is_named(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin(timeout_s=60)
dist.group.WORLD.set_timeout(timedelta(seconds=4))
dist.all_reduce(torch.ones(1000))
group = dist.group.WORLD
other = dist.new_group()
if rank != 1:
    said = "monitored_barrier: .*rank 1 did not take part within 1 s"
    error = raises(WorkerLostError, said, other.monitored_barrier, timedelta(seconds=1))
    assert error.ranks == (1,)
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
work = dist.all_reduce(torch.ones(200_000), async_op=True)
future = work.get_future()
error = raises(WorkerLostError, "all_reduce: collective .*rank 1 did not take part within 4 s", work.wait)
assert error.ranks == (1,) and error.step == 3, error.step
assert isinstance(error.__cause__, WorkerLostError) and isinstance(error, RuntimeError)
raises(RuntimeError, "rank 1 did not take part", future.wait)
assert isinstance(work.exception(), WorkerLostError) and not work.is_success() and work.is_completed()
raises(CollectiveError, "can do no more", dist.all_reduce, torch.ones(1))
began = time.monotonic()
dist.destroy_process_group()
assert time.monotonic() - began < 20
print("well")
"""
    ended = run_all(3, BEGIN + script, f"{store.tcp_url}?job={name}")
    assert [worker.code for worker in ended] == [0, -9, 0], ended[0].err
    assert ended[0].out == ended[2].out == "well\n"


@pytest.mark.usefixtures("left")
def test_a_child_by_fork_is_told_and_harms_nothing(store: EmbeddedStore, name: str) -> None:
    script = """
rank, n = begin()
dist.all_reduce(torch.ones(100_000))
child = os.fork()
if child == 0:
    try:
        raises(CollectiveError, "does not survive fork", dist.all_reduce, torch.ones(1))
        dist.destroy_process_group()
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    sys.exit(0)  # through atexit
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
dist.all_reduce(x := torch.ones(100_000))
assert x[0] == n
# Collectives from several threads of one process, each in a group of its own.
groups = [dist.new_group() for _ in range(3)]
def call(group):
    for _ in range(20):
        dist.all_reduce(x := torch.ones(30_000), group=group)
        assert x[0] == n
threads = [threading.Thread(target=call, args=(group,)) for group in groups]
[thread.start() for thread in threads], [thread.join() for thread in threads]
dist.destroy_process_group()
"""
    all_well(run_all(2, BEGIN + script, f"{store.tcp_url}?job={name}"))


@pytest.mark.usefixtures("left")
def test_senders_who_run_ahead_wait_for_readers(store: EmbeddedStore, name: str) -> None:
    script = """
import redis
from smlt.torch import issue, outbox
issue.AHEAD_BYTES_MAX = outbox.UNREAD_BYTES_MAX = 8 << 20
rank, n = begin()
client = redis.Redis.from_url(os.environ["STORE"])
before = client.info("memory")["used_memory"]
if rank == 0:
    time.sleep(2)  # rank 1 could fill the store meanwhile
    used = client.info("memory")["used_memory"] - before
    assert used < 40 << 20, used
for _ in range(30):
    dist.broadcast(torch.ones(1 << 20), 1)  # 4 MiB
works = []
for i in range(30):
    if rank == 1:
        works.append(dist.isend(torch.full((1 << 20,), float(i)), 0))
if rank == 0:
    time.sleep(1)
    used = client.info("memory")["used_memory"] - before
    assert used < 40 << 20, used
    for i in range(30):
        dist.recv(x := torch.empty(1 << 20), 1)
        assert x[0] == i
[work.wait() for work in works]
dist.destroy_process_group()
"""
    with EmbeddedStore() as own:
        all_well(run_all(2, BEGIN + script, f"{own.tcp_url}?job={name}", STORE=own.tcp_url))
