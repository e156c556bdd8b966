"""Lambda's control plane where moto's is laxer or has a gap: checks before a request, and a few answers of our own.

Limits: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
from typing import Any

from smlt.emulator.authorization import allows
from smlt.emulator.functions import FunctionNotFoundError, find_function
from smlt.emulator.operations import Need, Operation
from smlt.emulator.principals import Principals
from smlt.emulator.server import Reply, aws_error

ENVIRONMENT_BYTES = 4096
ZIP_BYTES = 50 * 1024 * 1024
UNPACKED_BYTES = 250 * 1024 * 1024
LAYERS = 5
#: Of the account's concurrency this much must stay unreserved.
UNRESERVED = 100
#: (https://docs.aws.amazon.com/lambda/latest/dg/configuration-envvars.html#configuration-envvars-runtime)
RESERVED_VARIABLES = {
    *("_HANDLER", "_X_AMZN_TRACE_ID", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_EXECUTION_ENV", "AWS_LAMBDA_FUNCTION_NAME"),
    *("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "AWS_LAMBDA_FUNCTION_VERSION", "AWS_LAMBDA_INITIALIZATION_TYPE"),
    *("AWS_LAMBDA_LOG_GROUP_NAME", "AWS_LAMBDA_LOG_STREAM_NAME", "AWS_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_LAMBDA_RUNTIME_API", "LAMBDA_TASK_ROOT", "LAMBDA_RUNTIME_DIR"),
}
_RANGES = {"MemorySize": ("memorySize", 128, 10240), "Timeout": ("timeout", 1, 900)}


class Rejected(Exception):
    """The request breaks a rule of Lambda's; `reply` is its answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.reply = aws_error(status, code, message)


def answer(operation: Operation, account_limit: int) -> Reply | None:
    """Lambda's refusal, or the answer to an operation that moto does not have; None: moto answers.

    What moto ignores in an update (ephemeral storage, an image's configuration) is set in its function.
    """
    arguments = operation.arguments
    try:
        if operation.name in ("CreateFunction", "UpdateFunctionConfiguration"):
            _check_configuration(operation)
        if operation.name in ("CreateFunction", "UpdateFunctionCode"):
            _check_code(operation)
        if operation.name == "PublishLayerVersion":
            content = _archive(operation, arguments.get("Content") or {}, "PublishLayerVersion", 70167211)
            _unpacked_bytes(content)
        if operation.name == "PutFunctionConcurrency":
            _check_concurrency(operation, account_limit)
    except Rejected as rejected:
        return rejected.reply
    if operation.name == "UpdateFunctionConfiguration":
        _amend(operation)
    if operation.name == "GetAccountSettings":
        return _account_settings(operation, account_limit)
    if operation.name == "GetLayerVersionByArn":
        return _layer_by_arn(operation)
    return None


def _invalid(message: str) -> Rejected:
    return Rejected(400, "InvalidParameterValueException", message)


def _check_configuration(operation: Operation) -> None:
    arguments = operation.arguments
    for name, (member, low, high) in _RANGES.items():
        value = arguments.get(name)
        if value is not None and not low <= int(value) <= high:
            bound = f"greater than or equal to {low}" if int(value) < low else f"less than or equal to {high}"
            text = f"Value '{value}' at '{member}' failed to satisfy constraint: Member must have value {bound}"
            raise Rejected(400, "ValidationException", f"1 validation error detected: {text}")
    variables = (arguments.get("Environment") or {}).get("Variables") or {}
    if len(json.dumps(variables, separators=(",", ":")).encode()) > ENVIRONMENT_BYTES:
        raise _invalid(  # AWS goes on with all of them; they may hold what nobody should read
            "Lambda was unable to configure your environment variables because the environment variables you have provided "
            "exceeded the 4KB limit."
        )
    reserved = sorted(RESERVED_VARIABLES & set(variables))
    if reserved:
        raise _invalid(
            "Lambda was unable to configure your environment variables because the environment variables you have provided "
            "contains reserved keys that are currently not supported for modification. Reserved keys used in this request: "
            + ", ".join(reserved)
        )
    layers = arguments.get("Layers") or []
    if len(layers) > LAYERS:
        raise _invalid(f"Cannot reference more than {LAYERS} layers.")
    if arguments.get("Role"):
        _check_role(arguments["Role"], operation.account)
    if operation.name == "UpdateFunctionConfiguration" and layers:
        function = _current(operation)
        if function is not None:
            _check_together(function.code.content, layers, operation)


