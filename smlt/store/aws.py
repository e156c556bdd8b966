"""AWS as SMLT asks it: the one place that makes boto3's clients and turns what goes wrong into one sentence.

Which account, region and endpoint: boto3's own ways (AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, a role's credentials).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smlt.errors import ConfigError, SmltError, StoreAuthError, StoreError, StoreUnavailable

_sessions = threading.local()  # boto3's sessions are not for several threads; its clients are
#: What a session has read when it was made.
SETTINGS = (
    *("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
)

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN = {"InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthFailure"}
_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "403", "Forbidden"}
#: After all attempts. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_THROTTLED = {"Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown"}
_BUSY = {"ServiceUnavailable", "InternalError", "RequestTimeout", "500", "503"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}


def settings() -> list[str | None]:
    """The environment's SETTINGS."""
    return [os.environ.get(name) for name in SETTINGS]


def aws_client(service: str, *, region: str | None = None, attempts: int = 5, **config: Any) -> Any:
    """A boto3 client for `service` ("s3", "lambda", "iam", ...). `config`: of `botocore.config.Config`.

    Transient errors and throttling are tried again, `attempts` times in all, with growing pauses.
    Raises ConfigError when boto3 is not installed or no region is known.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigError("boto3 is not installed: pip install 'smlt[aws]'") from error
    asked_for = settings()
    if getattr(_sessions, "asked_for", None) != asked_for:  # credentials or region have changed since
        _sessions.session, _sessions.asked_for = None, asked_for
    try:
        if _sessions.session is None:
            _sessions.session = boto3.Session()
        # boto3 itself reads AWS_DEFAULT_REGION only; a function has AWS_REGION.
        chosen = region or os.environ.get("AWS_REGION") or _sessions.session.region_name
        retries = {"mode": "standard", "total_max_attempts": attempts}
        return _sessions.session.client(
            service, region_name=chosen, config=Config(**{"retries": retries, "tcp_keepalive": True, **config})
        )
    except (BotoCoreError, ValueError) as error:
        raise translated(error, f"AWS {service}", ConfigError) from error


@contextmanager
def aws_errors(doing: str, kind: type[SmltError] | None = None) -> Iterator[None]:
    """Turn boto3's errors into SMLT's, which begin with `doing` ("cannot read s3://bucket/key").

    `kind`: what is raised. None: StoreAuthError, StoreUnavailable or StoreError, by what has happened.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise translated(error, doing, kind) from error


def error_code(error: BaseException) -> str:
    """The code in an answer of AWS ("NoSuchBucket", "404"), "" for what is no such answer."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def is_denied(error: BaseException) -> bool:
    """Whether AWS knows who asks, and does not let him."""
    return error_code(error) in _DENIED


def translated(error: BaseException, doing: str, kind: type[SmltError] | None = None) -> SmltError:
    """The error as one sentence that says what to do."""
    store_kind, text = _explained(error)
    return (kind or store_kind)(f"{doing}: {text}")


def _explained(error: BaseException) -> tuple[type[SmltError], str]:
    from botocore import exceptions

    code = error_code(error)
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return StoreAuthError, "no AWS credentials: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, (exceptions.ProfileNotFound, exceptions.UnauthorizedSSOTokenError, exceptions.TokenRetrievalError)):
        return StoreAuthError, f"no AWS credentials: {error}"
    if isinstance(error, exceptions.NoRegionError):
        return ConfigError, "no AWS region: set AWS_REGION, or give --region"
    if isinstance(error, exceptions.InvalidRegionError):
        return ConfigError, f"{error}; look at AWS_REGION or --region"
    if code in _EXPIRED:
        return StoreAuthError, f"the AWS credentials have expired ({code}): renew them and go on"
    if code in _UNKNOWN:
        return StoreAuthError, f"AWS does not know these credentials ({code}): look at AWS_PROFILE or AWS_ACCESS_KEY_ID"
    if code in _DENIED:
        detail = str(getattr(error, "response", {}).get("Error", {}).get("Message", ""))
        reason = f"{code}: {detail}" if detail else code
        return StoreAuthError, f"AWS denies it ({reason}): look at the policy of the user or role"
    if code in _THROTTLED:
        return StoreUnavailable, f"AWS is asked too often ({code}): try again in a minute"
    if code in _ELSEWHERE:
        return ConfigError, f"it lies in another region ({code}): give its --region"
    if code == "NoSuchBucket":
        return StoreError, "there is no such bucket"
    if code in _BUSY:
        return StoreUnavailable, f"AWS does not keep up ({code}): try again in a minute"
    if isinstance(error, exceptions.ClientError):
        message = error.response.get("Error", {}).get("Message", "")
        return StoreError, f"AWS answered {code}: {message}" if message else f"AWS answered {code}"
    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)):
        return StoreUnavailable, f"AWS cannot be reached: {error}"
    return StoreError, str(error)
