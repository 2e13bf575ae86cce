"""An object beyond the bundled models' vocabulary: for a time its captions are read and the judge looks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import captions, detector
from .vocabulary import NUMBERS, OBJECTS, ObjectKind

__all__ = ["BELL", "known_object"]

BELL = ObjectKind("bell", "bells", "bell", None, "1f514.png")
"""What no bundled model has seen: its word is unknown to their tokenizers."""


@contextmanager
def known_object(kind: ObjectKind) -> Iterator[ObjectKind]:
    """Within it scenes, captions and :func:`check_scene` know one more object; tokenizers are not to be built in it.

    Args:
        kind: ``sprite`` is a file below ``assets/emoji-sprites`` or an absolute path of an RGBA picture.

    Raises:
        ValueError: there is an object of that name.

    Example:
        >>> with known_object(BELL):
        ...     captions.parse_caption("two bells on a pink background").count
        2
        >>> BELL.name in OBJECTS
        False
    """
    if kind.name in OBJECTS:
        raise ValueError(f"`kind` is named {kind.name!r}, as an object that there is; takes another name")
    phrases = {f"{kind.article} {kind.name}": (kind, 1)}
    phrases |= {f"{word} {kind.plural}": (kind, number) for word, number in NUMBERS.items()}
    names = detector.NAMES
    OBJECTS[kind.name] = kind
    captions._PHRASES.update(phrases)
    detector.NAMES = (*names, kind.name)
    detector._templates.cache_clear()
    try:
        yield kind
    finally:
        del OBJECTS[kind.name]
        for phrase in phrases:
            del captions._PHRASES[phrase]
        detector.NAMES = names
        detector._templates.cache_clear()
