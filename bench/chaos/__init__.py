"""A training run to which everything happens: see `python -m bench.chaos --help`."""
