"""A grid counts as measured where the network as it is agrees; everything else is said.

Networks that hold their kernels in ways of their own, resample, or mix places: each is measured
right, or not at all and with a warning, whatever the first measurement believes.
"""

from __future__ import annotations

import functools
import itertools
import warnings

import pytest
import torch
from helpers_crossed import crossed
from helpers_grids import assert_grid, grids_of
from monai.networks import nets
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import HiResCAM, targets
from seg3dcam.errors import Seg3dcamWarning
from seg3dcam.network.grids import measurement
from seg3dcam.network.grids.measurement import measure_grids
from seg3dcam.network.layers import resolve_layers


class OwnConv(nn.Module):
    """Holds its kernel itself, scaled when it runs (equalised learning rate)."""

    def __init__(self, before, after, ndim=3):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(after, before, *[3] * ndim))
        self.convolve = {2: F.conv2d, 3: F.conv3d}[ndim]

    def forward(self, x):
        return self.convolve(x, self.kernel * 0.2, None, stride=2, padding=1)


class Hyper(nn.Module):
    """Another network computes the kernel (hypernetwork)."""

    def __init__(self, before, after):
        super().__init__()
        self.shape = (after, before, 3, 3, 3)
        self.make = nn.Linear(8, after * before * 27)
        self.register_buffer("code", torch.randn(8))

    def forward(self, x):
        return F.conv3d(x, weight=self.make(self.code).view(self.shape), stride=2, padding=1)


class Experts(nn.Module):
    """Mixes kernels as the image wants it, all items in one grouped convolution (CondConv)."""

    def __init__(self, before, after):
        super().__init__()
        self.kernels = nn.Parameter(0.2 * torch.randn(3, after, before, 3, 3, 3))
        self.choose = nn.Linear(before, 3)

    def forward(self, x):
        share = self.choose(x.mean((2, 3, 4))).softmax(1)
        kernel = torch.einsum("be,eoixyz->boixyz", share, self.kernels)
        items, channels = x.shape[:2]
        grouped = x.reshape(1, items * channels, *x.shape[2:])
        found = F.conv3d(grouped, kernel.flatten(0, 1), stride=2, padding=1, groups=items)
        return found.view(items, -1, *found.shape[2:])


