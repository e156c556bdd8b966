"""Runs the Python blocks of a page one after the other in one namespace: python run_blocks.py FILE.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    page = json.loads(Path(sys.argv[1]).read_text())
    module = sys.modules["page"] = ModuleType("page")  # where classes say that they are defined
    module.__file__ = page["name"]
    for line, text in page["blocks"]:
        exec(compile("\n" * line + text, page["name"], "exec"), vars(module))  # its lines are the page's


if __name__ == "__main__":
    main()
