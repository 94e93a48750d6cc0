"""The logits are found among what a network returns; what is ambiguous is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seg3dcam import HiResCAM, targets
from seg3dcam.errors import ModelError
from seg3dcam.outputs import select_output, tensors_in

SHAPE = (4, 6)
FULL, OTHER = torch.rand(1, 3, *SHAPE), torch.rand(1, 3, *SHAPE)
COARSE, LOSS = torch.rand(1, 3, 2, 3), torch.tensor(0.5)
CLASSES = torch.rand(1, 5)


@pytest.mark.parametrize(
    ("output", "selection"),
    [
        (FULL, None),  # most networks
        ([FULL, COARSE], None),  # deep supervision
        ([COARSE, FULL], None),
        ((FULL, OTHER), None),
        ([FULL], None),
        ((FULL, None), None),  # SegResNetVAE in eval mode
        ((FULL, LOSS), None),
        ([[COARSE, FULL], [OTHER]], None),
        ({"logits": FULL, "features": COARSE}, None),
        ({"out": [FULL, COARSE]}, None),
        ([OTHER, FULL], 1),
        ([OTHER, FULL], -1),
        ({"a": OTHER, "b": FULL}, "b"),
        ({0: OTHER, 1: FULL}, 1),
        (([OTHER], [COARSE, FULL]), lambda output: output[1][1]),
        (FULL.movedim(1, -1), lambda output: output.movedim(-1, 1)),
    ],
)
def test_the_logits_are_found(output, selection):
    torch.testing.assert_close(select_output(output, selection, SHAPE), FULL, rtol=0, atol=0)


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
        ({"a": FULL, "b": OTHER}, None, r"say which are the logits with output='key'"),
        ({"a": COARSE}, None, r"with 0 tensors of the input's spatial shape \(4, 6\)"),
        ([COARSE, CLASSES], None, r"none of the input's spatial shape \(4, 6\)"),
        ([COARSE, CLASSES], None, "a list .* say which are the logits with output=<position"),
        ([], None, r"returned a list \(\), none"),
        (None, None, "returned a NoneType"),
        ([OTHER, FULL], 2, r"output=2 does not exist: the network returned a list \(a tensor \(1"),
        ({"a": FULL}, "b", "output='b' does not exist: the network returned a dict {'a'"),
        ([FULL], "b", "output='b' does not exist"),
        ({"a": None}, "a", r"output\['a'\] is a NoneType; logits are a tensor \(B, classes, ...\)"),
        ([LOSS], 0, r"output\[0\] is a tensor \(\); logits are .* Choose with output="),
        (LOSS, None, r"output is a tensor \(\); logits are a tensor"),
        (FULL, lambda output: [output], r"output is a list .* It returned a tensor \(1, 3, 4, 6\)"),
    ],
)
def test_what_is_ambiguous_is_refused(output, selection, message):
    with pytest.raises(ModelError, match=message):
        select_output(output, selection, SHAPE)


def test_tensors_in_walks_every_nest():
    nest = {"a": (FULL, {"b": [None, COARSE]}), "c": 3, "d": LOSS}
    found = list(tensors_in(nest))
    assert [path for path, _ in found] == [("a", 0), ("a", 1, "b", 1), ("d",)]
    assert all(a is b for (_, a), b in zip(found, (FULL, COARSE, LOSS), strict=True))


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
