"""`smlt estimate` and what it is made of: profiling a task, offers, the machine instead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import REPOSITORY, smlt, write_task

from smlt.client.cost import CostModel, Platform, Workload
from smlt.client.offers import better_machine, interesting, machine_like, machines, offers, recommended
from smlt.client.optimizer.goals import Goal
from smlt.client.profiling import profile
from smlt.client.rehearsal import rehearse
from smlt.errors import ConfigError, TaskError
from smlt.worker.buckets import FIRST_BUCKET_MB, plan_buckets

TORCH_TASK = """
import torch
from torch import nn
import smlt

class Lines(smlt.Task):
    def data(self):
        lines = (self.data_dir / "rows.txt").read_text().splitlines()
        rows = torch.tensor([[float(value) for value in line.split()] for line in lines])
        return {"train": rows, "test": rows[:8]}
    def model(self):
        return nn.Sequential(nn.Linear(2, 600), nn.Linear(600, 600), nn.Linear(600, 1))
    def loss(self, model, batch):
        return model(batch[:, :2]).sub(1).pow(2).mean()
    def optimizer(self, model):
        return torch.optim.Adam(model.parameters())
    def evaluate(self, model, batch):
        return {"mean": model(batch[:, :2]).mean().item()}
"""

WORKLOAD = Workload(
    "task.py",
    samples=100_000,
    epochs=20,
    global_batch_size=512,
    compute=((1, 0.02), (512, 4.0)),
    gradients=(("float32", 1_000_000),),
    base_mb=300,
    sample_mb=0.5,
    cores=2,
)


# ---- profiling ----


def test_a_numpy_task_is_profiled_by_real_steps(tmp_path: Path) -> None:
    said: list[str] = []
    found = profile(write_task(tmp_path), global_batch_size=16, epochs=7, codec="fp32", budget_s=0.3, say=said.append)
    assert (found.samples, found.test_samples, found.epochs, found.global_batch_size) == (64, 64, 7, 16)
    assert found.gradients == (("float32", 3),)
    assert [batch for batch, _ in found.compute] == [1, 2, 4, 8, 16]
    assert all(0 < low <= high for (_, low), (_, high) in zip(found.compute, found.compute[1:], strict=False))
    assert found.tail_fraction == 0  # nothing leaves before backward has ended
    assert found.checkpoint_bytes == 2 * 3 * 4  # weights and momentum
    assert found.checkpoint_s > 0
    assert found.import_s > 0
    assert found.base_mb > 20
    assert found.crowding >= 1
    assert Workload.from_json(found.to_json()) == found
    assert any("16 of 16 samples" in text for text in said)


def test_a_torch_task_with_data_is_profiled_and_its_gradients_leave_in_buckets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("1 2 3\n" * 40)
    script = tmp_path / "lines.py"
    script.write_text(TORCH_TASK)
    found = profile(script, tmp_path / "data", global_batch_size=8, budget_s=0.3, bucket_mb=1.0, crowd=False)
    parameters = 2 * 600 + 600 + 600 * 600 + 600 + 600 + 1
    assert found.gradients == (("float32", parameters),)
    assert found.checkpoint_bytes >= 3 * 4 * parameters  # Adam's two moments
    assert (found.data_bytes, found.data_files) == (240, 1)
    assert 0 < found.tail_fraction < 1
    assert sum(found.bucket_bytes()) == 2 * parameters
    assert found.bucket_bytes() == (2 * (600 + 1 + 360_000 + 600), 2 * 1800)  # the last parameters come first


def test_buckets_are_counted_as_the_worker_cuts_them() -> None:
    layers = [("float32", 250_000, 4)] * 44  # 11 M parameters
    cut = plan_buckets(layers, 4 << 20, int(FIRST_BUCKET_MB * 2**20))
    known = replace(WORKLOAD, gradients=(("float32", 11_000_000),), tail_fraction=0.5).bucket_bytes()
    assert abs(len(known) - len(cut)) <= 2
    assert sum(known) == 22_000_000
    assert replace(WORKLOAD, tail_fraction=0.0).bucket_bytes() == (2_000_000,)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("\n        raise KeyError('lost')\n", r"tiny.py, line \d+: KeyError: 'lost'"),
        ("\n        os._exit(3)\n", "the profiled process ended .exit code 3"),
        ("\n        os.kill(os.getpid(), signal.SIGKILL)\n", "too little memory"),
    ],
)
def test_what_the_script_does_wrong_is_told_as_the_tasks_error(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        profile(write_task(tmp_path, line), global_batch_size=16, budget_s=0.2)


def test_a_script_that_does_not_import_or_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(TaskError, match=r"bad.py does not import: .*nothing_of_that_name"):
        profile(tmp_path / "bad.py")
    with pytest.raises(TaskError, match="no script"):
        profile(tmp_path / "none.py")
    with pytest.raises(TaskError, match="no such folder"):
        profile(write_task(tmp_path), tmp_path / "nowhere")


def test_what_the_task_prints_is_no_answer(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        print('{}')\n")
    assert profile(script, global_batch_size=4, budget_s=0.1, crowd=False).samples == 64


def test_a_rehearsal_is_a_real_run_that_leaves_nothing_and_scales_the_model(tmp_path: Path) -> None:
    script = write_task(tmp_path)
    found = profile(script, global_batch_size=16, budget_s=0.1)
    seen = rehearse(script, None, found, 2)
    assert seen.observation.choice.workers == 2
    assert seen.observation.steps > 10
    model = CostModel(found, Platform.local(2)).with_rehearsal(seen)
    step = model.step(seen.observation.choice, 16)
    assert step.total_s - step.epoch_end_s == pytest.approx(seen.observation.step_s)
    job = model.job(seen.observation.choice)
    assert job.start_s == pytest.approx(seen.start_s)
    assert job.end_s == pytest.approx(seen.end_s)
    assert not list(tmp_path.glob("smlt-runs*"))


def test_a_rehearsal_whose_task_fails_says_so(tmp_path: Path) -> None:
    script = write_task(tmp_path, "\n        raise ValueError('no')\n")
    with pytest.raises(TaskError, match=r"the rehearsal has ended: .*no"):
        rehearse(script, None, WORKLOAD, 1)


# ---- offers ----


def test_the_front_is_what_nothing_beats_in_both() -> None:
    model = CostModel(WORKLOAD, Platform.on_lambda())
    found = offers(model, model.space(128))
    for offer in found:
        beaten = any(other.seconds <= offer.seconds and other.usd < offer.usd for other in found)
        assert offer.on_front is not beaten


def test_what_is_recommended_is_the_best_for_the_goal() -> None:
    model = CostModel(WORKLOAD, Platform.on_lambda())
    found = offers(model, model.space(128))
    middle = found[len(found) // 2]
    deadline, budget = middle.seconds, sorted(offer.usd for offer in found)[len(found) // 2]
    in_time = recommended(found, Goal(deadline_s=deadline))
    assert in_time is not None
    assert in_time.seconds * 1.15 <= deadline
    assert in_time.usd == min(o.usd for o in found if o.seconds * 1.15 <= deadline)
    cheap = recommended(found, Goal(budget_usd=budget))
    assert cheap is not None
    assert cheap.seconds == min(o.seconds for o in found if o.usd * 1.15 <= budget)
    trade = recommended(found, Goal())
    assert trade is not None
    assert trade.seconds * trade.usd == min(o.seconds * o.usd for o in found)
    assert recommended(found, Goal(deadline_s=found[0].seconds / 2)) is None
    tight = recommended(found, Goal(deadline_s=found[0].seconds * 1.01))  # nothing has a margin there
    assert tight is not None


def test_a_few_rows_are_shown_and_the_recommended_one_is_among_them() -> None:
    model = CostModel(WORKLOAD, Platform.on_lambda())
    found = offers(model, model.space(128))
    taken = recommended(found, Goal(deadline_s=found[-1].seconds))
    rows = interesting(found, taken)
    assert len(rows) <= 15 < len(found)
    assert taken in rows
    assert found[0] in rows


def test_a_long_job_is_cheaper_on_a_machine_and_a_short_one_with_a_deadline_is_not_faster_there() -> None:
    long = CostModel(replace(WORKLOAD, epochs=50), Platform.on_lambda())
    found = offers(long, long.space(16))
    taken = recommended(found, Goal())
    assert taken is not None
    machine = better_machine(taken, machines(long))
    assert machine is not None
    assert machine.usd < taken.usd
    assert machine.seconds <= taken.seconds
    short = CostModel(replace(WORKLOAD, samples=512, epochs=1), Platform.on_lambda())
    quick = offers(short, short.space(64))[0]
    assert better_machine(quick, machines(short)) is None  # it has not booted yet
    like = machine_like(quick, machines(short))
    assert like is not None
    assert like.vcpus >= 0.9 * quick.choice.workers * quick.choice.memory_mb / 1769 or like == machines(short)[-1]


# ---- the command ----


def test_the_command_prints_a_table_with_marks_and_a_recommendation(tmp_path: Path) -> None:
    WORKLOAD.save(tmp_path / "task.json")
    done = smlt("estimate", "--workload", "task.json", "--epochs", "50", "--deadline", "1h", "--budget", "$40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "50 epochs of 196 steps" in lines[0]
    assert sum(line.startswith(">") for line in lines) == 1
    assert any("too late" in line for line in lines)
    assert any("in time" in line for line in lines)
    assert "recommended: " in done.stdout
    assert "Lambda is the wrong tool" in done.stdout
    assert "c6i." in done.stdout


def test_the_command_profiles_keeps_what_it_found_and_speaks_json(tmp_path: Path) -> None:
    write_task(tmp_path)
    asked = ("--global-batch-size", 16, "--max-workers", 8, "--save", "task.json", "--json", "--arch", "arm64")
    done = smlt("estimate", "tiny.py", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["platform"]["architecture"] == "arm64"
    assert {offer["workers"] for offer in answer["offers"]} == set(range(1, 9))
    assert answer["recommended"] in answer["offers"]
    assert answer["bill"]["total_usd"] == pytest.approx(answer["recommended"]["usd"])
    assert all(machine["node"].startswith("c7g.") for machine in answer["machines"])
    assert Workload.load(tmp_path / "task.json").to_json() == json.dumps(answer["workload"], indent=1)


def test_a_budget_on_this_machine_and_other_contradictions_are_refused(tmp_path: Path) -> None:
    WORKLOAD.save(tmp_path / "task.json")
    for arguments, said in (
        (("--workload", "task.json", "--on", "local", "--budget", "5"), "cost nothing"),
        (("--workload", "task.json", "--on", "moon"), "local, lambda"),
        (("--workload", "task.json", "--arch", "vax"), "x86_64"),
        (("--workload", "task.json", "--store-node", "x9.large"), "x9.large"),
        (
            (
                "--workload",
                "none.json",
            ),
            "none.json",
        ),
        (("--workload", "task.json", "script.py"), "no SCRIPT"),
        (("--workload", "task.json", "--deadline", "soon"), "soon"),
        ((), "SCRIPT"),
    ):
        done = smlt("estimate", *arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_failing_script_is_one_line_and_the_tasks_exit_code(tmp_path: Path) -> None:
    write_task(tmp_path, "\n        raise KeyError('lost')\n")
    done = smlt("estimate", "tiny.py", cwd=tmp_path)
    assert done.returncode == TaskError.exit_code
    assert "KeyError: 'lost'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_workload_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"script": "x"}', '{"script": "x", "new": 1}'):
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(ConfigError, match=r"task\.json"):
            Workload.load(tmp_path / "task.json")


def test_the_examples_can_be_profiled() -> None:
    found = profile(REPOSITORY / "examples" / "digits_numpy.py", budget_s=0.2, crowd=False)
    assert found.samples == 1437
