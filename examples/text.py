"""A small language model on the Python standard library's own source text: the next character from the last 32.

smlt train examples/text.py --workers 4 --epochs 1 --global-batch-size 256
"""

import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import smlt

CONTEXT = 32


class Windows:
    """Every `CONTEXT` characters of the text and the one behind them."""

    def __init__(self, text, stride):
        self.text, self.stride = text, stride

    def __len__(self):
        return (len(self.text) - CONTEXT - 1) // self.stride

    def __getitem__(self, index):
        at = index * self.stride
        return self.text[at : at + CONTEXT], self.text[at + CONTEXT]


class Text(smlt.Task):
    def data(self):
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
        text = torch.tensor(list(b"".join(file.read_bytes() for file in files))) % 128
        cut = len(text) * 9 // 10
        return {"train": Windows(text[:cut], 11), "test": Windows(text[cut:], 101)}

    def model(self):
        return nn.Sequential(nn.Embedding(128, 24), nn.Flatten(), nn.Linear(CONTEXT * 24, 256), nn.GELU(), nn.Linear(256, 128))

    def loss(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=2e-3)

    def evaluate(self, model, batch):
        scores = model(batch[0])
        accuracy = (scores.argmax(1) == batch[1]).float().mean().item()
        return {"accuracy": accuracy, "nats_per_character": functional.cross_entropy(scores, batch[1]).item()}


if __name__ == "__main__":
    Text.main()
