"""Two cohorts compared: what is equal, what differs, and by a paired test."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from helpers_cases import BIASES, GAINS, voxels, write_model, write_scan
from scipy import stats

from seg3dcam import cohort
from seg3dcam.cohort.comparing import _correlation, _overlap, compare_cohorts
from seg3dcam.errors import ConfigError

pytestmark = pytest.mark.slow

NAMES = [f"case{number}" for number in range(8)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Cohorts of a model, and of one that calls less a lesion; one scan has a much smaller one."""
    root = tmp_path_factory.mktemp("two")
    scans = root / "scans"
    scans.mkdir()
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        # Where it is less bright the second model draws less of it.
        dim = random.uniform(0, 0.1, voxels().shape) if number != 3 else 0.22
        write_scan(scans / f"{name}.nii.gz", (voxels() - dim).astype(np.float32))
    write_model(root / "a")
    write_model(root / "b", gains=GAINS, biases=[BIASES[0], BIASES[1], BIASES[2] - 5])
    made = {}
    for which in "ab":
        made[which] = cohort.run(
            scans,
            model=str(root / which / "model.yaml"),
            out=root / f"out_{which}",
            target=["organ", "lesion"],
            format=["nifti"],
        )
        assert not made[which].failed, made[which].failed
    return made["a"].out, made["b"].out


def test_a_cohort_is_like_itself(two):
    found = compare_cohorts(two[0], two[0])
    assert len(found.pairs) == 2 * len(NAMES)
    for pair in found.pairs:
        assert pair.mask_dice == 1
        assert pair.map_overlap == pytest.approx(1)
        assert pair.map_correlation == pytest.approx(1)
        assert pair.peaks_apart_mm == 0
        assert pair.differs == pytest.approx(0, abs=1e-6)
    assert {test.p_value for test in found.tests} == {1.0}


def test_what_differs_most_comes_first(two, tmp_path):
    found = compare_cohorts(*two, out=tmp_path)
    assert (found.pairs[0].case, found.pairs[0].label) == ("case3", "lesion")
    differs = [pair.differs for pair in found.pairs]
    assert differs == sorted(differs, reverse=True)
    lesions = [test for test in found.tests if test.label == "lesion"]
    volume = next(test for test in lesions if test.figure == "volume, ml")
    assert volume.pairs >= 7
    assert volume.median_change < 0
    assert volume.p_value < 0.05
    assert volume.p_holm >= volume.p_value
    with (tmp_path / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [pair.case for pair in found.pairs]
    assert (tmp_path / "tests.csv").stat().st_size > 100


def test_both_ways_differ_by_sign_alone(two):
    there, back = compare_cohorts(*two), compare_cohorts(*reversed(two))
    for one, other in zip(there.tests, back.tests, strict=True):
        assert one.median_change == pytest.approx(-other.median_change)
        assert one.p_value == pytest.approx(other.p_value)


def test_cases_that_one_alone_has_are_named(two, tmp_path):
    import shutil

    part = tmp_path / "part"
    shutil.copytree(two[0], part)
    shutil.rmtree(part / "case5")
    found = compare_cohorts(part, two[1])
    assert found.only_b == ("case5",)
    assert found.only_a == ()
    assert "case5" not in {pair.case for pair in found.pairs}


def test_volumes_that_are_gone_are_said(two, tmp_path):
    import shutil

    part = tmp_path / "part"
    shutil.copytree(two[0], part)
    (part / "case1" / "cam_lesion.nii.gz").unlink()
    found = compare_cohorts(part, two[1])
    pair = next(one for one in found.pairs if (one.case, one.label) == ("case1", "lesion"))
    assert "gone" in pair.note
    assert np.isnan(pair.differs)
    assert found.pairs[-1] is pair


def test_bad_folders(two, tmp_path):
    with pytest.raises(ConfigError, match="holds no cohort"):
        compare_cohorts(two[0], tmp_path)


def test_figures_are_those_of_slow_references():
    random = np.random.default_rng(0)
    one, other = (random.random((5, 6, 7)).astype(np.float32) for _ in range(2))
    slow = sum(
        min(a / one.sum(dtype=float), b / other.sum(dtype=float))
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)
    )
    assert _overlap(one, other) == pytest.approx(slow, abs=1e-6)
    assert _correlation(one, other) == pytest.approx(
        stats.pearsonr(one.ravel(), other.ravel()).statistic, abs=1e-6
    )
    assert _overlap(one, np.zeros_like(one)) == 0
    assert _correlation(one, np.zeros_like(one)) is None
