"""The account that a deployment goes to: its clients, and its errors as one sentence that names the missing right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smlt.client.deployment.names import Account
from smlt.client.deployment.rights import actions_of
from smlt.errors import DeployError
from smlt.store.aws import aws_client, error_code, is_denied, translated


class Cloud:
    """boto3's clients, one for each service, and whose account it is (asked once)."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._account: Account | None = None

    def client(self, service: str) -> Any:
        """The client for "lambda", "s3", "iam", "logs" or "sts". ConfigError without a region."""
        if service not in self._clients:
            # Lambda answers UpdateFunctionCode only when it has the whole package.
            self._clients[service] = aws_client(service, attempts=4, read_timeout=120)
        return self._clients[service]

    @property
    def account(self) -> Account:
        """DeployError when the credentials are none, unknown or expired, or AWS cannot be reached."""
        if self._account is None:
            region, client = self.region, self.client("sts")
            with asking("cannot ask AWS who you are"):
                caller = client.get_caller_identity()
            self._account = Account(caller["Account"], region, caller["Arn"].split(":")[1])
        return self._account

    @property
    def region(self) -> str:
        """The function's region, and that of all the rest."""
        return str(self.client("lambda").meta.region_name)


@contextmanager
def asking(doing: str) -> Iterator[None]:
    """Turn boto3's errors into DeployError: `doing` ("cannot create role x"), what happened, what to do."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, WaiterError

    try:
        yield
    except WaiterError as error:
        if "Error" in (error.last_response or {}):
            raise translated(ClientError(error.last_response, "GetFunction"), doing, DeployError) from error
        configuration = (error.last_response or {}).get("Configuration", {})
        reason = configuration.get("StateReason") or configuration.get("LastUpdateStatusReason") or str(error)
        raise DeployError(f"{doing}: {reason}") from error
    except ClientError as error:
        text = str(translated(error, doing))
        if is_denied(error):
            needed = " and ".join(actions_of(error.operation_name)) or error.operation_name
            text = f"{text}; it needs {needed}: `smlt policy` prints all that is needed"
        raise DeployError(text) from error
    except (BotoCoreError, Boto3Error) as error:
        raise translated(error, doing, DeployError) from error


@contextmanager
def may_lack(*codes: str) -> Iterator[None]:
    """Go on where AWS answers that there is no such thing, by one of these error codes."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if error_code(error) not in codes:
            raise
