"""A Lambda handler of your own that averages something over n invocations.

Invoke the function n times at once, each with {"smlt": {"store": "redis://...", "job": "mean-1", "rank": r, "world_size": n}}.
The next round of invocations takes another job, or the same with a higher "generation".
"""

import numpy as np

import smlt


def handler(event, context):
    smlt.init(event)  # a warm sandbox that is asked for the same place stays connected
    gradient = np.full(1000, smlt.rank(), np.float32)
    gradient = smlt.allreduce(gradient)
    return {"rank": smlt.rank(), "mean": float(gradient[0])}
