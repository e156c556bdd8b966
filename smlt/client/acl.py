"""`smlt acl`: the rules of a store's user that may do what SMLT does with the keys of its own jobs, and nothing else.

https://valkey.io/topics/acl/ says how the rules are read; Redis 6.2 and newer read them alike.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from smlt.errors import ConfigError, StoreError

#: Every command that SMLT sends, as an ACL names it, those of its Lua scripts among them (they run with the user's
#: rights). AUTH needs no right. A test compares this with what a store has counted.
COMMANDS = (
    # The collectives (csrc/send.c).
    "exists",
    "mget",
    "pexpire",
    "set",
    "unlink",
    "xadd",
    "xread",
    "xtrim",
    # The greeting of a connection.
    "client|no-evict",
    "client|setinfo",
    "client|setname",
    "select",
    # The control plane (smlt/store/parameter.py).
    "del",
    "eval",
    "evalsha",
    "get",
    "hdel",
    "hexists",
    "hget",
    "hgetall",
    "hincrby",
    "hlen",
    "hset",
    "hsetnx",
    "info",
    "scan",
    "script|load",
    "xrange",
    # smlt doctor.
    "ping",
    "time",
    # Where a cluster's slots are (smlt/store/cluster.py).
    "cluster|slots",
)

#: Commands that a run may or may not come to, and when it does.
RARE = {
    "exists": "chunks that may be missing after a lost connection; workers that have stopped reporting",
    "xtrim": "the token streams of a long run",
    "xrange": "who is missing when a collective has timed out",
    "hexists": "a worker whose list of nodes is not the others'",
    "hgetall": "the roster, for diagnosis",
    "select": "a URL with a database number",
    "evalsha": "scripts by their hash, when the store knows them already",
    "script|load": "the same",
    "ping": "smlt doctor and its --tune",
    "time": "smlt doctor",
    "cluster|slots": "a cluster",
}


@dataclass(frozen=True)
class AclUser:
    """A user of the store: his name, what he may do, and the SHA-256 of his password."""

    name: str
    patterns: tuple[str, ...]
    password_sha256: str

    @property
    def access(self) -> str:
        """Keys and commands, as ElastiCache and MemoryDB take them for an "access string"."""
        keys = " ".join(f"~{pattern}" for pattern in self.patterns)
        return f"on {keys} -@all {' '.join(f'+{command}' for command in COMMANDS)}"

    @property
    def line(self) -> str:
        """The command that makes the user or replaces his rules. It may be logged: the password is in it as a hash only."""
        return f"ACL SETUSER {self.name} reset #{self.password_sha256} {self.access}"


def acl_user(name: str, jobs: Sequence[str], run_prefixes: Sequence[str], password: str) -> AclUser:
    """The user `name` for these jobs, and all whose names begin with one of `run_prefixes`.

    Raises ConfigError for names that cannot be, and when there is neither a job nor a prefix.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise ConfigError(f"--user {name!r}: use 1 to 64 letters, digits, '_', '-' and '.'")
    if name == "default":
        raise ConfigError("--user default: that is the administrator, who would lock himself out; choose another name")
    for option, values in (("--job", jobs), ("--run-prefix", run_prefixes)):
        for value in values:
            # A pattern's own characters (*, ?, [) are not among them.
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value):
                raise ConfigError(f"{option} {value!r}: use 1 to 64 letters, digits, '_' and '-'")
    if not jobs and not run_prefixes:
        raise ConfigError("give --job or --run-prefix: the user is limited to their keys")
    if not password:
        raise ConfigError("the password is empty")
    # A job's keys are smlt:{JOB.0}:..., on further nodes {JOB.1} or {JOB.1-a}; no job's name holds a dot: "JOB." is that
    # job alone.
    patterns = (*(f"smlt:{{{job}.*" for job in jobs), *(f"smlt:{{{prefix}*" for prefix in run_prefixes))
    return AclUser(name, patterns, sha256(password.encode()).hexdigest())


def password_of(variable: str | None, generate: Path | None) -> str:
    """The password in the environment variable, or a new one that is written to the file `generate`, which must be new.

    Raises ConfigError when there is neither or both, or the variable is not set, StoreError when the file cannot be made.
    """
    if (variable is None) == (generate is None):
        raise ConfigError("give --password-env NAME or --generate FILE, one of them")
    if variable is not None:
        password = os.environ.get(variable)
        if not password:
            raise ConfigError(f"--password-env: the environment variable {variable} is not set")
        return password
    assert generate is not None
    password = secrets.token_urlsafe(32)
    try:
        descriptor = os.open(generate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"--generate {generate}: there is such a file; remove it, or give another name") from None
    except OSError as error:
        raise StoreError(f"--generate {generate}: it cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(password + "\n")
    return password
