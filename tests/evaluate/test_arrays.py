"""A map or a region may be a tensor or an array of any precision and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy
from test_faithfulness import CUE, MASK, SHAPE, RemoteCue, scene

from seg3dcam.errors import ConfigError, EvaluationError, InputError
from seg3dcam.evaluate import (
    context_deletion,
    context_evidence,
    kept_confidence,
    localisation,
    mass_inside,
)
from seg3dcam.evaluate.complexity import gini

#: Rounded to 8 bits, so that every precision holds the same values.
VALUES = (16 * toy.random_input(1, 1, *SHAPE, seed=4)[0, 0]).round().clamp(-99, 99) / 16 + CUE

KINDS = {
    "half": lambda values: values.half(),
    "bfloat16": lambda values: values.bfloat16(),
    "with a gradient": lambda values: values.clone().requires_grad_(),
    "flipped twice": lambda values: np.ascontiguousarray(values.numpy()[::-1])[::-1],
    "Fortran": lambda values: np.asfortranarray(values.numpy()),
    "float32": lambda values: values.numpy().astype(np.float32),
    "a view": lambda values: torch.stack([values, -values], -1)[..., 0],
    "big endian": lambda values: values.numpy().astype(">f8"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_map_gives_the_same_figures(kind):
    x, given, region = scene(), KINDS[kind](VALUES), np.flip(np.flip(MASK.numpy() > 0))
    curve = context_deletion(given, x, RemoteCue(), 1, block=2, steps=3)
    assert np.array_equal(
        curve.dice, context_deletion(VALUES, x, RemoteCue(), 1, block=2, steps=3).dice
    )
    assert kept_confidence(given, x, RemoteCue(), 1) == kept_confidence(VALUES, x, RemoteCue(), 1)
    assert localisation(given, region, draws=3) == localisation(VALUES, MASK > 0, draws=3)
    assert mass_inside(given, {"mask": region}) == mass_inside(VALUES, {"mask": MASK})
    assert gini(given) == gini(VALUES)


def test_any_kind_of_number_counts():
    found = context_deletion(
        VALUES,
        scene().half(),
        RemoteCue(),
        np.int64(1),
        margin=np.int32(2),
        block=np.int64(2),
        steps=np.int16(3),
        baseline=np.float32(0),
        seed=np.int64(0),
    )
    expected = context_deletion(VALUES, scene(), RemoteCue(), 1, block=2, steps=3, baseline=0)
    assert np.array_equal(found.dice, expected.dice)


def test_what_is_no_map_or_setting_is_refused_by_name():
    def curve(values=VALUES, **more):
        return context_deletion(values, scene(), RemoteCue(), 1, **({"block": 2} | more))

    with pytest.raises(InputError, match="real numbers; got complex64"):
        curve(VALUES.to(torch.complex64))
    with pytest.raises(InputError, match="real numbers"):
        curve(np.full(SHAPE, "a"))
    for name, values in {
        "seed": (-1, None, 0.5),
        "baseline": (float("nan"), float("inf"), None, [0, 1], True, torch.tensor(0.0)),
        "block": (2.0, (2, 2, 2), 0),
    }.items():
        for value in values:
            with pytest.raises(ConfigError, match=name):
                curve(**{name: value})
    with pytest.raises(ConfigError, match="baselines 'mean': a list"):
        context_evidence(VALUES, scene(), RemoteCue(), 1, baselines="mean")
    with pytest.raises(EvaluationError, match="the map is 0 everywhere"):
        context_evidence(0 * VALUES, scene(), RemoteCue(), 1)
