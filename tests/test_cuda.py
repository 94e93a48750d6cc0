"""On a GPU: the same maps as on the CPU, and the caller's device state as before.

Skipped where there is no GPU. Every test explains once on the CPU and once with the network on
`DEVICE`, and compares within what float32 allows: 1e-4 of the largest value, since a GPU sums in
another order. Tests of two cards are skipped where there is one.
"""

from __future__ import annotations

import contextlib
import copy
import threading

import numpy as np
import pytest
import torch
from helpers_bundles import SPLEEN, write_bundle
from helpers_cases import OBLIQUE, SHAPE, Place
from helpers_nnunet import write_case, write_folder
from monai.data import MetaTensor
from torch import nn

from seg3dcam import (
    Ensemble,
    GradCAM,
    HiResCAM,
    WindowPlan,
    explain,
    load_model,
    load_scan,
    suggest_layers,
    targets,
)
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.cams.feature_maps import feature_maps
from seg3dcam.errors import OutOfMemoryError
from seg3dcam.integrations import Camd, CamInferer, EpochCams

DEVICE = "cuda"
SECOND = "cuda:1"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning"),
]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")

METHODS = CAMS | ATTRIBUTIONS
VOLUME = targets.ClassLogit(1, region="volume")
LAYER = "encoder.2"

PLANS = {
    "one window": None,
    "windows": WindowPlan((8, 8, 4)),
    "overlap": WindowPlan(8, overlap=0.5, sw_batch_size=3),
    "nothing kept": WindowPlan(8, overlap=0.5, sw_batch_size=2, cache_gb=0),
    "nnU-Net's": WindowPlan(8, overlap=0.5, convention="nnunet"),
}


# ------------------------------------------------------------------------- what only CUDA can tell


def random_state():
    """Return the state of every card's generator."""
    return torch.cuda.get_rng_state_all()


def device_state():
    """Return what a caller has set for his cards."""
    b = torch.backends
    switches = {
        f"{name}.{switch}": getattr(place, switch)
        for name, place in {"matmul": b.cuda.matmul, "cudnn": b.cudnn}.items()
        for switch in ("allow_tf32", "fp32_precision", "benchmark", "deterministic", "enabled")
        if hasattr(place, switch)
    }
    return switches | {
        "current": torch.cuda.current_device(),
        "stream": torch.cuda.current_stream(),
        "default": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "sdp": [b.cuda.flash_sdp_enabled(), b.cuda.mem_efficient_sdp_enabled()],
    }


def allocated():
    """Return how many bytes tensors hold."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@contextlib.contextmanager
def little_memory():
    """Leave this process little more of the card than it has reserved."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    wanted = torch.cuda.memory_reserved() + 256e6
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------- networks


class Net(nn.Module):
    """A small U-Net without a skip: batch norm, in-place activations, 2D or 3D."""

    def __init__(self, ndim=3):
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if ndim == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        norm = nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d
        self.encoder = nn.Sequential(
            conv(1, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(6, 8, 3, stride=2, padding=1),
            norm(8),
            nn.ReLU(inplace=True),
        )
        self.decoder = nn.Sequential(up(8, 6, 2, 2), nn.LeakyReLU(inplace=True))
        self.head = conv(6, 3, 1)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x)))


class OnTwoDevices(Net):
    """The encoder is on one device and the rest on another, moved by hand."""

    def forward(self, x):
        features = self.encoder(x)
        return self.head(self.decoder(features.to(self.head.weight.device)))


class AlwaysDropping(Net):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return self.head(nn.functional.dropout(self.decoder(self.encoder(x)), 0.5, training=True))


def made(kind=Net, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind(**settings).eval()
        if isinstance(network, Net):  # every class is predicted somewhere
            example = image(*[16] * (network.head.weight.ndim - 2))
            with torch.no_grad():
                logits = network(example)
                network.head.bias -= logits.transpose(0, 1).flatten(1).mean(1)
        return network


def image(*shape, items=1):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(items, 1, *(shape or (16, 16, 12)), generator=generator)


@pytest.fixture
def net():
    return made()


@pytest.fixture
def x():
    return image()


def there(network):
    """Return a copy of a network on the GPU."""
    return copy.deepcopy(network).to(DEVICE)


def assert_close(found, expected, tier=1e-4):
    """Compare with the CPU's, wherever it lies: to a fraction of the largest value."""
    expected = expected.cpu().double()
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=tier * size)


