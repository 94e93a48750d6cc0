"""The measured grid is the one that follows from kernel sizes, strides and paddings.

Feature voxel u lies at input voxel stride * u + offset. By hand: a convolution or pooling of size
k, stride s, padding p takes (stride, offset) to (s * stride, offset + stride * ((k - 1) / 2 - p));
a transposed one to (stride / s, offset - stride / s * ((k - 1) / 2 - p)).
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import toy
from helpers_crossed import crossed
from helpers_grids import assert_grid, grids_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from monai.networks import nets
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.errors import LayerError, ModelError
from seg3dcam.geometry import FeatureGrid
from seg3dcam.network.capture import capturing
from seg3dcam.network.grids.measurement import measure_grids
from seg3dcam.network.layers import resolve_layers
from seg3dcam.network.layouts import Tokens


def last_grid(net, shape, **like):
    name = str(len(net) - 1)
    return grids_of(net, shape, name, **like)[name]


def conv(kernel=3, stride=1, padding=1, **settings):
    return nn.Conv3d(2, 2, kernel, stride, padding, **settings)


def up(kernel, padding=0, output_padding=0):
    return nn.ConvTranspose3d(2, 2, kernel, 2, padding, output_padding)


def stack(*layers):
    """Random weights of both signs: what is measured must not depend on them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 2, 1), *(layer() for layer in layers))


