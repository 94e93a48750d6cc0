"""Channels last and tokens give the maps of the same network written channels first.

What the shapes do not tell is found out on the network, or refused.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers_crossed import crossed
from monai.networks import nets
from torch import nn
from toy import CONV, UP, random_input, seeded

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.errors import LayerError
from seg3dcam.network.capture import capturing
from seg3dcam.network.layers import LayerRef, resolve_layers
from seg3dcam.network.layouts import (
    Tokens,
    certain_layout,
    channels_first,
    channels_last,
    layout_by_change,
    possible_layouts,
    pulled_back,
    spatial_shape,
    stride_of,
)

VOLUME = targets.ClassLogit(1, region="volume")


class Patches(nn.Module):
    """Patches of 4, mixed among channels and among neighbours, and back; written three ways.

    The layer "mix" gives the same numbers, laid out as `layout` says.
    """

    def __init__(self, ndim: int = 3, layout: str = "first") -> None:
        super().__init__()
        self.layout = layout
        self.embed = CONV[ndim](1, 5, 4, 4)
        self.mix = Mix(5, 6)
        self.after = CONV[ndim](6, 6, 3, padding=1)
        self.head = UP[ndim](6, 3, 4, 4)

    def forward(self, x):
        grid = self.embed(x)
        size = grid.shape[2:]
        if self.layout == "first":
            mixed = self.mix(grid.movedim(1, -1), lambda y: y.movedim(-1, 1))
        elif self.layout == "last":
            mixed = self.mix(grid.movedim(1, -1), lambda y: y).movedim(-1, 1)
        else:
            tokens = grid.flatten(2).transpose(1, 2)
            mixed = self.mix(tokens, self.with_class_token)
            mixed = mixed[:, "class" in self.layout :].transpose(1, 2).unflatten(2, size)
        return self.head(self.after(mixed.relu()))

    def with_class_token(self, tokens):
        if "class" not in self.layout:
            return tokens
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


class Mix(nn.Module):
    """A linear map of the channels whose result is laid out by a function."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weights = nn.Linear(channels, out)

    def forward(self, values, lay_out):
        return lay_out(torch.tanh(self.weights(values)))


WAYS = ["last", "tokens", "tokens and class"]
SIZES = {1: (28,), 2: (12, 20), 3: (8, 12, 20)}


def patches(ndim, layout):
    return seeded(Patches(ndim, layout), seed=4)


def maps(net, x, layer="mix", method=HiResCAM, **settings):
    return method(net, layer, **settings)(x, VOLUME).native[layer]


