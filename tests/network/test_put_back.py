"""Networks with parts that are hard to put back: explained or refused, untouched either way."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pathlib
import queue
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_crossed import crossed
from helpers_untouched import untouched
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seg3dcam import GradCAM, HiResCAM, suggest_layers, targets
from seg3dcam.errors import ModelError, Seg3dcamError, Seg3dcamWarning
from seg3dcam.network.attributes import MOST, attribute_values
from seg3dcam.network.untouched.process import ProcessSwitch

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


def values_in(model):
    return [value for value, _ in attribute_values(model)]


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


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(("name", "layer"), crossed(EXPLAINED, ["2", "auto", "all"], rows=6))
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


def explain_or_fail(net, fails):
    """Explain a network; or let its head fail, and see that this is said."""
    if fails:
        net[4].register_forward_hook(_fail)
        with pytest.raises(ModelError, match="the head fails"):
            HiResCAM(net, "2")(image(), VOLUME)
    else:
        HiResCAM(net, "2")(image(), VOLUME)


def _fail(*_):
    raise RuntimeError("the head fails")


# ------------------------------------------------- arrays, containers and objects in attributes


class Notes:
    """An object of a user's own class, with everything that may change in one."""

    def __init__(self):
        self.step, self.mean, self.array = 0, torch.zeros(2), np.zeros(3)
        self.log, self.by_name, self.names = [1.5], {"a": torch.zeros(1)}, {"first"}
        self.inner = SimpleNamespace(count=0, last=deque([1], maxlen=2))
        self.me = self  # a cycle

    def change(self, x):
        self.step += 1
        self.mean += 1
        self.array[:] = self.step
        self.log.append(2.5)
        self.by_name["a"] += 1
        self.by_name["b"] = x
        self.names.add("second")
        self.inner.count += 1
        self.inner.last.append(x)
        self.fresh = x

    def state(self):
        """Return all values, and what all is."""
        return (
            [self.step, self.mean.tolist(), self.array.tolist(), self.log[:], {**self.by_name}]
            + [self.by_name["a"].tolist(), {*self.names}, self.inner.count, [*self.inner.last]]
            + [id(thing) for thing in vars(self).values()]
            + [sorted(vars(self)), self.inner.last.maxlen]
        )


@dataclass
class Record:
    notes: Notes = field(default_factory=Notes)


class Noting(nn.Module):
    """Changes notes while it predicts; where it finds them, `kept` says."""

    def __init__(self, kept, find):
        super().__init__()
        self.kept, self.find = kept, find

    def forward(self, x):
        self.find(self.kept).change(x)
        return x