def assert_same_result(found, expected, tier=1e-4):
    assert found.maps.keys() == expected.maps.keys()
    assert found.status == expected.status
    for name, values in expected.maps.items():
        assert_close(found.maps[name], values, tier)
    assert_close(found.logits, expected.logits, tier)
    assert_close(found.score, expected.score, tier)
    assert found.native_spacing == expected.native_spacing


@pytest.fixture(autouse=True)
def _as_before(request):
    """Every test leaves the caller's device state and generators as they were."""
    if "precision" in request.fixturenames:  # which sets the switches, and looks itself
        yield
        return
    state, generators = device_state(), random_state()
    yield
    assert device_state() == state
    for before, after in zip(generators, random_state(), strict=True):
        assert torch.equal(before, after)


def test_a_wrong_value_would_be_seen(net, x):
    """By hand: a thousandth of the largest value, in one voxel, fails the comparison."""
    expected = HiResCAM(net, LAYER)(x, VOLUME).maps[LAYER]
    wrong = HiResCAM(there(net), LAYER)(x, VOLUME).maps[LAYER].clone()
    assert_close(wrong, expected)
    wrong[0, 3, 4, 5] += 1e-3 * expected.abs().max()
    with pytest.raises(AssertionError):
        assert_close(wrong, expected)
    with pytest.raises(AssertionError):
        assert_close(-wrong, expected)


# --------------------------------------------------------------------------------- every method


def by(key, network, x, plan, **settings):
    """Explain with random numbers that are the same on every device, where a method draws any."""
    if key == "smooth_grad":
        settings["noise"] = 0.0
    return METHODS[key](network, LAYER, sliding_window=plan, **settings)(x, VOLUME)


@pytest.mark.parametrize("plan", ["one window", "overlap"])
@pytest.mark.parametrize("key", METHODS)
def test_every_method(key, plan, net, x):
    assert_same_result(by(key, there(net), x, PLANS[plan]), by(key, net, x, PLANS[plan]))


@pytest.mark.parametrize("key", METHODS)
def test_every_method_in_2d(key):
    net, x = made(ndim=2), image(16, 20, items=2)
    assert_same_result(by(key, there(net), x, None), by(key, net, x, None))


@pytest.mark.parametrize("where", ["scan on the CPU", "scan on the GPU"])
@pytest.mark.parametrize("plan", PLANS)
def test_windows(plan, where, net, x):
    for key in ("grad_cam", "xgrad_cam", "eigen_cam"):
        given = x if where == "scan on the CPU" else x.to(DEVICE)
        found = by(key, there(net), given, PLANS[plan])
        assert_same_result(found, by(key, net, x, PLANS[plan]))
        assert found.maps[LAYER].device == given.device
        assert found.logits.device == given.device


@pytest.mark.parametrize("where", ["CPU", "GPU"])
def test_a_scan_on_the_gpu_and_a_network_on_either(where, net, x):
    network = net if where == "CPU" else there(net)
    found = GradCAM(network, ["encoder.0", LAYER, "decoder.0"])(x.to(DEVICE), VOLUME)
    assert_same_result(found, GradCAM(net, ["encoder.0", LAYER, "decoder.0"])(x, VOLUME))


@pytest.mark.parametrize("plan", ["one window", "overlap", "nnU-Net's"])
def test_ensembles(plan, net, x):
    def explained(move):
        networks = [move(net), move(made(AlwaysScaled))]
        ensemble = Ensemble(networks, mirror_axes=(0, 2))
        return GradCAM(ensemble, LAYER, sliding_window=PLANS[plan])(x, VOLUME)

    assert_same_result(explained(there), explained(copy.deepcopy))


