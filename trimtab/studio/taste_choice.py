"""Which two pictures a person is asked about, and what was chosen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["LEAST_VOTES", "MOST_VOTES", "SIDES", "Ballot", "told", "undone", "voted"]

SIDES = ("left", "right", "neither")
LEAST_VOTES, MOST_VOTES = 4, 400
"""Choices that a taste takes; the least is ``fit_personal_reward``'s, repeated here so that the page opens sooner."""
_FEWEST_FORESEEN = 6
"""Choices that must have been foreseen, or not, before their share is told."""
_LAST = 20
"""Of which the share is told: earlier ones were foreseen by a taste that knew less."""
_ONE_SIDED = 8


@dataclass(frozen=True)
class Ballot:
    """What one visitor chose.

    Attributes:
        pair: numbers of the two pictures that are shown; None where there is no pair to ask about.
        votes: numbers of two pictures each, the preferred one first.
        sides: "l" or "r" for each vote: where the preferred one was.
        asked: pairs that were shown, the smaller number first.
        foreseen: for each vote whether the taste, fitted without it, preferred the same picture; None without one.
    """

    pair: tuple[int, int] | None = None
    votes: tuple[tuple[int, int], ...] = ()
    sides: str = ""
    asked: frozenset[tuple[int, int]] = frozenset()
    foreseen: tuple[bool | None, ...] = ()

    @property
    def has_enough(self) -> bool:
        """Whether a taste can be fitted."""
        return len(self.votes) >= LEAST_VOTES


def voted(ballot: Ballot, side: str, count: int, seed: int, scores: Sequence[float] | None = None) -> Ballot:
    """The ballot after a choice, with the next pair.

    Args:
        ballot: before.
        side: one of ``SIDES``; "neither" asks about another pair. Without a pair it only brings one.
        count: of pictures there are.
        seed: of the order of pairs.
        scores: of the pictures, by a taste that was fitted before; None if there is none.

    Raises:
        ValueError: another side, a choice where no pair is shown, or more than ``MOST_VOTES``.
    """
    if side not in SIDES:
        raise ValueError(f"The side takes one of {', '.join(SIDES)}.")
    if side != "neither":
        if ballot.pair is None:
            raise ValueError("There are no two pictures to choose from yet.")
        if len(ballot.votes) >= MOST_VOTES:
            raise ValueError(f"There are {MOST_VOTES} choices, which is all that a taste takes.")
        first, last = ballot.pair if side == "left" else ballot.pair[::-1]
        known = scores is not None and max(first, last) < len(scores)
        ballot = replace(
            ballot,
            votes=(*ballot.votes, (first, last)),
            sides=ballot.sides + side[0],
            foreseen=(*ballot.foreseen, scores[first] > scores[last] if known else None),
        )
    if ballot.pair is not None:
        ballot = replace(ballot, asked=ballot.asked | {_sorted(ballot.pair)})
    return replace(ballot, pair=_next_pair(count, ballot.asked, seed))


def undone(ballot: Ballot) -> Ballot:
    """The ballot without its last vote, whose pair is shown again.

    Raises:
        ValueError: there is none.
    """
    if not ballot.votes:
        raise ValueError("There is no choice to take back.")
    pair = ballot.votes[-1] if ballot.sides[-1] == "l" else ballot.votes[-1][::-1]
    return Ballot(
        pair, ballot.votes[:-1], ballot.sides[:-1], ballot.asked - {_sorted(pair)}, ballot.foreseen[:-1]
    )  # fmt: skip


def told(ballot: Ballot) -> str:
    """The ballot in plain words: how many choices, how many of them were foreseen, and what makes them doubtful."""
    count = len(ballot.votes)
    parts = [f"{count} choice{'' if count == 1 else 's'}."]
    if not ballot.has_enough:
        parts.append(f"From {LEAST_VOTES} on your taste is fitted.")
    foreseen = [right for right in ballot.foreseen if right is not None][-_LAST:]
    if len(foreseen) >= _FEWEST_FORESEEN:
        parts.append(
            f"Of the last {len(foreseen)} it foresaw {sum(foreseen)} before it was told; half would be chance."
        )
    elif ballot.has_enough:
        parts.append(f"How well it foresees is told after {_FEWEST_FORESEEN - len(foreseen)} more.")
    if count >= _ONE_SIDED and len(set(ballot.sides)) == 1:
        side = "left" if ballot.sides[0] == "l" else "right"
        parts.append(f"All were of the {side} picture: if that is by habit, they say nothing.")
    return " ".join(parts)


def _next_pair(count: int, asked: frozenset[tuple[int, int]], seed: int) -> tuple[int, int] | None:
    """A pair that was not asked, of the pictures that were shown least, in any order."""
    shown = [0] * count
    for pair in asked:
        for number in pair:
            shown[number] += number < count
    draw = random.Random(f"{seed} {len(asked)}")
    pairs = [(i, j) for j in range(count) for i in range(j) if (i, j) not in asked]
    if not pairs:
        return None
    pair = min(pairs, key=lambda pair: (shown[pair[0]] + shown[pair[1]], draw.random()))
    return pair if draw.random() < 0.5 else pair[::-1]


def _sorted(pair: tuple[int, int]) -> tuple[int, int]:
    return min(pair), max(pair)
