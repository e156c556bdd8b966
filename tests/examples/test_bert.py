"""examples/bert.py: the models have the sizes of the papers', and two workers train a tiny one on text."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import REPOSITORY, smlt, steps

from smlt.errors import ConfigError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert  # noqa: E402

TINY = """
from bert import Bert


class Tiny(Bert):
    tokens = 32
    lr = 3e-3

    def configuration(self):
        from transformers import BertConfig

        small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 32}
        return BertConfig(vocab_size=self.text.used, hidden_size=64, **small)
"""


@pytest.mark.parametrize(("size", "parameters"), [("small", 66_985_530), ("medium", 109_514_298), ("large", 335_174_458)])
def test_the_models_have_as_many_parameters_as_the_papers(size: str, parameters: int) -> None:
    task = bert.Bert()
    task.size = size
    with torch.device("meta"):
        model = task.model()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_another_size_or_too_many_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="BERT_SIZE=huge: choose small, medium or large"):
        bert.configuration("huge")
    task = bert.Bert()
    task.tokens = 1024
    with pytest.raises(ConfigError, match="BERT_TOKENS=1024: BERT takes 512 at most"):
        task.model()


def test_of_each_sample_as_many_tokens_are_guessed_and_most_of_them_hidden() -> None:
    task = bert.Bert()
    task.text = SimpleNamespace(used=261)
    tokens = torch.randint(5, 261, (64, 100))
    seen: list[Any] = []

    def model(input_ids: Any) -> Any:
        seen.append(input_ids)
        scores = torch.zeros(*input_ids.shape, 261)
        scores.scatter_(2, tokens[:, :, None], 50.0)  # it knows
        return SimpleNamespace(logits=scores)

    torch.manual_seed(1)
    assert float(task.loss(model, tokens)) < 1e-6
    hidden, changed = seen[0] == bert.MASK, seen[0] != tokens
    assert changed.sum(1).max() <= 15  # of the 15 chosen some stay
    assert 0.72 < int(hidden.sum()) / (64 * 15) < 0.88
    assert 0.04 < int((changed & ~hidden).sum()) / (64 * 15) < 0.16
    assert task.evaluate(model, tokens)["accuracy"] == 1
    assert torch.equal((seen[1] == bert.MASK).sum(1), torch.full((64,), 14))


def test_two_workers_train_a_tiny_bert_on_text_files_and_the_loss_falls(tmp_path: Path) -> None:
    for name in ("bert.py", "bert_text.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "data").mkdir()
    for name in ("scheduler.py", "crew.py"):
        shutil.copy(REPOSITORY / "smlt" / "client" / name, tmp_path / "data" / f"{name}.txt")
    done = smlt(
        *("train", "tiny.py", "--data", "data", "--workers", 2, "--epochs", 1, "--global-batch-size", 32, "--name", "run"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = tmp_path / "smlt-runs" / "run"
    losses = [loss for _, loss in steps(run)]
    assert len(losses) > 20
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    log = (run / "logs" / "worker-1.log").read_text()
    assert "BERT small on 2 text files" in log
    assert "Traceback" not in log
