"""A script under `smlt launch`: `python -m smlt.worker.launched SCRIPT [ARGUMENTS]`, run as `python SCRIPT` would.

stdin is the life line, so the script ends when `smlt launch` is gone.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path

from smlt.worker.lifeline import end_with_parent


def main() -> None:
    """Run the script named by the first argument."""
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    end_with_parent()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            _forgo_farewells()
        raise
    except Exception as error:
        _forgo_farewells()
        trace = error.__traceback__  # begin where the script does, as `python SCRIPT` would
        while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)
        sys.exit(1)


def _forgo_farewells() -> None:
    for name in ("communicator", "two_level"):
        module = sys.modules.get(f"smlt.collective.{name}")  # if the script has any
        if module is not None:
            module.forgo_farewells()


if __name__ == "__main__":
    main()