# ------------------------------------------------------------------------- the same, laid out anew


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(
    ("layout", "ndim", "method"), crossed(WAYS, [1, 2, 3], [GradCAM, HiResCAM])
)
def test_every_layout_gives_the_map_of_channels_first(ndim, layout, method):
    x = random_input(2, 1, *SIZES[ndim])
    expected = maps(patches(ndim, "first"), x, method=method)
    found = maps(patches(ndim, layout), x, method=method)
    assert found.shape == (2, *(n // 4 for n in SIZES[ndim]))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("layout", WAYS)
def test_every_layout_gives_the_map_in_windows(layout):
    x = random_input(1, 1, 16, 16, 24)
    plan = WindowPlan((16, 16, 16), overlap=0.5)
    found, expected = (
        GradCAM(patches(3, way), "mix", sliding_window=plan)(x, VOLUME).maps["mix"]
        for way in (layout, "first")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(("layout", "axis"), crossed(WAYS, [2, 3, 4]))
def test_the_axes_of_the_grid_are_those_of_the_image(layout, axis):
    """A network that treats each voxel alone flips with its input."""
    net = patches(3, layout)
    with torch.no_grad():
        for weight in (net.embed.weight, net.head.weight):
            weight.copy_(weight.mean((2, 3, 4), keepdim=True))
        kernel = net.after.weight
        kernel.copy_((kernel + kernel.flip(2, 3, 4)) / 2)
        for each in (2, 3, 4):
            kernel.copy_((kernel + kernel.flip(each)) / 2)
    x = random_input(1, 1, 8, 12, 20)
    expected = maps(net, x).flip(axis - 1)
    torch.testing.assert_close(maps(net, x.flip(axis)), expected, rtol=1e-10, atol=1e-12)


def captured(net, layers, x):
    with capturing(net, layers) as capture:
        logits = capture.forward(x)
        gradients = capture.gradients(logits, torch.ones_like(logits))
        return capture.activations, gradients, capture.shapes, capture.observe_layers(x)


@pytest.mark.parametrize("layout", ["first", *WAYS])
def test_what_is_captured_is_channel_first(layout):
    net = patches(3, layout)
    layers = resolve_layers(net, ["mix", "embed"])
    x = random_input(2, 1, 8, 12, 20)
    activations, gradients, shapes, observed = captured(net, layers, x)
    twin = patches(3, "first")
    expected, expected_gradients, _, _ = captured(twin, resolve_layers(twin, ["mix", "embed"]), x)
    for layer in layers:
        assert shapes[layer] == (2, 3, 5)
        torch.testing.assert_close(activations[layer], expected[layer])
        torch.testing.assert_close(gradients[layer], expected_gradients[layer])
        torch.testing.assert_close(observed[layer], expected[layer])


# --------------------------------------------------------------------------------- MONAI's networks


def test_unetr_tokens_are_patches_of_the_image():
    """The map of the last block equals the one through its reshaped tokens, which decoder5 gets."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.UNETR(1, 3, (32, 32, 48), 4, hidden_size=24, mlp_dim=32, num_heads=2).eval()
    x = random_input(1, 1, 32, 32, 48).float()
    given = {}
    handle = net.decoder5.register_forward_pre_hook(lambda m, args: given.update(features=args[0]))
    with capturing(net, resolve_layers(net, "vit.norm")) as capture:
        capture.observe(x, copy=True)
        (activations,) = capture.activations.values()
    handle.remove()
    torch.testing.assert_close(activations, given["features"])


@pytest.mark.slow
def test_swin_blocks_are_channels_last():
    """The list that swinViT returns has the normalised features of the same stages."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.SwinUNETR(1, 3, feature_size=12, depths=(1,) * 4, num_heads=(3,) * 4).eval()
    x = random_input(1, 1, 32, 32, 64).float()
    names = ["swinViT.layers2.0", "swinViT.layers2.0.downsample"]
    first, last = layers = resolve_layers(net, names)
    activations, gradients, shapes, _ = captured(net, layers, x)
    assert shapes == {first: (4, 4, 8), last: (4, 4, 8)}
    torch.testing.assert_close(activations[first], activations[last])
    torch.testing.assert_close(gradients[first], gradients[last])


@pytest.mark.slow
def test_the_inside_of_attention_windows_is_refused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.SwinUNETR(1, 3, feature_size=12, depths=(1,) * 4, num_heads=(3,) * 4).eval()
    layers = resolve_layers(net, "swinViT.layers1.0.blocks.0.attn")
    with (
        capturing(net, layers) as capture,
        pytest.raises(LayerError, match=r"the first axis is not the batch's.*Choose the block"),
    ):
        capture.observe(torch.zeros(1, 1, 32, 32, 64), copy=False)


# ---------------------------------------------------------------- what the shapes say by themselves

S3 = (2, 1, 64, 64, 64)


def named(layouts):
    return [str(each) if isinstance(each, Tokens) else each.__name__ for each in layouts]


@pytest.mark.parametrize(
    ("shape", "input_shape", "expected"),
    [
        ((2, 48, 16, 16, 16), S3, ["channels_first"]),
        ((2, 16, 16, 16, 48), S3, ["channels_last"]),
        ((2, 320, 2, 2, 2), S3, ["channels_first"]),
        ((2, 100, 12, 25), (2, 3, 24, 50), ["channels_first"]),
        ((2, 12, 25, 100), (2, 3, 24, 50), ["channels_last"]),
        ((2, 64, 24), S3, [str(Tokens((4, 4, 4)))]),
        ((2, 65, 24), S3, [str(Tokens((4, 4, 4), class_token=True))]),
        ((2, 12, 24), (2, 1, 32, 32, 48), [str(Tokens((2, 2, 3)))]),
        ((2, 197, 768), (2, 3, 224, 224), [str(Tokens((14, 14), class_token=True))]),
        ((2, 4**3, 7), (2, 1, 18, 18, 18), [str(Tokens((4, 4, 4)))]),  # stride 4, cut off
        ((2, 5**3, 7), (2, 1, 18, 18, 18), [str(Tokens((5, 5, 5)))]),  # stride 4, padded
        ((2, 64, 65), (2, 1, 512), ["channels_last"]),
        ((2, 65, 500), (2, 1, 512), [str(Tokens((64,), class_token=True))]),
        ((2, 500, 64), (2, 1, 512), ["channels_first"]),
        # Only the network can tell:
        ((2, 32, 32, 32, 32), S3, ["channels_first", "channels_last"]),
        ((2, 16, 32, 32, 32), S3, ["channels_first", "channels_last"]),
        ((2, 1, 64, 64, 64), S3, ["channels_first", "channels_last"]),
        ((2, 100, 16, 32, 32), S3, ["channels_first", "channels_last"]),  # or windows of tokens
        ((2, 8, 60, 60, 60), S3, ["channels_first", "channels_last"]),
        ((2, 65, 32), (2, 1, 512), ["channels_first", str(Tokens((64,), class_token=True))]),
    ],
)
def test_possible_layouts(shape, input_shape, expected):
    assert named(possible_layouts(LayerRef("layer"), shape, input_shape)) == expected


@pytest.mark.parametrize(
    ("shape", "input_shape", "message"),
    [
        ((2, 512), S3, r"gives \(2, 512\) for an input .*pooled vectors have no place"),
        ((2,), S3, r"needs \(B, C, \*s\)"),
        ((), S3, "the first axis is not the batch's"),
        ((54, 343, 24), S3, "the first axis is not the batch's, as in attention inside windows"),
        ((2, 0, 4, 4, 4), S3, "first axis"),
        ((2, 8, 2, 3, 4, 5), S3, r"needs \(B, C, \*s\) or \(B, \*s, C\) with 3 spatial axes"),
        ((2, 8, 65, 65), S3, r"no place in the image. Choose another layer, or pass reshape_tr"),
        ((2, 74, 24), S3, "74 tokens, or 73 and a class token, are no grid of whole strides"),
        ((2, 1, 24), S3, "1 tokens, or 0 and a class token"),
        (
            (2, 256, 24),
            S3,
            r"fit more than one grid. Say which with reshape_transform=, one of "
            r"Tokens\(grid=\(1, 4, 64\), class_token=False\), .*\.\.\. "
            r"\(of seg3dcam.network.layouts\)",
        ),
        ((2, 5, 24), (2, 1, 9, 1), r"one of Tokens\(grid=\(5, 1\), .*grid=\(4, 1\), class_token=T"),
    ],
)
def test_what_has_no_place_is_refused(shape, input_shape, message):
    with pytest.raises(LayerError, match=message):
        possible_layouts(LayerRef("layer"), shape, input_shape)


def test_tokens_of_a_convolution_are_in_the_wrong_order():
    """(B, C, N) of a Conv1d, where C happens to be the number of voxels of a grid."""
    layer = LayerRef("layer", (), nn.Conv1d(1, 64, 1))
    with pytest.raises(LayerError, match="or pass reshape_transform"):
        possible_layouts(layer, (2, 64, 24), S3)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv3d(1, 32, 1), (2, 32, 32, 32, 32), channels_first),
        (nn.ConvTranspose3d(1, 32, 1), (2, 32, 32, 32, 32), channels_first),
        (nn.BatchNorm3d(32), (2, 32, 32, 32, 32), channels_first),
        (nn.InstanceNorm3d(32), (2, 32, 32, 32, 32), channels_first),
        (nn.GroupNorm(4, 32), (2, 32, 32, 32, 32), channels_first),
        (nn.MaxPool3d(2), (2, 32, 32, 32, 32), channels_first),
        (nn.AdaptiveAvgPool3d(5), (2, 32, 5, 5, 5), channels_first),
        (nn.Upsample(2), (2, 32, 32, 32, 32), channels_first),
        (nn.Sequential(nn.Conv3d(1, 32, 1), nn.ReLU()), (2, 32, 32, 32, 32), channels_first),
        (nn.LayerNorm(32), (2, 32, 32, 32, 32), channels_last),
        (nn.Linear(4, 32), (2, 32, 32, 32, 32), channels_last),
        (nn.Sequential(nn.Linear(4, 32), nn.GELU()), (2, 32, 32, 32, 32), channels_last),
        (nn.Linear(4, 32), (2, 16, 32, 32, 32), None),  # windows look like this
        (nn.LayerNorm([32, 32, 32, 32]), (2, 32, 32, 32, 32), None),
        (nn.ReLU(), (2, 32, 32, 32, 32), None),
        (nn.Sequential(nn.ReLU()), (2, 32, 32, 32, 32), None),
        (nn.Conv1d(1, 64, 1), (2, 64, 32), None),
        (nn.Conv3d(1, 32, 1), (54, 32, 32, 32, 32), None),
    ],
)
def test_certain_layouts(module, shape, expected):
    assert certain_layout(module, shape, S3) is expected


