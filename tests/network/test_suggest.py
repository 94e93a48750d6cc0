"""The layers that are suggested are the documented ones, and the network stays as it was."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from helpers_networks import CLASSES, dynunet, nnunet, unet
from monai.networks import nets
from torch import nn
from torch.nn import functional as F  # noqa: N812

from seg3dcam import GradCAM, HiResCAM, suggest_layers, targets
from seg3dcam.errors import InputError, LayerError, ModelError
from seg3dcam.network.layers import resolve_layers


def plain_conv_unet(**settings):
    return nnunet(PlainConvUNet, "n_conv_per_stage", **settings)


def residual_encoder_unet(**settings):
    return nnunet(ResidualEncoderUNet, "n_blocks_per_stage", **settings)


NNUNET = {
    "encoder.stages.3": (4, 8, 8),
    "decoder.stages.0": (2, 4, 4),
    "decoder.stages.1": (1, 2, 2),
    "decoder.stages.2": 1,
}


# name: how to make it, shape, {layer: stride}, the bottleneck first, then the decoder. The strides
# double, but for DynUNet's first level, which leaves the thick slices alone. The levels of the
# encoder are in `helpers_networks`.
NETWORKS = {
    "UNet": (
        unet,
        (16, 24, 32),
        {
            "model.1.submodule.1.submodule.1.submodule": 8,
            "model.1.submodule.1": 4,
            "model.1": 2,
        },
    ),
    "UNet, residual": (
        lambda: unet(num_res_units=2),
        (16, 24, 32),
        {
            "model.1.submodule.1.submodule.1.submodule": 8,
            "model.1.submodule.1": 4,
            "model.1": 2,
        },
    ),
    "UNet, 2D": (
        lambda: unet(2, (4, 6, 8)),
        (32, 48),
        {"model.1.submodule.1.submodule": 4, "model.1": 2},
    ),
    "BasicUNet": (
        lambda: nets.BasicUNet(3, 1, CLASSES, features=(4, 4, 6, 8, 10, 4)),
        (16, 32, 32),
        {"down_4": 16, "upcat_4": 8, "upcat_3": 4, "upcat_2": 2, "upcat_1": 1},
    ),
    "DynUNet": (
        dynunet,
        (8, 32, 48),
        {
            "bottleneck": (4, 8, 8),
            "upsamples.0": (2, 4, 4),
            "upsamples.1": (1, 2, 2),
            "upsamples.2": 1,
        },
    ),
    "DynUNet, deep supervision": (
        lambda: dynunet(deep_supervision=True, deep_supr_num=2),
        (8, 32, 48),
        {
            "bottleneck": (4, 8, 8),
            "upsamples.0": (2, 4, 4),
            "upsamples.1": (1, 2, 2),
            "upsamples.2": 1,
        },
    ),
    "SegResNet": (
        lambda: nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=CLASSES),
        (16, 24, 32),
        {"down_layers.3": 8, "up_layers.0": 4, "up_layers.1": 2, "up_layers.2": 1},
    ),
    "SegResNetVAE": (
        lambda: nets.SegResNetVAE(
            (16, 16, 16), vae_nz=4, init_filters=8, in_channels=1, out_channels=CLASSES
        ),
        (16, 16, 16),
        {"down_layers.3": 8, "up_layers.0": 4, "up_layers.1": 2, "up_layers.2": 1},
    ),
    "AttentionUnet": (
        lambda: nets.AttentionUnet(3, 1, CLASSES, channels=(4, 6, 8), strides=(2, 2)),
        (16, 24, 32),
        {"model.1.submodule.1.submodule": 4, "model.1.submodule": 2, "model.1": 1},
    ),
    "VNet": (
        lambda: nets.VNet(3, 1, CLASSES),
        (16, 16, 32),
        {"down_tr256": 16, "up_tr256": 8, "up_tr128": 4, "up_tr64": 2, "up_tr32": 1},
    ),
    "PlainConvUNet": (plain_conv_unet, (16, 32, 48), NNUNET),
    "PlainConvUNet, cube": (plain_conv_unet, (32, 32, 32), NNUNET),  # channels 8 at 8 voxels
    "PlainConvUNet, deep supervision": (
        lambda: plain_conv_unet(deep_supervision=True),
        (16, 32, 48),
        NNUNET,
    ),
    "ResidualEncoderUNet": (residual_encoder_unet, (16, 32, 48), NNUNET),
    "ResidualEncoderUNet, deep supervision": (
        lambda: residual_encoder_unet(deep_supervision=True),
        (16, 32, 48),
        NNUNET,
    ),
    "BasicUNet++": (
        lambda: nets.BasicUNetPlusPlus(3, 1, CLASSES, features=(4, 4, 6, 8, 10, 4)),
        (16, 32, 48),
        {"conv_4_0": 16, "upcat_3_1": 8, "upcat_2_2": 4, "upcat_1_3": 2, "upcat_0_4": 1},
    ),
    "SegResNetDS": (
        lambda: nets.SegResNetDS(3, 8, 1, CLASSES, blocks_down=(1, 1, 1, 1), dsdepth=2),
        (16, 24, 32),
        {
            "encoder.layers.3.blocks": 8,
            "up_layers.0.blocks": 4,
            "up_layers.1.blocks": 2,
            "up_layers.2.blocks": 1,
        },
    ),
    "FlexibleUNet": (
        lambda: nets.FlexibleUNet(1, CLASSES, "resnet10", spatial_dims=2),
        (64, 96),
        {
            "encoder.layer4": 32,
            "decoder.blocks.0": 16,
            "decoder.blocks.1": 8,
            "decoder.blocks.2": 4,
            "decoder.blocks.3": 2,
            "decoder": 1,
        },
    ),
    "HighResNet": (lambda: nets.HighResNet(2, 1, CLASSES), (16, 24), {"blocks.5": 1}),
    "UNETR": (
        lambda: nets.UNETR(
            1, CLASSES, (32, 32, 48), 4, hidden_size=24, mlp_dim=32, num_heads=2, qkv_bias=True
        ),
        (32, 32, 48),
        {"vit.norm": 16, "decoder5": 8, "decoder4": 4, "decoder3": 2, "decoder2": 1},
    ),
    "SwinUNETR, 2D": (
        lambda: nets.SwinUNETR(
            1, CLASSES, feature_size=12, depths=(1,) * 4, num_heads=(3,) * 4, spatial_dims=2
        ),
        (64, 64),
        {"encoder10": 32, **{f"decoder{level}": 2 ** (level - 1) for level in (5, 4, 3, 2, 1)}},
    ),
}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def after(found):
    """Return the suggestions without those before the bottleneck, and beside the middle."""
    return [s for s in found if s.role in ("bottleneck", "middle", "decoder")]


def decoded(net, shape, **more):
    """Return the suggestions of a network without those before the bottleneck."""
    return after(suggest_layers(net, shape, **more))


def as_expected(layers, ndim):
    return {
        name: (stride,) * ndim if isinstance(stride, int) else stride
        for name, stride in layers.items()
    }


#: One of every kind: plain, of slices, with transposed convolutions and deep supervision, with a
#: branch, of one resolution, of tokens.
QUICK = (
    "UNet, 2D",
    "DynUNet, deep supervision",
    "SegResNet",
    "FlexibleUNet",
    "HighResNet",
    "SwinUNETR, 2D",
)


def each(table):
    """Parametrise a test over a table; of the real networks all but a few are slow."""
    slow = {*NETWORKS, "EfficientNet", "SEResNet"} - {*QUICK}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in table]
    )


@each(NETWORKS)
def test_the_documented_layers_are_suggested(name):
    make, shape, layers = NETWORKS[name]
    net = seeded(make)
    modes = [module.training for module in net.modules()]
    numbers = {key: value.clone() for key, value in net.state_dict().items()}
    rng = torch.get_rng_state()

    every = suggest_layers(net, (2, 1, *shape))

    found = after(every)
    assert found == every[: len(found)]
    assert not any(s.auto for s in every[1:])
    assert {s.name: s.stride for s in found} == as_expected(layers, len(shape))
    first = "middle" if name == "HighResNet" else "bottleneck"  # it has one resolution
    assert [s.role for s in found] == [first] + ["decoder"] * (len(found) - 1)
    assert [s.auto for s in found] == [True] + [False] * (len(found) - 1)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, numbers[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["UNet", "SegResNet", "UNet, 2D"])
def test_what_is_said_of_a_suggestion_is_true_of_the_layer(name):
    """Its shape and size are those of the tensor that the layer gives."""
    make, shape, _ = NETWORKS[name]
    net = seeded(make).eval()
    given = {}
    for suggestion in suggest_layers(net, (1, 1, *shape)):
        (layer,) = resolve_layers(net, suggestion.name)
        handle = layer.module.register_forward_hook(
            lambda module, args, output, layer=layer: given.update({str(layer): layer.pick(output)})
        )
        with torch.no_grad():
            net(torch.zeros(1, 1, *shape))
        handle.remove()
        tensor = given[suggestion.name]
        assert suggestion.shape == tuple(tensor.shape[1:])
        assert suggestion.megabytes == pytest.approx(tensor.numel() * 4 / 1e6)
        assert len(suggestion.reason) > 20


@pytest.mark.slow
def test_swin_unetr():
    net = nets.SwinUNETR(1, CLASSES, feature_size=12, depths=(1,) * 4, num_heads=(3,) * 4)
    found = {s.name: s.stride[0] for s in after(suggest_layers(net, (1, 1, 32, 32, 64)))}
    assert found == {
        "encoder10": 32,
        **{f"decoder{level}": 2 ** (level - 1) for level in (5, 4, 3, 2, 1)},
    }


def vit(**settings):
    return nets.ViT(1, (32, 32), (8, 8), 12, 16, 3, 2, spatial_dims=2, **settings)


def test_a_transformer_that_classifies_gets_the_last_block_whose_patches_count():
    """Of the last block the class token alone is read, so its patches have no gradient."""
    net = seeded(lambda: vit(classification=True, num_classes=4))
    (only,) = suggest_layers(net, (1, 1, 32, 32), output=0)
    layer = "blocks.2.norm1"  # through which alone the last block reads them
    assert (only.name, only.shape, only.stride) == (layer, (12, 4, 4), (8, 8))
    result = GradCAM(net, output=0)(torch.rand(1, 1, 32, 32), targets.ClassLogit(1, "volume"))
    assert result.native[layer].shape == (1, 4, 4)
    assert result.native[layer].any()


class PatchesThenHead(nn.Module):
    """An embedding, a block of tokens that mixes none of them, a final norm, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.norm = nn.LayerNorm(6)
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
        self.head = nn.ConvTranspose2d(6, CLASSES, 4, 4)

    def forward(self, x):
        grid = self.embed(x)
        tokens = self.blocks(grid.flatten(2).transpose(1, 2))
        return self.head(self.norm(tokens).transpose(1, 2).unflatten(2, grid.shape[2:]))


