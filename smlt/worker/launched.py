"""A script under `smlt launch`: `python -m smlt.worker.launched SCRIPT [ARGUMENTS]`, run as `python SCRIPT` would.

stdin is the life line, so the script ends when `smlt launch` is gone.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from smlt.worker.lifeline import end_with_parent


def main() -> None:
    """Run the script named by the first argument."""
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    end_with_parent()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