KEPT = {
    "an attribute": (Notes, lambda kept: kept),
    "a list": (lambda: [None, Notes()], lambda kept: kept[1]),
    "a tuple in a dict": (lambda: {"a": (1, Notes())}, lambda kept: kept["a"][1]),
    "a dataclass": (Record, lambda kept: kept.notes),
    "a namespace": (lambda: SimpleNamespace(notes=Notes()), lambda kept: kept.notes),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_objects_that_modules_keep_are_put_back(name, fails):
    make, find = KEPT[name]
    net = blocks(Noting(make(), find))
    notes = find(net[3].kept)
    before = notes.state()
    explain_or_fail(net, fails)
    assert find(net[3].kept) is notes
    assert notes.state() == before
    net.eval()
    if not fails:
        net(image())
        assert notes.step == 1
        assert notes.state() != before


class Kinds(nn.Module):
    """Replaces what it keeps by other things while it predicts."""

    def __init__(self):
        super().__init__()
        self.cache, self.key, self.ready, self.calls = None, "none", False, 0
        self.array, self.shapes, self.notes = np.arange(3.0), [(1, 2)], Notes()
        self.layer, self.gone = None, np.ones(2)

    def forward(self, x):
        if not self.ready:
            self.cache, self.key, self.ready = torch.ones(1), "one", True
        self.calls += 1
        self.shapes.append(tuple(x.shape))
        self.array *= 2
        self.notes = Notes()
        if self.layer is None:
            self.layer = nn.Identity()
        if hasattr(self, "gone"):
            del self.gone
        return self.layer(x) * self.cache


def test_attributes_that_belong_together_stay_together():
    """A cache without the switch that says it is full would fail the next pass."""
    net = blocks(Kinds())
    kinds = net[3]
    array, notes, shapes, gone = kinds.array, kinds.notes, kinds.shapes, kinds.gone
    HiResCAM(net, "2")(image(), VOLUME)
    assert (kinds.cache, kinds.key, kinds.ready, kinds.calls) == (None, "none", False, 0)
    assert kinds.array is array
    assert array.tolist() == [0, 1, 2]
    assert kinds.notes is notes
    assert kinds.shapes is shapes
    assert shapes == [(1, 2)]
    assert kinds.gone is gone
    assert vars(kinds)["layer"] is None  # a submodule in between
    assert not kinds._modules
    net.eval()(image())
    assert kinds.ready
    assert isinstance(kinds.layer, nn.Identity)


class Foreign(nn.Module):
    def __init__(self, **kept):
        super().__init__()
        vars(self).update(kept)

    def forward(self, x):
        return x


class Trainer:
    def __init__(self, **kept):
        vars(self).update(kept)


class Slices(torch.utils.data.Dataset):
    def __init__(self):
        self.items = [torch.zeros(1)]


def test_what_belongs_to_others_is_not_gone_into():
    """Nor is what is no attribute: it is neither read nor copied."""
    never = [torch.zeros(1) for _ in range(8)]
    net = blocks()
    optimiser = torch.optim.SGD(net.parameters())
    optimiser.kept = never[1]
    data = Slices()
    data.items = [never[2]]
    logger = logging.Logger("of a user")
    logger.kept = never[3]
    foreign = Foreign(
        trainer=Trainer(network=net, kept=never[0]),
        optimiser=optimiser,
        others=[data, logger, threading.Lock(), lambda: never[4], Trainer],
        writer=Trainer(lock=threading.Lock(), kept=never[5]),
        pen=Trainer(file=io.StringIO(), kept=never[6]),
        sender=Trainer(queue=queue.Queue(), kept=never[7]),
        proxy=weakref.proxy(Trainer()),  # of what is gone by now
        path=pathlib.Path(),
    )
    net.append(foreign)
    found = values_in(net)
    assert not any(thing is one for thing in found for one in never)
    assert [type(thing) for thing in found] == [list]
    HiResCAM(net, "2")(image(), VOLUME)


def test_large_things_are_neither_copied_nor_gone_through(monkeypatch):
    monkeypatch.setattr("seg3dcam.network.untouched.restoring.LARGEST", 100)
    large, small = np.zeros(101, np.uint8), np.zeros(100, np.uint8)
    tensors = [torch.zeros(101, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)]
    net = blocks(Foreign(kept=Trainer(items=[large, small, *tensors])))

    def write(*_):
        for thing in (large, small, *tensors):
            thing[:] = 7

    net[3].register_forward_hook(write)
    HiResCAM(net, "2")(image(), VOLUME)
    assert [int(thing[0]) for thing in (large, small, *tensors)] == [7, 0, 7, 0]


@pytest.mark.slow
def test_the_nearest_things_are_looked_at_first():
    """However many lie behind a list: what is no further away is found all the same."""
    many = [Trainer(number=n) for n in range(100_000)]
    near = np.zeros(2)
    net = blocks(Foreign(a_list=many), Foreign(near=near))
    found = values_in(net)
    assert any(thing is near for thing in found)
    assert any(thing is many[0] for thing in found)
    assert len(found) <= MOST


def test_parameters_in_a_list_are_not_copied():
    weights = [nn.Parameter(torch.zeros(1))]
    net = blocks(Foreign(flat=weights, lstm=nn.LSTM(2, 2)))
    net[3].register_forward_hook(lambda *_: weights[0].data.fill_(1) and None)
    HiResCAM(net, "2")(image(), VOLUME)
    assert weights[0].item() == 1


def test_how_deep_is_looked():
    deepest = inner = Trainer(level=0)
    for level in range(1, 9):
        inner = Trainer(inner=inner, level=level)
    found = values_in(blocks(Foreign(outer=inner)))
    assert [thing.level for thing in found] == [8, 7, 6, 5, 4, 3]
    assert deepest not in found


def test_arrays_that_cannot_be_written_are_left_alone(tmp_path):
    fixed = np.zeros(2)
    fixed.flags.writeable = False
    mapped = np.memmap(tmp_path / "mapped", np.float32, "w+", shape=(2,))
    net = blocks(Foreign(fixed=fixed, mapped=mapped))
    net[3].register_forward_hook(lambda *_: mapped.fill(3))
    HiResCAM(net, "2")(image(), VOLUME)
    assert mapped.tolist() == [3, 3]


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
    with pytest.warns(Seg3dcamWarning, match=r"module '4' \(Stubborn\) \(no training any more\)"):
        HiResCAM(net, "2")(image(), VOLUME)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert [p.requires_grad for p in net.parameters()] == needed
    assert all(m.training for m in net.modules() if not isinstance(m, Stubborn))
    assert all(not m._forward_hooks for m in net.modules())


class Drifts(nn.Module):
    """Writes to a parameter while it predicts."""

    def __init__(self, write, random):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, 1, 1, 1))
        self.write, self.random = write, random

    def forward(self, x):
        self.write(self)
        return x + self.mean + self.random * torch.rand(1)


