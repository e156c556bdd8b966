"""What a request asks for: its service and operation, and the IAM actions and resources that AWS would want allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

#: Operations of S3 whose IAM action has another name
#: (https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazons3.html).
_S3_ACTIONS = {
    **dict.fromkeys(("HeadObject", "GetObject"), "GetObject"),
    **dict.fromkeys(("ListObjects", "ListObjectsV2", "HeadBucket"), "ListBucket"),
    **dict.fromkeys(("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"), "PutObject"),
    **dict.fromkeys(("CopyObject", "UploadPartCopy"), "PutObject"),
    "DeleteObjects": "DeleteObject",
    "ListParts": "ListMultipartUploadParts",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "ListObjectVersions": "ListBucketVersions",
    "ListBuckets": "ListAllMyBuckets",
    "GetBucketEncryption": "GetEncryptionConfiguration",
    "PutBucketEncryption": "PutEncryptionConfiguration",
    "DeleteBucketEncryption": "PutEncryptionConfiguration",
    "GetBucketLifecycleConfiguration": "GetLifecycleConfiguration",
    "PutBucketLifecycleConfiguration": "PutLifecycleConfiguration",
    "DeleteBucketLifecycle": "PutLifecycleConfiguration",
    "GetPublicAccessBlock": "GetBucketPublicAccessBlock",
    "PutPublicAccessBlock": "PutBucketPublicAccessBlock",
    "DeletePublicAccessBlock": "PutBucketPublicAccessBlock",
    "GetBucketOwnershipControls": "GetBucketOwnershipControls",
    "DeleteBucketTagging": "PutBucketTagging",
}
_LAMBDA_ACTIONS = {
    "Invoke": "InvokeFunction",
    "InvokeWithResponseStream": "InvokeFunction",
    "GetLayerVersionByArn": "GetLayerVersion",
}
_CREDENTIAL = re.compile(r"Credential=([^/,\s]+)/\d+/([^/]+)/([^/]+)/aws4_request")


@dataclass(frozen=True)
class Need:
    """An action that must be allowed on a resource. `resources`: the ways in which policies may write it."""

    action: str
    resources: tuple[str, ...] = ("*",)
    context: tuple[tuple[str, str], ...] = ()  # condition keys and their values

    @property
    def resource(self) -> str:
        """The resource to show; "" for those that have none."""
        return "" if self.resources[0] == "*" else self.resources[0]


@dataclass(frozen=True)
class Operation:
    """A request, classified. `name` is "" when the service or the operation is not known."""

    service: str
    name: str
    region: str
    account: str
    access_key: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()


def classify(environ: dict[str, Any], account: str) -> Operation:
    """What the request asks for. `environ["wsgi.input"]` is a BytesIO, and is left at its beginning."""
    access_key, region, service = _signed(environ)
    body = environ["wsgi.input"].getvalue()
    name, arguments = _named(environ, service, body)
    operation = Operation(service, name, region, account, access_key, arguments)
    finder = _FINDERS.get(service)
    if not name:
        needs: tuple[Need, ...] = ()
    elif finder is None:
        needs = (Need(f"{service}:{name}"),)
    else:
        needs = tuple(finder(operation))
    return Operation(service, name, region, account, access_key, arguments, needs)


def _signed(environ: dict[str, Any]) -> tuple[str, str, str]:
    found = _CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
    if found:
        return found[1], found[2], found[3].lower()
    query = parse_qs(environ.get("QUERY_STRING", ""))
    scope = query.get("X-Amz-Credential", [""])[0].split("/")
    if len(scope) == 5:
        return scope[0], scope[2], scope[3].lower()
    path = environ.get("PATH_INFO", "")
    if re.match(r"/20\d\d-\d\d-\d\d/(functions|layers|tags|account-settings)", path):
        return "", "us-east-1", "lambda"  # an Invoke without a signature, as curl sends it
    return "", "us-east-1", "s3"


def _named(environ: dict[str, Any], service: str, body: bytes) -> tuple[str, dict[str, Any]]:
    target = environ.get("HTTP_X_AMZ_TARGET")
    if target:
        return target.rpartition(".")[2], _json(body)
    if service in ("s3", "lambda"):
        return _routed(environ, service, body)
    values = {key: found[0] for key, found in parse_qs(body.decode(errors="replace")).items()}
    values |= {key: found[0] for key, found in parse_qs(environ.get("QUERY_STRING", "")).items()}
    return (values["Action"], values) if "Action" in values else _routed(environ, service, body)


def _routed(environ: dict[str, Any], service: str, body: bytes) -> tuple[str, dict[str, Any]]:
    from botocore.exceptions import BotoCoreError
    from moto.core.request import Request
    from moto.core.routing import get_service_router
    from werkzeug.exceptions import HTTPException

    path = environ.get("PATH_INFO", "")
    if service == "lambda" and path.rstrip("/").endswith("/account-settings"):
        return "GetAccountSettings", {}
    try:
        operation, found = get_service_router(service).match(Request({**environ, "werkzeug.request": None}))
    except (HTTPException, NotImplementedError, BotoCoreError):
        return "", {}
    finally:
        environ["wsgi.input"].seek(0)
    arguments = {str(key): unquote(str(value)) for key, value in found.items()}
    query = {key: values[0] for key, values in parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).items()}
    if service == "lambda" and operation.name not in ("Invoke", "InvokeWithResponseStream"):
        return re.sub(r"\d{8}$", "", operation.name), {**query, **_json(body), **arguments}
    return operation.name, {**query, **arguments}


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _s3(operation: Operation) -> list[Need]:
    arguments, name = operation.arguments, operation.name
    bucket, key = arguments.get("Bucket", ""), arguments.get("Key", "")
    action = f"s3:{_S3_ACTIONS.get(name, name)}"
    if not bucket:
        return [Need(action)]
    arn = f"arn:aws:s3:::{bucket}"
    if key:
        return [Need(action, (f"{arn}/{key}",))]
    if name == "DeleteObjects":
        return [Need(action, (f"{arn}/*",))]
    context = (("s3:prefix", arguments.get("prefix", "")),) if action == "s3:ListBucket" else ()
    return [Need(action, (arn,), context)]


def _lambda(operation: Operation) -> list[Need]:
    arguments = operation.arguments
    action = f"lambda:{_LAMBDA_ACTIONS.get(operation.name, operation.name)}"
    prefix = f"arn:aws:lambda:{operation.region}:{operation.account}"
    function, layer = arguments.get("FunctionName"), arguments.get("LayerName")
    resource = "*"
    if function:
        resource = function if function.startswith("arn:") else f"{prefix}:function:{function}"
        qualifier = arguments.get("Qualifier")
        if qualifier and resource.count(":") == 6:
            resource += f":{qualifier}"
    elif layer and operation.name != "ListLayers":
        version = arguments.get("VersionNumber")
        resource = f"{prefix}:layer:{layer}" + (f":{version}" if version else "")
    elif operation.name == "GetLayerVersionByArn":
        resource = arguments.get("Arn", "*")
    elif arguments.get("Resource"):
        resource = arguments["Resource"]
    if operation.name == "ListFunctions":
        resource = "*"
    return [Need(action, (resource,)), *_lambda_implies(operation, resource)]


def _lambda_implies(operation: Operation, resource: str) -> list[Need]:
    """What Lambda checks beside the operation itself: who may pass the role, read the zip in S3, use the layers."""
    arguments, needs = operation.arguments, []
    if operation.name in ("CreateFunction", "UpdateFunctionConfiguration") and arguments.get("Role"):
        needs.append(Need("iam:PassRole", (arguments["Role"],), (("iam:PassedToService", "lambda.amazonaws.com"),)))
    code = arguments.get("Code") or arguments.get("Content") or arguments
    if isinstance(code, dict) and code.get("S3Bucket") and code.get("S3Key"):
        needs.append(Need("s3:GetObject", (f"arn:aws:s3:::{code['S3Bucket']}/{code['S3Key']}",)))
    if operation.name in ("CreateFunction", "UpdateFunctionConfiguration"):
        needs += [Need("lambda:GetLayerVersion", (arn,)) for arn in arguments.get("Layers") or []]
    if operation.name == "CreateFunction" and arguments.get("Tags"):
        needs.append(Need("lambda:TagResource", (resource,)))
    if (arguments.get("VpcConfig") or {}).get("SubnetIds"):
        needs += [Need(f"ec2:Describe{what}") for what in ("SecurityGroups", "Subnets", "Vpcs")]
    return needs


def _iam(operation: Operation) -> list[Need]:
    arguments, prefix = operation.arguments, f"arn:aws:iam::{operation.account}"
    resource = "*"
    for key, kind in (
        ("RoleName", "role"),
        ("UserName", "user"),
        ("GroupName", "group"),
        ("InstanceProfileName", "instance-profile"),
    ):
        if arguments.get(key):
            resource = f"{prefix}:{kind}{arguments.get('Path', '/')}{arguments[key]}"
            break
    else:
        if arguments.get("PolicyArn"):
            resource = arguments["PolicyArn"]
        elif operation.name == "CreatePolicy":
            resource = f"{prefix}:policy{arguments.get('Path', '/')}{arguments.get('PolicyName', '')}"
        elif arguments.get("PolicySourceArn"):
            resource = arguments["PolicySourceArn"]
    tags = {"CreateRole": "iam:TagRole", "CreateUser": "iam:TagUser", "CreatePolicy": "iam:TagPolicy"}.get(operation.name)
    tagged = tags is not None and any(key.startswith("Tags.") for key in arguments)
    return [Need(f"iam:{operation.name}", (resource,)), *([Need(tags, (resource,))] if tags and tagged else [])]


def _sts(operation: Operation) -> list[Need]:
    return [Need(f"sts:{operation.name}", (operation.arguments.get("RoleArn", "*"),))]


def _logs(operation: Operation) -> list[Need]:
    arguments, action = operation.arguments, f"logs:{operation.name}"
    prefix = f"arn:aws:logs:{operation.region}:{operation.account}:log-group"
    group = arguments.get("logGroupName") or arguments.get("logGroupIdentifier") or arguments.get("resourceArn")
    if operation.name in ("DescribeLogGroups", "ListLogGroups"):
        return [Need(action, (f"{prefix}:*", "*"))]
    if not group:
        return [Need(action)]
    arn = (group if group.startswith("arn:") else f"{prefix}:{group}").removesuffix(":*")
    stream = arguments.get("logStreamName")
    streams = (f"{arn}:log-stream:{stream}",) if stream and operation.name in ("PutLogEvents", "GetLogEvents") else ()
    # AWS's own examples write a group with and without the colon and star behind it.
    tagged = operation.name == "CreateLogGroup" and arguments.get("tags")
    return [Need(name, (arn, f"{arn}:*", *streams)) for name in (action, *(["logs:TagResource"] if tagged else []))]


def _secrets(operation: Operation) -> list[Need]:
    from moto.secretsmanager.models import secretsmanager_backends

    name = operation.arguments.get("SecretId") or operation.arguments.get("Name") or ""
    prefix = f"arn:aws:secretsmanager:{operation.region}:{operation.account}:secret"
    arn = name if name.startswith("arn:") else f"{prefix}:{name}"
    for secret in list(secretsmanager_backends[operation.account][operation.region].secrets.values()):
        if name in (secret.name, secret.arn):
            arn = secret.arn  # with the six characters that AWS adds
    return [Need(f"secretsmanager:{operation.name}", (arn,) if name else ("*",))]


def _ssm(operation: Operation) -> list[Need]:
    arguments = operation.arguments
    names = [arguments["Name"]] if arguments.get("Name") else list(arguments.get("Names") or [])
    prefix = f"arn:aws:ssm:{operation.region}:{operation.account}:parameter"
    return [Need(f"ssm:{operation.name}", (f"{prefix}/{name.lstrip('/')}",)) for name in names] or [
        Need(f"ssm:{operation.name}")
    ]


_FINDERS: dict[str, Callable[[Operation], list[Need]]] = {
    "s3": _s3,
    "lambda": _lambda,
    "iam": _iam,
    "sts": _sts,
    "logs": _logs,
    "secretsmanager": _secrets,
    "ssm": _ssm,
}
