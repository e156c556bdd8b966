"""The store's raw limit: an all-reduce's bytes in an all-reduce's commands, without the all-reduce.

Each worker SETs its chunks (n-1 of n shards of contributions and one of aggregates: the encoded gradient once) and MGETs
as many bytes as it would download (the others' contributions to its shard and the others' aggregates: 2(n-1)/n times),
both at once on two connections. No arithmetic, no tokens, no waiting for one another: what is read is what the others
wrote some time before. The encoded gradient is fp16, as are the size of chunks and the number of keys in an MGET.

It is Python, but not held up by it: a few commands are one sendmsg of views (the payload always the same, in cache), and a
reply's length is known beforehand, so that it is received into one buffer without being looked at. Four workers on two
cores spend some 16 ms each, three quarters of it in the kernel, on what takes the store 60 ms.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import redis

from smlt.collective._native import encode_command
from smlt.collective.codecs import wire_size
from smlt.collective.connection import Connections
from smlt.collective.plan import CHUNK_BYTES

TTL_MS = 1_800_000
#: Commands on the way: enough that the server need not wait, not so many that it holds many replies.
SETS_IN_A_SEND = 4
WINDOW = 2
RECEIVE_BYTES = 1 << 20


def volumes(n: int, encoded: int) -> tuple[float, float]:
    """Bytes that a worker sends and receives in an all-reduce of `encoded` bytes a worker."""
    return (n - 1) / n * encoded + encoded / n, 2 * (n - 1) / n * encoded


@contextmanager
def raw_limit(url: str, rank: int, n: int, floats: int) -> Iterator[Callable[[], None]]:
    """Yields a function that moves worker `rank`'s bytes once."""
    shard = max(wire_size("float32", "fp16", floats) // n, 1)
    chunks = -(-shard // CHUNK_BYTES)  # of a shard
    payload = bytes(shard // chunks)
    keys = [[b"limit:%d:%d" % (j, i) for i in range(n * chunks)] for j in range(n)]
    sets: list[bytes] = []
    for key in keys[rank]:
        command = encode_command(b"SET", key, payload, b"PX", b"%d" % TTL_MS)
        head, _, tail = command.partition(payload)
        sets += [head, payload, tail]
    mgets = [
        encode_command(b"MGET", *(keys[j][(rank * chunks + i) % (n * chunks)] for j in range(n) if j != rank))
        for i in range(2 * chunks)
    ]
    reply_bytes = len(b"*%d\r\n" % (n - 1)) + (n - 1) * len(b"$%d\r\n%s\r\n" % (len(payload), payload))
    client = redis.Redis.from_url(url)
    for key in keys[rank]:
        client.set(key, payload, px=TTL_MS)
    connections = Connections(timeout_s=10)
    connections.open([url])
    up, down, _ = connections._sockets
    with ThreadPoolExecutor(1) as other:

        def move() -> None:
            downloads = other.submit(_download, down, mgets, reply_bytes)
            _upload(up, sets)
            downloads.result()

        try:
            for sock in (up, down):
                sock.setblocking(True)
            yield move
        finally:
            connections.close()
            client.delete(*keys[rank])


def _upload(sock: socket.socket, parts: list[bytes]) -> None:
    for i in range(0, len(parts), 3 * SETS_IN_A_SEND):
        views = parts[i : i + 3 * SETS_IN_A_SEND]
        sent = sock.sendmsg(views)
        if sent < sum(map(len, views)):  # a signal came
            sock.sendall(b"".join(views)[sent:])
    expected = b"+OK\r\n" * (len(parts) // 3)
    replies = b""
    while len(replies) < len(expected):
        replies += sock.recv(len(expected) - len(replies))
    if replies != expected:
        raise OSError(f"the store refused a SET: {replies[:200]!r}")


def _download(sock: socket.socket, commands: list[bytes], reply_bytes: int) -> None:
    buffer = memoryview(bytearray(min(RECEIVE_BYTES, reply_bytes)))
    sock.sendall(b"".join(commands[:WINDOW]))
    for i in range(len(commands)):
        left = reply_bytes
        while left:
            count = sock.recv_into(buffer[: min(left, len(buffer))])
            if not count:
                raise OSError("the store closed the connection")
            left -= count
        if i + WINDOW < len(commands):
            sock.sendall(commands[i + WINDOW])
