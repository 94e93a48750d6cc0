"""The model, and the process around it, are the same after an explanation as before it.

Each test reads everything that an explanation might touch, before and after: `helpers_untouched`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
from helpers_crossed import crossed
from helpers_untouched import modes, untouched
from torch import nn

from seg3dcam import GradCAM, HiResCAM, SliceGradCAM, WindowPlan, suggest_layers, targets
from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ModelError
from seg3dcam.network.capture import capturing
from seg3dcam.network.grids.measurement import measure_grids
from seg3dcam.network.layers import resolve_layers

# The network draws random numbers, which is said; that is the subject of test_draws.py.
pytestmark = pytest.mark.filterwarnings("ignore:the network draws random numbers")

VOLUME = targets.ClassLogit(1, region="volume")
LAYER = "encoder.1"
FEATURES = 7  # a number of channels that nothing else has, so that activations can be recognised


class Counter(nn.Module):
    """Changes one buffer in place, replaces another and draws random numbers, at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("last", torch.tensor([float("nan")]), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean()
        return x + 1e-3 * torch.rand_like(x)


class Net(nn.Module):
    """Everything that has a state: batch norm, dropout, in-place activations, buffers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.Conv3d(4, FEATURES, 3, stride=2, padding=1),
            nn.BatchNorm3d(FEATURES),
            nn.ReLU(inplace=True),
            nn.Dropout3d(0.3),
        )
        self.counter = Counter()
        self.decoder = nn.Sequential(
            nn.ConvTranspose3d(FEATURES, 4, 2, 2), nn.InstanceNorm3d(4, track_running_stats=True)
        )
        self.head = nn.Conv3d(4, 3, 1)
        calls = itertools.count(1)  # what a function closes over goes on, an attribute would not
        self.calls = lambda: next(calls)
        self.failing_call = None

    def forward(self, x):
        if self.calls() == self.failing_call:
            raise RuntimeError("the network fails")
        return self.head(self.decoder(self.counter(self.encoder(x))))


@pytest.fixture
def x():
    return torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    return in_training()


@pytest.fixture(scope="module")
def lasting():
    """A network for many tests, whose grids are measured once: each must leave it as it was."""
    return in_training()


def in_training():
    """Return a network in the middle of one: mixed modes, gradients, frozen parts, own hooks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        net(torch.rand(2, 1, 8, 8, 8)).square().mean().backward()
    net.encoder[0].requires_grad_(False)
    net.encoder[0].weight.grad = None
    net.head.bias.requires_grad = False
    net.encoder[4].eval()
    net.decoder.training = False  # the container alone: its children go on training
    net.encoder[2].eval()
    net.encoder[1].register_forward_hook(lambda module, args, output: None)
    net.encoder[1].register_forward_pre_hook(lambda module, args: None)
    net.head.register_full_backward_hook(lambda module, before, after: None)
    net.head.weight.register_hook(lambda gradient: None)
    return net


# ------------------------------------------------------------------------------ what can happen


def explain(cam=HiResCAM, layers=LAYER, target=VOLUME, **settings):
    return lambda net, x: cam(net, layers, **settings)(x, target)


def one_target_after_another(net, x):
    GradCAM(net, LAYER).each(x, [VOLUME, targets.MaskOutput(), VOLUME])


def explain_in_inference_mode(net, x):
    with torch.inference_mode():
        HiResCAM(net, LAYER)(x * 1, VOLUME)


def explain_under_autocast(net, x):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = modes()
        HiResCAM(net, LAYER)(x, VOLUME)
        assert modes() == before


GOOD_CALLS = {
    "one window": explain(),
    "the recipe": explain(SliceGradCAM, target=None),
    "several layers": explain(layers=["encoder.0", LAYER, "decoder.0"]),
    "suggested layer": explain(layers="auto"),
    "every convolution": explain(layers="all"),
    "sliding window": explain(sliding_window=WindowPlan(4)),
    "sliding window, pooled": explain(GradCAM, sliding_window=WindowPlan(4, sw_batch_size=3)),
    "sliding window, no cache": explain(GradCAM, sliding_window=WindowPlan(4, cache_gb=0)),
    "several targets": one_target_after_another,
    "inference mode": explain_in_inference_mode,
    "autocast": explain_under_autocast,
    "suggest_layers": lambda net, x: suggest_layers(net, x.shape),
    "measure_grids": lambda net, x: measure_grids(
        net, x, {resolve_layers(net, LAYER)[0]: (4, 4, 4)}
    ),
}

# The cancelling map of the whole mask output gets a warning, which is not the subject here.
quiet = pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")


@pytest.mark.few(5)
@quiet
@pytest.mark.parametrize("name", GOOD_CALLS)
def test_after_a_good_call(name, net, x):
    with untouched(net):
        GOOD_CALLS[name](net, x)


class BrokenError(Exception):
    pass


def breaks(error):
    def target(logits):
        raise error

    return target


def network_fails(call, plan):
    def run(net, x):
        net.failing_call = net.calls() + call
        HiResCAM(net, LAYER, sliding_window=plan)(x, VOLUME)

    return run


def network_fails_at_last(net, x):
    """After the passes that measure, some of which may fail, in one that the map needs."""
    cam = HiResCAM(net, LAYER, sliding_window=WindowPlan(4))
    cam(x, VOLUME)
    network_fails(12, WindowPlan(4))(net, x)


FAILING_CALLS = {
    "target raises": (explain(target=breaks(BrokenError())), BrokenError),
    "target raises, windows": (
        explain(target=breaks(BrokenError()), sliding_window=WindowPlan(4)),
        BrokenError,
    ),
    "interrupted": (explain(target=breaks(KeyboardInterrupt())), KeyboardInterrupt),
    "network fails": (network_fails(1, None), ModelError),
    "network fails at the second window": (network_fails(2, WindowPlan(4)), ModelError),
    "network fails in the second pass": (network_fails_at_last, ModelError),
    "network fails while suggesting": (
        lambda net, x: (
            setattr(net, "failing_call", net.calls() + 1),
            suggest_layers(net, x.shape),
        ),
        ModelError,
    ),
}


@quiet
@pytest.mark.parametrize("name", FAILING_CALLS)
def test_after_a_failing_call(name, net, x):
    run, error = FAILING_CALLS[name]
    with untouched(net), pytest.raises(error):
        run(net, x)


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_after_an_error_of_the_progress_callback(error, net, x):
    def interrupt(step, done, total):
        if step == "explaining" and done > 2:
            raise error

    cam = HiResCAM(net, LAYER, sliding_window=WindowPlan(4), progress=interrupt)
    with untouched(net), pytest.raises(error):
        cam(x, VOLUME)


# ---------------------------------------------------------------------------------- every method

METHODS = CAMS | ATTRIBUTIONS


@quiet
@pytest.mark.parametrize(("key", "plan"), crossed(METHODS, [None, WindowPlan((8, 8, 4))], rows=8))
def test_after_every_method(key, plan, net, x):
    with untouched(net):
        METHODS[key](net, LAYER, sliding_window=plan)(x, VOLUME)


class Bomb:
    """Counts its calls; at one of them it goes off."""

    def __init__(self):
        self.calls, self.at = 0, None

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


#: Where it is put: on progress, behind the last layer, on the way back from it.
PLACES = {
    "progress": lambda net, cam, bomb: setattr(cam, "progress", bomb),
    "forward pass": lambda net, cam, bomb: net.head.register_forward_hook(bomb),
    "backward pass": lambda net, cam, bomb: net.head.register_full_backward_hook(bomb),
    "target": lambda net, cam, bomb: None,
}


@quiet
@pytest.mark.parametrize(("key", "place"), crossed(METHODS, PLACES, rows=8))
def test_after_every_method_that_is_interrupted_half_way(key, place, lasting, x, request):
    bomb, plan = Bomb(), WindowPlan((8, 8, 4))
    cam = METHODS[key](lasting, LAYER, sliding_window=plan)
    hook = PLACES[place](lasting, cam, bomb)
    if hook is not None:
        request.addfinalizer(hook.remove)

    def target(logits):
        if place == "target":
            bomb()
        return VOLUME(logits)

    cam(x, target)  # once to measure the layers' grids, if no other test did, once to count
    bomb.calls = 0
    cam(x, target)
    calls = bomb.calls
    assert calls or place == "backward pass"
    for at in {(calls + 1) // 2, calls} - {0}:
        bomb.calls, bomb.at = 0, at
        with untouched(lasting), pytest.raises(KeyboardInterrupt):
            cam(x, target)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_switches_of_the_user_stay(precision, net, x):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with untouched(net):
            HiResCAM(net, LAYER)(x, VOLUME)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_buffer_that_the_network_fills_is_empty_again(x):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", None)
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones_like(x[:1])
            return self.conv(x * self.cache)

    model = Caching()
    nn.init.ones_(model.conv.weight)
    nn.init.ones_(model.conv.bias)
    with untouched(model):
        HiResCAM(model, "conv", sliding_window=WindowPlan(4))(x, targets.MaskOutput())


def test_a_train_method_of_the_network_is_not_called(x):
    """Many networks freeze or unfreeze parts in it."""

    class Own(Net):
        def train(self, mode=True):
            raise AssertionError("train() or eval() was called")

    model = Own()
    with untouched(model):
        HiResCAM(model, LAYER)(x, VOLUME)


# ----------------------------------------------------------------------------- training goes on


def test_training_step_after_an_explanation_equals_one_without(net, x):
    twin = copy.deepcopy(net)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        HiResCAM(net, LAYER)(x, VOLUME)
        losses = [step(net, x)]
        torch.manual_seed(5)
        losses.append(step(twin, x))
    assert losses[0] == losses[1]
    for (name, a), b in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def step(net, x):
    net.train().requires_grad_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = net(torch.cat([x, 1 - x])).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_graph_that_was_built_before_still_gives_its_gradients(net, x):
    net.zero_grad()
    twin = copy.deepcopy(net)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss = net(x).square().sum()
        torch.manual_seed(5)
        twin(x).square().sum().backward()
    HiResCAM(net, LAYER)(x, VOLUME)
    loss.backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.slow
def test_the_input_is_not_changed(net, x):
    given = x.clone().requires_grad_()
    plan = WindowPlan(4, sw_batch_size=1)
    for settings in ({}, {"sliding_window": plan}):
        HiResCAM(nn.Sequential(nn.ReLU(inplace=True), net), "1." + LAYER, **settings)(given, VOLUME)
    torch.testing.assert_close(given.detach(), x, rtol=0, atol=0)
    assert given.grad is None
    assert given.requires_grad


def test_hooks_of_the_user_fire_and_stay(net, x):
    seen = []
    handle = net.encoder[1].register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    with untouched(net):
        result = HiResCAM(net, LAYER)(x, VOLUME)
    assert result.status[LAYER] == "ok"
    with torch.no_grad():
        expected = net.encoder[1](net.encoder[0](x))
    torch.testing.assert_close(seen[0], expected)
    count = len(seen)
    with torch.no_grad():
        net(x)
    assert len(seen) == count + 1
    handle.remove()


def test_what_a_hook_of_the_user_makes_of_the_layer_is_explained(net, x):
    """Hooks run in the order of their registration, so the network goes on with their result."""
    layers = resolve_layers(net, LAYER)

    def activations():
        with capturing(net, layers) as capture:
            return capture.observe_layers(x)[layers[0]]

    plain = activations()
    net.encoder[1].register_forward_hook(lambda module, args, output: 2 * output)
    with untouched(net):
        torch.testing.assert_close(activations(), 2 * plain)


# ------------------------------------------------------------------------------- nothing left over


def living_features():
    """Return the tensors in memory that have the target layer's channels."""
    tensors = (o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))
    return [
        t.shape for t in tensors if t.ndim == 5 and t.shape[1] == FEATURES and len(t) < FEATURES
    ]


@contextlib.contextmanager
def without_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("cam_class", "plan"), crossed([GradCAM, HiResCAM], [None, WindowPlan(4)], rows=1)
)
@quiet
def test_no_activations_outlive_the_call(cam_class, plan, net, x):
    """Neither the CAM nor its result keeps any, and no reference cycle waits for collection."""
    outputs = []

    def remember(module, args, output):
        outputs.append(weakref.ref(output))

    net.encoder[1].register_forward_hook(remember)
    cam = cam_class(net, LAYER, sliding_window=plan)
    before = len(living_features())
    with without_garbage_collection():
        result = cam(x, VOLUME)
        assert outputs
        assert not [ref for ref in outputs if ref() is not None]
        assert len(living_features()) == before
    assert result.logits.grad_fn is None
    assert result.score.grad_fn is None
    assert result.maps[LAYER].grad_fn is None


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("plan", [None, WindowPlan(4)])
def test_no_activations_outlive_an_error(plan, net, x):
    cam = HiResCAM(net, LAYER, sliding_window=plan)
    before = len(living_features())
    with pytest.raises(BrokenError):
        cam(x, breaks(BrokenError()))
    gc.collect()
    assert len(living_features()) == before


@pytest.mark.slow
def test_a_model_can_be_let_go_of():
    """What was measured is remembered by layer, but does not keep the layer alive."""
    net = Net().eval()
    gone = weakref.ref(net.encoder[1])
    HiResCAM(net, LAYER)(torch.rand(1, 1, 8, 8, 8), targets.MaskOutput())
    del net
    gc.collect()
    assert gone() is None
