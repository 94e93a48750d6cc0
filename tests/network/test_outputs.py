"""The logits are found among what a network returns; what is ambiguous is refused."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from monai.networks import nets
from torch import nn

from seg3dcam import HiResCAM, targets
from seg3dcam.errors import ModelError
from seg3dcam.network.outputs import select_output, tensors_in

SHAPE = (4, 6)
FULL, OTHER = torch.rand(1, 3, *SHAPE), torch.rand(1, 3, *SHAPE)
COARSE, LOSS = torch.rand(1, 3, 2, 3), torch.tensor(0.5)
CLASSES = torch.rand(1, 5)
LAST = FULL.movedim(1, -1)
FOUR = torch.rand(1, 4, *SHAPE)

Levels = namedtuple("Levels", "fine coarse")


@dataclass
class Result:
    """Stands for the output classes of other libraries, which are no dicts."""

    logits: torch.Tensor
    hidden: object = None


class Record(OrderedDict):
    """Stands for those that are dicts and know positions, too."""

    def __getitem__(self, key):
        return tuple(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


@pytest.mark.parametrize(
    ("output", "selection"),
    [
        (FULL, None),  # most networks
        ([FULL, COARSE], None),  # deep supervision
        ([COARSE, FULL], None),
        ((FULL, FOUR), None),  # another number of channels: a reconstruction, say
        ((FULL, FOUR, FOUR.clone()), None),
        ((FULL, FULL), None),  # the very same
        (Levels(FULL, COARSE), None),
        (Result(FULL), None),
        (Result(FULL, [COARSE, COARSE]), None),
        (Record(logits=FULL, hidden=(COARSE,)), None),
        (torch.stack([FULL, OTHER, OTHER], 1), None),  # deep supervision, resized and stacked
        ((torch.stack([FULL, OTHER], 1), LOSS), None),
        ({"out": torch.stack([FULL, OTHER], 1), "loss": LOSS}, None),
        ([FULL], None),
        ((FULL, None), None),  # SegResNetVAE in eval mode
        ((FULL, LOSS), None),
        ([[COARSE, FULL], [FOUR]], None),
        ({"logits": FULL, "features": COARSE}, None),
        ({"out": [FULL, COARSE]}, None),
        ([OTHER, FULL], 1),
        ([OTHER, FULL], -1),
        ({"a": OTHER, "b": FULL}, "b"),
        ({0: OTHER, 1: FULL}, 1),
        (Levels(OTHER, FULL), 1),
        (Levels(OTHER, FULL), "coarse"),
        (Result(OTHER, FULL), "hidden"),
        (Record(logits=OTHER, hidden=FULL), "hidden"),
        (Record(logits=OTHER, hidden=FULL), 1),
        (torch.stack([OTHER, FULL], 1), 1),
        (torch.stack([OTHER, FULL], 1), -1),
        ((torch.stack([FULL, OTHER], 1), LOSS), 0),
        (([OTHER], [COARSE, FULL]), lambda output: output[1][1]),
        (FULL.movedim(1, -1), lambda output: output.movedim(-1, 1)),
    ],
)
def test_the_logits_are_found(output, selection):
    torch.testing.assert_close(select_output(output, selection, SHAPE), FULL, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 5, 5, 5), (1, 4, 4, 6), (1, 4, 2, 3), (1, 4, 6), (1, 4)])
def test_classes_as_many_as_voxels_are_no_reason_to_refuse(shape):
    """Each fits the input channels-first, as fine as it or coarser, or has no places at all."""
    size = (5, 5) if shape[1] == 5 else SHAPE
    output = torch.rand(shape)
    assert select_output(output, None, size) is output


@pytest.mark.parametrize("output", [CLASSES, (CLASSES,), [None, CLASSES], {"logits": CLASSES}])
def test_the_logits_of_a_classifier_are_found(output):
    if isinstance(output, dict):
        assert select_output(output, "logits", SHAPE) is CLASSES
    else:
        assert select_output(output, None, SHAPE) is CLASSES


@pytest.mark.parametrize(
    ("output", "selection", "message"),
    [
        ({"a": FULL, "b": OTHER}, None, r"a dict {'a': a tensor \(1, 3, 4, 6\).*2 tensors of"),
        ({"a": FULL, "b": OTHER}, None, r"which: output='a' \(1, 3, 4, 6\), output='b' \(1, 3, 4"),
        ({"a": FULL, "b": FOUR}, None, r"which: output='a' \(1, 3, 4, 6\), output='b' \(1, 4, 4"),
        (Result(FULL, OTHER), None, r"a Result {'logits': .*which: output='logits' .*='hidden' \("),
        (Record(a=FULL, b=[OTHER]), None, r"output='a' .*, output=lambda out: out\['b'\]\[0\] \(1"),
        ([Result(FULL), OTHER], None, r"which: output=lambda out: out\[0\].logits \(.*output=1 or"),
        ((FULL, OTHER), None, r"2 tensors of .* which: output=0 \(1, 3, 4, 6\), output=1 or -1 \("),
        ([COARSE, FULL, FOUR, OTHER], None, r"2 tensors of .*: output=1 \(.*, output=3 or -1 \("),
        (([FULL], [OTHER]), None, r"out\[0\]\[0\] \(.*, output=lambda out: out\[1\]\[0\] \(1, 3"),
        (FULL, 0, r"output=0 does not exist: the network returned a tensor \(1, 3, 4, 6\)"),
        ({"a": COARSE}, None, r"no tensor of the input's spatial shape \(4, 6\).*output='key'"),
        ([COARSE, CLASSES], None, r"no tensor of the input's spatial shape \(4, 6\)"),
        ([COARSE, CLASSES], None, "a list .* say which are the logits with output=<position"),
        ([], None, r"returned a list \(\), with no tensor"),
        (Levels(FULL, COARSE), "fin", "output='fin' does not exist: the network returned a Levels"),
        (Result(FULL), "logit", "output='logit' does not exist: the network returned a Result {'l"),
        (None, None, "returned a NoneType"),
        ([OTHER, FULL], 2, r"output=2 does not exist: the network returned a list \(a tensor \(1"),
        ({"a": FULL}, "b", "output='b' does not exist: the network returned a dict {'a'"),
        ([FULL], "b", "output='b' does not exist"),
        ({"a": None}, "a", r"output\['a'\] is a NoneType; logits are a tensor \(B, classes, ...\)"),
        ([LOSS], 0, r"output\[0\] is a tensor \(\); logits are .* Choose with output="),
        (LOSS, None, r"output is a tensor \(\); logits are a tensor"),
        (FULL.to_sparse(), None, "logits are not dense .*Give output=<function"),
        (FULL + 0j, None, r"logits are complex \(torch.complex64"),
        (LAST, None, r"tensor \(1, 4, 6, 3\): .* \(4, 6\) comes before .*out.movedim\(-1, 1\)"),
        ([LAST], 0, r"output=lambda out: out\[0\].movedim\(-1, 1\)"),
        (LAST, lambda output: output * 2, "a function whose tensor has them first"),
        (FULL, lambda output: [output], r"output is a list .* It returned a tensor \(1, 3, 4, 6\)"),
    ],
)
def test_what_is_ambiguous_is_refused(output, selection, message):
    with pytest.raises(ModelError, match=message):
        select_output(output, selection, SHAPE)


def test_tensors_in_walks_every_nest():
    nest = {"a": (FULL, {"b": [None, COARSE]}), "c": 3, "d": LOSS, "e": Result(OTHER, [FOUR])}
    paths = [("a", 0), ("a", 1, "b", 1), ("d",), ("e", "logits"), ("e", "hidden", 0)]
    found = list(tensors_in(nest))
    assert [path for path, _ in found] == paths
    tensors = (FULL, COARSE, LOSS, OTHER, FOUR)
    assert all(a is b for (_, a), b in zip(found, tensors, strict=True))


NETWORKS = {
    "BasicUNet++": (
        lambda: nets.BasicUNetPlusPlus(2, 1, 3, features=(4,) * 6, norm="batch"),
        lambda out: out[0],
    ),
    "SegResNetDS": (
        lambda: nets.SegResNetDS(2, 4, 1, 3, blocks_down=(1, 1, 1)),
        lambda out: out,
    ),
    "SegResNetVAE": (
        lambda: nets.SegResNetVAE(
            (16, 16), vae_nz=4, spatial_dims=2, init_filters=8, in_channels=1, out_channels=3
        ),
        lambda out: out[0],
    ),
    "VNet": (lambda: nets.VNet(2, 1, 3), lambda out: out),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_of_real_networks_are_found(name):
    make, logits_of = NETWORKS[name]
    with torch.no_grad():
        output = make().eval()(torch.zeros(1, 1, 16, 16))
    assert select_output(output, None, (16, 16)) is logits_of(output)


def test_deep_supervision_with_maps_of_one_size_is_refused():
    """BasicUNet++ gives four, of which the last is the complete one."""
    net = nets.BasicUNetPlusPlus(2, 1, 3, features=(4,) * 6, norm="batch", deep_supervision=True)
    with torch.no_grad():
        output = net.eval()(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ModelError, match=r"4 tensors .* output=0 \(.* output=3 or -1 \(1, 3, 16"):
        select_output(output, None, (16, 16))
    assert select_output(output, -1, (16, 16)) is output[3]


def test_a_stack_of_deep_supervision_is_unstacked():
    kernels, strides = [3] * 4, [1, 2, 2, 2]
    net = nets.DynUNet(
        2, 1, 3, kernels, strides, strides[1:], filters=[4] * 4, deep_supervision=True
    ).train()
    with torch.no_grad():
        output = net(torch.rand(2, 1, 32, 32))
    assert output.shape == (2, 2, 3, 32, 32)
    torch.testing.assert_close(select_output(output, None, (32, 32)), output[:, 0])
    torch.testing.assert_close(select_output(output, 1, (32, 32)), output[:, 1])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Conv2d(1, 4, 3, padding=1)
            self.heads = nn.ModuleDict({"organ": nn.Conv2d(4, 3, 1), "lesion": nn.Conv2d(4, 2, 1)})

    def forward(self, x):
        features = self.body(x)
        return {name: head(features) for name, head in self.heads.items()}


@pytest.mark.parametrize("name", ["organ", "lesion"])
@pytest.mark.parametrize("as_function", [False, True])
def test_the_chosen_head_is_the_one_that_is_explained(name, as_function):
    """For a 1x1 head HiResCAM is the logit without its bias."""
    net, x = TwoHeads(), torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    output = (lambda given: given[name]) if as_function else name
    result = HiResCAM(net, "body", output=output)(x, targets.ClassLogit(1, region="volume"))
    with torch.no_grad():
        logits = net(x)[name]
    torch.testing.assert_close(result.logits, logits)
    expected = logits[:, 1] - net.heads[name].bias[1].detach()
    torch.testing.assert_close(result.maps["body"], expected)
