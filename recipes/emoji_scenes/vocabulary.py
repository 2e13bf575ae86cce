"""The words of EmojiScenes: its objects, colours and backgrounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectKind:
    """One drawable thing.

    Attributes:
        name: how a caption calls one of it, colour included ("fox", "red circle").
        plural: how a caption calls several ("foxes", "red circles").
        noun: the name without its colour ("fox", "circle").
        colour: the colour word of a shape, None for an object that has colours of its own.
        sprite: file name below ``assets/emoji-sprites``.
    """

    name: str
    plural: str
    noun: str
    colour: str | None
    sprite: str

    @property
    def article(self) -> str:
        return "an" if self.name[0] in "aeiou" else "a"


# noun -> (plural, code point of the Noto Emoji sprite)
NOUNS = {
    "cat": ("cats", "1f431"),
    "dog": ("dogs", "1f436"),
    "fox": ("foxes", "1f98a"),
    "owl": ("owls", "1f989"),
    "panda": ("pandas", "1f43c"),
    "frog": ("frogs", "1f438"),
    "lion": ("lions", "1f981"),
    "pig": ("pigs", "1f437"),
    "penguin": ("penguins", "1f427"),
    "turtle": ("turtles", "1f422"),
    "octopus": ("octopuses", "1f419"),
    "butterfly": ("butterflies", "1f98b"),
    "apple": ("apples", "1f34e"),
    "banana": ("bananas", "1f34c"),
    "lemon": ("lemons", "1f34b"),
    "strawberry": ("strawberries", "1f353"),
    "pizza": ("pizzas", "1f355"),
    "burger": ("burgers", "1f354"),
    "donut": ("donuts", "1f369"),
    "mushroom": ("mushrooms", "1f344"),
    "rose": ("roses", "1f339"),
    "sunflower": ("sunflowers", "1f33b"),
    "tree": ("trees", "1f332"),
    "cactus": ("cactuses", "1f335"),
    "rocket": ("rockets", "1f680"),
    "car": ("cars", "1f697"),
    "house": ("houses", "1f3e0"),
    "star": ("stars", "2b50"),
    "key": ("keys", "1f511"),
    "guitar": ("guitars", "1f3b8"),
    "balloon": ("balloons", "1f388"),
    "umbrella": ("umbrellas", "2602-fe0f"),
}

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")

# shape -> one sprite for each colour, in the order of COLOURS
SHAPES = {
    "circle": ("1f534", "1f7e0", "1f7e1", "1f7e2", "1f535", "1f7e3", "1f7e4", "26ab"),
    "square": ("1f7e5", "1f7e7", "1f7e8", "1f7e9", "1f7e6", "1f7ea", "1f7eb", "2b1b"),
    "heart": ("2764-fe0f", "1f9e1", "1f49b", "1f49a", "1f499", "1f49c", "1f90e", "1f5a4"),
}

# name -> RGB at the middle of the canvas, 0 to 255
BACKGROUNDS = {
    "white": (250, 250, 250),
    "pink": (250, 190, 210),
    "sky": (160, 210, 250),
    "mint": (180, 235, 200),
    "sand": (245, 225, 170),
    "lavender": (205, 190, 245),
    "gray": (150, 155, 165),
    "night": (35, 40, 75),
}

NUMBERS = {"two": 2, "three": 3, "four": 4}

# relation -> (the words of a caption, the relation seen from the other object)
RELATIONS = {
    "left": ("to the left of", "right"),
    "right": ("to the right of", "left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}


def _object_kinds() -> dict[str, ObjectKind]:
    kinds = [ObjectKind(noun, plural, noun, None, f"{code}.png") for noun, (plural, code) in NOUNS.items()]
    for shape, codes in SHAPES.items():
        for colour, code in zip(COLOURS, codes, strict=True):
            kinds.append(ObjectKind(f"{colour} {shape}", f"{colour} {shape}s", shape, colour, f"{code}.png"))
    return {kind.name: kind for kind in kinds}


OBJECTS: dict[str, ObjectKind] = _object_kinds()
"""Every object by its name, colour included: 32 nouns, and 3 shapes in 8 colours."""


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted: the vocabulary of the bundled tokenizers."""
    words = {"a", "an", "on", "background", *COLOURS, *BACKGROUNDS, *NUMBERS}
    for phrase, _ in RELATIONS.values():
        words.update(phrase.split())
    for kind in OBJECTS.values():
        words.update(kind.name.split())
        words.update(kind.plural.split())
    return sorted(words)