def test_an_embedding_is_the_bottleneck_only_where_nothing_looks_further():
    net = seeded(PatchesThenHead)
    net.norm = nn.Identity()
    assert suggest_layers(net, (1, 1, 16, 24))[0].name == "blocks"
    net.blocks = nn.Identity()
    assert suggest_layers(net, (1, 1, 16, 24))[0].name == "embed"


@pytest.mark.parametrize("without", ["", "blocks"])
def test_where_a_norm_alone_reads_a_layer_the_norm_is_suggested(without):
    """It forgets how long tokens are: before it, activations times gradients are rounding."""
    net, x = seeded(PatchesThenHead), torch.rand(1, 1, 16, 24)
    if without:
        setattr(net, without, nn.Identity())
    before = "embed" if without else "blocks"
    assert suggest_layers(net, x.shape)[0].name == "norm"
    result = HiResCAM(net, ["norm", before])(x, targets.ClassLogit(1, "volume"))
    assert result.native["norm"].abs().max() > 100 * result.native[before].abs().max()


# ------------------------------------------------------------------------------ one resolution


def convolutions(*channels, dilation=1, norm=False):
    """Return blocks of a 3x3 convolution and an activation, which no dead unit silences."""
    parts = []
    for before, after in pairwise(channels):
        parts.append(nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation))
        parts += [nn.InstanceNorm2d(after)] * norm + [nn.LeakyReLU()]
    return parts


