"""What `smlt deploy` was asked for, checked before AWS hears of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from smlt.client.deployment.names import Place, RoleName, check_function_name
from smlt.errors import ConfigError
from smlt.store.url import check_url, endpoints, is_local, redact

#: https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html, of these the ones that SMLT runs on.
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = ("x86_64", "arm64")
#: A whole CPU: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
ONE_CPU_MB = 1769
#: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
MEMORY_MB, TIMEOUT_S, TMP_MB, ENVIRONMENT_BYTES = (128, 10240), (1, 900), (512, 10240), 4096
#: https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutRetentionPolicy.html
LOG_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
HANDLER = "smlt.worker.handler.handler"
SECRETS = ("aws-secretsmanager", "aws-ssm")
_IMAGE = re.compile(r"[\w.-]+(?::\d+)?/[\w./-]+(?::[\w.-]+|@sha256:[0-9a-f]{64})")
#: https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html: AWS_ is Lambda's own.
_RESERVED = re.compile(r"AWS_.*|LAMBDA_.*|_.*")


@dataclass(frozen=True)
class Secret:
    """A secret that the function reads: the service, its name or ARN, and the region when it is not the function's."""

    scheme: str
    name: str
    region: str | None = None


@dataclass(frozen=True)
class DeployRequest:
    """A function as it shall be. Made by hand it is not checked: `check` does that.

    `role`: of the function. `layer`: a zip, a layer version's ARN, or None. `image`: a container image's URI instead of a zip
    and a layer. `no_layer`: the package brings SMLT along. `store`: goes to SMLT_STORE.
    """

    function: str
    place: Place
    package: Path
    role: RoleName
    extras: tuple[str, ...] = ()
    layer: str | None = None
    image: str | None = None
    no_layer: bool = False
    python: str = ""
    arch: str = "x86_64"
    memory_mb: int = ONE_CPU_MB
    timeout_s: int = 900
    tmp_mb: int = 512
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    store: str | None = None
    handler: str = HANDLER
    create_bucket: bool = False
    create_role: bool = False
    log_days: int = 14

    @property
    def runtime(self) -> str:
        """Lambda's name of it: "python3.12"."""
        return f"python{self.python}"

    def check(self) -> DeployRequest:
        """The request itself. ConfigError for the first value that Lambda would refuse."""
        check_function_name(self.function)
        self._check_choices()
        for option, value, unit, (least, most) in (
            ("--memory", self.memory_mb, "MB", MEMORY_MB),
            ("--timeout", self.timeout_s, "s", TIMEOUT_S),
            ("--tmp", self.tmp_mb, "MB", TMP_MB),
        ):
            if not least <= value <= most:
                raise ConfigError(f"{option} {value}: Lambda takes {least} to {most} {unit}")
        if self.log_days not in LOG_DAYS:
            raise ConfigError(f"--log-days {self.log_days}: CloudWatch takes {', '.join(map(str, LOG_DAYS))}")
        if bool(self.subnets) != bool(self.security_groups):
            raise ConfigError("--subnet and --security-group go together: give both, or none")
        for option, values, pattern in (
            ("--subnet", self.subnets, r"subnet-[0-9a-z]+"),
            ("--security-group", self.security_groups, r"sg-[0-9a-zA-Z]+"),
        ):
            for text in values:
                if not re.fullmatch(pattern, text):
                    raise ConfigError(f"{option} {text!r}: it looks like {pattern.partition('[')[0]}0123456789abcdef0")
        if self.image is None and not re.fullmatch(r"[A-Za-z0-9_./-]{1,128}", self.handler):
            raise ConfigError(f"--handler {self.handler!r}: give MODULE.FUNCTION")
        self._check_environment()
        if self.store is not None:
            store_secrets(self.store)
        return self

    def _check_choices(self) -> None:
        if self.python not in PYTHONS:
            raise ConfigError(f"--python {self.python!r}: Lambda and SMLT have {', '.join(PYTHONS)}")
        if self.arch not in ARCHITECTURES:
            raise ConfigError(f"--arch {self.arch!r}: Lambda has {' and '.join(ARCHITECTURES)}")
        chosen = [
            name for name, given in (("--layer", self.layer), ("--image", self.image), ("--no-layer", self.no_layer)) if given
        ]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)}: give one of them")
        if self.image is not None and self.extras:
            raise ConfigError("--with and --image: install what is needed in the image")
        if self.image is not None and not re.fullmatch(
            r"[\w.-]+(?::\d+)?/[\w./-]+(?::[\w.-]+|@sha256:[0-9a-f]{64})", self.image
        ):
            raise ConfigError(
                f"--image {self.image!r}: give ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME:TAG or ...@sha256:DIGEST"
            )

    def _check_environment(self) -> None:
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
                raise ConfigError(f"--env {name!r}: a name begins with a letter and holds letters, digits and '_'")
            if _RESERVED.fullmatch(name) or name in ("SMLT_OBJECT_STORE", "SMLT_STORE"):
                raise ConfigError(f"--env {name}: it is set by {'deploy' if name.startswith('SMLT') else 'Lambda itself'}")
        if sum(len(name) + len(value.encode()) for name, value in self.environment.items()) > ENVIRONMENT_BYTES:
            raise ConfigError(f"--env: all variables together may have {ENVIRONMENT_BYTES} bytes")


