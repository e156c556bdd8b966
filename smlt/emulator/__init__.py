"""AWS Lambda on this machine: `smlt lambda-local`, and `LambdaLocal` for tests.

The Invoke API is the emulator's own, with the genuine runtime client in processes; all other services are moto's.
"""

from smlt.emulator.faults import Faults
from smlt.emulator.invoke import Record
from smlt.emulator.local import LambdaLocal
from smlt.emulator.requests_log import Asked

__all__ = ["Asked", "Faults", "LambdaLocal", "Record"]
