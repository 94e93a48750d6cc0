"""Whatever state the caller and the network are in, the map is the same and the state stays."""

from __future__ import annotations

import contextlib
import copy
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers_networks import (
    FEW,
    NETWORKS,
    ORDINARY,
    Row,
    by_hand,
    deviation,
    hires_cam,
    log_odds,
    named,
    params,
    quiet,
    swin_unetr,
)
from helpers_untouched import untouched
from torch import nn
from torch.utils.checkpoint import checkpoint

from seg3dcam import HiResCAM, targets
from seg3dcam.errors import Seg3dcamError

pytestmark = pytest.mark.usefixtures("usual_grids_where_coarse")

TARGET = targets.ClassLogOdds(1, region="volume")

#: Some work in place or return several things.
SOME = ("UNet", "SegResNet", "VNet, 2D", "UNETR, 2D", "PlainConvUNet, deep supervision")


def explained(row: Row, network: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    """Return the map at the bottleneck, on the layer's grid."""
    layer = row.bottleneck[0]
    cam = HiResCAM(network, layer, output=row.output)
    return cam(row.input() if x is None else x, TARGET).native[layer]


def plain(row: Row, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the map in plain torch, and what it would be if nothing cancelled."""
    x = row.input(dtype=next(network.parameters()).dtype)
    found = by_hand(row, network, x, row.levels[:1], log_odds)
    a, g = (tensor.float() for tensor in found[row.bottleneck[0]])
    return hires_cam(a, g), hires_cam(a.abs(), g.abs())


def in_the_middle_of_a_training(network: nn.Module) -> nn.Module:
    """Return the network with mixed modes, some parameters frozen, some with gradients."""
    network.train()
    for number, module in enumerate(network.modules()):
        module.training = number % 3 > 0
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad = number % 4 > 0
        parameter.grad = torch.ones_like(parameter) if number % 2 else None
    return network


@dataclass(frozen=True)
class Case:
    """A network, its CAM (which measures the layer's grid once), and the map in plain torch."""

    row: Row
    network: nn.Module
    cam: HiResCAM
    expected: torch.Tensor
    uncancelled: torch.Tensor

    def assert_right(self) -> None:
        layer = self.row.bottleneck[0]
        with untouched(self.network):
            result = self.cam(self.row.input(), TARGET)
        assert deviation(result.native[layer], self.expected, self.uncancelled) < 1e-5
        assert not result.native[layer].is_inference()
        assert not result.native[layer].requires_grad


@pytest.fixture(scope="module", params=params(ORDINARY, FEW))
def case(request: pytest.FixtureRequest) -> Case:
    row = NETWORKS[request.param]
    network = in_the_middle_of_a_training(row.fresh())
    cam = HiResCAM(network, row.bottleneck[0], output=row.output)
    return Case(row, network, cam, *plain(row, network))


CALLERS = {
    "training": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16 autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float16 autocast": partial(torch.autocast, "cpu", dtype=torch.float16),
}


@pytest.mark.few(4)
@quiet
@pytest.mark.parametrize("caller", CALLERS)
def test_the_mode_of_the_caller_does_not_matter(case, caller):
    """Under autocast, too, the map is that of the network's own precision."""
    with CALLERS[caller]():
        case.assert_right()


@quiet
@pytest.mark.parametrize("state", ["frozen", "all in training", "all in evaluation"])
def test_the_state_of_the_network_does_not_matter(case, state):
    """Batch statistics and dropout are never those of training."""
    network = case.network
    before = [(p, p.requires_grad) for p in network.parameters()]
    try:
        network.requires_grad_(state != "frozen")
        network.train(state == "all in training")
        case.assert_right()
    finally:
        in_the_middle_of_a_training(network)
    assert all(p.requires_grad == needed for p, needed in before)


#: Torch has no average pooling in bfloat16 on the CPU.
NOT_IN_BFLOAT16 = ("ResidualEncoderUNet", "ResidualEncoderUNet, deep supervision")

#: Where random weights amplify rounding little, so that bfloat16 comes near float32.
NEAR = ("UNet", "UNet, 2D", "SegResNetDS", "VNet, 2D", "HighResNet, 2D", "FlexibleUNet, 2D")


@quiet
@named(*(name for name in ORDINARY if name not in NOT_IN_BFLOAT16), quick=FEW)
def test_a_network_of_low_precision(name):
    """Its map is finite, that of plain torch in this precision, and near that of float32."""
    row = NETWORKS[name]
    network = row.fresh(torch.bfloat16)
    with untouched(network):
        found = explained(row, network)
    assert found.dtype == torch.float32
    expected, uncancelled = plain(row, network)
    assert deviation(found, expected, uncancelled) < 0.03
    if name in NEAR:
        expected, _ = plain(row, row.fresh())
        assert torch.stack([found.flatten(), expected.flatten()]).corrcoef()[0, 1] > 0.98


@quiet
def test_data_parallel(case):
    with untouched(case.network):
        found = explained(case.row, nn.DataParallel(case.network))
    assert deviation(found, case.expected, case.uncancelled) < 1e-5


# -------------------------------------------------------------------------------- torch.compile


def backend() -> str:
    """Return the usual backend where there is a C++ compiler for it."""
    return "inductor" if shutil.which("g++") else "aot_eager"


@quiet
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("name", "in_place"), [("UNet, 2D", False), ("PlainConvUNet, deep supervision", True)]
)
def test_compiled(name, in_place):
    """Compiled code, once there, knows nothing of hooks that come later."""
    row = NETWORKS[name]
    network = row.fresh()
    expected, uncancelled = plain(row, network)
    compiled: Any = torch.compile(network, backend=backend())
    if in_place:
        network.compile(backend=backend())
        compiled = network
    with torch.no_grad():
        before = row.logits(compiled.eval()(row.input()))
    with untouched(network):
        found = explained(row, compiled)
    assert deviation(found, expected, uncancelled) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(row.logits(compiled(row.input())), before, rtol=0, atol=0)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------- checkpoints


def checkpointed(network: nn.Module, name: str, *, reentrant: bool = False) -> nn.Module:
    """Let the modules around a layer, and those beside it, run in checkpoints."""
    around = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
    beside = [child for child, _ in network.named_children()]
    for part in dict.fromkeys(around + beside):
        module = network.get_submodule(part)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant)
    return network


@quiet
@named(*ORDINARY, quick=FEW)
def test_checkpoints_around_everything(name):
    """They run their part again in the backward pass: not another pass to look at."""
    row = NETWORKS[name]
    expected, uncancelled = plain(row, row.fresh())
    network = checkpointed(row.fresh(), row.bottleneck[0])
    with untouched(network):
        found = explained(row, network)
    assert deviation(found, expected, uncancelled) < 1e-5


@pytest.mark.slow
@quiet
@named("SwinUNETR, 2D", quick=["SwinUNETR, 2D"])
@pytest.mark.parametrize("layer", ["encoder10", "swinViT.layers2.0", "swinViT.layers1.0.blocks.1"])
def test_the_checkpoints_of_swin_unetr(name, layer):
    def network(**settings: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return swin_unetr(2, **settings)

    x = NETWORKS[name].input()
    without, switched = network(), network(use_checkpoint=True)
    with untouched(switched):
        found = HiResCAM(switched, layer)(x, TARGET).native[layer]
    torch.testing.assert_close(found, HiResCAM(without, layer)(x, TARGET).native[layer])


# Torch says that a reentrant checkpoint was given nothing that needs a gradient.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@quiet
@named(*SOME)
def test_reentrant_checkpoints_are_refused_with_the_way_out(name):
    row = NETWORKS[name]
    network = checkpointed(row.fresh(), row.bottleneck[0], reentrant=True)
    with untouched(network), pytest.raises(Seg3dcamError, match=r"use_reentrant=False"):
        explained(row, network)


# ---------------------------------------------------------------------- what networks remember


@named("DynUNet", "PlainConvUNet", "ResidualEncoderUNet, deep supervision", quick=["PlainConvUNet"])
def test_weights_of_a_module_with_two_names_stay(name):
    """nnU-Net's encoder is also `decoder.encoder`; all is measured with other weights."""
    row = NETWORKS[name]
    network, x = row.fresh().eval(), row.input()
    names = [key for key, _ in network.named_modules(remove_duplicate=False)]
    assert len(names) > len(list(network.modules()))
    with torch.no_grad():
        before = row.logits(network(x))
    with untouched(network):
        first, second = explained(row, network), explained(row, network)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(row.logits(network(x)), before, rtol=0, atol=0)


def test_weights_that_two_modules_share_stay_shared():
    network = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 1))
    network.append(nn.Conv3d(2, 2, 3, padding=1))
    network[3].weight = network[0].weight
    x = torch.rand(1, 2, 8, 8, 8)
    with untouched(network):
        HiResCAM(network, "1")(x, targets.ClassLogit(1, "volume"))
    assert network[3].weight is network[0].weight


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_heads_that_a_network_notes_are_those_of_its_last_pass(fails):
    """DynUNet keeps them in a list: with their graph, they would not even let it be copied."""
    row = NETWORKS["DynUNet, deep supervision"]
    network = row.fresh()
    noted, heads = network.heads, list(network.heads)

    def target(logits):
        if fails:
            raise KeyboardInterrupt
        return TARGET(logits)

    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        HiResCAM(network, row.bottleneck[0])(row.input(), target)
    assert network.heads is noted
    assert all(now is before for now, before in zip(noted, heads, strict=True))
    copy.deepcopy(network)