class Functional(nn.Module):
    """Wraps a function that a network calls without a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OwnNorm(nn.Module):
    """Normalises over channels by operations of its own (ConvNeXt)."""

    def forward(self, x):
        off = x - x.mean(1, keepdim=True)
        return off / (off.square().mean(1, keepdim=True) + 1e-6).sqrt()


def function(call):
    return lambda: Functional(call)


def down():
    return conv(3, 2, 1)


def halve():
    return nn.MaxPool3d(2)


STACKS = {
    "same convolution": ([conv], 1, 0),
    "no padding": ([lambda: conv(3, 1, 0)], 1, 1),
    "no padding twice": ([lambda: conv(3, 1, 0), lambda: conv(5, 1, 0)], 1, 3),
    "dilated": ([lambda: conv(3, 1, 2, dilation=2)], 1, 0),
    "k3 s2 p1": ([down], 2, 0),
    "k3 s2 p1, three times": ([down] * 3, 8, 0),
    "k1 s2": ([lambda: conv(1, 2, 0)], 2, 0),
    "k2 s2": ([lambda: conv(2, 2, 0)], 2, 0.5),
    "k4 s2 p1": ([lambda: conv(4, 2, 1)], 2, 0.5),
    "k7 s2 p3": ([lambda: conv(7, 2, 3)], 2, 0),
    "k3 s2 p0": ([lambda: conv(3, 2, 0)], 2, 1),
    "k3 s2 p0, twice": ([lambda: conv(3, 2, 0)] * 2, 4, 3),
    "k4 s4": ([lambda: conv(4, 4, 0)], 4, 1.5),
    "depthwise": ([lambda: conv(3, 2, 1, groups=2)], 2, 0),
    "max pool": ([halve], 2, 0.5),
    "max pool, three times": ([halve] * 3, 8, 3.5),
    "max pool k3 s2 p1": ([lambda: nn.MaxPool3d(3, 2, 1)], 2, 0),
    "average pool": ([lambda: nn.AvgPool3d(2)], 2, 0.5),
    "average pool, three times": ([lambda: nn.AvgPool3d(2)] * 3, 8, 3.5),
    "adaptive pool": ([lambda: nn.AdaptiveAvgPool3d(16)], 2, 0.5),
    "max pool as a function": ([function(lambda x: F.max_pool3d(x, 2))] * 3, 8, 3.5),
    "average pool as a function": ([function(lambda x: F.avg_pool3d(x, 2))] * 3, 8, 3.5),
    "convolution, then pool": ([down, halve], 4, 1),
    "pool, then convolution": ([halve, down], 4, 0.5),
    "pool, convolution, pool": ([halve, down, halve], 8, 2.5),
    "transposed k2 s2": ([down, lambda: up(2)], 1, -0.5),
    "transposed k2 s2 after pool": ([halve, lambda: up(2)], 1, 0),
    "transposed k2 s2, twice": ([halve] * 3 + [lambda: up(2)] * 2, 2, 0.5),
    "transposed k2 s2, twice after convolutions": ([down] * 3 + [lambda: up(2)] * 2, 2, -3),
    "transposed k3 s2 p1 op1": ([down, lambda: up(3, 1, 1)], 1, 0),
    "transposed k3 s2 p1 op1 after pool": ([halve, lambda: up(3, 1, 1)], 1, 0.5),
    "transposed k4 s2 p1": ([down, lambda: up(4, 1)], 1, -0.5),
    "linear upsampling": (
        [down, lambda: nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)],
        1,
        -0.5,
    ),
    "linear upsampling after pool": (
        [halve, halve, function(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"))],
        2,
        0.5,
    ),
    "even window, padded at its end": (
        [function(lambda x: F.avg_pool3d(F.pad(x, (0, 1) * 3), 2, 1)), conv],
        1,
        0.5,
    ),
    "nearest upsampling": ([halve, lambda: nn.Upsample(scale_factor=2)], 1, 0),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("name", crossed(STACKS, rows=12))
def test_a_stack_has_the_grid_worked_out_by_hand(name):
    layers, stride, offset = STACKS[name]
    assert_grid(last_grid(stack(*layers), (32, 32, 32)), (stride,) * 3, (offset,) * 3)


@pytest.mark.parametrize(
    "between",
    crossed(
        [
            nn.ReLU,
            nn.LeakyReLU,
            nn.PReLU,
            nn.ELU,
            nn.GELU,
            nn.SiLU,
            nn.Mish,
            lambda: nn.ReLU(inplace=True),
            lambda: nn.BatchNorm3d(2),
            lambda: nn.InstanceNorm3d(2, affine=True),
            lambda: nn.GroupNorm(2, 2),
            lambda: nn.Dropout3d(0.5),
            nn.Identity,
            OwnNorm,
        ],
        rows=5,
    ),
)
def test_what_stands_between_makes_no_difference(between):
    net = stack(down, between, halve, between, conv)
    assert_grid(last_grid(net, (32, 32, 32)), (4,) * 3, (1,) * 3)


@pytest.mark.parametrize(
    ("make", "expected"), [(down, (0, 0, 0)), (halve, (0.5, 0.5, 0.5))], ids=["conv", "pool"]
)
@pytest.mark.parametrize("shape", [(9, 16, 31), (33, 34, 35), (65, 32, 97), (70, 12, 20)])
def test_odd_sizes(make, expected, shape):
    assert_grid(last_grid(stack(make), shape), (2,) * 3, expected)


class OneSize(nn.Module):
    """Takes inputs of one size alone, as transformers with learned places do."""

    def __init__(self, net, shape):
        super().__init__()
        self.net, self.shape = net, torch.Size(shape)

    def forward(self, x):
        assert x.shape[2:] == self.shape
        return self.net(x)


@pytest.mark.parametrize(
    ("patch", "patches", "steps"), crossed([4, 8, 16], [2, 3, 4, 5, 6], [1, 2, 3], rows=3)
)
def test_few_patches_that_transposed_convolutions_make_finer(patch, patches, steps):
    """Positions are a staircase of few steps (UNETR), and no other size of input says how wide."""
    shape = (patch * patches, 32, 32)
    net = stack(lambda: nn.Conv3d(2, 2, patch, patch), *[lambda: up(2), conv] * steps)
    stride = patch / 2**steps
    if stride < 1:
        pytest.skip("finer than the input")
    layer = f"net.{len(net) - 1}"
    grid = grids_of(OneSize(net, shape), shape, layer)[layer]
    assert (grid.stride[0], grid.offset[0]) == (stride, (stride - 1) / 2)
    assert grid.measured or patches == 3  # the second measurement leaves some of these in doubt


class Padded(nn.Module):
    """Pads its input to a multiple of 16 at both ends, as many segmentation networks do."""

    def __init__(self, kernel, ndim):
        super().__init__()
        make, turn = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}[ndim]
        settings = {2: (2, 0, 0), 3: (2, 1, 1), 4: (2, 1, 0)}[kernel]
        self.down = nn.Sequential(make(1, 3, 3, 2, 1), make(3, 3, 3, 2, 1))
        self.up = nn.Sequential(turn(3, 3, kernel, *settings), turn(3, 3, kernel, *settings))

    def forward(self, x):
        sizes = [
            n for length in x.shape[:1:-1] for n in (-length % 16 // 2, (1 - length % -16) // 2)
        ]
        return self.up(self.down(F.pad(x, sizes)))


@pytest.mark.parametrize(
    ("kernel", "shape"), crossed([2, 3, 4], [(78,), (90,), (94, 94), (70, 34)], rows=4)
)
def test_layers_of_a_padded_input_keep_their_whole_strides(kernel, shape):
    """Where the handy input is as long as the input, no other size tells of the padding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Padded(kernel, len(shape))
    grids = grids_of(net, shape, ["up.0", "up.1"])
    before = [-length % 16 // 2 for length in shape]
    # By the formula above, from stride 4 and the place of the first voxel of the padded input.
    for name, stride, offset in (("up.0", 2, -1), ("up.1", 1, -1.5)):
        shift = 0 if kernel == 3 else offset
        assert_grid(grids[name], (stride,) * len(shape), [shift - n for n in before])


BEYOND = {
    "the last voxel looks beyond the end": (
        lambda: [nn.Conv1d(2, 2, 1, 3), nn.MaxPool1d(2, 2, 1)],
        (17, 6, -1.5),
    ),
    "both ends": (
        lambda: (
            [nn.Conv1d(2, 2, 7, 1, 3), nn.Conv1d(2, 2, 2, 2, 1), nn.AvgPool1d(2, 2, 1)] * 1
            + [nn.Conv1d(2, 2, 3, 1, 1), nn.AvgPool1d(2, 2, 1)]
        ),
        (20, 8, -3.5),
    ),
    "two voxels in the middle": (lambda: [nn.Conv1d(2, 2, 7)], (8, 1, 3)),
    "a turned convolution wider than the input": (
        lambda: [nn.Conv1d(2, 2, 2, 2, 1), nn.ConvTranspose1d(2, 2, 4, 2, 1)],
        (48, 1, -1),
    ),
    "a stride that does not divide 64": (
        lambda: [nn.Conv1d(2, 2, 7, 3, 3), nn.MaxPool1d(3, 2, 1)],
        (17, 6, 0),
    ),
}


@pytest.mark.parametrize("alone", [False, True], ids=["any size", "one size"])
@pytest.mark.parametrize("name", BEYOND)
def test_layers_that_look_beyond_the_ends(name, alone):
    if alone and name == "a stride that does not divide 64":
        pytest.skip("of its three voxels, padding distorts two")
    make, (length, stride, offset) = BEYOND[name]
    net = toy.seeded(nn.Sequential(nn.Conv1d(1, 2, 1), *make()), seed=0).float()
    layer = str(len(net) - 1)
    if alone:
        net, layer = OneSize(net, (length,)), f"net.{layer}"
    assert_grid(grids_of(net, (length,), layer)[layer], (stride,), (offset,))


def test_a_network_that_looks_at_another_item_of_the_batch_is_measured_alone():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 3, 4, 4), nn.Conv1d(3, 2, 1)

        def forward(self, x):
            z = self.a(x).relu()
            return self.b(z + 3 * z[:1].roll(5, 2))

    grid = grids_of(toy.seeded(First(), seed=0).float(), (40,), "b")["b"]
    assert not grid.measured


