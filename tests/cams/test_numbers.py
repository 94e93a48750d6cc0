"""The map is the right map: every number agrees with a slow float64 reference or a known answer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import toy
from helpers_engine import each_case, slow_unless
from reference import maps, recipe, scores
from torch import nn
from toy import deviation

from seg3dcam import METHODS, BaseCAM, GradCAM, HiResCAM, SliceGradCAM, XResCAM, targets
from seg3dcam.errors import Seg3dcamWarning

EXACT = 1e-9  # float64
CLOSE = 1e-5  # float32, relative to the largest value of the map

#: name -> (class, its settings, reference)
FAMILY = {
    "GradCAM": (GradCAM, {}, maps.grad_cam),
    "SliceGradCAM": (SliceGradCAM, {}, maps.slice_grad_cam),
    "HiResCAM": (HiResCAM, {}, maps.hires_cam),
    "XResCAM mean of 2": (XResCAM, {"window": 2}, partial(maps.xres_cam, size=2, mode="mean")),
    "XResCAM max of 3": (
        XResCAM,
        {"window": 3, "mode": "max"},
        partial(maps.xres_cam, size=3, mode="max"),
    ),
}
METHOD_NAMES = list(FAMILY)

Score = Callable[[torch.Tensor], torch.Tensor]

# A random network may well find nothing that speaks for a class; its numbers count all the same.
signed_maps = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


def log_odds(c: int, logits: torch.Tensor) -> torch.Tensor:
    """Sum the reference's log-odds of class c over the voxels where c is predicted."""
    return scores.score(logits, scores.log_odds, c, scores.predicted(logits, c))


