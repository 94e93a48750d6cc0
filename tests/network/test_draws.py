"""Networks that draw random numbers while they predict: the same draws in every pass, and said."""

from __future__ import annotations

import random
import re
import threading
import time

import numpy as np
import pytest
import torch
from helpers_crossed import crossed
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.utils.checkpoint import checkpoint

from seg3dcam import GradCAM, HiResCAM, SegModel, WindowPlan, explain_each, load_scan, targets
from seg3dcam.cams.catalogue import CAMS
from seg3dcam.errors import ModelError, Seg3dcamWarning
from seg3dcam.network.capture import FoundLateError, begun_again, capturing
from seg3dcam.network.capture.repeated_draws import MOST_TRIALS
from seg3dcam.network.capture.retry import MOST_ATTEMPTS
from seg3dcam.network.facts import facts_of
from seg3dcam.network.layers import resolve_layers
from seg3dcam.network.random_draws import random_state, set_random_state

VOLUME = targets.ClassLogit(1, "volume")
SAID = "draws random numbers when it predicts"


class Drawing(nn.Module):
    """A linear head without bias behind something random: the map then sums to the score."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Conv3d(4, 2, 1, bias=False)
        self.draw = draw

    def forward(self, x):
        return self.head(self.draw(self.relu(self.conv(x))))


DRAWS = {
    "dropout": (lambda a: F.dropout(a, 0.5, True), "dropout|bernoulli"),
    "channels dropped": (lambda a: F.dropout3d(a, 0.5, True), "dropout|bernoulli"),
    "noise": (lambda a: a * torch.rand_like(a), "rand"),
    "numpy": (lambda a: a * float(np.random.rand()), "NumPy or Python"),
    "python": (lambda a: a * random.random(), "NumPy or Python"),
}


def image(items=1, size=16):
    """Return noise of a few windows of 8 voxels: size is the length of the last axis alone."""
    return torch.rand(items, 1, 8, 8, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "plan"),
    crossed(DRAWS, [None, WindowPlan(8, overlap=0), WindowPlan(8, overlap=0.5, sw_batch_size=2)]),
)
def test_prediction_and_gradient_draw_the_same(name, plan):
    draw, operation = DRAWS[name]
    with pytest.warns(Seg3dcamWarning, match=SAID) as caught:
        found = HiResCAM(Drawing(draw), "relu", sliding_window=plan)(image(), VOLUME)
    assert any(re.search(operation, str(w.message)) for w in caught)
    assert found.draws
    total = float(found.maps["relu"].double().sum())
    assert total == pytest.approx(float(found.score), rel=1e-4)


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_the_callers_seed_decides_and_stays():
    net = Drawing(DRAWS["dropout"][0])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        before = random_state()
        found.append(HiResCAM(net, "relu", sliding_window=WindowPlan(8))(image(), VOLUME))
        assert before.equals(random_state())
    same, other = ((found[0].maps["relu"] - f.maps["relu"]).abs().max() for f in found[1:])
    assert same == 0
    assert other > 0


def test_networks_that_draw_nothing_are_left_in_peace():
    net = Drawing(lambda a: F.dropout(a, 0.5, False))
    found = HiResCAM(net, "relu")(image(), VOLUME)
    assert found.draws == ""


@pytest.fixture
def beside(request):
    """A thread that does something over and over."""
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            request.param()
            time.sleep(1e-4)  # a busy thread would hold up all others

    other = threading.Thread(target=repeat)
    other.start()
    yield
    stop.set()
    other.join()


@pytest.mark.parametrize(
    "beside",
    crossed([lambda: torch.rand(1000), lambda: np.random.rand(1000), random.random], rows=1),
    indirect=True,
)
def test_what_another_thread_draws_is_not_the_networks(beside):
    for _ in range(3):
        assert HiResCAM(Drawing(lambda a: a), "relu")(image(size=8), VOLUME).draws == ""


def seeded_and_drawn():
    np.random.seed(0)
    np.random.rand()


@pytest.mark.parametrize("beside", [seeded_and_drawn], indirect=True)
def test_a_seed_that_another_thread_sets_is_not_the_networks(beside):
    for _ in range(3):
        assert HiResCAM(Drawing(lambda a: a), "relu")(image(size=8), VOLUME).draws == ""


@pytest.mark.parametrize("beside", [lambda: np.random.rand(7)], indirect=True)
def test_a_network_is_tried_a_few_times_in_its_life(beside):
    net = Drawing(lambda a: a)
    for _ in range(4):
        HiResCAM(net, "relu")(image(size=8), VOLUME)
    assert facts_of(net).trials <= MOST_TRIALS


@pytest.mark.parametrize("beside", [lambda: None], indirect=True)
@pytest.mark.parametrize(("kind", "late"), crossed(["numpy", "python", "dropout"], [False, True]))
def test_draws_are_known_beside_another_thread(kind, late, beside):
    """As in every notebook."""
    draw, operation = DRAWS[kind]
    net, x = (only_if_bright(draw), brighter_on_the_right()) if late else (Drawing(draw), image())
    before = random_state()
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = HiResCAM(net, "relu", sliding_window=WindowPlan(8, overlap=0))(x, VOLUME)
    assert re.search(operation, found.draws)
    assert before.equals(random_state())
    total = float(found.maps["relu"].double().sum())
    assert total == pytest.approx(float(found.score), rel=1e-4)


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_scores_are_looked_at_again_with_the_same_draws():
    """Without a channel that the head does not read, the score is what it was."""
    net = Drawing(DRAWS["dropout"][0])
    with torch.no_grad():
        net.head.weight[:, 2:] = 0
    found = CAMS["ablation_cam"](net, "relu")(image(), VOLUME)
    with torch.no_grad():
        net.conv.weight[2:] *= 5  # channels of weight zero change nothing then
    again = CAMS["ablation_cam"](net, "relu")(image(), VOLUME)
    torch.testing.assert_close(found.maps["relu"], again.maps["relu"])


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_a_batch_whose_items_would_draw_otherwise_is_refused():
    net = Drawing(DRAWS["dropout"][0])
    assert GradCAM(net, "relu")(image(2), VOLUME).maps["relu"].shape[0] == 2
    with pytest.raises(ModelError, match="explain the 2 items in calls of their own"):
        CAMS["score_cam"](net, "relu")(image(2), VOLUME)


# ----------------------------------------------------------- generators that the network owns

#: Kind of a generator -> how one is made, what it draws, and what its state is.
OWNED = {
    "torch": (
        lambda: torch.Generator().manual_seed(3),
        lambda g: torch.rand(1, generator=g),
        lambda g: g.get_state().tolist(),
    ),
    "numpy": (
        lambda: np.random.default_rng(3),
        lambda g: float(g.random()),
        lambda g: g.bit_generator.state,
    ),
    "numpy, with an array as its state": (
        lambda: np.random.Generator(np.random.MT19937(3)),
        lambda g: float(g.random()),
        lambda g: str(g.bit_generator.state),
    ),
    "numpy, old": (
        lambda: np.random.RandomState(3),
        lambda g: float(g.standard_normal()),
        lambda g: str(g.get_state()),
    ),
    "python": (lambda: random.Random(3), lambda g: g.random(), lambda g: g.getstate()),
}

#: Where it is kept -> how, and how it is found there.
PLACES = {
    "attribute": (lambda g: g, lambda kept: kept),
    "list": (lambda g: [None, g], lambda kept: kept[1]),
    "dict": (lambda g: {"first": (g,)}, lambda kept: kept["first"][0]),
    "object": (lambda g: Keeper(g), lambda kept: kept.own["g"]),
}


class Keeper:
    def __init__(self, generator):
        self.own, self.me = {"g": generator}, self


def owning(kind, place="attribute"):
    make, draw, state = OWNED[kind]
    keep, find = PLACES[place]
    net = Drawing(lambda a: a * draw(find(net.kept)))
    net.kept = keep(make())
    return net, lambda: state(find(net.kept))


@pytest.mark.parametrize(("kind", "place"), crossed(OWNED, PLACES, rows=2))
def test_generators_of_the_networks_own(kind, place):
    net, state = owning(kind, place)
    before, generator = state(), PLACES[place][1](net.kept)
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = HiResCAM(net, "relu", sliding_window=WindowPlan(8, overlap=0.5))(image(), VOLUME)
    assert found.draws == ("rand" if kind == "torch" else "of NumPy or Python")
    assert PLACES[place][1](net.kept) is generator
    assert state() == before
    total = float(found.maps["relu"].double().sum())
    assert total == pytest.approx(float(found.score), rel=1e-4)
    # What is explained is what the network predicts next.
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = HiResCAM(net, "relu")(image(), VOLUME)
    torch.testing.assert_close(found.logits, net(image()).detach())
    assert state() != before


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize(("kind", "known"), crossed(OWNED, [False, True]))
def test_a_generators_state_is_given_back_after_an_error(kind, known):
    net, state = owning(kind)
    cam, before = HiResCAM(net, "relu"), state()
    if known:
        cam(image(), VOLUME)
    net.head.register_forward_hook(fails)
    with pytest.raises(ModelError, match="the head fails"):
        cam(image(), VOLUME)
    assert state() == before


def fails(*_):
    raise RuntimeError("the head fails")


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("key", ["ablation_cam", "grad_cam", "full_grad"])
def test_every_method_sees_one_draw_of_an_own_generator(key):
    """The same map again: each pass of both starts from the state that the generator has."""
    found = []
    for _ in range(2):
        net, _ = owning("numpy")
        cam = CAMS[key](net) if key == "full_grad" else CAMS[key](net, "relu")
        first, second = (cam(image(size=8), VOLUME) for _ in range(2))
        (one,), (two,) = first.maps.values(), second.maps.values()
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        found.append(one)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.slow
def test_the_operating_systems_numbers_have_no_state():
    net = Drawing(lambda a: a)
    net.system = random.SystemRandom()
    assert HiResCAM(net, "relu")(image(), VOLUME).draws == ""


def test_a_checkpoint_that_draws_again_on_the_way_back_leaves_the_state():
    net, state = owning("numpy")
    before = state()

    def drawn(a):
        return a * torch.full_like(a, net.kept.random())  # kept for the way back, or drawn again

    net.draw = lambda a: checkpoint(drawn, a, use_reentrant=False)
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = HiResCAM(net, "relu")(image(), VOLUME)
    assert state() == before
    assert float(found.maps["relu"].double().sum()) == pytest.approx(float(found.score), rel=1e-4)


# ------------------------------------------------------------------------ draws now and then


def brighter_on_the_right():
    x = image() - 1
    x[..., 8:] += 2
    return x


def only_if_bright(draw):
    """A network that draws where its window is bright."""
    net = Drawing(lambda a: draw(a) if net.seen > 0 else a)
    net.register_forward_pre_hook(lambda module, args: setattr(net, "seen", float(args[0].mean())))
    return net


@pytest.mark.parametrize(("name", "cam"), crossed(DRAWS, [HiResCAM, GradCAM], rows=2))
def test_what_draws_in_some_windows_alone_is_explained_as_one_that_draws(name, cam):
    """As a network of which that was known from the start, from its first, bright window."""
    plan = WindowPlan(8, overlap=0.5)
    late, early = only_if_bright(DRAWS[name][0]), only_if_bright(DRAWS[name][0])
    with pytest.warns(Seg3dcamWarning, match=SAID):
        HiResCAM(early, "relu")(image(size=8), VOLUME)
    before = random_state()
    found = []
    for net in (late, early):
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        with pytest.warns(Seg3dcamWarning, match=SAID):
            found.append(cam(net, "relu", sliding_window=plan)(brighter_on_the_right(), VOLUME))
    set_random_state(before)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=0, atol=0)
    torch.testing.assert_close(found[0].maps["relu"], found[1].maps["relu"], rtol=0, atol=0)
    assert found[0].draws == found[1].draws != ""
    if cam is HiResCAM:
        total = float(found[0].maps["relu"].double().sum())
        assert total == pytest.approx(float(found[0].score), rel=1e-4)


def test_what_draws_from_the_second_call_on_is_said_then():
    net = only_if_bright(DRAWS["dropout"][0])
    cam = HiResCAM(net, "relu")
    assert cam(image() - 1, VOLUME).draws == ""
    before = random_state()
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = cam(image(), VOLUME)
    assert found.draws
    assert before.equals(random_state())
    assert float(found.maps["relu"].double().sum()) == pytest.approx(float(found.score), rel=1e-4)


def test_a_pass_that_is_ended_early_shows_it_too():
    net = only_if_bright(DRAWS["noise"][0])
    with capturing(net, resolve_layers(net, "head")) as capture:
        capture.observe_layers(image() - 1)
        assert capture.known.draws is None  # what follows the layer may draw
        capture.observe(image() - 1, copy=False)
        assert capture.known.draws == ""
        with pytest.raises(FoundLateError, match=r"rand_like.*only now and then"):
            capture.observe_layers(image())
        capture.observe_layers(image())
        assert capture.known.draws == "rand_like"


def test_targets_of_a_scan_are_the_same_when_the_call_begins_again():
    """The draws show after the targets were evaluated: when masked, the scan is dark enough."""
    net = Drawing(lambda a: F.dropout(a, 0.5, True) if net.seen < 0.4 else a)
    net.register_forward_pre_hook(lambda module, args: setattr(net, "seen", float(args[0].mean())))
    scan = load_scan(image()[0, 0].numpy(), affine=np.eye(4))
    with pytest.warns(Seg3dcamWarning, match=SAID):
        found = list(explain_each(scan, SegModel(net), [VOLUME], layers="relu", method="score_cam"))
    assert len(found) == 1


def test_what_is_found_late_again_and_again_is_an_error():
    begun = []

    @begun_again
    def explain():
        begun.append(1)
        raise FoundLateError("it draws")

    with pytest.raises(ModelError, match="it draws"):
        explain()
    assert len(begun) == MOST_ATTEMPTS
