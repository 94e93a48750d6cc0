"""Models from a spec: the right network with the right weights, and no foreign code unasked."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers_cases import (
    Place,
    arguments,
    brightness_network,
    contents,
    write_model,
)
from safetensors.torch import save_file
from torch import nn

from seg3dcam.errors import ConfigError, ModelError, Seg3dcamWarning, TargetError
from seg3dcam.models import SegModel, load_model
from seg3dcam.windows import WindowPlan

X = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def same_output(model):
    with torch.no_grad():
        return torch.equal(model.module(X), brightness_network().eval()(X))


# ------------------------------------------------------------------------------------- a spec


def test_the_network_is_the_one_that_was_saved(tmp_path):
    model = load_model(write_model(tmp_path))
    assert same_output(model)
    assert not model.module.training
    assert model.class_names == ("background", "organ", "lesion")
    assert model.activation == "softmax"
    assert model.in_channels == 1
    assert model.window == WindowPlan(16)


def test_all_settings_arrive(tmp_path):
    window = {
        "roi_size": [16, 16, 8],
        "overlap": 0.5,
        "mode": "constant",
        "sw_batch_size": 3,
        "sigma_scale": 0.25,
        "padding_mode": "replicate",
        "cval": 7.0,
    }
    model = load_model(write_model(tmp_path, window=window, activation="sigmoid", output=0))
    assert model.window == WindowPlan(**{**window, "roi_size": (16, 16, 8)})
    assert (model.activation, model.output) == ("sigmoid", 0)


def test_without_a_window_the_whole_scan_goes_in_at_once(tmp_path):
    assert load_model(write_model(tmp_path, window=None)).window is None


@pytest.mark.parametrize("place", ["monai.networks.nets", "monai.networks.nets.unet"])
def test_factory_from_a_module_or_below(tmp_path, place):
    assert same_output(load_model(write_model(tmp_path, factory=f"{place}:UNet")))


def test_in_channels_are_read_from_the_first_convolution(tmp_path, own_networks):
    own_networks.write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Conv3d(5, 3, 1))\n"
    )
    path = write_model(tmp_path, factory=f"{own_networks.stem}:net", arguments={}, weights="random")
    with pytest.warns(Seg3dcamWarning, match="random"):
        assert load_model(path, trust=True).in_channels == 5


# ------------------------------------------------------------------------------------- weights


def checkpoint(key):
    return lambda state: {key: state, "epoch": 7}


SAVED = {
    "state dict": lambda state: state,
    "state_dict": checkpoint("state_dict"),
    "model_state_dict": checkpoint("model_state_dict"),
    "model": checkpoint("model"),
    "network_weights": checkpoint("network_weights"),
    "DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "both": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "both in a checkpoint": lambda state: checkpoint("net")(SAVED["both"](state)),
}


@pytest.mark.parametrize("pack", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.ckpt"])
def test_weights_as_people_save_them(tmp_path, pack, name):
    torch.save(pack(brightness_network().state_dict()), tmp_path / name)
    assert same_output(load_model(write_model(tmp_path, weights=name)))


def test_weights_are_relative_to_the_spec(tmp_path, monkeypatch):
    spec = write_model(tmp_path / "spec", weights="../elsewhere/w.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file(brightness_network().state_dict(), tmp_path / "elsewhere" / "w.safetensors")
    monkeypatch.chdir("/")
    assert same_output(load_model(spec))


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(brightness_network(), tmp_path / "net.pt")
    path = write_model(tmp_path, weights="net.pt")
    with pytest.raises(ModelError, match=r"net\.pt: cannot be read as weights .* a state dict"):
        load_model(path)


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "net.pt")
    path = write_model(tmp_path, weights="net.pt")
    with pytest.raises(ModelError, match=r"no state dict .* \['epoch', 'optimizer'\]; looked for"):
        load_model(path)


def test_many_keys_that_do_not_fit_are_counted(tmp_path):
    deeper = {"channels": [4, 8, 8], "strides": [2, 2]}
    path = write_model(tmp_path, arguments={**arguments(), **deeper})
    with pytest.raises(ModelError, match=r"missing in the file: model\.1.*; unknown to .*; of ano"):
        load_model(path)


def test_random_weights_are_said_aloud(tmp_path):
    with pytest.warns(Seg3dcamWarning, match=r"model\.yaml: the network has random weights"):
        load_model(write_model(tmp_path, weights="random"))


# --------------------------------------------------------------------------------------- trust


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """A module of the user's own; being imported, it leaves a mark."""
    folder = tmp_path / "code"
    folder.mkdir()
    file = folder / "networks_of_a_user.py"
    file.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from monai.networks.nets import UNet\n"
        "(Path(__file__).parent / 'mark').touch()\n"
        "def net(**arguments):\n"
        "    return UNet(**arguments)\n"
        "class Mine(UNet):\n"
        "    pass\n"
        "def no_network():\n"
        "    return {'a': 'dict'}\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield file
    sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("name", ["net", "Mine"])
