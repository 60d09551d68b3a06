"""The picture of a world's run: a lane for each process, and what happened to it. SVG, pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.world.drawing import document, line, rect, text
from tests.world.rows import Piece, packed
from tests.world.timeline import PREFIX, name_of, outcome_of, short

if TYPE_CHECKING:
    from tests.world.world import Outcome

WIDTH, LEFT, RIGHT = 1500, 130, 20
LANE, BAR = 17, 13
ROW = 15
"""The height of a row of labels."""
LETTER = 5.6
"""The width of a letter of a label."""
REQUEST = 5
NODE_COLORS = ("#d4cfc9", "#a9c7e8", "#b7dbb0", "#f3d3a2", "#d3bfe3", "#f0c4cf", "#c2e3e0")
ENDLESS = {"node lost", "device raises", "device yields NaN", "rows lost"}
"""Events that last until somebody ends their target."""
BROKEN, EVENT, HUNG = "#d62728", "#4a3aa7", "#555555"
COLORS = {"whole": "#59a14f", "cancelled": "#9aa5b1", "an error that faults excuse": "#f28e2b"}
LEGEND = {**COLORS, "in a breach, or a breach": BROKEN, "an event, and how long": EVENT,
          "hangs": HUNG}  # fmt: skip


class _Picture:
    """Collects the shapes from top to bottom."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome, self._calm_s = outcome, outcome.scenario.setting.calm_s
        self.end_s = max([self._calm_s, *(float(entry[:9]) for entry in outcome.trace)])
        self.end_s = 0.2 + max(
            [self.end_s, *(answer.ended_at_s or 0.0 for answer in outcome.answers)]
        )
        self.shapes: list[str] = []
        self.at = 30.0

    def x(self, time_s: float) -> float:
        return LEFT + min(time_s, self.end_s) * (WIDTH - LEFT - RIGHT) / self.end_s

    def _words(self, piece: Piece) -> tuple[float, float]:
        """Return how far a label goes, which begins where its piece does unless it is too long."""
        length = LETTER * len(piece.label) + 14
        left = min(self.x(piece.begun_s), WIDTH - RIGHT - length)
        return left, max(left + length, self.x(piece.ended_s) + 4)

    def bars(self, piece: Piece) -> tuple[float, float]:
        return self.x(piece.begun_s), max(self.x(piece.ended_s), self.x(piece.begun_s) + 2) + 1

    def heading(self, words: str) -> None:
        self.at += 8
        self.shapes.append(text(6, self.at + 11, words, size=12))

    def labels(self, pieces: Sequence[Piece]) -> list[tuple[Piece, float]]:
        """Write labels, each over the bar of its piece; returns where each stands."""
        placed = []
        for row in packed(pieces, self._words):
            for piece in row:
                left = self._words(piece)[0]
                width = self.x(piece.ended_s) - self.x(piece.begun_s)
                if width > 0:
                    self.shapes.append(rect(self.x(piece.begun_s), self.at + 12, width, 3,
                                            piece.color, piece.title))  # fmt: skip
                self.shapes.append(_mark(self.x(piece.begun_s), self.at + 8, piece))
                self.shapes.append(text(left + 8, self.at + 11, piece.label, size=10))
                placed.append((piece, self.at + 12))
            self.at += ROW
        return placed

    def lanes(self) -> dict[str, list[tuple[Piece, float]]]:
        """Draw the processes; returns the bars of each name, and how far down they are."""
        by_lane: dict[tuple[str, str], list[Piece]] = {}
        nodes = sorted({process.node for process in self._outcome.processes})
        for process in self._outcome.processes:
            name = short(process.name)
            ended_s = self.end_s if process.ended_at_s is None else process.ended_at_s
            color = NODE_COLORS[nodes.index(process.node) % len(NODE_COLORS)]
            title = f"{name}, pid {process.pid}: {process.begun_at_s:.3f} to {ended_s:.3f} s"
            piece = Piece(process.begun_at_s, ended_s, name, color, title)
            base = name.partition("/")[0].partition(":g")[0]
            by_lane.setdefault((process.node, base), []).append(piece)
        placed: dict[str, list[tuple[Piece, float]]] = {}
        last = None
        for (node, _), pieces in sorted(by_lane.items()):
            if node != last:
                self.heading(node or "no node")
                whole = Piece(0.0, self.end_s, node, EVENT)
                placed[node] = [(whole, self.at)]
                last = node
            for row in packed(pieces, self.bars):
                for piece in row:
                    self._life(piece)
                    placed.setdefault(piece.label, []).append((piece, self.at))
                self.at += LANE
        return placed

    def _life(self, piece: Piece) -> None:
        left, width = self.x(piece.begun_s), self.x(piece.ended_s) - self.x(piece.begun_s)
        self.shapes.append(rect(left, self.at, width, BAR, piece.color, piece.title))
        most = int((width - 4) / LETTER)
        if most >= 3:
            self.shapes.append(text(left + 3, self.at + 10, piece.label[:most], size=10))

    def hits(self, placed: dict[str, list[tuple[Piece, float]]],
             events: list[tuple[Piece, float]]) -> None:  # fmt: skip
        targets = {id(piece): target for piece, target in self._targets}
        for piece, label_at in events:
            target, at_s = targets.get(id(piece), ""), piece.begun_s
            for life, at in placed.get(target, []):
                if not life.begun_s <= at_s <= life.ended_s:
                    continue
                x = self.x(at_s)
                if piece.label.startswith("hangs"):
                    until_s = min(piece.ended_s, life.ended_s)
                    width = self.x(until_s) - x
                    self.shapes.append(rect(x, at + 3, width, BAR - 6, HUNG, piece.title))
                self.shapes.append(line(x, label_at, x, at + BAR, "#b9b2e0", "2 3"))
                self.shapes.append(_mark(x, at + BAR / 2, piece))

    def events(self) -> list[tuple[Piece, float]]:
        """Write the events; returns where each stands."""
        pieces = []
        self._targets: list[tuple[Piece, str]] = []
        for event, target in zip(self._outcome.hit, self._outcome.targets, strict=True):
            until_s = min(event.at_s + event.for_s, max(self._calm_s, event.at_s))
            until_s = event.at_s if event.kind in ENDLESS else until_s
            name = short(target)
            label = event.kind + (f" {name}" if name else "")
            piece = Piece(event.at_s, until_s, label, EVENT, f"{event.at_s:.3f} {event.line()}")
            pieces.append(piece)
            self._targets.append((piece, name))
        self.heading("events")
        return self.labels(pieces)

    def requests(self) -> None:
        told = " ".join(breach.text for breach in self._outcome.breaches)
        pieces = []
        for answer in self._outcome.answers:
            what = outcome_of(answer)
            color = COLORS.get(what, COLORS["an error that faults excuse"])
            if f"at {name_of(answer)}" in told:
                color = BROKEN
            ended_s = self.end_s if answer.ended_at_s is None else answer.ended_at_s
            title = f"request {name_of(answer)} of client {answer.plan.client}: {what}"
            pieces.append(Piece(answer.begun_at_s, ended_s, "", color, title))
        self.heading("requests")
        for row in packed(pieces, self.bars):
            for piece in row:
                width = max(self.x(piece.ended_s) - self.x(piece.begun_s), 2)
                self.shapes.append(
                    rect(self.x(piece.begun_s), self.at, width, REQUEST, piece.color, piece.title)
                )
            self.at += REQUEST + 1

    def breaches(self, placed: dict[str, list[tuple[Piece, float]]]) -> None:
        """Write the breaches, each by a red line, and mark the processes that they name."""
        if not self._outcome.breaches:
            return
        self.heading("breaches")
        pieces = [
            Piece(b.at_s, b.at_s, f"{b.law}: {first_line(b.text)}", BROKEN, b.text)
            for b in self._outcome.breaches
        ]
        for piece in pieces:
            for life, at in (
                found for name in piece.label.split() for found in placed.get(name, [])
            ):
                if life.begun_s <= piece.begun_s <= life.ended_s:
                    self.shapes.append(_mark(self.x(piece.begun_s), at + BAR / 2, piece))
        for time_s in {piece.begun_s for piece in pieces}:
            self.shapes.append(line(self.x(time_s), 30, self.x(time_s), self.at, BROKEN))
        self.labels(pieces)

    def axis(self) -> None:
        step_s = next(s for s in (1, 2, 5, 10, 30, 60, 600) if self.end_s / s <= 30 or s == 600)
        self.at += 6
        self.shapes.append(line(LEFT, self.at, WIDTH - RIGHT, self.at, "black"))
        for count in range(math.floor(self.end_s / step_s) + 1):
            x = self.x(count * step_s)
            self.shapes.append(line(x, self.at, x, self.at + 4, "black"))
            self.shapes.append(text(x, self.at + 16, f"{count * step_s}", "middle", 11))
        self.shapes.append(text(LEFT - 8, self.at + 16, "s", "end", 11))
        calm = line(self.x(self._calm_s), 30, self.x(self._calm_s), self.at, "#59a14f", "6 4")
        self.shapes += [calm, text(self.x(self._calm_s) + 3, 28, "the weather calms", "end", 10)]
        self.at += 24

    def legend(self) -> None:
        left = float(LEFT)
        for words, color in LEGEND.items():
            self.shapes.append(rect(left, self.at, 12, 12, color))
            self.shapes.append(text(left + 17, self.at + 10, words, size=11))
            left += 34 + 6.2 * len(words)
        self.at += 20


def first_line(told: str) -> str:
    """Return what a label has room for of a breach's text."""
    return told.partition("\n")[0].replace(PREFIX, "")[:90]


def _mark(x: float, y: float, piece: Piece) -> str:
    points = f"{x - 4:.1f},{y:.1f} {x:.1f},{y - 4:.1f} {x + 4:.1f},{y:.1f} {x:.1f},{y + 4:.1f}"
    return f'<polygon points="{points}" fill="{piece.color}"/>'


def svg(outcome: Outcome) -> str:
    drawn = _Picture(outcome)
    seed: Any = outcome.scenario.seed
    drawn.shapes.append(text(6, 18, f"seed {seed}, digest {outcome.digest:08x}", size=14))
    events = drawn.events()
    placed = drawn.lanes()
    drawn.hits(placed, events)
    drawn.requests()
    drawn.breaches(placed)
    drawn.axis()
    drawn.legend()
    return document(WIDTH, drawn.at + 4, drawn.shapes)
