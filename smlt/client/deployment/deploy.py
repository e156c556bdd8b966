"""`smlt deploy`: look at what is there, plan, and carry the plan out."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from smlt.client.deployment.binaries import check_binaries
from smlt.client.deployment.bucket import plan_bucket
from smlt.client.deployment.cloud import Cloud
from smlt.client.deployment.extras import install_extras
from smlt.client.deployment.function import plan_function, plan_invocation, wanted_environment
from smlt.client.deployment.layer import LayerZip, is_layer_arn, plan_layer, read_layer
from smlt.client.deployment.limits import DIRECT_BYTES, check_unpacked
from smlt.client.deployment.logs import plan_log_group
from smlt.client.deployment.package import PRELOADABLE, Package, collect, imports_of, pack
from smlt.client.deployment.request import DeployRequest
from smlt.client.deployment.role import plan_role
from smlt.client.deployment.steps import Reporter, Step, Work, carry_out
from smlt.client.deployment.upload import remove_superseded
from smlt.errors import DeployError


@dataclass(frozen=True)
class Deployed:
    """What a deployment came to. `changed`: how many things were created or updated; `sent_bytes`: of packages and layers."""

    function: str
    arn: str
    changed: int
    sent_bytes: int
    dry_run: bool


@dataclass(frozen=True)
class Artifacts:
    """What is sent: with an image there is no package, and not always a layer. `variables`: the function's environment."""

    package: Package | None
    layer: LayerZip | None
    variables: dict[str, str]
    warnings: tuple[str, ...]


def deploy(request: DeployRequest, report: Reporter, *, dry_run: bool = False, strict: bool = False) -> Deployed:
    """Make the function what `request` says, and everything that it needs; nothing is sent that is there already.

    `dry_run`: plan only, by reading. `strict`: what is else a warning is an error. Raises ConfigError before anything is
    asked of AWS when a value cannot be, DeployError otherwise. What this call has made is removed when it fails.
    """
    request.check()
    with tempfile.TemporaryDirectory(prefix="smlt-deploy-") as folder:
        artifacts = prepare(request, Path(folder), report)
        cloud = Cloud()
        arn = cloud.account.arn("lambda", f"function:{request.function}")  # credentials and region come before all else
        steps, warnings, work = plan(cloud, request, artifacts, report)
        report.planned(steps, warnings)
        if strict and warnings:
            raise DeployError(f"--strict: {warnings[0]}")
        changes = [step for step in steps if step.action != "keep"]
        if not dry_run:
            carry_out(steps, work, f"deploy again to go on, or smlt destroy {request.function}")
            if any(step.kind in ("layer", "function") for step in changes):
                _tidy(cloud, request, artifacts)
    done = Deployed(request.function, arn, len(changes), work.sent_bytes, dry_run)
    report.ended({"event": "dry-run" if dry_run else "deployed", **done.__dict__}, _sentence(done))
    return done


def prepare(request: DeployRequest, folder: Path, report: Reporter) -> Artifacts:
    """Pack what is to be sent in `folder` and check it against Lambda's limits. DeployError when it cannot run there."""
    own = collect(request.package)
    imports = imports_of(own)
    if request.layer is None and request.image is None and not request.no_layer:
        report.note("building the layer; --layer takes one that is built")
    layer = read_layer(request, folder)
    if request.image is not None:
        return Artifacts(None, None, wanted_environment(request, imports, frozenset()), ())
    extras: dict[str, Path] = {}
    if request.extras:
        extras = install_extras(request.extras, request.arch, request.python, layer.holds if layer else {}, folder)
    files = {**extras, **own}  # a module of the user's own comes first, as in sys.path
    check_binaries(f"package {request.package}", files, request.arch, request.python)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    check_unpacked(sizes, layer.sizes if layer else {})
    package = pack(files, folder / "package.zip")
    if request.no_layer and "smlt" not in package.modules:
        raise DeployError("--no-layer: the package holds no smlt: add it by --with, or give --layer")
    modules = package.modules | (layer.modules if layer else frozenset())
    # A published layer may hold whatever it likes.
    missing = () if is_layer_arn(request.layer or "") else sorted((imports & set(PRELOADABLE)) - modules)
    warnings = tuple(
        f"{request.package.name} imports {name}, which neither package nor layer has: add it by --with, or take an image "
        "(smlt layer dockerfile)"
        for name in missing
    )
    return Artifacts(package, layer, wanted_environment(request, imports, modules), warnings)


def plan(
    cloud: Cloud, request: DeployRequest, artifacts: Artifacts, report: Reporter
) -> tuple[list[Step], tuple[str, ...], Work]:
    """The steps in their order, what the user should mend, and what the steps share. It only reads."""
    bucket, facts = plan_bucket(cloud, request)
    # First, as its tags lead to everything else; the function last, as it needs everything else.
    log_group = plan_log_group(cloud, request)
    role, role_arn = plan_role(cloud, request, facts.kms_key)
    layer, layer_arn = plan_layer(cloud, request, artifacts.layer)
    function = plan_function(
        cloud,
        request,
        artifacts.package,
        artifacts.variables,
        role_arn,
        layer_arn,
        new_layer=artifacts.layer is not None and layer_arn is None,
    )
    invocation = plan_invocation(cloud, request, function.action == "create")
    warnings = (*facts.warnings, *artifacts.warnings)
    if request.image is not None and "@sha256:" not in request.image:
        warnings = (
            *warnings,
            f"image {request.image}: a new image under that tag is not noticed; give its digest",
        )
    steps = [log_group, bucket, role, *([layer] if layer else []), function, invocation]
    return steps, warnings, Work(report)


def _tidy(cloud: Cloud, request: DeployRequest, artifacts: Artifacts) -> None:
    keep = {f"package-{artifacts.package.sha256}.zip"} if artifacts.package else set()
    if artifacts.layer:
        keep.add(f"layer-{artifacts.layer.sha256}.zip")
    zips = [artifacts.package.zip] if artifacts.package else []
    zips += [artifacts.layer.path] if artifacts.layer else []
    if any(path.stat().st_size > DIRECT_BYTES for path in zips):
        remove_superseded(cloud, request, keep)


def _sentence(done: Deployed) -> str:
    if done.dry_run:
        return f"dry run: {done.changed} to change, nothing was touched" if done.changed else "dry run: nothing to change"
    if not done.changed:
        return f"{done.function} is as it should be: nothing changed, 0 bytes sent"
    return f"{done.function} is deployed: {done.changed} changed, {done.sent_bytes:,} bytes sent; {done.arn}"
