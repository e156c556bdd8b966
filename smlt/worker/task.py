"""What a user writes: a model, its data, a loss, an optimizer, an evaluation."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smlt.errors import ConfigError, TaskError
from smlt.worker.files import DataFiles, LocalFiles
from smlt.worker.hyperparameters import parse_assignments, set_hyperparameters

REQUIRED = ("model", "data", "loss", "optimizer")


class Task:
    """A training task: subclass it once in a script and fill in its parts.

    It is a class, not a set of functions, because the parts belong together and often share something (a tokenizer, sizes,
    hyper-parameters as class attributes), because a missing part can be named before training starts, and because a
    script may hold any other functions beside it. It imports nothing that exists on a worker only: `Digits.main()` trains
    it in this process, with one worker and no store, for debugging.

    Class attributes are its hyper-parameters: `lr = 0.1` is a default, read as `self.lr`, and `smlt train --set lr=0.05` trains
    with another value; `smlt sweep` looks for good ones.

    >>> class Digits(smlt.Task):  # doctest: +SKIP
    ...     def model(self): return nn.Linear(64, 10)
    ...     def data(self): return {"train": (x, y), "test": (x_test, y_test)}
    ...     def loss(self, model, batch): return F.cross_entropy(model(batch[0]), batch[1])
    ...     def optimizer(self, model): return torch.optim.SGD(model.parameters(), lr=0.1)
    """

    _data_files: DataFiles | None = None

    @property
    def data_files(self) -> DataFiles:
        """The files given by `--data DIR`: `names`, `open`, `path`; `smlt.open_shards` makes a data set of them.

        They lie on this disk when there is room for them, else they are read from the object store as they are needed. Raises
        TaskError when no `--data` was given.
        """
        if self._data_files is None:
            raise TaskError("the task reads its data_dir or data_files: give its files with --data DIR")
        return self._data_files

    @data_files.setter
    def data_files(self, files: DataFiles) -> None:
        self._data_files = files

    @property
    def data_dir(self) -> Path:
        """The files given by `--data DIR`, as a local folder. The script itself runs from a copy: files beside it are not
        there, Python modules that it imports are.

        Raises TaskError when no `--data` was given, StoreFull when there is no room for it all on this disk.
        """
        return self.data_files.folder()

    @data_dir.setter
    def data_dir(self, folder: Path) -> None:
        self._data_files = LocalFiles(folder)

    def model(self) -> Any:
        """The model: a `torch.nn.Module`, a `keras.Model`, a JAX pytree, a `gluon.Block`, a scikit-learn estimator with
        `partial_fit`, or a dict of NumPy arrays by name (docs/frameworks.md). Seeded alike on every worker.
        """
        raise NotImplementedError

    def data(self) -> dict[str, Any]:
        """The data sets: {"train": ..., "test": ... (optional)}.

        Each is an array or tensor, a tuple or dict of these with equal first dimension, or any object with `__len__` and
        `__getitem__` (its samples are stacked). A batch has the same form, with the batch as first dimension.
        """
        raise NotImplementedError

    def loss(self, model: Any, batch: Any) -> Any:
        """The mean loss over a batch: a scalar of the framework; for NumPy (loss, gradients by name)."""
        raise NotImplementedError

    def optimizer(self, model: Any) -> Any:
        """The framework's optimizer, such as a `torch.optim.Optimizer`; for NumPy an object with `step(gradients)`,
        `state_dict()`, `load_state_dict(state)`, such as `smlt.worker.frameworks.numpy.SGD(model, lr, momentum)`.
        """
        raise NotImplementedError

    def evaluate(self, model: Any, batch: Any) -> dict[str, float]:
        """Metrics as means over a batch of the test set, for example {"accuracy": 0.97}. Optional."""
        return {}

    def global_batch_size(self, epoch: int, metrics: dict[str, float]) -> int | None:
        """How many samples a step takes in `epoch` (from 0), all workers together; None: as many as before. Optional.

        Called as an epoch begins. `metrics`: what evaluate() gave behind the epoch before (before epoch 0: nothing), and under
        "global_batch_size" the batch it was trained with. It is called on every worker, also on those that came later, and
        again after a failure: it must depend on nothing but its arguments and what never changes; what it keeps in `self`
        is lost with the worker. The learning rate follows as --lr-rule says. --batch-schedule is its like by epochs.
        """
        return None

    @classmethod
    def main(cls, arguments: list[str] | None = None) -> None:
        """Train in this process: one worker, no store. Options: --epochs, --global-batch-size, --seed, --data, --set, and those
        of adaptive training: --batch-schedule, --lr-rule, --target-accuracy, --patience, --stop-metric, --stop-mode.
        """
        from smlt.worker.alone import option_parser, train_alone

        parser = option_parser(cls.__name__)
        options = vars(parser.parse_args(arguments))
        data, chosen = options.pop("data"), options.pop("set")
        check_task(cls, inspect.getsourcefile(cls) or "the script")
        try:
            set_hyperparameters(cls, parse_assignments(chosen))
            task = cls()
            if data is not None:
                task.data_dir = data
            train_alone(task, **options)
        except ConfigError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def check_task(task: type[Task], where: str) -> None:
    """TaskError when `task` lacks a part."""
    missing = [name for name in REQUIRED if getattr(task, name) is getattr(Task, name)]
    if missing:
        raise TaskError(f"{where}: class {task.__name__} lacks {', '.join(f'{name}()' for name in missing)}")


def load_task(path: Path, hyperparameters: Mapping[str, Any] | None = None) -> Task:
    """Import the script at `path` and return an instance of its one Task subclass, with these hyper-parameters.

    The script's folder is put on `sys.path`, as `python script.py` would. TaskError when it does not import (the user's
    exception is its cause), holds no Task or several, or the Task lacks a part; ConfigError when it has no such
    hyper-parameter.
    """
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"_smlt_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path.name}: not a Python script")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TaskError(f"{path.name} does not import: {type(error).__name__}: {error}") from error
    tasks = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value is not Task and value.__module__ == name
    ]
    if not tasks:
        raise TaskError(f"{path.name} holds no task: define a class that inherits from smlt.Task")
    if len(tasks) > 1:
        raise TaskError(f"{path.name} holds {len(tasks)} tasks ({', '.join(t.__name__ for t in tasks)}): one is wanted")
    check_task(tasks[0], path.name)
    set_hyperparameters(tasks[0], hyperparameters or {})
    return tasks[0]()
