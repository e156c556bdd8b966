"""S3 as moto gives it, over real HTTP: `pytest_plugins = ["s3fixtures"]` in a test file makes the fixture `bucket`.

moto stands in for Amazon S3: nobody who tests this need have an account.
"""

from __future__ import annotations

import uuid

import pytest
from s3server import Bucket, settle


@pytest.fixture
def bucket(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    import boto3
    from moto.s3 import models

    monkeypatch.setattr(models, "S3_UPLOAD_PART_MIN_SIZE", 1)
    settle(monkeypatch, moto_url)
    client, name = boto3.Session().client("s3"), f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return Bucket(name, moto_url, client)
