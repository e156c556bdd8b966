"""Text for bert.py. `--data DIR` may hold

    train/*.npy and test/*.npy: tokens, uint16 (rows, tokens), as bert_tokens.py makes them of text, with vocab.txt
    *.txt, in whatever folders: one text, of which each byte is a token. The last tenth is for the test.

Without --data it is the source of Python's standard library, byte by byte. Nothing is read before a batch wants it; SMLT loads
batches ahead of the step.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import smlt
from smlt.errors import TaskError
from smlt.worker.files import LocalFiles

#: BERT's number of tokens, whether they are used or not: the model's size follows from it.
VOCABULARY = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL.index("[MASK]")
FIRST_BYTE = len(SPECIAL)


@dataclass
class Text:
    """Data sets of int64 (tokens,). `used`: tokens are below it."""

    name: str
    train: Any
    test: Any
    used: int


class Windows:
    """Windows of `tokens` bytes of `names`, one file behind the other: those from the `first` to the `end`, as parts of all."""

    def __init__(self, files, names, tokens, first=0.0, end=1.0):
        self.files, self.tokens = files, tokens
        sizes = [files.size(name) for name in names]
        self.names = [name for name, size in zip(names, sizes, strict=True) if size]
        self.ends = np.cumsum([size for size in sizes if size])
        count = sum(sizes) // tokens
        self.first = int(count * first)
        self.count = int(count * end) - self.first

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        windows = [list(self._ranges((self.first + index) * self.tokens)) for index in indices]
        pieces = iter(self.files.read([one for ranges in windows for one in ranges]))
        texts = [b"".join(next(pieces) for _ in ranges) for ranges in windows]
        return [np.frombuffer(text, np.uint8).astype(np.int64) + FIRST_BYTE for text in texts]

    def _ranges(self, start):
        """Where the window that begins at byte `start` lies: a range in each file that it reaches."""
        end, number = start + self.tokens, int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            begins = int(self.ends[number - 1]) if number else 0
            length = min(end, int(self.ends[number])) - start
            yield self.names[number], start - begins, length
            start, number = start + length, number + 1


def open_text(task, tokens):
    """What --data holds, or the standard library's source. TaskError for what is missing or damaged."""
    try:
        files = task.data_files
    except TaskError:
        folder, names = standard_library()
        return _bytes("the standard library's source (no --data was given)", LocalFiles(folder), names, tokens)
    if files.names("train/*.npy"):
        return token_files(files, tokens)
    names = files.names("*.txt")
    if not names:
        raise TaskError(f"--data has neither train/*.npy nor *.txt: it has {', '.join(files.names()[:3])}, ...")
    return _bytes(f"{len(names)} text files", files, names, tokens)


def standard_library():
    """Its folder, and the names of its modules in it: without its tests and what was installed beside it."""
    folder = Path(sysconfig.get_path("stdlib"))
    beside = {"site-packages", "dist-packages", "test", "tests"}
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return folder, sorted(path.as_posix() for path in found if not beside & {*path.parts})


def _bytes(name, files, names, tokens):
    train, test = Windows(files, names, tokens, 0.0, 0.9), Windows(files, names, tokens, 0.9, 1.0)
    if not len(train) or not len(test):
        raise TaskError(f"the text has {sum(map(files.size, names))} bytes: it wants some samples of {tokens}")
    return Text(name, train, test, FIRST_BYTE + 256)


def token_files(files, tokens):
    """What bert_tokens.py has made."""
    with files.open("vocab.txt") as file:
        words = file.read().decode().splitlines()
    if len(words) > VOCABULARY or tuple(words[: len(SPECIAL)]) != SPECIAL:
        raise TaskError(
            f"vocab.txt holds {len(words)} tokens, which do not begin with {' '.join(SPECIAL)}, or above {VOCABULARY}"
        )

    def sample(row):
        if row.dtype != np.uint16 or row.shape != (tokens,) or int(row.max()) >= len(words):
            raise TaskError(
                f"the tokens are {row.dtype} {row.shape} up to {row.max()}: uint16 ({tokens},) below {len(words)} are wanted; "
                "make them anew by bert_tokens.py, or say how many there are in a sample: BERT_TOKENS"
            )
        return row.astype(np.int64)

    train, test = (smlt.open_shards(files, f"{part}/*.npy", transform=sample) for part in ("train", "test"))
    return Text(f"tokens, {len(words):,} different ones", train, test, len(words))
