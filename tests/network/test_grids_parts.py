"""What the measurements of a grid are made of, each against what is worked out by hand.

Whole networks hide much of it: what one measurement gets wrong, the other finds out, and a doubt is
looked at again.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.utils.checkpoint import checkpoint

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import capturing
from seg3dcam.network.grids import agreement, by_gradients, by_noise, measurement
from seg3dcam.network.grids.agreement import (
    AGREE,
    EITHER_SIDE,
    LEANING,
    PUSHED,
    STEPS,
    SUSPECTED,
    agreeing,
)
from seg3dcam.network.grids.centre_line import (
    FEW_PARTS,
    LITTLE,
    PULLED,
    CentreLine,
    line_of_many_voxels,
)
from seg3dcam.network.grids.operations import (
    FADED,
    MirroredOperations,
    PlainOperations,
    RandomOperations,
)
from seg3dcam.network.grids.sample_inputs import TIMES, handy_shape, has_grid, times_drawn
from seg3dcam.network.layers import resolve_layers
from seg3dcam.network.layouts import INPUT

# --------------------------------------------------------------------------------- the ramp


def shown_by(stride, offset, size, length, around=((1,), (1,))):
    """Return what a layer of some grid shows of the four ramps, along its middle axis."""
    place = stride * torch.arange(size, dtype=torch.float64) + offset
    part = (place / (length - 1)).view(1, -1, 1).expand(len(around[0]), -1, len(around[1]))
    low, high = measurement._LOW, measurement._HIGH
    scale, more = 3.0, -1234.0  # of the layer, which may scale its input, and add to it
    shown = (low + 0 * part, high + 0 * part, low + (high - low) * part, high - (high - low) * part)
    return [scale * v + more for v in shown]


@pytest.mark.parametrize(
    ("stride", "offset", "size", "length"),
    [(2, 0, 32, 64), (4, 1.5, 16, 64), (1, 0, 64, 64), (8, 3.5, 8, 64), (64, 31.5, 1, 64)],
)
def test_a_ramp_tells_stride_and_offset(stride, offset, size, length):
    shown = shown_by(stride, offset, size, length, ((1, 2), (1, 2, 3)))
    assert measurement._fit(shown, 1, length, size, length) == pytest.approx((stride, offset))
    line = [values[0, :, 0] for values in shown]
    assert measurement._fit(line, 0, length, size, length) == pytest.approx((stride, offset))


def test_what_padding_does_to_the_ends_does_not_count():
    shown = shown_by(2, 0.5, 32, 64)
    for values in shown:
        values[:, :8] = values[:, -8:] = 7.0
    assert measurement._fit(shown, 1, 64, 32, 64) == pytest.approx((2, 0.5))


def test_what_shows_nothing_does_not_count():
    """Neither whole places along the axis nor some at a place."""
    shown = shown_by(2, 0.5, 32, 64, ((1, 2), (1, 2, 3)))
    for values in shown:
        values[:, 10:12] = 7.0
        values[1, 14:] = 7.0
    assert measurement._fit(shown, 1, 64, 32, 64) == pytest.approx((2, 0.5))
    for values in shown:
        values[:, 9:] = 7.0
    assert measurement._fit(shown, 1, 64, 32, 64) is None


def test_another_size_must_have_the_same_grid():
    """Not two voxels more or less, nor a resampled one: its stride depends on the size."""
    shown = shown_by(2, 0.5, 32, 64)
    assert measurement._fit(shown, 1, 64, 96, 192) == pytest.approx((2, 0.5))
    assert measurement._fit(shown, 1, 64, 98, 192) is None
    assert measurement._fit(shown, 1, 64, 94, 192) is None
    resampled = shown_by(1.5, 0.25, 43, 64)
    assert measurement._fit(resampled, 1, 64, 43, 64) is not None
    assert measurement._fit(resampled, 1, 64, 128, 192) is None


@pytest.mark.parametrize(
    ("shift", "believed"), [(16, True), (-16, True), (16.5, False), (-16.5, False)]
)
def test_a_layers_middle_is_about_that_of_the_input(shift, believed):
    found = measurement._fit(shown_by(2, 0.5 + shift, 32, 64), 1, 64, 32, 64)
    assert found == (pytest.approx((2, 0.5 + shift)) if believed else None)


@pytest.mark.parametrize(("shift", "believed"), [(31, True), (33, False)])
def test_a_layer_of_few_voxels_may_be_off_by_one_of_them(shift, believed):
    """Two voxels of stride 32 in 64: a quarter of the input is less than one of them."""
    found = measurement._fit(shown_by(32, 15.5 + shift, 2, 64), 1, 64, 2, 64)
    assert (found is not None) == believed


def stride(index, position, size, length):
    """Return the stride of a layer measured in the network's own input."""
    return measurement._stride(index, position, measurement._Sizes(size, length, size, length))


