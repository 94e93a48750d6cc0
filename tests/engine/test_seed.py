"""The seed, kept as a box, is the dense tensor that it was made from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seg3dcam.engine.seed import Seed

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@st.composite
def dense(draw) -> torch.Tensor:
    """Draw a (B, K, *S) tensor with few numbers that are not zero, some of them NaN."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), *draw(SHAPES)]
    values = torch.zeros(shape, dtype=torch.double)
    numbers = st.sampled_from([1.0, -2.5, 1e-300, math.inf, math.nan])
    for _ in range(draw(st.integers(0, 4))):
        place = tuple(draw(st.integers(0, n - 1)) for n in shape)
        values[place] = draw(numbers)
    return values


@st.composite
def boxes(draw) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """Draw a dense tensor, consecutive items, and a box that may reach beyond the volume."""
    values = draw(dense())
    first = draw(st.integers(0, len(values) - 1))
    items = list(range(first, draw(st.integers(first, len(values) - 1)) + 1))
    start = [draw(st.integers(-4, n + 3)) for n in values.shape[2:]]
    return values, items, start, [draw(st.integers(1, 6)) for _ in start]


def sliced(values, items, start, size) -> torch.Tensor:
    """Return the box voxel by voxel, zero outside of the volume."""
    result = values.new_zeros(len(items), values.shape[1], *size)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in size]).reshape(-1, len(size)):
        there = [s + int(p) for s, p in zip(start, place, strict=True)]
        if all(0 <= t < n for t, n in zip(there, values.shape[2:], strict=True)):
            inside, outside = (slice(None), slice(None), *place), (slice(None), slice(None), *there)
            result[inside] = values[items][outside]
    return result


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(boxes())
def test_cut_and_touches_are_those_of_the_dense_tensor(case):
    values, items, start, size = case
    seed = Seed.of(values)
    expected = sliced(values, items, start, size)
    found = seed.cut(items, start, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert seed.touches(items, start, size) == bool((expected != 0).any())
    found += 1  # a window's part is weighted in place; the seed stays
    again = seed.cut(items, start, size)
    torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(dense())
def test_box_is_the_smallest(values):
    seed = Seed.of(values)
    assert seed.shape == values.shape
    whole = seed.cut(range(len(values)), [0] * (values.ndim - 2), values.shape[2:])
    torch.testing.assert_close(whole, values, rtol=0, atol=0, equal_nan=True)
    if not (values != 0).any():
        assert seed.values.numel() == 0
        return
    for axis in range(1, values.ndim):  # all items are kept
        for end in (0, -1):
            assert (seed.values.select(axis, end) != 0).any()


@pytest.mark.parametrize("shape", [(1, 2), (3, 4)])
def test_logits_without_space(shape):
    """Those of a classifier, (B, K)."""
    values = torch.zeros(shape)
    values[-1, 1] = 3
    seed = Seed.of(values)
    assert torch.equal(seed.cut(list(range(len(values))), (), ()), values)
    assert seed.touches([len(values) - 1], (), ())
    assert seed.touches([0], (), ()) == (len(values) == 1)


def test_seed_does_not_hold_the_dense_tensor():
    values = torch.zeros(1, 2, 40, 40, 40)
    values[0, 1, 3:5, 7, 9] = 1
    seed = Seed.of(values)
    assert seed.values.untyped_storage().nbytes() == 2 * 4
    values += 1
    assert seed.values.flatten().tolist() == [1, 1]
