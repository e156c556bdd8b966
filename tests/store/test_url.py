"""A store's URL: one server, a list of them, a cluster; and what is shown of it."""

from __future__ import annotations

import pytest

from smlt.errors import ConfigError
from smlt.store.secrets import find_store, resolve_store_url
from smlt.store.url import addresses, check_url, endpoints, groups_of, is_cluster, is_local, node_url, redact


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://a:1", ["redis://a:1"]),
        ("redis://a:1,rediss://b,unix:///c?db=1", ["redis://a:1", "rediss://b", "unix:///c?db=1"]),
        ("redis://:x,y@a, redis://b", ["redis://:x,y@a", "redis://b"]),
        ("redis+cluster://a,redis+cluster://b:2", ["redis+cluster://a", "redis+cluster://b:2"]),
    ],
)
def test_a_list_is_parted_where_a_scheme_follows_a_comma(url: str, parts: list[str]) -> None:
    assert endpoints(url) == parts


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:one@a:1?db=2,rediss://u:two@b,unix:///c?password=three", "redis://a:1,rediss://b,unix:///c"),
        ("redis+cluster://:one@a:1?groups=4,redis+cluster://b", "redis+cluster://a:1,redis+cluster://b"),
        ("redis://:123,redis://456@a", "redis://...,redis://a"),  # a password with a URL in it, unquoted
        ("redis://:one#1@a,redis://b", "redis://...,redis://b"),
    ],
)
def test_of_a_list_nothing_but_addresses_is_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://a,redis://b:port", "the port must be a number"),
        ("redis://a,redis+cluster://b", "beside others"),
        ("redis+cluster://a,rediss+cluster://b", "for all of its nodes"),
        ("redis+cluster://a/1", "database 0"),
        ("redis+cluster://a?db=3", "database 0"),
        ("redis+cluster:///path", "give the host"),
        ("redis+cluster://a?groups=0", "from 1 to 64"),
        ("redis+cluster://a?groups=many", "from 1 to 64"),
        (",".join(["redis://a"] * 65), "at most 64"),
        ("unix+cluster:///path", "must begin with"),
    ],
)
def test_what_cannot_be_is_told(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_url(url)


def test_what_is_asked_of_a_url() -> None:
    cluster = "rediss+cluster://u:p%2C@a?groups=3&ssl_ca_certs=/x,rediss+cluster://b:7"
    check_url(cluster)
    assert is_cluster(cluster)
    assert not is_cluster("redis://a")
    assert (groups_of(cluster), groups_of("redis+cluster://a")) == (3, None)
    assert node_url(cluster, "::1", 7000) == "rediss://u:p%2C@[::1]:7000?ssl_ca_certs=/x"
    assert addresses("redis://a:1,redis://b,unix:///c") == ["a:1", "b:6379", "unix:///c"]
    assert is_local("unix:///a,redis://127.0.0.1:1")
    assert not is_local("unix:///a,redis://10.0.0.1")


def test_each_node_of_a_list_may_have_a_password_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMLT_STORE_PASSWORD", "of all")
    monkeypatch.setenv("OTHER", "b's")
    found = find_store("redis://a,redis://b?password_env=OTHER,redis://:c@c")
    assert found is not None
    assert found.url == "redis://:of%20all@a,redis://:b%27s@b,redis://:c@c"
    assert found.password_from == "the variable SMLT_STORE_PASSWORD and the variable OTHER (password_env) and the URL"
    monkeypatch.delenv("SMLT_STORE_PASSWORD")
    assert resolve_store_url(found.url) == found.url
