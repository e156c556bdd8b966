"""Where the store's password and TLS material come from, when they do not stand in the URL itself.

The password is taken from the first of these that is there:

    the URL            redis://:password@host, with %2F %3F %23 %40 %25 for / ? # @ %
    ?password_file=    a file, as orchestrators mount secrets: redis://host?password_file=/run/secrets/store
    ?password_env=     an environment variable: redis://host?password_env=CACHE_TOKEN
    ?password_secret=  a secret URL; its own '&' is written %26
    SMLT_STORE_PASSWORD, SMLT_STORE_PASSWORD_FILE   for a URL that says nothing of a password

The URL itself may be a secret: `--store` (SMLT_STORE) takes a secret URL, and SMLT_STORE_FILE names a file that holds
the URL. A secret URL is one of

    file:///run/secrets/store
    env:NAME
    aws-secretsmanager://NAME[?region=eu-west-1&key=password]   key: of a secret that is a JSON object
    aws-ssm://NAME[?region=eu-west-1&key=password]              Parameter Store, decrypted

Of several nodes each is looked up for itself; of a cluster's, the first one's user, password and options hold for all.

    ?ssl_ca_secret=aws-secretsmanager://NAME%3Fkey=ca

is where a rediss:// URL finds the certificate of a private authority as PEM text: for functions, which have no file of it.
SMLT_STORE_CA_CERTS, SMLT_STORE_CERTFILE and SMLT_STORE_KEYFILE are the defaults of ssl_ca_certs, ssl_certfile and
ssl_keyfile in a rediss:// URL. One line break at the end of a file is not part of a secret.

No message holds a secret, and none of what is raised here has a cause that does.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import ssl
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload
from urllib.parse import parse_qs, quote, unquote, urlsplit

from smlt.errors import ConfigError, StoreAuthError, StoreUnavailable
from smlt.store.url import SCHEMES, SCHEMES_TOLD, check_url, endpoints, redact

SECRET_SCHEMES = ("file", "env", "aws-secretsmanager", "aws-ssm")
#: What AWS answered is kept so long, as its own caching clients do: a warm function does not ask at every call.
#: https://docs.aws.amazon.com/secretsmanager/latest/userguide/retrieving-secrets_lambda.html
KEPT_S = 300.0
#: Variables that hold the store's password or lead to it.
VARIABLES = ("SMLT_STORE", "SMLT_STORE_FILE", "SMLT_STORE_PASSWORD", "SMLT_STORE_PASSWORD_FILE")
_TLS_DEFAULTS = {
    "ssl_ca_certs": "SMLT_STORE_CA_CERTS",
    "ssl_certfile": "SMLT_STORE_CERTFILE",
    "ssl_keyfile": "SMLT_STORE_KEYFILE",
}
_PASSWORD_OPTIONS = ("password_file", "password_env", "password_secret")

_kept: dict[str, tuple[float, str]] = {}
_authorities: dict[str, str] = {}  # the file of each authority's certificate


@dataclass(frozen=True)
class StoreAddress:
    """A store's URL with all that was looked up for it, and where that came from."""

    url: str = field(repr=False)
    password_from: str = ""  # "" when there is no password
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return redact(self.url)


@overload
def resolve_store_url(url: str) -> str: ...
@overload
def resolve_store_url(url: str | None) -> str | None: ...
def resolve_store_url(url: str | None) -> str | None:
    """The URL as redis-py takes it, its password in it; None when there is neither a URL nor SMLT_STORE_FILE.

    What has been resolved once stays as it is. Raises ConfigError for what cannot be read, StoreAuthError when a secret
    manager refuses or has no such secret, StoreUnavailable when it does not answer.
    """
    found = find_store(url)
    return found.url if found is not None else None


def find_store(url: str | None) -> StoreAddress | None:
    """As `resolve_store_url`, and where the password came from."""
    where, warnings = "the URL", list[str]()
    if url is None:
        path = os.environ.get("SMLT_STORE_FILE")
        if not path:
            return None
        where = f"the URL in the file {path} (SMLT_STORE_FILE)"
        url = _from_file(path, "SMLT_STORE_FILE", warnings)
    elif _scheme(url) in SECRET_SCHEMES:
        where, url = f"the URL in {_shown(url)}", read_secret(url, warnings)
    if where != "the URL" and _scheme(url) not in SCHEMES:  # not shown: it may be the password alone
        raise ConfigError(f"{where} must begin with {SCHEMES_TOLD}; it may hold nothing but the URL")
    check_url(url)
    nodes = [_resolved(part, where, warnings) for part in endpoints(url)]
    origins = list(dict.fromkeys(node.password_from for node in nodes if node.password_from))
    return StoreAddress(",".join(node.url for node in nodes), " and ".join(origins), tuple(dict.fromkeys(warnings)))


