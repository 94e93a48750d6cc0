"""Networks with parts that are hard to put back: explained or refused, untouched either way."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_untouched import untouched
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seg3dcam import GradCAM, HiResCAM, suggest_layers, targets
from seg3dcam.errors import ModelError, Seg3dcamError, Seg3dcamWarning

VOLUME = targets.ClassLogit(1, "volume")
X = (1, 1, 8, 8, 8)


def image():
    return torch.rand(*X, generator=torch.Generator().manual_seed(1))


def blocks(*more, head=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        *more,
        head or nn.Conv3d(4, 2, 1),
    ).train()


def with_buffer(make):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", make())

        def forward(self, x):
            return x

    return lambda: blocks(Holding())


def inference_buffer():
    with torch.inference_mode():
        return torch.ones(3)


class WritesInference(nn.Module):
    """Counts in a buffer that was made in inference mode."""

    def __init__(self):
        super().__init__()
        with torch.inference_mode():
            self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        with torch.inference_mode():
            self.calls += 1
        return x


def bytes_of(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


EXPLAINED = {
    "a scripted block": lambda: blocks(head=torch.jit.script(nn.Conv3d(4, 2, 1))),
    "a scripted block with buffers": lambda: blocks(torch.jit.script(nn.BatchNorm3d(4))),
    "a traced block": lambda: blocks(
        torch.jit.trace(nn.Sequential(nn.Conv3d(4, 4, 1), nn.ReLU()), torch.rand(1, 4, 8, 8, 8))
    ),
    "a frozen script": lambda: blocks(
        torch.jit.freeze(torch.jit.script(nn.Conv3d(4, 4, 1).eval()))
    ),
    "a sparse buffer": with_buffer(lambda: torch.eye(3).to_sparse()),
    "an inference buffer": with_buffer(inference_buffer),
    "a complex buffer": with_buffer(lambda: torch.ones(2, dtype=torch.cfloat)),
    "a boolean buffer": with_buffer(lambda: torch.ones(2, dtype=torch.bool)),
    "a quantised buffer": with_buffer(
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    ),
    "a buffer of inference mode that is written": lambda: blocks(WritesInference()),
    "quantised linears": lambda: blocks(
        _LastAxis(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))[0])
    ),
}


class _LastAxis(nn.Module):
    """Adds what a module makes of the channels as the last axis."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("name", EXPLAINED)
@pytest.mark.parametrize("layer", ["2", "auto", "all"])
def test_explained_and_as_before(name, layer):
    net = EXPLAINED[name]().eval()
    expected = net(image()).detach()
    net.train() if "frozen" not in name else None
    kept = {key: copy.copy(value) for key, value in vars(net[1]).items() if "hooks" in key}
    buffers = {key: id(b) for key, b in net.named_buffers()}
    training = [getattr(module, "training", None) for module in net.modules()]
    result = HiResCAM(net, layer)(image(), VOLUME)
    torch.testing.assert_close(result.logits, expected)
    assert {key: id(b) for key, b in net.named_buffers()}.keys() == buffers.keys()
    assert [getattr(module, "training", None) for module in net.modules()] == training
    assert {key: value for key, value in vars(net[1]).items() if "hooks" in key} == kept
    net.eval()
    torch.testing.assert_close(net(image()).detach(), expected)


def meta():
    return blocks().to("meta")


def fake():
    with FakeTensorMode():
        return blocks()


def part_on_meta():
    net = blocks()
    net[3] = nn.Conv3d(4, 2, 1, device="meta")
    return net


def lazy():
    return blocks(nn.LazyConv3d(4, 3, padding=1))


def inference_parameters():
    with torch.inference_mode():
        return blocks()


REFUSED = {
    "lazy": (lazy, r"module '3' \(LazyConv3d\) is lazy.*Run the network once"),
    "meta": (meta, r"module '0' \(Conv3d\).*meta device.*to_empty"),
    "part on meta": (part_on_meta, r"module '3' \(Conv3d\).*'weight' is on the meta device"),
    "meta buffer": (
        with_buffer(lambda: torch.ones(2, device="meta")),
        r"module '3' \(Holding\): its 'held' is on the meta",
    ),
    "FakeTensor": (fake, r"module '0' \(Conv3d\): its 'weight' is a FakeTensor"),
    "inference parameters": (inference_parameters, r"module '0' \(Conv3d\).*inference_mode"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "ask",
    [
        lambda net: GradCAM(net, "2")(image(), VOLUME),
        lambda net: GradCAM(net, "auto")(image(), VOLUME),
        lambda net: suggest_layers(net, X),
    ],
)
def test_refused_before_anything_is_touched(name, ask):
    make, message = REFUSED[name]
    net = make()
    for module in net.modules():
        module.forward = None  # nothing of it runs
    training = [module.training for module in net.modules()]
    with pytest.raises(ModelError, match=message):
        ask(net)
    assert [module.training for module in net.modules()] == training
    assert all(not m._forward_hooks for m in net.modules())
    assert set(net[1]._buffers) == {"running_mean", "running_var", "num_batches_tracked"}


def test_inputs_without_values_are_refused():
    for x in (torch.rand(X, device="meta"), _fake(X)):
        net = blocks()
        with untouched(net), pytest.raises(Seg3dcamError, match=r"meta|FakeTensor"):
            HiResCAM(net, "2")(x, VOLUME)


def _fake(shape):
    with FakeTensorMode():
        return torch.rand(shape)


class Restless(nn.Module):
    """Writes tensors into attributes of every kind while it predicts."""

    def __init__(self):
        super().__init__()
        self.last, self.note = torch.ones(1), torch.zeros(2)
        self.seen = [torch.zeros(1)]

    def forward(self, x):
        self.last = x
        self.note += 1
        self.fresh = x
        self.seen.append(x)
        self.training = True
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_pass_writes_into_attributes_is_undone(fails):
    net = blocks(Restless())
    restless = net[3]
    last, note, seen = restless.last, restless.note, restless.seen
    restless.training = False
    if fails:
        net[4].register_forward_hook(_fail)
    with untouched(net):
        if fails:
            with pytest.raises(ModelError, match="the head fails"):
                HiResCAM(net, "2")(image(), VOLUME)
        else:
            HiResCAM(net, "2")(image(), VOLUME)
    assert restless.last is last
    assert restless.note is note
    assert not note.any()
    assert restless.seen is seen
    assert len(seen) == 1
    assert "fresh" not in vars(restless)
    assert not restless.training


def _fail(*_):
    raise RuntimeError("the head fails")


def test_one_part_that_cannot_be_put_back_keeps_no_other_from_it():
    class Stubborn(nn.Module):
        """Lets its mode be set to eval, but not back."""

        def forward(self, x):
            return x

        def __setattr__(self, name, value):
            if name == "training" and value and "training" in vars(self):
                raise RuntimeError("no training any more")
            super().__setattr__(name, value)

    net = blocks().append(Stubborn())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    needed = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError, match="no training any more"):
        HiResCAM(net, "2")(image(), VOLUME)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert [p.requires_grad for p in net.parameters()] == needed
    assert all(m.training for m in net.modules() if not isinstance(m, Stubborn))
    assert all(not m._forward_hooks for m in net.modules())


def test_parameters_that_the_network_itself_changes_are_named():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(4, 1, 1, 1))

        def forward(self, x):
            with torch.no_grad():
                self.mean += 0.1
            return x + self.mean

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Seg3dcamWarning)
        HiResCAM(blocks(Drifts()), "2")(image(), VOLUME)
    said = [str(w.message) for w in caught]
    assert any("changes its parameters in place (3.mean)" in text for text in said)
