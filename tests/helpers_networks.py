"""The networks of the field, small, with random weights that are always the same.

One row for each network: how it is made, the size of its input, where its logits are, which layers
are suggested. Every test of `tests/field` goes through the table; a new network is one more row.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from monai.networks import nets
from torch import nn

from seg3dcam.geometry import FeatureGrid

CLASSES = 3


@functools.cache
def _network(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype)


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        make: makes it.
        shape: spatial shape of the input.
        bottleneck: the layer that "auto" is, and its stride; the middle where no level is coarser.
        role: of that layer.
        decoder: the suggested decoder levels and their strides, coarse to fine.
        encoder: the suggested encoder levels and their strides, coarse to fine; where no level is
            coarser, layers after and before the middle.
        output: what `output=` must be; None where the rule finds the logits.
        logits: what the network returned -> logits, written down by hand.
        channel_first: what the bottleneck gives -> (B, C, *s), written down by hand.
        many: a pattern for several layers.
        first_voxel: where the first feature voxel lies: strided convolutions centre it on the
            "corner", the input's first voxel, pooling on the "centre" of the voxels that it spans.
        slow: it takes seconds, and a smaller relative is in the table.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bottleneck: tuple[str, int | tuple[int, ...]]
    decoder: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    encoder: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    output: Any = None
    logits: Callable[[Any], torch.Tensor] = lambda returned: returned
    channel_first: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    many: str = ""
    role: str = "bottleneck"
    first_voxel: str = "corner"
    slow: bool = False

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the network, in train mode, as its class makes it.

        It is the same one for all tests, so that its grids are measured once.
        """
        return _network(self.make, dtype).train()

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a network like that for a test that changes it."""
        return _network.__wrapped__(self.make, dtype)

    def input(self, items: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return random images (B, 1, *S)."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(items, 1, *self.shape, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def coarse(self) -> bool:
        """Whether grids take many passes to measure, as few voxels lie in an image."""
        stride = self.bottleneck[1]
        return (stride if isinstance(stride, int) else max(stride)) >= 16

    @property
    def levels(self) -> list[str]:
        """The bottleneck and, where there are two, the finest level of the decoder but one."""
        decoder = list(self.decoder)
        return [self.bottleneck[0], *(decoder[-2:-1] or decoder)]


def first(returned: Sequence[torch.Tensor]) -> torch.Tensor:
    return returned[0]


def unet(ndim: int = 3, channels: Sequence[int] = (4, 6, 8, 10), **settings: Any) -> nn.Module:
    strides = (2,) * (len(channels) - 1)
    return nets.UNet(ndim, 1, CLASSES, channels=channels, strides=strides, **settings)


def dynunet(**settings: Any) -> nn.Module:
    kernels, strides = [[1, 3, 3], 3, 3, 3], [1, [1, 2, 2], 2, 2]
    return nets.DynUNet(
        3, 1, CLASSES, kernels, strides, strides[1:], filters=[2, 4, 6, 8], **settings
    )


def segresnet(kind: Callable[..., nn.Module] = nets.SegResNet, **settings: Any) -> nn.Module:
    return kind(
        init_filters=2,
        in_channels=1,
        out_channels=CLASSES,
        norm=("GROUP", {"num_groups": 2}),
        blocks_down=(1, 1, 1),
        blocks_up=(1, 1),
        **settings,
    )


def segresnet_ds(kind: type[nn.Module] = nets.SegResNetDS) -> nn.Module:
    return kind(3, 2, 1, CLASSES, blocks_down=(1, 1, 1), dsdepth=2)


def swin_unetr(ndim: int = 3, **settings: Any) -> nn.Module:
    return nets.SwinUNETR(
        1,
        CLASSES,
        feature_size=12,
        depths=(2, 1, 1, 1),
        num_heads=(3,) * 4,
        spatial_dims=ndim,
        **settings,
    )


def unetr(*size: int, **settings: Any) -> nn.Module:
    return nets.UNETR(
        1,
        CLASSES,
        size,
        4,
        hidden_size=24,
        mlp_dim=32,
        num_heads=2,
        qkv_bias=True,
        spatial_dims=len(size),
        **settings,
    )


def basic_unet_plus_plus(**settings: Any) -> nn.Module:
    return nets.BasicUNetPlusPlus(3, 1, CLASSES, features=(2, 4, 6, 8, 12, 2), **settings)


def mednext(ndim: int = 3, **settings: Any) -> nn.Module:
    once = (1, 1)
    return nets.MedNeXt(
        ndim, 2, 1, CLASSES, kernel_size=3, blocks_down=once, blocks_up=once, **settings
    )


def high_res_net(ndim: int = 3) -> nn.Module:
    """Make a network of one resolution, whose middle blocks are dilated."""
    layers = [
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        *({"name": "res", "n_features": n, "kernels": (3, 3), "repeat": 2} for n in (4, 6, 8)),
        {"name": "conv_1", "n_features": 10, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return nets.HighResNet(ndim, 1, CLASSES, layer_params=layers)


def vit_classifier() -> nn.Module:
    return nets.ViT(
        1,
        (32, 48),
        (8, 8),
        hidden_size=12,
        mlp_dim=16,
        num_layers=3,
        num_heads=2,
        spatial_dims=2,
        classification=True,
        num_classes=CLASSES,
    )


def nnunet(kind: type[nn.Module], blocks: str, **settings: Any) -> nn.Module:
    """Make a network as nnU-Net makes it: instance norm, in-place LeakyReLU, anisotropic."""
    return kind(
        1,
        4,
        (2, 4, 6, 8),
        nn.Conv3d,
        3,
        [1, [1, 2, 2], 2, 2],
        num_classes=CLASSES,
        n_conv_per_stage_decoder=[1] * 3,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **{blocks: [1] * 4},
        **settings,
    )


plain_conv_unet = partial(nnunet, PlainConvUNet, "n_conv_per_stage")
residual_encoder_unet = partial(nnunet, ResidualEncoderUNet, "n_blocks_per_stage")

DYNUNET = {
    "shape": (8, 16, 32),
    "bottleneck": ("bottleneck", (4, 8, 8)),
    "decoder": {"upsamples.0": (2, 4, 4), "upsamples.1": (1, 2, 2), "upsamples.2": 1},
    "encoder": {"downsamples.1": (2, 4, 4), "downsamples.0": (1, 2, 2), "input_block": 1},
    "many": "upsamples.*",
}
SEGRESNET = {
    "bottleneck": ("down_layers.2", 4),
    "decoder": {"up_layers.0": 2, "up_layers.1": 1},
    "encoder": {"down_layers.1": 2, "down_layers.0": 1},
    "many": "up_layers.*",
}
BASIC_UNET_PLUS_PLUS = {
    "shape": (16, 16, 32),
    "bottleneck": ("conv_4_0", 16),
    "decoder": {"upcat_3_1": 8, "upcat_2_2": 4, "upcat_1_3": 2, "upcat_0_4": 1},
    "encoder": {"conv_3_0": 8, "conv_2_0": 4, "conv_1_0": 2, "conv_0_0": 1},
    "many": "upcat_*_1",
    "first_voxel": "centre",
}
FLEXIBLE_UNET = {
    "bottleneck": ("encoder.layer4", 32),
    "decoder": {
        **{f"decoder.blocks.{level}": 2 ** (4 - level) for level in range(4)},
        "decoder": 1,
    },
    "encoder": {
        "encoder.layer3": 16,
        "encoder.layer2": 8,
        "encoder.layer1": 4,
        "encoder[0]": 2,
    },
    "many": "decoder.blocks.*",
    "first_voxel": "",  # max pooling after a strided convolution, nearest interpolation
}
SWIN_UNETR = {
    "bottleneck": ("encoder10", 32),
    "decoder": {f"decoder{level}": 2 ** (level - 1) for level in (5, 4, 3, 2, 1)},
    "encoder": {
        **{f"swinViT.layers{level}.0.blocks.0": 2**level for level in (4, 3, 2)},
        "swinViT.layers1.0.blocks.1": 2,
        "encoder1": 1,
    },
    "many": "decoder*",
    "first_voxel": "centre",
}
UNETR = {
    "bottleneck": ("vit.norm", 16),
    "decoder": {f"decoder{level}": 2 ** (level - 2) for level in (5, 4, 3, 2)},
    "encoder": {f"encoder{level}": 2 ** (level - 1) for level in (4, 3, 2, 1)},
    "many": "vit.blocks.*",
    "first_voxel": "centre",
}
VNET = {
    "bottleneck": ("down_tr256", 16),
    "decoder": {"up_tr256": 8, "up_tr128": 4, "up_tr64": 2, "up_tr32": 1},
    "encoder": {"down_tr128": 8, "down_tr64": 4, "down_tr32": 2, "in_tr": 1},
    "many": "up_tr*",
    "first_voxel": "centre",
}
HIGH_RES_NET = {
    "bottleneck": ("blocks.3", 1),
    "encoder": {"blocks.5": 1, "blocks.1": 1, "blocks.0": 1},
    "role": "middle",
    "many": "blocks.*",
}
MEDNEXT = {
    "shape": (16, 24, 32),
    "bottleneck": ("bottleneck", 4),
    "decoder": {"dec_stages.0": 2, "dec_stages.1": 1},
    "encoder": {"enc_stages.1": 2, "enc_stages.0": 1},
    "many": "dec_stages.*",
}
NNUNET = {
    "shape": (8, 16, 32),
    "bottleneck": ("encoder.stages.3", (4, 8, 8)),
    "decoder": {
        "decoder.stages.0": (2, 4, 4),
        "decoder.stages.1": (1, 2, 2),
        "decoder.stages.2": 1,
    },
    "encoder": {
        "encoder.stages.2": (2, 4, 4),
        "encoder.stages.1": (1, 2, 2),
        "encoder.stages.0": 1,
    },
    "many": "decoder.stages.*",
}

RESIDUAL_NNUNET = NNUNET | {"first_voxel": ""}  # strided convolutions beside average pooling

NETWORKS = {
    "UNet": Row(
        unet,
        (16, 24, 32),
        ("model.1.submodule.1.submodule.1.submodule", 8),
        {"model.1.submodule.1": 4, "model.1": 2},
        {"model.1.submodule.0": 4, "model.0": 2},
        many="model.1.**.conv",
    ),
    "UNet, residual": Row(
        partial(unet, channels=(4, 6, 8), num_res_units=2),
        (16, 24, 32),
        ("model.1.submodule.1.submodule", 4),
        {"model.1": 2},
        {"model.0": 2},
        many="model.1.**.conv",
    ),
    "UNet, 2D": Row(
        partial(unet, 2, (4, 6, 8)),
        (32, 48),
        ("model.1.submodule.1.submodule", 4),
        {"model.1": 2},
        {"model.0": 2},
        many="model.**.conv",
    ),
    "DynUNet": Row(dynunet, **DYNUNET),
    "DynUNet, deep supervision": Row(
        partial(dynunet, deep_supervision=True, deep_supr_num=2), **DYNUNET
    ),
    "SegResNet": Row(segresnet, (16, 24, 32), **SEGRESNET),
    "SegResNetDS": Row(
        segresnet_ds,
        (16, 24, 32),
        ("encoder.layers.2.blocks", 4),
        {"up_layers.0.blocks": 2, "up_layers.1.blocks": 1},
        {"encoder.layers.1.blocks": 2, "encoder.layers.0.blocks": 1},
        many="up_layers.*.blocks",
    ),
    "SegResNetDS2": Row(
        partial(segresnet_ds, nets.SegResNetDS2),
        (16, 24, 32),
        ("encoder.layers.2.blocks", 4),
        {"up_layers.0.blocks": 2, "up_layers.1.blocks": 1},
        {"encoder.layers.1.blocks": 2, "encoder.layers.0.blocks": 1},
        output=lambda returned: returned[0][0],
        logits=lambda returned: returned[0][0],
        many="up_layers.*.blocks",
    ),
    "SegResNetVAE": Row(
        partial(segresnet, nets.SegResNetVAE, input_image_size=(16, 16, 16), vae_nz=4),
        (16, 16, 16),
        logits=first,
        **SEGRESNET,
    ),
    "SwinUNETR": Row(partial(swin_unetr, window_size=4), (32, 32, 64), slow=True, **SWIN_UNETR),
    "SwinUNETR, 2D": Row(partial(swin_unetr, 2), (64, 64), **SWIN_UNETR),
    "UNETR": Row(
        partial(unetr, 48, 48, 64),
        (48, 48, 64),
        channel_first=lambda tokens: tokens.transpose(1, 2).reshape(len(tokens), -1, 3, 3, 4),
        slow=True,
        **UNETR,
    ),
    "UNETR, 2D": Row(
        partial(unetr, 48, 64),
        (48, 64),
        channel_first=lambda tokens: tokens.transpose(1, 2).reshape(len(tokens), -1, 3, 4),
        **UNETR,
    ),
    "AttentionUnet": Row(
        lambda: nets.AttentionUnet(3, 1, CLASSES, channels=(2, 4, 6), strides=(2, 2)),
        (16, 24, 32),
        ("model.1.submodule.1.submodule", 4),
        {"model.1.submodule": 2, "model.1": 1},
        {"model.1.submodule.0": 2, "model.0": 1},
        many="model.**.merge.conv",
    ),
    "BasicUNet": Row(
        lambda: nets.BasicUNet(3, 1, CLASSES, features=(2, 2, 6, 8, 10, 2)),
        (16, 32, 32),
        ("down_4", 16),
        {"upcat_4": 8, "upcat_3": 4, "upcat_2": 2, "upcat_1": 1},
        {"down_3": 8, "down_2": 4, "down_1": 2, "conv_0": 1},
        many="upcat_*",
        first_voxel="centre",
    ),
    "BasicUNet++": Row(basic_unet_plus_plus, logits=first, **BASIC_UNET_PLUS_PLUS),
    "BasicUNet++, deep supervision": Row(
        partial(basic_unet_plus_plus, deep_supervision=True),
        output=-1,
        logits=lambda returned: returned[3],
        **BASIC_UNET_PLUS_PLUS,
    ),
    "VNet": Row(lambda: nets.VNet(3, 1, CLASSES), (16, 16, 32), slow=True, **VNET),
    "VNet, 2D": Row(lambda: nets.VNet(2, 1, CLASSES), (16, 32), **VNET),
    "FlexibleUNet": Row(
        partial(
            nets.FlexibleUNet,
            1,
            CLASSES,
            "resnet10",
            pretrained=False,
            spatial_dims=3,
            decoder_channels=(16, 8, 8, 4, 4),
        ),
        (32, 32, 64),
        slow=True,
        **FLEXIBLE_UNET,
    ),
    "FlexibleUNet, 2D": Row(
        partial(nets.FlexibleUNet, 1, CLASSES, "resnet10", pretrained=False, spatial_dims=2),
        (64, 96),
        **FLEXIBLE_UNET,
    ),
    "HighResNet": Row(high_res_net, (8, 8, 12), slow=True, **HIGH_RES_NET),
    "HighResNet, 2D": Row(partial(high_res_net, 2), (16, 24), **HIGH_RES_NET),
    "PlainConvUNet": Row(plain_conv_unet, **NNUNET),
    "PlainConvUNet, deep supervision": Row(
        partial(plain_conv_unet, deep_supervision=True), logits=first, **NNUNET
    ),
    "ResidualEncoderUNet": Row(residual_encoder_unet, **RESIDUAL_NNUNET),
    "ResidualEncoderUNet, deep supervision": Row(
        partial(residual_encoder_unet, deep_supervision=True), logits=first, **RESIDUAL_NNUNET
    ),
    "MedNeXt": Row(mednext, **MEDNEXT),
    "MedNeXt, deep supervision": Row(partial(mednext, deep_supervision=True), **MEDNEXT),
    "ViT classifier": Row(
        vit_classifier,
        (32, 48),
        ("blocks.2.norm1", 8),
        output=0,
        logits=first,
        channel_first=lambda tokens: tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 4, 6),
        first_voxel="centre",
        many="blocks.*",
    ),
}


#: The networks of a default run, one of every kind: plain, in 2D, with tokens, one that returns a
#: list, one that returns a tuple with a loss, and a classifier.
QUICK = (
    "UNet",
    "UNet, 2D",
    "SegResNetVAE",
    "UNETR, 2D",
    "PlainConvUNet, deep supervision",
    "ViT classifier",
)

#: Of these, the ones of a default run where a test explains many layers of each network.
FEW = ("UNet, 2D", "UNETR, 2D")


#: Without the large ones, of which a smaller relative is in the table, and without those that are
#: also in the table with deep supervision: their layers are the same, and more of them run.
ORDINARY = tuple(
    name
    for name, row in NETWORKS.items()
    if not row.slow and f"{name}, deep supervision" not in NETWORKS
)


def named(*names: str, quick: Sequence[str] = QUICK) -> Any:
    """Parametrise a test over networks, all of them by default.

    Args:
        quick: the others are slow in this test.
    """
    return pytest.mark.parametrize("name", params(names or tuple(NETWORKS), quick))


def params(names: Sequence[str], quick: Sequence[str] = QUICK) -> list[Any]:
    """Return the names as parameters, of which all but the quick ones are marked as slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in names]