@pytest.mark.parametrize(
    ("true", "size", "length", "expected"),
    [
        (2, 32, 64, 2),
        (2, 32, 63, 2),  # rounded up
        (2, 32, 65, 2),  # and down
        (63 / 31, 32, 64, 63 / 31),  # corners aligned
        (1.5, 42, 63, 1.5),  # lengths divided
        (4, 14, 64, 4),  # of 14 voxels, without padding
        (-2, 32, 64, None),  # mirrored
        (0, 32, 64, None),  # all at one place
        (0.8, 32, 64, None),  # less than half of the input
        (2.6, 32, 64, None),  # more than all of it
        (1.9, 32, 64, 1.9),
    ],
)
def test_the_stride_is_a_whole_one_where_that_fits(true, size, length, expected):
    index = torch.arange(size // 4, size - size // 4).double()
    found = stride(index, true * index + 3.25, size, length)
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_curve_has_no_stride():
    """As a logarithm of intensities makes of the ramp; a line of that stride would have one."""
    index = torch.arange(8, 24).double()
    line = 1.9 * index + 3.25
    assert stride(index, line, 32, 64) == pytest.approx(1.9)
    assert stride(index, line + 0.02 * (index - 16) ** 2, 32, 64) is None


@pytest.mark.parametrize(
    ("stride", "sizes", "fits"),
    [
        (2, (32, 64, 64, 128), True),
        (3, (32, 64, 64, 128), False),
        (4, (32, 64, 64, 128), False),
        (3, (22, 64, 7, 17), True),  # 47 voxels more are 15.7 of the layer's
        (3, (22, 64, 5, 17), False),
        (7, (32, 64, 32, 64), True),  # one size contradicts nothing
    ],
)
def test_a_stride_fits_both_sizes_of_the_layer(stride, sizes, fits):
    assert measurement._fits_sizes(stride, measurement._Sizes(*sizes)) == fits


def test_the_middles_of_steps_lie_on_a_line():
    index, position = measurement._steps(
        torch.arange(6).double(), torch.tensor([7.5, 7.5, 23.5, 23.5, 39.5, 39.5]).double()
    )
    assert index.tolist() == [0.5, 2.5, 4.5]
    assert position.tolist() == [7.5, 23.5, 39.5]


@pytest.mark.parametrize("cut_off", [0, 1, 2])
def test_a_staircase_may_begin_within_a_step(cut_off):
    position = torch.arange(6).double().repeat_interleave(3)[3 - cut_off :] * 6
    index, steps = measurement._steps(torch.arange(len(position)).double(), position)
    assert index.tolist() == [cut_off + 1 + 3 * step for step in range(len(index))]
    assert steps.diff().tolist() == [6] * (len(index) - 1)


def test_the_ends_of_a_staircase_may_be_distorted():
    """The outermost quarter does not count; what is no staircase inside it stays as it is."""
    steps = torch.arange(8).double().repeat_interleave(3) * 6
    ends, middle = steps.clone(), steps.clone()
    ends[[0, -1]] += 1
    middle[12] += 1
    index = torch.arange(24).double()
    assert measurement._steps(index, ends)[0].tolist() == list(range(1, 24, 3))
    assert measurement._steps(index, middle)[0].tolist() == list(range(24))


@pytest.mark.parametrize("size", [30, 32, 34])
def test_a_staircase_has_the_whole_stride_of_its_steps(size):
    """Of transposed convolutions: places in pairs. The network may have padded its input, too."""
    index = torch.arange(size).double()
    steps = measurement._steps(index, 4 * (index / 2).floor())
    assert stride(*steps, size, 64) == 2


@pytest.mark.parametrize("size", [30, 32])
def test_a_staircase_that_begins_within_a_step_has_it_too(size):
    """No line fits such places well."""
    index = torch.arange(size).double()
    steps = measurement._steps(index, 4 * ((index + 1) / 2).floor())
    assert stride(*steps, size, 64) == 2


def test_the_handy_shape_is_the_input_modulo_32():
    assert handy_shape((200, 70, 20), 0, 64) == (64 + 8, 32 + 6, 20)
    assert handy_shape((200, 70, 20), 2, 64) == (32 + 8, 32 + 6, 64 + 20)
    assert handy_shape((32, 31), 1, 64) == (32, 64 + 31)


@pytest.mark.parametrize(("true", "expected"), [(4.6, 5), (4.4, 4)])
def test_of_two_whole_strides_the_nearer_one_is_taken(true, expected):
    """Places so rough that a line of either fits them; 13 voxels in 64 are 4.9 to one."""
    rough = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, 1]).double()
    index = torch.arange(3, 11).double()
    assert stride(index, true * index + 2 * rough, 13, 64) == expected


# ----------------------------------------------------------------------- the middle of the field


def test_small_inputs_are_looked_at_more_often():
    assert times_drawn((64, 32, 32)) == times_drawn((500, 500, 500)) == 1
    assert times_drawn((32, 32, 32)) == 2
    assert times_drawn((64, 48)) == TIMES


CUBE = FeatureGrid((16, 8, 16), (4.0, 4.0, 4.0), (1.5, 1.5, 1.5))
FRACTION = FeatureGrid((16, 8, 16), (4.2, 4.0, 4.0), (1.5, 1.5, 1.5))
SURE = CentreLine(0.0, 0.01, 0.0, 0.0, 10, FEW_PARTS, 0.0, LITTLE)
DOUBT, OFF = SURE._replace(error=math.inf), SURE._replace(shift=9.0)


def test_what_is_in_doubt_is_looked_at_again(monkeypatch):
    """Each axis by itself, until no doubt is left; one axis that is off is enough."""
    asked = []

    def look(number, seen):
        def lines(capture, x, grids, doubts, draws):
            asked.append((number, draws, sorted("".join(map(str, d)) for d in doubts)))
            return seen

        return lines

    by = {
        "noise": {("a", 0): SURE, ("a", 1): DOUBT, ("b", 0): OFF, ("c", 0): SURE, ("c", 1): SURE},
        "gradients": {("a", 1): DOUBT, ("a", 0): OFF},
        "again": {("a", 1): SURE},
        "never": {},
    }
    looks = tuple((look(name, seen), n) for n, (name, seen) in enumerate(by.items(), 1))
    monkeypatch.setattr(agreement, "LOOKS", looks)
    grids = dict.fromkeys("abc", FeatureGrid((16, 8), (4.0, 4.0), (1.5, 1.5)))
    assert agreeing(None, torch.zeros(1, 1, 64, 32), grids) == {"c"}
    assert asked == [
        ("noise", 1, ["a0", "a1", "b0", "b1", "c0", "c1"]),
        ("gradients", 2, ["a1"]),
    ]
    asked.clear()
    del by["gradients"]["a", 0]
    assert agreeing(None, torch.zeros(1, 1, 64, 32), grids) == {"a", "c"}
    assert asked[2:] == [("again", 3, ["a1"])]
    del by["again"]["a", 1]
    assert agreeing(None, torch.zeros(1, 1, 64, 32), grids) == {"c"}  # still in doubt
    assert agreeing(None, torch.zeros(1, 1, 64, 32), {}) == set()


