"""Networks that work in place on tensors that their own gradient needs: right maps all the same."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers_crossed import crossed
from monai.networks.nets import VarAutoEncoder
from torch import nn

from seg3dcam import HiResCAM, WindowPlan, suggest_layers, targets
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")

VOLUME = targets.ClassLogit(1, "volume")


class Net(nn.Module):
    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv3d(1, 4, 3, 2, 1)
        self.conv = nn.Conv3d(4, 4, 3, padding=1)
        self.head = nn.ConvTranspose3d(4, 2, 2, 2)
        self.step = step

    def forward(self, x):
        return self.head(self.step(self.conv(torch.relu(self.down(x)))))


def image(size=8):
    return torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(1))


def written(tensor, values):
    return tensor.copy_(values)


def replaced(tensor, values):
    return values


def exponential(put):
    def step(h):
        e = torch.exp(0.1 * h)
        return put(e, e + h)

    return step


def gated(put):
    def step(h):
        gate = torch.sigmoid(h)
        out = h * gate
        return out * put(gate, gate + 1)

    return step


def squared(put):
    """Writes to what the target layer itself gave."""

    def step(h):
        square = h * h
        return square + put(h, h + 1)

    return step


def normalised(put):
    def step(h):
        part = torch.softmax(h, 1)
        return put(part, 2 * part) * h

    return step


STEPS = {"exp": exponential, "gate": gated, "square": squared, "softmax": normalised}
METHODS = CAMS | ATTRIBUTIONS


@functools.cache
def made(name, put):
    """Return a network, the same one for all tests, so that its grids are measured once."""
    return Net(STEPS[name](put))


def explained(key, net, layer, plan):
    layers = () if key == "full_grad" or key in ATTRIBUTIONS else (layer,)
    return METHODS[key](net, *layers, sliding_window=plan)(image(), VOLUME)


#: A layer, and the windows in which it is explained.
PLACES = {
    "conv": ("conv", None),
    "auto": ("auto", None),
    "down, in windows": ("down", WindowPlan((4, 8, 8), overlap=0.5)),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("key", "name", "place"),
    crossed(
        ["hires_cam", "grad_cam", "shapley_cam", "full_grad", "gradient", "integrated_gradients"],
        STEPS,
        PLACES,
    ),
)
def test_the_map_is_that_of_the_network_that_replaces(name, key, place):
    layer, plan = PLACES[place]
    if layer == "auto" and name == "square":
        layer = "down"  # a layer whose output is overwritten is not suggested
    one = explained(key, made(name, written), layer, plan)
    two = explained(key, made(name, replaced), layer, plan)
    assert one.maps.keys() == two.maps.keys()
    torch.testing.assert_close(one.logits, two.logits)
    for layer_name, map_ in one.maps.items():
        assert map_.any()
        torch.testing.assert_close(map_, two.maps[layer_name])
    assert one.status == two.status


@pytest.mark.parametrize("name", STEPS)
def test_suggestions_and_feature_maps_of_them(name):
    written_, replaced_ = Net(STEPS[name](written)), Net(STEPS[name](replaced))
    shape = (1, 1, 8, 8, 8)
    if name != "square":  # a layer whose output is overwritten is not suggested
        assert suggest_layers(written_, shape)[0].name == suggest_layers(replaced_, shape)[0].name
    found = [feature_maps(net, image(), "conv", target=VOLUME) for net in (written_, replaced_)]
    torch.testing.assert_close(*(torch.as_tensor(one.values) for one in found))


class Apart(VarAutoEncoder):
    """Adds the mean out of place, as the original does in place."""

    def reparameterize(self, mu, logvar):
        return mu + torch.exp(0.5 * logvar)


@pytest.mark.parametrize("layer", ["auto", "encode.encode_1"])
def test_the_variational_autoencoder_of_monai(layer):
    found = []
    for kind in (VarAutoEncoder, Apart):
        torch.manual_seed(0)
        net = kind(3, (1, 16, 16, 16), 2, 4, channels=(4, 8), strides=(2, 2))
        found.append(HiResCAM(net, layer)(image(16), VOLUME))
    one, two = found
    assert one.maps.keys() == two.maps.keys()
    for name, map_ in one.maps.items():
        assert map_.any()
        torch.testing.assert_close(map_, two.maps[name])


def by_parts(h):
    first, second = h.chunk(2, 1)
    first += 1
    return torch.cat([first, second], 1)


def into_another(h):
    return torch.mul(h, 2, out=torch.empty_like(h))


@pytest.mark.parametrize("step", [by_parts, into_another])
def test_what_has_no_gradient_at_all_is_said_with_a_way_out(step):
    with pytest.raises(ModelError, match=r"predicts, but has no gradient.*score_cam"):
        HiResCAM(Net(step), "conv")(image(), VOLUME)
    assert CAMS["score_cam"](Net(step), "conv")(image(), VOLUME).maps["conv"].isfinite().all()


def test_targets_may_overwrite_too():
    found = []
    for put in (written, replaced):

        def target(logits, put=put):
            root = logits.exp()
            return put(root, 2 * root).flatten(1).sum(1)

        found.append(HiResCAM(Net(torch.relu), "conv")(image(), target).maps["conv"])
    torch.testing.assert_close(*found)
