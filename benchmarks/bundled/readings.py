"""Seeded readings of an instrument in three modes, for the mixture ``sequences``.

Dimension letters: P rows, T steps, F channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BATCHES, BATCH_ROWS = 96, 64
SHORTEST, LONGEST = 10, 40
CHANNELS = ("signal", "marks", "mode")
LEVELS = ("low", "middle", "high")
MODES = ("the signal's last steps", "the signal at the mark", "the number of marks")
MARK, MODE_DISTANCE, LAST_STEPS = 2.0, 1.5, 4
MARKS_OF_LEVEL = ((0, 2), (2, 4), (4, 7))
"""The range of the number of marks of each level, without its end."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Readings of one length: ``steps`` [P, T, F], ``levels`` [P] and ``modes`` [P]."""

    steps: np.ndarray
    levels: np.ndarray
    modes: np.ndarray


def make_batches(seed: int = 0) -> list[Batch]:
    """Draw all batches, each with a length of its own."""
    rng = np.random.default_rng(seed)
    return [_batch(rng, int(rng.integers(SHORTEST, LONGEST + 1))) for _ in range(NUM_BATCHES)]


def _batch(rng: np.random.Generator, length: int) -> Batch:
    modes = rng.integers(0, len(MODES), BATCH_ROWS)
    levels = rng.integers(0, len(LEVELS), BATCH_ROWS)
    noise = np.array((0.5, 0.2, 1.0))
    steps = rng.standard_normal((BATCH_ROWS, length, len(CHANNELS))) * noise
    steps[:, :, 2] += MODE_DISTANCE * (modes - 1)[:, None]
    readers = (_level_at_end, _level_at_mark, _level_by_marks)
    for reading, level, mode in zip(steps, levels, modes, strict=True):
        readers[mode](rng, reading, int(level))
    return Batch(steps.astype(np.float32), levels, modes)


def _level_at_end(rng: np.random.Generator, reading: np.ndarray, level: int) -> None:
    """Make the signal a walk whose last steps have the level, among marks that mean nothing."""
    signal = reading[:, 0]
    signal += 0.3 * np.cumsum(rng.standard_normal(len(reading)))
    signal += (level - 1) - signal[-LAST_STEPS:].mean() + 0.15 * rng.standard_normal()
    _mark(rng, reading, int(rng.integers(0, MARKS_OF_LEVEL[-1][1])))


def _level_at_mark(rng: np.random.Generator, reading: np.ndarray, level: int) -> None:
    """Give the signal the level at one marked step, and noise elsewhere."""
    reading[:, 0] += 0.8 * rng.standard_normal(len(reading))
    step = rng.integers(0, len(reading) - 1)
    reading[step, 0] = (level - 1) + 0.2 * rng.standard_normal()
    reading[step, 1] += MARK


def _level_by_marks(rng: np.random.Generator, reading: np.ndarray, level: int) -> None:
    """Give the reading as many marks as the level has, and a signal of noise."""
    reading[:, 0] += 0.8 * rng.standard_normal(len(reading))
    _mark(rng, reading, int(rng.integers(*MARKS_OF_LEVEL[level])))


def _mark(rng: np.random.Generator, reading: np.ndarray, count: int) -> None:
    reading[rng.choice(len(reading), count, replace=False), 1] += MARK