def test_foreign_code_runs_only_when_trusted(tmp_path, own_networks, name):
    path = write_model(tmp_path, factory=f"{own_networks.stem}:{name}")
    with pytest.raises(ModelError, match=rf"{own_networks.stem}:{name} is not from .* --trust"):
        load_model(path)
    assert not (own_networks.parent / "mark").exists()
    assert same_output(load_model(path, trust=True))
    assert (own_networks.parent / "mark").exists()


def test_foreign_code_from_the_command_line(tmp_path, own_networks):
    place = Place.at(tmp_path, factory=f"{own_networks.stem}:net")
    assert place.explain().code == 1
    assert "mark" not in contents(own_networks.parent)
    assert place.explain("--trust").code == 0


def test_what_a_trusted_factory_returns_is_checked(tmp_path, own_networks):
    path = write_model(tmp_path, factory=f"{own_networks.stem}:no_network", arguments={})
    with pytest.raises(ModelError, match=r"no_network returned dict, not a torch\.nn\.Module"):
        load_model(path, trust=True)


@pytest.mark.parametrize(
    "factory",
    [
        "monai.networks.nets.unet:warnings.warn",
        "monai.networks.nets.unet:torch.load",
        "monai.networks.nets.unet:torch.hub.load",
        "monai.networks.nets.unet:Sequence",
    ],
)
def test_nothing_but_networks_is_reached_through_a_trusted_module(tmp_path, factory):
    path = write_model(tmp_path, factory=factory, arguments={})
    with pytest.raises(ModelError, match=r"is no torch\.nn\.Module class|no '\w+' in"):
        load_model(path)


def test_a_spec_is_no_code(tmp_path):
    path = write_model(tmp_path)
    path.write_text("factory: !!python/name:os.system\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_model(path)


# --------------------------------------------------------------------------- fingerprint, classes


def fingerprint(change=lambda state: None, **model):
    network = brightness_network(**model)
    with torch.no_grad():
        change(network.state_dict())
    return SegModel(network).fingerprint()


def test_fingerprint_of_equal_weights(tmp_path):
    saved = load_model(write_model(tmp_path)).fingerprint()
    assert saved == fingerprint()
    torch.save({"state_dict": brightness_network().state_dict()}, tmp_path / "net.pt")
    assert load_model(write_model(tmp_path, weights="net.pt")).fingerprint() == saved


@pytest.mark.parametrize("key", brightness_network().state_dict())
def test_fingerprint_differs_by_one_weight(key):
    def change(state):
        flat = state[key].view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))

    assert fingerprint(change) != fingerprint()


def test_fingerprint_counts_buffers_and_takes_any_type():
    def network(batches):
        norm = nn.BatchNorm3d(2)
        norm.num_batches_tracked += batches
        return SegModel(nn.Sequential(norm, nn.Conv3d(2, 2, 1, bias=False).bfloat16()))

    torch.manual_seed(0)
    one = network(0)
    torch.manual_seed(0)
    other = network(1)
    assert one.fingerprint() == one.fingerprint() != other.fingerprint()


def test_fingerprint_knows_shapes():
    """The same bytes in another shape are another network."""

    def model(*shape):
        network = nn.Module()
        network.register_buffer("a", torch.ones(shape))
        return SegModel(network)

    assert model(2, 3).fingerprint() != model(3, 2).fingerprint()


MODEL = SegModel(nn.Identity(), class_names=("background", "liver", "7", "Läsion"))


@pytest.mark.parametrize(
    ("given", "index"),
    [("background", 0), ("liver", 1), ("7", 2), ("Läsion", 3), (0, 0), (3, 3), ("0", 0), ("3", 3)],
    ids=repr,
)
def test_class_index(given, index):
    """By name, by index, by an index in text; a name that is a number is a name first."""
    assert MODEL.class_index(given) == index


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("livr", r"class 'livr' does not exist: did you mean 'liver'\?"),
        ("Liver", r"did you mean 'liver'\?"),
        ("kidney", "class 'kidney' does not exist: legal: 'background', 'liver', '7', 'Läsion'"),
        (4, "class 4 does not exist; the classes are 0 background, 1 liver, 2 7, 3 Läsion"),
        ("4", "class 4 does not exist"),
        (-1, "class -1 does not exist"),
        ("-1", "class '-1' does not exist"),
        ("", "class '' does not exist"),
        ("²", "class '²' does not exist"),
    ],
)
def test_class_that_does_not_exist(given, said):
    with pytest.raises(TargetError, match=said):
        MODEL.class_index(given)
