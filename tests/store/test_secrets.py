"""Where the store's password comes from: every way gives the same URL to both planes, and no way shows it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from groups import Group, in_parallel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.connection import parse_url

import smlt
import smlt.store.secrets
from smlt.errors import ConfigError, SmltError, StoreAuthError
from smlt.store.embedded import EmbeddedStore
from smlt.store.parameter import ParameterStore
from smlt.store.secrets import VARIABLES, find_store, read_secret, resolve_store_url
from smlt.worker.config import WorkerConfig

AWKWARD = "p/a?s#s@w:o%20rd é&+="


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "SMLT_STORE_CA_CERTS", "SMLT_STORE_CERTFILE", "SMLT_STORE_KEYFILE"):
        monkeypatch.delenv(name, raising=False)
    smlt.store.secrets._kept.clear()


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """URLs of redis://h that all lead to the password AWKWARD."""
    path = written(tmp_path / "secret file", AWKWARD + "\n")
    monkeypatch.setenv("CACHE_TOKEN", AWKWARD)
    return {
        "file": f"redis://h?password_file={path}",
        "quoted file": f"redis://h?password_file={str(path).replace(' ', '%20')}",
        "variable": "redis://h?password_env=CACHE_TOKEN",
        "secret file": f"redis://h?password_secret=file://{path}",
        "secret variable": "redis://h?password_secret=env:CACHE_TOKEN",
    }


def test_every_way_gives_the_password_as_redis_py_reads_it(ways: dict[str, str]) -> None:
    for way, url in ways.items():
        assert parse_url(resolve_store_url(url)) == {"host": "h", "password": AWKWARD}, way


