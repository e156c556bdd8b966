"""`smlt deploy`, `smlt destroy`, `smlt policy`."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from smlt.cli.common import AsJson, EndpointUrl, Profile, Region, app, examples
from smlt.errors import ConfigError

_FUNCTION: Any = typer.Argument(help="The function's name; `smlt train --on lambda` takes smlt unless told otherwise.")
_BUCKET: Any = typer.Argument(help="NAME or s3://NAME/PREFIX: where code, data and checkpoints are kept.")
_STORE: Any = typer.Option(
    "--store",
    metavar="URL",
    help="The parameter store, with its password in a secret: ?password_secret=aws-secretsmanager://NAME.",
)
_CREATE_BUCKET: Any = typer.Option("--create-bucket", help="Make the bucket when there is none, encrypted and closed.")
_CREATE_ROLE: Any = typer.Option("--create-role", help="Make the role when there is none, and keep its policy up to date.")
_SUBNET: Any = typer.Option("--subnet", metavar="ID", help="Put the function into a VPC; may be given several times.")
_IMAGE: Any = typer.Option("--image", metavar="URI", help="A container image instead of a zip and a layer.")


@app.command(
    epilog=examples(
        "smlt deploy smlt my-bucket train.py smlt-role --create-bucket --create-role --layer layer.zip",
        "smlt deploy smlt s3://my-bucket/team ./package arn:aws:iam::123456789012:role/trainer --layer layer.zip --dry-run",
        "smlt deploy smlt my-bucket train.py smlt-role --layer layer.zip --with scikit-learn --memory 3008 --arch arm64",
    )
)
def deploy(
    function: Annotated[str, _FUNCTION],
    bucket: Annotated[str, _BUCKET],
    package: Annotated[Path, typer.Argument(help="A script, whose local modules are found, or a folder.")],
    role: Annotated[str, typer.Argument(help="The function's role: an ARN, or a name.")],
    extras: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PACKAGE", help="Add a package from its wheel; may be repeated."),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            metavar="ZIP|ARN",
            help="What smlt layer build has made, or a published version.",
            show_default="one is built",
        ),
    ] = None,
    image: Annotated[str | None, _IMAGE] = None,
    no_layer: Annotated[bool, typer.Option("--no-layer", help="The package brings SMLT along.")] = False,
    python: Annotated[
        str | None, typer.Option("--python", metavar="VERSION", help="Python of the function.", show_default="this one")
    ] = None,
    arch: Annotated[str, typer.Option("--arch", help="x86_64 or arm64.")] = "x86_64",
    memory: Annotated[int, typer.Option("--memory", metavar="MB", help="Memory; 1769 MB have one CPU.")] = 1769,
    timeout: Annotated[int, typer.Option("--timeout", metavar="SECONDS", help="Longest time of one invocation.")] = 900,
    tmp: Annotated[int, typer.Option("--tmp", metavar="MB", help="Room in /tmp.")] = 512,
    subnet: Annotated[list[str] | None, _SUBNET] = None,
    security_group: Annotated[
        list[str] | None, typer.Option("--security-group", metavar="ID", help="In the VPC; may be given several times.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="A variable; may be given several times.")
    ] = None,
    store: Annotated[str | None, _STORE] = None,
    handler: Annotated[str, typer.Option("--handler", help="What Lambda calls.")] = "smlt.worker.handler.handler",
    create_bucket: Annotated[bool, _CREATE_BUCKET] = False,
    create_role: Annotated[bool, _CREATE_ROLE] = False,
    log_days: Annotated[int, typer.Option("--log-days", metavar="DAYS", help="How long the log is kept.")] = 14,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is an error.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read, and change nothing.")] = False,
    as_json: AsJson = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make a Lambda function for SMLT's workers, or bring it up to date.

    What is there already and fits is kept: a second run sends nothing. What a failed run has made is removed again.
    """
    from smlt.client.deployment.deploy import deploy as deploy_function
    from smlt.client.deployment.display import make_reporter
    from smlt.client.deployment.names import Place, RoleName
    from smlt.client.deployment.request import DeployRequest, default_python, parse_environment

    request = DeployRequest(
        function=function,
        place=Place.parse(bucket),
        package=package,
        role=RoleName.parse(role),
        extras=tuple(extras or ()),
        layer=layer,
        image=image,
        no_layer=no_layer,
        python=python or default_python(),
        arch=arch,
        memory_mb=memory,
        timeout_s=timeout,
        tmp_mb=tmp,
        subnets=tuple(subnet or ()),
        security_groups=tuple(security_group or ()),
        environment=parse_environment(env or ()),
        store=store,
        handler=handler,
        create_bucket=create_bucket,
        create_role=create_role,
        log_days=log_days,
    )
    with closing(make_reporter(as_json=as_json)) as report:
        deploy_function(request, report, dry_run=dry_run, strict=strict)