class Parallel(nn.Module):
    """Two branches of four convolutions each, side by side, between a first one and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b = (nn.Sequential(*convolutions(4, 4, 4, 4, 4)) for _ in range(2))
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


class Larger(nn.Module):
    """A network whose output is finer than its input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*convolutions(1, 8, 8, 8))
        self.up = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.PixelShuffle(2))
        self.end = nn.Conv2d(4, CLASSES, 3, padding=1)

    def forward(self, x):
        return self.end(self.up(self.body(x)))


ONE_RESOLUTION = {
    # name: how to make it, layer, depth, whole depth. Of layers equally near to the middle the one
    # before; of one convolution and its activation the outer module, as at every level.
    "stack": (
        lambda: nn.Sequential(*convolutions(1, 4, 4, 4, 4, 4), nn.Conv2d(4, 3, 1)),
        "4",
        3,
        6,
    ),
    "stack, normalised": (
        lambda: nn.Sequential(*convolutions(1, 4, 4, 4, 4, norm=True), nn.Conv2d(4, 3, 1)),
        "3",
        2,
        5,
    ),
    "as many channels as classes": (
        lambda: nn.Sequential(*convolutions(1, 3, 3, 3, 3, 3), nn.Conv2d(3, 3, 1), nn.Softmax(1)),
        "4",
        3,
        6,
    ),
    "blocks": (
        lambda: nn.Sequential(
            *(nn.Sequential(*convolutions(c, 4)) for c in (1, 4, 4, 4)), nn.Conv2d(4, 3, 3, 1, 1)
        ),
        "1",
        2,
        5,
    ),
    "two branches": (Parallel, "b.2", 3, 6),
    "finer output": (Larger, "body.2", 2, 5),
    "coarse output": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), *convolutions(4, 4, 4, 4, 4), nn.Conv2d(4, 3, 1)
        ),
        "3",
        3,
        6,
    ),
}


@pytest.mark.parametrize("name", ONE_RESOLUTION)
def test_where_no_level_is_coarser_than_the_output_the_middle_is_taken(name):
    """The last layer, right before the head, would give the mask again."""
    make, layer, depth, whole = ONE_RESOLUTION[name]
    (only,) = decoded(seeded(make), (1, 1, 12, 16), output=lambda given: given)
    assert (only.name, only.role, only.auto) == (layer, "middle", True)
    assert f"no bottleneck; it lies {depth} of {whole} layers deep" in only.reason
    assert "coarsest" not in only.reason


