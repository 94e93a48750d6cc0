"""Networks that draw random numbers while they predict: the same draws in every pass, and said."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

from seg3dcam import GradCAM, HiResCAM, WindowPlan, targets
from seg3dcam.cams import CAMS
from seg3dcam.draws import random_state
from seg3dcam.errors import ModelError, Seg3dcamWarning

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
    return torch.rand(items, 1, size, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize(
    "plan", [None, WindowPlan(8, overlap=0), WindowPlan(8, overlap=0.5, sw_batch_size=3)]
)
def test_prediction_and_gradient_draw_the_same(name, plan):
    draw, operation = DRAWS[name]
    with pytest.warns(Seg3dcamWarning, match=SAID) as caught:
        found = HiResCAM(Drawing(draw), "relu", sliding_window=plan)(image(), VOLUME)
    assert any(__import__("re").search(operation, str(w.message)) for w in caught)
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


def test_what_another_thread_draws_is_not_the_networks():
    # Made before: the other thread would draw in between, and the weights be others each time.
    nets, stop = [Drawing(lambda a: a) for _ in range(5)], threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(1000)

    other = threading.Thread(target=draw)
    other.start()
    try:
        for net in nets:
            assert HiResCAM(net, "relu")(image(size=8), VOLUME).draws == ""
    finally:
        stop.set()
        other.join()


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