@pytest.mark.parametrize(
    ("first", "last", "asked"),
    [
        (DOUBT, {}, ["a0", "a1"]),  # random kernels clear a doubt
        (OFF._replace(draws=1), {}, ["a1"]),  # no suspicion
        (OFF._replace(draws=1, error=9 / SUSPECTED), {}, ["a0", "a1"]),  # so unsure
        (OFF._replace(draws=1, pull=LITTLE + 0.1), {}, ["a0", "a1"]),  # or so little seen
        (OFF._replace(draws=1), {("a", 0): SURE}, ["a1"]),
        (OFF._replace(draws=1), {("a", 0): OFF}, ["a1"]),
    ],
)
def test_random_kernels_do_not_clear_a_network_that_seems_off(first, last, asked, monkeypatch):
    seen = []

    def gradients(capture, x, grids, doubts, draws):
        seen.extend(sorted("".join(map(str, doubt)) for doubt in doubts))
        return dict.fromkeys(doubts, SURE)

    def noise(capture, x, grids, doubts, draws):
        return {("a", 0): first, ("a", 1): DOUBT} if draws == 1 else last

    monkeypatch.setattr(agreement, "by_gradients", gradients)
    monkeypatch.setattr(agreement, "LOOKS", ((noise, 1), (gradients, 3), (noise, 6)))
    grids = {"a": FeatureGrid((16, 8), (4.0, 4.0), (1.5, 1.5))}
    sure = agreeing(None, torch.zeros(1, 1, 64, 32), grids)
    assert seen == asked
    assert sure == ({"a"} if len(asked) == 2 or last == {("a", 0): SURE} else set())


def test_noise_is_looked_at_in_a_handy_shape_or_in_the_inputs_own(monkeypatch):
    """Fractional strides and networks of one size in their own; each axis by itself."""
    looked = []

    def lines(capture, x, shape, axis, grids, draws):
        looked.append((shape, axis, "".join(sorted(grids)), draws))
        if axis == 1 and shape != (300, 40, 20):
            raise (ModelError, LayerError, torch.OutOfMemoryError)[len(looked) % 3]("one size")
        return {layer: SURE for layer in grids if layer != "d"}

    monkeypatch.setattr(by_noise, "_lines", lines)
    grids = {"a": CUBE, "f": FRACTION, "d": CUBE}
    doubts = [("a", 0), ("a", 1), ("f", 1), ("f", 2), ("d", 0)]
    found = by_noise.by_noise(None, torch.zeros(1, 1, 300, 40, 20), grids, doubts, 3)
    own = (300, 40, 20)
    assert looked == [
        ((64 + 12, 40, 20), 0, "ad", 3),
        (own, 0, "d", 3),
        ((32 + 12, 64 + 8, 20), 1, "a", 3),
        (own, 1, "af", 3),
        (own, 2, "f", 3),
    ]
    assert found == dict.fromkeys([("a", 0), ("a", 1), ("f", 1), ("f", 2)], SURE)