#: name -> layers after the middle, and before it, the nearest first.
BESIDE_THE_MIDDLE = {
    "stack": (["8"], ["2", "0"]),
    "blocks": (["3"], ["0"]),
    "two branches": (["b"], ["b.0", "stem"]),
    "coarse output": (["7"], ["1", "0"]),
}


@pytest.mark.parametrize("name", BESIDE_THE_MIDDLE)
def test_layers_are_spread_over_the_depth_where_there_is_a_middle(name):
    late, early = BESIDE_THE_MIDDLE[name]
    found = suggest_layers(seeded(ONE_RESOLUTION[name][0]), (1, 1, 12, 16))
    assert [s.name for s in found if s.role == "late"] == late
    assert [s.name for s in found if s.role == "early"] == early
    assert [s.role for s in found] == ["middle", *["late"] * len(late), *["early"] * len(early)]
    for s in found[1:]:
        depth, whole = map(int, s.reason.removeprefix("it lies ").split(" layers")[0].split(" of "))
        assert (2 * depth > whole) == (s.role == "late")


@pytest.mark.parametrize("dilation", [1, 2])
def test_dilated_convolutions_are_told_of(dilation):
    net = small(*convolutions(1, 4, 4, 4, dilation=dilation), nn.Conv2d(4, CLASSES, 1))
    (only,) = decoded(net, (1, 1, 12, 16))
    assert ("dilated" in only.reason) == (dilation > 1)


def test_a_classifier_of_one_resolution_keeps_its_last_layer():
    """What it tells of is one for the whole image: there is no mask to echo."""
    net = small(
        *convolutions(1, 4, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    (only,) = decoded(net, (1, 1, 12, 16))
    assert (only.name, only.role) == ("4", "bottleneck")
    assert only.reason == "the network's one level; all evidence for the classes passes through it"


# ------------------------------------------------------------------------- what is joined


class Dense(nn.Module):
    """Each layer adds a few channels to all those before."""

    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LeakyReLU(), nn.Conv2d(channels + n * growth, growth, 3, padding=1))
            for n in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.down = Dense(1, 4, 2), nn.Conv2d(9, 8, 3, 2, 1)
        self.bottom, self.up = Dense(8, 4, 3), nn.ConvTranspose2d(20, 8, 2, 2)
        self.last, self.head = Dense(17, 4, 2), nn.Conv2d(25, CLASSES, 1)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, self.up(self.bottom(self.down(x)))], 1)
        return self.head(self.last(x))


class Branches(nn.Module):
    """Branches of one input, side by side, as in Inception and SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


def test_of_a_dense_block_all_channels_are_taken():
    """A dense layer's own output is only its share."""
    assert {s.name: s.shape[0] for s in decoded(seeded(DenseUNet), (1, 1, 16, 24))} == {
        "bottom": 20,
        "last": 25,
    }
    net = seeded(lambda: nets.DenseNet(2, 1, CLASSES, 8, 4, (2, 3), 2))
    (only,) = decoded(net, (1, 1, 32, 48))
    assert (only.name, only.shape) == ("features.denseblock2", (20, 4, 6))


def test_of_branches_side_by_side_all_are_taken():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    net = small(nn.Conv2d(1, 4, 3, 2, 1), Branches(), *head)
    (only,) = decoded(net, (1, 1, 16, 24))
    assert (only.name, only.shape[0]) == ("1", 8)


class Coded(nn.Module):
    """An autoencoder whose code has no place: one voxel, or a vector."""

    def __init__(self, vector):
        super().__init__()
        parts = [nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(4, 6, 3, 2, 1)]
        self.encode = nn.Sequential(*parts, nn.LeakyReLU(), nn.Conv2d(6, 8, 4))
        self.code = nn.Linear(8, 8) if vector else None
        parts = [nn.ConvTranspose2d(8, 6, 4), nn.LeakyReLU(), nn.ConvTranspose2d(6, 4, 2, 2)]
        self.decode = nn.Sequential(*parts, nn.ConvTranspose2d(4, CLASSES, 2, 2))

    def forward(self, x):
        code = self.encode(x)
        if self.code is not None:
            code = self.code(code.flatten(1))[..., None, None]
        return self.decode(code)


@pytest.mark.parametrize("vector", [False, True])
def test_what_is_made_from_a_code_without_places_is_no_bottleneck(vector):
    """The last level that has places of the scan is; those behind it are made up by the decoder."""
    found = decoded(seeded(lambda: Coded(vector)), (1, 1, 16, 16))
    assert [(s.name, s.role) for s in found] == [
        ("encode.2", "bottleneck"),
        ("decode.2", "decoder"),
    ]