@given(password=st.text(min_size=1).filter(lambda text: not set(text) & {"\0"}))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_password_survives_its_way_into_the_url(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        password.encode()
    except UnicodeEncodeError:
        return
    monkeypatch.setenv("CACHE_TOKEN", password)
    for url in ("redis://h:7/2?password_env=CACHE_TOKEN&a=b", "unix:///tmp/s?password_env=CACHE_TOKEN"):
        resolved = resolve_store_url(url)
        assert parse_url(resolved)["password"] == password
        assert resolve_store_url(resolved) == resolved  # what is resolved stays as it is


def test_user_port_database_and_other_options_are_kept(ways: dict[str, str]) -> None:
    resolved = resolve_store_url("rediss://me@[::1]:7/2?socket_timeout=3&password_env=CACHE_TOKEN&ssl_cert_reqs=none")
    options = parse_url(resolved)
    del options["connection_class"]
    assert options == {
        "username": "me",
        "password": AWKWARD,
        "host": "::1",
        "port": 7,
        "db": 2,
        "socket_timeout": 3.0,
        "ssl_cert_reqs": "none",
    }


def test_the_environment_gives_a_password_to_a_url_that_says_nothing_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_store_url("redis://h") == "redis://h"
    monkeypatch.setenv("SMLT_STORE_PASSWORD", "word")
    assert resolve_store_url("redis://h") == "redis://:word@h"
    assert resolve_store_url("redis://me@h") == "redis://me:word@h"
    assert resolve_store_url("redis://:own@h") == "redis://:own@h"
    assert resolve_store_url("unix:///s?password=own") == "unix:///s?password=own"
    monkeypatch.delenv("SMLT_STORE_PASSWORD")
    monkeypatch.setenv("SMLT_STORE_PASSWORD_FILE", str(written(tmp_path / "p", "filed\r\n")))
    assert resolve_store_url("redis://h") == "redis://:filed@h"
    monkeypatch.setenv("SMLT_STORE_PASSWORD", "word")
    with pytest.raises(ConfigError, match="are both set: unset one"):
        resolve_store_url("redis://h")


def test_the_url_itself_may_be_in_a_file_or_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_store_url(None) is None
    path = written(tmp_path / "url", "redis://h?password_env=CACHE_TOKEN\n")
    monkeypatch.setenv("CACHE_TOKEN", "word")
    monkeypatch.setenv("SMLT_STORE_FILE", str(path))
    assert resolve_store_url(None) == "redis://:word@h"
    assert resolve_store_url(f"file://{path}") == "redis://:word@h"
    assert resolve_store_url("redis://other") == "redis://other"  # what is said comes before the environment
    monkeypatch.setenv("THE_URL", "redis://:word@h")
    assert resolve_store_url("env:THE_URL") == "redis://:word@h"


def test_tls_files_come_from_the_environment_unless_the_url_names_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CA_CERTS", "CERTFILE", "KEYFILE"):
        monkeypatch.setenv(f"SMLT_STORE_{name}", str(written(tmp_path / name.lower(), "x")))
    assert resolve_store_url("redis://h") == "redis://h"
    options = parse_url(resolve_store_url("rediss://h"))
    assert (options["ssl_ca_certs"], options["ssl_certfile"], options["ssl_keyfile"]) == (
        str(tmp_path / "ca_certs"),
        str(tmp_path / "certfile"),
        str(tmp_path / "keyfile"),
    )
    options = parse_url(resolve_store_url("rediss://h?ssl_certfile=/own"))
    assert options["ssl_certfile"] == "/own"
    assert "ssl_keyfile" not in options  # of another certificate
    (tmp_path / "ca_certs").unlink()
    with pytest.raises(ConfigError, match="SMLT_STORE_CA_CERTS: there is no file"):
        resolve_store_url("rediss://h")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://:hunter2@h?password_env=HIDDEN", "a password and password_env: leave one"),
        ("redis://h?password_file=/x&password_env=HIDDEN", "password_file and password_env: leave one"),
        ("redis://h?password_env=NOT_SET", "the environment variable NOT_SET is not set"),
        ("redis://h?password_file=/no/such", "password_file: /no/such cannot be read: No such file"),
        ("redis://h?password_file=/", "cannot be read: Is a directory"),
        ("redis://h?password_file=TWO", "does not hold one line"),
        ("redis://h?password_file=BINARY", "does not hold one line"),
        ("redis://h?password_file=EMPTY", "does not hold one line"),
        ("redis://h?password_secret=hunter2", "a secret URL begins with file:, env:, aws"),
        ("redis://h?password_secret=file://relative", "write file:///path"),
        ("redis://h?password_secret=aws-ssm://n?region=a&key=b", "write the '&' inside password_secret as %26"),
        ("redis://h?password_secret=aws-ssm://n?other=a", r"write aws-ssm://NAME\[\?region"),
        ("env:HIDDEN", "the URL in env:HIDDEN must begin with redis://"),  # a password where a URL was expected
        ("env:BROKEN", "the URL cannot be read"),
        ("file://WORD", "must begin with redis://"),
    ],
)
def test_what_cannot_be_read_is_named_and_no_secret_shown(
    url: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN", "hunter2")
    monkeypatch.setenv("BROKEN", "redis://:hunter2/a@h")
    for name, content in {"TWO": b"hunter2\nx", "BINARY": b"hunter2\xff", "EMPTY": b"\n", "WORD": b"hunter2\n"}.items():
        (tmp_path / name).write_bytes(content)
        url = url.replace(name, str(tmp_path / name))
    with pytest.raises(ConfigError, match=told) as caught:
        ParameterStore(url, job="x")
    assert "hunter2" not in everything_of(caught.value)


def everything_of(error: BaseException) -> str:
    """Its traceback, and the repr and attributes of it and of all that it hangs together with."""
    text, seen, todo = "".join(traceback.format_exception(error)), set[int](), [error]
    while todo:
        link = todo.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        text += repr(link) + repr(link.args) + repr(vars(link))
        todo += [other for other in (link.__cause__, link.__context__) if other is not None]
    return text


def test_who_else_can_read_a_secret_file_is_noted(tmp_path: Path) -> None:
    path = written(tmp_path / "p", "hunter2", 0o644)
    found = find_store(f"redis://h?password_file={path}")
    assert found is not None
    assert found.warnings == (f"{path} can be read by others (mode 644): chmod 600 {path}",)
    assert found.password_from == f"the file {path} (password_file)"
    assert "hunter2" not in repr(found) + str(found)


def test_both_planes_use_what_was_found(
    store: EmbeddedStore, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password, _, address = store.tcp_url.removeprefix("redis://:").partition("@")
    path = written(tmp_path / "p", password + "\n")
    workers = Group(f"redis://{address}?password_file={path}", job, 2)
    try:
        for result in workers.run(lambda comm: comm.allreduce(np.full(9, comm.rank, "f4"))):
            np.testing.assert_array_equal(result, np.full(9, 0.5, "f4"))
    finally:
        workers.close()
    monkeypatch.setenv("SMLT_STORE_FILE", str(written(tmp_path / "url", f"redis://{address}")))
    monkeypatch.setenv("SMLT_STORE_PASSWORD", password)
    try:
        first = smlt.init(job=job, rank=0, world_size=1)
        assert first.parameter_store is not None
        assert first.parameter_store.check().product
        assert smlt.init(job=job, rank=0, world_size=1) is first  # a warm sandbox stays connected
    finally:
        smlt.finalize()


def test_a_user_with_an_awkward_password_is_let_in_by_both_planes(
    store: EmbeddedStore, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_TOKEN", AWKWARD)
    with contextlib.closing(ParameterStore(store.url, job=job)) as admin:
        admin.client.acl_setuser("odd", enabled=True, passwords=["+" + AWKWARD], keys=["*"], channels=["*"], commands=["+@all"])
        try:
            urls = [
                f"redis://odd@{store.tcp_url.partition('@')[2]}?password_env=CACHE_TOKEN",
                store.url.partition("?")[0].replace("unix://", "unix://odd@") + "?password_secret=env:CACHE_TOKEN",
            ]

            def meet(rank: int) -> Any:
                with smlt.Communicator(urls[rank], job=job, rank=rank, world_size=2, timeout_s=20) as comm:
                    return comm.allreduce(rank, op="sum")

            outcomes = in_parallel([lambda: meet(0), lambda: meet(1)])
            assert [(outcome.value, outcome.error) for outcome in outcomes] == [(1, None)] * 2
        finally:
            admin.client.acl_deluser("odd")


def test_no_repr_shows_the_password(store: EmbeddedStore) -> None:
    password = store.tcp_url.removeprefix("redis://:").partition("@")[0]
    config = WorkerConfig("r", "j", 0, 1, "/o", "s.py", 1, 1, store_url=store.tcp_url)
    parameters = ParameterStore(store.tcp_url, job="x")
    shown = repr(config) + str(config) + repr(parameters) + str(parameters) + repr(parameters.client)
    assert password not in shown
    assert WorkerConfig.from_json(config.to_json()) == config
    assert "ParameterStore job='x' at redis://127.0.0.1:" in shown


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@{address}", "redis://hunter2:hunter2@{address}", "redis://:hunter2@127.0.0.1:1"]
)
def test_no_error_of_the_store_has_the_password_in_its_chain(store: EmbeddedStore, url: str) -> None:
    url = url.format(address=store.tcp_url.partition("@")[2])
    for attempt in (
        lambda: ParameterStore(url, job="x", timeout_s=1, retries=0).check(),
        lambda: smlt.collective.connection.Connections(timeout_s=1).open([url]),
    ):
        with pytest.raises(SmltError) as caught:
            attempt()
        assert "hunter2" not in everything_of(caught.value)


# ---- AWS: moto stands in, no real service is asked ----


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with moto.mock_aws():
        yield boto3


def test_secrets_of_aws(aws: Any) -> None:
    manager = aws.client("secretsmanager")
    manager.create_secret(Name="team/plain", SecretString=AWKWARD)
    manager.create_secret(Name="json", SecretString=json.dumps({"password": AWKWARD, "port": 7}))
    manager.create_secret(Name="url", SecretString="redis://:word@h")
    manager.create_secret(Name="binary", SecretBinary=b"hunter2")
    aws.client("ssm", "us-east-1").put_parameter(Name="/team/store", Value=AWKWARD, Type="SecureString")
    for url in (
        "redis://h?password_secret=aws-secretsmanager://team/plain",
        "redis://h?password_secret=aws-secretsmanager://json?key=password",
        "redis://h?password_secret=aws-secretsmanager://json%3Fregion=eu-west-1%26key=password",
        "redis://h?password_secret=aws-ssm://team/store?region=us-east-1",
        "redis://h?password_secret=aws-ssm:///team/store?region=us-east-1",
    ):
        assert parse_url(resolve_store_url(url)) == {"host": "h", "password": AWKWARD}, url
    assert resolve_store_url("aws-secretsmanager://url") == "redis://:word@h"
    for name, told in {
        "json": "is a JSON object: say which value",
        "json?key=port": "text at 'port'",
        "json?key=no": "text at 'no'",
        "binary": "it is binary",
    }.items():
        with pytest.raises(ConfigError, match=told) as caught:
            read_secret(f"aws-secretsmanager://{name}")
        assert AWKWARD not in everything_of(caught.value)


def test_a_secret_that_aws_does_not_give_is_an_error_of_authorization(aws: Any) -> None:
    with pytest.raises(StoreAuthError, match="secret aws-secretsmanager://none: AWS answered ResourceNotFoundException"):
        read_secret("aws-secretsmanager://none")
    with pytest.raises(StoreAuthError, match="secret aws-ssm://none: AWS answered ParameterNotFound"):
        read_secret("aws-ssm://none")


def test_aws_is_asked_once_in_a_while_and_not_at_every_call(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = aws.client("secretsmanager")
    manager.create_secret(Name="s", SecretString="first")
    assert read_secret("aws-secretsmanager://s") == "first"
    manager.put_secret_value(SecretId="s", SecretString="second")
    assert read_secret("aws-secretsmanager://s") == "first"
    monkeypatch.setattr("smlt.store.secrets.KEPT_S", 0)
    assert read_secret("aws-secretsmanager://s") == "second"


def test_without_boto3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'smlt\[aws\]'"):
        read_secret("aws-ssm://x")


def test_neither_a_region_nor_credentials_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("boto3")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no region"):
        read_secret("aws-ssm://x")
    with pytest.raises(StoreAuthError, match="no AWS credentials"):
        read_secret("aws-ssm://x?region=eu-west-1")


def test_the_certificate_of_an_authority_may_come_from_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    pem = trustme.CA().cert_pem.bytes().decode()
    monkeypatch.setenv("CA", pem)
    resolved = resolve_store_url("rediss://:p@h:7?ssl_ca_secret=env:CA&socket_timeout=3")
    path = Path(parse_url(resolved)["ssl_ca_certs"])
    assert path.read_text() == pem
    assert path.parent.stat().st_mode & 0o777 == 0o700  # nobody else can put another one there
    assert parse_url(resolved)["socket_timeout"] == 3.0
    assert resolve_store_url(resolved) == resolved
    assert resolve_store_url("rediss://h?ssl_ca_secret=env:CA") == f"rediss://h?ssl_ca_certs={path}"  # one file for one
    monkeypatch.setenv("SMLT_STORE_CA_CERTS", "/nonexistent")  # what the URL says comes before the environment
    assert str(path) in resolve_store_url("rediss://h?ssl_ca_secret=env:CA")


def test_the_file_of_an_authority_goes_with_its_process(tmp_path: Path) -> None:
    script = "from smlt.store.secrets import resolve_store_url as r; print(r('rediss://h?ssl_ca_secret=env:CA'))"
    environment = {**os.environ, "CA": trustme.CA().cert_pem.bytes().decode(), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"rediss://h?ssl_ca_certs={tmp_path}/smlt-ca-")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h?ssl_ca_secret=env:CA", "ssl_ca_secret is for rediss:// URLs"),
        ("rediss://h?ssl_ca_secret=env:CA&ssl_ca_certs=/x", "ssl_ca_secret and ssl_ca_certs: leave one of them"),
        ("rediss://h?ssl_ca_secret=env:CA&key=x", "write the '&' inside ssl_ca_secret as %26"),
        ("rediss://h?ssl_ca_secret=env:CA", "holds no certificate in PEM form"),
        ("rediss://h?ssl_ca_secret=/etc/ca.pem", "a secret URL begins with"),
    ],
)
def test_an_authority_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    monkeypatch.setenv("CA", "certainly not")
    with pytest.raises(ConfigError) as raised:
        resolve_store_url(url)
    assert said in str(raised.value)
    assert "certainly" not in str(raised.value)