def _check_role(arn: str, account: str) -> None:
    from moto.iam.exceptions import NotFoundException
    from moto.iam.models import iam_backends

    try:
        trust = json.loads(iam_backends[account]["aws"].get_role_by_arn(arn).assume_role_policy_document)
    except (NotFoundException, ValueError):
        return  # moto says so
    statements = trust.get("Statement") or []
    for statement in [statements] if isinstance(statements, dict) else statements:
        principal = statement.get("Principal")
        services = principal.get("Service", []) if isinstance(principal, dict) else []
        if statement.get("Effect") == "Allow" and "lambda.amazonaws.com" in services:
            return
    raise _invalid("The role defined for the function cannot be assumed by Lambda.")


def _check_code(operation: Operation) -> None:
    arguments = operation.arguments
    creating = operation.name == "CreateFunction"
    code = (arguments.get("Code") or {}) if creating else arguments
    if code.get("ImageUri"):
        if creating and (arguments.get("Runtime") or arguments.get("Handler") or arguments.get("Layers")):
            raise _invalid("Please don't provide Handler or Runtime or Layer when the intended function PackageType is Image.")
        return
    if creating and not (arguments.get("Runtime") and arguments.get("Handler")):
        raise _invalid("Runtime and Handler are mandatory parameters for functions created with deployment packages.")
    content = _archive(operation, code, operation.name, 70167211 if creating else 69905067)
    layers = arguments.get("Layers") or []
    if not creating:
        function = _current(operation)
        _check_together_bytes(
            _unpacked_bytes(content), sum(_unpacked_bytes(layer.content) for layer in function.layers) if function else 0
        )
        return
    _check_together(content, layers, operation)


def _check_together(content: bytes, layers: list[str], operation: Operation) -> None:
    from moto.awslambda.models import lambda_backends

    storage = lambda_backends[operation.account][operation.region]
    found = [storage.layers_versions_by_arn(arn) for arn in layers]
    _check_together_bytes(_unpacked_bytes(content), sum(_unpacked_bytes(layer.code_bytes) for layer in found if layer))


def _check_together_bytes(code: int, layers: int) -> None:
    if code + layers > UNPACKED_BYTES:
        raise _invalid(
            f"Function code combined with layers exceeds the maximum allowed size of {UNPACKED_BYTES} bytes. "
            f"The actual size is {code + layers} bytes."
        )


def _archive(operation: Operation, where: dict[str, Any], name: str, limit_bytes: int) -> bytes:
    """The bytes of the zip, from the request or from S3, where moto says what is missing."""
    from moto.s3.exceptions import MissingBucket, MissingKey
    from moto.s3.models import s3_backends

    if where.get("ZipFile"):
        try:
            content = base64.b64decode(where["ZipFile"], validate=True)
        except (binascii.Error, ValueError):
            raise _invalid("Could not unzip uploaded file. Please check your file, then try to upload again.") from None
        if len(content) > ZIP_BYTES:
            text = f"Request must be smaller than {limit_bytes} bytes for the {name} operation"
            raise Rejected(413, "RequestEntityTooLargeException", text)
        return content
    if where.get("S3Bucket") and where.get("S3Key"):
        try:
            key = s3_backends[operation.account]["aws"].get_object(where["S3Bucket"], where["S3Key"])
        except (MissingBucket, MissingKey):
            key = None
        if key is None:
            raise _invalid(
                "Error occurred while GetObject. S3 Error Code: NoSuchKey. S3 Error Message: The specified key does not exist."
            )
        return bytes(key.value)
    return b""