@pytest.mark.parametrize(("stride", "length"), [(1, 96), (8, 96), (12, 128), (16, 160), (32, 160)])
def test_gradients_are_looked_at_in_inputs_as_long_as_needed(stride, length, monkeypatch):
    looked = []

    def lines(traced, x, shape, grids, seeds):
        looked.append((shape, sorted(map(str, grids)), len(seeds)))
        if shape != tuple(x.shape[2:]):
            raise RuntimeError("no gradient")
        return {(layer, axis): SURE for layer in grids for axis in range(3)}

    monkeypatch.setattr(by_gradients, "_lines", lines)
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1))
    coarse, fine = resolve_layers(net, ["0", "1"])
    grids = {
        coarse: FeatureGrid((200 // stride, 1, 1), (float(stride), 1.0, 1.0), (0.0,) * 3),
        fine: FeatureGrid((200, 1, 1), (1.0,) * 3, (0.0,) * 3),
    }
    x, own = torch.zeros(1, 1, 200, 33, 64), (200, 33, 64)
    with capturing(net, [coarse, fine]) as capture:
        found = by_gradients.by_gradients(capture, x, grids, [(coarse, 0), (fine, 2)], 4)
    handy = (length + 8, 33, 32)
    assert looked == [
        (handy, ["0"], 4 * times_drawn(handy)),
        (own, ["0"], 4),
        ((32 + 8, 33, 96), ["1"], 4),
        (own, ["1"], 4),
    ]
    assert set(found) == {(layer, axis) for layer in (coarse, fine) for axis in range(3)}


GRID = FeatureGrid((32,), (2.0,), (0.5,))
PLACE = 2 * torch.arange(32).double() + 0.5 - 31.5


def fitted(distances, place=PLACE, weight=None):
    """Fit distances of centres, (parts, size) or of one part alike for eight."""
    distances = torch.as_tensor(distances).double().expand(8, len(place))
    weight = torch.ones(8, len(place)).double() if weight is None else weight
    moment = weight * (place + distances)
    return line_of_many_voxels(torch.stack([moment] * 2), torch.stack([weight] * 2), place, 3)


@pytest.mark.parametrize("offset", [0.5, 6.5, -5.5])
def test_shift_and_pull_of_centres(offset):
    """What is pulled to the middle is the distance from it, wherever the layer has its own."""
    place = PLACE + offset - 0.5
    line = fitted(0.75 - 0.3 * place, place)
    assert line.shift == pytest.approx(0.75 / 0.7)  # .7 of a shift is left, too
    assert line.pull == pytest.approx(0.3)
    assert line.error == pytest.approx(0, abs=1e-9)
    assert line.rest == pytest.approx(0, abs=1e-9)
    assert line.draws == 3


def test_the_inner_half_and_a_voxel_more_is_looked_at():
    """Of places 2 * u - 31 those up to 64 / 4 + 2 / 2 from the middle: -17 ... 17."""
    net = Net(nn.Conv3d(1, 3, 1, stride=2))
    for offset, voxels in ((0, 17), (0.5, 18)):
        grid = FeatureGrid((32, 4, 4), (2.0,) * 3, (float(offset), 0.0, 0.0))
        assert lines_of(net, (64, 8, 8), 0, grid, 1).voxels == voxels


def test_what_is_left_of_the_line_is_the_root_mean_square():
    values = torch.tensor([1.0, -1.0, 0.0] * 3)
    off = torch.zeros(32)
    off[16:25], off[7:16] = values, values.flip(0)
    assert fitted(off).rest == pytest.approx(math.sqrt(12 / 32))


def test_the_error_is_that_of_the_mean_of_the_parts():
    """Parts of equal weight, each of another shift: the jackknife is their standard error."""
    shifts = torch.tensor([0.1, -0.2, 0.3, 0.25, -0.4, 0.0, 0.15, 0.2]).double()
    line = fitted(shifts[:, None].expand(-1, 32))
    assert line.shift == pytest.approx(float(shifts.mean()))
    assert line.error == pytest.approx(float(shifts.std()) / math.sqrt(8))


@pytest.mark.parametrize("parts", [FEW_PARTS - 1, FEW_PARTS])
def test_few_parts_tell_no_error(parts):
    weight = torch.ones(2, parts, 32).double()
    line = line_of_many_voxels(weight * PLACE, weight, PLACE, 1)
    assert math.isinf(line.error) == (parts < FEW_PARTS)


def test_kernels_that_pull_to_one_side_lean_and_mirrored_ones_pull_back():
    """The first part has twice the weight: what leans is told by weight, too."""
    weight = torch.tensor([2.0] + [1.0] * 6).double()[:, None].expand(2, 7, 32)
    by = torch.tensor([[1.0], [-1.0]]).double()[..., None] * (0.5 + 4.0 * (weight == 2))
    line = line_of_many_voxels(weight * (PLACE + 0.25 + by), weight, PLACE, 1)
    assert line.shift == pytest.approx(0.25)
    assert line.lean == pytest.approx(0.5 + 4 * 2 / 8)
    assert line.error == pytest.approx(0, abs=1e-9)


def test_parts_count_by_their_weight():
    """Half of the parts saw three times as much as the others, and 1 further on."""
    weight = torch.tensor([[1.0]] * 4 + [[3.0]] * 4).double().expand(8, 32)
    distances = torch.tensor([[0.0]] * 4 + [[1.0]] * 4).expand(8, 32)
    assert fitted(distances, weight=weight).shift == pytest.approx(0.75)


def test_one_voxel_has_a_shift_and_no_pull():
    line = fitted([[0.5]], torch.zeros(1).double())
    assert line[:1] + line[2:] == (pytest.approx(0.5), 0.0, 0.0, 1, 3, 0.0, LITTLE, 0.0)


@pytest.mark.parametrize("what", ["unseen", "unseen by one kind", "not finite", "outside"])
def test_what_is_not_seen_tells_nothing(what):
    weight, place = torch.ones(2, 8, 32).double(), PLACE
    moment = weight * PLACE
    if what == "unseen":
        weight[:, :, 16] = 0
    elif what == "unseen by one kind":
        weight[1, :, 16] = 0
    elif what == "not finite":
        moment[0, 3, 16] = math.nan
    else:
        weight, moment, place = weight[..., :0], moment[..., :0], place[:0]
    line = line_of_many_voxels(moment, weight, place, 5)
    assert line.voxels == 0
    assert math.isinf(line.error)
    assert line.draws == 5
    assert agreement._verdict(line, GRID, 0) is None


WITHIN = AGREE * (1 + 2)
FAR = WITHIN + 4 * 0.1
ASIDE = LEANING * (1 + 2)
GOOD = {
    **{"shift": 0.0, "error": 0.1, "pull": 0.1, "rest": 0.1, "voxels": 10, "draws": FEW_PARTS},
    **{"lean": 0.0, "bears": 0.5},
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"shift": 0.98 * WITHIN}, True),
        ({"shift": -0.98 * WITHIN}, True),
        ({"shift": 1.02 * WITHIN}, None),
        ({"shift": 0.98 * FAR}, None),
        ({"shift": 1.02 * FAR}, False),
        ({"shift": -1.02 * FAR}, False),
        ({"shift": 1.02 * FAR, "draws": FEW_PARTS - 1}, None),
        ({"shift": 1.02 * FAR, "voxels": 1}, None),
        ({"shift": 1.02 * FAR, "voxels": 2}, False),
        ({"shift": 1.02 * FAR, "pull": 0.49}, False),
        ({"shift": 1.02 * FAR, "pull": 0.51}, None),
        ({"lean": 0.98 * ASIDE}, True),
        ({"lean": -0.98 * ASIDE}, True),
        ({"lean": 1.02 * ASIDE}, None),
        ({"lean": 0.98 * (ASIDE + FAR - WITHIN)}, None),
        ({"lean": 1.02 * (ASIDE + FAR - WITHIN)}, False),
        ({"lean": -1.02 * (ASIDE + FAR - WITHIN)}, False),
        ({"lean": 9.0, "side": 1.01 * EITHER_SIDE}, True),
        ({"lean": 9.0, "side": 0.99 * EITHER_SIDE}, False),
        ({"lean": 9.0, "side": 0.5, "shift": 1.02 * FAR}, False),
        ({"error": 0.98 * WITHIN / 2}, True),
        ({"error": 1.02 * WITHIN / 2}, None),
        ({"error": math.inf}, None),
        ({"pull": 0.49}, True),
        ({"pull": 0.51}, None),
        ({"pull": 0.98 * PULLED, "bears": 1.0}, True),
        ({"pull": 1.02 * PULLED, "bears": 1.0}, None),
        ({"pull": -0.98 * PUSHED}, True),
        ({"pull": -1.02 * PUSHED}, None),
        ({"rest": 0.98 * STEPS}, True),
        ({"rest": 1.02 * STEPS}, None),
        ({"voxels": 2}, True),
        ({"voxels": 1}, None),
        ({"draws": 1}, True),
    ],
)
def test_when_two_measurements_agree(changed, expected):
    line = CentreLine(**GOOD | changed)
    assert agreement._verdict(line, GRID, 0) is expected