def default_python() -> str:
    """The version of this interpreter. ConfigError when Lambda does not have it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version not in PYTHONS:
        raise ConfigError(f"Lambda has no Python {version}: give --python {' or '.join(PYTHONS)}")
    return version


def parse_environment(pairs: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dict. ConfigError for one without '='; its text may be a secret and is not shown."""
    found: dict[str, str] = {}
    for number, pair in enumerate(pairs, 1):
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise ConfigError(f"--env: the {number}. one is not NAME=VALUE")
        found[name] = value
    return found


def store_secrets(store: str) -> tuple[Secret, ...]:
    """The secrets that a store's URL leads to from within a function: of each node none or one.

    ConfigError when the URL holds a password itself (everybody who may read the function's configuration would see it), or
    leads to a place that a function does not have.
    """
    if urlsplit(store).scheme in SECRETS:
        return (_secret(store),)
    check_url(store)
    return tuple(dict.fromkeys(secret for node in endpoints(store) for secret in _node_secrets(node)))


def _node_secrets(store: str) -> tuple[Secret, ...]:
    parts = urlsplit(store)
    options = {name: unquote(value) for name, _, value in (option.partition("=") for option in parts.query.split("&"))}
    if parts.password or options.get("password"):
        raise ConfigError(
            f"--store {redact(store)}: a password in the URL would stand in the function's configuration; keep it in a "
            "secret and write ?password_secret=aws-secretsmanager://NAME"
        )
    if is_local(store):
        raise ConfigError(f"--store {redact(store)}: a function cannot reach that; give the store's address in its network")
    for name in ("password_file", "password_env"):
        if name in options:
            raise ConfigError(
                f"--store {redact(store)}: a function does not have your {name}; write ?password_secret=aws-ssm://NAME"
            )
    if "password_secret" not in options:
        return ()
    if urlsplit(options["password_secret"]).scheme not in SECRETS:
        raise ConfigError(
            f"--store {redact(store)}: password_secret begins with {' or '.join(f'{name}://' for name in SECRETS)}"
        )
    return (_secret(options["password_secret"]),)


def _secret(url: str) -> Secret:
    scheme, host, path, query, _ = urlsplit(url)
    options = {name: unquote(value) for name, _, value in (option.partition("=") for option in query.split("&"))}
    name = unquote(f"{host}{path}").strip("/")
    if not re.fullmatch(r"[\w/+=.@:-]{1,512}", name, re.ASCII):
        raise ConfigError(f"--store: write {scheme}://NAME[?region=REGION&key=KEY]")
    return Secret(scheme, name, options.get("region"))
