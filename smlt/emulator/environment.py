"""What surrounds a handler: the runtime folder of a zip function, the interpreter, and Lambda's environment variables."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from smlt.emulator.functions import RUNTIME, Function
from smlt.errors import ConfigError

#: What Lambda's Python runtime ships beside the standard library: its client, and boto3 with what it needs
#: (https://docs.aws.amazon.com/lambda/latest/dg/lambda-python.html#python-sdk-included).
SHIPPED = (
    *("awslambdaric", "simplejson", "snapshot-restore-py"),
    *("boto3", "botocore", "s3transfer", "jmespath", "python-dateutil", "six", "urllib3"),
)


def make_runtime_folder(folder: Path) -> Path:
    """Fill `folder` with links to what Lambda's runtime ships, taken from the environment that the emulator runs in.

    Raises ConfigError when a part is not installed.
    """
    folder.mkdir(parents=True)
    for name in SHIPPED:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"the package {name} is not installed: pip install 'smlt[lambda-local]'") from None
        for top in {Path(str(file)).parts[0] for file in distribution.files or ()}:
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def base_interpreter() -> str:
    """The interpreter below the virtual environment, with the standard library alone."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def image_interpreter(prefix: Path) -> str:
    """The interpreter of the Python environment that stands for an image. Raises ConfigError when there is none."""
    python = Path(sys.executable) if prefix == Path(sys.prefix) else prefix / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"{prefix} is no Python environment: there is no {python}; look at --image")
    return str(python)


def check_image_environment(prefix: Path) -> None:
    """Raise ConfigError when functions cannot run in the environment, as an image without the runtime client could not."""
    tried = subprocess.run([image_interpreter(prefix), "-c", "import awslambdaric"], capture_output=True, check=False)
    if tried.returncode:
        raise ConfigError(
            f"{prefix} has no awslambdaric, which each image needs: {prefix}/bin/python -m pip install awslambdaric"
        )


def sandbox_environment(
    function: Function, *, runtime_api: str, endpoint_url: str, credentials: Mapping[str, str], log_stream: str, tmp: Path
) -> dict[str, str]:
    """The variables that Lambda sets, with the function's own; of the host's only PATH and the language.

    https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html#configuration-envvars-runtime
    """
    execution = f"AWS_Lambda_{function.runtime}" if function.image is None else "AWS_Lambda_Image"
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "en_US.UTF-8",
        **function.environment,
        **credentials,
        "TZ": ":UTC",
        "TMPDIR": str(tmp),
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_REGION": function.region,
        "AWS_DEFAULT_REGION": function.region,
        "AWS_EXECUTION_ENV": execution,
        "AWS_LAMBDA_RUNTIME_API": runtime_api,
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": function.version,
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory_mb),
        "AWS_LAMBDA_LOG_GROUP_NAME": function.log_group,
        "AWS_LAMBDA_LOG_STREAM_NAME": log_stream,
        "_HANDLER": function.handler,
    }


def python_path(task: Path, opt: Path, runtime: Path, own: str | None) -> str:
    """The search path of a zip function: its code, its layers, then what the runtime ships."""
    parts = [str(task), str(opt / "python" / "lib" / RUNTIME / "site-packages"), str(opt / "python"), str(runtime)]
    return os.pathsep.join([own, *parts] if own else parts)


@functools.lru_cache(maxsize=1024)
def role_credentials(role: str, function: str, account: str, region: str, start: int) -> dict[str, str]:
    """Credentials of the function's role, from moto's STS. `start`: the emulator's, for each has its own accounts."""
    from moto.sts.models import sts_backends

    assumed = sts_backends[account]["aws"].assume_role(
        region_name=region, role_session_name=function, role_arn=role, policy="", duration=43200, external_id=""
    )
    return {
        "AWS_ACCESS_KEY_ID": assumed.access_key_id,
        "AWS_SECRET_ACCESS_KEY": assumed.secret_access_key,
        "AWS_SESSION_TOKEN": assumed.session_token,
    }
