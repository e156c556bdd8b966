"""Make tokens of text, for bert.py: a WordPiece vocabulary of BERT's size that is learnt from that text, and files of rows.

python examples/bert_tokens.py TOKENS_DIR [--text DIR] [--pattern '*.txt'] [--tokens 128]
smlt train examples/bert.py --data TOKENS_DIR

Without --text it is the source of Python's standard library. Files are read one at a time; every tenth is for the test. The
same text may give some other tokens another time (the tokenizer does not settle ties): make them once, for all workers.
"""

import argparse
from pathlib import Path

import numpy as np
from bert_text import SPECIAL, VOCABULARY, standard_library

#: Rows of a file: 33 MB of 128 tokens.
ROWS = 1 << 17


def learn(paths, vocabulary):
    """A tokenizer with the words of these files: WordPiece, as BERT's (cased)."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    texts = (path.read_text(errors="replace") for path in paths)
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    return tokenizer


class Rows:
    """Writes rows of tokens below `folder`, as many to a file as `ROWS`."""

    def __init__(self, folder, tokens):
        self.folder, self.tokens = folder, tokens
        self.waiting, self.count, self.files = [], 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, ids):
        self.waiting += ids
        if len(self.waiting) >= ROWS * self.tokens:
            self.write()

    def write(self):
        """Whole rows of what there is."""
        rows = len(self.waiting) // self.tokens
        if rows:
            array = np.array(self.waiting[: rows * self.tokens], np.uint16).reshape(rows, self.tokens)
            np.save(self.folder / f"{self.files:05d}.npy", array, allow_pickle=False)
            del self.waiting[: rows * self.tokens]
            self.files, self.count = self.files + 1, self.count + rows


def files_of(folder, pattern):
    if folder is None:
        folder, names = standard_library()
        return [folder / name for name in names]
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("into", type=Path, metavar="TOKENS_DIR", help="a new folder")
    parser.add_argument("--text", type=Path, metavar="DIR", help="a folder of text (the standard library's source)")
    parser.add_argument("--pattern", default="*.txt", help="which files below it (*.txt)")
    parser.add_argument("--tokens", type=int, default=128, help="of a row (128)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help=f"tokens to learn ({VOCABULARY})")
    options = parser.parse_args()
    paths = files_of(options.text, options.pattern)
    if len(paths) < 2:
        parser.error(f"{len(paths)} files fit {options.pattern}: two are wanted, one of them for the test")
    if options.into.exists() and any(options.into.iterdir()):
        parser.error(f"{options.into} is not empty")
    if not len(SPECIAL) < options.vocabulary <= VOCABULARY:
        parser.error(f"--vocabulary: at most {VOCABULARY}, BERT's")
    tokenizer = learn(paths, options.vocabulary)
    parts = {name: Rows(options.into / name, options.tokens) for name in ("train", "test")}
    for number, path in enumerate(paths):
        ids = tokenizer.encode(path.read_text(errors="replace"), add_special_tokens=False).ids
        parts["test" if number % 10 == 9 or number == len(paths) - 1 else "train"].add(ids)
    for rows in parts.values():
        rows.write()
    words = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    (options.into / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    counts = " and ".join(f"{rows.count:,} to {name}" for name, rows in parts.items())
    print(f"{len(words):,} tokens learnt from {len(paths):,} files; rows of {options.tokens}: {counts}")


if __name__ == "__main__":
    main()
