"""Places whose numbers are round, so that what is simulated can be reckoned by hand."""

from __future__ import annotations

from bench.simulator.cluster import Costs, Place

COSTS = Costs(
    encode_s_per_float=1e-10,
    add_s_per_float=1e-10,
    publish_s_per_float=3e-10,
    decode_s_per_float=1e-10,
    worker_s_per_byte=2e-10,
    worker_message_s=2e-6,
    worker_wake_s=5e-6,
    store_in_s_per_byte=1e-10,
    store_out_s_per_byte=2e-10,
    store_command_s=3e-6,
    store_serve_s=3e-6,
    store_wake_s=3e-6,
)
FREE = COSTS.scaled(0.0)
LINKS = Place("links", COSTS, link_bytes_per_s=75e6, latency_s=250e-6, store_bytes_per_s=1.25e9)
LOCAL = Place("local", COSTS, cores=2, release_s=20e-6, socket_bytes=212_992)
