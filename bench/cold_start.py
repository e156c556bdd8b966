"""How long a cold function takes to its first collective, in `smlt lambda-local`: init phase and handler, from the REPORT.

    python -m bench.cold_start --layer layer.zip [--workers 2] [--rounds 15]

The layer is one of `smlt layer build`, under a bare Python: nothing else but what Lambda's runtime ships. Each round starts new
sandboxes; the handler is examples/lambda_handler.py, an all-reduce of 1,000 floats over --workers invocations at once. The
bar: 300 ms. For comparison what of it the interpreter, the runtime client and NumPy take: a handler that imports NumPy alone.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3

from smlt.emulator import LambdaLocal
from smlt.store.embedded import EmbeddedStore

ROOT = Path(__file__).parents[1]
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}
HANDLERS = {
    "smlt": (ROOT / "examples" / "lambda_handler.py").read_text(),
    "numpy alone": "import numpy\ndef handler(event, context):\n    return {}\n",
}


def packed(source: str) -> bytes:
    """A function's zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("lambda_handler.py", source)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with LambdaLocal() as local, EmbeddedStore() as store, ThreadPoolExecutor(options.workers) as pool:
        where: Any = {"endpoint_url": local.endpoint_url, "region_name": "us-east-1", **local.credentials}
        client = boto3.client("lambda", **where)
        role = boto3.client("iam", **where).create_role(RoleName="cold", AssumeRolePolicyDocument=json.dumps(TRUST))
        layer = client.publish_layer_version(LayerName="smlt", Content={"ZipFile": options.layer.read_bytes()})
        for name, source in HANDLERS.items():
            client.create_function(
                FunctionName=name.replace(" ", "-"),
                Runtime="python3.11",
                Role=role["Role"]["Arn"],
                Handler="lambda_handler.handler",
                Code={"ZipFile": packed(source)},
                Layers=[layer["LayerVersionArn"]],
                Timeout=60,
                MemorySize=1769,
            )
        times: dict[str, list[float]] = {name: [] for name in HANDLERS}
        inits: dict[str, list[float]] = {name: [] for name in HANDLERS}
        for number in range(options.rounds + 1):
            for name in HANDLERS:
                function = name.replace(" ", "-")
                variables = {"ROUND": str(number)}
                client.update_function_configuration(FunctionName=function, Environment={"Variables": variables})
                events = [
                    {"smlt": {"store": store.tcp_url, "job": f"j{number}", "rank": rank, "world_size": options.workers}}
                    for rank in range(options.workers if name == "smlt" else 1)
                ]
                before = len(local.invocations)
                list(pool.map(lambda event: client.invoke(FunctionName=function, Payload=json.dumps(event)), events))  # noqa: B023
                made = local.invocations[before:]
                assert all(record.status == "ok" and record.init_ms is not None for record in made), made
                if number:  # the first unpacks the layer
                    times[name] += [float(record.init_ms or 0) + record.duration_ms for record in made]
                    inits[name] += [float(record.init_ms or 0) for record in made]
    for name in HANDLERS:
        low, middle, high = (round(value) for value in statistics.quantiles(times[name], n=4))
        print(f"{name}: median {middle} ms (quartiles {low} to {high}), init {round(statistics.median(inits[name]))}")


if __name__ == "__main__":
    main()
