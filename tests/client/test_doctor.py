"""`smlt doctor`: what it finds, and what it says to fix."""

from __future__ import annotations

import json
import subprocess
import sys

import redis

from smlt.client.doctor import OPTIONAL, Finding, diagnose
from smlt.store.embedded import EmbeddedStore


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_all_is_well_with_the_embedded_store(store: EmbeddedStore) -> None:
    findings = by_name(diagnose(store.url))
    assert {finding.status for name, finding in findings.items() if name not in OPTIONAL} == {"ok"}
    assert findings["store"].text.startswith("Valkey ")
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


def test_a_store_that_is_down_fails_and_so_does_the_command() -> None:
    command = [sys.executable, "-m", "smlt", "doctor", "--store", "redis://:secret@127.0.0.1:1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    findings = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 3
    assert findings["store"]["status"] == "fail"
    assert "secret" not in done.stdout + done.stderr