class AlwaysScaled(Net):
    """Another member: the same layers, other logits."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_suggestions_and_feature_maps(net, x):
    names = [suggestion.name for suggestion in suggest_layers(net, x.shape)]
    assert [suggestion.name for suggestion in suggest_layers(there(net), x.shape)] == names
    found, expected = (feature_maps(n, x, LAYER, index=2, target=1) for n in (there(net), net))
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------- targets

TRUTH = torch.zeros(16, 16, 12, dtype=torch.int64)
TRUTH[4:12, 4:12, 3:9] = 1
REGIONS = {
    "predicted": lambda device: "predicted",
    "box": lambda device: targets.Box((0, 0, 0), (8, 8, 8)),
    "component": lambda device: targets.Component(0),
    "boundary": lambda device: targets.Boundary(),
    "mask": lambda device: TRUTH.to(device) != 0,
    "array": lambda device: TRUTH.numpy(),
    "missed": lambda device: targets.FalseNegatives(TRUTH.to(device), label=1),
    "found": lambda device: targets.TruePositives(TRUTH.to(device), label=1),
    "mask on its grid": lambda device: MetaTensor(TRUTH[None].to(device).float()),
}


@pytest.fixture(scope="module")
def class_predicted():
    """Return a class that the network predicts somewhere, but not everywhere, in the truth."""
    with torch.no_grad():
        best = made()(image())[0].argmax(0)
    return int(best[TRUTH == 1].mode().values)


@pytest.mark.parametrize("scan", ["cpu", DEVICE])
@pytest.mark.parametrize("mask", ["cpu", DEVICE])
@pytest.mark.parametrize("region", REGIONS)
def test_targets_on_either_device(region, mask, scan, net, x, class_predicted):
    if region == "missed":
        # Of another class than the one that is predicted there, everything is missed.
        class_predicted = (class_predicted + 1) % 3

    def explained(network, x, device):
        target = targets.ClassLogOdds(class_predicted, REGIONS[region](device))
        return GradCAM(network, LAYER, sliding_window=PLANS["overlap"])(x, target)

    assert_same_result(explained(there(net), x.to(scan), mask), explained(net, x, "cpu"))


@pytest.mark.parametrize("mask", ["cpu", DEVICE])
def test_soft_dice_and_finer(mask, net, x):
    for make in (
        lambda d: targets.SoftDice(1, TRUTH.to(d)),
        lambda d: targets.Finer(1, 1.0, "volume"),
    ):
        found = HiResCAM(there(net), LAYER)(x, make(mask))
        assert_same_result(found, HiResCAM(net, LAYER)(x, make("cpu")))


def test_a_metatensor_brings_its_affine(net, x, tmp_path):
    affine = torch.as_tensor(OBLIQUE)
    found = GradCAM(there(net), LAYER)(MetaTensor(x, affine=affine).to(DEVICE), VOLUME)
    expected = GradCAM(net, LAYER)(MetaTensor(x, affine=affine), VOLUME)
    assert_same_result(found, expected)
    np.testing.assert_array_equal(found.affine, expected.affine)
    found.save(tmp_path / "cam.nii.gz")
    assert float(found.volume().max()) == 1
    assert found.slice(3).shape == expected.slice(3).shape


# ------------------------------------------------------------------------------------- callers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_callers(dtype, net, x):
    expected = HiResCAM(net, LAYER)(x, VOLUME)
    with torch.autocast(DEVICE, dtype=dtype):
        found = HiResCAM(there(net), LAYER)(x.to(DEVICE), VOLUME)
        assert torch.is_autocast_enabled(DEVICE)
    assert_same_result(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(mode, net, x):
    network = there(net)
    with mode():
        found = GradCAM(network, LAYER)(x.to(DEVICE) * 1, VOLUME)
    assert_same_result(found, GradCAM(net, LAYER)(x, VOLUME))


def test_a_caller_whose_default_device_is_the_gpu(net, x):
    with torch.device(DEVICE):
        for key in METHODS:
            assert_same_result(by(key, there(net), x, None), by(key, net, x, None))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_switches_are_off_inside_and_on_again_afterwards(precision, net, x):
    before = torch.get_float32_matmul_precision()
    allowed = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = True
    state = device_state()
    try:
        found = HiResCAM(there(net), LAYER)(x, VOLUME)
        assert device_state() == state
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allowed
    assert_same_result(found, HiResCAM(net, LAYER)(x, VOLUME), tier=2e-5)


def test_data_parallel(net, x):
    wrapped = nn.DataParallel(there(net))
    assert_same_result(GradCAM(wrapped, LAYER)(x, VOLUME), GradCAM(net, LAYER)(x, VOLUME))


@pytest.mark.parametrize("plan", ["one window", "overlap"])
@pytest.mark.parametrize("key", CAMS)
def test_a_network_on_two_devices(key, plan, x):
    """The encoder's input is on the GPU, and what follows on the CPU; and layers on both."""
    split, whole = made(OnTwoDevices), made(OnTwoDevices)
    split.encoder.to(DEVICE)
    layers = [LAYER] if key == "kpca_cam" else [LAYER, "decoder.0"]  # its limit is 16^3 voxels
    found, expected = (
        CAMS[key](network, layers, sliding_window=PLANS[plan])(x, VOLUME)
        for network in (split, whole)
    )
    assert_same_result(found, expected)
    assert split.encoder[0].weight.device != split.head.weight.device or DEVICE == "cpu"