def test_one_axis_tells():
    assert layout_by_change((1, 8, 8, 8), (1, 8, 8, 12)) is channels_first
    assert layout_by_change((1, 8, 8, 8), (1, 8, 12, 8)) is channels_last
    assert layout_by_change((1, 8, 8), (1, 8, 12)) is channels_first
    for other in [(1, 8, 8, 8), (1, 8, 12, 12), (1, 12, 8, 8), (1, 8, 12)]:
        assert layout_by_change((1, 8, 8, 8), other) is None


@pytest.mark.parametrize(
    ("size", "full", "stride"),
    [((12, 13), (96, 99), (8, 8)), ((5,), (9,), (2,)), ((4,), (9,), (2,)), ((6,), (9,), None)],
)
def test_strides(size, full, stride):
    assert stride_of(size, full) == stride


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (channels_first, (2, 3, 4, 5)),
        (channels_last, (2, 4, 5, 3)),
        (Tokens((4, 5)), (2, 20, 3)),
        (Tokens((4, 5), class_token=True), (2, 21, 3)),
    ],
)
def test_pulling_back_undoes_a_layout(layout, shape):
    raw = random_input(*shape)
    moved = layout(raw)
    assert moved.shape == (2, 3, 4, 5)
    assert spatial_shape(layout, shape) == (4, 5)
    expected = raw.clone()
    if math.prod(shape) > moved.numel():
        expected[:, 0] = 0
    torch.testing.assert_close(pulled_back(layout, moved, shape), expected, rtol=0, atol=0)


