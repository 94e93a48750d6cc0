"""Among many alike cases those with a planted shortcut come first, and the page says why."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from helpers_cases import write_scan, write_yaml
from safetensors.torch import save_file

from seg3dcam import cohort
from seg3dcam.cohort.triage import FEWEST, NAMED, triage
from seg3dcam.explaining.pattern import body_mask, pattern_of
from seg3dcam.job.record import Entry

_NETWORK = '''
import torch
from torch import nn


class Global(nn.Module):
    """Draws what is bright but not too bright; what is too bright makes it surer everywhere."""

    def __init__(self):
        super().__init__()
        self.bright = nn.Conv3d(1, 2, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        bright, glaring = self.act(self.bright(x)).split(1, 1)
        far = glaring.mean((2, 3, 4), keepdim=True)
        logit = 40 * bright - 200 * glaring - 10 + 400 * far
        return torch.cat([torch.zeros_like(logit), logit], 1)
'''

SHAPE = (32, 28, 24)


def body(random, *, marker=False, implant=False, healthy=False):
    """Return a scan: a body of 0.5 in air with a lesion of 1.2, somewhat different every time."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1).astype(float)
    middle = np.array([15.5, 13.5, 11.5]) + random.uniform(-1, 1, 3)
    inside = (((grid - middle) / random.uniform((12, 10, 9), (13, 11, 10))) ** 2).sum(-1) < 1
    scan = random.normal(0, 0.03, SHAPE) + 0.5 * inside
    lesion = middle + np.array([5, 0, 0]) + random.uniform(-1.5, 1.5, 3)
    if healthy:
        lesion = middle - np.array([5, 3, 3])  # what is called a lesion lies elsewhere
    scan[((grid - lesion) ** 2).sum(-1) < random.uniform(2.3, 2.8) ** 2] = 1.2
    if marker:
        scan[1:4, 1:4, :] = 3
    if implant:
        scan[6:9, 12:15, 9:12] = 6
    return scan.astype(np.float32)


@pytest.mark.slow
def test_planted_shortcuts_come_first(tmp_path):
    random = np.random.default_rng(1)
    planted = {"case07": "marker", "case19": "implant", "case33": "healthy"}
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in range(40):
        name = f"case{number:02d}"
        more = {planted[name]: True} if name in planted else {}
        write_scan(scans / f"{name}.nii.gz", body(random, **more))
    (tmp_path / "net.py").write_text(_NETWORK, encoding="utf-8")
    weights = {"bright.weight": torch.ones(2, 1, 1, 1, 1)}
    weights["bright.bias"] = torch.tensor([-0.8, -1.6])
    save_file(weights, tmp_path / "net.safetensors")
    spec = {"factory": "net:Global", "weights": "net.safetensors"}
    model = write_yaml(tmp_path / "net.yaml", spec | {"classes": ["background", "lesion"]})
    result = cohort.run(
        scans,
        model=str(model),
        trust=True,
        out=tmp_path / "out",
        layer="act",
        target="lesion",
        format=["nifti"],
    )
    assert not result.failed
    with result.tables[0].open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["unusual"]))
    assert {row["case"] for row in rows[:3]} == set(planted)
    why = {row["case"]: row["why"] for row in rows}
    assert "outside of the body" in why["case07"]
    assert "outside of the mask" in why["case07"]
    assert why["case19"]
    assert why["case33"]
    assert float(rows[2]["unusual"]) > 1.5 * float(rows[3]["unusual"])
    assert sum(bool(row["why"]) for row in rows[3:]) <= 4


def entry(case=0, **found):
    return Entry(
        label="lesion",
        name="lesion",
        run="r",
        layers={},
        found={"cam_outside": 0.1, "peak_to_prediction_mm": 0.0, **found},
        pattern=[1 / 512] * 512,
    )


def test_cases_that_are_alike_are_not_unusual():
    found = triage({(f"c{number}", "lesion"): entry() for number in range(FEWEST)}, FEWEST)
    assert {one.score for one in found.values()} == {0}
    assert not any(one.reasons for one in found.values())


def test_too_few_cases_are_not_compared():
    found = triage({(f"c{number}", "lesion"): entry() for number in range(FEWEST - 1)}, FEWEST - 1)
    assert {one.score for one in found.values()} == {None}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"cam_outside": 0.9}, "90 % of the map outside of the mask (usual: 10 %)"),
        ({"cam_outside_body": 0.5}, "50 % of the map outside of the body"),
        ({"peak_to_prediction_mm": 40.0}, "peak 40 mm from the mask (usual: 0 mm)"),
        ({"confidence": 0.5}, "confidence 0.50 (usual: 0.90)"),
    ],
)
def test_each_figure_is_named(odd, words):
    usual = {"confidence": 0.9, "cam_outside_body": 0.0}
    entries = {(f"c{number}", "lesion"): entry(**usual) for number in range(20)}
    entries["odd", "lesion"] = entry(**usual | odd)
    found = triage(entries, len(entries))
    first = max(found, key=lambda key: found[key].score)
    assert first == ("odd", "lesion")
    assert found[first].score >= NAMED
    assert found[first].reasons[0].startswith(words)