@app.command(epilog=examples("smlt destroy smlt", "smlt destroy smlt --dry-run", "smlt destroy smlt --data --yes --keep-logs"))
def destroy(
    function: Annotated[str, _FUNCTION],
    bucket: Annotated[
        str | None,
        typer.Option("--bucket", help="NAME or s3://NAME/PREFIX, where AWS no longer tells.", show_default="as deployed"),
    ] = None,
    role: Annotated[
        str | None, typer.Option("--role", help="The role, where AWS no longer tells.", show_default="as deployed")
    ] = None,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the log group.")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Delete code, data and checkpoints of all runs below the prefix.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed; change nothing.")] = False,
    as_json: AsJson = False,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Remove a function with its versions, its layer, log group and files, its role and bucket where smlt deploy made them.

    A bucket stays unless it is empty, runs stay unless --data is given, a role while it has other policies. Removing what
    is not there is no error.
    """
    from smlt.client.deployment.destroy import destroy as destroy_function
    from smlt.client.deployment.display import make_reporter
    from smlt.client.deployment.names import Place, RoleName

    def confirm(steps: Any) -> bool:
        if yes:
            return True
        if as_json or not sys.stdin.isatty():
            raise ConfigError(f"{len(steps)} things would be removed: give --yes, or --dry-run to see them")
        return typer.confirm(f"Remove these {len(steps)}?")

    place, role_name = Place.parse(bucket) if bucket else None, RoleName.parse(role) if role else None
    with closing(make_reporter(as_json=as_json)) as report:
        destroy_function(
            function, report, confirm, place=place, role=role_name, keep_logs=keep_logs, data=data, dry_run=dry_run
        )


@app.command(
    epilog=examples(
        "smlt policy smlt my-bucket smlt-role --create-bucket --create-role --deployer > deployer.json",
        "smlt policy smlt s3://my-bucket/team --function --account 123456789012 --region eu-west-1",
    )
)
def policy(
    function: Annotated[str, _FUNCTION],
    bucket: Annotated[str, _BUCKET],
    role: Annotated[
        str | None, typer.Argument(help="The function's role: an ARN, or a name. For the deployer's policy.")
    ] = None,
    deployer: Annotated[bool, typer.Option("--deployer", help="Only the policy of whoever deploys and trains.")] = False,
    of_function: Annotated[bool, typer.Option("--function", help="Only the policy of the function.")] = False,
    commands: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="COMMAND", help="deploy, destroy, train, logs, stop.", show_default="all"),
    ] = None,
    store: Annotated[str | None, _STORE] = None,
    subnet: Annotated[list[str] | None, _SUBNET] = None,
    image: Annotated[str | None, _IMAGE] = None,
    layer: Annotated[str | None, typer.Option("--layer", metavar="ARN", help="A published layer version.")] = None,
    create_bucket: Annotated[bool, _CREATE_BUCKET] = False,
    create_role: Annotated[bool, _CREATE_ROLE] = False,
    account: Annotated[
        str | None, typer.Option(metavar="ID", help="The account's number.", show_default="asked of AWS")
    ] = None,
    region: Region = None,
    profile: Profile = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Print the IAM policies as JSON: what the function may do, and what whoever deploys it must be allowed.

    Give the options that `smlt deploy` will be given: a right that none of them needs is left out. With --account and
    --region AWS is not asked.
    """
    from smlt.client.deployment.names import Place, RoleName
    from smlt.client.deployment.printing import print_policies

    if deployer and of_function:
        raise ConfigError("--deployer and --function: give one of them, or none for both")
    if not of_function and role is None:
        raise ConfigError("give ROLE: the deployer's policy names it; or --function for the function's policy alone")
    given = {"create_bucket": create_bucket, "create_role": create_role, "vpc": bool(subnet), "image": bool(image)}
    made = print_policies(
        function,
        Place.parse(bucket),
        RoleName.parse(role) if role else None,
        account=account,
        commands=commands,
        options=[name for name, is_given in given.items() if is_given],
        store=store,
        image=image,
        layer=layer,
    )
    wanted = made["deployer"] if deployer else made["function"] if of_function else made
    typer.echo(json.dumps(wanted, indent=2))