def test_tokens_of_another_number_are_refused():
    with pytest.raises(LayerError, match=r"takes \(B, 65, C\), not \(1, 64, 8\)"):
        Tokens((4, 4, 4), class_token=True)(torch.zeros(1, 64, 8))


# ------------------------------------------------------------ what only the network can tell


class Block(nn.Module):
    """A block as in many U-Nets: its type tells nothing."""

    def __init__(self, layers, last=False, fixed=None):
        super().__init__()
        self.layers, self.last, self.fixed = layers, last, fixed

    def forward(self, x):
        if self.fixed is not None and tuple(x.shape[2:]) != self.fixed:
            raise RuntimeError("this network takes one size")
        y = self.layers(x)
        return torch.tanh(y.movedim(1, -1) if self.last else y)


class Back(nn.Module):
    """Takes what the block gives, and where it `tells`, with a module of a known type."""

    def __init__(self, channels, last, tells):
        super().__init__()
        self.head, self.last, self.tells = nn.Conv3d(channels, 2, 1), last, tells

    def forward(self, y):
        y = y.movedim(-1, 1) if self.last else y
        return self.head(y if self.tells else 1 * y)


class Functional(nn.Module):
    """A convolution without a module, so that no type tells anything."""

    def __init__(self, channels):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(channels, 1, 3, 3, 3))

    def forward(self, x):
        return nn.functional.conv3d(x, self.kernel, padding=1)


def block_net(channels, *, last=False, functional=False, fixed=None, tells=False):
    layers = Functional(channels) if functional else nn.Conv3d(1, channels, 3, padding=1)
    return seeded(nn.Sequential(Block(layers, last, fixed), Back(channels, last, tells)))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [8, 4, 1])
def test_a_block_whose_channels_could_be_voxels(channels, last, functional):
    """Told by a convolution of the same shape, or by a longer input where that proves nothing."""
    net, x = block_net(channels, last=last, functional=functional), random_input(2, 1, 8, 8, 8)
    twin = block_net(channels, functional=functional)
    expected = (net[0].layers(x).tanh()).detach()
    activations, gradients, shapes, observed = captured(net, resolve_layers(net, "0"), x)
    (layer,) = shapes
    assert shapes[layer] == (8, 8, 8)
    torch.testing.assert_close(activations[layer], expected)
    torch.testing.assert_close(observed[layer], expected)
    _, of_twin, _, _ = captured(twin, resolve_layers(twin, "0"), x)
    torch.testing.assert_close(gradients[layer], of_twin[layer])


