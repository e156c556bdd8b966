"""The models that the study trains, in numbers: elements of the gradient, seconds of a core for a sample."""

from __future__ import annotations

from dataclasses import dataclass

from smlt.client.workload import Workload

SAMPLES = 50_000  # of an epoch: CIFAR-10's; as many sequences for BERT


@dataclass(frozen=True)
class Model:
    """`sample_s`: forward and backward of a sample on one core of the calibrated machine.

    Measured in one thread, batches of 16 and 4 (processor's time, best of 5): ResNet-18 of bench/models.py on 32x32 images
    25 ms, four encoder layers of BERT's of 512 with 128 tokens 107 ms. ResNet-50 (32x32) and eight layers follow from these
    by their operations: 1.3 G multiplications a sample against 0.56 G, twice the layers.
    """

    name: str
    floats: int
    sample_s: float

    def workload(self, local_batch: int, workers: int) -> Workload:
        """For the cost model: weak scaling, the local batch stays."""
        points = tuple((size, size * self.sample_s) for size in sorted({1, local_batch}))
        return Workload(
            script=self.name,
            samples=SAMPLES,
            epochs=1,
            global_batch_size=local_batch * workers,
            compute=points,
            gradients=(("float32", self.floats),),
            optimizer_s=2e-9 * self.floats,
            model_bytes=4 * self.floats,
            checkpoint_bytes=12 * self.floats,
            checkpoint_s=4e-9 * self.floats,
            data_bytes=SAMPLES * 3072,
            data_files=6,
            import_s=1.5,
            load_s=0.3,
            base_mb=250 + 28e-6 * self.floats,
        )


MODELS = {
    model.name: model
    for model in (
        Model("resnet18", 11_173_962, 0.025),
        Model("resnet50", 25_557_032, 0.059),
        Model("bert-small", 28_763_648, 0.107),
        Model("bert-medium", 41_373_184, 0.214),
    )
}
