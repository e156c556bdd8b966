"""The drop-in: average an array over workers, in a script of one's own.

smlt launch -n 4 examples/allreduce.py
"""

import numpy as np

import smlt

smlt.init()
gradient = np.full(1_000_000, smlt.rank(), np.float32)
mean = smlt.allreduce(gradient)
print(f"rank {smlt.rank()} of {smlt.world_size()}: mean {mean[0]}")
