"""Exhaustive exploration of the model. As a command: how many states there are.

python -m tests.model.explore --workers 3 --crashes 1 --zombies 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from protocol import World, actions, beginning, check, is_good_end, normal


@dataclass
class Explored:
    """What was found."""

    states: int
    transitions: int
    ends: int
    actions: dict[str, int]  # how often each was taken, by name
    stuck: list[str] | None  # the actions that lead to a state from which the job cannot end; None: there is none


def path_to(parents: list[tuple[int, str]], index: int) -> list[str]:
    """The actions that lead to a state."""
    path = []
    while index:
        index, action = parents[index]
        path.append(action)
    return path[::-1]


def explore(n: int, crashes: int, zombies: int, losses: int = 0) -> Explored:
    """Every state reachable by n workers. AssertionError with the actions that lead there when an invariant does not hold.

    A wait ends (invariant 8): from every state, the end of the job must be reachable.
    """
    first = normal(beginning(n, crashes, zombies, losses))
    number: dict[World, int] = {first: 0}
    parents: list[tuple[int, str]] = [(0, "")]
    before: list[list[int]] = [[]]
    ends: list[int] = []
    todo, transitions, counted = deque([first]), 0, dict[str, int]()
    while todo:
        world = todo.popleft()
        index = culprit = number[world]
        if is_good_end(world):
            ends.append(index)
        try:
            for action, following in actions(world):
                transitions += 1
                name = action.partition("(")[0]
                counted[name] = counted.get(name, 0) + 1
                following = normal(following)
                at = number.get(following)
                if at is None:
                    at = number[following] = len(parents)
                    parents.append((index, action))
                    before.append([])
                    culprit = at
                    check(following)
                    culprit = index
                    todo.append(following)
                before[at].append(index)
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter {path_to(parents, culprit)}") from error
    reaching, back = bytearray(len(parents)), list(ends)
    for index in back:
        if not reaching[index]:
            reaching[index] = 1
            back.extend(before[index])
    stuck = next((index for index in range(len(parents)) if not reaching[index]), None)
    return Explored(len(parents), transitions, len(ends), counted, None if stuck is None else path_to(parents, stuck))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--crashes", type=int, default=1)
    parser.add_argument("--zombies", type=int, default=1)
    parser.add_argument("--losses", type=int, default=0, help="of all the store's data")
    options = parser.parse_args()
    began = time.perf_counter()
    found = explore(options.workers, options.crashes, options.zombies, options.losses)
    faults = f"{options.crashes} crash(es), {options.zombies} zombie(s), {options.losses} loss(es)"
    print(f"{options.workers} workers, {faults}, 2 collectives:")
    print(f"{found.states} states, {found.transitions} transitions, {found.ends} ends, {time.perf_counter() - began:.0f} s")
    for name, count in sorted(found.actions.items()):
        print(f"  {name:16} {count}")
    print("stuck after " + ", ".join(found.stuck) if found.stuck else "from every state the job can end")
    sys.exit(found.stuck is not None)


if __name__ == "__main__":
    main()