@pytest.mark.parametrize(("name", "length"), crossed(sorted(STACKS), [8, 12, 16, 32, 80], rows=6))
def test_a_grid_that_counts_as_measured_is_right_in_one_size_alone(name, length):
    layers, stride, offset = STACKS[name]
    if name == "adaptive pool":
        pytest.skip("its stride depends on the size")
    net, shape = stack(*layers), (length, 32, 32)
    layer = f"net.{len(net) - 1}"
    try:
        grid = grids_of(OneSize(net, shape), shape, layer)[layer]
    except (LayerError, ModelError):
        return  # the input is too small for the network
    if grid.measured:
        # A single voxel has a place, but no stride.
        strides = grid.shape[0] > 1
        assert grid.offset[0] == pytest.approx(offset, abs=1e-2)
        assert not strides or grid.stride[0] == pytest.approx(stride, abs=1e-3)


@pytest.mark.few(2)
@pytest.mark.parametrize("shape", [(8, 32, 32), (12, 40, 64), (5, 96, 130)])
def test_thick_slices(shape):
    """Stride (1, 2, 2), then (2, 2, 2) by pooling of (1, 2, 2) and (2, 2, 2)."""
    slices = stack(lambda: conv(3, (1, 2, 2), 1), lambda: conv(3, (1, 2, 2), 1))
    assert_grid(last_grid(slices, shape), (1, 4, 4), (0, 0, 0))
    pooled = stack(lambda: nn.MaxPool3d((1, 2, 2)), lambda: nn.MaxPool3d(2))
    assert_grid(last_grid(pooled, shape), (2, 4, 4), (0.5, 1.5, 1.5))
    flat = stack(lambda: conv((1, 3, 3), (1, 2, 2), (0, 1, 1)), lambda: conv((1, 3, 3), 1, 0))
    assert_grid(last_grid(flat, shape), (1, 2, 2), (0, 2, 2))


