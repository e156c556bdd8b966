"""What is deployed: a function as moto's Lambda keeps it, taken out as one immutable value when it is invoked."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Runtime and architecture that functions must have here: those of the interpreter that runs the emulator.
RUNTIME = f"python{sys.version_info.major}.{sys.version_info.minor}"
ARCHITECTURE = {"aarch64": "arm64", "arm64": "arm64"}.get(platform.machine().lower(), "x86_64")

#: The handler of an image whose configuration names no command.
DEFAULT_IMAGE_HANDLER = "smlt.worker.handler.handler"


@dataclass(frozen=True)
class Archive:
    """A zip as it was uploaded, with the SHA-256 (hex) of its bytes."""

    sha256: str
    content: bytes = field(repr=False, compare=False)


@dataclass(frozen=True)
class Function:
    """One version of a function, with everything its sandboxes need. Sizes in MB, times in seconds."""

    name: str
    arn: str
    invoked_arn: str
    version: str
    region: str
    account: str
    role: str
    handler: str
    runtime: str
    architecture: str
    memory_mb: int
    timeout_s: int
    ephemeral_mb: int
    image: str | None
    environment: Mapping[str, str] = field(repr=False)
    code: Archive
    layers: tuple[Archive, ...]
    reserved: int | None
    retries: int
    maximum_age_s: int

    @property
    def log_group(self) -> str:
        """The CloudWatch Logs group that its sandboxes write to."""
        return f"/aws/lambda/{self.name}"

    @property
    def key(self) -> tuple[str, str]:
        """What its sandboxes are kept under: they are shared by everyone who invokes this version."""
        return self.arn, self.version

    @property
    def fingerprint(self) -> str:
        """Differs when a sandbox made before must not be used any more: other code or configuration."""
        parts = (
            self.code.sha256,
            [layer.sha256 for layer in self.layers],
            sorted(self.environment.items()),
            *(self.role, self.handler, self.runtime, self.architecture, self.memory_mb, self.timeout_s, self.ephemeral_mb),
            self.image,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def runs_here(self) -> str | None:
        """None, or one sentence why this machine cannot run it."""
        if self.architecture != ARCHITECTURE:
            return (
                f"lambda-local runs {ARCHITECTURE} on this machine, and function {self.name} is made for {self.architecture}: "
                f"deploy it with --architecture {ARCHITECTURE} to try it here"
            )
        if self.image is None and self.runtime != RUNTIME:
            return (
                f"lambda-local runs in {RUNTIME}, and function {self.name} wants {self.runtime or 'no runtime'}: "
                f"start lambda-local in an environment of that version, or deploy with --runtime {RUNTIME}"
            )
        return None


class FunctionNotFoundError(LookupError):
    """There is no such function, version or alias; the message is Lambda's."""


def find_function(name_or_arn: str, qualifier: str | None, region: str, account: str) -> Function:
    """The function as moto has it now. Raises FunctionNotFoundError."""
    from moto.awslambda.exceptions import UnknownFunctionException
    from moto.awslambda.models import lambda_backends

    if name_or_arn.startswith("arn:"):
        region, account, name_or_arn = _split(name_or_arn)
    elif name_or_arn.count(":") == 2:  # a partial ARN: 123456789012:function:name
        account, _, name_or_arn = name_or_arn.split(":")
    name, _, qualified = name_or_arn.partition(":")
    qualifier = qualified or qualifier or None
    storage = lambda_backends[account][region]
    try:
        found = storage.get_function(name, qualifier)
        latest = storage.get_function(name)
    except UnknownFunctionException as error:
        raise FunctionNotFoundError(str(error.message)) from None
    if found is None:
        raise FunctionNotFoundError(f"Function not found: arn:aws:lambda:{region}:{account}:function:{name}")
    return _taken(found, latest, storage, qualifier)


def _split(arn: str) -> tuple[str, str, str]:
    parts = arn.split(":")
    if len(parts) not in (7, 8) or parts[2] != "lambda" or parts[5] != "function":
        raise FunctionNotFoundError(f"Function not found: {arn}")
    return parts[3], parts[4], ":".join(parts[6:])


def _taken(found: Any, latest: Any, storage: Any, qualifier: str | None) -> Function:
    arn = f"arn:aws:lambda:{found.region}:{found.account_id}:function:{found.function_name}"
    is_image = found.package_type == "Image"
    command = found.image_config.cmd if is_image else []
    content = b"" if is_image else getattr(found, "code_bytes", b"")
    layers = [storage.layers_versions_by_arn(layer["Arn"]) for layer in found.layers]
    reserved = latest.reserved_concurrency if latest is not None else None
    # moto appends a configuration each time one is put: the last one counts.
    asynchronous = found.event_invoke_config[-1].config if found.event_invoke_config else {}
    return Function(
        name=found.function_name,
        arn=arn,
        invoked_arn=f"{arn}:{qualifier}" if qualifier else arn,
        version=str(found.version),
        region=found.region,
        account=found.account_id,
        role=found.role,
        handler=(command[0] if command else DEFAULT_IMAGE_HANDLER) if is_image else found.handler or "",
        runtime="" if is_image else found.run_time or "",
        architecture=found.architectures[0],
        memory_mb=int(found.memory_size),
        timeout_s=int(found.timeout),
        ephemeral_mb=int(found.ephemeral_storage),
        image=found.code.get("ImageUri", "") if is_image else None,
        environment={key: str(value) for key, value in (found.environment_vars or {}).items()},
        code=Archive(_hex(found.code_sha_256), content) if not is_image else Archive("", b""),
        layers=tuple(Archive(_hex(layer.code_sha_256), layer.code_bytes) for layer in layers if layer),
        reserved=None if reserved is None else int(reserved),
        retries=int(asynchronous.get("MaximumRetryAttempts", 2)),
        maximum_age_s=int(asynchronous.get("MaximumEventAgeInSeconds", 21600)),
    )


def _hex(base64_digest: str) -> str:
    """moto has taken the SHA-256 when the zip was uploaded."""
    return base64.b64decode(base64_digest).hex()
