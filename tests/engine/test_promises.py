"""Branches without a gradient are found out, said, and never drawn as if the map were whole."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import toy
from helpers_engine import slow_unless
from monai.networks import nets
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.engine import gradient_check as promises
from seg3dcam.errors import LayerError, ModelError, Seg3dcamWarning

VOLUME = targets.ClassLogit(1, "volume")


class TwoWays(nn.Module):
    """A layer that is read directly and through a branch of which the gradient may be lost."""

    def __init__(self, branch, weight=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.mix = nn.Conv3d(4, 4, 1)
        self.head = nn.Conv3d(4, 2, 1)
        self.branch, self.weight = branch, weight

    def forward(self, x):
        a = torch.relu(self.conv(x))
        return self.head(a + self.weight * self.branch(self.mix(a)))


class Halved(torch.autograd.Function):
    """A function whose backward pass is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def without_gradients(z):
    with torch.no_grad():
        return z * 1.5


BROKEN = {
    "detach": lambda z: z.detach(),
    "no_grad": without_gradients,
    "argmax": lambda z: F.one_hot(z.argmax(1), 4).movedim(-1, 1).float(),
    "whole numbers": lambda z: (20 * z).to(torch.int8).float() / 20,
    "rounding": lambda z: (20 * z).round() / 20,
    "hard gate": lambda z: z * (z > 0.05).float() + (z > 0.05).float(),
    "function of one's own": Halved.apply,
    "data": lambda z: z.data,
}

WHOLE = {
    "nothing": lambda z: z,
    "relu": torch.relu,
    "clamp": lambda z: z.clamp(-0.1, 0.1),
    "pooling": lambda z: F.interpolate(F.max_pool3d(z, 2), scale_factor=2),
    "squared": lambda z: z * z,
    "norm": lambda z: F.instance_norm(z),
    "softmax": lambda z: z.softmax(1),
    "argument of a constant": lambda z: z + z.new_ones(()).detach(),
}


def explained(net, size=16, cam=HiResCAM, layer="conv", plan=None):
    x = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Seg3dcamWarning)
        result = cam(net, layer, sliding_window=plan)(x, VOLUME)
    return result, [str(w.message) for w in caught]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("plan", [None, slow_unless(False, WindowPlan(8, overlap=0.5))])
def test_a_branch_without_a_gradient_is_said_and_not_drawn(name, plan):
    result, said = explained(TwoWays(BROKEN[name]), plan=plan)
    assert result.status["conv"] == "incomplete"
    assert any("misses" in text and "conv" in text for text in said)
    assert not result.volume().any()
    assert result.maps["conv"].any()  # for whoever wants to look at it all the same


@pytest.mark.few(3)
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_gradient_is_believed(name):
    result, said = explained(TwoWays(WHOLE[name]))
    assert result.status["conv"] == "ok"
    assert not said


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_part_that_is_missed_is_measured(share):
    """The branch alone carries what the gradient does not: of a + share * a that is share."""
    net = TwoWays(lambda z: z.detach(), share)
    with torch.no_grad():
        net.mix.weight.copy_(torch.eye(4).view(4, 4, 1, 1, 1))
    result, _ = explained(net)
    assert result.layers["conv"].missing == pytest.approx(share / (1 + share), rel=0.15)


@pytest.mark.slow
def test_only_layers_before_the_break_are_incomplete():
    net = TwoWays(lambda z: z.detach())
    result, _ = explained(net, layer=["conv", "head"])
    assert result.status == {"conv": "incomplete", "head": "ok"}
    net = nn.Sequential(TwoWays(lambda z: z.detach()), nn.ReLU(), nn.Conv3d(2, 2, 1))
    result, _ = explained(net, layer=["0.conv", "0.head"])
    missing = {name: layer.missing for name, layer in result.layers.items()}
    assert missing["0.conv"] > 0.2
    assert missing["0.head"] == 0