@pytest.mark.parametrize("pull", [0.0, 0.4, 0.9, 0.99])
def test_of_a_line_that_is_pulled_as_much_of_a_shift_is_left(pull):
    """What cannot be told from nothing is not magnified."""
    line = fitted(0.1 * (1 - pull) - pull * PLACE)
    assert line.shift == pytest.approx(0.1 * (1 - pull) / max(1 - pull, 1 - PULLED))
    assert line.pull == pytest.approx(pull)


def test_how_much_may_be_pulled_is_asked():
    line = CentreLine(**GOOD | {"pull": 0.3, "error": 0.01})
    assert agreement._verdict(line, GRID, 0) is True
    assert agreement._verdict(line, GRID, 0, 0.31) is True
    assert agreement._verdict(line, GRID, 0, 0.29) is None


def test_a_layers_voxel_is_the_measure_of_what_agrees():
    """Along its own axis; below a voxel of the input, that one."""
    grid = FeatureGrid((4, 64, 1), (8.0, 0.5, 64.0), (3.5, 0.0, 31.5))

    def verdict(axis, **changed):
        line = CentreLine(**GOOD | {"draws": 1, "pull": 0.0} | changed)
        return agreement._verdict(line, grid, axis)

    assert verdict(0, shift=AGREE * 9 * 0.99) is True
    assert verdict(0, shift=AGREE * 9 * 1.01) is None
    assert verdict(0, rest=7.9) is True
    assert verdict(0, rest=8.1) is None
    assert verdict(1, shift=AGREE * 1.98) is True
    assert verdict(1, shift=AGREE * 2.02) is None
    # One voxel has no line.
    assert verdict(2, voxels=1, rest=100.0) is True
    assert verdict(2, voxels=1, shift=AGREE * 65 * 1.01) is None


@pytest.mark.parametrize(("size", "expected"), [(31, True), (33, True), (30, False), (34, False)])
def test_a_grid_is_the_same_in_a_shorter_input(size, expected):
    """96 voxels of stride 2 in 192; 32 of them in 64, or one more or less by padding."""
    grid = FeatureGrid((96,), (2.0,), (0.5,))
    assert has_grid(grid, 0, size, 64, 192) is expected


def test_sums_in_parts_are_of_places():
    values = torch.rand(1, 3, 4, 5, 6).double()
    for axis in range(3):
        parts = by_noise._in_parts(values, axis)
        assert parts.shape == (by_noise.PARTS, values.shape[2 + axis])
        others = [0, 1, *(a for a in range(2, 5) if a != axis + 2)]
        torch.testing.assert_close(parts.sum(0), values.sum(others))
    first = values.sum((0, 1)).movedim(1, -1).flatten(0, 1)[:3].sum(0)
    torch.testing.assert_close(by_noise._in_parts(values, 1)[0], first)
    assert by_noise._in_parts(values[..., :1, :1], 0).shape == (1, 4)


def lines_of(net, shape, axis, grid, noise=4):
    layers = resolve_layers(net, "body")
    x = torch.zeros(1, 1, *shape)
    with capturing(net, layers) as capture:
        capture.observe(x, copy=False)
        return by_noise._lines(capture, x, shape, axis, {layers[0]: grid}, noise)[layers[0]]


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return F.interpolate(self.body(x), size=x.shape[2:])


def test_what_looks_at_one_voxel_has_its_centre_there():
    net = Net(nn.Conv3d(1, 3, 1, stride=2))
    line = lines_of(net, (16, 32, 8), 1, FeatureGrid((8, 16, 4), (2.0,) * 3, (0.0,) * 3), 1)
    assert line.shift == pytest.approx(0, abs=1e-3)
    assert line.pull == pytest.approx(0, abs=1e-3)
    assert line.error == pytest.approx(0, abs=1e-3)
    assert line.rest == pytest.approx(0, abs=1e-3)
    assert line.draws == 1
    off = lines_of(net, (16, 32, 8), 1, FeatureGrid((8, 16, 4), (2.0,) * 3, (0.5,) * 3), 1)
    assert off.shift == pytest.approx(-0.5, abs=1e-3)


def test_mirrored_kernels_pull_back_as_much():
    """A kernel of one tap at its end: both together have the middle of the kernel."""
    conv = nn.Conv3d(1, 1, 5, padding=2, bias=False)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 2, 2, 4] = 1
    line = lines_of(Net(conv), (4, 4, 64), 2, FeatureGrid((4, 4, 64), (1.0,) * 3, (0.0,) * 3))
    assert abs(line.shift) < 0.1
    assert line.rest < 0.5
    assert 0 < line.error < 0.1


def gradient_lines_of(net, shape, grid, seeds=range(4)):
    layers, x = resolve_layers(net, "body"), torch.zeros(1, 1, *shape)
    with capturing(net, [*layers, INPUT]) as traced:
        found = by_gradients._lines(traced, x, shape, {layers[0]: grid}, seeds)
        return {axis: line for (_, axis), line in found.items()}