@pytest.mark.parametrize("shape", [(24, 40), (64, 96), (200, 72)])
def test_two_dimensions(shape):
    net = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, (2, 1), 1))
    assert_grid(last_grid(net, shape), (8, 4), (1, 1))


def test_one_dimension():
    net = nn.Sequential(nn.Conv1d(1, 3, 3, 2, 1), nn.MaxPool1d(2))
    assert_grid(last_grid(net, (60,)), (4,), (1,))


@pytest.mark.parametrize("length", [40, 96, 100, 257, 400])
def test_long_inputs_are_measured_on_a_short_one(length):
    """The grid has the shape of the long input, and the stride and offset of any."""
    net, seen = stack(down, halve), []
    (layer,) = resolve_layers(net, "2")
    shape = (math.ceil(length / 2) // 2, 2, 2)
    net[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[2]))
    grid = measure_grids(net, torch.zeros(1, 1, length, 8, 8), {layer: shape})[layer]
    assert_grid(grid, (4, 4, 4), (1, 1, 1))
    assert grid.shape == shape
    assert max(seen) <= 95


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@example([(2, 2, True, False), (1, 3, False, False), (2, 1, False, False), (4, 1, True, True)])
@given(
    layers=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_any_mixture_has_the_grid_of_the_formula(layers):
    """Kernels padded by half their size, rounded up or down; of channels that do not all lean."""
    torch.manual_seed(0)
    stride, offset, padding, modules = 1, 0.0, 0, [nn.Conv1d(1, 24, 1)]
    for k, s, rounded_up, pooled in layers:
        p = k // 2 if rounded_up else (k - 1) // 2
        padding += stride * p
        offset += stride * ((k - 1) / 2 - p)
        stride *= s
        modules.append(
            nn.AvgPool1d(k, s, p, count_include_pad=False) if pooled else nn.Conv1d(24, 24, k, s, p)
        )
    assume(stride <= 8 and abs(offset) <= stride)
    assume(padding <= 16)  # the inner half sees none of it
    assert_grid(last_grid(nn.Sequential(*modules), (64,)), (stride,), (offset,), within=0.1)


# ------------------------------------------------------------------------------ real networks

UNET = ["model.1.submodule.1.submodule.1.submodule", "model.1.submodule.1", "model.1"]


def unet():
    return nets.UNet(3, 1, 3, channels=(4, 6, 8, 10), strides=(2, 2, 2), num_res_units=1)


@functools.cache
def grids_of_basic_unet(shape):
    """Measure all levels of a BasicUNet at once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.BasicUNet(len(shape), 1, 3, features=(4, 4, 6, 8, 10, 4))
    return grids_of(net, shape, ["down_*", "upcat_*"])


@pytest.mark.parametrize("shape", [(32, 48, 64), (64, 64, 64)])
def test_monai_unet_has_no_offset(shape):
    """Every level comes from a strided convolution with k3 p1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grids = grids_of(unet(), shape, UNET)
    for name, stride in zip(UNET, (8, 4, 2), strict=True):
        assert_grid(grids[name], (stride,) * 3, (0,) * 3)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "shape",
    [
        (32, 48),
        pytest.param((64, 64), marks=pytest.mark.slow),
        pytest.param((64, 16, 16), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_monai_basic_unet_has_the_offset_of_max_pooling(level, shape):
    """(stride - 1) / 2 at every level, on the way down and on the way up."""
    stride = 2**level
    up_stride = 2 ** (level - 1)
    grids = grids_of_basic_unet(shape)
    ndim = len(shape)
    assert_grid(grids[f"down_{level}"], (stride,) * ndim, ((stride - 1) / 2,) * ndim)
    assert_grid(grids[f"upcat_{level}"], (up_stride,) * ndim, ((up_stride - 1) / 2,) * ndim)


MEASURED = {
    "SegResNet": (
        lambda: nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=3),
        (16, 24, 32),
        {"down_layers.3": 8, "up_layers.0": 4, "up_layers.1": 2, "up_layers.2": 1},
    ),
    "VNet": (
        lambda: nets.VNet(2, 1, 3),
        (32, 48),
        {"down_tr256": 16, "up_tr256": 8, "up_tr128": 4},
    ),
    "DynUNet": (
        lambda: nets.DynUNet(
            3, 1, 3, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[4, 6, 8, 10], res_block=True
        ),
        (16, 16, 32),
        {"bottleneck": 8, "upsamples.0": 4, "upsamples.1": 2, "upsamples.2": 1},
    ),
    "AttentionUnet": (
        lambda: nets.AttentionUnet(3, 1, 3, channels=(4, 6, 8), strides=(2, 2)),
        (16, 16, 32),
        {"model.1.submodule.1.submodule": 4, "model.1.submodule": 2, "model.1": 1},
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "DynUNet")) for name in MEASURED],
)
def test_layers_of_a_regular_network_have_their_strides(name):
    """Where the size of a level divides that of the input, its stride is their quotient."""
    make, shape, layers = MEASURED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grids = grids_of(make(), shape, list(layers))
    for layer, stride in layers.items():
        assert grids[layer].stride == (stride,) * len(shape), layer
        assert all(abs(offset) < stride for offset in grids[layer].offset), layer


