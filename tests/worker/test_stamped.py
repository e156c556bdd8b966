"""The time before every line that a worker prints."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from smlt.worker.stamped import StampedStream, _Place, split_stamp, stamp


@given(parts=st.lists(st.text(alphabet="ab\n\r é")))
def test_every_line_has_one_stamp_and_nothing_else_is_changed(parts: list[str]) -> None:
    out = io.StringIO(newline="")
    stream = StampedStream(out)
    for part in parts:
        assert stream.write(part) == len(part)
    *lines, rest = out.getvalue().split("\n")
    expected = "".join(parts).split("\n")
    for line in lines + ([rest] if rest else []):
        assert split_stamp(line)[0] is not None
        assert split_stamp(split_stamp(line)[1])[0] is None
    assert [split_stamp(line)[1] for line in [*lines, rest]] == expected


def test_a_stamp_is_the_time_in_utc_to_the_millisecond() -> None:
    assert stamp(0.0) == "1970-01-01T00:00:00.000Z"
    assert split_stamp("2026-01-02T15:30:00.123Z epoch 3") == (1767367800.123, "epoch 3")
    assert split_stamp("2026-13-02T15:30:00.123Z x") == (None, "2026-13-02T15:30:00.123Z x")
    assert split_stamp("2026-01-02T15:30:00.123Zx") == (None, "2026-01-02T15:30:00.123Zx")
    now = time.time()
    assert abs((split_stamp(f"{stamp(now)} ")[0] or 0) - now) < 0.0011


def test_two_streams_of_one_file_share_where_a_line_begins() -> None:
    out, place = io.StringIO(), _Place()
    first, second = StampedStream(out, place), StampedStream(out, place)
    print("half ", end="", file=first)
    print("line", file=second)
    print("next", file=first)
    lines = out.getvalue().splitlines()
    assert [split_stamp(line)[1] for line in lines] == ["half line", "next"]


def test_threads_do_not_tear_what_is_written_at_once() -> None:
    out = io.StringIO()
    stream = StampedStream(out)
    threads = [threading.Thread(target=lambda n=n: [stream.write(f"{n}\n") for _ in range(200)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = sorted(split_stamp(line)[1] for line in out.getvalue().splitlines())
    assert texts == sorted(str(n) for n in range(4) for _ in range(200))


CHILD = """
import logging, os, sys, warnings
from smlt.worker.stamped import stamp_output
stamp_output()
logging.basicConfig(format="%(message)s")
print("out", 1, flush=True)
print("err", file=sys.stderr)
logging.warning("logged")
sys.stdout.writelines(["a", "b\\n"])
sys.stdout.buffer.write(b"raw\\n")
sys.stdout.flush()
assert sys.stdout.fileno() == 1 and not sys.stdout.isatty() and sys.stdout.encoding
os.write(1, b"from C\\n")
pid = os.fork()
if pid == 0:
    print("child", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
raise SystemError("the end")
"""


def test_prints_logging_and_tracebacks_of_a_process_are_stamped_and_c_is_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    lines = done.stdout.splitlines()
    plain = [split_stamp(line)[1] for line in lines]
    assert plain[:7] == ["out 1", "err", "logged", "ab", "raw", "from C", "child"]
    assert plain[-1] == "SystemError: the end"
    assert [line for line in lines if split_stamp(line)[0] is None] == ["raw", "from C"]