class TwoEncoders(nn.Module):
    """The second encoder runs after the first, which is coarser, and has nothing of it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1))
        self.b, self.up = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.ConvTranspose2d(8, CLASSES, 2, 2)

    def forward(self, x):
        a = self.a(x)
        return self.head(torch.cat([self.b(x), self.up(a)], 1))


def test_an_encoder_that_runs_later_is_no_decoder():
    net = seeded(TwoEncoders)
    assert [s.name for s in decoded(net, (1, 1, 16, 24))] == ["a", "up"]
    net.up = nn.Upsample(scale_factor=2)
    net.head = nn.ConvTranspose2d(10, CLASSES, 2, 2)
    assert [s.name for s in decoded(net, (1, 1, 16, 24))] == ["a"]


def test_encoder_levels_lead_to_the_bottleneck():
    """Of a second encoder, from which the bottleneck has nothing, none is named."""
    found = suggest_layers(seeded(TwoEncoders), (1, 1, 16, 24))
    assert [(s.name, s.role) for s in found] == [
        ("a", "bottleneck"),
        ("up", "decoder"),
        ("a.0", "encoder"),
    ]
    assert "its map leaves out the evidence that reaches the mask around it" in found[-1].reason


class Join(nn.Module):
    def forward(self, one, other):
        return one + other


class Summed(nn.Module):
    """A sum whose module is named deeper than its summands, before a strided convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.parts = nn.ModuleDict({"join": Join()})
        self.down, self.up = nn.Conv2d(4, 6, 3, 2, 1), nn.ConvTranspose2d(6, CLASSES, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.up(self.down(self.parts["join"](x, self.conv(x))))


def test_of_residual_blocks_in_the_encoder_the_sum_is_taken():
    found = suggest_layers(seeded(Summed), (1, 1, 16, 24))
    assert [s.name for s in found] == ["down", "parts.join"]


class BesideEncoder(nn.Module):
    """Two branches make the bottleneck, and a deeper one leads around it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, 4, 3, padding=1) for _ in range(2))
        self.around = nn.Sequential(*convolutions(1, 4, 4))
        self.down, self.up = nn.Conv2d(8, 6, 3, 2, 1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.Conv2d(8, CLASSES, 3, padding=1)

    def forward(self, x):
        up = self.up(self.down(torch.cat([self.a(x), self.b(x)], 1)))
        return self.head(torch.cat([up, self.around(x)], 1))


def test_a_branch_around_the_bottleneck_is_no_level_of_its_encoder():
    found = suggest_layers(seeded(BesideEncoder), (1, 1, 16, 24))
    assert [(s.name, s.role) for s in found] == [
        ("down", "bottleneck"),
        ("up", "decoder"),
        ("b", "encoder"),
    ]


def test_of_a_dense_block_in_the_encoder_all_channels_are_taken():
    found = suggest_layers(seeded(DenseUNet), (1, 1, 16, 24))
    assert [(s.name, s.shape[0]) for s in found if s.role == "encoder"] == [("first", 9)]


def test_a_level_that_is_the_bottleneck_resized_is_not_suggested():
    """Some classifiers pool to a fixed grid, which small images make larger."""
    end = [nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(4 * 64, CLASSES)]
    (only,) = decoded(small(nn.Conv2d(1, 4, 3, 4, 1), *end), (1, 1, 16, 16))
    assert (only.name, only.stride) == ("0", (4, 4))


# ------------------------------------------------------------------------- what is said is true


def with_softmax():
    return nn.Sequential(unet(2, (4, 6, 8)), nn.Softmax(1))


TOLD = {
    "UNet": (*NETWORKS["UNet"][:2], None),
    "UNet, residual": (*NETWORKS["UNet, residual"][:2], None),
    "UNet and softmax": (with_softmax, (32, 48), None),
    "BasicUNet": (*NETWORKS["BasicUNet"][:2], None),
    "DynUNet": (*NETWORKS["DynUNet"][:2], None),
    "AttentionUnet": (*NETWORKS["AttentionUnet"][:2], None),
    "UNETR": (*NETWORKS["UNETR"][:2], None),
    "SwinUNETR, 2D": (*NETWORKS["SwinUNETR, 2D"][:2], None),
    "HighResNet": (*NETWORKS["HighResNet"][:2], None),
    "ViT classifier": (lambda: vit(classification=True, num_classes=4), (32, 32), 0),
    "DenseNet": (lambda: nets.DenseNet(2, 1, 4, 8, 4, (2, 3), 2), (32, 48), None),
    "ResNet": (lambda: nets.resnet10(spatial_dims=2, n_input_channels=1), (32, 48), None),
    "EfficientNet": (
        lambda: nets.EfficientNetBN("efficientnet-b0", False, True, 2, 1, 4),
        (64, 96),
        None,
    ),
    "SEResNet": (lambda: nets.SEResNet50(spatial_dims=2, in_channels=1), (64, 96), None),
    "AutoEncoder": (lambda: nets.AutoEncoder(2, 1, 3, (4, 8), (2, 2)), (16, 24), None),
    "dense blocks": (DenseUNet, (16, 24), None),
    "patches": (PatchesThenHead, (16, 24), None),
    "code": (lambda: Coded(False), (16, 16), None),
    "two branches": (Parallel, (12, 16), None),
    "stack": (ONE_RESOLUTION["stack"][0], (12, 16), None),
}


@each(TOLD)
def test_all_evidence_passes_a_layer_exactly_where_it_is_said(name):
    """Where the layer's output is cut off from its past, no gradient is left at the input."""
    make, shape, output = TOLD[name]
    net = seeded(make).eval()
    x = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1))
    for suggestion in suggest_layers(net, x.shape, output=output):
        (layer,) = resolve_layers(net, suggestion.name)
        handle = layer.module.register_forward_hook(
            lambda module, args, given, layer=layer: layer.put(given, layer.pick(given).detach())
        )
        given = net(x.requires_grad_())
        handle.remove()
        logits = given if output is None else given[output]
        left = False
        if logits.requires_grad:
            weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2))
            (gradient,) = torch.autograd.grad(logits, x, weights, allow_unused=True)
            left = gradient is not None and bool(gradient.any())
        if suggestion.role != "decoder":
            assert ("all evidence" in suggestion.reason) == (not left)
            assert ("around it" in suggestion.reason) == left
        assert ("classes" in suggestion.reason) == (logits.ndim == 2 and "mask" not in name)
        assert ("mask" in suggestion.reason) == (logits.ndim > 2)


