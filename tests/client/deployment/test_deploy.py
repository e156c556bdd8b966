"""`smlt deploy` makes what is missing, changes what differs, and keeps the rest. moto stands in for AWS."""

from __future__ import annotations

from pathlib import Path

import pytest
from cloud import Sandbox, sandbox


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    return sandbox(moto_url, monkeypatch, tmp_path)


def test_a_first_deployment_makes_everything(aws: Sandbox) -> None:
    done, rows = aws.deploy()
    print(rows)
    assert set(aws.actions().values()) == {"create"}
    print(aws.everything())


def test_a_second_deployment_sends_nothing(aws: Sandbox) -> None:
    aws.deploy()
    done, rows = aws.deploy()
    print(rows)
    assert (done.changed, done.sent_bytes, aws.recorder.writes) == (0, 0, [])
