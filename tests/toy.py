"""Networks whose explanation is known by hand, and small random ones that can be cut in two.

A `Case` is a network, one of its layers, and the same network in two halves: `front` ends with the
layer, `back` goes on from its output. So the reference needs no hook.
"""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UP = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

#: Odd, so that blocks of 2 and of 3 end raggedly.
SHAPES = {1: (11,), 2: (7, 5), 3: (5, 4, 7)}


Made = TypeVar("Made")


@cache
def shared(make: Callable[..., Made], *args: Any, **settings: Any) -> Made:
    """Return what `make` returns, a network or a case: the same one for all tests.

    So the grids of its layers are measured once, which takes longer than the rest of most tests. A
    test that changes a network, if only its gradients, calls `make` itself.
    """
    return make(*args, **settings)


def converted(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the network in another precision."""
    return copy.deepcopy(network).to(dtype)


def deviation(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert expected.abs().max() > 0
    return float((found.double() - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Case:
    """A network, the name of a layer in it, an input, and the network cut behind the layer."""

    network: nn.Module
    layer: str
    x: torch.Tensor
    front: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor], torch.Tensor]


def random_input(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal numbers in float64 that float32 represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).double()


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters with reproducible numbers of a sensible size; float64, eval mode.

    The numbers are drawn in float32, so the network's float32 copy has the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network.double().eval()


def plain(ndim: int = 3, classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Two convolutions with ReLU, then a 1x1x1 head: behind layer "3" the network is linear."""
    conv = CONV[ndim]
    layers = [
        conv(1, 4, 3, padding=1),
        nn.ReLU(),
        conv(4, 4, 3, padding=1),
        nn.ReLU(),
        conv(4, classes, 1),
    ]
    return seeded(nn.Sequential(*layers), seed)


def normed(ndim: int = 3, *, inplace: bool, seed: int = 0) -> nn.Sequential:
    """InstanceNorm followed by LeakyReLU, twice, as in nnU-Net."""
    conv, norm = CONV[ndim], NORM[ndim]
    layers = [
        conv(1, 4, 3, padding=1),
        norm(4, affine=True),
        nn.LeakyReLU(0.01, inplace=inplace),
        conv(4, 4, 3, padding=1),
        norm(4, affine=True),
        nn.LeakyReLU(0.01, inplace=inplace),
        conv(4, 3, 1),
    ]
    return seeded(nn.Sequential(*layers), seed)


class Skip(nn.Module):
    """A U-Net of two levels: the encoder reaches the head directly and through the bottleneck."""

    def __init__(self, ndim: int = 3) -> None:
        super().__init__()
        conv = CONV[ndim]
        self.encoder = nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.bottleneck = nn.Sequential(conv(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.up = UP[ndim](6, 4, 3, stride=2, padding=1)
        self.head = conv(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after_encoder(self.encoder(x))

    def after_encoder(self, a: torch.Tensor) -> torch.Tensor:
        return self.after_bottleneck(self.bottleneck(a), a)

    def after_bottleneck(self, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([a, self.up(b)], dim=1))


def cut(network: nn.Sequential, at: int, x: torch.Tensor) -> Case:
    """Cut a sequential network behind its layer number `at`."""
    return Case(network, str(at), x, network[: at + 1], network[at + 1 :])


def plain_case(ndim: int) -> Case:
    """Return `plain`, explained at the first ReLU."""
    return cut(plain(ndim, seed=3), 1, random_input(2, 1, *SHAPES[ndim], seed=ndim))


def linear_head_case(ndim: int = 3) -> Case:
    """Return `plain`, explained at the last ReLU, behind which all is linear."""
    return cut(plain(ndim, seed=3), 3, random_input(2, 1, *SHAPES[ndim], seed=ndim))


def normed_case(at: int) -> Case:
    """Return `normed` with in-place activations."""
    return cut(normed(inplace=True, seed=3), at, random_input(2, 1, *SHAPES[3], seed=5))


def skip_case(layer: str) -> Case:
    """Return `Skip`, on a shape of odd lengths, which striding by 2 and back keeps."""
    network = seeded(Skip(), seed=0)
    x = random_input(2, 1, 7, 5, 9, seed=7)
    if layer == "encoder":
        return Case(network, layer, x, network.encoder, network.after_encoder)
    a = network.encoder(x).detach()
    return Case(
        network,
        layer,
        x,
        lambda x: network.bottleneck(network.encoder(x)),
        lambda b: network.after_bottleneck(b, a.to(b)),
    )


CASES: dict[str, Callable[[], Case]] = {
    "plain 1D": lambda: plain_case(1),
    "plain 2D": lambda: plain_case(2),
    "plain 3D": lambda: plain_case(3),
    "linear head": linear_head_case,
    "norm before an in-place activation": lambda: normed_case(1),
    "in-place activation": lambda: normed_case(5),
    "U-Net encoder": lambda: skip_case("encoder"),
    "U-Net bottleneck": lambda: skip_case("bottleneck"),
}


# ------------------------------------------------------------------- explanations known by hand


def remote_cue(shift: tuple[int, ...], gain: float = 4.0) -> nn.Sequential:
    """Class 1 at voxel v is drawn because of the marker (channel 1) at v + shift, and only that.

    Layer "0" passes the two input channels on: organ and marker. The logits are z_0 = 1 and
    z_1(v) = gain * marker(v + shift).
    """
    conv, reach = CONV[len(shift)], max(map(abs, shift))
    copy, head = conv(2, 2, 1), conv(2, 2, 2 * reach + 1, padding=reach)
    for parameter in (*copy.parameters(), *head.parameters()):
        nn.init.zeros_(parameter)
    with torch.no_grad():
        copy.weight[0, 0], copy.weight[1, 1] = 1, 1
        head.weight[(1, 1, *(reach + s for s in shift))] = gain
        head.bias[0] = 1
    return nn.Sequential(copy, head).double().eval()


def cancelling(ndim: int = 3) -> nn.Sequential:
    """The logit of class 1 is the difference between two neighbours along the last axis.

    Layer "0" is the input itself; z_1(v) = x(v + 1) - x(v - 1), so gradients sum to zero exactly.
    """
    conv = CONV[ndim]
    copy, head = conv(1, 1, 1), conv(1, 2, 3, padding=1)
    for parameter in (*copy.parameters(), *head.parameters()):
        nn.init.zeros_(parameter)
    with torch.no_grad():
        copy.weight.fill_(1)
        middle = (1,) * (ndim - 1)
        head.weight[(1, 0, *middle, 2)] = 1
        head.weight[(1, 0, *middle, 0)] = -1
    return nn.Sequential(copy, head).double().eval()


class Root(nn.Module):
    """The square root: its slope at 0 is infinite, and 0 times infinity is NaN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()


def infinite_slope() -> nn.Sequential:
    """ReLU (layer "0") and a square root: the gradient is infinite where the ReLU gives 0."""
    head = nn.Conv3d(1, 2, 1)
    return seeded(nn.Sequential(nn.ReLU(), Root(), head))


# ------------------------------------------------------------ layers and networks that nest tensors

Levels = namedtuple("Levels", ["fine", "other"])

#: kind of container -> (how the layer packs two tensors, names of the two elements)
PACKED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], Any], tuple[str, str]]] = {
    "tuple": (lambda a, b: (a, b), ("[0]", "[1]")),
    "list": (lambda a, b: [a, b], ("[0]", "[1]")),
    "dict": (lambda a, b: {"fine": a, "other": b}, ("[fine]", "[other]")),
    "namedtuple": (Levels, ("[0]", "[1]")),
    "nested": (lambda a, b: {"levels": [(a, None), b]}, ("[levels][0][0]", "[levels][1]")),
    "counted from the end": (lambda a, b: (a, b), ("[-2]", "[-1]")),
}


def unpacked(levels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two tensors of any container of `PACKED`."""
    if isinstance(levels, dict) and "levels" in levels:
        return levels["levels"][0][0], levels["levels"][1]
    return tuple(levels.values()) if isinstance(levels, dict) else tuple(levels)


class Backbone(nn.Module):
    """Gives two tensors of the same shape in a container."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.one = nn.Conv2d(1, 3, 3, padding=1)
        self.two = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(self.one(x).relu(), self.two(x).relu())


class Nested(nn.Module):
    """A network whose layer "backbone" gives two tensors, which the head multiplies and adds."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.backbone = Backbone(pack)
        self.head = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.combine(*unpacked(self.backbone(x)))

    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head(a * b + 2 * a)


class Wrapped(nn.Module):
    """Packs the logits of a network together with other things."""

    def __init__(self, network: nn.Module, pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(self.network(x))


# --------------------------------------------------------------------------- the same, turned round


Turn = Callable[[torch.Tensor], torch.Tensor]


@cache
def mirroring(axes: tuple[int, ...]) -> Turn:
    """Return a function that mirrors (B, C, *S) along some axes."""
    return lambda tensor: tensor.flip(axes)


@cache
def permuting(order: tuple[int, ...]) -> Turn:
    """Return a function that gives (B, C, *S) the spatial axes in another order."""
    return lambda tensor: tensor.permute(0, 1, *(2 + axis for axis in order))


def turned(network: nn.Module, change: Turn) -> nn.Module:
    """Return a copy of the network whose kernels are flipped or permuted by `change`."""
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        if parameter.ndim > 2:
            parameter.data = change(parameter.data).contiguous()
    return twin
