"""Captions of EmojiScenes: from what a scene states to words, and back."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from .vocabulary import BACKGROUNDS, NUMBERS, OBJECTS, RELATIONS, ObjectKind

_SINGULAR = {f"{kind.article} {kind.name}": (kind, 1) for kind in OBJECTS.values()}
_PLURAL = {f"{word} {kind.plural}": (kind, number) for word, number in NUMBERS.items() for kind in OBJECTS.values()}
_PHRASES: dict[str, tuple[ObjectKind, int]] = {**_SINGULAR, **_PLURAL}
_BACKGROUND = re.compile(r"^(?P<objects>.+) on a (?P<background>\w+) background$")
_RELATION = re.compile(
    r"^(?P<first>.+?) (?P<phrase>" + "|".join(phrase for phrase, _ in RELATIONS.values()) + r") (?P<second>.+)$"
)
_RELATION_OF_PHRASE = {phrase: relation for relation, (phrase, _) in RELATIONS.items()}
_NUMBER_WORDS = {number: word for word, number in NUMBERS.items()}


@dataclass(frozen=True)
class SceneFacts:
    """What a caption states.

    Attributes:
        objects: names from :data:`OBJECTS` in the order of mention: one, or two where there is a relation.
        count: how many of the object there are, 1 to 4; 1 where there are two objects.
        relation: where the first object lies as seen from the second, a key of :data:`RELATIONS`, or None.
        background: a key of :data:`BACKGROUNDS`.
    """

    objects: tuple[str, ...]
    count: int
    relation: str | None
    background: str

    @property
    def category(self) -> str:
        """``"one"``, ``"count"``, ``"left_right"`` or ``"above_below"``."""
        if self.relation is None:
            return "one" if self.count == 1 else "count"
        return "left_right" if self.relation in ("left", "right") else "above_below"

    def seen_from_second(self) -> SceneFacts:
        """The same facts told from the other object; unchanged where there is no relation."""
        if self.relation is None:
            return self
        return SceneFacts(self.objects[::-1], self.count, RELATIONS[self.relation][1], self.background)

    def is_held_out(self) -> bool:
        """Whether these facts belong to the tenth that no training step ever sees, in either wording."""
        told = min(write_caption(self), write_caption(self.seen_from_second()))
        return hashlib.sha256(told.encode()).digest()[0] < 26


def write_caption(facts: SceneFacts) -> str:
    """Words for ``facts``.

    >>> write_caption(SceneFacts(("cat", "owl"), 1, "left", "sky"))
    'a cat to the left of an owl on a sky background'
    """
    first = OBJECTS[facts.objects[0]]
    if facts.relation is not None:
        second = OBJECTS[facts.objects[1]]
        phrase = RELATIONS[facts.relation][0]
        words = f"{first.article} {first.name} {phrase} {second.article} {second.name}"
    elif facts.count == 1:
        words = f"{first.article} {first.name}"
    else:
        words = f"{_NUMBER_WORDS[facts.count]} {first.plural}"
    return f"{words} on a {facts.background} background"


def parse_caption(caption: str) -> SceneFacts:
    """What ``caption`` states.

    >>> parse_caption("three black hearts on a pink background")
    SceneFacts(objects=('black heart',), count=3, relation=None, background='pink')

    Raises:
        ValueError: the caption is not of the grammar that :func:`write_caption` writes.
    """
    match = _BACKGROUND.match(" ".join(caption.lower().split()))
    if match is None or match["background"] not in BACKGROUNDS:
        raise ValueError(
            f"caption must end in 'on a <background> background' with one of {', '.join(BACKGROUNDS)}, got {caption!r}"
        )
    relation = _RELATION.match(match["objects"])
    phrases = [relation["first"], relation["second"]] if relation else [match["objects"]]
    known = [_PHRASES.get(phrase) for phrase in phrases]
    if None in known or (relation and any(number != 1 for _, number in known)):
        raise ValueError(
            "caption must name one object ('a fox'), two to four ('three red circles') or two in a relation "
            f"('a cat above an owl'), got {caption!r}"
        )
    return SceneFacts(
        objects=tuple(kind.name for kind, _ in known),
        count=known[0][1],
        relation=_RELATION_OF_PHRASE[relation["phrase"]] if relation else None,
        background=match["background"],
    )