def test_gradients_show_the_places_of_two_voxels_along_all_axes():
    net = Net(nn.Conv3d(1, 3, 1, stride=(4, 2, 8)))
    grid = FeatureGrid((8, 16, 2), (4.0, 2.0, 8.0), (0.0, 0.5, -1.0))
    found = gradient_lines_of(net, (32, 32, 16), grid)
    assert [round(found[axis].shift, 6) for axis in range(3)] == [0, -0.5, 1]
    for line in found.values():
        assert line.pull == pytest.approx(0, abs=1e-6)
        assert line.error == pytest.approx(0, abs=1e-6)
        assert line.lean == pytest.approx(0, abs=1e-6)
        assert (line.voxels, line.draws) == (2, 4)


def test_gradients_show_what_leans_and_what_is_pulled():
    """A kernel of one tap at its end; and half of what is seen (of J^2) is the whole image."""

    class Leaning(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 3, padding=1, bias=False)
            with torch.no_grad():
                self.conv.weight.zero_()[0, 0, 1, 1, 2] = 1

        def forward(self, x):
            return self.conv(x)

    class Global(nn.Module):
        def forward(self, x):
            return x + x.sum((2, 3, 4), keepdim=True) / math.sqrt(x[0].numel())

    grid = FeatureGrid((16, 16, 16), (1.0,) * 3, (0.0,) * 3)
    leaning = gradient_lines_of(Net(Leaning()), (16,) * 3, grid)
    assert [round(leaning[a].lean, 6) for a in range(3)] == [0, 0, 1]
    assert [round(leaning[a].shift, 6) for a in range(3)] == [0, 0, 0]
    for line in gradient_lines_of(Net(Global()), (16,) * 3, grid).values():
        assert line.pull == pytest.approx(0.5, abs=0.02)
        assert line.shift == pytest.approx(0, abs=1e-6)


class Taps(nn.Module):
    """A kernel whose squares along the last axis are given; some of the whole image besides."""

    def __init__(self, squares, whole=0.0):
        super().__init__()
        size = len(squares)
        self.conv = nn.Conv3d(1, 1, (1, 1, size), padding=(0, 0, size // 2), bias=False)
        self.whole = whole
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor(squares).sqrt())

    def forward(self, x):
        return self.conv(x) + self.whole * x.sum((2, 3, 4), keepdim=True) / math.sqrt(x[0].numel())


@pytest.mark.parametrize(
    ("squares", "offset", "side"),
    [
        ([0.2, 0.2, 0.6], 0.0, 0.2),  # what lies at the place itself is on no side
        ([0.6, 0.2, 0.2], 0.0, 0.2),
        ([1.0, 0.0, 0.0], 0.0, 0.0),
        ([0.5, 0.5, 0.0], 0.0, 0.0),
        # How far a place is off is the shift's to tell: of both kinds of kernels the mean is taken.
        ([0.2, 0.2, 0.6], 0.25, 0.2 * 0.75 / 2 + (0.2 + 0.25 * 0.2) / 2),
    ],
)
@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_how_much_is_seen_on_the_side_where_less_is(squares, offset, side, whole, monkeypatch):
    """Whatever is seen of the whole image."""
    kept = contextlib.nullcontext  # the kernels as they are
    monkeypatch.setattr(by_gradients, "RandomOperations", kept)
    grid = FeatureGrid((4, 4, 64), (1.0,) * 3, (0.0, 0.0, offset))
    line = gradient_lines_of(Net(Taps(squares, whole)), (4, 4, 64), grid)[2]
    assert line.side == pytest.approx(side, abs=0.03 if whole else 1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, -2.0])
