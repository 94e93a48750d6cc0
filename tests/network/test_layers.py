"""Layer names find the right module and element, and a wrong name gets an error that helps."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from seg3dcam.errors import LayerError, ModelError
from seg3dcam.network.ensemble import unwrap
from seg3dcam.network.layers import LayerRef, resolve_layers


@pytest.fixture(scope="module")
def net():
    encoder = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Conv3d(2, 3, 3))
    decoder = nn.ModuleList([nn.ConvTranspose3d(3, 2, 2, 2), nn.Identity()])
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder, "head": nn.Conv3d(2, 2, 1)})


def names(layers):
    return [str(layer) for layer in layers]


# ---------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize(
    ("written", "name", "element"),
    [
        ("encoder", "encoder", ()),
        ("encoder.2", "encoder.2", ()),
        ("encoder[0]", "encoder", (0,)),
        ("encoder.2[-1]", "encoder.2", (-1,)),
        ("decoder.1[out]", "decoder.1", ("out",)),
        ("decoder.1[out][2][x y]", "decoder.1", ("out", 2, "x y")),
    ],
)
def test_a_name_gives_its_module_and_element(written, name, element, net):
    (layer,) = resolve_layers(net, written)
    assert (layer.name, layer.element) == (name, element)
    assert layer.module is net.get_submodule(name)
    assert str(layer) == written


@pytest.mark.slow
@given(
    path=st.lists(st.integers(-9, 99) | st.from_regex(r"[a-z_]{1,8}", fullmatch=True), max_size=4)
)
def test_every_selection_survives_being_written_and_read(path):
    layer = LayerRef("a.0", tuple(path))
    model = nn.ModuleDict({"a": nn.Sequential(nn.Identity())})
    assert resolve_layers(model, str(layer)) == [layer]


def test_a_module_gives_its_name(net):
    (layer,) = resolve_layers(net, net["encoder"][2])
    assert str(layer) == "encoder.2"
    assert layer.module is net["encoder"][2]


def test_a_list_keeps_its_order_and_drops_repetitions(net):
    spec = ["head", net["encoder"][0], "encoder.0", "decoder.1[0]", "decoder.1[1]", "head"]
    found = names(resolve_layers(net, spec))
    assert found == ["head", "encoder.0", "decoder.1[0]", "decoder.1[1]"]


def test_a_module_that_is_used_twice_has_its_first_name():
    shared = nn.Conv2d(1, 1, 1)
    model = nn.Sequential(OrderedDict(first=shared, second=shared))
    assert names(resolve_layers(model, shared)) == ["first"]


def test_all_is_every_convolution(net):
    found = resolve_layers(net, "all")
    assert names(found) == ["encoder.0", "encoder.2", "decoder.0", "head"]


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_all_works_in_any_number_of_dimensions(ndim):
    plain = getattr(nn, f"Conv{ndim}d")(1, 2, 3)
    transposed = getattr(nn, f"ConvTranspose{ndim}d")(2, 2, 3)
    model = nn.Sequential(plain, nn.ReLU(), transposed, nn.Linear(2, 2))
    assert names(resolve_layers(model, "all")) == ["0", "2"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("encoder.*", ["encoder.0", "encoder.1", "encoder.2"]),
        ("*.0", ["encoder.0", "decoder.0"]),
        ("*", ["encoder", "decoder", "head"]),
        ("*coder", ["encoder", "decoder"]),
        ("**.1", ["encoder.1", "decoder.1"]),
        ("e**", ["encoder", "encoder.0", "encoder.1", "encoder.2"]),
        ("encoder.*[0][fine]", [f"encoder.{i}[0][fine]" for i in range(3)]),
        (["encoder.*", "encoder.1"], ["encoder.0", "encoder.1", "encoder.2"]),
        (["encoder.*", "encoder.1[0]"], ["encoder.0", "encoder.1", "encoder.2", "encoder.1[0]"]),
    ],
)
def test_a_star_stands_for_anything_between_two_dots(written, expected, net):
    assert names(resolve_layers(net, written)) == expected


def test_only_what_is_named_in_full_is_required(net):
    found = resolve_layers(net, ["encoder.*", "all", "encoder.1", net["head"]])
    assert {str(layer) for layer in found if layer.required} == {"encoder.1", "head"}


def test_a_layer_may_be_called_all():
    model = nn.ModuleDict({"all": nn.Conv2d(1, 1, 1), "other": nn.Conv2d(1, 1, 1)})
    (only,) = resolve_layers(model, "all")
    assert only.required
    assert only.name == "all"


@pytest.mark.parametrize("name", ["a[0]", "a[", "*", "a\x1b[31m"])
def test_a_layers_own_name_is_always_that_layer(name):
    network = nn.Sequential(
        OrderedDict([("first", nn.Conv3d(1, 2, 1)), (name, nn.Conv3d(2, 2, 1))])
    )
    (layer,) = resolve_layers(network, name)
    assert layer.module is network[1]
    assert layer.element == ()


def test_the_layout_given_holds_for_all_layers(net):
    transform = nn.Identity()
    found = resolve_layers(net, ["encoder.*", "head"], transform)
    assert all(layer.layout is transform for layer in found)
    assert found == resolve_layers(net, ["encoder.*", "head"])


def test_wrappers_are_looked_through(net):
    compiled = torch.compile(net, backend="eager")
    for wrapped in (net, nn.DataParallel(net), compiled, nn.DataParallel(compiled)):
        assert unwrap(wrapped) is net
        assert names(resolve_layers(wrapped, "encoder.0")) == ["encoder.0"]


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("encoder.5", r"no layer 'encoder.5' in ModuleDict: did you mean 'encoder.\d'"),
        ("decodr", "no layer 'decodr' in ModuleDict: did you mean 'decoder'"),
        ("decodr[0]", r"no layer 'decodr\[0\]' in ModuleDict: did you mean 'decoder'"),
        ("zzz", "no layer 'zzz' in ModuleDict: legal: 'encoder', 'encoder.0', .*'head'"),
        ("", "no layer '' in ModuleDict: legal: 'encoder'"),
        ("encoder[0", r"no layer 'encoder\[0' in"),
        ("decodr.*", r"no layer 'decodr.\*' in ModuleDict: did you mean 'decoder"),
        ("encoder.*.*", r"no layer 'encoder.\*.\*' in"),
        ("[0]", r"no layer '\[0\]' in"),
        ("encoder]0[", r"no layer 'encoder\]0\[' in"),
        ("encoder[]", r"no layer 'encoder\[\]' in"),
        ("encoder[0].2", r"no layer 'encoder\[0\].2' in"),
        (["head", "hed"], "no layer 'hed' in ModuleDict: did you mean 'head'"),
        ([], "no target layer given: name one, or use target_layers='auto'"),
        (None, "layer"),
        (3, "layer"),
        ([3], "give a dotted name"),
        (torch.zeros(9, 9), r"target layers tensor\(.{,40}: give a dotted name"),
    ],
)
def test_a_wrong_name_is_refused(spec, message, net):
    with pytest.raises(LayerError, match=message):
        resolve_layers(net, spec)


def test_at_most_twelve_legal_names_are_listed():
    model = nn.Sequential(*[nn.Identity() for _ in range(40)])
    with pytest.raises(LayerError, match=r"legal: '0', .*'11' and 28 more$"):
        resolve_layers(model, "bottleneck")


def test_a_module_of_another_network_is_refused(net):
    with pytest.raises(LayerError, match="Conv3d given as a module is no part of the model"):
        resolve_layers(net, copy.deepcopy(net["head"]))


def test_the_network_itself_is_no_target_layer(net):
    with pytest.raises(LayerError, match="is the network itself"):
        resolve_layers(net, net)


def test_all_of_a_network_without_convolutions_is_refused():
    with pytest.raises(LayerError, match=r"no target layer|no convolution"):
        resolve_layers(nn.Sequential(nn.Linear(2, 2)), "all")


@pytest.mark.parametrize("model", [None, "model.pt", dict, torch.zeros(1)])
def test_what_is_no_module_is_refused(model):
    kind = type(model).__name__
    with pytest.raises(ModelError, match=f"must be a torch.nn.Module, got {kind}"):
        unwrap(model)


# ---------------------------------------------------------------------------------- pick and put


Pair = namedtuple("Pair", "fine coarse")


class Record(OrderedDict):
    """Stands for the output classes of other libraries."""


@dataclass
class Result:
    """Stands for those that are no dicts."""

    fine: object
    coarse: object


def outputs():
    one, two = torch.ones(1, 2), torch.full((1, 2), 2.0)
    return [
        ((), two),
        ((1,), (one, two)),
        ((-1,), [one, one, two]),
        (("coarse",), {"fine": one, "coarse": two}),
        (("coarse",), Record(fine=one, coarse=two)),
        ((1,), Pair(one, two)),
        (("coarse",), Pair(one, two)),
        (("coarse",), Result(one, two)),
        ((0, "coarse", 1), [Result(None, (one, two))]),
        (("a", 0, 1), {"a": [(one, two), None], "b": 3}),
    ]


@pytest.mark.parametrize(("element", "output"), outputs())
def test_pick_and_put(element, output):
    """Putting replaces the picked tensor in a copy of the same type, and nothing else."""
    layer = LayerRef("layer", element)
    before = copy.deepcopy(output)
    assert layer.pick(output).tolist() == [[2, 2]]
    changed = layer.put(output, torch.full((1, 2), 7.0))
    assert layer.pick(changed).tolist() == [[7, 7]]
    assert type(changed) is type(output)
    assert str(changed) == str(before).replace("2.", "7.")
    assert str(output) == str(before)


@pytest.mark.parametrize(
    ("element", "output", "message"),
    [
        (
            (),
            (torch.zeros(1, 2), torch.zeros(3)),
            r"a tuple, not .* 'f\[0\]' \(1, 2\), 'f\[1\]' \(3",
        ),
        ((2,), (torch.zeros(1, 2),), r"no element \[2\]. The layer gives 'f\[0\]' \(1, 2\)"),
        (("x",), {"y": torch.zeros(1)}, r"no element \[x\]. The layer gives 'f\[y\]' \(1,\)"),
        (("y",), [torch.zeros(1)], r"no element \[y\]. The layer gives 'f\[0\]' \(1,\)"),
        ((0,), [None, torch.zeros(1)], r"a NoneType, not a tensor. The layer gives 'f\[1\]'"),
        ((), None, "a NoneType, not a tensor. The layer gives no tensor at all"),
        ((), torch.zeros(1, dtype=torch.int32), "dtype is torch.int32, which has no gradient"),
        ((), torch.zeros(1, dtype=torch.bool), "dtype is torch.bool, which has no gradient"),
        ((0,), torch.zeros(1, 2, 4), r"'f\[0\]'.* The layer gives 'f' \(1, 2, 4\)"),
    ],
)
def test_what_cannot_be_picked_is_refused_with_the_choices(element, output, message):
    with pytest.raises(LayerError, match=message):
        LayerRef("f", element).pick(output)
