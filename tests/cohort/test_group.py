"""Maps of a group: means, peaks and z-values beside slow references, in one space."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest
from helpers_cases import OBLIQUE, voxels, write_model, write_scan

from seg3dcam import cohort
from seg3dcam.cohort.group import FEWEST, group_map
from seg3dcam.errors import ConfigError
from seg3dcam.job.record import read_record

pytestmark = pytest.mark.slow

NAMES = [f"case{number:02d}" for number in range(10)]
SHIFT = np.eye(4)
SHIFT[:3, 3] = 31, -12, 7


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """Ten cases, one of them brighter at one side; each scan lies elsewhere in a second cohort."""
    root = tmp_path_factory.mktemp("group")
    write_model(root)
    random = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        array = voxels() + random.normal(0, 0.02, voxels().shape)
        if number == 4:
            array[8:14, 10:16, 6:9] += 1.5
        for which, affine in (("near", OBLIQUE), ("far", SHIFT @ OBLIQUE)):
            (root / which).mkdir(exist_ok=True)
            write_scan(root / which / f"{name}.nii.gz", array.astype(np.float32), affine)
    made = {
        which: cohort.run(
            root / which,
            model=str(root / "model.yaml"),
            out=root / f"out_{which}",
            target="lesion",
            format=["nifti"],
        )
        for which in ("near", "far")
    }
    return {which: one.out for which, one in made.items()}


def cams(out):
    return np.stack([nib.load(out / name / "cam_lesion.nii.gz").get_fdata() for name in NAMES])


def test_mean_and_z_are_those_of_the_definition(explained, tmp_path):
    found = group_map(explained["near"], "lesion", out=tmp_path, z=["case04", "case00"])
    assert found.cases == tuple(NAMES)
    assert found.left_out == {}
    every = cams(explained["near"])
    mean = nib.load(found.mean)
    assert np.allclose(mean.get_fdata(), every.mean(0), atol=1e-6)
    assert np.allclose(mean.affine, OBLIQUE, atol=1e-4)
    assert (nib.load(found.seen).get_fdata() == len(NAMES)).all()
    others = np.delete(every, 4, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slow = (every[4] - others.mean(0)) / others.std(0, ddof=1)
    z = nib.load(found.z["case04"]).get_fdata()
    known = np.isfinite(z)
    assert known.any()
    assert np.allclose(z[known], slow[known], rtol=1e-3, atol=1e-3)
    assert not np.isfinite(slow[~known & (others.std(0) > 1e-3)]).any()
    usual = nib.load(found.z["case00"]).get_fdata()
    assert np.nanmax(np.abs(z)) > 3 * np.nanmedian(np.abs(usual))


def test_peaks_are_counted_within_a_radius(explained, tmp_path):
    found = group_map(explained["near"], "lesion", out=tmp_path, radius_mm=4)
    part = nib.load(found.peaks).get_fdata()
    peaks = [
        read_record(explained["near"] / name).explanations[0].found["peak_mm"] for name in NAMES
    ]
    places = nib.affines.apply_affine(OBLIQUE, np.moveaxis(np.indices(part.shape), 0, -1))
    slow = np.mean([np.linalg.norm(places - peak, axis=-1) <= 4 for peak in peaks], axis=0)
    assert np.allclose(part, slow, atol=1e-6)
    assert part.max() > 0


def write_transforms(folder, out, names=NAMES):
    matrix = folder / "to_space.txt"
    np.savetxt(matrix, np.linalg.inv(SHIFT))
    table = folder / "transforms.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "transform"])
        writer.writerows([name, matrix.name] for name in names)
    return table


def test_given_transforms_lead_to_the_same_map(explained, tmp_path):
    space = explained["near"] / "case00" / "cam_lesion.nii.gz"
    near = group_map(explained["near"], "lesion", out=tmp_path / "near", space=space)
    far = group_map(
        explained["far"],
        "lesion",
        out=tmp_path / "far",
        space=space,
        transforms=write_transforms(tmp_path, explained["far"]),
    )
    for one, other in ((near.mean, far.mean), (near.peaks, far.peaks)):
        first, second = nib.load(one).get_fdata(), nib.load(other).get_fdata()
        # The outermost voxels may fall outside by rounding.
        inner = np.s_[1:-1, 1:-1, 1:-1]
        assert np.abs(first - second)[inner].max() < 2e-3


def test_scans_that_lie_elsewhere_are_refused(explained, tmp_path):
    away = np.array(OBLIQUE)
    away[:3, 3] += 500
    nib.save(nib.Nifti1Image(voxels(), away), tmp_path / "space.nii.gz")
    with pytest.raises(ConfigError, match="lies somewhere else"):
        group_map(
            explained["near"], "lesion", out=tmp_path / "out", space=tmp_path / "space.nii.gz"
        )
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "lesoin"}, "did you mean 'lesion'"),
        ({"z": ["case99"]}, "no such case"),
        ({"radius_mm": 0}, "radius_mm"),
        ({"space": "none.nii.gz"}, "none.nii.gz"),
        ({"transforms": "none.csv"}, "none.csv"),
    ],
)
def test_bad_input(explained, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        group_map(explained["near"], **({"target": "lesion", "out": tmp_path} | settings))


def test_a_case_without_a_transform_is_an_error(explained, tmp_path):
    table = write_transforms(tmp_path, explained["far"], NAMES[1:])
    with pytest.raises(ConfigError, match="no transform for case00"):
        group_map(explained["far"], "lesion", out=tmp_path / "out", transforms=table)


def test_fewer_cases_than_z_needs_give_none(explained, tmp_path):
    import shutil

    few = tmp_path / "few"
    shutil.copytree(explained["near"], few)
    for name in NAMES[FEWEST:]:  # seven others are left
        shutil.rmtree(few / name)
    found = group_map(few, "lesion", z=[NAMES[0]])
    assert found.mean.parent == few / "group"
    assert np.isnan(nib.load(found.z[NAMES[0]]).get_fdata()).all()
