"""What a run that is under way has cost so far, for whoever asks while its bill is still to come."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from smlt.client.events import FILE as EVENTS
from smlt.client.following import Tail, parsed
from smlt.client.lives import Lives
from smlt.client.prices import Prices, load_prices
from smlt.client.runs import Run
from smlt.errors import SmltError


def functions_usd(lives: Lives, memory_mb: float, now: float, prices: Prices, architecture: str = "x86_64") -> float:
    """What functions of `memory_mb` have cost that were there as these workers were: time and requests, nothing else.

    The bill, by what Lambda has reported, comes when the run has ended: https://aws.amazon.com/lambda/pricing/.
    """
    seconds = sum(life.seconds(now) for life in lives.all)
    a_second = float(prices[f"lambda.{architecture}.gb-second"].usd) * memory_mb / 1024
    return seconds * a_second + len(lives.all) * float(prices["lambda.million-requests"].usd) / 1e6


def known_usd(run: Run, lives: Lives, now: float) -> float:
    """The bill's sum where there is one, else what the run counts, else what its workers' time comes to; nan: it costs nothing.

    A local run costs nothing; one that tunes itself counts what functions would have cost.
    """
    try:
        status, config = run.status, run.config
        if status.get("state") != "running" and status.get("cost_usd") is not None:
            return float(status["cost_usd"])
        if status.get("spent_usd") is not None:
            return float(status["spent_usd"])
        if config.get("on") != "lambda" or not config.get("memory_mb"):
            return math.nan
        architecture = str(status.get("architecture") or "x86_64")
        return functions_usd(lives, float(config["memory_mb"]), now, load_prices(), architecture)
    except (SmltError, KeyError, TypeError, ValueError):
        return math.nan


def spent_so_far(run: Run) -> Callable[[], float]:
    """Ask it at any time, from any thread: USD, 0 for what costs nothing."""
    tail, lives, lock = Tail(run.path / EVENTS), Lives(), threading.Lock()

    def usd() -> float:
        with lock:  # two may scrape at once
            for line in tail.lines():
                row = parsed(line)
                if row is not None:
                    lives.take(row)
            found = known_usd(run, lives, time.time())
        return 0.0 if math.isnan(found) else found

    return usd
