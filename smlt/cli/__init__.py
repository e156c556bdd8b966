"""The command line: jobs, what became of them, deployments, tools, and AWS on this machine."""

from __future__ import annotations

import os
import signal
import sys

from smlt.cli import (
    deployment,
    emulator,
    estimate,
    executors,
    jobs,
    layers,
    logs,
    looking,
    optimize,
    report,
    store,
    sweep,
    tools,
    watch,
)
from smlt.cli.common import app
from smlt.errors import SmltError

#: The modules whose commands `app` has; --help shows them in the order of their import.
COMMANDS = (
    jobs,
    sweep,
    executors,
    estimate,
    optimize,
    looking,
    watch,
    report,
    logs,
    deployment,
    layers,
    store,
    tools,
    emulator,
)


def run() -> int:
    """Run the command line; returns the exit code. An expected error is one line on stderr, a traceback means a bug."""
    interrupted_by = _end_in_order()
    try:
        # Not standalone, typer returns the code of a typer.Exit, and None behind a command that came to its end.
        code = app(prog_name="smlt", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except SmltError as error:
        if os.environ.get("SMLT_DEBUG"):
            raise
        print(f"smlt: {error}", file=sys.stderr)
        return error.exit_code
    except (BrokenPipeError, SystemExit) as error:  # whoever read our output has gone; click makes an exit of it
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return 141
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own: a wrong option or argument
        if usage is None:
            raise
        print(usage() if usage().startswith("Usage:") else f"smlt: {usage()}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return 128 + interrupted_by[0] if code == 130 and interrupted_by else code


def _end_in_order() -> list[int]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: no process and no key is left. Returns those that came."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored, and stays so
            signal.signal(number, interrupt)
    return came
