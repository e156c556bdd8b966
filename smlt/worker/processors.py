"""How many threads a function's memory is worth: Lambda gives processors by memory, and shows more than it gives."""

from __future__ import annotations

import os

#: A vCPU comes with so much memory. https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
MB_PER_VCPU = 1769
#: Read by OpenMP, OpenBLAS and MKL when they are loaded, by TensorFlow and XLA (JAX) when they first compute.
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "PJRT_NPROC")


def threads_of(memory_mb: int) -> int:
    """Threads for a function of so much memory, at least one."""
    return max(1, round(memory_mb / MB_PER_VCPU))


def limit_threads() -> None:
    """In a function: let the numeric libraries take what there is. Before they are imported; what is set already stays."""
    memory = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    if memory.isdigit():
        for name in VARIABLES:
            os.environ.setdefault(name, str(threads_of(int(memory))))
