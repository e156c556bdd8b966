"""The bucket: is it there, in this region, encrypted and closed to the public; made when that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.names import FUNCTION_TAG, MANAGED, MANAGED_TAG, as_tags, is_managed, tag_list
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Step, Work
from smlt.errors import DeployError
from smlt.store.aws import error_code

_CLOSED = dict.fromkeys(("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True)
_ENCRYPTED = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
#: Parts of an upload that never ended are paid for, and no listing of objects shows them.
ABORT_DAYS = 7
_LIFECYCLE = {
    "Rules": [
        {
            "ID": "smlt-abort-unfinished-uploads",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_DAYS},
        }
    ]
}


@dataclass(frozen=True)
class BucketFacts:
    """What others need to know of the bucket: the ARN of its own KMS key, if any, and what the user should mend."""

    kms_key: str | None = None
    warnings: tuple[str, ...] = ()


def bucket_region(cloud: Cloud, bucket: str) -> str | None:
    """The bucket's region, None when there is no such bucket. DeployError when it belongs to somebody else."""
    with asking(f"cannot look at bucket {bucket} (is it yours?)"), may_lack("NoSuchBucket", "404"):
        place = cloud.client("s3").get_bucket_location(Bucket=bucket).get("LocationConstraint")
        # The oldest names of regions: https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetBucketLocation.html
        return {"": "us-east-1", "EU": "eu-west-1"}.get(place or "", str(place))
    return None


def bucket_tags(cloud: Cloud, bucket: str) -> dict[str, str]:
    """The bucket's tags."""
    with asking(f"cannot read the tags of bucket {bucket}"), may_lack("NoSuchTagSet"):
        return as_tags(cloud.client("s3").get_bucket_tagging(Bucket=bucket)["TagSet"])
    return {}


def plan_bucket(cloud: Cloud, request: DeployRequest) -> tuple[Step, BucketFacts]:
    """What happens to the bucket. DeployError when it is missing, lies in another region, or is not to be read."""
    name, s3 = request.place.bucket, cloud.client("s3")
    region = bucket_region(cloud, name)
    if region is None:
        if not request.create_bucket:
            raise DeployError(f"there is no bucket {name}: give --create-bucket to have it made, or the name of another one")
        details = (
            f"in {cloud.region}",
            "encrypted (SSE-S3)",
            "closed to the public",
            f"unfinished uploads end in {ABORT_DAYS} days",
        )
        return Step("bucket", name, "create", details, lambda work: _create(cloud, request, work)), BucketFacts()
    if region != cloud.region:
        raise DeployError(
            f"bucket {name} lies in {region}, the function in {cloud.region}: give --region {region}, or another bucket"
        )
    closed = encryption = None
    with asking(f"cannot look at the public access of bucket {name}"), may_lack("NoSuchPublicAccessBlockConfiguration"):
        closed = s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
    with asking(f"cannot look at the encryption of bucket {name}"), may_lack("ServerSideEncryptionConfigurationNotFoundError"):
        rules = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
        encryption = rules[0].get("ApplyServerSideEncryptionByDefault") if rules else None
    if is_managed(bucket_tags(cloud, name)) and request.create_bucket:
        return _mend(cloud, name, closed, encryption), BucketFacts()
    warnings = []
    if closed != _CLOSED:
        warnings.append(f"bucket {name} does not block public access: aws s3api put-public-access-block --bucket {name} ...")
    if encryption is None:
        warnings.append(f"bucket {name} has no default encryption")
    key, warned = _kms_key(cloud, name, encryption or {})
    algorithm = (encryption or {}).get("SSEAlgorithm", "none")
    return Step("bucket", name, "keep", (f"encryption {algorithm}",)), BucketFacts(key, (*warnings, *warned))


def _kms_key(cloud: Cloud, bucket: str, encryption: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The ARN of a key of the customer's. AWS's own key for S3 (no key is named) needs no right."""
    key = encryption.get("KMSMasterKeyID")
    if not str(encryption.get("SSEAlgorithm", "")).startswith("aws:kms") or not key:
        return None, []
    if "alias/" in key:
        return None, [f"bucket {bucket} is encrypted by {key}: let the role use that key (kms:Decrypt, kms:GenerateDataKey)"]
    return key if key.startswith("arn:") else cloud.account.arn("kms", f"key/{key}"), []


def _create(cloud: Cloud, request: DeployRequest, work: Work) -> None:
    from botocore.exceptions import ClientError

    name, s3 = request.place.bucket, cloud.client("s3")
    where = {} if cloud.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": cloud.region}}
    with asking(f"cannot create bucket {name}"):
        try:
            s3.create_bucket(Bucket=name, **where)
        except ClientError as error:
            if error_code(error) in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                raise DeployError(f"cannot create bucket {name}: somebody has taken that name; choose another one") from error
            raise
        work.made(f"bucket {name}", lambda: s3.delete_bucket(Bucket=name))
        tags = {MANAGED_TAG: MANAGED, FUNCTION_TAG: request.function}
        s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": tag_list(tags)})
        for _, put in _settings(s3, name):
            put()


def _settings(s3: Any, name: str) -> list[tuple[str, Callable[[], Any]]]:
    return [
        ("public access", lambda: s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=_CLOSED)),
        ("encryption", lambda: s3.put_bucket_encryption(Bucket=name, ServerSideEncryptionConfiguration=_ENCRYPTED)),
        ("unfinished uploads", lambda: s3.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=_LIFECYCLE)),
    ]


def _mend(cloud: Cloud, name: str, closed: Any, encryption: Any) -> Step:
    """A bucket that SMLT has made, perhaps not to its end, or that somebody has changed since."""
    s3, rules = cloud.client("s3"), None
    with asking(f"cannot look at the lifecycle of bucket {name}"), may_lack("NoSuchLifecycleConfiguration"):
        rules = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    wrong = [closed != _CLOSED, encryption is None, rules is None]
    settings = [setting for setting, is_wrong in zip(_settings(s3, name), wrong, strict=True) if is_wrong]
    if not settings:
        return Step("bucket", name, "keep")

    def mend(_: Work) -> None:
        with asking(f"cannot change bucket {name}"):
            for _what, put in settings:
                put()

    return Step("bucket", name, "update", tuple(what for what, _ in settings), mend)
