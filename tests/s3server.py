"""What tests with S3 share. Their fixtures: `pytest_plugins = ["s3fixtures"]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from smlt.store.s3 import S3ObjectStore

PART = 64 << 10
#: What the real S3 calls the least part is 5 MiB; a test has not so much time.
SMALL: dict[str, Any] = {"part_bytes": PART, "whole_bytes": 2 * PART, "threads": 4}


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own for each test."""

    name: str
    endpoint: str
    client: Any  # boto3's

    @property
    def url(self) -> str:
        return f"s3://{self.name}/a/prefix"

    def store(self, url: str | None = None, **settings: Any) -> S3ObjectStore:
        return S3ObjectStore(url or self.url, **{**SMALL, **settings})


def settle(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Whoever asks AWS, here or in a child process, asks `endpoint`."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "the-secret-of-a-test",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    }.items():
        monkeypatch.setenv(name, value)


class Answering:
    """A server that gives every request the same answer: for what moto does not say by itself."""

    def __init__(self, status: int, body: str | Callable[[str], str], headers: dict[str, str] | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                content = (body(self.path) if callable(body) else body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
