"""Tests of the frameworks are skipped where these are not installed: `.ci/frameworks` makes environments that hold them."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