def _add(net):
    with torch.no_grad():
        net.mean += 0.1


WRITES = {
    "in place": _add,
    "by .data": lambda net: net.mean.data.add_(0.1),
    "by a view": lambda net: net.mean.detach()[1:].mul_(2).add_(1),
    "out": lambda net: torch.add(net.mean.data, 1, out=net.mean.data),
    ".data set": lambda net: setattr(net.mean, "data", net.mean.data + 1),
    "replaced": lambda net: setattr(net, "mean", nn.Parameter(net.mean.detach() + 1)),
}


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(("name", "random"), crossed(WRITES, [0, 1]))
def test_parameters_that_the_network_itself_changes_are_put_back(name, random):
    net = blocks(Drifts(WRITES[name], random))
    mean, at = net[3].mean, net[3].mean.data_ptr()
    for _ in range(2):
        HiResCAM(net, "2")(image(), VOLUME)
        assert net[3].mean is mean
        assert mean.data_ptr() == at
        assert mean.requires_grad
        assert not mean.any()
    net(image())
    assert net[3].mean.any()


# ------------------------------------------------------- memory that buffers and attributes share


class Writes(nn.Module):
    """Writes the image to one tensor and reads it from another, which shares its memory."""

    def __init__(self, make):
        super().__init__()
        make(self)

    def forward(self, x):
        self.slot.copy_(x.detach())
        return x + self.whole.sum(0, keepdim=True)


def _views(of, kind):
    memory = torch.zeros(2, 4, 8, 8, 8)
    if kind == "buffers":
        of.register_buffer("whole", memory)
        of.register_buffer("slot", of.whole[:1])
    elif kind == "the view first":
        of.register_buffer("slot", memory[1:])
        of.register_buffer("whole", memory)
    elif kind == "buffer and attribute":
        of.register_buffer("whole", memory)
        of.slot = of.whole[:1]
    elif kind == "attribute and buffer":
        of.whole = memory[:1]
        of.register_buffer("slot", of.whole)
    else:
        of.whole = nn.Parameter(memory)
        of.register_buffer("slot", of.whole.detach()[:1])


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(
    "kind",
    ["buffers", "the view first", "buffer and attribute", "attribute and buffer", "parameter"],
)
def test_what_is_written_to_a_view_is_read_from_the_buffer(kind):
    net = blocks(Writes(lambda of: _views(of, kind))).eval()
    with torch.no_grad():
        expected = net(image())
        net[3].whole.zero_()
    before = {key: id(value) for key, value in net.named_buffers()}
    found = HiResCAM(net, "2")(image(), VOLUME)
    torch.testing.assert_close(found.logits, expected)
    assert not net[3].whole.any()
    assert {key: id(value) for key, value in net.named_buffers()} == before
    with torch.no_grad():
        net[3].slot.fill_(1)
    assert net[3].whole.any()