def test_channels_last(net, x):
    network = there(net).to(memory_format=torch.channels_last_3d)
    given = x.to(DEVICE).contiguous(memory_format=torch.channels_last_3d)
    for plan in ("one window", "overlap"):
        found = by("grad_cam", network, given, PLANS[plan])
        assert_same_result(found, by("grad_cam", net, x, PLANS[plan]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(dtype, net, x):
    """As exact as half precision is: against the float32 network, to a few per cent."""
    network = there(net).to(dtype)
    tier = 100 * torch.finfo(dtype).eps
    for plan in ("one window", "overlap"):
        found = by("grad_cam", network, x, PLANS[plan])
        assert found.maps[LAYER].dtype == torch.float32
        assert_close(found.maps[LAYER], by("grad_cam", net, x, PLANS[plan]).maps[LAYER], tier)


@pytest.mark.parametrize("plan", ["one window", "overlap"])
def test_random_numbers_go_on_as_without(plan, x):
    """A dropout that is always on draws from the card's generator; `_as_before` sees that."""
    network = there(made(AlwaysDropping))
    GradCAM(network, LAYER, sliding_window=PLANS[plan])(x, VOLUME)


@pytest.mark.parametrize("key", METHODS)
def test_no_memory_is_left_over(key, net, x):
    network = there(net)
    cam = METHODS[key](network, LAYER, sliding_window=PLANS["overlap"])
    cam(x, VOLUME)  # libraries take their workspaces at the first call
    before = allocated()
    result = cam(x, VOLUME)
    assert allocated() == before, "of a scan on the CPU nothing of the result is on the card"
    assert result.logits.device.type == "cpu"


# ----------------------------------------------------------------------------------- whole scans


@pytest.mark.parametrize("form", ["nifti", "html"])
def test_the_command_line(form, tmp_path):
    volumes = {}
    for device in ("cpu", DEVICE):
        (tmp_path / device).mkdir(exist_ok=True)
        place = Place.at(tmp_path / device)
        outcome = place.explain(
            "--device", device, "--target", "lesion", "--format", "nifti", "--format", form
        )
        assert outcome.code == 0, outcome.complaint
        volumes[device] = torch.from_numpy(place.volume("cam_lesion.nii.gz").astype(np.float32))
    assert_close(volumes[DEVICE], volumes["cpu"])


def scan_file(folder):
    data = np.random.default_rng(0).normal(20, 10, (1, *SHAPE))
    (file,) = write_case(folder, data, OBLIQUE)
    return file


def test_nnunet_and_bundle(tmp_path):
    file = scan_file(tmp_path)
    write_bundle(tmp_path / "bundle", SPLEEN)
    folder = write_folder(tmp_path, mirror=(0,), folds=(0, 1))
    for source, settings in (
        (f"nnunet:{folder}", {}),
        (f"bundle:{tmp_path / 'bundle'}", {"trust": True}),
    ):
        found = {}
        for device in ("cpu", DEVICE):
            model = load_model(source, **settings)
            model.module.to(device)
            found[device] = explain(load_scan(file), model, VOLUME)
        assert_close(found[DEVICE].volume(), found["cpu"].volume())
        agree = (found[DEVICE].prediction == found["cpu"].prediction).float().mean()
        assert agree > 0.999  # a voxel may lie on the border of two classes


def test_scans_that_lie_on_the_gpu(tmp_path):
    place = Place.at(tmp_path)
    model = load_model(place.model)
    data = load_scan(place.scan).data.to(DEVICE)
    expected = explain(load_scan(place.scan), model, "lesion")
    model.module.to(DEVICE)
    for given in (data, MetaTensor(data, affine=torch.as_tensor(OBLIQUE))):
        affine = {} if isinstance(given, MetaTensor) else {"affine": OBLIQUE}
        scan = load_scan(given, **affine)
        assert scan.data.device.type == "cpu"
        found = explain(scan, model, "lesion")
        assert_close(found.volume(), expected.volume())


def test_parts_for_training_code(net, x, tmp_path):
    network, given = there(net), MetaTensor(x[0]).to(DEVICE)
    expected = GradCAM(net, LAYER)(x, VOLUME).volume()
    cam = Camd("image", network, LAYER, VOLUME, cam_name="grad_cam")({"image": given})["cam"]
    assert_close(cam.as_tensor(), expected)
    found = CamInferer("GradCAM", LAYER, VOLUME)(given[None], network)
    assert found.device == given.device
    assert_close(found.as_tensor(), expected[None])
    cams = EpochCams(tmp_path, targets=[VOLUME], target_layers=LAYER)
    for one in (given, x[0].to(DEVICE)):
        assert cams.write(network, one, epoch=1, case=0)


# ---------------------------------------------------------------------------------------- memory


class Greedy(nn.Module):
    """Takes 100 MB for each window at once, beside what it computes."""

    def __init__(self):
        super().__init__()
        self.net = made()

    def forward(self, x):
        room = torch.empty(len(x), 100_000_000, dtype=torch.uint8, device=x.device)
        return self.net(x) + 0 * room[0, 0]


def test_windows_that_do_not_fit_go_through_in_halves(x):
    plan = WindowPlan(8, overlap=0.5, sw_batch_size=16)
    expected = GradCAM(made(), LAYER, sliding_window=plan)(x, VOLUME)
    network = there(Greedy())
    GradCAM(network, f"net.{LAYER}", sliding_window=WindowPlan(8))(x, VOLUME)
    with little_memory(), pytest.warns(UserWarning, match="at once do not fit in memory"):
        found = GradCAM(network, f"net.{LAYER}", sliding_window=plan)(x, VOLUME)
    assert_close(found.maps[f"net.{LAYER}"], expected.maps[LAYER])


def test_one_window_that_does_not_fit_is_an_error_of_our_own(net):
    network = there(net)
    GradCAM(network, LAYER)(image(), VOLUME)
    before = allocated()
    with little_memory(), pytest.raises(OutOfMemoryError, match="WindowPlan"):
        GradCAM(network, LAYER)(image(256, 256, 256), VOLUME)
    assert allocated() == before
    assert not any(module._forward_hooks for module in network.modules())


# -------------------------------------------------------------------------------------- two cards


@two_cards
def test_a_network_on_the_second_card(net, x):
    network = copy.deepcopy(net).to(SECOND)
    for plan in ("one window", "overlap"):
        for given in (x, x.to(DEVICE), x.to(SECOND)):
            found = by("xgrad_cam", network, given, PLANS[plan])
            assert_same_result(found, by("xgrad_cam", net, x, PLANS[plan]))
            assert found.maps[LAYER].device == given.device


@two_cards
@pytest.mark.parametrize("key", CAMS)
def test_a_network_on_two_cards(key, x):
    split, whole = made(OnTwoDevices), made(OnTwoDevices)
    split.encoder.to(DEVICE)
    split.decoder.to(SECOND)
    split.head.to(SECOND)
    layers = [LAYER] if key == "kpca_cam" else [LAYER, "decoder.0"]
    found, expected = (
        CAMS[key](network, layers, sliding_window=PLANS["overlap"])(x, VOLUME)
        for network in (split, whole)
    )
    assert_same_result(found, expected)


@two_cards
def test_two_networks_on_two_cards_at_once(net, x):
    expected = by("grad_cam", net, x, PLANS["overlap"])
    found, networks = {}, {device: copy.deepcopy(net).to(device) for device in (DEVICE, SECOND)}

    def run(device):
        found[device] = by("grad_cam", networks[device], x, PLANS["overlap"])

    threads = [threading.Thread(target=run, args=(device,)) for device in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in networks:
        assert_same_result(found[device], expected)


@two_cards
def test_random_numbers_of_the_second_card(x):
    network = made(AlwaysDropping).to(SECOND)
    GradCAM(network, LAYER)(x, VOLUME)
