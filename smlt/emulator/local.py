"""`LambdaLocal`: AWS on this machine, as one context manager."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from smlt.emulator.account import ACCOUNT, add_managed_policies, make_admin, reset
from smlt.emulator.authorization import allows
from smlt.emulator.code import CodeStore
from smlt.emulator.control import reserved_concurrency
from smlt.emulator.environment import check_image_environment, make_runtime_folder, role_credentials
from smlt.emulator.faults import Dice, Faults
from smlt.emulator.front import Front
from smlt.emulator.functions import Function, find_function
from smlt.emulator.guard import Guard
from smlt.emulator.invoke import INIT_TIMEOUT_S, RETRY_DELAYS_S, EventQueue, Invoker, Record
from smlt.emulator.memory import Monitor
from smlt.emulator.operations import Need
from smlt.emulator.pool import ACCOUNT_LIMIT, Pool
from smlt.emulator.principals import Principals
from smlt.emulator.requests_log import Asked, RequestLog
from smlt.emulator.sandbox import Place
from smlt.emulator.server import Server, moto_application
from smlt.errors import ConfigError

_starts = 0
_running = threading.Lock()


class LambdaLocal:
    """S3, IAM, STS, CloudWatch Logs, Secrets Manager, SSM, Lambda: all at `endpoint_url`, empty at the start.

    port: of 127.0.0.1; 0: a free one. idle_s: how long a warm sandbox is kept. account_limit: concurrent executions of the
    account. images: image URI -> Python environment that stands for it; every other image is the environment that this runs
    in. faults, seed: what goes wrong on purpose; `faults` may be changed at any time. retry_delays_s, throttle_backoff_s: of
    asynchronous invocations. init_timeout_s: how long a handler may load. settle_s: how long a new function is
    Pending and an update InProgress. authorize: enforce IAM policies. on_invocation: called with the record of each invocation,
    from its thread.

    Raises ConfigError for settings that cannot work, a port that is taken, or when another one runs in this process.

        with LambdaLocal(throttle_backoff_s=0.1) as local:
            client = boto3.client("lambda", endpoint_url=local.endpoint_url, region_name="us-east-1", **local.credentials)
    """

    def __init__(
        self,
        port: int = 0,
        *,
        idle_s: float = 300.0,
        account_limit: int = ACCOUNT_LIMIT,
        images: Mapping[str, Path] | None = None,
        faults: Faults | None = None,
        seed: int = 0,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
        throttle_backoff_s: float = 1.0,
        init_timeout_s: float = INIT_TIMEOUT_S,
        settle_s: float = 0.0,
        authorize: bool = False,
        on_invocation: Callable[[Record], None] | None = None,
    ) -> None:
        self._images = {uri: Path(prefix) for uri, prefix in (images or {}).items()}
        for prefix in self._images.values():
            check_image_environment(prefix)
        self._dice = Dice(faults or Faults(), seed)
        self._settings: dict[str, Any] = {
            "port": port,
            "idle_s": idle_s,
            "account_limit": account_limit,
            "retry_delays_s": retry_delays_s,
            "throttle_backoff_s": throttle_backoff_s,
            "init_timeout_s": init_timeout_s,
            "settle_s": settle_s,
        }
        self.authorize = authorize
        self._on_invocation = on_invocation
        self._records: list[Record] = []
        self._records_lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._principals = Principals(ACCOUNT)
        self._log = RequestLog(self._principals)
        self._admin: dict[str, str] | None = None
        self.endpoint_url = ""

    @property
    def faults(self) -> Faults:
        """What goes wrong; set its fields."""
        return self._dice.faults

    @property
    def injected(self) -> Counter[str]:
        """How often each fault has happened: throttle, duplicate, kill, cold_start."""
        return Counter(self._dice.injected)

    @property
    def requests(self) -> list[Asked]:
        """(service, action, principal, resource) of all requests so far, actions as IAM writes them: "s3:GetObject"."""
        return list(self._log)

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        self._log.clear()

    @property
    def invocations(self) -> list[Record]:
        """A record of each invocation that is over."""
        with self._records_lock:
            return list(self._records)

    @property
    def sandboxes(self) -> list[int]:
        """The process ids of the sandboxes there are."""
        return [sandbox.pid for sandbox in self._pool.sandboxes()]

    def busy(self, function: str) -> int:
        """How many invocations of the function are under way."""
        return self._pool.busy(function)

    @property
    def credentials(self) -> dict[str, str]:
        """For boto3.client(...): the administrator's when policies are enforced, else some that nobody checks."""
        return dict(self._admin or {"aws_access_key_id": "test", "aws_secret_access_key": "test"})

    def environment(self, region: str = "us-east-1") -> dict[str, str]:
        """The variables with which boto3, and whatever uses it, comes here."""
        found = {name.upper(): value for name, value in self.credentials.items()}
        return {**found, "AWS_ENDPOINT_URL": self.endpoint_url, "AWS_REGION": region, "AWS_DEFAULT_REGION": region}

    def wait_for_events(self, timeout_s: float = 60.0) -> bool:
        """Wait until no asynchronous invocation is queued or runs; False when some are after `timeout_s`."""
        return self._events.wait_empty(timeout_s)

    def __enter__(self) -> LambdaLocal:
        if not _running.acquire(blocking=False):
            raise ConfigError(
                "a LambdaLocal runs in this process already: moto keeps one account a process; leave that one first"
            )
        self._stack.callback(_running.release)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _start(self) -> None:
        global _starts
        _starts += 1
        start = _starts
        reset()
        self._stack.callback(reset)
        add_managed_policies()
        folder = Path(tempfile.mkdtemp(prefix="smlt-lambda-")).resolve()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        guard = Guard(folder)
        self._stack.callback(guard.close)
        server = _bound(int(self._settings["port"]))
        self.endpoint_url = server.endpoint_url
        self._stack.callback(server.close)
        place = Place(
            folder=folder,
            runtime=make_runtime_folder(folder / "runtime"),
            code=CodeStore(folder),
            guard=guard,
            endpoint_url=server.endpoint_url,
            credentials=lambda found: role_credentials(found.role, found.name, found.account, found.region, start),
            put_log=self._put_log,
            image_prefix=self._prefix,
        )
        self._pool = pool = Pool(
            place,
            account_limit=int(self._settings["account_limit"]),
            idle_s=float(self._settings["idle_s"]),
            current=_current,
            reserved=lambda region: reserved_concurrency(ACCOUNT, region),
        )
        self._stack.callback(pool.close)
        monitor = Monitor(pool.sandboxes, pool.reap)
        self._stack.callback(monitor.close)
        invoker = Invoker(pool, self._dice, init_timeout_s=float(self._settings["init_timeout_s"]), report=self._report)
        self._events = events = EventQueue(
            invoker,
            retry_delays_s=self._settings["retry_delays_s"],
            throttle_backoff_s=float(self._settings["throttle_backoff_s"]),
            current=_current,
        )
        self._stack.callback(events.close)
        self._admin = make_admin() if self.authorize else None
        server.app = Front(
            moto_application(),
            invoker,
            events,
            self._log,
            self._principals,
            account=ACCOUNT,
            account_limit=int(self._settings["account_limit"]),
            authorize=self.authorize,
            settle_s=float(self._settings["settle_s"]),
        )
        server.start()

    def _prefix(self, image: str) -> Path:
        return self._images.get(image, Path(sys.prefix))

    def _report(self, record: Record) -> None:
        with self._records_lock:
            self._records.append(record)
        if self._on_invocation is not None:
            self._on_invocation(record)

    def _put_log(self, function: Function) -> Callable[[str, str, list[dict[str, object]]], None]:
        """What writes a sandbox's log; as on Lambda nothing is written when the function's role may not."""
        from moto.logs.exceptions import ResourceNotFoundException
        from moto.logs.models import logs_backends

        backend = logs_backends[function.account][function.region]
        arn = f"arn:aws:logs:{function.region}:{function.account}:log-group:{function.log_group}"
        need = Need("logs:PutLogEvents", (f"{arn}:*", f"{arn}:log-stream:*"))

        def put(group: str, stream: str, events: list[dict[str, object]]) -> None:
            if self.authorize:
                role = self._principals.of_role(function.role)
                if role is None or not allows(role, need, function.region):
                    return
            for _ in range(2):  # somebody may delete the group meanwhile
                with contextlib.suppress(ResourceNotFoundException):
                    backend.ensure_log_group(group)
                    backend.ensure_log_stream(group, stream)
                    backend.put_log_events(group, stream, events)
                    return

        return put


def _current(function: Function) -> Function:
    return find_function(function.invoked_arn, None, function.region, function.account)


def _bound(port: int) -> Server:
    try:
        return Server(port, lambda environ, start: [])
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(f"cannot listen on 127.0.0.1:{port}: {reason}; give another --port, or none") from error
