"""The layer that holds SMLT and what it needs: checked before it is sent, published when the newest version is another one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smlt._version import __version__
from smlt.client.deployment.cloud import Cloud, asking, may_lack
from smlt.client.deployment.limits import size_text
from smlt.client.deployment.names import LAYER_MARK, layer_name
from smlt.client.deployment.package import lambda_digest
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.steps import Step, Work
from smlt.client.deployment.upload import code_of
from smlt.errors import DeployError

_VERSION_ARN = re.compile(r"(arn:aws[a-z-]*:lambda:([a-z0-9-]+):\d{12}:layer:[A-Za-z0-9_-]+):(\d+)")


@dataclass(frozen=True)
class LayerZip:
    """A layer on this machine. `sizes`: its files' bytes; `holds`: its distributions' versions, by normalized name."""

    path: Path
    sha256: str
    sizes: Mapping[str, int]
    holds: Mapping[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> frozenset[str]:
        """The top-level modules in it."""
        names = (name.removeprefix("python/") for name in self.sizes if name.startswith("python/"))
        return frozenset(name.partition("/")[0].partition(".")[0] for name in names)


def is_layer_arn(text: str) -> bool:
    """Whether it names a published version rather than a file."""
    return text.startswith("arn:")


def read_layer(request: DeployRequest, folder: Path) -> LayerZip | None:
    """The zip that the function's layer is made of, built in `folder` when none is given; None with an image, without a layer,
    or for one that is published.

    DeployError for a zip that is no layer, or of another architecture or Python.
    """
    from smlt.client.layer_check import check_layer
    from smlt.client.layers import build_layer

    if request.image is not None or request.no_layer:
        return None
    if request.layer is None:
        try:
            report = build_layer(request.arch, request.python, folder / "layer.zip")
        except DeployError as error:
            raise DeployError(f"no --layer is given, and none can be built: {error}") from error
    elif is_layer_arn(request.layer):
        if not _VERSION_ARN.fullmatch(request.layer):
            raise DeployError(f"--layer {request.layer}: give the ARN of a version, which ends with its number")
        return None
    else:  # what is too large for a request goes through the bucket
        report = check_layer(Path(request.layer), request.arch, request.python, direct_upload=False)
    with zipfile.ZipFile(report.path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    return LayerZip(report.path, report.sha256, sizes, _distributions(sizes))


def _distributions(names: Mapping[str, int]) -> dict[str, str]:
    found = {}
    for name in names:
        match = re.fullmatch(r"python/(?:lib/python[\d.]+/site-packages/)?([^/]+)-([^/-]+)\.dist-info/METADATA", name)
        if match:
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


def plan_layer(cloud: Cloud, request: DeployRequest, layer: LayerZip | None) -> tuple[Step | None, str | None]:
    """What happens to the layer, and its version's ARN when there already is one."""
    if layer is None:
        if request.layer is None:
            return None, None
        _check_published(cloud, request, request.layer)
        return Step("layer", request.layer, "keep", ("not made by this deployment",)), request.layer
    name, found = layer_name(request.function), layer_versions(cloud, request.function)
    if found:
        newest = max(found, key=lambda version: int(version["Version"]))
        with asking(f"cannot look at layer {name}"):
            there = cloud.client("lambda").get_layer_version(LayerName=name, VersionNumber=newest["Version"])
        if there["Content"]["CodeSha256"] == lambda_digest(layer.sha256):
            return Step("layer", name, "keep", (f"version {newest['Version']}",)), str(newest["LayerVersionArn"])
        if not str(there.get("Description", "")).startswith(LAYER_MARK):
            raise DeployError(f"layer {name} is there and was not made by smlt: choose another name for the function")
    details = (size_text(layer.path.stat().st_size), "a new version" if found else "the first version")
    return Step("layer", name, "create", details, lambda work: _publish(cloud, request, layer, work)), None


def layer_versions(cloud: Cloud, function: str) -> list[dict[str, Any]]:
    """The versions of the function's own layer, as Lambda lists them."""
    with asking(f"cannot look at layer {layer_name(function)}"), may_lack("ResourceNotFoundException"):
        pages = cloud.client("lambda").get_paginator("list_layer_versions").paginate(LayerName=layer_name(function))
        return [version for page in pages for version in page.get("LayerVersions", [])]
    return []


def _check_published(cloud: Cloud, request: DeployRequest, arn: str) -> None:
    found = _VERSION_ARN.fullmatch(arn)
    assert found is not None  # read_layer has looked
    if found[2] != cloud.region:
        raise DeployError(f"--layer {arn}: it is in {found[2]}, the function in {cloud.region}: Lambda wants one region")
    version = None
    with asking(f"cannot look at --layer {arn}"), may_lack("ResourceNotFoundException"):
        version = cloud.client("lambda").get_layer_version(LayerName=found[1], VersionNumber=int(found[3]))
    if version is None:
        raise DeployError(f"--layer {arn}: there is no such layer version")
    for what, key, wanted in (
        ("architecture", "CompatibleArchitectures", request.arch),
        ("runtime", "CompatibleRuntimes", request.runtime),
    ):
        if version.get(key) and wanted not in version[key]:
            raise DeployError(f"--layer {arn}: its {what} is {', '.join(version[key])}, the function's {wanted}")


def _publish(cloud: Cloud, request: DeployRequest, layer: LayerZip, work: Work) -> None:
    name, client = layer_name(request.function), cloud.client("lambda")
    content = code_of(cloud, request, layer.path, f"layer-{layer.sha256}.zip", work)
    with asking(f"cannot publish layer {name}"):
        version = client.publish_layer_version(
            LayerName=name,
            Description=f"{LAYER_MARK}{__version__} for the function {request.function}",
            Content=content,
            CompatibleRuntimes=[request.runtime],
            CompatibleArchitectures=[request.arch],
        )
    number = version["Version"]
    work.made(f"layer {name} version {number}", lambda: client.delete_layer_version(LayerName=name, VersionNumber=number))
    work.layer_arn = version["LayerVersionArn"]