def test_figures_that_are_better_than_usual_do_not_count():
    usual = {"confidence": 0.6, "cam_outside": 0.5}
    entries = {(f"c{number}", "lesion"): entry(**usual) for number in range(20)}
    entries["good", "lesion"] = entry(confidence=0.99, cam_outside=0.0)
    assert triage(entries, len(entries))["good", "lesion"].score == 0


def test_another_place_is_unusual():
    entries = {(f"c{number}", "lesion"): entry() for number in range(20)}
    elsewhere = entry()
    elsewhere.pattern = [0.0] * 511 + [1.0]
    entries["far", "lesion"] = elsewhere
    found = triage(entries, len(entries))["far", "lesion"]
    assert found.reasons == ("the map lies elsewhere than in the other cases",)


def test_a_class_that_few_cases_have_is_unusual():
    entries = {(f"c{number}", "organ"): entry() for number in range(30)}
    for one in entries.values():
        one.label = "organ"
    entries["c3", "lesion"] = entry()
    found = triage(entries, 30)
    assert found["c3", "lesion"].reasons == ("the class is found in 1 of 30 cases",)
    assert found["c3", "lesion"].score > NAMED
    assert found["c3", "organ"].score == 0


def test_cases_without_anything_count_as_cases():
    """As a lesion in a cohort of the healthy."""
    found = triage({("c3", "lesion"): entry()}, 12)
    assert found["c3", "lesion"].reasons == ("the class is found in 1 of 12 cases",)
    assert found["c3", "lesion"].score > 1


def test_lesions_of_a_case_are_compared_with_all_lesions():
    entries = {(f"c{number}", "lesion component 0"): entry() for number in range(20)}
    entries |= {("c0", f"lesion component {number}"): entry() for number in range(1, 4)}
    for (_, label), one in entries.items():
        one.label, one.of_component = label, True
    found = triage(entries, 20)
    assert {one.score for one in found.values()} == {0}


# ------------------------------------------------------------------------------- body and pattern


def test_a_body_is_its_largest_bright_part():
    random = np.random.default_rng(0)
    scan = random.normal(0, 1, (80, 70, 60))
    scan[20:60, 15:55, 10:50] += 30
    scan[35:45, 30:40, 25:35] -= 30  # a hole, such as a lung
    scan[:4, :4] += 60
    body_voxels = body_mask(scan)
    true = np.zeros(scan.shape, dtype=bool)
    true[20:60, 15:55, 10:50] = True
    assert (body_voxels ^ true).sum() < 0.1 * true.sum()
    assert not body_voxels[:4, :4].any()


def test_metal_in_a_body_does_not_hide_it():
    scan = np.random.default_rng(0).normal(0, 1, (40, 40, 40))
    scan[8:32, 8:32, 8:32] += 30
    scan[10:16, 10:16, 10:30] = 3000
    scan[:3, :3] = 3000
    found = body_mask(scan)
    assert found[8:32, 8:32, 8:32].mean() > 0.95
    assert not found[:3, :3].any()


@pytest.mark.parametrize("scan", [np.zeros((8, 8, 8)), np.full((8, 8, 8), np.nan)])
def test_nothing_bright_is_no_body(scan):
    assert body_mask(scan) is None


def test_a_pattern_does_not_depend_on_how_the_scan_is_stored():
    random = np.random.default_rng(0)
    heat, inside = random.random((24, 24, 24)), np.zeros((24, 24, 24), dtype=bool)
    inside[6:18, 6:18, 6:18] = True
    plain = pattern_of(heat, inside, np.eye(4))
    assert plain.shape == (8, 8, 8)
    assert plain.sum() == pytest.approx(1)
    # Each inner cell is two voxels wide, and the first one holds what lies before the body.
    assert plain[1, 1, 1] == pytest.approx(heat[6:8, 6:8, 6:8].sum() / heat.sum())
    assert plain[0].sum() == pytest.approx(heat[:6].sum() / heat.sum())
    turned = pattern_of(
        heat.transpose(2, 0, 1)[:, ::-1], inside.transpose(2, 0, 1)[:, ::-1], TURNED
    )
    assert np.allclose(turned, plain)


#: Axes of the array: superior, left, anterior.
TURNED = np.array([[0, -1, 0, 23], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
