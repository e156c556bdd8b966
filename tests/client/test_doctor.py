"""`smlt doctor`: what it finds, and what it says to fix."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import redis

from smlt.client.doctor import OPTIONAL, Finding, diagnose
from smlt.store.embedded import EmbeddedStore


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_all_is_well_with_the_embedded_store(store: EmbeddedStore) -> None:
    findings = by_name(diagnose(store.url))
    assert {finding.status for name, finding in findings.items() if name not in OPTIONAL} == {"ok"}
    assert findings["store"].text.startswith(("Valkey ", "Redis "))
    assert findings["round trip"].text.endswith("us")
    assert "Mbit/s up" in findings["bandwidth"].text
    assert list(redis.Redis.from_url(store.url).scan_iter(match="smlt:{doctor-*")) == []


def test_an_evicting_store_is_warned_of(store: EmbeddedStore) -> None:
    client = redis.Redis.from_url(store.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        finding = by_name(diagnose(store.url))["store memory policy"]
    finally:
        client.config_set("maxmemory-policy", "noeviction")
    assert finding.status == "warn"
    assert "deletes chunks that workers wait for" in finding.text
    assert "noeviction" in finding.fix


def test_a_store_without_a_limit_is_warned_of(store: EmbeddedStore) -> None:
    client = redis.Redis.from_url(store.url)
    limit = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", 0)
    try:
        assert by_name(diagnose(store.url))["store memory"].status == "warn"
    finally:
        client.config_set("maxmemory", limit)


def test_a_store_too_full_to_work_fails_with_its_reason() -> None:
    with EmbeddedStore(memory_bytes=4 << 20) as small:
        findings = by_name(diagnose(small.url))
    assert findings["store memory"].status == "warn"
    assert findings["store speed"].status == "fail"
    assert "is full" in findings["store speed"].text


def test_a_user_without_a_needed_permission_fails_with_its_reason(store: EmbeddedStore) -> None:
    client = redis.Redis.from_url(store.url)
    client.acl_setuser("limited", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-ping"])
    try:
        finding = by_name(diagnose(store.tcp_url.replace(store.tcp_url[8:].partition("@")[0], "limited:secret")))["store speed"]
    finally:
        client.acl_deluser("limited")
    assert finding.status == "fail"
    assert "no permissions" in finding.text
    assert "secret" not in finding.text


def test_without_a_url_the_embedded_store_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(diagnose(None))["embedded store"].status == "ok"
    monkeypatch.setenv("SMLT_STORE_SERVER", "/no/such/program")
    finding = by_name(diagnose(None))["embedded store"]
    assert finding.status == "fail"
    assert "/no/such/program" in finding.text
    assert "pip install" in finding.fix


def test_a_store_that_is_down_fails_and_so_does_the_command() -> None:
    command = [sys.executable, "-m", "smlt", "doctor", "--store", "redis://:secret@127.0.0.1:1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    findings = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 3
    assert findings["store"]["status"] == "fail"
    assert "secret" not in done.stdout + done.stderr