def reference_of(case: toy.Case, score: Score | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and dS/dA of a case; S is the log-odds of class 1 unless told."""
    score = score or partial(log_odds, 1)
    return scores.activations_and_gradients(case.front, case.back, case.x, score)


# ------------------------------------------------------------------- against the slow reference


@pytest.mark.few(7)
@signed_maps
@pytest.mark.parametrize("method", METHOD_NAMES)
@each_case
def test_native_map_is_the_formula(name, method):
    case = toy.shared(toy.CASES[name])
    cam, settings, formula = FAMILY[method]
    expected = formula(*reference_of(case))

    native = cam(case.network, case.layer, **settings)(case.x, target=1).native[case.layer]
    assert native.dtype == torch.float64
    assert deviation(native, expected) < EXACT

    single = toy.shared(toy.converted, case.network, torch.float32)
    native = cam(single, case.layer, **settings)(case.x.float(), target=1).native[case.layer]
    assert native.dtype == torch.float32
    assert deviation(native, expected) < CLOSE


WINDOWS = [(1, 2, 3), (2, 4, 7), (3, 3, 3), (1, 1, 4), (None, 1, 2), (2, None, None), (9, 9, 9)]


@signed_maps
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ragged_blocks_pool_the_voxels_that_they_have(window, mode):
    case = toy.shared(toy.plain_case, 3)  # 5 x 4 x 7 voxels
    expected = maps.xres_cam(*reference_of(case), window, mode)
    result = XResCAM(case.network, case.layer, window=window, mode=mode)(case.x, target=1)
    assert deviation(result.native[case.layer], expected) < EXACT


@pytest.mark.parametrize("ndim", [1, 2, 3, 4])
def test_table_of_methods_is_the_formulas_in_any_number_of_axes(ndim):
    shape = (2, 3, *(4, 3, 5, 2)[:ndim])
    pair = toy.random_input(*shape, seed=1), toy.random_input(*shape, seed=2)
    for key, formula in {
        "grad_cam": maps.grad_cam,
        "slice_grad_cam": maps.slice_grad_cam,
        "hires_cam": maps.hires_cam,
        "xres_cam": partial(maps.xres_cam, size=2, mode="mean"),
    }.items():
        assert deviation(METHODS[key](*pair), formula(*pair)) < EXACT


# ------------------------------------------------------------------------------------ identities


def native(case: toy.Case, cam: type[BaseCAM], **settings) -> torch.Tensor:
    return cam(case.network, case.layer, **settings)(case.x, target=1).native[case.layer]


@signed_maps
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_blocks_of_one_voxel_are_hires(mode):
    case = toy.shared(toy.plain_case, 3)
    assert deviation(native(case, XResCAM, window=1, mode=mode), native(case, HiResCAM)) < EXACT


@signed_maps
def test_one_block_is_grad_cam_and_one_block_a_slice_is_the_recipe():
    case = toy.shared(toy.plain_case, 3)
    assert deviation(native(case, XResCAM, window=None), native(case, GradCAM)) < EXACT
    per_slice = native(case, XResCAM, window=(1, None, None))
    assert deviation(per_slice, native(case, SliceGradCAM)) < EXACT


def test_grad_cam_weight_is_the_mean_of_the_slices_weights():
    gradients = toy.random_input(2, 3, 4, 5, 6)
    slices = METHODS["slice_grad_cam"].weights_of_all(gradients, gradients).values
    assert slices.shape == (2, 3, 4, 1, 1)
    whole = METHODS["grad_cam"].weights_of_all(gradients, gradients).values
    assert deviation(slices.mean(2, keepdim=True), whole) < EXACT


@signed_maps
@pytest.mark.parametrize("ndim", [1, 2])
def test_without_slices_the_recipe_is_grad_cam(ndim):
    case = toy.shared(toy.plain_case, ndim)
    assert deviation(native(case, SliceGradCAM), native(case, GradCAM)) < EXACT


@signed_maps
def test_hires_map_of_a_linear_head_sums_to_the_score_without_its_bias():
    case = toy.shared(toy.linear_head_case)
    target = targets.ClassLogit(1)
    result = HiResCAM(case.network, "3")(case.x, target)
    bias = case.network[-1].bias[1].detach() * result.region_voxels
    assert (result.region_voxels > 1).all()
    assert deviation(result.native["3"].flatten(1).sum(1), result.score - bias) < EXACT


def shifted(network: nn.Sequential) -> nn.Sequential:
    """Return a copy of a network that adds one function to every logit."""
    twin = copy.deepcopy(network)
    twin[-1].weight.data += toy.random_input(1, 4, 1, 1, 1, seed=3)
    twin[-1].bias.data += 0.7
    return twin


@signed_maps
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_one_function_added_to_every_logit_does_not_move_the_log_odds_map(method):
    """It changes no prediction, so it may not change the explanation (a raw logit's does)."""
    case = toy.shared(toy.linear_head_case)
    cam, settings, _ = FAMILY[method]
    found = [
        cam(net, "3", **settings)(case.x, 1).native["3"]
        for net in (case.network, toy.shared(shifted, case.network))
    ]
    assert deviation(*found) < EXACT


# ---------------------------------------------------------------------------- known explanations

SHAPE = (9, 8, 10)
ORGAN = (slice(1, 3), slice(1, 4), slice(2, 4))


def organ_and_marker(shift: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input (1, 2, *SHAPE) and the marker's voxels, `shift` away from the organ's."""
    x = torch.zeros(1, 2, *SHAPE, dtype=torch.float64)
    marker = tuple(slice(o.start + s, o.stop + s) for o, s in zip(ORGAN, shift, strict=True))
    x[0, 0][ORGAN] = 3  # brighter than the marker
    x[0, 1][marker] = 1
    return x, x[0, 1] > 0


SHIFTS = {"far away in the slice": (0, 4, 5), "another slice": (4, 0, 0), "both": (5, 3, -2)}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_map_lies_on_the_remote_cue_and_not_on_the_mask(shift):
    x, marker = organ_and_marker(shift)
    network = toy.remote_cue(shift, gain=4)
    voxels, in_slice = int(marker.sum()), int(marker.any(0).sum())
    # The gradient is 4 at the marker's voxels and 0 elsewhere; only how it is averaged differs.
    gradient = {
        HiResCAM: 4,
        GradCAM: 4 * voxels / math.prod(SHAPE),
        SliceGradCAM: 4 * in_slice / math.prod(SHAPE[1:]),
    }
    for cam, value in gradient.items():
        expected = value * marker.double()
        result = cam(network, "0")(x, targets.ClassLogit(1))
        assert result.prediction[0][ORGAN].all()
        assert int(result.prediction.sum()) == voxels
        assert deviation(result.maps["0"][0], expected) < EXACT
        assert torch.equal(result.volume()[0] == 1, marker)  # the peak is the marker, all of it
        assert (result.volume()[0][ORGAN] == 0).all()


def test_seed_in_one_slice_of_the_recipe_explains_the_cue_of_that_slice():
    """Two organs, two markers; only the organ of slices 1 and 2 is asked about."""
    shift = (4, 0, 0)
    x, marker = organ_and_marker(shift)
    x[0, 1, 8] = 1  # another marker, which draws a mask in slice 4
    asked = targets.ClassLogit(1, targets.Box((0, 0, 0), (3, *SHAPE[1:])))
    volume = SliceGradCAM(toy.remote_cue(shift), "0")(x, asked).volume()[0]
    assert torch.equal(volume > 0, marker & (torch.arange(9) < 8)[:, None, None])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_that_cancel(ndim):
    shape = (5,) * ndim
    x = toy.random_input(1, 1, *shape).abs() + 1
    middle = (2,) * ndim
    target = targets.ClassLogit(1, targets.Voxel(middle))
    network = toy.cancelling(ndim)

    for cam in (GradCAM, SliceGradCAM):
        with pytest.warns(Seg3dcamWarning, match="layer '0' explains nothing of 'logit of class 1"):
            result = cam(network, "0")(x, target)
        assert result.status == {"0": "zero"}
        assert not result.maps["0"].any()
        assert not result.volume().any()

    left, right = (*middle[:-1], 1), (*middle[:-1], 3)
    expected = torch.zeros(shape, dtype=torch.float64)
    expected[left], expected[right] = -x[0, 0][left], x[0, 0][right]
    result = HiResCAM(network, "0")(x, target)
    assert result.status == {"0": "ok"}
    assert deviation(result.native["0"][0], expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_noise_of_gradients_that_cancel_is_called_zero(dtype):
    """Ahead of InstanceNorm a constant makes no difference, so every gradient sums to zero."""
    network = toy.normed(inplace=True, seed=3).to(dtype)
    x = toy.random_input(1, 1, *toy.SHAPES[3]).to(dtype)
    with pytest.warns(Seg3dcamWarning, match='status "zero"'):
        result = GradCAM(network, "0")(x, target=1)
    layer = result.layers["0"]
    assert layer.values.abs().max() < 1e-5 * layer.ceiling
    assert not result.volume().any()
    assert HiResCAM(network, "0")(x, target=1).status == {"0": "ok"}


# -------------------------------------------------------------------------- what a network may do


@signed_maps
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("layer", ["1", "2", slow_unless(False, "4"), slow_unless(False, "5")])
def test_in_place_activations_change_nothing(layer, method):
    cam, settings, _ = FAMILY[method]
    x = toy.random_input(1, 1, *toy.SHAPES[3])
    found = [
        cam(toy.shared(toy.normed, inplace=inplace, seed=3), layer, **settings)(x, 1).native[layer]
        for inplace in (True, False)
    ]
    assert torch.equal(*found)


def nested(pack: Callable) -> nn.Module:
    return toy.seeded(toy.Nested(pack), seed=4)


@pytest.mark.few(4)
@signed_maps
@pytest.mark.parametrize("element", [0, 1])
@pytest.mark.parametrize("kind", list(toy.PACKED))
def test_element_of_a_layer_that_gives_several_tensors(kind, element):
    pack, names = toy.PACKED[kind]
    network = toy.shared(nested, pack)
    x = toy.random_input(2, 1, 6, 5)
    outputs = [tensor.detach() for tensor in toy.unpacked(network.backbone(x))]

    def back(a: torch.Tensor) -> torch.Tensor:
        return network.combine(*(a if i == element else o for i, o in enumerate(outputs)))

    score = partial(log_odds, 1)
    pair = scores.activations_and_gradients(lambda x: outputs[element], back, x, score)
    layer = "backbone" + names[element]
    for cam, formula in ((GradCAM, maps.grad_cam), (HiResCAM, maps.hires_cam)):
        result = cam(network, layer)(x, target=1)
        assert deviation(result.native[layer], formula(*pair)) < EXACT


COARSE = nn.AvgPool2d(2)
#: name -> (what the network returns instead of its logits, the `output` that finds them)
OUTPUTS = {
    "tuple with None": (lambda z: (z, None), None),
    "tuple with a loss": (lambda z: (z, z.sum()), None),
    "finest of a list": (lambda z: [z, COARSE(z)], None),
    "coarse first": (lambda z: [COARSE(z), z], None),
    "position": (lambda z: (2 * z, z), 1),
    "dict with one map": (lambda z: {"loss": z.sum(), "out": z}, None),
    "key": (lambda z: {"aux": 2 * z, "out": z}, "out"),
    "function": (lambda z: [{"aux": 2 * z}, {"out": z}], lambda output: output[1]["out"]),
}


@signed_maps
@pytest.mark.parametrize(("pack", "output"), OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found_among_the_networks_outputs(pack, output):
    network = toy.shared(toy.plain, 2, seed=3)
    x = toy.random_input(2, 1, 6, 8)
    expected = HiResCAM(network, "1")(x, target=1)
    wrapped = toy.Wrapped(network, pack)
    result = HiResCAM(wrapped, "network.1", output=output)(x, target=1)
    assert deviation(result.native["network.1"], expected.native["1"]) < EXACT
    assert deviation(result.score, expected.score) < EXACT


@signed_maps
@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("layer", ["encoder", "bottleneck"])
def test_a_batch_gives_what_its_items_give_alone(layer, method):
    case = toy.shared(toy.skip_case, layer)
    cam, settings, _ = FAMILY[method]
    cam = cam(case.network, layer, **settings)
    together = cam(case.x, target=1)
    alone = [cam(item[None], target=1) for item in case.x]
    assert not torch.allclose(together.native[layer][0], together.native[layer][1])
    for found, expected in (
        (together.native[layer], torch.cat([r.native[layer] for r in alone])),
        (together.maps[layer], torch.cat([r.maps[layer] for r in alone])),
        (together.score, torch.cat([r.score for r in alone])),
    ):
        assert deviation(found, expected) < EXACT


@pytest.mark.few(2)
@signed_maps
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_layers_in_one_pass_give_what_each_gives_alone(method):
    """Also where one is upstream of another, given in either order."""
    case = toy.shared(toy.skip_case, "encoder")
    names = ["head", "encoder.0", "bottleneck.0", "encoder", "bottleneck", "up"]
    cam, settings, _ = FAMILY[method]
    together = cam(case.network, names, **settings)(case.x, target=1)
    assert set(together.native) == set(names)
    for name in names:
        alone = cam(case.network, name, **settings)(case.x, target=1)
        assert deviation(together.native[name], alone.native[name]) < EXACT


@signed_maps
def test_several_targets_give_what_each_gives_alone():
    case = toy.shared(toy.skip_case, "bottleneck")
    asked = [0, targets.ClassLogit(1), None, targets.ClassProbability(2, "volume")]
    cam = HiResCAM(case.network, ["encoder", "bottleneck"])
    for target, together in zip(asked, cam.each(case.x, asked), strict=True):
        alone = cam(case.x, target)
        assert deviation(together.score, alone.score) < EXACT
        for layer in ("encoder", "bottleneck"):
            assert deviation(together.native[layer], alone.native[layer]) < EXACT


# -------------------------------------------------------------------------- turned and mirrored


def turned_result(network, change, x, cam, layer, **settings):
    twin = toy.shared(toy.turned, network, change)
    return cam(twin, layer, **settings)(change(x), target=1)


AXES = [axes for n in (1, 2, 3) for axes in itertools.combinations((2, 3, 4), n)]


@signed_maps
@pytest.mark.parametrize("cam", [GradCAM, SliceGradCAM, HiResCAM])
@pytest.mark.parametrize("axes", [slow_unless(len(axes) != 2, axes) for axes in AXES], ids=str)
def test_mirrored_scan_gives_the_mirrored_map(axes, cam):
    case, flip = toy.shared(toy.skip_case, "bottleneck"), toy.mirroring(axes)
    layers = ["encoder", "bottleneck"]
    straight = cam(case.network, layers)(case.x, target=1)
    mirrored = turned_result(case.network, flip, case.x, cam, layers)
    spatial = [axis - 1 for axis in axes]  # maps have no channel axis
    for layer in layers:
        assert deviation(mirrored.native[layer], straight.native[layer].flip(spatial)) < EXACT
        assert deviation(mirrored.maps[layer], straight.maps[layer].flip(spatial)) < EXACT


@pytest.mark.few(2)
@signed_maps
@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:], ids=str)
def test_permuted_axes_give_the_permuted_map(order):
    case, permute = toy.shared(toy.skip_case, "bottleneck"), toy.permuting(order)
    layers = ["encoder", "bottleneck"]
    window = (1, 2, None)
    turned_window = tuple(window[axis] for axis in order)
    for cam, settings, turned_settings in (
        (GradCAM, {}, {}),
        (HiResCAM, {}, {}),
        (XResCAM, {"window": window}, {"window": turned_window}),
    ):
        straight = cam(case.network, layers, **settings)(case.x, target=1)
        turned = turned_result(case.network, permute, case.x, cam, layers, **turned_settings)
        for layer in layers:
            expected = straight.native[layer].permute(0, *(1 + axis for axis in order))
            assert deviation(turned.native[layer], expected) < EXACT
            expected = straight.maps[layer].permute(0, *(1 + axis for axis in order))
            assert deviation(turned.maps[layer], expected) < EXACT


# ----------------------------------------------------------------------------- the original recipe


@pytest.fixture(scope="module")
def recipe_layers():
    """Return a network, an input with more than 10 slices, and (A, G) of layers "1" and "3"."""
    network = toy.plain(3, seed=1)
    x = toy.random_input(2, 1, 12, 5, 4, seed=3)
    cuts = [toy.cut(network, at, x) for at in (1, 3)]
    return network, x, [recipe.backpropagated(cut.front, cut.back, x) for cut in cuts]


def test_original_recipe_of_the_whole_volume(recipe_layers):
    network, x, layers = recipe_layers
    cams = [recipe.weighted(*layer) for layer in layers]
    result = BaseCAM(network, ["1", "3"])(x)
    found = result.volume(scale="minmax", per_layer=True)

    exact = recipe.fused([recipe.scaled(cam, epsilon=0) for cam in cams], epsilon=0)
    assert deviation(found, exact) < EXACT
    # The recipe adds 1e-7 to every denominator; we do not, so that is the difference.
    published = recipe.fused([recipe.scaled(cam) for cam in cams])
    assert deviation(found, published) < 5e-7 / min(cam.max() - cam.min() for cam in cams)


def test_base_cam_is_the_recipe_by_default(recipe_layers):
    network, x, _ = recipe_layers
    default = BaseCAM(network, ["1", "3"])(x)
    spelled = SliceGradCAM(network, ["1", "3"])(x, targets.MaskOutput())
    assert default.target == spelled.target
    assert deviation(default.score, network(x).sum((1, 2, 3, 4)).detach()) < EXACT
    for layer in ("1", "3"):
        assert torch.equal(default.native[layer], spelled.native[layer])


def test_original_recipe_of_slice_10(recipe_layers):
    """The recipe cuts slice 10 out before it scales; ours is the same slice of the volume."""
    network, x, layers = recipe_layers
    cams = [recipe.weighted(*layer) for layer in layers]
    result = BaseCAM(network, ["1", "3"])(x)

    volume = recipe.fused([recipe.scaled(cam, epsilon=0) for cam in cams], epsilon=0)
    found = result.slice(10, scale="minmax", per_layer=True)
    assert deviation(found, volume[:, 10]) < EXACT

    for layer, cam in zip(("1", "3"), cams, strict=True):
        alone = recipe.scaled(cam[:, 10], epsilon=0)
        found = result.slice(10, layer=layer, scale="minmax", per_layer=True)
        assert deviation(torch.as_tensor(recipe.scaled(found.numpy(), 0)), alone) < EXACT

    mean = sum(cams) / 2  # the default: cut, averaged, divided by the volume's maximum
    expected = mean / mean.max((1, 2, 3), keepdims=True)
    assert deviation(result.slice(10), expected[:, 10]) < EXACT


def test_original_recipe_scales_a_coarse_layer_before_resizing_it():
    """Resizing lowers a coarse layer's maximum, so its share in the mean depends on the order."""
    layers = [
        nn.Conv3d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(4, 4, 1),
        nn.AvgPool3d(2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2.0),
        nn.Conv3d(4, 2, 3, padding=1),
    ]
    network = toy.seeded(nn.Sequential(*layers), seed=1)
    x = toy.random_input(1, 1, 8, 6, 8, seed=3)
    fine, coarse = toy.cut(network, 1, x), toy.cut(network, 3, x)
    cams = [recipe.weighted(*recipe.backpropagated(c.front, c.back, x)) for c in (fine, coarse)]
    expected = recipe.fused(
        [recipe.scaled(cams[0], 0), recipe.resized(recipe.scaled(cams[1], 0), 2)], 0
    )
    result = BaseCAM(network, ["1", "3"])(x)
    assert result.layers["3"].grid.offset == (0.5, 0.5, 0.5)
    assert deviation(result.volume(scale="minmax", per_layer=True), expected) < EXACT


# --------------------------------------------------------------------------------- targets, regions

PLANE = (6, 5)
REGION_MASK = toy.random_input(2, *PLANE, seed=11) > 0.3

#: name -> (what the target is given, the voxels that it means; None: the predicted ones)
REGIONS = {
    "predicted": ("predicted", None),
    "volume": ("volume", np.ones((2, *PLANE), dtype=bool)),
    "mask (*S)": (REGION_MASK[0], np.stack([REGION_MASK[0]] * 2)),
    "mask (B, *S)": (REGION_MASK.float(), REGION_MASK.numpy()),
    "mask (B, 1, *S)": (REGION_MASK[:, None].numpy(), REGION_MASK.numpy()),
    "box": (
        targets.Box((1, 2), (4, 4)),
        np.array([[[1 <= i < 4 and 2 <= j < 4 for j in range(5)] for i in range(6)]] * 2),
    ),
    "voxel": (
        targets.Voxel((5, 0)),
        np.array([[[(i, j) == (5, 0) for j in range(5)] for i in range(6)]] * 2),
    ),
}

#: name -> (activation, channels, asked class, how each target's value is written out by hand)
HEADS = {
    "softmax": ("softmax", 3, 3, 1, {
        "ClassLogOdds": scores.log_odds,
        "ClassLogit": scores.logit,
        "ClassProbability": scores.softmax,
    }),
    "one channel": ("softmax", 1, 2, 0, {
        "ClassLogOdds": scores.logit,
        "ClassLogit": scores.logit,
        "ClassProbability": scores.sigmoid,
    }),
    "multi-label sigmoid": ("sigmoid", 3, 3, 2, {
        "ClassLogOdds": scores.logit,
        "ClassLogit": scores.logit,
        "ClassProbability": scores.sigmoid,
    }),
}  # fmt: skip


@pytest.mark.few(30)
@signed_maps
@pytest.mark.parametrize("title", ["ClassLogOdds", "ClassLogit", "ClassProbability", "MaskOutput"])
@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("region", list(REGIONS))
def test_score_and_map_of_every_target_over_every_region(region, head, title):
    activation, channels, seed, asked, values = HEADS[head]
    given, mask = REGIONS[region]
    case = toy.cut(
        toy.shared(toy.plain, 2, channels, seed), 1, toy.random_input(2, 1, *PLANE, seed=9)
    )
    logits = case.network(case.x)
    per_channel = activation == "sigmoid" or channels == 1
    if title == "MaskOutput":
        target = targets.MaskOutput(region=given, activation=activation)
        value = scores.all_channels
        if mask is None and per_channel:  # any foreground: some channel above 0
            mask = np.any([scores.predicted(logits, c, sigmoid=True) for c in range(channels)], 0)
        elif mask is None:  # any foreground: not background
            mask = ~scores.predicted(logits, 0)
    else:
        target = getattr(targets, title)(asked, region=given, activation=activation)
        value = values[title]
        mask = scores.predicted(logits, asked, sigmoid=per_channel) if mask is None else mask

    pair = reference_of(case, lambda z: scores.score(z, value, asked, mask))
    result = HiResCAM(case.network, "1", activation=activation)(case.x, target)
    assert deviation(result.score, scores.score(logits, value, asked, mask).detach()) < EXACT
    assert result.region_voxels.tolist() == mask.sum((1, 2)).tolist()
    assert deviation(result.native["1"], maps.hires_cam(*pair)) < EXACT


def test_scores_worked_out_by_hand():
    """One item, three classes, two voxels: class 0 wins at the first, class 2 at the second."""
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, math.log(3.0)]]], dtype=torch.float64)
    e = math.e
    for target, expected in (
        (targets.ClassLogOdds(0), 2 - math.log(e + 1)),
        (targets.ClassLogOdds(2), math.log(3 / 2)),
        (targets.ClassLogOdds(1, "volume"), 1 - math.log(e**2 + 1) - math.log(4)),
        (targets.ClassLogit(0), 2.0),
        (targets.ClassLogit(1, targets.Voxel((0,))), 1.0),
        (targets.ClassProbability(2), 3 / 5),
        (targets.ClassProbability(0, "volume"), e**2 / (e**2 + e + 1) + 1 / 5),
        (targets.ClassProbability(0, "volume", "sigmoid"), 1 / (1 + e**-2) + 1 / 2),
        (targets.MaskOutput(), 3 + math.log(3)),
        (targets.MaskOutput(region="predicted"), math.log(3)),
    ):
        assert target(logits).tolist() == pytest.approx([expected], rel=1e-12), target.name


@signed_maps
def test_an_int_means_log_odds_over_the_predicted_mask_with_the_cams_activation():
    x = toy.random_input(1, 1, *PLANE, seed=9)
    network = toy.shared(toy.plain, 2, seed=3)
    for activation in ("softmax", "sigmoid"):
        spelled = targets.ClassLogOdds(2, region="predicted", activation=activation)
        cam = HiResCAM(network, "1", activation=activation)
        assert torch.equal(cam(x, 2).native["1"], cam(x, spelled).native["1"])
        assert torch.equal(cam(x, 2).score, cam(x, spelled).score)


@signed_maps
def test_a_function_of_your_own_is_differentiated():
    case = toy.cut(toy.shared(toy.plain, 2, seed=3), 1, toy.random_input(2, 1, *PLANE, seed=9))

    def contrast(logits: torch.Tensor) -> torch.Tensor:
        return ((logits[:, 1] - logits[:, 2]) ** 2).sum((1, 2))

    pair = reference_of(case, contrast)
    result = GradCAM(case.network, "1")(case.x, contrast)
    assert deviation(result.score, contrast(case.network(case.x)).detach()) < EXACT
    assert deviation(result.native["1"], maps.grad_cam(*pair)) < EXACT
    assert result.region_voxels is None