def detached() -> TwoWays:
    return TwoWays(lambda z: z.detach())


@pytest.mark.few(7)
@pytest.mark.parametrize("key", sorted(CAMS))
def test_methods_without_a_gradient_see_all(key):
    """Every method whose map is made of gradients says so; the others need not."""
    free = {"eigen_cam", "kpca_cam", "fem", "score_cam", "ablation_cam", "random"}
    layer = () if key == "full_grad" else ("conv",)
    cam = CAMS[key](toy.shared(detached), *layer)
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        (layer_map,) = cam(x, VOLUME).layers.values()
    assert (layer_map.missing > 0.2) == (key not in free)


@pytest.mark.parametrize("key", sorted(ATTRIBUTIONS))
def test_gradients_of_the_input_miss_it_too(key):
    cam = ATTRIBUTIONS[key](toy.shared(detached))
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        (layer_map,) = cam(x, VOLUME).layers.values()
    assert (layer_map.missing > 0.1) == (key != "occlusion")


@pytest.mark.parametrize(("branch", "status"), [(torch.relu, "ok"), (torch.detach, "incomplete")])
def test_networks_of_one_size_are_tried_at_it(branch, status):
    """The middle of a long image is another size than they take."""
    net = TwoWays(branch)
    position = torch.rand(4, 100, 4, 4)
    net.mix.register_forward_hook(lambda module, args, output: output + position)
    cam = HiResCAM(net, "conv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Seg3dcamWarning)
        result = cam(torch.rand(1, 1, 100, 4, 4), VOLUME)
    assert result.status["conv"] == status


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantised_branches():
    net = TwoWays(lambda z: z)
    net.mix = nn.Linear(4, 4)

    def forward(x):
        a = torch.relu(net.conv(x))
        return net.head(a + net.mix(a.movedim(1, -1)).movedim(-1, 1))

    net.forward = forward
    whole, _ = explained(net)
    net.mix = torch.ao.quantization.quantize_dynamic(nn.Sequential(net.mix), {nn.Linear})[0]
    broken, said = explained(net)
    assert whole.status["conv"] == "ok"
    assert broken.status["conv"] == "incomplete"
    assert any("quantised weights" in text for text in said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_is_no_missing_branch(dtype):
    torch.manual_seed(0)
    net = nets.UNet(3, 1, 3, channels=(4, 8, 16), strides=(2, 2), norm=None).to(dtype)
    x = torch.rand(1, 1, 32, 32, 32)
    result = GradCAM(net, ["model.1.submodule.1.submodule", "model.1"])(x, VOLUME)
    assert [layer.missing for layer in result.layers.values()] == [0, 0]


def test_it_is_found_out_once_for_each_layer():
    net, calls = TwoWays(lambda z: z.detach()), []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    explained(net)
    first = len(calls)
    result, _ = explained(net, cam=GradCAM)
    assert len(calls) == first + 1
    assert result.status["conv"] == "incomplete"


class Strict(TwoWays):
    """Refuses images beyond 0 ... 1, as those of the check are, for they have noise."""

    strict = True

    def forward(self, x):
        if self.strict and not 0 <= float(x.min()) <= float(x.max()) <= 1:
            raise ValueError("intensities must lie in [0, 1]")
        return super().forward(x)


NOT_CHECKED = "the gradient at layer 'conv' could not be checked"


@pytest.mark.few(2)
@pytest.mark.parametrize("plan", [None, WindowPlan(8, overlap=0.5)])
@pytest.mark.parametrize(("branch", "status"), [(torch.relu, "ok"), (torch.detach, "incomplete")])
def test_a_gradient_that_could_not_be_checked_is_said_and_tried_again(plan, branch, status):
    net = Strict(branch)
    for _ in range(2):  # the second time, too: nothing is remembered
        result, said = explained(net, plan=plan)
        assert [text for text in said if NOT_CHECKED in text and "must lie in [0, 1]" in text]
        assert any("score_cam" in text for text in said)
        assert result.status["conv"] == "ok"
    net.strict = False
    result, said = explained(net, plan=plan)
    assert not any(NOT_CHECKED in text for text in said)
    assert result.status["conv"] == status


@pytest.mark.few(2)
@pytest.mark.parametrize("error", [ModelError, LayerError, torch.OutOfMemoryError])
def test_whatever_kept_the_check_from_running_is_said(error, monkeypatch):
    def fails(*_):
        raise error("it does not run\nfor a long reason")

    monkeypatch.setattr(promises, "_gaps", fails)
    _, said = explained(TwoWays(torch.relu), layer=["conv", "mix", "head"])
    (text,) = said
    assert "layer 'conv', layer 'mix', layer 'head' could not be checked (it does not run):" in text
    _, said = explained(TwoWays(torch.relu), cam=CAMS["score_cam"])
    assert not said  # its map is made of no gradient
    x = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(Seg3dcamWarning, match="gradient at the input could not be checked"):
        ATTRIBUTIONS["gradient"](TwoWays(torch.relu))(x, VOLUME)


def run_aside(module, args):
    module.aside(args[0])


def test_layers_without_a_map_are_not_said_twice():
    """That the score does not depend on one is told; its gradient is nothing to be checked."""
    net = TwoWays(torch.relu)
    net.aside = nn.Conv3d(1, 4, 1)
    net.register_forward_pre_hook(run_aside)
    _, said = explained(net, layer="*")
    assert any("no map of layer 'aside'" in text for text in said)
    assert not any("could not be checked" in text for text in said)


# --------------------------------------------------------------------- what it is made of


class Score:
    """A capture of one number for each layer's activations, as if the logits were their sum."""

    def __init__(self, functions):
        self.functions = functions

    def nudged(self, x, steps):
        return sum(self.functions[name](step.double()) for name, step in steps.items())


def promise(functions, gradients, activations, dtype=torch.float64):
    given = {k: torch.full((1, 64, 4, 4, 8), v, dtype=dtype) for k, v in gradients.items()}
    shown = {k: torch.full((1, 64, 4, 4, 8), v, dtype=dtype) for k, v in activations.items()}
    one = torch.ones((), dtype=dtype)
    return promises._Promise(Score(functions), torch.zeros(()), 0 * one, one, given, shown)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, -1.0])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_the_part_missed_is_that_of_the_change(share, size):
    """The score grows by 1 + share where the gradient says 1."""
    net = promise({"a": lambda step: (1 + share) * step.sum()}, {"a": 1.0}, {"a": size})
    missed = abs(share) / max(1, abs(1 + share))  # of the larger one, change or promise
    assert net._missed(["a"], 1e-3, 3) == pytest.approx(missed)
    assert net.gap("a", 4) == pytest.approx(missed)
    assert not net.is_kept(["a"], 3)