@pytest.mark.filterwarnings("ignore:layer .2. (explains|shows):seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.filterwarnings("ignore:the gradient at .* remembers of earlier passes")
def test_a_graph_that_is_written_to_an_attribute_is_let_go_of():
    def make(of):
        of.state = torch.zeros(1, 4, 8, 8, 8)
        of.memory = torch.zeros(2, 4, 8, 8, 8)
        of.view = of.memory[:1]

    class Remembers(Writes):
        def forward(self, x):
            self.state += x
            if self.with_view:
                self.view += x
            return x + self.state

    net = blocks(Remembers(make))
    net[3].with_view = False
    HiResCAM(net, "2")(image(), VOLUME)
    assert not net[3].state.requires_grad
    assert not net[3].state.any()
    net[3].with_view = True
    with pytest.warns(Seg3dcamWarning, match=r"its 'view' \(it is a view, which autograd follows"):
        HiResCAM(net, "2")(image(), VOLUME)
    assert not net[3].view.any()
    assert not net[3].memory.requires_grad


# ------------------------------------------------- what a forward pass does to modules and kinds


class Does(nn.Module):
    def __init__(self, make, do):
        super().__init__()
        make(self)
        self.do = do

    def forward(self, x):
        self.do(self)
        return x


class Once(dict):
    """Takes each key once, and forgets none."""

    def __setitem__(self, key, value):
        if key in self:
            raise KeyError("once only")
        super().__setitem__(key, value)

    def clear(self):
        raise RuntimeError("no clear")


class Doubling(list):
    def extend(self, items):
        raise TypeError("no extend")

    def append(self, item):
        super().append(2 * item)


class Recent(OrderedDict):
    """Whatever is read is the last."""

    def __getitem__(self, key):
        self.move_to_end(key)
        return super().__getitem__(key)


def _keep(make):
    return lambda of: setattr(of, "kept", make())


def _hook(of):
    of.register_full_backward_pre_hook(lambda *_: None)


def _resized(of):
    of.kept.resize_(5).fill_(2)


DONE = {
    "dict that refuses": (_keep(lambda: Once(a=1)), lambda of: of.kept.__setitem__(len(of.kept), 2),
                          lambda of: dict(of.kept)),
    "list that refuses": (_keep(lambda: Doubling([1])), lambda of: of.kept.append(2),
                          lambda of: list(of.kept)),
    "recently used": (_keep(lambda: Recent(a=1, b=2)), lambda of: of.kept["a"],
                      lambda of: list(of.kept)),
    "resized": (_keep(lambda: torch.zeros(3)), _resized, lambda of: of.kept.tolist()),
    "another size by .data": (
        _keep(lambda: torch.zeros(3)), lambda of: setattr(of.kept, "data", torch.ones(4)),
        lambda of: of.kept.tolist()),
    "let go of": (_keep(lambda: torch.ones(3)), lambda of: of.kept.untyped_storage().resize_(0),
                  lambda of: of.kept.tolist()),
    "expanded": (_keep(lambda: torch.zeros(1).expand(5)), lambda of: of.kept[:1].add_(1),
                 lambda of: of.kept.tolist()),
    "not a number": (_keep(lambda: torch.full((2,), torch.nan)), lambda of: None,
                     lambda of: of.kept._version),
    "sparse": (_keep(lambda: torch.eye(2).to_sparse()), lambda of: of.kept.mul_(2),
               lambda of: of.kept.to_dense().tolist()),
    "sparse rows": (_keep(lambda: torch.eye(2).to_sparse_csr()),
                    lambda of: of.kept.values().mul_(2), lambda of: of.kept.to_dense().tolist()),
    "inference": (_keep(inference_buffer), lambda of: of.kept.data.fill_(3),
                  lambda of: of.kept.tolist()),
    "masked": (_keep(lambda: np.ma.masked_array([1.0, 2.0], [0, 1])),
               lambda of: of.kept.mask.fill(True), lambda of: of.kept.mask.tolist()),
    "bit generator": (_keep(lambda: np.random.PCG64(1)), lambda of: of.kept.random_raw() and None,
                      lambda of: of.kept.state["state"]),
    "submodule made": (lambda of: None, lambda of: setattr(of, "made", nn.Identity()),
                       lambda of: list(of._modules)),
    "submodule replaced": (lambda of: setattr(of, "layer", nn.Identity()),
                           lambda of: setattr(of, "layer", nn.ReLU()), lambda of: type(of.layer)),
    "parameter made": (lambda of: None, lambda of: of.register_parameter("p", None),
                       lambda of: list(of._parameters)),
    "hook": (lambda of: None, lambda of: of.register_forward_hook(lambda *_: None) and None,
             lambda of: len(of._forward_hooks)),
    "backward hook": (lambda of: None, lambda of: _hook(of),
                      lambda of: len(of._backward_pre_hooks)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:the network draws random:seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("name", crossed(DONE, rows=4))
def test_what_a_forward_pass_does_to_its_modules_is_undone(name):
    make, do, state = DONE[name]
    net = blocks(Does(make, do))
    before, kept = state(net[3]), vars(net[3]).get("kept")
    HiResCAM(net, "2")(image(), VOLUME)
    assert state(net[3]) == before
    assert vars(net[3]).get("kept") is kept


def test_what_cannot_be_put_back_is_named_and_keeps_nothing_else_from_it():
    def shrink(of):
        of.kept.resize(5, refcheck=False)
        of.count += 1

    def make(of):
        of.kept, of.count = np.zeros(3), 0

    net = blocks(Does(make, shrink))
    with pytest.warns(Seg3dcamWarning, match=r"not as it was.*module '3' \(Does\): its 'kept' \("):
        HiResCAM(net, "2")(image(), VOLUME)
    assert net[3].count == 0
    assert net[3].training


# ------------------------------------------------------------- scripts, and switches of the process


class Accumulates(nn.Module):
    """Counts in one buffer in place, and replaces another, while it predicts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("idle", torch.full((1,), 5.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last.fill_(float(x.mean()))
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_buffers_of_a_scripted_submodule_are_written_back(nested, fails):
    inner = nn.Sequential(nn.Identity(), Accumulates()) if nested else Accumulates()
    net = blocks(torch.jit.script(inner))
    script = dict(net[3].named_buffers())
    calls, last, idle = (next(b for k, b in script.items() if n in k) for n in KEYS)
    calls[0], last[0] = 3, -1
    at, version = [b.data_ptr() for b in script.values()], idle._version
    explain_or_fail(net, fails)
    assert (calls.tolist(), last.tolist(), idle.tolist()) == ([3, 0], [-1], [5])
    assert [b.data_ptr() for b in net[3].buffers()] == at
    assert idle._version == version  # not written to: a graph may need it as it is
    if not fails:
        net.eval()(image())
        assert calls.tolist() == [4, 1]


KEYS = ("calls", "last", "idle")


def test_a_scripts_buffers_that_did_not_change_leave_a_graph_valid():
    net = blocks(torch.jit.script(nn.BatchNorm3d(4))).eval()
    x = image().requires_grad_()
    logits = net(x)
    HiResCAM(net, "2")(image(), VOLUME)
    logits.sum().backward()
    assert x.grad is not None


def switch():
    """Return a switch, and a list of what happened to it."""
    said = []

    @contextlib.contextmanager
    def turned():
        said.append("on")
        yield
        said.append("off")

    return ProcessSwitch(turned), said


def test_a_switch_is_turned_back_by_its_last_user():
    turn, said = switch()
    with turn():
        with turn():
            assert said == ["on"]
        assert said == ["on"]
    assert said == ["on", "off"]
    one, two = turn(), turn()  # of two threads: the first to come is the first to go
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert said == ["on", "off", "on"]
    two.__exit__(None, None, None)
    assert said == ["on", "off"] * 2
    with turn():
        pass
    assert said == ["on", "off"] * 3


def test_a_switch_is_turned_back_after_an_error():
    turn, said = switch()
    with turn():
        with pytest.raises(ValueError, match="inside"), turn():
            raise ValueError("inside")
        assert said == ["on"]
    assert said == ["on", "off"]


def test_what_could_not_be_turned_on_has_no_user():
    tried = []

    @contextlib.contextmanager
    def turned():
        tried.append(1)
        if len(tried) == 1:
            raise RuntimeError("not now")
        yield

    turn = ProcessSwitch(turned)
    with pytest.raises(RuntimeError, match="not now"), turn():
        pass
    with turn(), turn():
        pass
    assert len(tried) == 2


def precision():
    """Return the switch of products of matrices: True or "tf32" where they are rounded."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def test_arithmetic_is_exact_until_the_last_explanation_ends():
    """Two threads, of which the first to begin is the first to end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    usual, nets = precision(), [blocks(), blocks()]
    for net in nets:  # the first pass of a network, which may draw, is waited for
        HiResCAM(net, "2")(image(), VOLUME)
    seen, steps = {}, [threading.Event() for _ in range(3)]

    def explain(number):
        net = nets[number]

        def look(*_):
            if number not in seen:
                seen[number] = precision()
                if number == 0:
                    steps[0].set()
                    assert steps[1].wait(30)
                else:
                    steps[1].set()
                    assert steps[2].wait(30)
                    seen["after the first"] = precision()

        net[-1].register_forward_hook(look)
        HiResCAM(net, "2")(image(), VOLUME)

    threads = [threading.Thread(target=explain, args=(number,)) for number in range(2)]
    try:
        threads[0].start()
        assert steps[0].wait(30)
        threads[1].start()
        threads[0].join(60)
        steps[2].set()
        threads[1].join(60)
        assert precision() == usual
    finally:
        torch.set_float32_matmul_precision(before)
    assert usual not in ("ieee", False)
    assert {str(value) for value in seen.values()} <= {"ieee", "False"}
    assert len(seen) == 3
