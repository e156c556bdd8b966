"""Atari Breakout for `breakout.py`: many games stepped at once by ale-py, which brings the ROM.

Observations are as in Mnih et al., "Human-level control through deep reinforcement learning" (Nature 518, 2015): each
action is held for 4 frames, the last two are merged by their maximum, shrunk to 84x84 grey pixels, and the last 4 such
pictures are one observation. The environment begins a game with up to 30 idle frames and a FIRE; after a lost life the
agent has to press FIRE itself.
"""

from __future__ import annotations

import numpy as np

from smlt.errors import ConfigError

FRAME_SKIP = 4
PIXELS = 84
STACKED = 4
#: Breakout's minimal set: what each number means to `Games.step`.
ACTIONS = ("NOOP", "FIRE", "RIGHT", "LEFT")


def atari_vector_env() -> type:
    """ale-py's vectorised environment. ConfigError when it is not installed or too old."""
    try:
        import ale_py
        from ale_py.vector_env import AtariVectorEnv
    except ImportError as error:
        raise ConfigError(f"Breakout needs ale-py 0.12 or newer: pip install 'smlt[atari]' ({error})") from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    return AtariVectorEnv


class Games:
    """`count` games of Breakout, stepped together in one thread; a finished game is followed by a new one.

    `observations`: what the agent sees now, uint8 of (count, 84, 84, 4), the newest picture last. `finished`:
    (which of them, score) of the games that were finished, in order; whoever reads them empties the list. A game has five
    lives; its score is the game's own (1, 4 or 7 a brick), not clipped.
    """

    def __init__(self, count: int, seed: int) -> None:
        from gymnasium.vector import AutoresetMode

        # Not `episodic_life`: with ale-py 0.12 it starts a new game at each lost life. `life_loss_info` only tells of it.
        self._games = atari_vector_env()(
            "breakout",
            count,
            num_threads=1,
            frameskip=FRAME_SKIP,
            img_height=PIXELS,
            img_width=PIXELS,
            stack_num=STACKED,
            life_loss_info=True,
            reward_clipping=False,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        pixels, self._info = self._games.reset(seed=seed % 2**31)
        self.observations = _channels_last(pixels)
        self.finished: list[tuple[int, float]] = []
        self.actions = 0
        self._scores = np.zeros(count)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Do `actions` (int64 of (count,), indices into ACTIONS): (rewards, ended), float32 of (count,).

        A reward is the sign of the points made, as learning wants it. `ended` is 1 where a life was lost or a game is
        over: to the agent an episode is a life.
        """
        pixels, points, lost, truncated, info = self._games.step(actions)
        self.observations = _channels_last(pixels)
        self._scores += points
        self.actions += len(actions)
        ended = lost | truncated
        # Of a finished game, `lives` is already the next one's.
        over = truncated | (lost & (info["lives"] >= self._info["lives"]))
        self._info = info
        for number in np.flatnonzero(over):
            self.finished.append((int(number), float(self._scores[number])))
            self._scores[number] = 0
        return np.sign(points).astype(np.float32), ended.astype(np.float32)

    def close(self) -> None:
        """End the emulators' threads."""
        self._games.close()


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    # What PyTorch's convolutions are fastest with on a CPU.
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
