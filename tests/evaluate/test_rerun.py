"""A changed input is predicted as a full rerun would, by the windows alone that see the change."""

from __future__ import annotations

import pytest
import torch
import toy
from helpers_crossed import crossed
from helpers_untouched import untouched
from monai.inferers import sliding_window_inference
from torch import nn

from seg3dcam import Ensemble, WindowPlan
from seg3dcam.errors import InputError, ModelError
from seg3dcam.evaluate import Rerun

PLANS = {
    "one window": None,
    "one window, larger than the volume": WindowPlan(24),
    "windows": WindowPlan((6, 4, 8), overlap=0.5),
    "windows, constant": WindowPlan((6, 4, 8), overlap=0.25, mode="constant"),
    "many at once": WindowPlan((4, 4, 4), overlap=0.5, sw_batch_size=5),
    "padded by reflection": WindowPlan((16, 4, 8), overlap=0.5, padding_mode="reflect"),
    "padded by a number": WindowPlan((16, 4, 8), overlap=0.5, cval=2.5),
}
CHANGES = {
    "one voxel": (slice(3, 4), slice(2, 3), slice(7, 8)),
    "a corner": (slice(0, 2), slice(0, 2), slice(0, 2)),
    "the far end": (slice(9, 10), slice(7, 8), slice(17, 18)),
    "a slice": (slice(5, 6), slice(None), slice(None)),
    "everything": (slice(None), slice(None), slice(None)),
    "nothing": (slice(0, 0), slice(0, 0), slice(0, 0)),
}


KEPT = {"all": 4.0, "some": 4e-6, "none": 0.0}


def network() -> nn.Module:
    return toy.seeded(
        nn.Sequential(
            nn.Conv3d(2, 6, 3, padding=1), nn.InstanceNorm3d(6), nn.ReLU(), nn.Conv3d(6, 3, 1)
        ),
        seed=2,
    )


def networks() -> dict[str, nn.Module]:
    return {
        "plain": network(),
        "ensemble": Ensemble([network(), toy.seeded(network(), seed=5)], mirror_axes=(0, 2)),
    }


def image(seed: int = 0) -> torch.Tensor:
    return toy.random_input(1, 2, 10, 8, 18, seed=seed)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("plan", "change", "kept", "name"),
    crossed(
        PLANS,
        CHANGES,
        KEPT,
        ["plain", "ensemble"],
        rows=4,
        pairs=True,
    ),
)
def test_the_logits_are_those_of_a_full_rerun(name, plan, change, kept):
    x, model = image(), networks()[name]
    rerun = Rerun(model, x, sliding_window=PLANS[plan], kept_gb=KEPT[kept])
    series = rerun.start()
    changed = x.clone()
    for number, place in enumerate((CHANGES[change], CHANGES["a corner"], CHANGES[change])):
        changed = changed.clone()
        changed[(..., *place)] = image(number + 1)[(..., *place)]
        found = series.change(changed)
        expected = Rerun(model, changed, sliding_window=PLANS[plan])
        torch.testing.assert_close(found, expected.logits, rtol=0, atol=1e-6)
    again = rerun.start()
    assert torch.equal(again.logits, rerun.logits)  # a new series begins with the first input
    torch.testing.assert_close(again.change(changed), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("plan", ["windows", "padded by reflection", "padded by a number"])
def test_the_first_logits_are_monais(plan):
    x, model, windows = image(), network().eval(), PLANS[plan]
    with torch.no_grad():
        expected = sliding_window_inference(
            x,
            windows.roi_size,
            1,
            model,
            overlap=windows.overlap,
            mode=windows.mode,
            padding_mode=windows.padding_mode,
            cval=windows.cval,
        )
    torch.testing.assert_close(Rerun(model, x, sliding_window=windows).logits, expected)


def test_a_small_change_costs_the_windows_that_see_it():
    x = image()
    rerun = Rerun(network(), x, sliding_window=WindowPlan((5, 4, 6), overlap=0))
    assert len(rerun.windows) == 12
    assert rerun.cost == 1
    series, changed = rerun.start(), x.clone()
    changed[..., 0, 0, 0] += 1
    series.change(changed)
    assert rerun.windows_run == 13
    series.change(changed.clone())  # nothing has changed
    assert rerun.windows_run == 13
    changed[..., 4:6, 0, 0] += 1
    series.change(changed)
    assert rerun.windows_run == 15


def test_the_network_is_left_as_it_was():
    model, x = network().train(), image()
    with untouched(model):
        series = Rerun(model, x, sliding_window=PLANS["windows"]).start()
        series.change(x + 1)


def test_double_precision_stays():
    rerun = Rerun(network().double(), image().double())
    assert rerun.start().change(image(1)).dtype == torch.float64


def test_what_is_said_of_the_progress():
    said = []
    Rerun(
        network(),
        image(),
        sliding_window=PLANS["many at once"],
        progress=lambda *words: said.append(words),
    )
    assert {step for step, _, _ in said} == {"rerunning"}
    assert [done for _, done, _ in said] == [*range(5, said[-1][2], 5), said[-1][2]]


def test_bad_input():
    rerun = Rerun(network(), image())
    with pytest.raises(InputError, match="one input"):
        Rerun(network(), image().expand(2, -1, -1, -1, -1))
    with pytest.raises(InputError, match="shape of the first"):
        rerun.start().change(image()[..., :4])
    with pytest.raises(InputError, match="NaN"):
        rerun.start().change(image() * torch.nan)
    with pytest.raises(ModelError, match="full resolution"):
        Rerun(nn.Conv3d(2, 3, 3, stride=2, padding=1), image(), sliding_window=WindowPlan(4))
