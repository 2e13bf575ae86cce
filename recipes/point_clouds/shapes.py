"""Classes of shapes by parameters: furniture, vehicles, vessels, solids and emoji silhouettes. y is up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .primitives import Mesh, box, join, lathe, rod, silhouette, superellipsoid, torus

__all__ = ["CLASSES", "TRAIN_CLASSES", "TRANSFER_CLASSES", "make_shape"]

Random = np.random.Generator


def make_shape(name: str, rng: Random) -> Mesh:
    """A random shape of a class.

    Args:
        name: one of :data:`CLASSES`.
        rng: of its parameters.

    Raises:
        ValueError: an unknown class.

    Example:
        >>> make_shape("chair", np.random.default_rng(0)).vertices.shape[1]
        3
    """
    if name not in CLASSES:
        raise ValueError(f"`name` must be one of {', '.join(CLASSES)}, got {name!r}")
    return join(CLASSES[name](rng))


def _legs(rng: Random, width: float, depth: float, height: float) -> list[Mesh]:
    radius, splay = rng.uniform(0.03, 0.06), rng.uniform(0.0, 0.12)
    w, d = width / 2 - radius, depth / 2 - radius
    corners = [(x, z) for x in (-1, 1) for z in (-1, 1)]
    tops = [(x * w * (1 - splay), height, z * d * (1 - splay)) for x, z in corners]
    return [rod((x * w, 0, z * d), top, radius) for (x, z), top in zip(corners, tops, strict=True)]


def _chair(rng: Random) -> list[Mesh]:
    width, depth, seat = rng.uniform(0.8, 1.1), rng.uniform(0.8, 1.1), rng.uniform(0.7, 1.0)
    back, thick = rng.uniform(0.7, 1.2), rng.uniform(0.06, 0.12)
    parts = [*_legs(rng, width, depth, seat), box(width, thick, depth).moved(y=seat)]
    if rng.random() < 0.5:
        parts.append(box(width, back, thick).moved(y=seat, z=-depth / 2 + thick / 2))
    else:
        bars = np.linspace(-width / 2 + 0.06, width / 2 - 0.06, rng.integers(3, 7))
        parts += [rod((x, seat, -depth / 2), (x, seat + back, -depth / 2), 0.04) for x in bars]
        parts.append(box(width, 0.12, 0.1).moved(y=seat + back - 0.06, z=-depth / 2))
    if rng.random() < 0.4:
        height = rng.uniform(0.25, 0.4)
        for x in (-width / 2, width / 2):
            parts += [
                box(0.08, 0.07, depth).moved(x, seat + height),
                rod((x, seat, 0.3), (x, seat + height, 0.3), 0.04),
            ]
    return parts


def _stool(rng: Random) -> list[Mesh]:
    seat, radius = rng.uniform(0.8, 1.4), rng.uniform(0.35, 0.55)
    top = lathe([(0, 0), (radius, 0), (radius, 0.12), (0, 0.12)]).moved(y=seat)
    angles = np.linspace(0, 2 * np.pi, rng.integers(3, 6), endpoint=False)
    spread = rng.uniform(0.9, 1.4) * radius
    feet = [(spread * np.cos(a), 0, spread * np.sin(a)) for a in angles]
    return [
        top,
        *(
            rod(foot, (0.6 * radius * np.cos(a), seat, 0.6 * radius * np.sin(a)), 0.05)
            for foot, a in zip(feet, angles, strict=True)
        ),
    ]


def _table(rng: Random) -> list[Mesh]:
    width, depth, height = rng.uniform(1.2, 2.2), rng.uniform(0.9, 1.3), rng.uniform(0.7, 1.1)
    if rng.random() < 0.3:  # one leg under a round top
        radius = depth / 2 + 0.2
        leg = lathe(
            [
                (0, 0),
                (0.4, 0),
                (0.1, 0.08),
                (0.07, height),
                (radius, height),
                (radius, height + 0.08),
                (0, height + 0.08),
            ]
        )
        return [leg]
    return [box(width, rng.uniform(0.06, 0.14), depth).moved(y=height), *_legs(rng, width, depth, height)]


def _bench(rng: Random) -> list[Mesh]:
    width, depth, height = rng.uniform(1.8, 2.6), rng.uniform(0.5, 0.7), rng.uniform(0.45, 0.65)
    parts = [box(width, 0.1, depth).moved(y=height)]
    parts += [box(0.12, height, depth).moved(x) for x in (-0.38 * width, 0.38 * width)]
    if rng.random() < 0.6:
        parts += [box(width, 0.14, 0.06).moved(y=height + y, z=-depth / 2) for y in (0.25, 0.5)]
    return parts


def _bed(rng: Random) -> list[Mesh]:
    width, length, height = rng.uniform(1.0, 1.7), rng.uniform(1.9, 2.2), rng.uniform(0.3, 0.5)
    head = rng.uniform(0.5, 1.0)
    parts = [box(width, 0.3, length).moved(y=height), *_legs(rng, width, length, height)]
    parts.append(box(width, height + head, 0.1).moved(z=-length / 2))
    pillows = 2 if width > 1.3 else 1
    places = np.linspace(-width / 4, width / 4, pillows) if pillows > 1 else [0.0]
    size = 0.8 * width / pillows
    return [
        *parts,
        *(superellipsoid(size, 0.2, 0.4, (0.6, 0.5)).moved(x, height + 0.3, -0.35 * length) for x in places),
    ]


def _sofa(rng: Random) -> list[Mesh]:
    width, depth = rng.uniform(1.6, 2.6), rng.uniform(0.8, 1.0)
    seat, back, arm = rng.uniform(0.35, 0.5), rng.uniform(0.4, 0.6), rng.uniform(0.15, 0.3)
    parts = [box(width, seat, depth), box(width, seat + back, 0.25).moved(z=-depth / 2 + 0.12)]
    return [*parts, *(box(0.2, seat + arm, depth).moved(x) for x in (-width / 2, width / 2))]


def _bookshelf(rng: Random) -> list[Mesh]:
    width, height, depth = rng.uniform(0.8, 1.4), rng.uniform(1.6, 2.2), rng.uniform(0.3, 0.45)
    levels = np.linspace(0, height, rng.integers(4, 7))
    parts = [box(width, 0.05, depth).moved(y=y) for y in levels]
    parts += [box(0.05, height, depth).moved(x) for x in (-width / 2, width / 2)]
    return [*parts, box(width, height, 0.03).moved(z=-depth / 2)] if rng.random() < 0.6 else parts


def _lamp(rng: Random) -> list[Mesh]:
    height, base = rng.uniform(1.0, 1.8), rng.uniform(0.25, 0.45)
    low, high, shade = rng.uniform(0.35, 0.6), rng.uniform(0.15, 0.4), rng.uniform(0.35, 0.6)
    foot = lathe([(0, 0), (base, 0), (base, 0.06), (0.05, 0.12), (0.04, height)])
    return [foot, lathe([(low, height - 0.1), (high, height - 0.1 + shade)])]


def _plane(rng: Random) -> list[Mesh]:
    length, radius, span = rng.uniform(1.8, 2.4), rng.uniform(0.12, 0.2), rng.uniform(1.8, 2.6)
    sweep, chord = rng.uniform(0.0, 35.0), rng.uniform(0.3, 0.5)
    parts = [superellipsoid(length, 2 * radius, 2 * radius, (1.0, 1.0)).moved(y=-radius)]
    for side in (-1, 1):
        wing = box(chord, 0.05, span / 2).moved(z=span / 4)
        parts.append(wing.scaled(z=side).turned("y", side * -sweep if side > 0 else sweep))
        tail = box(chord / 2, 0.04, span / 6).moved(z=span / 12).scaled(z=side)
        parts.append(tail.turned("y", -side * sweep).moved(-length / 2 + 0.15))
        if rng.random() < 0.7:
            engine = superellipsoid(0.4, 0.16, 0.16).moved(
                0.05 - 0.3 * np.tan(np.radians(sweep)), -0.2, side * span / 5
            )
            parts.append(engine)
    return [*parts, box(chord / 2, rng.uniform(0.3, 0.5), 0.04).moved(-length / 2 + 0.12)]


def _car(rng: Random) -> list[Mesh]:
    length, width = rng.uniform(1.8, 2.3), rng.uniform(0.8, 1.0)
    low, high, cabin = rng.uniform(0.35, 0.5), rng.uniform(0.3, 0.5), rng.uniform(0.45, 0.7)
    body = superellipsoid(length, low, width, (0.3, 0.3)).moved(y=0.2)
    top = superellipsoid(cabin * length, 2 * high, 0.9 * width, (0.4, 0.4)).moved(
        rng.uniform(-0.2, 0.05), 0.2 + low - high
    )
    radius = rng.uniform(0.18, 0.25)
    wheels = [
        rod((x, radius, z - 0.06), (x, radius, z + 0.06), radius)
        for x in (-0.3 * length, 0.3 * length)
        for z in (-width / 2, width / 2)
    ]
    return [body, top, *wheels]


def _rocket(rng: Random) -> list[Mesh]:
    radius, height, nose = rng.uniform(0.2, 0.32), rng.uniform(1.2, 1.8), rng.uniform(0.4, 0.7)
    tip = [(radius * np.cos(t), height + nose * np.sin(t)) for t in np.linspace(0, np.pi / 2, 8)]
    hull = lathe([(0, 0), (0.7 * radius, 0), (radius, 0.2), *tip])
    fin = box(rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.7), 0.04).moved(radius + 0.1)
    count = int(rng.integers(3, 5))
    return [hull, *(fin.turned("y", 360 * i / count) for i in range(count))]


def _boat(rng: Random) -> list[Mesh]:
    length, width, height = rng.uniform(1.6, 2.2), rng.uniform(0.5, 0.8), rng.uniform(0.3, 0.45)
    hull = superellipsoid(length, 2 * height, width, (0.8, 0.9))
    hull = hull._replace(vertices=np.minimum(hull.vertices, (np.inf, height, np.inf)))
    mast = rng.uniform(1.2, 1.8)
    sail = Mesh(
        np.array(
            [
                [0.05, height + 0.2, 0],
                [0.05, height + mast, 0],
                [0.7 * length / 2, height + 0.2, 0],
                [-0.05, height + 0.3, 0],
                [-0.05, height + 0.9 * mast, 0],
                [-0.4 * length, height + 0.3, 0],
            ]
        ),
        np.array([[0, 1, 2], [3, 4, 5]]),
    )
    return [hull, rod((0, height, 0), (0, height + mast, 0), 0.03), sail]


def _mug(rng: Random) -> list[Mesh]:
    radius, height, taper = rng.uniform(0.35, 0.5), rng.uniform(0.7, 1.1), rng.uniform(0.85, 1.15)
    top = radius * taper
    cup = lathe([(0, 0), (radius, 0), (top, height), (top - 0.06, height), (radius - 0.06, 0.08), (0, 0.08)])
    grip = rng.uniform(0.22, 0.32) * height
    return [cup, torus(grip, 0.05, arc=180).turned("z", -90).moved((radius + top) / 2 - 0.02, height / 2)]


def _bottle(rng: Random) -> list[Mesh]:
    radius, body, neck = rng.uniform(0.25, 0.4), rng.uniform(0.7, 1.1), rng.uniform(0.07, 0.12)
    shoulder, top = rng.uniform(0.15, 0.4), rng.uniform(0.2, 0.5)
    end = body + shoulder + top
    return [
        lathe(
            [
                (0, 0),
                (radius, 0),
                (radius, body),
                (neck, body + shoulder),
                (neck, end),
                (neck * 1.3, end),
                (neck * 1.3, end + 0.06),
                (0, end + 0.06),
            ]
        )
    ]


def _vase(rng: Random) -> list[Mesh]:
    height, base = rng.uniform(1.2, 1.8), rng.uniform(0.2, 0.3)
    belly, place, lip = rng.uniform(0.4, 0.65), rng.uniform(0.3, 0.6), rng.uniform(0.15, 0.4)
    steps = np.linspace(0, 1, 16)
    radii = np.interp(steps, [0, place, 0.88, 1], [base, belly, 0.14, lip])
    smooth = np.convolve(np.pad(radii, 2, mode="edge"), np.ones(5) / 5, mode="valid")
    return [lathe([(0, 0), *zip(smooth, steps * height, strict=True)])]


def _goblet(rng: Random) -> list[Mesh]:
    foot, stem, bowl = rng.uniform(0.3, 0.42), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.45)
    depth = rng.uniform(0.5, 0.8)
    cup = [(bowl * np.sin(t) ** 0.6, stem + depth * (1 - np.cos(t)) / 1.2) for t in np.linspace(0.1, 1.9, 9)]
    return [lathe([(0, 0), (foot, 0), (0.06, 0.08), (0.05, stem), *cup])]


def _bowl(rng: Random) -> list[Mesh]:
    radius, depth = rng.uniform(0.6, 1.0), rng.uniform(0.35, 0.6)
    outer = [(radius * np.sin(t), depth * (1 - np.cos(t))) for t in np.linspace(0.25, np.pi / 2, 8)]
    inner = [((radius - 0.07) * np.sin(t), depth * (1 - np.cos(t)) + 0.05) for t in np.linspace(np.pi / 2, 0, 8)]
    return [lathe([(0, 0), (0.3 * radius, 0), *outer, *inner])]


def _house(rng: Random) -> list[Mesh]:
    width, depth, height = rng.uniform(1.0, 1.6), rng.uniform(0.9, 1.3), rng.uniform(0.6, 1.0)
    roof, over = rng.uniform(0.4, 0.8), 1.15
    w, d = width * over / 2, depth * over / 2
    corners = np.array([[-w, 0, -d], [w, 0, -d], [w, 0, d], [-w, 0, d], [0, roof, -d], [0, roof, d]])
    faces = np.array([[0, 1, 4], [2, 3, 5], [0, 4, 5], [0, 5, 3], [1, 2, 5], [1, 5, 4]])
    chimney = box(0.16, 0.5, 0.16).moved(0.25 * width, height + 0.25 * roof, 0.1)
    return [box(width, height, depth), Mesh(corners, faces).moved(y=height), chimney]


def _tree(rng: Random) -> list[Mesh]:
    trunk, radius = rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.65)
    parts = [rod((0, 0, 0), (0, trunk + 0.2, 0), rng.uniform(0.07, 0.13))]
    if rng.random() < 0.5:
        return [*parts, superellipsoid(2 * radius, rng.uniform(0.9, 1.3), 2 * radius).moved(y=trunk)]
    tiers = int(rng.integers(2, 5))
    for tier in range(tiers):
        size = radius * (1 - 0.22 * tier)
        parts.append(lathe([(0, 0), (size, 0), (0, 0.6)]).moved(y=trunk + 0.32 * tier))
    return parts


def _snowman(rng: Random) -> list[Mesh]:
    sizes = np.array([1.0, rng.uniform(0.65, 0.8), rng.uniform(0.45, 0.55)])
    heights = np.concatenate([[0], np.cumsum(sizes[:-1]) * 0.86])
    balls = [superellipsoid(s, s, s).moved(y=y) for s, y in zip(sizes, heights, strict=True)]
    head = heights[2] + sizes[2] / 2
    nose = rod((0, head, sizes[2] / 2 - 0.03), (0, head, sizes[2] / 2 + 0.3), 0.06, 0.01)
    hat = lathe([(0, 0), (0.32, 0), (0.32, 0.04), (0.2, 0.04), (0.2, 0.35), (0, 0.35)]).moved(
        y=heights[2] + 0.92 * sizes[2]
    )
    return [*balls, nose, hat]


def _dumbbell(rng: Random) -> list[Mesh]:
    length, size = rng.uniform(1.0, 1.8), rng.uniform(0.5, 0.8)
    parts = [rod((-length / 2, 0, 0), (length / 2, 0, 0), rng.uniform(0.06, 0.1))]
    for x in (-length / 2, length / 2):
        if rng.random() < 0.5:
            parts.append(superellipsoid(size, size, size).moved(x, -size / 2))
        else:
            parts.append(rod((x - 0.12, 0, 0), (x + 0.12, 0, 0), size / 2))
    return parts


def _hammer(rng: Random) -> list[Mesh]:
    length, head = rng.uniform(1.2, 1.8), rng.uniform(0.5, 0.8)
    handle = rod((0, 0, 0), (0, length, 0), 0.07, rng.uniform(0.05, 0.08))
    block = box(0.45 * head, 0.26, 0.26).moved(0.3 * head, length - 0.05)
    claw = rod((0, length + 0.08, 0), (-0.7 * head, length - rng.uniform(-0.1, 0.15), 0), 0.1, 0.03)
    return [handle, block, claw]


def _umbrella(rng: Random) -> list[Mesh]:
    radius, height, rise = rng.uniform(0.7, 1.0), rng.uniform(1.2, 1.6), rng.uniform(0.3, 0.5)
    canopy = lathe(
        [(radius * np.sin(t), height - rise * (1 - np.cos(t)) / (1 - np.cos(1.3))) for t in np.linspace(0.0, 1.3, 8)],
        int(rng.integers(6, 10)),
    )
    hook = torus(0.13, 0.03, arc=180).turned("z", 180).moved(0.13, 0.0)
    return [canopy, rod((0, 0, 0), (0, height + 0.1, 0), 0.03), hook]


def _solid(rng: Random) -> list[Mesh]:
    return [superellipsoid(*rng.uniform(0.6, 1.6, 3), tuple(rng.uniform(0.2, 1.8, 2)))]


def _ring(rng: Random) -> list[Mesh]:
    return [torus(1.0, rng.uniform(0.15, 0.5), rng.uniform(0.3, 1.5)).turned("x", rng.uniform(0, 90))]


def _emoji(sprite: str) -> Callable[[Random], list[Mesh]]:
    def make(rng: Random) -> list[Mesh]:
        wide, deep = rng.uniform(0.75, 1.3), rng.uniform(0.12, 0.5)
        return [silhouette(sprite, 1.0).scaled(wide, 1.0, deep).turned("y", rng.uniform(-20, 20))]

    return make


TRAIN_CLASSES = {
    "bed": _bed,
    "bookshelf": _bookshelf,
    "bottle": _bottle,
    "bowl": _bowl,
    "butterfly": _emoji("1f98b"),
    "cactus": _emoji("1f335"),
    "car": _car,
    "chair": _chair,
    "dumbbell": _dumbbell,
    "heart": _emoji("2764-fe0f"),
    "house": _house,
    "lamp": _lamp,
    "mug": _mug,
    "plane": _plane,
    "ring": _ring,
    "rocket": _rocket,
    "solid": _solid,
    "star": _emoji("2b50"),
    "table": _table,
    "tree": _tree,
    "vase": _vase,
}
"""Classes to train on."""

TRANSFER_CLASSES = {
    "bench": _bench,
    "boat": _boat,
    "goblet": _goblet,
    "guitar": _emoji("1f3b8"),
    "hammer": _hammer,
    "key": _emoji("1f511"),
    "snowman": _snowman,
    "sofa": _sofa,
    "stool": _stool,
    "umbrella": _umbrella,
}
"""Classes that training never sees."""

CLASSES = {**TRAIN_CLASSES, **TRANSFER_CLASSES}
"""All classes."""
