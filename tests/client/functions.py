"""Functions on this machine: a `LambdaLocal`, what is deployed to it, and `smlt` that trains there.

The image of these functions is the environment that the tests run in: what a layer does is tested by itself
(test_layers.py, test_deployed_layer.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from commandline import Running, smlt

from smlt.emulator import LambdaLocal

FUNCTION, BUCKET, ROLE = "trainer", "training", "trainer-role"
IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/trainer@sha256:" + 64 * "0"
#: Bits are compared with local workers': their numeric library may have been told which processor's kernels to take.
SAME_KERNELS = [
    part for name, value in os.environ.items() if name.startswith("OPENBLAS_") for part in ("--env", f"{name}={value}")
]


class Cloud:
    """An emulator with a deployed function, and a folder to train from."""

    def __init__(self, local: LambdaLocal) -> None:
        self.local = local
        self.environment = {**local.environment(), "AWS_EC2_METADATA_DISABLED": "true"}

    def deploy(self, script: Path, *more: object) -> None:
        """Deploy the function, or change it."""
        where = ("deploy", FUNCTION, BUCKET, script, ROLE, "--create-bucket", "--create-role", "--image", IMAGE)
        done = smlt(*where, *SAME_KERNELS, *more, cwd=script.parent, **self.environment)
        assert (done.returncode, done.stderr) == (0, "")

    def train(self, *arguments: object, cwd: Path) -> Any:
        """`smlt train --on lambda` to its end."""
        return smlt("train", *arguments, *on_lambda(), cwd=cwd, **self.environment)

    def running(self, *arguments: object, cwd: Path) -> Running:
        """The same, for a test to watch."""
        return Running("train", *arguments, *on_lambda(), "--json", cwd=cwd, **self.environment)

    def client(self, service: str) -> Any:
        return boto3.client(service, endpoint_url=self.local.endpoint_url, region_name="us-east-1", **self.local.credentials)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """What lies in the bucket below a prefix."""
        client = self.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [row["Key"] for page in pages for row in page.get("Contents", [])]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def parameters(self, run: str) -> bytes:
        """The last checkpoint's tensors."""
        found = self.objects(f"{run}/checkpoints/")
        return found[max(key for key in found if key.endswith("/tensors.safetensors"))]


def on_lambda() -> tuple[str, ...]:
    return ("--on", "lambda", "--function", FUNCTION)


@contextmanager
def cloud(script: Path, *more: object, **settings: Any) -> Iterator[Cloud]:
    """An emulator in which `script` is deployed."""
    with LambdaLocal(**settings) as local:
        made = Cloud(local)
        made.deploy(script, *more)
        yield made
