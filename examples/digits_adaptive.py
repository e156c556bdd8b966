"""The digits of digits.py with a global batch that is doubled when the model has become good enough for it, up to 256.

smlt train examples/digits_adaptive.py --workers 4 --epochs 25 --lr-rule sqrt
"""

from digits import Digits

#: The accuracy at which a batch has done its part.
ENOUGH = {64: 0.94, 128: 0.96}


class DigitsAdaptive(Digits):
    def global_batch_size(self, epoch, metrics):
        batch = metrics["global_batch_size"]
        return 2 * batch if metrics.get("accuracy", 0.0) >= ENOUGH.get(batch, 1.0) else None


if __name__ == "__main__":
    DigitsAdaptive.main()