class WithClassToken(nn.Module):
    """Everything goes through the tokens, a part of it through the one that has no place."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Conv2d(1, 6, 4, 4), nn.Parameter(torch.rand(1, 1, 6))
        self.mix = nn.MultiheadAttention(6, 1, batch_first=True)
        self.block, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.block(self.mix(tokens, tokens, tokens)[0]).mean(1))


def test_what_goes_through_a_class_token_the_map_leaves_out():
    (only,) = decoded(seeded(WithClassToken), (1, 1, 16, 24))
    assert (only.name, only.shape) == ("block", (6, 4, 6))
    assert "leaves out the evidence that reaches the classes around it" in only.reason


@each(name for name in TOLD if "classifier" not in name)
def test_voxels_are_read_one_by_one_where_it_is_said(name):
    """No logit, wherever it lies, depends on two voxels of such a layer."""
    make, shape, _ = TOLD[name]
    net = seeded(make).eval()
    x = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1))
    for suggestion in suggest_layers(net, x.shape):
        (layer,) = resolve_layers(net, suggestion.name)
        kept = []
        handle = layer.module.register_forward_hook(
            lambda module, args, given, layer=layer, kept=kept: kept.append(layer.pick(given))
        )
        logits = net(x.requires_grad_())
        handle.remove()
        if logits.ndim == 2:
            assert "reads one voxel" not in suggestion.reason
            continue
        most = 0
        for step in range(8):  # beside one another: every phase of a stride
            place = [min(size // 3 + step, size - 1) for size in logits.shape[2:]]
            one = logits[(0, slice(None), *place)]
            weights = torch.linspace(1, 2, len(one))
            (gradient,) = torch.autograd.grad(one, kept[0], weights, retain_graph=True)
            channels = 2 if gradient.ndim == 3 else 1
            most = max(most, int(gradient.any(channels).count_nonzero()))
        assert ("reads one voxel" in suggestion.reason) == (most == 1)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "make",
    [
        lambda k: nets.UNet(2, 1, k, channels=(4, 6, 8), strides=(2, 2)),
        lambda k: nets.UNet(2, 1, k, channels=(4, 6, 8), strides=(2, 2), num_res_units=2),
        lambda k: nets.BasicUNet(2, 1, k, features=(4, 4, 6, 8, 10, 4)),
        lambda k: nets.SegResNet(2, init_filters=8, in_channels=1, out_channels=k),
        lambda k: nets.AttentionUnet(2, 1, k, channels=(4, 6, 8), strides=(2, 2)),
        lambda k: nets.VNet(2, 1, k),
        lambda k: nn.Sequential(*stem(), nn.Conv2d(4, k, 1), nn.Softmax(1)),
    ],
)
def test_how_many_classes_there_are_decides_nothing(make):
    """A level may have fewer channels than there are classes, or just as many."""
    few, same, many = (
        suggest_layers(seeded(partial(make, k)), (1, 1, 32, 48)) for k in (3, 4, 105)
    )
    assert len(few) > 1
    assert few == same == many


class Resized(nn.Module):
    """A head at the coarse level, whose logits are resized, alone or with those of another."""

    def __init__(self, two):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.head_a, self.head_b = nn.Conv2d(4, CLASSES, 1), nn.Conv2d(6, CLASSES, 1)
        self.two = two

    def forward(self, x):
        a = self.a(x)
        logits = nn.functional.interpolate(self.head_b(self.b(a)), scale_factor=4, mode="bilinear")
        if self.two:
            logits = logits + nn.functional.interpolate(self.head_a(a), scale_factor=2)
        return logits


@pytest.mark.parametrize("two", [False, True])
def test_a_head_whose_logits_are_resized_is_still_the_head(two):
    assert [s.name for s in decoded(seeded(lambda: Resized(two)), (1, 1, 16, 24))] == ["b"]


# ------------------------------------------------------------------------- what is never suggested


def small(*layers):
    return seeded(lambda: nn.Sequential(*layers))


def stem():
    return [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, 2)]


@pytest.mark.parametrize(
    ("end", "never"),
    [
        ([nn.Conv2d(4, CLASSES, 1)], "3"),
        ([nn.Conv2d(4, CLASSES, 1), nn.Softmax(1)], "34"),
        ([nn.Conv2d(4, CLASSES, 1), nn.Sigmoid()], "34"),
    ],
)
def test_the_logit_head_is_not_suggested(end, never):
    """Its CAM would be ReLU(logit); softmax after it makes no difference."""
    found = [s.name for s in suggest_layers(small(*stem(), *end), (1, 1, 16, 16))]
    assert found == ["0", "2"]
    assert not set(found) & set(never)


@pytest.mark.parametrize("activation", [None, nn.Softmax(1)])
def test_the_logit_head_is_not_suggested_where_nothing_is_coarser(activation):
    end = [] if activation is None else [activation]
    net = small(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1), *end)
    assert [s.name for s in suggest_layers(net, (1, 1, 8, 8))] == ["0"]


def test_a_classifier_gets_its_last_convolution():
    net = small(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )
    (only,) = decoded(net, (1, 1, 16, 24))
    assert (only.name, only.role, only.stride) == ("4", "bottleneck", (4, 4))


class Odd(nn.Module):
    """Layers that are coarser than the bottleneck but explain nothing."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(1, 4, 3, 2, 1)
        self.unused = nn.Conv2d(4, 4, 3, 2, 1)
        self.twice = nn.AvgPool2d(4, 4)
        self.zeroed = nn.Conv2d(4, 4, 3, 2, 1)
        self.overwritten = nn.Conv2d(4, 4, 4, 4)
        self.up = nn.ConvTranspose2d(4, CLASSES, 2, 2)

    def forward(self, x):
        features = self.good(x)
        self.unused(features)
        zero = 0 * self.zeroed(features).mean()
        pooled = (self.twice(features) - self.twice(-features)).mean()
        changed = self.overwritten(features).relu_().mean()
        return self.up(features + zero + pooled + changed)


