"""NaN and infinity in activations or gradients of one item of a batch: said of it, of it alone."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from helpers_engine import each_method, slow_unless
from torch import nn

from seg3dcam import METHODS, WindowPlan, targets
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.methods.perturbation import MaskedInputs
from seg3dcam.methods.pooled import PooledGradient

BAD = [math.nan, math.inf, -math.inf]
SIZES = [(5, 6), (4, 5, 6)]
AGNOSTIC = {"eigen_cam", "kpca_cam", "fem", "random"}  # they never look at gradients
RESCORING = {"score_cam", "ablation_cam"}
LAYERED = sorted(set(METHODS) - {"full_grad"})


def drawn(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def called(key, a, g):
    """Return a method's map; rescoring finds the same score whatever is left out."""
    if key in RESCORING:
        scores = torch.arange(float(len(a) * a.shape[1]), dtype=a.dtype).view(len(a), -1)
        more = [scores[:, 0] + 1] if key == "ablation_cam" else []
        return METHODS[key](a, lambda channels: scores[:, channels], *more)
    return METHODS[key](a, g, g / 2) if key == "shapley_cam" else METHODS[key](a, g)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", ["activations", "gradients"])
@pytest.mark.parametrize("key", LAYERED)
def test_a_broken_item_gives_no_finite_map_and_the_others_theirs(key, where, size, bad):
    a, g = drawn(2, 3, *size), drawn(2, 3, *size) - 0.5
    expected = called(key, a[:1], g[:1])
    (a if where == "activations" else g)[(1, 1, *(2 for _ in size))] = bad
    found = called(key, a, g)
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-9)
    unseen = where == "gradients" and key in AGNOSTIC | RESCORING
    assert bool(found[1].isfinite().all()) == unseen


@pytest.mark.parametrize("bad", BAD)
def test_the_largest_gradient_of_a_block_hides_no_infinity(bad):
    a, g = drawn(1, 2, 4, 4), drawn(1, 2, 4, 4)
    g[0, 1, 2, 2] = bad
    assert not PooledGradient(2, "max")(a, g).isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_a_score_that_is_not_finite_is_no_channel_that_counts_for_nothing(bad):
    scores = torch.tensor([[1.0, 2.0], [3.0, bad]])
    found = MaskedInputs()(torch.rand(2, 2, 3, 3), lambda channels: scores[:, channels])
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


# -------------------------------------------------------------------------------- through networks


class Broken(nn.Module):
    """Makes a channel `value` where the input is very bright; gradients pass as they are."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        bright = torch.zeros_like(x)
        bright[:, 1] = torch.where(x[:, 1] > 50, self.value, 0.0)
        return x + bright.detach()


class Steep(torch.autograd.Function):
    """Hands values on; the gradient is `value` where they are very bright."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.save_for_backward(x)
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient.masked_fill(x > 50, ctx.value), None


class Hard(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return Steep.apply(x, self.value)


def network(ndim, where, value):
    convolution = nn.Conv2d if ndim == 2 else nn.Conv3d
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, head = convolution(1, 3, 1), convolution(3, 2, 1)
    nn.init.ones_(first.weight)
    bad = where == "activations"
    first = nn.Sequential(first, Broken(value) if bad else nn.Identity())
    return nn.Sequential(first, nn.Identity() if bad else Hard(value), head).double()


@pytest.mark.few(7)
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(
    ("ndim", "windows"),
    [(2, False), (3, True), slow_unless(False, 2, True), slow_unless(False, 3, False)],
)
@pytest.mark.parametrize("where", ["activations", "gradients"])
@each_method(LAYERED)
def test_through_networks_and_windows(key, where, ndim, windows):
    """One voxel of one item is broken: the whole item says so, in whichever window it lies."""
    if where == "gradients" and key in AGNOSTIC | RESCORING:
        return
    plan = WindowPlan(roi_size=(4,) * ndim, overlap=0.5) if windows else None
    target = targets.ClassLogit(1, "volume")
    x = drawn(2, 1, *(6,) * ndim)
    x[(1, 0, *(1,) * ndim)] = 100
    for bad in BAD:
        cam = CAMS[key](toy.shared(network, ndim, where, bad), "0", sliding_window=plan)
        result, alone = cam(x, target=target), cam(x[:1], target=target)
        assert [s == "nonfinite" for s in result.layers["0"].item_status] == [False, True]
        assert result.status["0"] == "nonfinite"
        torch.testing.assert_close(result.maps["0"][:1], alone.maps["0"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result.volume()[:1], alone.volume())
        assert not result.volume()[1].any()