@pytest.mark.parametrize(
    ("channels", "functional", "tells", "known"),
    [
        (4, False, False, True),
        (8, False, False, False),
        (4, True, False, False),
        (8, True, True, True),
        (4, True, True, True),
    ],
)
def test_a_network_of_fixed_size_is_told_by_its_convolutions(channels, functional, tells, known):
    """Where all lengths are equal, a permutation would not be seen; the very tensor tells."""
    net = block_net(channels, functional=functional, fixed=(8, 8, 8), tells=tells)
    x = random_input(2, 1, 8, 8, 8)
    layers = resolve_layers(net, "0")
    if known:
        assert captured(net, layers, x)[2] == {layers[0]: (8, 8, 8)}
        return
    message = (
        rf"layer '0' gives \(2, {channels}, 8, 8, 8\).*: {channels} channels first, on a grid "
        r"\(8, 8, 8\), or 8 channels last.*Say which with reshape_transform=channels_first or"
    )
    with pytest.raises(LayerError, match=message):
        captured(net, layers, x)
    layers = resolve_layers(net, "0", channels_first)
    assert captured(net, layers, x)[2] == {layers[0]: (8, 8, 8)}


def test_a_matrix_of_attention_weights_is_no_image():
    """(B, heads, N, N) looks like one, but both its last axes follow the input's."""

    class Attention(nn.Module):
        def forward(self, x):
            tokens = nn.functional.avg_pool2d(x, 4).flatten(2)
            return (tokens.transpose(1, 2) @ tokens)[:, None].expand(-1, 2, -1, -1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = Attention(), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.head(x) * self.attention(x).mean()

    net = Net().double()
    with pytest.raises(LayerError, match="or no image"):
        captured(net, resolve_layers(net, "attention"), random_input(1, 1, 16, 16))


def test_finding_out_leaves_no_trace():
    net = block_net(8)
    layers = resolve_layers(net, "0")
    rng = torch.get_rng_state()
    captured(net, layers, random_input(1, 1, 8, 8, 8))
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class Cat(nn.Module):
    """A skip connection around the coarser level, as MONAI's UNet has."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv3d(4, 4, 2, stride=2)
        self.up = nn.Sequential(nn.ConvTranspose3d(4, 4, 2, stride=2), nn.Dropout(0.2))

    def forward(self, x):
        return torch.cat([x, self.up(self.down(x))], 1)


def count_runs(net):
    """Return a list that grows with every run of the network's first convolution."""
    runs = []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("mode", ["count", "observe", "leaf"])
@pytest.mark.parametrize("layers", [["2"], ["0", "1", "2", "2.up", "2.up.1"], ["1"]])
@pytest.mark.parametrize("size", [(8, 8, 8), (4, 4, 8), (8, 8, 4)])
def test_what_modules_take_and_give_costs_no_pass(mode, layers, size):
    """Concatenated, activated, dropped out: the very tensor goes on to a module that tells."""
    net = seeded(
        nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(True), Cat(), nn.Conv3d(8, 2, 1))
    )
    runs, x = count_runs(net), random_input(2, 1, *size)
    given = {}
    for name in layers:
        net.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: given.update({name: o.detach().clone()})
        )
    net(x)
    runs.clear()
    with capturing(net, resolve_layers(net, layers)) as capture:
        if mode == "leaf":
            capture.forward(x)
        else:
            capture.observe(x, copy=mode == "observe")
        assert {str(k): v for k, v in capture.shapes.items()} == {
            k: tuple(v.shape[2:]) for k, v in given.items()
        }
        # What is overwritten after the layer is seen to be only afterwards.
        assert len(runs) == (2 if mode == "observe" and "0" in layers else 1)
        for layer, found in capture.activations.items():
            torch.testing.assert_close(found, given[str(layer)])