def _unpacked_bytes(content: bytes) -> int:
    if not content:
        return 0
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as zipped:
            size = sum(entry.file_size for entry in zipped.infolist())
    except zipfile.BadZipFile:
        raise _invalid("Could not unzip uploaded file. Please check your file, then try to upload again.") from None
    if size > UNPACKED_BYTES:
        raise _invalid(f"Unzipped size must be smaller than {UNPACKED_BYTES} bytes")
    return size


def _current(operation: Operation) -> Any:
    try:
        return find_function(operation.arguments["FunctionName"], None, operation.region, operation.account)
    except FunctionNotFoundError:
        return None


def reserved_concurrency(account: str, region: str, *, without: str = "") -> int:
    """What all functions have reserved, but for the one named."""
    from moto.awslambda.models import lambda_backends

    functions = lambda_backends[account][region].list_functions()
    return sum(int(found.reserved_concurrency or 0) for found in functions if found.function_name != without)


def _check_concurrency(operation: Operation, account_limit: int) -> None:
    name = operation.arguments["FunctionName"].rpartition(":")[2]
    wanted = int(operation.arguments.get("ReservedConcurrentExecutions") or 0)
    others = reserved_concurrency(operation.account, operation.region, without=name)
    if account_limit - others - wanted < UNRESERVED and wanted:
        raise _invalid(
            "Specified ReservedConcurrentExecutions for function decreases account's UnreservedConcurrentExecution below its "
            f"minimum value of [{UNRESERVED}]."
        )


def lacks_network_rights(operation: Operation, principals: Principals) -> bool:
    """Whether a function is to be in a VPC whose role may not make its network interfaces: Lambda looks at once
    (https://docs.aws.amazon.com/lambda/latest/dg/configuration-vpc.html#configuration-vpc-permissions)."""
    arguments = operation.arguments
    if operation.name not in ("CreateFunction", "UpdateFunctionConfiguration"):
        return False
    if not (arguments.get("VpcConfig") or {}).get("SubnetIds"):
        return False
    function = _current(operation) if operation.name == "UpdateFunctionConfiguration" else None
    role = arguments.get("Role") or (function.role if function else "")
    principal = principals.of_role(role) if role else None
    if principal is None:
        return False  # moto says so
    actions = ("ec2:CreateNetworkInterface", "ec2:DescribeNetworkInterfaces", "ec2:DeleteNetworkInterface")
    return not all(allows(principal, Need(action), operation.region) for action in actions)


def _amend(operation: Operation) -> None:
    from moto.awslambda.exceptions import UnknownFunctionException
    from moto.awslambda.models import ImageConfig, lambda_backends

    arguments = operation.arguments
    try:
        function = lambda_backends[operation.account][operation.region].get_function(arguments["FunctionName"])
    except UnknownFunctionException:
        return
    if arguments.get("EphemeralStorage"):
        function.ephemeral_storage = arguments["EphemeralStorage"]["Size"]
    if arguments.get("ImageConfig") is not None:
        function.image_config = ImageConfig(arguments["ImageConfig"])


def _account_settings(operation: Operation, account_limit: int) -> Reply:
    from moto.awslambda.models import lambda_backends

    functions = list(lambda_backends[operation.account][operation.region].list_functions())
    reserved = reserved_concurrency(operation.account, operation.region)
    settings = {
        "AccountLimit": {
            "TotalCodeSize": 80530636800,
            "CodeSizeUnzipped": UNPACKED_BYTES,
            "CodeSizeZipped": ZIP_BYTES,
            "ConcurrentExecutions": account_limit,
            "UnreservedConcurrentExecutions": account_limit - reserved,
        },
        "AccountUsage": {"TotalCodeSize": sum(found.code_size for found in functions), "FunctionCount": len(functions)},
    }
    return 200, {"Content-Type": "application/json"}, json.dumps(settings).encode()


def _layer_by_arn(operation: Operation) -> Reply:
    from moto.awslambda.models import lambda_backends

    layer = lambda_backends[operation.account][operation.region].layers_versions_by_arn(operation.arguments.get("Arn", ""))
    if layer is None:
        return aws_error(404, "ResourceNotFoundException", "The resource you requested does not exist.")
    return 200, {"Content-Type": "application/json"}, json.dumps(layer.get_layer_version()).encode()