def usual_grids(
    capture: Any, x: torch.Tensor, shapes: Mapping[Any, Sequence[int]]
) -> dict[Any, FeatureGrid]:
    """Return grids whose voxels fill the input evenly, in place of `measured_in_window`."""
    grids = {}
    for layer, shape in shapes.items():
        strides = tuple(n / size for n, size in zip(x.shape[2:], shape, strict=True))
        offsets = tuple((stride - 1) / 2 for stride in strides)
        grids[layer] = FeatureGrid(tuple(shape), strides, offsets, measured=False)
    return grids


# ---------------------------------------------------------------- plain torch, without the library


def log_odds(logits: torch.Tensor, index: int = 1) -> torch.Tensor:
    """Return the log-odds of a class, summed over the volume: log p - log (1 - p)."""
    others = [k for k in range(logits.shape[1]) if k != index]
    return (logits[:, index] - logits[:, others].logsumexp(1)).sum()


def logit(logits: torch.Tensor, index: int = 1) -> torch.Tensor:
    """Return the logit of a class, summed over the volume."""
    return logits[:, index].sum()


def by_hand(
    row: Row,
    network: nn.Module,
    x: torch.Tensor,
    layers: Sequence[str],
    score: Callable[[torch.Tensor], torch.Tensor] = logit,
    channel_first: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer -> (activations, gradients), (B, C, *s), of layers that the score depends on.

    Layers that do not run, or run twice, are left out.
    On a copy in eval mode whose activations do not work in place; each layer's output is kept and
    the copy goes on with a clone of it. The gradients are those that a whole backward pass leaves.

    Args:
        channel_first: of the layers; default what the row says of the bottleneck, if it is one.
    """
    twin = copy.deepcopy(network).eval().requires_grad_(True)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        kept[name].append(output)
        return output.clone()

    for name in layers:
        twin.get_submodule(name).register_forward_hook(partial(keep, name))
    score(row.logits(twin(x))).backward()
    found = {}
    for name, outputs in kept.items():
        if len(outputs) == 1 and outputs[0].grad is not None:
            (output,) = outputs
            turn = channel_first or (
                row.channel_first if name == row.bottleneck[0] else lambda tensor: tensor
            )
            found[name] = turn(output.detach()), turn(output.grad)
    return found


#: Random networks have classes that no voxel speaks for: a warning, and not the subject.
quiet = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


def hires_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (a * g).sum(1)


def grad_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (a * g.mean(tuple(range(2, g.ndim)), keepdim=True)).sum(1)


def deviation(found: torch.Tensor, expected: torch.Tensor, uncancelled: torch.Tensor) -> float:
    """Return the largest difference, relative to what the map would be if nothing cancelled."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    difference = float((found - expected).abs().max())
    return difference / float(uncancelled.abs().max()) if difference else 0.0