def test_modules_that_contradict_each_other_settle_nothing():
    """A convolution and a Linear take the same tensor: longer inputs decide."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(8), nn.Conv3d(8, 8, 1)

        def forward(self, y):
            return self.norm(self.conv(y))

    net = seeded(nn.Sequential(nn.Conv3d(1, 8, 1), Both(), nn.Conv3d(8, 2, 1)))
    x = random_input(1, 1, 8, 8, 8)
    with (
        capturing(net, resolve_layers(net, "1")) as capture,
        pytest.raises(LayerError, match="Say which"),
    ):
        capture.observe(x, copy=False)  # a LayerNorm refuses longer inputs


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_what_was_found_out_is_kept():
    net, x = block_net(8, functional=True), random_input(1, 1, 8, 8, 8)
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    layers = resolve_layers(net, "0")
    for passes in (3, 1):
        runs.clear()
        with capturing(net, layers) as capture:
            capture.forward(x)
        assert len(runs) == passes
        assert capture.known.layouts == {layers[0]: channels_first}


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("functional", [True, False])
def test_the_second_call_of_a_cam_costs_one_pass(functional):
    net, x = block_net(8, functional=functional), random_input(1, 1, 8, 8, 8)
    runs = []
    net.register_forward_pre_hook(lambda *_: runs.append(1))
    cam = HiResCAM(net, "0")
    cam(x, VOLUME)
    assert len(runs) > 1  # for the layout, the grid, and whether the gradient tells the truth
    for again in (cam, HiResCAM(net, "0")):
        runs.clear()
        again(x, VOLUME)
        assert len(runs) == 1


# -------------------------------------------------------------------------- a user's own layout


def by_hand(raw):
    """The usual reshape_transform of other tools."""
    grid = raw[:, 1:, :].reshape(raw.shape[0], 2, 3, 5, raw.shape[2])
    return grid.permute(0, 4, 1, 2, 3)


def of_all_tokens(raw):
    """As `by_hand`, of a network without a class token: the very first value is used, too."""
    return raw.reshape(raw.shape[0], 2, 3, 5, raw.shape[2]).permute(0, 4, 1, 2, 3)


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(
    ("kind", "transform"),
    [
        ("tokens and class", by_hand),
        ("tokens and class", Tokens((2, 3, 5), class_token=True)),
        ("tokens", of_all_tokens),
    ],
)
def test_a_users_layout_is_used(kind, transform):
    net, x = patches(3, kind), random_input(2, 1, 8, 12, 20)
    (layer,) = resolve_layers(net, "mix", transform)
    activations, gradients, _, _ = captured(net, [layer], x)
    twin = patches(3, "first")
    expected, expected_gradients, _, _ = captured(twin, resolve_layers(twin, "mix"), x)
    torch.testing.assert_close(activations, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda raw: raw.reshape(2, 7, 7), "reshape_transform fails on it: shape"),
        (Tokens((4, 4, 4)), r"reshape_transform fails on it: Tokens.* takes \(B, 64, C\)"),
        (lambda raw: raw, r"turns that into \(2, 31, 6\); a map needs \(B, C, \*s\) with B = 2"),
        (lambda raw: None, "turns that into NoneType"),
        (lambda raw: by_hand(raw)[:1], r"turns that into \(1, 6, 2, 3, 5\)"),
        (lambda raw: by_hand(raw).reshape(2, 1, 30, 2, 3), r"s at most \(8, 12, 20\)"),
        (lambda raw: by_hand(raw)[..., :0], r"turns that into \(2, 6, 2, 3, 0\)"),
        (lambda raw: 2 * by_hand(raw), "must only move values"),
        (lambda raw: by_hand(raw).relu(), "must only move values"),
        (lambda raw: by_hand(raw).mean(1, keepdim=True), "must only move values"),
        (lambda raw: by_hand(raw)[:, [0, 0, 1]], "must only move values, each to one place"),
        (lambda raw: by_hand(raw).flip(0), "within its own item of the batch"),
        (lambda raw: by_hand(raw) / 0, "must only move values"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(transform, message):
    net = patches(3, "tokens and class")
    layers = resolve_layers(net, "mix", transform)
    with (
        capturing(net, layers) as capture,
        pytest.raises(LayerError, match=r"layer 'mix' gives \(2, 31, 6\)") as caught,
    ):
        capture.forward(random_input(2, 1, 8, 12, 20))
    assert caught.match(message)


def test_what_is_no_function_is_refused():
    with pytest.raises(LayerError, match=r"must be a function from what the layer gives.*'last'"):
        resolve_layers(patches(3, "last"), "mix", "last")
