"""The account that moto keeps: emptied at the start, with AWS's own policies that functions use, and an administrator."""

from __future__ import annotations

import functools
import json
from typing import Any

ACCOUNT = "123456789012"
#: The user that exists from the start when policies are enforced.
ADMIN = "lambda-local-admin"
_EVERYTHING = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'
#: Of AWS's 1500 managed policies those that a function's role or its deployer may have: all would take half a second.
_MANAGED = ("AWSLambda", "AdministratorAccess", "AmazonS3", "AmazonSSMReadOnly", "CloudWatchLogs", "SecretsManager")


def reset() -> None:
    """Empty all services. Their state is global in this process."""
    from moto.core.base_backend import BackendDict
    from moto.core.model_instances import reset_model_data

    BackendDict.reset()
    reset_model_data()


def add_managed_policies() -> None:
    """Policies such as AWSLambdaBasicExecutionRole, which moto has only when it is told to load all of them."""
    from moto.iam.models import AWSManagedPolicy, iam_backends

    backend = iam_backends[ACCOUNT]["aws"]
    for name, data in _managed_data().items():
        policy = AWSManagedPolicy.from_data(name, ACCOUNT, "us-east-1", data)
        if policy.arn not in backend.managed_policies:
            backend.aws_managed_policies.append(policy)
            backend.managed_policies[policy.arn] = policy


@functools.cache
def _managed_data() -> dict[str, Any]:
    from moto.iam.aws_managed_policies import aws_managed_policies_data

    return {name: data for name, data in json.loads(aws_managed_policies_data).items() if name.startswith(_MANAGED)}


def make_admin() -> dict[str, str]:
    """The user who may do everything; his credentials as boto3.client takes them."""
    from moto.iam.models import iam_backends

    backend = iam_backends[ACCOUNT]["aws"]
    backend.create_user("us-east-1", ADMIN)
    backend.put_user_policy(ADMIN, "everything", _EVERYTHING)
    key = backend.create_access_key(ADMIN)
    return {"aws_access_key_id": key.access_key_id, "aws_secret_access_key": key.secret_access_key}