# --------------------------------------------------------------------- tokens and channels last


def unetr():
    return nets.UNETR(1, 3, (32, 32, 48), 4, hidden_size=24, mlp_dim=32, num_heads=2)


def test_tokens_lie_in_the_middle_of_their_patches():
    """A token keeps its place: attention adds to it."""
    names = ["vit.patch_embedding", "vit.blocks.0", "vit.blocks.11", "vit[0]"]
    for name, grid in grids_of(unetr(), (32, 32, 48), names).items():
        assert grid.shape == (2, 2, 3), name
        assert_grid(grid, (16,) * 3, (7.5,) * 3)


@pytest.mark.slow
def test_decoders_of_few_tokens_have_the_places_of_their_patches():
    """With two or three patches along an axis, each decoder sees a staircase of so many steps."""
    shape = (32, 48, 64)
    net = nets.UNETR(1, 3, shape, 4, hidden_size=24, mlp_dim=32, num_heads=2)
    strides = {"encoder4": 8, "decoder5": 8, "decoder4": 4, "decoder3": 2, "decoder2": 1}
    for name, grid in grids_of(net, shape, list(strides)).items():
        assert_grid(grid, (strides[name],) * 3, ((strides[name] - 1) / 2,) * 3)


def test_tokens_behind_a_class_token():
    net = nets.ViT(1, (32, 48), (8, 8), 12, 16, 2, 2, spatial_dims=2, classification=True)
    layers = resolve_layers(net, "blocks.*")
    with capturing(net, layers, output=0) as capture:
        capture.observe(torch.zeros(1, 1, 32, 48), copy=False)
        shapes = capture.shapes
    for grid in measure_grids(net, torch.zeros(1, 1, 32, 48), shapes).values():
        assert_grid(grid, (8, 8), (3.5, 3.5))