def test_what_is_seen_of_one_side_of_the_image_shifts_no_voxel(offset):
    """Most of what a voxel sees is the first quarter of the image; the rest is at its place."""

    class Aside(nn.Module):
        def forward(self, x):
            quarter = x[..., : x.shape[-1] // 4]
            return x + 2 * quarter.sum((2, 3, 4), keepdim=True) / math.sqrt(quarter[0].numel())

    grid = FeatureGrid((4, 4, 64), (1.0,) * 3, (0.0, 0.0, offset))
    line = gradient_lines_of(Net(Aside()), (4, 4, 64), grid)[2]
    assert line.pull == pytest.approx(0.8, abs=0.02)
    assert line.shift == pytest.approx(-offset, abs=1e-6)
    assert line.lean == pytest.approx(0, abs=1e-6)


def test_voxels_behind_a_closed_gate_tell_nothing():
    class Gate(nn.Module):
        def forward(self, x):
            return x * (x.sum() > 0)

    class Closed(nn.Module):
        def forward(self, x):
            return x * 0

    grid = FeatureGrid((16, 16, 16), (1.0,) * 3, (0.0,) * 3)
    lines = gradient_lines_of(Net(Gate()), (16,) * 3, grid, range(32))
    assert all(abs(line.shift) < 1e-6 and line.voxels == 2 for line in lines.values())
    lines = gradient_lines_of(Net(Closed()), (16,) * 3, grid)
    assert all(line.voxels == 0 and math.isinf(line.error) for line in lines.values())


@pytest.mark.parametrize(
    ("stride", "offset", "size", "voxels"),
    [(16, 7.5, 4, [1, 2]), (16, 0, 4, [1, 3]), (32, 15.5, 2, [0, 1]), (1, 0, 64, [22, 41])],
)
def test_two_voxels_lie_as_far_on_either_side_of_the_middle(stride, offset, size, voxels):
    grid = FeatureGrid((size, 1), (float(stride), 64.0), (float(offset), 31.5))
    assert by_gradients._two_voxels(grid, (size, 1), (64, 64)) == [(u, 0) for u in voxels]


def test_of_one_voxel_there_is_one():
    grid = FeatureGrid((1, 1), (64.0, 64.0), (31.5, 31.5))
    assert by_gradients._two_voxels(grid, (1, 1), (64, 64)) == [(0, 0)]


# -------------------------------------------------------------------------- changed operations


@pytest.mark.parametrize("changed", [PlainOperations(1.0), MirroredOperations(False)])
@pytest.mark.parametrize("ndim", [2, 3])
def test_sub_pixel_upsampling_becomes_small_and_windows_of_tokens_do_not(changed, ndim):
    x = torch.ones(1, 2**ndim, *[4] * ndim)
    apart = x.view(1, 1, *[2] * ndim, *[4] * ndim)
    order = [2 + a + ndim * (1 - b) for a in range(ndim) for b in range(2)]
    windows = torch.ones(1, *[2, 4] * ndim, 6)
    with changed:
        shuffled = apart.permute(0, 1, *order).reshape(1, 1, *[8] * ndim)
        torch.testing.assert_close(shuffled, torch.full_like(shuffled, FADED))
        if ndim == 2:
            found = F.pixel_shuffle(x, 2)
            torch.testing.assert_close(found, torch.full_like(found, FADED))
        together = windows.view(1, *[8] * ndim, 6)
        assert together.unique().tolist() == [1]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_mirrored_kernels_see_the_mirrored_image(ndim, transposed, core):
    """At stride 1 and with kernels of odd size, the result is the mirrored one of the mirrored."""
    x, weight, bias = torch.rand(1, 3, *[7] * ndim), torch.rand(3, 3, *[3] * ndim), torch.rand(3)
    name = f"conv_transpose{ndim}d" if transposed else f"conv{ndim}d"
    ones = [1] * ndim

    def run(x):
        if core:
            call = torch.ops.aten.convolution.default
            return call(x, weight, bias, ones, ones, ones, transposed, [0] * ndim, 1)
        return getattr(F, name)(x, weight, bias, padding=1)

    plain, axes = run(x), list(range(2, 2 + ndim))
    with MirroredOperations(True):
        mirrored = run(x.flip(axes)).flip(axes)
    torch.testing.assert_close(mirrored, plain * (FADED if transposed else 1))
    with MirroredOperations(False):
        torch.testing.assert_close(run(x), plain * (FADED if transposed else 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_random_signs_leave_kernels_as_strong(transposed, dtype):
    """Each weight, also where a mask makes it nothing; the same again under the same seed."""
    x = torch.zeros(1, 8, 9, dtype=dtype)
    x[0, 3, 4] = 1  # what is given shows the kernels
    weight = torch.randn(8, 8, 3).to(dtype) * torch.tensor([2.0, 0.0, 1.0])
    convolve = F.conv_transpose1d if transposed else F.conv1d

    def given(seed):
        with RandomOperations(seed):
            return convolve(x, weight, padding=1), convolve(x, weight=weight, padding=1)

    own, (one, again) = convolve(x, weight, padding=1), given(1)
    torch.testing.assert_close(one.abs(), own.abs())
    assert not torch.equal(one, own)
    assert torch.equal(one, again)  # as a checkpoint computes it again
    assert torch.equal(given(1)[0], one)
    assert not torch.equal(given(2)[0], one)


def test_what_the_image_does_to_kernels_is_no_place():
    x = torch.rand(1, 1, 9, requires_grad=True)
    with RandomOperations(0):
        out = F.conv1d(x, x[:, :, :3] * torch.tensor([1.0, 0.0, 1.0]))
    (found,) = torch.autograd.grad(out[0, 0, 4], x)
    assert found.isfinite().all()
    assert (found[0, 0, :4] == 0).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_checkpoints_compute_again_in_the_same_modes(mirrored):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 3, padding=1))
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        x = torch.rand(1, 2, 5, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with MirroredOperations(mirrored), RandomOperations(3):
            (gradient,) = torch.autograd.grad(
                run(x).square().sum(),
                [x],
                None,
                retain_graph=True,
                create_graph=False,
                allow_unused=True,
            )
        found.append(gradient)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU()),
        *(nn.CELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Hardswish(), nn.ReLU6()),
        *(nn.RReLU(), nn.Threshold(0.1, 0.0), F.relu, torch.ops.aten.relu.default),
    ],
    ids=lambda activation: getattr(activation, "__name__", str(activation)),
)
def test_activation_functions_are_straight_among_random_kernels(activation):
    x = torch.linspace(-9, 9, 7)
    with RandomOperations(0):
        assert torch.equal(activation(x.clone()), x)
    with RandomOperations(0):  # gates stay gates
        assert torch.equal(torch.sigmoid(x), nn.Sigmoid()(x))
    assert not torch.equal(activation(x.clone()), x)


@pytest.mark.parametrize(("size", "middle"), [(1, 0), (2, 0.5), (3, 1), (4, 1.5), (5, 2)])
def test_plain_convolutions_average_and_look_straight_ahead(size, middle):
    """All channels of the group alike; an even kernel looks at the two taps in its middle."""
    x = torch.rand(2, 4, 9, 10, 11)
    line = torch.arange(11.0).expand_as(x)
    conv = nn.Conv3d(4, 6, size, groups=2)
    with PlainOperations(1.0), torch.no_grad():
        found, place = conv(x), conv(line)
    torch.testing.assert_close(place, (torch.arange(12.0 - size) + middle).expand_as(place))
    groups = torch.stack([x[:, :2].mean(1)] * 3 + [x[:, 2:].mean(1)] * 3, 1)
    cut = (size - 1) // 2
    inner = groups[:, :, cut : 9 - cut, cut : 10 - cut, cut : 11 - cut]
    torch.testing.assert_close(found, inner if size % 2 else F.avg_pool3d(inner, 2, 1))


def test_plain_linear_layers_average():
    x = torch.rand(5, 4)
    with PlainOperations(1.0), torch.no_grad():
        found = nn.Linear(4, 3)(x)
    torch.testing.assert_close(found, x.mean(1, keepdim=True).expand(5, 3))


