"""The RESP decoder: what it takes, however it is split, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlt.collective._native import Decoder, ReplyError, encode_command

replies = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=200) | st.text("abcXYZ 019", max_size=20),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)


def wire(reply: object) -> bytes:
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    if isinstance(reply, str):
        return b"+" + reply.encode() + b"\r\n"
    assert isinstance(reply, list)
    return b"*%d\r\n" % len(reply) + b"".join(map(wire, reply))


def depth(reply: object) -> int:
    return 1 + max(map(depth, reply), default=0) if isinstance(reply, list) else 0


@given(st.lists(replies.filter(lambda r: depth(r) <= 8), max_size=4), st.lists(st.integers(1, 30), max_size=40))
def test_replies_come_out_the_same_however_they_are_split(sent: list[object], cuts: list[int]) -> None:
    data, decoder, received = b"".join(map(wire, sent)), Decoder(), []
    for cut in [*cuts, len(data) or 1]:
        received += decoder.feed(data[:cut])
        data = data[cut:]
    assert received == sent


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_a_command_is_an_array_of_its_arguments(arguments: list[bytes]) -> None:
    assert Decoder().feed(encode_command(*arguments)) == [arguments]


def test_an_error_reply_is_handed_out_as_one() -> None:
    (reply,) = Decoder().feed(b"-OOM command not allowed\r\n")
    assert isinstance(reply, ReplyError)
    assert str(reply) == "OOM command not allowed"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\x00\x01\x02",
        b"$-2\r\n",
        b"$99999999999999999999\r\n",
        b"$536870913\r\n",  # one byte over the server's own limit
        b"$12abc\r\n",
        b"$\r\n",
        b"*-7\r\n",
        b"*1048577\r\n",
        b"*9223372036854775807\r\n",
        b":\r\n",
        b":12.5\r\n",
        b":9223372036854775808\r\n",
        b"+OK\n",
        b"$3\r\nabcd\r\n",
        b"*1\r\n" * 9 + b":1\r\n",  # nested deeper than any reply SMLT asks for
        b"+" + b"x" * 70_000,
    ],
)
def test_what_is_not_resp_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(ValueError, match="not the Redis protocol"):
        Decoder().feed(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused_but_never_crash(data: bytes) -> None:
    try:
        Decoder().feed(data)
    except ValueError:
        return


def test_a_truncated_reply_waits_for_more() -> None:
    decoder = Decoder()
    assert decoder.feed(b"*2\r\n$5\r\nhel") == []
    assert decoder.feed(b"lo\r\n:1") == []
    assert decoder.feed(b"\r\n") == [[b"hello", 1]]