class Unfolded(nn.Module):
    """A strided convolution by unfolding and multiplying, which no function of torch names."""

    def __init__(self, before, after):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(after, before * 9) / (9 * before) ** 0.5)

    def forward(self, x):
        size = [-(-n // 2) for n in x.shape[2:]]
        columns = F.unfold(x, 3, stride=2, padding=1)
        return (self.matrix @ columns).unflatten(2, size)


class Fourier(nn.Module):
    """A learned Fourier filter of the lowest frequencies."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 6, 6, 6, dtype=torch.cfloat))

    def forward(self, x):
        spectrum = torch.fft.rfftn(x, dim=(2, 3, 4))
        out = torch.zeros_like(spectrum)
        low = spectrum[:, :, :6, :6, :6]
        out[:, :, :6, :6, :6] = torch.einsum("bixyz,ioxyz->boxyz", low, self.weight)
        return torch.fft.irfftn(out, s=x.shape[2:])


class Mixer(nn.Module):
    """Patches, mixed with one another by a learned matrix (MLP-Mixer)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv3d(1, 6, 8, 8)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        grid = self.patches(x)
        return (grid.flatten(2) @ self.mix).view(grid.shape)


class Shuffled(nn.Module):
    """Moves places without a word: the map would be mirrored."""

    def forward(self, x):
        return x.flip(-1)


def chain(kind, channels=(1, 4, 6, 8)):
    torch.manual_seed(1)
    layers = []
    for before, after in itertools.pairwise(channels):
        layers += [kind(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def headed(body, channels, ndim=3):
    """Return the body with a head that gives logits of the input's size."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body
            self.head = (nn.Conv2d if ndim == 2 else nn.Conv3d)(channels, 2, 1)

        def forward(self, x):
            return F.interpolate(self.head(self.body(x)), size=x.shape[2:])

    return Net()


class Causal(nn.Conv3d):
    """Pads in front alone, so that the middle of its kernel is where it looks."""

    def __init__(self, before, after):
        super().__init__(before, after, 3)

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0, 1, 1, 1, 1)))


class Masked(nn.Conv2d):
    """Sees nothing of what comes later in raster order (PixelCNN): 7/11 of a voxel to one side."""

    def __init__(self, before, after):
        super().__init__(before, after, (3, 7), padding=(1, 3))
        self.register_buffer("mask", (torch.arange(21) < 11).float().view(3, 7))

    def forward(self, x):
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class Shift(nn.Conv2d):
    """Has weights in one tap, not the middle one: shifts by a voxel."""

    def __init__(self, before, after):
        super().__init__(before, after, 3, padding=1)
        with torch.no_grad():
            self.weight *= torch.eye(9)[5].view(3, 3)


@pytest.mark.parametrize(("kind", "depth"), [(Shift, 1), (Shift, 3), (Masked, 2), (Masked, 3)])
@pytest.mark.parametrize("pooled", [1, 2])
def test_kernels_that_look_to_one_side_are_said(kind, depth, pooled):
    """The structure puts them in the middle of their kernels, where they do not look."""
    body = chain(kind, (1, 6, 8, 10)[: depth + 1])
    net = headed(nn.Sequential(body, nn.MaxPool2d(pooled)), body[-2].out_channels, ndim=2)
    grid = grids_of(net, (32, 32), "body")["body"]
    if (kind, depth, pooled) == (Shift, 1, 2):
        assert_grid(grid, (2, 2), (0.5, 0.5))  # half of a layer's voxel
    else:
        assert not grid.measured


@pytest.mark.parametrize("depth", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_kernels_whose_padding_puts_them_to_one_side_are_in_their_place(depth):
    body = chain(Causal, (1, 6, 8, 10)[: depth + 1])
    grid = grids_of(headed(body, body[-2].out_channels), (32,) * 3, "body")["body"]
    assert_grid(grid, (1,) * 3, (0, 0, -depth))


@functools.cache
def grids_of_sub_pixel_upsampling(shape):
    torch.manual_seed(0)
    net = nets.BasicUNet(len(shape), 1, 2, features=(8, 8, 12, 16, 20, 8), upsample="pixelshuffle")
    return grids_of(net, shape, "upcat_*")


@pytest.mark.few(2)
@pytest.mark.parametrize("shape", [(32, 32), pytest.param((32, 16, 16), marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", ["upcat_4", "upcat_3", "upcat_2", "upcat_1"])
def test_decoders_of_sub_pixel_upsampling_are_in_their_place(layer, shape):
    stride, ndim = 2.0 ** (int(layer[-1]) - 1), len(shape)
    grid = grids_of_sub_pixel_upsampling(shape)[layer]
    assert_grid(grid, (stride,) * ndim, ((stride - 1) / 2,) * ndim, within=0.005)


@pytest.mark.parametrize("kind", [OwnConv, Hyper, Experts])
def test_kernels_are_known_wherever_they_are_kept(kind):
    grid = grids_of(headed(chain(kind), 8), (64, 64, 64), "body")["body"]
    assert_grid(grid, (8,) * 3, (0,) * 3)


@pytest.mark.parametrize(("factor", "size"), [(4, 64), (8, 64), (4, 96), (2, 48)])
def test_resampling_with_aligned_corners_has_a_fractional_stride(factor, size):
    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 3, padding=1)

        def forward(self, x):
            small = [n // factor for n in x.shape[2:]]
            return self.conv(F.interpolate(x, small, mode="trilinear", align_corners=True))

    grid = grids_of(headed(Down(), 4), (size,) * 3, "body.conv")["body.conv"]
    stride = (size - 1) / (size // factor - 1)
    assert grid.measured
    assert grid.stride == pytest.approx((stride,) * 3, abs=1e-4)
    assert grid.offset == pytest.approx((0,) * 3, abs=0.01)


@pytest.mark.slow
def test_a_decoder_behind_aligned_corners_is_in_its_place():
    """Three strided convolutions, then eight times as large: fine voxel v sees 8 * v * 7 / 63."""
    net = nn.Sequential(
        chain(lambda i, o: nn.Conv3d(i, o, 3, 2, 1)),
        nn.Upsample(scale_factor=8, mode="trilinear", align_corners=True),
        nn.Conv3d(8, 2, 3, padding=1),
    )
    grid = grids_of(net, (64, 64, 64), "2")["2"]
    assert grid.measured
    assert grid.stride == pytest.approx((8 * 7 / 63,) * 3, abs=1e-3)
    assert grid.offset == pytest.approx((0,) * 3, abs=0.05)


class Zoomed(nn.Module):
    """Shows the middle of the image twice as large, behind a sigmoid: no ramp gets there."""

    def forward(self, x):
        part = [slice(n // 4, n - n // 4) for n in x.shape[2:]]
        return F.interpolate(torch.sigmoid(x)[(..., *part)], size=x.shape[2:], mode="trilinear")


class Deformed(nn.Module):
    """Samples its features aside, by as much as a convolution says."""

    def __init__(self):
        super().__init__()
        self.conv, self.by = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, 1)
        nn.init.constant_(self.by.weight, 1.0)
        nn.init.constant_(self.by.bias, -1.0)  # four voxels less one, as no ramp shows

    def forward(self, x):
        aside = self.by(torch.ones_like(x).expand(-1, 4, -1, -1, -1))[:, 0]
        theta = torch.eye(3, 4, dtype=x.dtype)[None].expand(len(x), -1, -1)
        places = F.affine_grid(theta, x.shape, align_corners=True)
        step = torch.stack([2 * aside / (x.shape[-1] - 1), 0 * aside, 0 * aside], -1)
        return F.grid_sample(self.conv(x), places + step, align_corners=True)


class OneSided(nn.Module):
    """Fixed kernels shift half of the channels to the left, half to the right; one half is read."""

    def __init__(self, by):
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.shift = nn.Conv3d(8, 8, (1, 1, 2 * by + 1), padding=(0, 0, by), groups=8, bias=False)
        self.read = nn.Conv3d(8, 4, 1)
        with torch.no_grad():
            self.shift.weight.zero_()[:4, ..., 0] = 1
            self.shift.weight[4:, ..., -1] = 1
            self.read.weight[:, 4:] *= 0.01

    def forward(self, x):
        return self.read(self.shift(F.relu(self.first(x))))


class OneSidedDilated(nn.Module):
    """Kernels of a large dilation that look at their place and to the left, never to the right."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(i, 4, 3, padding=8, dilation=8) for i in (1, 4))

    def forward(self, x):
        mask = torch.tensor([1.0, 1.0, 0.0])
        for conv in self.convs:
            x = F.relu(F.conv3d(x, conv.weight * mask, conv.bias, padding=8, dilation=8))
        return x


class Rolled(nn.Module):
    """Half of the channels are moved to the left, half to the right; then it is strided."""

    def __init__(self, by):
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv3d(16, 16, 3, 2, 1))
        self.by, self.read = by, nn.Conv3d(16, 16, 1)
        self.last = nn.Sequential(nn.Conv3d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv3d(16, 4, 3, 2, 1))
        with torch.no_grad():
            self.read.weight[:, 8:] *= 0.01

    def forward(self, x):
        a = F.relu(self.first(x))
        a = torch.cat([a[:, :8].roll(self.by, -1), a[:, 8:].roll(-self.by, -1)], 1)
        return self.last(F.relu(self.read(a)))


CANNOT = {
    "one half is read": lambda: OneSided(4),
    "one-sided dilated": OneSidedDilated,
    "rolled": lambda: Rolled(2),
    "deformed": Deformed,
    "zoomed": lambda: nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), Zoomed()),
    "Fourier filter": lambda: nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), Fourier(4)),
    "token mixer": Mixer,
    "mirrored": lambda: nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), Shuffled()),
}