@pytest.mark.parametrize("level", [2.0, 0.0, -3.0])
def test_what_is_upsampled_becomes_small_in_proportion_to_what_is_shown(level):
    """By the first item, which is constant; one that shows nothing stays as it is."""
    x = torch.full((2, 4, 5, 5), level)
    x[1] *= torch.rand(4, 5, 5)
    wide = F.interpolate(x, scale_factor=2)
    with PlainOperations(10.0), torch.no_grad():
        found = F.interpolate(x, scale_factor=2)
        transposed = nn.ConvTranspose2d(4, 3, 2, 2)(x)
    torch.testing.assert_close(found, wide * (FADED * 10.0 / level) if level else wide)
    torch.testing.assert_close(transposed, found.mean(1, keepdim=True).expand(2, 3, 10, 10))


@pytest.mark.parametrize("named", [False, True])
def test_plain_networks_do_not_normalise_nor_attend(named):
    x = torch.rand(2, 4, 6)
    given = ((), {"input": x}) if named else ((x,), {})
    with PlainOperations(1.0):
        norms = [
            F.layer_norm(*given[0], **given[1], normalized_shape=(6,)),
            F.group_norm(*given[0], **given[1], num_groups=2),
            F.instance_norm(*given[0], **given[1]),
        ]
        core = torch.ops.aten.native_layer_norm.default(x, [6], None, None, 1e-5)
        attended = F.scaled_dot_product_attention(x, x, x)
        other = F.relu(*given[0], **given[1])
    assert all(torch.equal(values, x) for values in [*norms, core[0], other])
    assert len(core) == 3
    assert torch.equal(attended, torch.zeros_like(x))


# ---------------------------------------------------------------------------- inputs in batches


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn(len(x), *x.shape[1:]).flip(0)


class OneAlone(nn.Module):
    def forward(self, x):
        assert len(x) == 1
        return x


class AddsTheFirst(nn.Module):
    def forward(self, x):
        return x + 3 * x[:1].roll(2, -1)


BATCHES = {
    "plain": (nn.Conv2d(2, 3, 3, padding=1), True),
    "one input at a time": (nn.Sequential(OneAlone(), nn.Conv2d(2, 3, 1)), False),
    "normalised over the batch": (nn.BatchNorm2d(2, track_running_stats=False), False),
    "looks at the first item": (AddsTheFirst(), False),
    "draws": (nn.Sequential(Noisy(), nn.Conv2d(2, 3, 1)), False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_network_that_takes_batches_is_told_from_others(name):
    layer, takes = BATCHES[name]
    x = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(layer, nn.Identity())
    layers = resolve_layers(net, "1")
    with capturing(net, layers) as capture:
        passes = by_noise._Passes(capture, batches=True)
        found = [slope[layers[0]] for slope in passes.slopes(x)]
        assert passes._batches == takes
        alone = by_noise._Passes(capture, batches=False)
        expected = [slope[layers[0]] for slope in alone.slopes(x)]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "largest"), [((16, 16, 16), 12), ((64, 32, 32), 4), ((64, 64, 64), 1)]
)
def test_batches_are_as_large_as_a_usual_window(shape, largest):
    """Three draws of four inputs; a volume of more than 2 * ENOUGH voxels goes by itself."""
    net, sizes = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Identity()), []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    layers = resolve_layers(net, "1")
    like, grid = torch.zeros(1, 1, *shape), {layers[0]: FeatureGrid.of_voxels(shape)}
    with capturing(net, layers) as capture:
        by_noise._lines(capture, like, shape, 0, grid, 3)
    assert max(sizes) == largest


def test_a_single_voxel_fits_both_sizes_of_the_input():
    one = torch.zeros(1).double()
    sizes = measurement._Sizes(1, 64, 1, 64), measurement._Sizes(1, 64, 1, 128)
    assert [measurement._stride(one, one, size) for size in sizes] == [64, None]


def test_the_stride_that_fills_the_input_comes_first():
    """Of rough places that a line of stride 7 fits a little better than one of 8."""
    rough = torch.tensor([1.0, -1, -1, 1, 1, -1, -1, 1]).double()
    index = torch.arange(8).double()
    assert stride(index, 7.4 * index + 4 * rough, 8, 64) == 8


def test_a_batch_that_is_too_large_goes_through_one_by_one():
    """The first batch may be smaller than a later one."""

    class AtMost(nn.Module):
        def forward(self, x):
            assert len(x) <= 4
            return x

    net = nn.Sequential(AtMost(), nn.Conv2d(2, 3, 1))
    layers = resolve_layers(net, "1")
    with capturing(net, layers) as capture:
        passes = by_noise._Passes(capture, batches=True)
        for count, batches in ((4, True), (8, False), (4, False)):
            x = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))
            assert len(list(passes.slopes(x))) == count // 2
            assert passes._batches == batches


def test_batches_give_what_inputs_alone_give(monkeypatch):
    net = nn.Sequential(nn.Conv3d(1, 3, 3, 2, 1), nn.InstanceNorm3d(3), nn.Conv3d(3, 2, 3, 1, 1))
    for number, parameter in enumerate(net.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    layers = resolve_layers(net, "2")
    x, grid = torch.zeros(1, 1, 16, 12, 8), FeatureGrid((8, 6, 4), (2.0,) * 3, (0.0,) * 3)
    lines = []
    for enough in (by_noise.ENOUGH, 0):  # 0: no input is small enough for a batch
        monkeypatch.setattr(by_noise, "ENOUGH", enough)
        with capturing(net, layers) as capture:
            doubts = {(layers[0], axis) for axis in range(3)}
            lines.append(by_noise.by_noise(capture, x, {layers[0]: grid}, doubts, 2))
    assert lines[0].keys() == doubts
    for key, line in lines[0].items():
        assert line == pytest.approx(lines[1][key], rel=1e-3, abs=1e-4)