def test_steps_are_parts_of_the_activations_size():
    seen = []
    net = promise({"a": lambda step: seen.append(step) or step.sum()}, {"a": 1.0}, {"a": 7.0})
    assert net._missed(["a"], 1e-2, 20) == pytest.approx(0, abs=1e-9)
    assert len(seen) == 40
    assert torch.stack(seen).std().item() == pytest.approx(0.07, rel=0.05)
    torch.testing.assert_close(seen[0], -seen[1])  # from both sides
    assert not torch.equal(seen[0], seen[2])


def test_every_other_direction_moves_whole_channels_in_proportion():
    a = torch.rand(1, 3, 4, 5, 6) - 0.5
    for number in (1, 3):
        moved = promises._direction(a, number) / a
        assert moved.flatten(2).std(-1).max() < 1e-4
        assert moved.flatten(2).mean(-1).std() > 0.1
    assert (promises._direction(a, 0) / a).flatten(2).std(-1).min() > 0.1
    assert not torch.equal(promises._direction(a, 1), promises._direction(a, 3))


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_exactly_0_stays(number):
    a = torch.rand(1, 3, 4, 5, 6)
    a[:, :, 1:3] = 0
    assert torch.equal(promises._direction(a, number) == 0, a == 0)
    assert not promises._direction(0 * a, number).any()