SWIN = {
    "fine": {
        "swinViT.patch_embed": 2,
        "swinViT.layers1.0.blocks.1": 2,
        "swinViT.layers1.0.downsample": 4,
        "swinViT.layers2.0": 8,
    },
    "coarse": {"encoder10": 32, "decoder5": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["fine", pytest.param("coarse", marks=pytest.mark.slow)])
def test_swin_merges_patches(part):
    """2 voxels a patch, then 2 patches: from (2 - 1) / 2 to (stride - 1) / 2 at every level."""
    net = nets.SwinUNETR(
        1, 3, feature_size=12, depths=(2, 1, 1, 1), num_heads=(3,) * 4, spatial_dims=2
    )
    levels = SWIN[part]
    for name, grid in grids_of(net, (64, 96), list(levels)).items():
        stride = levels[name]
        assert_grid(grid, (stride,) * 2, ((stride - 1) / 2,) * 2)


@pytest.mark.parametrize("name", ["tokens", "tok*"])
def test_a_users_grid_of_tokens_is_measured_at_the_inputs_own_size(name):
    """At the handy size there are other tokens than the given grid has."""
    net, x = Attention(), torch.zeros(1, 1, 128, 160)
    layers = resolve_layers(net, name, Tokens((32, 40)))
    with capturing(net, layers) as capture:
        capture.observe(x, copy=False)
        grids = measure_grids(net, x, capture.shapes)
    assert_grid(grids[layers[0]], (4, 4), (1.5, 1.5))


@pytest.mark.parametrize(
    ("kind", "shape"),
    crossed([(3, 2, 2), (1, 1, 1), (1, 2, 1), (5, 1, 4)], [(8, 4, 12), (9, 5, 7), (32, 64, 33)]),
)
def test_what_sees_padding_alone_does_not_count(kind, shape):
    kernel, stride, padding = kind
    net = nn.Sequential(nn.Conv3d(1, 4, kernel, stride, padding), nn.ReLU())
    offset = (kernel - 1) / 2 - padding
    assert_grid(grids_of(net, shape, ["0"])["0"], (stride,) * 3, (offset,) * 3)


# -------------------------------------------------------------------- what cannot be measured


class Attention(nn.Module):
    """Patches that become the mean of all of them."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.tokens = nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 2, 4, 4)

    def forward(self, x):
        grid = self.patches(x)
        tokens = self.tokens(grid.flatten(2).transpose(1, 2))
        tokens, _ = self.attention(tokens, tokens, tokens)
        return self.up(self.out(tokens.transpose(1, 2).reshape(grid.shape)))


CANNOT = {
    "attention over all tokens": (Attention, "out"),
    "global average": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 4, 4), Functional(lambda x: x.mean((2, 3), keepdim=True) + 0 * x)
        ),
        "1",
    ),
    "mirrored": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 4), Functional(lambda x: x.flip(2))),
        "1",
    ),
    "not finite": (lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 4), Functional(lambda x: x / 0)), "1"),
    "Fourier": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 4), Functional(lambda x: torch.fft.fft2(x).real)),
        "1",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_measured_has_the_usual_convention(name):
    make, layer = CANNOT[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make()
    grid = grids_of(net, (32, 48), layer)[layer]
    assert not grid.measured
    assert grid == FeatureGrid((8, 12), (4.0, 4.0), (1.5, 1.5))


def test_a_network_of_fixed_input_size_is_measured_at_its_own():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(1, 2, 3, 2, 1)
            self.position = nn.Parameter(torch.zeros(1, 2, 80, 48))

        def forward(self, x):
            return self.down(x) + self.position

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(Fixed(), nn.Conv2d(2, 2, 1))
    assert_grid(grids_of(net, (160, 96), "0.down")["0.down"], (2, 2), (0, 0))
    assert_grid(grids_of(net, (160, 96), "1")["1"], (2, 2), (0, 0))


# ----------------------------------------------------------------------- memory and the model


def test_measured_once_for_each_network_and_shape():
    """What another CAM object of the same network has measured is not measured again."""
    net, calls = stack(down, halve), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    target = targets.MaskOutput()
    # The pass itself, three for each axis to measure, four to check, 13 to try the gradient.
    first = 1 + 3 * (3 + 4) + 13
    HiResCAM(net, "2")(torch.ones(1, 1, 32, 32, 32), target)
    assert len(calls) == first
    HiResCAM(net, "2")(torch.ones(2, 1, 32, 32, 32), target)
    assert len(calls) == first + 1
    other = HiResCAM(net, "2")(torch.ones(1, 1, 40, 32, 32), target).layers["2"]
    assert len(calls) == first + 1 + 1 + 3 * (3 + 4)
    assert other.grid == FeatureGrid((10, 8, 8), (4.0,) * 3, (1.0,) * 3)


def test_a_network_that_changed_is_measured_afresh():
    net = stack(down, halve)
    (layer,) = resolve_layers(net, "2")
    x = torch.zeros(1, 1, 32, 32, 32)
    assert_grid(measure_grids(net, x, {layer: (8, 8, 8)})[layer], (4,) * 3, (1,) * 3)
    net[1] = nn.MaxPool3d(2)
    assert_grid(measure_grids(net, x, {layer: (8, 8, 8)})[layer], (4,) * 3, (1.5,) * 3)


def test_tied_kernels_are_measured():
    net = nn.Sequential(nn.Conv3d(2, 2, 3, 2, 1), nn.Conv3d(2, 2, 3, 2, 1))
    net[1].weight = net[0].weight
    (layer,) = resolve_layers(net, "1")
    grid = measure_grids(net, torch.zeros(1, 2, 32, 32, 32), {layer: (8, 8, 8)})[layer]
    assert_grid(grid, (4,) * 3, (0,) * 3)


@pytest.mark.parametrize("normalise", ["weight_norm", "spectral_norm"])
def test_computed_kernels_are_measured(normalise):
    net = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 4, 3, 2, 1))
    for module in net:
        getattr(nn.utils.parametrizations, normalise)(module)
    assert_grid(last_grid(net, (32, 32, 32)), (4,) * 3, (0,) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_and_its_numbers_stay(dtype):
    net = stack(down, lambda: nn.BatchNorm3d(2), halve).to(dtype).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    assert_grid(last_grid(net, (32, 32, 32), dtype=dtype), (4,) * 3, (1,) * 3)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("plan", [None, WindowPlan(16, overlap=0.5)])
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_the_grid_of_one_window_reaches_the_result(plan):
    net = stack(down, halve, lambda: nn.Upsample(scale_factor=4))
    x = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    result = GradCAM(net, "2", sliding_window=plan)(x, targets.MaskOutput())
    grid = result.layers["2"].window_grid
    assert_grid(grid, (4,) * 3, (1,) * 3)
    assert grid.shape == ((8,) * 3 if plan is None else (4,) * 3)