@pytest.mark.filterwarnings("ignore:layer 'body' shows nothing")
@pytest.mark.parametrize("name", crossed(CANNOT, rows=1))
def test_what_mixes_or_moves_places_is_said(name):
    torch.manual_seed(0)
    net = headed(CANNOT[name](), 6 if name == "token mixer" else 4)
    with pytest.warns(Seg3dcamWarning, match="'body' lie could not be measured"):
        found = HiResCAM(net, "body")(torch.rand(1, 1, 16, 16, 32), targets.ClassLogit(1, "volume"))
    assert not found.layers["body"].grid.measured


def test_convolutions_that_nothing_names_are_right_or_said():
    """The first measurement is misled by real kernels; it must not be believed then."""
    torch.manual_seed(0)
    net = headed(nn.Sequential(*(Unfolded(i, o) for i, o in ((1, 4), (4, 6), (6, 8)))), 8, ndim=2)
    grid = grids_of(net, (64, 64), "body")["body"]
    if grid.measured:
        assert grid.stride == (8, 8)
        assert max(map(abs, grid.offset)) < 1.5
    else:
        assert grid.offset == (3.5, 3.5)


@pytest.mark.parametrize("shift", [3.5, -3.5])
def test_a_first_measurement_that_is_off_is_not_believed(shift, monkeypatch):
    """Of half a layer's voxel, as if a strided convolution were a pooling."""
    net = headed(chain(lambda i, o: nn.Conv3d(i, o, 3, 2, 1)), 8)
    first = measurement._fit

    def off(*args):
        found = first(*args)
        return found and (found[0], found[1] + shift)

    assert grids_of(net, (64, 64, 64), "body")["body"].measured
    monkeypatch.setattr(measurement, "_fit", off)
    again = headed(chain(lambda i, o: nn.Conv3d(i, o, 3, 2, 1)), 8)
    assert not grids_of(again, (64, 64, 64), "body")["body"].measured


