"""The table of rights: which IAM action each request to AWS needs, on what, and which command makes that request.

To let a command do more, add a row, or the command to a row: `smlt policy` prints it, and a test compares the table with what
the commands ask for. https://docs.aws.amazon.com/service-authorization/latest/reference/ names the actions; in S3 they differ
from the requests (HeadObject needs s3:GetObject).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COMMANDS = ("deploy", "destroy", "train", "logs", "stop")


@dataclass(frozen=True)
class Right:
    """An action of IAM.

    `on`: a name of `policies.Resources`. `operations`: the requests that need it ("lambda.GetFunction"); those that need it
    besides their own action are in `implied_by`. `commands`: separated by spaces. `only_with`: an option without which it is
    not needed. `condition`: a name of `policies.Resources.condition`.
    """

    action: str
    on: str
    operations: tuple[str, ...]
    commands: str
    only_with: str = ""
    implied_by: tuple[str, ...] = ()
    condition: str = ""


def _of(service: str, on: str, names: str, commands: str, only_with: str = "") -> tuple[Right, ...]:
    """Rights whose action is called as the request is."""
    return tuple(Right(f"{service}:{name}", on, (f"{service}.{name}",), commands, only_with) for name in names.split())


_OBJECTS = "deploy destroy train stop"
_ENI = ("lambda.CreateFunction", "lambda.UpdateFunctionConfiguration")

RIGHTS: tuple[Right, ...] = (
    # Lambda.
    *_of("lambda", "function", "GetFunction", "deploy destroy train logs stop"),
    # Without it GetFunction leaves the tags out.
    Right("lambda:ListTags", "function", (), "deploy destroy", implied_by=("lambda.GetFunction",)),
    *_of("lambda", "function", "CreateFunction UpdateFunctionCode TagResource", "deploy"),
    *_of("lambda", "function", "UpdateFunctionConfiguration", "deploy train"),
    *_of("lambda", "function", "GetFunctionEventInvokeConfig PutFunctionEventInvokeConfig", "deploy"),
    *_of("lambda", "function", "DeleteFunction", "deploy destroy"),
    # Training with another memory runs a version of its own, behind an alias.
    *_of("lambda", "function", "GetFunctionConfiguration PublishVersion CreateAlias UpdateAlias", "train"),
    Right("lambda:InvokeFunction", "function", ("lambda.Invoke",), "train"),
    *_of("lambda", "any", "GetAccountSettings", "train"),
    *_of("lambda", "any", "ListFunctions", "destroy", "create_role"),
    *_of("lambda", "layer", "PublishLayerVersion", "deploy"),
    *_of("lambda", "layer", "ListLayerVersions", "deploy destroy"),
    *_of("lambda", "layer version", "GetLayerVersion", "deploy"),
    *_of("lambda", "layer version", "DeleteLayerVersion", "deploy destroy"),
    # The function's role.
    *_of("iam", "role", "GetRole", "deploy destroy"),
    Right("iam:PassRole", "role", (), "deploy", implied_by=_ENI, condition="passed to lambda"),
    *_of("iam", "role", "GetRolePolicy", "deploy", "create_role"),
    *_of("iam", "role", "CreateRole PutRolePolicy", "deploy", "create_role"),
    Right("iam:TagRole", "role", (), "deploy", "create_role", implied_by=("iam.CreateRole",)),
    *_of("iam", "role", "DeleteRolePolicy DeleteRole", "deploy destroy", "create_role"),
    *_of("iam", "role", "ListRolePolicies ListAttachedRolePolicies", "destroy", "create_role"),
    # Logs.
    *_of("logs", "log groups", "DescribeLogGroups", "deploy destroy"),
    *_of("logs", "log group", "ListTagsForResource", "deploy destroy"),
    *_of("logs", "log group", "CreateLogGroup PutRetentionPolicy", "deploy"),
    Right("logs:TagResource", "log group", ("logs.TagResource",), "deploy", implied_by=("logs.CreateLogGroup",)),
    *_of("logs", "log group", "DeleteLogGroup", "deploy destroy"),
    *_of("logs", "log group", "FilterLogEvents", "train logs"),
    # The bucket.
    *_of("s3", "bucket", "GetBucketLocation", "deploy destroy"),
    Right("s3:GetEncryptionConfiguration", "bucket", ("s3.GetBucketEncryption",), "deploy"),
    Right("s3:GetBucketPublicAccessBlock", "bucket", ("s3.GetPublicAccessBlock",), "deploy"),
    *_of("s3", "bucket", "GetBucketTagging", "deploy destroy"),
    *_of("s3", "bucket", "CreateBucket PutBucketTagging", "deploy", "create_bucket"),
    Right("s3:PutEncryptionConfiguration", "bucket", ("s3.PutBucketEncryption",), "deploy", "create_bucket"),
    Right("s3:PutBucketPublicAccessBlock", "bucket", ("s3.PutPublicAccessBlock",), "deploy", "create_bucket"),
    Right("s3:GetLifecycleConfiguration", "bucket", ("s3.GetBucketLifecycleConfiguration",), "deploy", "create_bucket"),
    Right("s3:PutLifecycleConfiguration", "bucket", ("s3.PutBucketLifecycleConfiguration",), "deploy", "create_bucket"),
    *_of("s3", "bucket", "DeleteBucket", "deploy destroy", "create_bucket"),
    # Objects: packages, code, data, checkpoints.
    Right("s3:ListBucket", "bucket", ("s3.ListObjectsV2",), _OBJECTS, condition="below the prefix"),
    Right("s3:ListBucketMultipartUploads", "bucket", ("s3.ListMultipartUploads",), "deploy destroy train"),
    Right(
        "s3:PutObject",
        "objects",
        ("s3.PutObject", "s3.CreateMultipartUpload", "s3.UploadPart", "s3.CompleteMultipartUpload"),
        "deploy train stop",
    ),
    # Lambda fetches a package on behalf of whoever deploys it.
    Right(
        "s3:GetObject",
        "objects",
        ("s3.HeadObject", "s3.GetObject"),
        "deploy train stop",
        implied_by=("lambda.CreateFunction", "lambda.UpdateFunctionCode", "lambda.PublishLayerVersion"),
    ),
    Right("s3:DeleteObject", "objects", ("s3.DeleteObject", "s3.DeleteObjects"), _OBJECTS),
    Right("s3:AbortMultipartUpload", "objects", ("s3.AbortMultipartUpload",), "deploy destroy train"),
    Right("s3:ListMultipartUploadParts", "objects", ("s3.ListParts",), "deploy train"),
    # In a VPC Lambda looks at the networks on behalf of whoever deploys:
    # https://docs.aws.amazon.com/lambda/latest/dg/configuration-vpc.html#configuration-vpc-permissions
    *(
        Right(f"ec2:{name}", "any", (), "deploy", "vpc", implied_by=_ENI)
        for name in ("DescribeSecurityGroups", "DescribeSubnets", "DescribeVpcs")
    ),
    # An image: https://docs.aws.amazon.com/lambda/latest/dg/images-create.html#gettingstarted-images-permissions
    *(
        Right(f"ecr:{name}", "image", (), "deploy", "image", implied_by=("lambda.CreateFunction", "lambda.UpdateFunctionCode"))
        for name in ("BatchGetImage", "GetDownloadUrlForLayer", "GetRepositoryPolicy", "SetRepositoryPolicy")
    ),
)

#: Requests that need no right: https://docs.aws.amazon.com/STS/latest/APIReference/API_GetCallerIdentity.html
FREE = ("sts.GetCallerIdentity",)


def actions_of(operation: str) -> list[str]:
    """The actions that a request needs: "GetFunction" or "lambda.GetFunction"."""
    return sorted(
        {right.action for right in RIGHTS for name in right.operations if operation in (name, name.partition(".")[2])}
    )


def rights_for(commands: Iterable[str], options: Iterable[str]) -> list[Right]:
    """The rows that these commands need with these options ("create_role", "create_bucket", "vpc", "image")."""
    wanted, given = set(commands), set(options)
    return [
        right for right in RIGHTS if wanted & set(right.commands.split()) and (not right.only_with or right.only_with in given)
    ]
