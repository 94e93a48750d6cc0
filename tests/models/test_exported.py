"""Exported networks: the maps of the network that was exported, or an error that says the way."""

from __future__ import annotations

import functools
import os
import zipfile

import numpy as np
import pytest
import torch
from helpers_cases import Calls, write_yaml
from helpers_crossed import crossed
from monai.networks.nets import UNet
from torch import nn

from seg3dcam import GradCAM, HiResCAM, explain, load_model, load_scan, suggest_layers
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ConfigError, ModelError
from seg3dcam.targets import ClassLogit

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

UNET = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 8],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
TARGET = ClassLogit(1, "volume")
SIZE = 16
LAYERS = ["model.0", "model.1.submodule", "model.1.submodule.1.submodule"]


@functools.cache
def unet() -> nn.Module:
    """Return the network, the same one for all tests, so that its grids are measured once."""
    torch.manual_seed(0)
    network = UNet(**UNET)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(
    scope="module", params=["any size", pytest.param("one size", marks=pytest.mark.slow)]
)
def programs(request, tmp_path_factory):
    """Return a network, the file of its program, and whether it takes any size."""
    any_size = request.param == "any size"
    file = tmp_path_factory.mktemp("programs") / "net.pt2"
    auto = torch.export.Dim.AUTO
    example = torch.rand(2 if any_size else 1, 1, SIZE, SIZE, SIZE)
    shapes = ({axis: auto for axis in (0, 2, 3, 4)},) if any_size else None
    program = torch.export.export(unet(), (example,), dynamic_shapes=shapes)
    torch.export.save(program, file)
    return unet(), file, any_size


def spec(file, place, **changes):
    content = {"exported": str(file), "classes": ["background", "organ"], **changes}
    return write_yaml(place / "model.yaml", content)


@pytest.fixture(scope="module")
def loaded(programs, tmp_path_factory):
    """Return a network and its program as a module, whose grids are measured once, too."""
    network, file, _ = programs
    return network, load_model(spec(file, tmp_path_factory.mktemp("spec")), trust=True).module


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "method", crossed(["grad_cam", "hires_cam", "layer_cam", "eigen_cam"], rows=1)
)
def test_maps_are_those_of_the_network_that_was_exported(method, loaded):
    network, module = loaded
    x = torch.rand(1, 1, SIZE, SIZE, SIZE)
    own = CAMS[method](module, LAYERS)(x, TARGET)
    expected = CAMS[method](network, LAYERS)(x, TARGET)
    for name in LAYERS:
        assert own.layers[name].grid == expected.layers[name].grid  # the measured place, too
        assert expected.status[name] == "ok"
        torch.testing.assert_close(own.maps[name], expected.maps[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_whole_scans_are_explained_in_windows(programs, tmp_path):
    network, file, any_size = programs
    window = {"roi_size": SIZE, "overlap": 0.5}
    model = load_model(spec(file, tmp_path, window=window), trust=True)
    assert model.in_channels == 1
    scan = load_scan(np.random.default_rng(0).random((20, 22, 16)), affine=np.eye(4))
    found = explain(scan, model, TARGET, layers=LAYERS[1])
    cam = HiResCAM(network, LAYERS[1], sliding_window=model.window)
    expected = cam(scan.data[None], TARGET).maps[LAYERS[1]][0]
    torch.testing.assert_close(found.maps[LAYERS[1]], expected, rtol=1e-4, atol=1e-5)
    if any_size:
        names = [s.name for s in suggest_layers(model.module, (1, 1, SIZE, SIZE, SIZE))]
        assert names == [s.name for s in suggest_layers(network, (1, 1, SIZE, SIZE, SIZE))]


def test_windows_of_another_shape_are_refused_early(programs, tmp_path):
    _, file, any_size = programs
    if any_size:
        pytest.skip("it takes any")
    for window in ({"roi_size": 24}, {"roi_size": SIZE, "sw_batch_size": 2}):
        with pytest.raises(ModelError, match=r"exported for inputs \(1, 1, 16, 16, 16\): set wind"):
            load_model(spec(file, tmp_path, window=window), trust=True)


def test_a_program_in_train_mode_is_refused(tmp_path):
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Dropout(0.5)).train()
    file = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(network, (torch.rand(1, 1, 4, 4, 4),)), file)
    with pytest.raises(ModelError, match=r"exported in train mode \(dropout is active\)"):
        load_model(spec(file, tmp_path), trust=True)


def test_a_malicious_program_runs_nothing_without_trust(programs, tmp_path):
    _, file, _ = programs
    marker, bad = tmp_path / "ran", tmp_path / "bad.pt2"
    import pickle

    with zipfile.ZipFile(file) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            payload = pickle.dumps(Calls(os.system, f"touch {marker}"))
            spoiled = "sample_inputs" in name or name.endswith("weight_0")
            target.writestr(name, payload if spoiled else source.read(name))
    with pytest.raises(ModelError, match=r"can run code that is pickled in it.*--trust"):
        load_model(spec(bad, tmp_path))
    assert not marker.exists()


def test_other_files_are_told_the_way(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load_model(spec("none.pt2", tmp_path))
    script = tmp_path / "net.ts"
    torch.jit.trace(unet(), torch.rand(1, 1, SIZE, SIZE, SIZE)).save(script)
    with pytest.raises(ModelError, match=r"TorchScript model takes no hooks.*weights: net.ts"):
        load_model(spec(script, tmp_path))
    onnx = tmp_path / "net.onnx"
    onnx.write_bytes(b"onnx")
    with pytest.raises(ModelError, match="onnx file has no layers that PyTorch could explain"):
        load_model(spec(onnx, tmp_path))
    torch.save(unet().state_dict(), tmp_path / "state.pt")
    with pytest.raises(ModelError, match=r"state.pt: cannot be read as an exported program"):
        load_model(spec(tmp_path / "state.pt", tmp_path), trust=True)
    with pytest.raises(ConfigError, match="it has factory and exported"):
        load_model(spec(onnx, tmp_path, factory="monai.networks.nets:UNet"))


# ---------------------------------------------------------------- weights in another wrapping


def factory(tmp_path, weights):
    content = {
        "factory": "monai.networks.nets:UNet",
        "arguments": UNET,
        "weights": weights,
        "classes": ["background", "organ"],
    }
    return write_yaml(tmp_path / "factory.yaml", content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.ts", "net.pt"])
def test_weights_of_a_torchscript_file_go_into_the_factorys_network(name, tmp_path):
    x = torch.rand(1, 1, SIZE, SIZE, SIZE)
    torch.jit.trace(unet(), x).save(tmp_path / name)
    module = load_model(factory(tmp_path, name)).module
    own, expected = (GradCAM(n, LAYERS[1])(x, TARGET).maps[LAYERS[1]] for n in (module, unet()))
    assert torch.equal(own, expected)


def test_weights_that_are_a_program_say_what_to_do(programs, tmp_path):
    _, file, _ = programs
    with pytest.raises(ModelError, match=r"torch.save\(program.state_dict, file\)"):
        load_model(factory(tmp_path, str(file)))