FIELD = {
    "AttentionUnet": lambda: nets.AttentionUnet(3, 1, 3, channels=(4, 6, 8), strides=(2, 2)),
    "BasicUNet": lambda: nets.BasicUNet(2, 1, 3, features=(4, 4, 6, 8, 10, 4)),
    "SegResNet": lambda: nets.SegResNet(2, init_filters=8, in_channels=1, out_channels=3),
    "DenseNet": lambda: nets.DenseNet121(2, 1, 2, init_features=8, growth_rate=4),
}


@pytest.mark.parametrize(
    "name",
    [
        "SegResNet",
        pytest.param("AttentionUnet", marks=pytest.mark.slow),
        pytest.param("BasicUNet", marks=pytest.mark.slow),
        pytest.param("DenseNet", marks=pytest.mark.slow),
    ],
)
def test_networks_of_the_field_are_measured_without_a_word(name):
    torch.manual_seed(0)
    net = FIELD[name]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "where the voxels", Seg3dcamWarning)
        warnings.filterwarnings("ignore", "layer .* (explains|shows) nothing", Seg3dcamWarning)
        sizes = (64, 32, 32) if name == "AttentionUnet" else (64, 32)
        HiResCAM(net, "auto")(torch.rand(1, 1, *sizes), 0)


def test_settings_of_modules_are_part_of_what_is_remembered():
    """The same modules and shapes, and another stride: a memory of it would be wrong."""
    net = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 2, 1))
    assert_grid(grids_of(net, (32,) * 3, "1")["1"], (2,) * 3, (0,) * 3)
    net[0].stride, net[0].padding = (4, 4, 4), (0, 0, 0)
    assert_grid(grids_of(net, (32,) * 3, "1")["1"], (4,) * 3, (1,) * 3)


class Settings:
    def __init__(self, **settings):
        vars(self).update(settings)


