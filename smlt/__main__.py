"""`smlt` and `python -m smlt`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line."""
    try:
        import rich
        import typer
    except ImportError as error:
        print(f"smlt: the command line needs {error.name}: pip install 'smlt[train]'", file=sys.stderr)
        return 2
    del rich, typer
    from smlt.cli import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