def _resolved(url: str, where: str, warnings: list[str]) -> StoreAddress:
    parts = urlsplit(url)
    raw = [option for option in parts.query.split("&") if option]
    options = {name: unquote(value) for name, _, value in (option.partition("=") for option in raw)}
    kept = [option for option in raw if option.partition("=")[0] not in (*_PASSWORD_OPTIONS, "ssl_ca_secret")]
    asked = [name for name in _PASSWORD_OPTIONS if name in options]
    given = bool(parts.password or options.get("password"))
    if len(asked) + given > 1:
        named = " and ".join([*(["a password"] if given else []), *asked])
        raise ConfigError(f"store {redact(url)!r}: the URL has {named}: leave one of them")
    password = None
    for name in ("password_secret", "ssl_ca_secret"):
        if name in options and {"region", "key"} & options.keys():
            raise ConfigError(f"store {redact(url)!r}: write the '&' inside {name} as %26")
    if asked:
        value = options[asked[0]]
        if asked[0] == "password_file":
            where, password = f"the file {value} (password_file)", _from_file(value, "password_file", warnings)
        elif asked[0] == "password_env":
            where, password = f"the variable {value} (password_env)", _from_variable(value, "password_env")
        else:
            where, password = f"{_shown(value)} (password_secret)", read_secret(value, warnings)
    elif not given:
        where, password = _default_password(warnings)
    if password is not None:
        # Into the authority: releases of redis-py differ in how they unquote options.
        user, host = parts.username or "", parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
    if "ssl_ca_secret" in options:
        kept.append(_authority(url, parts.scheme, options))
        options["ssl_ca_certs"] = ""
    if parts.scheme.startswith("rediss"):
        kept += _tls_options(options)
    # Not geturl(): it drops the // of unix:///path.
    query = f"?{'&'.join(kept)}" if kept else ""
    return StoreAddress(f"{parts.scheme}://{parts.netloc}{parts.path}{query}", where, tuple(warnings))


def _default_password(warnings: list[str]) -> tuple[str, str | None]:
    password, path = os.environ.get("SMLT_STORE_PASSWORD"), os.environ.get("SMLT_STORE_PASSWORD_FILE")
    if password and path:
        raise ConfigError("SMLT_STORE_PASSWORD and SMLT_STORE_PASSWORD_FILE are both set: unset one")
    if password:
        return "the variable SMLT_STORE_PASSWORD", password
    if path:
        return f"the file {path} (SMLT_STORE_PASSWORD_FILE)", _from_file(path, "SMLT_STORE_PASSWORD_FILE", warnings)
    return "", None


def _tls_options(options: Mapping[str, str]) -> list[str]:
    """The options of a rediss:// URL that come from the environment."""
    # A key without its certificate, or another certificate than the URL's, is of no use: these two go together.
    names = [name for name in _TLS_DEFAULTS if name not in options]
    if "ssl_certfile" in options:
        names = [name for name in names if name != "ssl_keyfile"]
    found = []
    for name in names:
        path = os.environ.get(_TLS_DEFAULTS[name])
        if path:
            if not os.path.isfile(path):
                raise ConfigError(f"{_TLS_DEFAULTS[name]}: there is no file {path}")
            found.append(f"{name}={quote(path)}")
    return found


def _authority(url: str, scheme: str, options: Mapping[str, str]) -> str:
    """The option that names a file with the certificate that `ssl_ca_secret` leads to."""
    if not scheme.startswith("rediss") or "ssl_ca_certs" in options:
        why = "is for rediss:// URLs" if not scheme.startswith("rediss") else "and ssl_ca_certs: leave one of them"
        raise ConfigError(f"store {redact(url)!r}: ssl_ca_secret {why}")
    secret = options["ssl_ca_secret"]
    text = read_secret(secret)
    if text not in _authorities:
        try:
            ssl.create_default_context(cadata=text)
        except (ssl.SSLError, ValueError):
            text = ""
        if not text:
            raise ConfigError(
                f"{_shown(secret)} (ssl_ca_secret) holds no certificate in PEM form; is the store still starting?"
            )
        # In a folder of this process's own, so that nobody puts another certificate in its place.
        folder = tempfile.mkdtemp(prefix="smlt-ca-")
        path = os.path.join(folder, "ca.pem")
        with open(path, "w") as file:
            file.write(text)
        atexit.register(_remove, folder, os.getpid())
        _authorities[text] = path
    return f"ssl_ca_certs={quote(_authorities[text])}"


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not a child that was forked off
        shutil.rmtree(folder, ignore_errors=True)


