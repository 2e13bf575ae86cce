"""Facts made wrong in exactly one attribute: negatives for training, and for judging a judge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .captions import SceneFacts, parse_caption, write_caption
from .vocabulary import BACKGROUNDS, COLOURS, OBJECTS, RELATIONS

ATTRIBUTES = ("object", "colour", "count", "relation", "background")


def alterable_attributes(facts: SceneFacts) -> list[str]:
    """Those of :data:`ATTRIBUTES` that ``facts`` have: a colour where there is a shape, a count or else a relation."""
    absent = {"count" if facts.relation else "relation"}
    if not any(OBJECTS[name].colour for name in facts.objects):
        absent.add("colour")
    return [name for name in ATTRIBUTES if name not in absent]


def alter_facts(facts: SceneFacts, rng: np.random.Generator, attribute: str | None = None) -> SceneFacts:
    """``facts`` with one attribute changed.

    Args:
        facts: what to change.
        rng: source of randomness.
        attribute: one of :func:`alterable_attributes`; None draws one of them. ``"object"`` puts another kind of object
            in the place of one, ``"colour"`` gives a shape another colour, ``"relation"`` mirrors it.

    Raises:
        ValueError: ``facts`` have no such attribute.
    """
    possible = alterable_attributes(facts)
    attribute = possible[rng.integers(len(possible))] if attribute is None else attribute
    if attribute not in possible:
        raise ValueError(f"attribute must be one of {', '.join(possible)} for {facts}, got {attribute!r}")
    if attribute == "background":
        return replace(facts, background=_other(rng, tuple(BACKGROUNDS), facts.background))
    if attribute == "count":
        return replace(facts, count=int(_other(rng, (1, 2, 3, 4), facts.count)))
    if attribute == "relation":
        return replace(facts, relation=RELATIONS[facts.relation][1])
    shapes = [index for index, name in enumerate(facts.objects) if OBJECTS[name].colour]
    index = int(rng.choice(shapes)) if attribute == "colour" else int(rng.integers(len(facts.objects)))
    kind = OBJECTS[facts.objects[index]]
    if attribute == "colour":
        choices = [f"{colour} {kind.noun}" for colour in COLOURS]
    else:
        choices = [name for name, other in OBJECTS.items() if other.noun != kind.noun]
    choices = [name for name in choices if name not in facts.objects]
    names = list(facts.objects)
    names[index] = str(rng.choice(choices))
    return replace(facts, objects=tuple(names))


def altered_captions(caption: str) -> list[str]:
    """Every caption that differs from ``caption`` in exactly one attribute: what its pictures must not show.

    >>> len(altered_captions("three owls on a pink background"))
    44

    Raises:
        ValueError: ``caption`` is not of the grammar.
    """
    facts = parse_caption(caption)
    changed = [replace(facts, background=name) for name in BACKGROUNDS if name != facts.background]
    for index, name in enumerate(facts.objects):
        kind, others = OBJECTS[name], [other for other in OBJECTS.values() if other.name not in facts.objects]
        for other in others:
            # Of a shape's colours each is an attribute of its own; of other kinds of object one colour will do.
            if other.colour is None or other.noun == kind.noun or other.colour == (kind.colour or COLOURS[0]):
                names = (*facts.objects[:index], other.name, *facts.objects[index + 1 :])
                changed.append(replace(facts, objects=names))
    if facts.relation is None:
        changed += [replace(facts, count=count) for count in (1, 2, 3, 4) if count != facts.count]
    else:
        changed.append(replace(facts, relation=RELATIONS[facts.relation][1]))
    return [write_caption(item) for item in changed]


def _other(rng: np.random.Generator, items: tuple, current: object):
    rest = [item for item in items if item != current]
    return rest[rng.integers(len(rest))]
