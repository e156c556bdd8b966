"""Every interleaving of the membership protocol, at the sizes that are quick; `explore.py` as a command does the others."""

from __future__ import annotations

import pytest
from explore import explore

ACTIONS = {"Acknowledge", "Arrive", "Commit", "Delete", "End", "Publish", "Publish plan", "Report", "Take", "Upload"}
RECOVERY = {"Finish", "GiveSnapshot", "Notice", "Restore"}


@pytest.mark.parametrize(
    ("n", "crashes", "zombies", "losses"),
    [(2, 0, 0, 0), (2, 1, 0, 0), (2, 0, 1, 0), (2, 1, 1, 0), (2, 1, 0, 1), (3, 0, 0, 0), (3, 1, 0, 0), (3, 0, 0, 1)],
)
def test_every_interleaving_keeps_the_invariants_and_can_end(n: int, crashes: int, zombies: int, losses: int) -> None:
    found = explore(n, crashes, zombies, losses)
    assert found.stuck is None
    assert found.ends > 0
    print(f"n = {n}, {crashes} + {zombies} + {losses} faults: {found.states} states, {found.transitions} transitions")
    # The model does what it is to show.
    assert set(found.actions) >= ACTIONS | (RECOVERY if crashes or zombies else set()) | ({"Reopen"} if losses else set())
