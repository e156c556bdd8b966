"""examples/resnet.py: the models are the papers', and two workers train a narrow one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from commandline import REPOSITORY, smlt, steps

from smlt.errors import ConfigError

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))

import resnet  # noqa: E402

NARROW = """
from resnet import ResNet


class Narrow(ResNet):
    width = 8
    lr = 0.1
"""


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_the_models_have_as_many_parameters_as_the_papers(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = resnet.resnet(depth, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_another_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match="RESNET_DEPTH=19: choose one of 18, 34, 50, 101, 152"):
        resnet.resnet(19, 10)


def test_a_small_picture_keeps_its_pixels_until_the_second_level() -> None:
    with torch.device("meta"):
        model = resnet.resnet(50, 10, small=True)
    seen = []
    model[-3].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert seen == [(2, 2048, 4, 4)]


def test_each_picture_is_cut_where_it_is_said() -> None:
    images = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)
    top, left = torch.tensor([0, 4, 2, 1, 3]), torch.tensor([4, 0, 1, 1, 2])
    found = resnet.cropped(images, 8, top, left)
    for image, cut, row, column in zip(images, found, top, left, strict=True):
        assert torch.equal(cut, image[:, row : row + 8, column : column + 8])


def test_two_workers_train_a_narrow_resnet_by_a_script_of_ones_own_and_the_loss_falls(tmp_path: Path) -> None:
    for name in ("resnet.py", "resnet_images.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "narrow.py").write_text(NARROW)
    done = smlt(
        *("train", "narrow.py", "--workers", 2, "--epochs", 1, "--global-batch-size", 32, "--name", "run"), cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "smlt-runs" / "run"
    losses = [loss for _, loss in steps(run)]
    assert len(losses) == 45
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for rank in range(2):
        log = (run / "logs" / f"worker-{rank}.log").read_text()
        assert "ResNet-18 on scikit-learn's digits (no --data was given): 1,437 to train, 360 to test" in log
        assert "Traceback" not in log  # torch.classes answers to any name, also when its worker leaves
