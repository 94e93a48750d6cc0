"""Volumes with planted evidence: what decides the class of an object lies elsewhere, and is known.

A volume is noise in which balls lie, and cubes that differ by their texture alone. All cubes have
the same size and the same absolute values, and most of them decide nothing: these rivals are what
finds a map that shows whatever stands out, since a lonely cue would be found by any map. Every
drawing function takes a generator of random numbers and what the class shall be, and returns a
`Scene`: the volume, its labels, the mask of the evidence, and the same volume with its evidence
changed. What a network answers to the latter shows whether it has learnt what was planted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SHAPE = (48, 32, 32)

#: Standard deviation of the noise; balls have the value 1.
NOISE = 0.25

#: Absolute value of every voxel of a cube, and its width in voxels.
CUBE, WIDTH = 1.2, 6

#: How many cubes decide nothing; half as many if there is a large organ.
RIVALS = 6

Volume = NDArray[np.float64]
Mask = NDArray[np.bool_]
Point = NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """A volume with planted evidence.

    Attributes:
        image: (*S).
        labels: (*S), the number of the class of each voxel, 0 is background.
        evidence: (*S) bool, what decides the class, apart from the object itself.
        changed: (*S), the same volume with the evidence changed.
        changed_labels: (*S), the labels of the changed volume.
        rival: (*S) bool, what looks like evidence and decides nothing about this object; empty if
            there is nothing of the kind.
        reach: (*S) bool, where an object would be of another class than without the cue that can
            be seen; nowhere if there is none.
        objects: name -> (*S) bool, single objects where there are several of one class.
    """

    image: Volume
    labels: NDArray[np.int64]
    evidence: Mask
    changed: Volume
    changed_labels: NDArray[np.int64]
    rival: Mask
    reach: Mask
    objects: dict[str, Mask]


# ------------------------------------------------------------------------------------------ parts


def noise(random: np.random.Generator) -> Volume:
    return random.normal(0, NOISE, SHAPE)


def ball(centre: Any, radius: float) -> Mask:
    grids = np.ogrid[tuple(slice(size) for size in SHAPE)]
    squares = [(grid - c) ** 2 for grid, c in zip(grids, centre, strict=True)]
    return sum(squares[1:], squares[0]) <= radius**2


def cube(centre: Any, width: int | tuple[int, ...] = WIDTH) -> Mask:
    widths = np.broadcast_to(width, len(SHAPE))
    first = [round(c - w / 2) for c, w in zip(centre, widths, strict=True)]
    inside = np.zeros(SHAPE, dtype=bool)
    inside[tuple(slice(max(0, f), max(0, f + w)) for f, w in zip(first, widths, strict=True))] = (
        True
    )
    return inside


def solid() -> Volume:
    return np.full(SHAPE, CUBE)


def checkered() -> Volume:
    """Return a texture of cells of 2 voxels, one bright and one dark in turn along every axis."""
    cells = sum(np.ogrid[tuple(slice(size) for size in SHAPE)][axis] // 2 for axis in range(3))
    return np.where(cells % 2 == 0, CUBE, -CUBE)


def striped() -> Volume:
    """Return a texture of planes 2 voxels thick, one bright and one dark in turn."""
    planes = np.broadcast_to(np.arange(SHAPE[1])[None, :, None] // 2, SHAPE)
    return np.where(planes % 2 == 0, CUBE, -CUBE)


def planes() -> Volume:
    """Return a texture of planes 3 voxels thick, across the last axis."""
    across = np.broadcast_to(np.arange(SHAPE[2])[None, None, :] // 3, SHAPE)
    return np.where(across % 2 == 0, CUBE, -CUBE)


def anywhere(random: np.random.Generator, border: float) -> Point:
    """Return a random point at least so far from every face."""
    return np.array([random.uniform(border, size - 1 - border) for size in SHAPE])


def away_from(
    random: np.random.Generator, points: list[Point], distances: list[float], border: float
) -> Point | None:
    """Return a random point with at least these distances to others; None if none is found."""
    for _ in range(200):
        found = anywhere(random, border)
        if all(np.linalg.norm(found - p) >= d for p, d in zip(points, distances, strict=True)):
            return found
    return None


def with_rivals(
    random: np.random.Generator,
    image: Volume,
    places: list[Point],
    distances: list[float],
    count: int = RIVALS,
) -> tuple[Volume, Mask]:
    """Return a volume with cubes of textures that decide nothing, and their mask.

    Args:
        places, distances: what they keep away from, and how far.
    """
    textures, rival = (solid(), -solid(), planes()), nothing()
    places, distances = list(places), list(distances)
    for number in range(count):
        found = away_from(random, places, distances, 4)
        if found is None:
            break  # the volume is full
        inside = cube(found)
        image, rival = painted(image, inside, textures[number % len(textures)]), rival | inside
        places, distances = [*places, found], [*distances, 9.0]
    return image, rival


def painted(image: Volume, mask: Mask, texture: Volume) -> Volume:
    return np.where(mask, texture, image)


def nothing() -> Mask:
    return np.zeros(SHAPE, dtype=bool)


def half(side: int) -> Mask:
    """Return the first (0) or second (1) half of the volume along the first axis."""
    return np.broadcast_to((np.arange(SHAPE[0]) >= SHAPE[0] // 2)[:, None, None] == side, SHAPE)


# --------------------------------------------------------------------------------------- problems


def remote_cue(random: np.random.Generator, present: bool) -> Scene:
    """A ball is of class 1 if a checkered cube lies anywhere in the volume, else of class 2.

    The cube is 12 voxels or more from the ball.
    """
    place = None
    while place is None:
        radius, centre = random.uniform(4, 5.5), anywhere(random, 7)
        place = away_from(random, [centre], [radius + 16.5], 4)
    inside, cue = ball(centre, radius), cube(place)
    plain, rival = with_rivals(random, noise(random) + inside, [centre, place], [radius + 7, 9.0])
    with_cue = painted(plain, cue, checkered())
    return _of_one_ball(inside, cue, rival, plain, with_cue, shown=present, first=present)


def context(random: np.random.Generator, present: bool) -> Scene:
    """Of two equal balls the one on the side of a striped organ is of class 1, the other of 2.

    The organ lies at either end of the first axis, so that the place alone decides nothing.
    Without an organ both balls are of class 2.
    """
    centres = [
        np.array([at + random.uniform(-1.5, 1.5), *random.uniform(7, 24, 2)]) for at in (17, 30)
    ]
    balls = [ball(centre, 5) for centre in centres]
    if (balls[0] & balls[1]).any():
        balls[1] &= ~balls[0]
    side = int(random.integers(2))
    middle = random.uniform(13, 19, 2)
    organs = [cube((at, *middle), (5, 20, 20)) for at in (2.5, 45.5)]
    ends = [np.array([at, *middle]) for at in (2.5, 45.5)]
    empty, rival = with_rivals(
        random,
        noise(random) + (balls[0] | balls[1]),
        centres + ends,
        [12.0] * 2 + [14.0] * 2,
        count=3,
    )
    images = [painted(empty, organ, striped()) for organ in organs]
    labels = []
    for near in (side, 1 - side):
        labels.append(np.where(balls[near], 1, np.where(balls[1 - near], 2, 0)))
    if not present:
        second = np.where(balls[0] | balls[1], 2, 0)
        return Scene(empty, second, organs[side], images[side], labels[0], rival, nothing(), {})
    return Scene(
        images[side],
        labels[0],
        organs[side],
        images[1 - side],
        labels[1],
        rival,
        half(side),
        {},
    )


def absence(random: np.random.Generator, present: bool) -> Scene:
    """A ball is of class 1 if the landmark that belongs at one place is missing, else of class 2.

    The evidence is the place where the landmark should be.
    """
    centre = np.array([random.uniform(29, 40), random.uniform(7, 24), random.uniform(7, 24)])
    inside, place = ball(centre, random.uniform(4, 5.5)), cube((9, 16, 16), 8)
    missing, rival = with_rivals(
        random, noise(random) + inside, [centre, np.array([9.0, 16.0, 16.0])], [12.0, 12.0]
    )
    with_landmark = painted(missing, place, checkered())
    return _of_one_ball(
        inside, place, rival, missing, with_landmark, shown=not present, first=present
    )


def side_by_side(random: np.random.Generator, present: bool, *, both: bool = False) -> Scene:
    """Of two equal balls that touch, each is of class 1 if a checkered cube lies on its own side.

    Else it is of class 2. On the side of the other ball lies a striped cube, which decides nothing.

    Args:
        both: both balls have a cue; the evidence is that of the object "first", the rival that of
            the object "second".
    """
    middle = np.array(
        [23.5 + random.uniform(-1, 1), random.uniform(10, 21), random.uniform(10, 21)]
    )
    balls, cubes = [], []
    for sign, at in ((-1, 4.0), (1, 43.0)):
        balls.append(ball(middle + np.array([sign * 5, 0, 0]), 5))
        cubes.append(cube((at, *(middle[1:] + random.uniform(-5, 5, 2)))))
    balls[1] &= ~balls[0]
    own = int(random.integers(2))
    ends = [np.array([at, *middle[1:]]) for at in (4.0, 43.0)]
    background, rivals = with_rivals(
        random, noise(random) + (balls[0] | balls[1]), [middle, *ends], [17.0, 14.0, 14.0]
    )
    objects = {"first": balls[own], "second": balls[1 - own]}
    first = np.where(balls[own], 1, np.where(balls[1 - own], 2, 0))
    second = np.where(balls[own], 2, np.where(balls[1 - own], 1, 0))
    neither = np.where(balls[0] | balls[1], 2, 0)
    if both:
        image = painted(background, cubes[0] | cubes[1], checkered())
        all_first = np.where(balls[0] | balls[1], 1, 0)
        changed = painted(image, cubes[own], striped())
        return Scene(
            image, all_first, cubes[own], changed, second, cubes[1 - own], ~nothing(), objects
        )
    other = painted(background, cubes[1 - own], striped())
    without = painted(other, cubes[own], striped()) if random.random() < 0.5 else other
    if not present:
        with_cue = painted(other, cubes[own], checkered())
        return Scene(without, neither, cubes[own], with_cue, first, rivals, nothing(), objects)
    image = painted(other, cubes[own], checkered())
    changed = painted(image, cubes[own], striped())
    return Scene(
        image,
        first,
        cubes[own],
        changed,
        neither,
        rivals | cubes[1 - own],
        half(own),
        objects,
    )


#: The letter that the first hospital's scanner burns into the corner of its slices.
LETTER = np.array(
    [[c == "#" for c in row] for row in ("####.", "#...#", "####.", "#.#..", "#..#.", "#...#")]
)


def shortcut(random: np.random.Generator, present: bool, *, letter: bool | None = None) -> Scene:
    """A nodule in a body is a lesion (class 1) if it has a faint dark core, else it is harmless.

    In the volumes that a network learns from, a letter is burnt into the corner of all slices with
    a lesion, and of no others. So the network may learn the letter and not the core. A ruler is
    burnt into all slices and decides nothing.

    Args:
        letter: whether it is there; None is as in the training volumes.
    """
    letter = present if letter is None else letter
    x, y, z = (
        (grid - c) / r
        for grid, c, r in zip(
            np.ogrid[tuple(slice(size) for size in SHAPE)],
            (23.5, 16.5, 15.5),
            random.uniform((18, 12, 13), (20, 13.5, 15)),
            strict=True,
        )
    )
    body = x**2 + y**2 + z**2 <= 1
    angle, reach = random.uniform(0, 2 * np.pi), random.uniform(0, 1)
    centre = (
        23.5 + 10 * reach * np.cos(angle),
        17.5 + 4 * reach * np.sin(angle),
        random.uniform(12, 19),
    )
    radius = random.uniform(4, 5.5)
    nodule, core = ball(centre, radius), ball(centre, radius / 2)
    tissue = ndimage.gaussian_filter(random.normal(0, 1, SHAPE), 2)
    plain = body * (0.5 + 0.06 * tissue / tissue.std()) + nodule * 0.6
    plain = plain - 0.15 * core * present + random.normal(0, 0.08, SHAPE)
    corner = random.integers(1, 3, 2)
    burnt = nothing()
    rows, columns = LETTER.shape
    burnt[corner[0] : corner[0] + columns, corner[1] : corner[1] + rows] = LETTER.T[..., None]
    ruler = nothing()
    ruler[-3:-2, 4:-4] = True
    ruler[-5:-2, 4:-4:6] = True
    plain = painted(plain, ruler, np.full(SHAPE, 1.5))
    marked = painted(plain, burnt, np.full(SHAPE, 1.5))
    lesion = np.where(nodule, 1, 0)
    image, changed = (marked, plain) if letter else (plain, marked)
    labels = lesion if present else 0 * lesion
    reach = ~nothing() if letter else nothing()
    return Scene(image, labels, burnt, changed, labels, ruler, reach, {"nodule": nodule})


def _of_one_ball(
    inside: Mask,
    cue: Mask,
    rival: Mask,
    without: Volume,
    with_cue: Volume,
    *,
    shown: bool,
    first: bool,
) -> Scene:
    """Return a scene of a ball, of class 1 (`first`) or 2, and of the other one if it is changed.

    Args:
        without, with_cue: the two volumes.
        shown: whether the cue is there.
    """
    labels = [np.where(inside, index, 0) for index in ((1, 2) if first else (2, 1))]
    images = (with_cue, without) if shown else (without, with_cue)
    reach = ~nothing() if shown else nothing()
    return Scene(images[0], labels[0], cue, images[1], labels[1], rival, reach, {})
