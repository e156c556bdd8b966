"""An invocation whose connection is lost runs on: its worker trains, and nothing is invoked a second time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from commandline import status, steps, write_task
from functions import Cloud, cloud

JOB = ("--workers", 2, "--epochs", 15, "--global-batch-size", 16)


class Wire:
    """A TCP connection to the emulator, for a test to cut. Forwards what comes on `url`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break off every connection there is."""
        found, self._open = self._open, []
        for one in found:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextmanager
def wire(made: Cloud) -> Iterator[Wire]:
    """Let the client (not the functions) go through a wire."""
    found = Wire(int(made.local.endpoint_url.rpartition(":")[2]))
    made.environment["AWS_ENDPOINT_URL"] = found.url
    yield found
    found.close()


def test_a_run_whose_invocations_are_out_of_sight_ends_as_any_other(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        time.sleep(0.05)\n")
    with ExitStack() as stack:
        made = stack.enter_context(cloud(script))
        cut = stack.enter_context(wire(made))
        before = len(made.local.invocations)
        with made.running(script, *JOB, "--name", "cut", cwd=tmp_path) as run:
            run.wait_for(lambda event: event["event"] == "step" and event["step"] == 5)
            cut.cut()
            assert run.finish() == 0, run.errors.read_text()
            assert run.errors.read_text() == ""
        assert len(made.local.invocations) == before + 3  # a probe and two workers: none a second time
    folder = tmp_path / "smlt-runs" / "cut"
    assert status(folder)["state"] == "done"
    assert status(folder)["restarts"] == 0
    assert [number for number, _ in steps(folder)] == list(range(1, 61))