@pytest.mark.parametrize("seed", [slow_unless(seed == 0, seed) for seed in range(4)])
@pytest.mark.parametrize("layer", ["0", "1", "4"])
def test_ties_in_a_pooling_are_no_missing_branch(seed, layer):
    """Behind a ReLU most windows of a pooling hold several zeros."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(6, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(8, 3, 1), nn.Upsample(scale_factor=4)),
    )
    target = targets.ClassLogit(1, region="volume")
    result = HiResCAM(net, layer)(torch.rand(1, 1, 16, 16, 16), target)
    assert result.layers[layer].missing == 0


@pytest.mark.slow
def test_answers_that_differ_each_time_are_no_missing_branch():
    """Random numbers of a generator that nothing here can know of."""
    unknown = np.random.default_rng(0)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

        def forward(self, x):
            z = self.conv(x)
            return self.head(z + 0.1 * torch.from_numpy(unknown.standard_normal(z.shape)).to(z))

    torch.manual_seed(0)
    net, target = Noisy(), targets.ClassLogit(1, region="volume")
    for _ in range(2):  # it is not remembered as whole
        with pytest.warns(Seg3dcamWarning, match="could not be checked .*differently each time"):
            result = HiResCAM(net, "conv")(torch.rand(1, 1, 16, 16, 16), target)
        assert result.status["conv"] == "ok"


class Normed(nn.Module):
    """Subtracts what it sees of the whole image, without a gradient."""

    def __init__(self, of):
        super().__init__()
        self.conv, self.head, self.of = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1), of

    def forward(self, x):
        z = self.conv(x)
        return self.head(z - self.of(z.flatten(2)).detach()[..., None, None])


@pytest.mark.slow
@pytest.mark.parametrize(
    "of",
    [lambda z: z.mean(2, keepdim=True), lambda z: z.quantile(0.5, 2, keepdim=True)],
    ids=["mean", "median"],
)
def test_branches_that_see_the_whole_image_are_found(of):
    torch.manual_seed(0)
    net, target = Normed(of), targets.ClassLogit(1, region="volume")
    with pytest.warns(Seg3dcamWarning, match="misses"):
        result = HiResCAM(net, "conv")(torch.rand(1, 1, 16, 16, 16), target)
    assert result.status["conv"] == "incomplete"


@pytest.mark.parametrize(("factor", "share"), [(2.0, 0.5), (5.0, 0.2), (50.0, 0.1)])
def test_layers_together_are_nudged_with_as_much_effect(factor, share):
    """The one of the greater effect by less, and by a tenth at least."""
    sizes = {}

    def seen(name):
        return lambda step: sizes.setdefault(name, step.std()) * 0 + step.sum()

    net = promise({"a": seen("a"), "b": seen("b")}, {"a": 1.0, "b": factor}, {"a": 1.0, "b": 1.0})
    net._missed(["a", "b"], 1e-1, 1)
    assert float(sizes["b"] / sizes["a"]) == pytest.approx(share, rel=0.05)
    assert net._missed(["b"], 1e-1, 1) == pytest.approx((factor - 1) / factor)


def test_without_effect_there_is_nothing_to_miss_or_all():
    assert promise({"a": lambda step: 0 * step.sum()}, {"a": 0.0}, {"a": 1.0}).gap("a", 3) == 0
    assert promise({"a": lambda step: step.sum()}, {"a": 0.0}, {"a": 1.0}).gap("a", 3) == 1
    assert promise({"a": lambda step: 0 * step.sum()}, {"a": 1.0}, {"a": 1.0}).gap("a", 3) == 1


def test_what_is_seen_at_the_smallest_steps_alone_is_rounding():
    """Small steps are lost, those of 1/10 arrive whole."""

    def rounded(step):
        return step.sum() if step.std() > 0.05 else 0 * step.sum()

    net = promise({"a": rounded}, {"a": 1.0}, {"a": 1.0})
    assert not net.is_kept(["a"], 3)
    assert net.gap("a", 3) == 0


def test_changes_below_the_rounding_of_the_score_tell_nothing():
    """A score of a million in single precision, and changes of a hundredth, all of them wrong."""
    logits = torch.full((1, 2, 4, 4, 4), 1e6)
    shown = {"a": torch.full((1, 2, 4, 4, 4), 1e-3)}
    capture = Score({"a": lambda step: -step.sum()})
    net = promises._Promise(
        capture, logits, logits, torch.ones(1, 2, 4, 4, 4), {"a": torch.ones(1, 2, 4, 4, 4)}, shown
    )
    assert net.gap("a", 3) == 0
    exact = promises._Promise(
        capture, logits, 0 * logits, torch.ones(1, 2, 4, 4, 4), {"a": 1 + 0 * shown["a"]}, shown
    )
    assert exact.gap("a", 3) == 1


def test_curvature_is_nothing_missed_and_a_jump_is():
    """What curves misses less at smaller steps; an argmax that turns over misses all at once."""
    curved = promise({"a": lambda step: (step + 1e4 * step**3).sum()}, {"a": 1.0}, {"a": 1.0})
    assert curved._missed(["a"], 1e-1, 3) > 0.45
    assert curved._missed(["a"], 3e-4, 3) < 0.1
    assert curved.gap("a", 3) == 0

    def jumping(step):
        return step.sum() + (1e3 * step.sum().sign() if step.std() > 5e-3 else 0)

    assert promise({"a": jumping}, {"a": 1.0}, {"a": 1.0}).gap("a", 3) > 0.5


def test_half_precision_takes_large_steps_alone():
    seen = []
    net = promise(
        {"a": lambda step: seen.append(step.std()) or step.sum()},
        {"a": 1.0},
        {"a": 1.0},
        torch.bfloat16,
    )
    assert net.is_kept(["a"], 2)
    assert [float(s) for s in seen] == pytest.approx([0.1] * 4 + [0.3] * 4, rel=0.2)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, []), (1, [1]), (3, [3]), (7, [3, 3, 1]), (24, [3] * 8), (33, [5] * 6 + [3])],
)
def test_layers_are_nudged_in_few_groups(count, sizes):
    groups = list(promises._groups(list(range(count))))
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == list(range(count))


def test_the_middle_of_an_image_is_looked_at():
    """At most 64-95 voxels an axis, as many as the whole has modulo 32."""
    x = torch.arange(200 * 96).view(1, 1, 200, 96, 1).expand(-1, -1, -1, -1, 5)
    part = promises._middle(x, 64)
    assert part.shape == (1, 1, 72, 64, 5)
    assert part.is_contiguous()
    torch.testing.assert_close(part, x[:, :, 64:136, 16:80])


def test_weights_of_the_score_are_smooth_and_the_same():
    """Alike in blocks of eight voxels, different from one to the next, for each class its own."""
    weights = promises._weights(torch.zeros(1, 3, 32, 16, 4))
    assert weights.shape == (1, 3, 32, 16, 4)
    blocks = weights.unflatten(2, (4, 8)).unflatten(4, (2, 8))
    assert torch.equal(blocks.amax((3, 5, 6)), blocks.amin((3, 5, 6)))
    assert len(weights.unique()) == 3 * 4 * 2
    assert torch.equal(weights, promises._weights(torch.ones(1, 3, 32, 16, 4)))
    assert promises._weights(torch.zeros(2, 3)).unique().numel() == 6
