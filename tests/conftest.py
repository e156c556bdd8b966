"""Fixtures: one real store for the session, a job of its own for each test, and groups of workers."""

from __future__ import annotations

import logging
import signal
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from groups import Group
from stores import AnyStore, Everywhere, make_store

from smlt.store.parameter import ParameterStore


def pytest_configure(config: pytest.Config) -> None:
    """Take Ctrl-C as a foreground process does, and files in their order.

    A shell starts a background job with SIGINT ignored, and every process that the job starts would ignore it too: what is
    handled here has its default in those.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # xdist's own order begins with the files of the most tests. The longest, whole runs in tests/client, have few: they
    # would come last, and one of its workers would be left with them.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def store() -> Iterator[AnyStore]:
    """The session's store, of the kind that SMLT_TEST_STORE asks for (`stores`)."""
    with make_store() as made:
        yield made


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note on the test that it failed, for its fixtures to know."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


@pytest.fixture
def job(store: AnyStore, request: pytest.FixtureRequest) -> Iterator[str]:
    """A job's name; afterwards not one of its keys may be left, unless the test failed: then that is the news."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield name
    parameters = ParameterStore(store.url, job=name)
    with Everywhere(store) as client:
        left = [key.decode() for key in client.scan_iter(match=f"smlt:{{{name}.*")]
    parameters.sweep()
    parameters.close()
    assert left == [] or request.node.stash.get(FAILED, False)


@pytest.fixture
def parameters(store: AnyStore, job: str) -> Iterator[ParameterStore]:
    """The control plane of a job; swept afterwards."""
    made = ParameterStore(store.url, job=job)
    yield made
    made.sweep()
    made.close()


@pytest.fixture
def group(store: AnyStore, job: str) -> Iterator[Callable[..., Group]]:
    """Make a group of workers; closed at the end."""
    with ExitStack() as stack:

        def make(world_size: int, *, url: str | None = None, **settings: Any) -> Group:
            made = Group(url or store.url, job, world_size, **settings)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """A server of moto's, which stands in for AWS."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
