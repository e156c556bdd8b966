"""The digits of examples/digits_numpy.py, at a pace that a file sets: faults need time to strike."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["CHAOS_EXAMPLES"])
import digits_numpy


class Digits(digits_numpy.DigitsNumpy):
    def loss(self, model, batch):
        time.sleep(float(Path(os.environ["CHAOS_PACE"]).read_text()))
        return super().loss(model, batch)
