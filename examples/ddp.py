"""DistributedDataParallel in the form of PyTorch's tutorials; nothing but the backend's name is SMLT's.

python examples/ddp.py --backend smlt --workers 2        # or gloo
torchrun --nproc-per-node 2 examples/ddp.py --backend smlt

A two-layer model takes one step, a checkpoint goes from rank 0 to the others, and a trainer learns handwritten digits
(scikit-learn's 1,797 images of 8x8 pixels) from a DistributedSampler's batches.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from smlt.store.embedded import EmbeddedStore


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1 = nn.Linear(10, 10)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(10, 5)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))


def demo_basic(rank):
    """One step of DDP on random data, each worker its own."""
    torch.manual_seed(rank)
    ddp_model = DDP(ToyModel())
    optimizer = optim.SGD(ddp_model.parameters(), lr=0.001)

    optimizer.zero_grad()
    outputs = ddp_model(torch.randn(20, 10))
    loss = nn.MSELoss()(outputs, torch.randn(20, 5))
    loss.backward()
    optimizer.step()
    return loss.item(), ddp_model.module.state_dict()


def demo_checkpoint(rank):
    """Rank 0 saves a checkpoint, the others load it behind a barrier."""
    torch.manual_seed(rank)
    ddp_model = DDP(ToyModel())
    path = [tempfile.mkstemp(suffix=".pt")[1] if rank == 0 else None]
    dist.broadcast_object_list(path)
    if rank == 0:
        torch.save(ddp_model.state_dict(), path[0])
    dist.barrier()
    ddp_model.load_state_dict(torch.load(path[0], weights_only=True))
    dist.barrier()
    if rank == 0:
        os.remove(path[0])


class Trainer:
    def __init__(self, model, train_data, optimizer, rank, save_every, path):
        self.rank = rank
        self.train_data = train_data
        self.optimizer = optimizer
        self.save_every = save_every
        self.path = path
        self.losses = []
        self.model = DDP(model)

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        output = self.model(source)
        loss = functional.cross_entropy(output, targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _run_epoch(self, epoch):
        self.train_data.sampler.set_epoch(epoch)
        losses = [self._run_batch(source, targets) for source, targets in self.train_data]
        self.losses += losses
        print(f"[rank {self.rank}] epoch {epoch} | steps {len(losses)} | loss {sum(losses) / len(losses):.4f}", flush=True)

    def _save_checkpoint(self, epoch):
        torch.save({"epoch": epoch, "model": self.model.module.state_dict(), "losses": self.losses}, self.path)

    def train(self, max_epochs):
        for epoch in range(max_epochs):
            self._run_epoch(epoch)
            if self.rank == 0 and self.path and (epoch + 1) % self.save_every == 0:
                self._save_checkpoint(epoch)


def load_train_objects():
    images, labels = load_digits(return_X_y=True)
    train_set = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return train_set, model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def prepare_dataloader(dataset, batch_size):
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, sampler=DistributedSampler(dataset))


def run(options):
    rank = dist.get_rank()
    loss, _ = demo_basic(rank)
    print(f"[rank {rank}] of {dist.get_world_size()}, backend {dist.get_backend()} | two layers, one step: loss {loss:.4f}")
    demo_checkpoint(rank)
    dataset, model, optimizer = load_train_objects()
    train_data = prepare_dataloader(dataset, options.batch_size)
    Trainer(model, train_data, optimizer, rank, options.save_every, options.save).train(options.epochs)


def main(rank, world_size, options):
    if options.backend == "smlt":
        import smlt.torch  # noqa: F401  (registers the backend)
    if rank is not None:  # else torchrun has set them
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    dist.init_process_group(options.backend, init_method=options.init_method)
    run(options)
    dist.destroy_process_group()


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="smlt")
    parser.add_argument("--init-method", help="e.g. redis://host:6379: the workers meet in the store, and none listens")
    parser.add_argument("--workers", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples a worker and step")
    parser.add_argument("--save-every", type=int, default=5, help="epochs")
    parser.add_argument("--save", help="file for checkpoints")
    return parser.parse_args(arguments)


def spawn(options):
    """Start the workers, and for smlt a store of their own unless SMLT_STORE names one."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29511")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the workers share the cores
    with ExitStack() as stack:
        if options.backend == "smlt" and not os.environ.get("SMLT_STORE"):
            os.environ["SMLT_STORE"] = stack.enter_context(EmbeddedStore()).url
        mp.spawn(main, args=(options.workers, options), nprocs=options.workers)


if __name__ == "__main__":
    options = parse()
    if "RANK" in os.environ:
        main(None, None, options)
    else:
        spawn(options)