def without_store_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a child process that is given the store's URL by another way: what it runs may print its own."""
    return {name: value for name, value in environment.items() if name not in VARIABLES}


def read_secret(url: str, warnings: list[str] | None = None) -> str:
    """What the secret URL leads to. Raises as `resolve_store_url`; appends to `warnings` what a user should mend."""
    scheme = _scheme(url)
    if scheme == "env":
        return _from_variable(url.removeprefix("env:").removeprefix("//"), url)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"secret {_shown(url)}: write file:///path")
        return _from_file(unquote(parts.path), _shown(url), warnings if warnings is not None else [])
    if scheme in SECRET_SCHEMES:
        return _from_aws(url)
    # Not shown: a password that stands where its place was expected.
    raise ConfigError(f"a secret URL begins with {', '.join(f'{name}:' for name in SECRET_SCHEMES)}: this one does not")


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower() if ":" in url else ""


def _shown(url: str) -> str:
    """A secret URL names a place and holds no secret; its options are left out all the same."""
    return url.partition("?")[0]


def _from_variable(name: str, asked_by: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{asked_by}: the environment variable {name} is not set; export it, or change {asked_by}")
    return value


def _from_file(path: str, asked_by: str, warnings: list[str]) -> str:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(65536)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{asked_by}: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISREG(mode) and mode & 0o066:
        warnings.append(f"{path} can be read by others (mode {stat.S_IMODE(mode):o}): chmod 600 {path}")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""  # its error would quote the content
    text = text.removesuffix("\n").removesuffix("\r")
    if not text or any(character in text for character in "\r\n\0"):
        raise ConfigError(f"{asked_by}: {path} does not hold one line of UTF-8 text")
    return text


# ---- AWS ----


def _from_aws(url: str) -> str:
    since, value = _kept.get(url, (0.0, ""))
    if value and time.monotonic() - since < KEPT_S:
        return value
    parts = urlsplit(url)
    name = unquote(f"{parts.netloc}{parts.path}")
    options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    unknown = sorted(set(options) - {"region", "key"})
    if not name or unknown:
        raise ConfigError(f"secret {_shown(url)}: write {parts.scheme}://NAME[?region=REGION&key=KEY]")
    value = _part_of(_ask_aws(url, parts.scheme, name, options.get("region")), options.get("key"), url)
    _kept[url] = time.monotonic(), value
    return value


def _ask_aws(url: str, scheme: str, name: str, region: str | None) -> str:
    try:
        import boto3
        import botocore.exceptions
    except ImportError as error:
        raise ConfigError(f"secret {_shown(url)}: boto3 is not installed: pip install 'smlt[aws]'") from error
    try:
        answer: Any
        session = boto3.Session()  # not the process's own, which keeps the credentials of its first use
        if scheme == "aws-ssm":
            # A name with slashes begins with one: aws-ssm://path/name and aws-ssm:///path/name mean the same.
            name = f"/{name.lstrip('/')}" if "/" in name and not name.startswith("arn:") else name
            answer = session.client("ssm", region_name=region).get_parameter(Name=name, WithDecryption=True)
            return str(answer["Parameter"]["Value"])
        answer = session.client("secretsmanager", region_name=region).get_secret_value(SecretId=name.lstrip("/"))
        if "SecretString" not in answer:
            raise ConfigError(f"secret {_shown(url)}: it is binary; store it as text")
        return str(answer["SecretString"])
    except botocore.exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an error")
        raise StoreAuthError(
            f"secret {_shown(url)}: AWS answered {code}; look at its name, its region and the role's permission to read it"
        ) from error
    except botocore.exceptions.NoRegionError as error:
        raise ConfigError(f"secret {_shown(url)}: no region: add ?region=, or set AWS_REGION") from error
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise StoreAuthError(f"secret {_shown(url)}: this machine has no AWS credentials") from error
    except botocore.exceptions.BotoCoreError as error:
        raise StoreUnavailable(f"secret {_shown(url)}: AWS cannot be asked: {error}") from error


def _part_of(text: str, key: str | None, url: str) -> str:
    """The secret, or of a JSON object the value at `key`."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if key is None:
        if isinstance(value, dict):
            raise ConfigError(f"secret {_shown(url)}: it is a JSON object: say which value by ?key=")
        return text
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise ConfigError(f"secret {_shown(url)}: it is no JSON object with text at {key!r}")
    return str(value[key])
