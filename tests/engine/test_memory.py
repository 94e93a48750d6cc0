"""A network that runs out of memory: fewer windows at once, the same maps; or helpful errors."""

from __future__ import annotations

import pytest
import torch
import toy
from helpers_engine import each_method
from torch import nn

from seg3dcam import Ensemble, GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.engine.memory import BatchLimit
from seg3dcam.errors import OutOfMemoryError, Seg3dcamError, Seg3dcamWarning

VOLUME = targets.ClassLogit(1, region="volume")
LAYER = "first"
FEWER = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


class Hungry(nn.Module):
    """Has memory for so many inputs at once; on the way back for so many others."""

    def __init__(self, most=100, most_back=100):
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.head = nn.Conv3d(4, 3, 3, padding=1)
        self.most, self.most_back = most, most_back
        seen = [], []  # what a function closes over stays, an attribute would be put back
        self._seen = lambda: seen

    sizes = property(lambda self: self._seen()[0])
    back = property(lambda self: self._seen()[1])

    def forward(self, x):
        if x.shape[2:] == (4, 4, 4):  # a window; places of voxels are measured in other inputs
            self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return _Back.apply(self.head(self.first(x).relu()), self)


class _Back(torch.autograd.Function):
    """Every second backward pass of too many inputs has no memory: between two targets."""

    @staticmethod
    def forward(ctx, values, network):
        ctx.network = network
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        network = ctx.network
        network.back.append(len(gradient))
        if len(gradient) > network.most_back and len(network.back) % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory on the way back")
        return gradient, None


@pytest.fixture
def x():
    return torch.rand(1, 1, 8, 8, 8)


def network(most=100, most_back=100):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Hungry(most, most_back)


def plan(convention="monai", **settings):
    return WindowPlan(4, overlap=0.5, sw_batch_size=8, convention=convention, **settings)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.few(5)
@FEWER
@pytest.mark.parametrize("convention", ["monai", "nnunet"])
@each_method(CAMS)
def test_every_method_with_fewer_windows_at_once(key, convention, x):
    """Ablation-CAM's and Score-CAM's changed inputs are counted the same way."""
    roomy, tight = toy.shared(network), toy.shared(network, most=3)
    x = x[..., :4]
    roomy.sizes.clear()
    settings = plan(convention, cache_gb=0)
    expected = CAMS[key](roomy, LAYER, sliding_window=settings)(x, VOLUME)
    found = CAMS[key](tight, LAYER, sliding_window=settings)(x, VOLUME)
    assert expected.windows == 9
    for name, values in expected.maps.items():
        close(found.maps[name], values)
    close(found.logits, expected.logits)
    assert max(roomy.sizes) > 3


def test_what_did_not_fit_is_tried_once_and_said(x):
    tight = network(most=3)
    with pytest.warns(Seg3dcamWarning) as told:
        HiResCAM(tight, LAYER, sliding_window=plan())(x, VOLUME)
    assert [str(one.message).partition(". ")[0] for one in told] == [
        "8 windows at once do not fit in memory: going on with 4",
        "4 windows at once do not fit in memory: going on with 2",
    ]
    assert str(told[0].message).endswith("a smaller sw_batch_size saves the attempt")
    # MONAI brings eight at a time; they were tried once, four once, and never again.
    assert tight.sizes.count(8) == 1
    assert tight.sizes.count(4) == 1
    assert {1, 2} <= set(tight.sizes)


@FEWER
def test_memory_that_runs_out_between_two_targets(x):
    """Each target is counted once in each window, whatever was found before."""
    asked = [targets.ClassLogit(c, region="volume") for c in range(3)]
    asked.append(targets.ClassLogit(0, targets.Box((0, 0, 0), (2, 8, 8))))
    roomy, tight = network(), network(most_back=2)
    expected = GradCAM(roomy, LAYER, sliding_window=plan()).each(x, asked)
    found = GradCAM(tight, LAYER, sliding_window=plan()).each(x, asked)
    for one, other in zip(found, expected, strict=True):
        close(one.maps[LAYER], other.maps[LAYER])
    assert max(tight.back) == 8
    assert len(tight.back) > len(roomy.back)


@FEWER
def test_members_of_an_ensemble(x):
    expected, found = (
        HiResCAM(Ensemble([network(most)], (0,)), LAYER, sliding_window=plan())(x, VOLUME)
        for most in (100, 2)
    )
    close(found.maps[LAYER], expected.maps[LAYER])


@FEWER
def test_changed_inputs_of_one_window(x):
    """Without windows there is nothing to cut, but Score-CAM's inputs are many."""
    expected = CAMS["score_cam"](toy.shared(network), LAYER)(x, VOLUME)
    found = CAMS["score_cam"](network(most=2), LAYER)(x, VOLUME)
    close(found.maps[LAYER], expected.maps[LAYER])


ADVICE = {
    None: r"as one window\. Explain it in windows, such as .*WindowPlan\(96\)",
    WindowPlan(4, sw_batch_size=4): r"a single window of 4 voxels .* smaller roi_size",
}


@FEWER
@pytest.mark.parametrize("key", ["hires_cam", "shapley_cam", "eigen_cam", "score_cam"])
@pytest.mark.parametrize("settings", ADVICE, ids=["one window", "windows"])
@pytest.mark.parametrize("at", ["forward pass", "auto"])
def test_what_never_fits_is_an_error_of_our_own(at, settings, key, x):
    tight = network(most=0)
    cam = CAMS[key](tight, "auto" if at == "auto" else LAYER, sliding_window=settings)
    modes = [module.training for module in tight.modules()]
    with pytest.raises(OutOfMemoryError, match=ADVICE[settings]) as caught:
        cam(x, VOLUME)
    assert "1 TiB" in str(caught.value)
    assert isinstance(caught.value, Seg3dcamError | torch.OutOfMemoryError)
    assert [module.training for module in tight.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in tight.parameters())
    assert not any(module._forward_hooks for module in tight.modules())


def test_shapley_cam_does_not_blame_the_network(x):
    """A RuntimeError of a second derivative is about the network; running out of memory is not."""

    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 3, 1)

        def forward(self, x):
            return _Full.apply(self.head(self.first(x)))

    class _Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(OutOfMemoryError, match="no memory"):
        CAMS["shapley_cam"](Full(), LAYER)(x, VOLUME)


def test_halves_down_to_one():
    tried = []

    def run(part):
        tried.append(part.stop - part.start)
        if tried[-1] > 1:
            raise torch.OutOfMemoryError
        return part.start

    with pytest.warns(Seg3dcamWarning):
        assert list(BatchLimit(5).each(3, run)) == [0, 1, 2]
    assert tried == [3, 1, 1, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(BatchLimit(1).each(2, lambda part: run(slice(0, 2))))