PLACES = {
    "dict": (lambda: {"left": 0, "calls": 0}, lambda kept: kept),
    "list": (lambda: [{"left": 0, "calls": 0}], lambda kept: kept[0]),
    "object": (lambda: Settings(left=0, calls=0), vars),
    "object in a dict": (
        lambda: {"pad": Settings(left=0, calls=0)},
        lambda kept: vars(kept["pad"]),
    ),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("place", PLACES)
def test_settings_inside_containers_are_part_of_what_is_remembered(place):
    """Also beside a counter, which is none."""
    make, find = PLACES[place]

    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.conv = make(), nn.Conv3d(1, 4, 3, 2)

        def forward(self, x):
            runs.append(None)
            settings = find(self.kept)
            settings["calls"] += 1
            left = settings["left"]
            padded = F.pad(x, (left, 8 - left) * 3)
            return self.conv(padded)[(..., *[slice(n // 2) for n in x.shape[2:]])]

    runs = []
    net = headed(Padding(), 4)
    for left in (0, 8, 0):
        find(net.body.kept)["left"] = left
        assert_grid(grids_of(net, (32,) * 3, "body")["body"], (2,) * 3, (1 - left,) * 3)
    x = torch.rand(1, 1, 32, 32, 32)
    for repeated in range(3):
        runs.clear()
        HiResCAM(net, "body")(x, targets.ClassLogit(1, "volume"))
        net(x)  # counts
        assert repeated == 0 or len(runs) == 2


def test_a_padding_in_a_list_is_part_of_what_is_remembered():
    class Padding(nn.Module):
        def __init__(self):
            super().__init__()
            self.pad, self.conv = [0, 8] * 3, nn.Conv3d(1, 4, 3, 2)

        def forward(self, x):
            return self.conv(F.pad(x, self.pad))[(..., *[slice(n // 2) for n in x.shape[2:]])]

    net = headed(Padding(), 4)
    for left in (0, 8):
        net.body.pad[:] = [left, 8 - left] * 3
        assert_grid(grids_of(net, (32,) * 3, "body")["body"], (2,) * 3, (1 - left,) * 3)


def test_a_counter_in_a_module_is_no_change_of_structure():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv3d(1, 4, 3, 2, 1), 0

        def forward(self, x):
            self.calls += 1
            calls.append(self.calls)
            return self.conv(x)

    net, x, calls = headed(Counting(), 4), torch.rand(1, 1, 16, 16, 16), []
    cam, runs = HiResCAM(net, "body.conv"), []
    for number in range(3):
        calls.clear()
        cam(x, targets.ClassLogit(1, "volume"))
        runs.append(len(calls))
        assert net.body.calls == number  # put back
        net(x)
    assert runs[0] > 1
    assert runs[1:] == [1, 1]


@pytest.mark.parametrize("log", [False, True])
def test_a_number_that_changes_in_training_is_measured_again_once(log):
    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.step, self.losses = nn.Conv3d(1, 4, 3, 2, 1), 0, []

        def forward(self, x):
            runs.append(None)
            return self.conv(x)

    net, x, counts, runs = headed(Stepping(), 4), torch.rand(1, 1, 16, 16, 16), [], []
    for _ in range(4):
        if log:
            net.body.losses.append(0.5)
        else:
            net.body.step += 1
        runs.clear()
        HiResCAM(net, "body.conv")(x, targets.ClassLogit(1, "volume"))
        counts.append(len(runs))
    assert counts[0] > 1
    assert counts[2:] == [1, 1]


def test_channels_of_the_input_are_part_of_what_is_remembered():
    """The same layer and shapes, and another way to them."""

    class Either(nn.Module):
        def forward(self, x):
            return F.max_pool3d(x, 2) if x.shape[1] == 1 else F.max_pool3d(x.mean(1)[:, None], 1, 2)

    net = nn.Sequential(nn.Identity(), Either(), nn.Conv3d(1, 2, 1))
    (layer,) = resolve_layers(net, "2")
    for channels, offset in ((1, 0.5), (2, 0), (1, 0.5)):
        grids = measure_grids(net, torch.zeros(1, channels, 32, 32, 32), {layer: (16,) * 3})
        assert_grid(grids[layer], (2,) * 3, (offset,) * 3)


def test_where_an_upsampled_path_is_added_the_skip_connection_knows_the_place():
    """The path is half a voxel off, by strided convolution and back, and as strong."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 3, padding=1)
            self.down = nn.Conv3d(4, 4, 3, 2, 1)
            self.up = nn.ConvTranspose3d(4, 4, 2, 2)

        def forward(self, x):
            a = self.conv(x)
            return a + self.up(self.down(a))

    torch.manual_seed(0)
    net = nn.Sequential(Beside(), nn.Conv3d(4, 2, 1))
    assert_grid(grids_of(net, (32,) * 3, "0")["0"], (1,) * 3, (0,) * 3)