def test_layers_that_explain_nothing_are_not_suggested():
    """Unused, without gradient, run twice, or changed in place afterwards."""
    (only,) = decoded(seeded(Odd), (1, 1, 16, 16))
    assert (only.name, only.stride) == ("good", (2, 2))


def test_the_chosen_output_decides():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(*stem(), nn.Conv2d(4, 2, 1)) for _ in range(2))

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    net = seeded(TwoHeads)
    for head in "ab":
        found = suggest_layers(net, (1, 1, 16, 16), output=head)
        assert [s.name for s in found] == [f"{head}.0", f"{head}.2"]
    with pytest.raises(ModelError, match=r"which: output='a' .*, output='b'"):
        suggest_layers(net, (1, 1, 16, 16))


def test_an_element_of_a_tuple_is_suggested_with_its_brackets():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, 2, 1)

        def forward(self, x):
            features = self.conv(x)
            return [x * 2, features.relu()]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.up = Encoder(), nn.ConvTranspose2d(4, 2, 2, 2)

        def forward(self, x):
            return self.up(self.encoder(x)[1])

    net = seeded(Net)
    assert suggest_layers(net, (1, 1, 16, 16))[0].name == "encoder[1]"
    result = GradCAM(net, "auto")(torch.rand(1, 1, 16, 16), targets.MaskOutput())
    assert list(result.maps) == ["encoder[1]"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_networks_have_the_names_of_the_inner_one(wrap):
    net = small(*stem(), nn.Conv2d(4, CLASSES, 1))
    assert suggest_layers(wrap(net), (1, 1, 16, 16)) == suggest_layers(net, (1, 1, 16, 16))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_networks_of_any_precision(frozen, dtype):
    net = small(*stem(), nn.Conv2d(4, CLASSES, 1)).to(dtype).requires_grad_(not frozen)
    with torch.no_grad():
        found = suggest_layers(net, (1, 1, 16, 16))
    assert [s.name for s in found] == ["0", "2"]
    assert found[0].megabytes == 4 * 8 * 8 * dtype.itemsize / 1e6


# ------------------------------------------------------------------- pooled to a fixed size


class PyramidPooling(nn.Module):
    """PSPNet: an encoder of a quarter, beside it its means over 1, 2, 3 and 6 parts of an axis."""

    def __init__(self, ndim):
        super().__init__()
        conv = nn.Conv3d if ndim == 3 else nn.Conv2d
        self.pool = nn.AdaptiveAvgPool3d if ndim == 3 else nn.AdaptiveAvgPool2d
        encoder = [conv(1, 4, 3, 2, 1), nn.LeakyReLU(), conv(4, 8, 3, 2, 1), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*encoder)
        self.parts = nn.ModuleList(conv(8, 2, 1) for _ in range(4))
        self.head = conv(16, CLASSES, 3, padding=1)

    def forward(self, x):
        y = self.encoder(x)
        pools = [self.pool(size)(y) for size in (1, 2, 3, 6)]
        parts = [part(pooled) for part, pooled in zip(self.parts, pools, strict=True)]
        joined = torch.cat([y, *(F.interpolate(part, y.shape[2:]) for part in parts)], 1)
        return F.interpolate(self.head(joined), x.shape[2:])


@pytest.mark.parametrize(("ndim", "size"), [(2, 96), (2, 48), (3, 32)])
def test_pyramid_pooling_is_no_bottleneck(ndim, size):
    """At 48 the last of its branches halves the encoder's 12 voxels by chance."""
    net = seeded(lambda: PyramidPooling(ndim))
    shape = (1, 1, *[size] * ndim)
    (only,) = decoded(net, shape)
    assert (only.name, only.role, only.stride) == ("encoder", "bottleneck", (4,) * ndim)
    assert only.shape == (8, *[size // 4] * ndim)
    assert "all evidence for the mask passes through it" in only.reason
    grids = HiResCAM(net)(torch.rand(shape), targets.ClassLogit(1, "volume")).layers
    assert list(grids) == ["encoder"]


class ImageMean(nn.Module):
    def __init__(self, by_mean):
        super().__init__()
        self.by_mean, self.conv = by_mean, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = x.mean((2, 3), keepdim=True) if self.by_mean else F.adaptive_max_pool2d(x, 1)
        return self.conv(y).expand(-1, -1, *x.shape[2:])


class AtrousPooling(nn.Module):
    """DeepLab: dilated convolutions side by side, the image's mean beside them."""

    def __init__(self, by_mean):
        super().__init__()
        encoder = [nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(4, 8, 3, 2, 1)]
        self.encoder = nn.Sequential(*encoder, nn.LeakyReLU())
        self.near = nn.Conv2d(8, 4, 3, padding=1)
        self.far = nn.Conv2d(8, 4, 3, padding=4, dilation=4)
        self.image, self.head = ImageMean(by_mean), nn.Conv2d(12, CLASSES, 1)

    def forward(self, x):
        y = self.encoder(x)
        joined = torch.cat([self.near(y), self.far(y), self.image(y)], 1)
        return F.interpolate(self.head(joined), x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("by_mean", [False, True])
def test_a_branch_of_the_image_mean_is_no_bottleneck(by_mean):
    (only,) = decoded(seeded(lambda: AtrousPooling(by_mean)), (1, 1, 48, 64))
    assert (only.name, only.shape, only.stride) == ("encoder", (8, 12, 16), (4, 4))


class Gated(nn.Module):
    """Its parts of two voxels an axis weigh the channels of what they are made from."""

    def __init__(self):
        super().__init__()
        self.a, self.parts = nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(2)
        self.gate, self.b = nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, 2, 1)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        y = self.a(x)
        return self.head(self.up(self.b(y * torch.sigmoid(self.gate(self.parts(y))))))


def test_a_gate_is_no_bottleneck():
    found = decoded(seeded(Gated), (1, 1, 32, 32))
    assert [(s.name, s.role) for s in found] == [("b", "bottleneck"), ("up", "decoder")]


class Halved(nn.Module):
    """A U-Net whose encoder halves its image by a pool that is told the size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(F.adaptive_avg_pool2d(a, [size // 2 for size in a.shape[2:]]))
        return self.head(torch.cat([a, self.up(b)], 1))


def test_a_pool_that_follows_its_image_is_a_level():
    found = decoded(seeded(Halved), (1, 1, 32, 48))
    assert [(s.name, s.stride) for s in found] == [("b", (2, 2)), ("up", (1, 1))]


# --------------------------------------------------------------------------------- what is refused


def test_a_network_without_places_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(LayerError, match=r"no layer of Sequential gives activations with a place"):
        suggest_layers(net, (1, 1, 8, 8))


@pytest.mark.parametrize(
    "shape", [None, "abc", 5, (1, 1), (1, 1, 32.5, 32), (1, 1, 0, 32), torch.zeros(1, 1, 8, 8)]
)
def test_what_is_no_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"^input_shape .*: give whole numbers \(B, C, \*S\)"):
        suggest_layers(nn.Conv2d(1, 1, 1), shape)


def test_a_size_that_does_not_fit_is_refused():
    net = NETWORKS["UNet"][0]()
    with pytest.raises(
        ModelError, match=r"shape \(1, 1, 30, 48, 64\).*multiples of their coarsest"
    ):
        suggest_layers(net, (1, 1, 30, 48, 64))


def test_auto_is_the_suggested_bottleneck():
    make, shape, layers = NETWORKS["UNet, 2D"]
    net = seeded(make)
    result = GradCAM(net)(torch.rand(1, 1, *shape), targets.MaskOutput())
    assert list(result.layers) == list(layers)[:1]
