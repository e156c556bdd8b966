"""S3 as moto gives it, over real HTTP: `pytest_plugins = ["s3fixtures"]` in a test file makes the fixture `bucket`.

moto stands in for Amazon S3: nobody who tests this need have an account.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator

import pytest
from s3server import Bucket, settle


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    import boto3
    from moto.s3 import models

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    settle(monkeypatch, s3_server)
    client, name = boto3.Session().client("s3"), f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_server, client)
