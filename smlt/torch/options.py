"""What a process group of the backend "smlt" can be told beside what torch.distributed says."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from smlt.collective.codecs import check_codec
from smlt.collective.tuning import Tuning, check_algorithm


@dataclass(frozen=True)
class Options:
    """For `init_process_group(..., pg_options=)` and `new_group(..., pg_options=)`; a new group takes over the world's.

    Parameters
    ----------
    store
        URL of the parameter store. By default that of the rendezvous, else SMLT_STORE or SMLT_STORE_FILE.
    codec
        What float32 and float64 travel as in all_reduce with SUM and AVG: "fp32" (as they are), "fp16", "bf16" or "int8"
        (see `smlt.collective.codecs`). By default SMLT_CODEC, else "fp32". Tensors of at most 64 elements and all other
        collectives are exact in any case.
    algorithm, chunk_bytes, tuning
        As for `smlt.Communicator`.

    Raises ConfigError for values that cannot work.
    """

    store: str | None = field(default=None, repr=False)
    codec: str = field(default_factory=lambda: os.environ.get("SMLT_CODEC") or "fp32")
    algorithm: str = "auto"
    chunk_bytes: int | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        check_codec(self.codec)
        check_algorithm(self.algorithm)
