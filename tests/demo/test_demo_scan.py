"""The demo's scan: where its lesion lies, what its files say, and what it needs."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from seg3dcam.demo.scan import (
    DEMO_CONTRAST,
    DEMO_RADIUS_MM,
    HELD_OUT_CENTRE_MM,
    HELD_OUT_DISTANCE_MM,
    LABELS,
    demo_volumes,
    is_held_out,
    plant_lesion,
    truth_labels,
    voxels,
    write_demo_scan,
)
from seg3dcam.errors import MissingExtraError, ScanError

# A turned, sheared, mirrored grid: nothing may depend on axes that happen to be world axes.
OBLIQUE = np.array(
    [
        [-1.2, 0.3, 0.1, 40.0],
        [0.2, 0.9, -0.4, -50.0],
        [0.1, 0.5, 1.4, -60.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
CENTRE_MM = (5.0, -8.0, 4.0)


def places_of(mask: nib.Nifti1Image) -> np.ndarray:
    """World millimetres of every voxel in a mask: (N, 3)."""
    return apply_affine(mask.affine, np.argwhere(voxels(mask) > 0))


@pytest.fixture(scope="module")
def volumes():
    return demo_volumes()


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    return write_demo_scan(tmp_path_factory.mktemp("demo") / "new" / "folder")


@pytest.fixture
def oblique_scan():
    return nib.Nifti1Image(np.full((64, 80, 72), 0.8, dtype=np.float32), OBLIQUE)


class TestPlantLesion:
    """One lesion in a scan."""

    def test_lies_where_stated_in_world_millimetres(self, oblique_scan):
        _, mask = plant_lesion(oblique_scan, CENTRE_MM, 9.0)
        places = places_of(mask)
        assert np.linalg.norm(places.mean(0) - CENTRE_MM) < 2.0
        distances = np.linalg.norm(places - CENTRE_MM, axis=1)
        assert 9.0 * 0.8 < distances.max() < 9.0 * 1.3

    def test_has_the_volume_of_its_radius(self, oblique_scan):
        _, mask = plant_lesion(oblique_scan, CENTRE_MM, 9.0)
        volume = voxels(mask).sum() * abs(np.linalg.det(OBLIQUE[:3, :3]))
        assert volume == pytest.approx(4 / 3 * np.pi * 9.0**3, rel=0.4)

    def test_is_one_piece_without_its_shape_being_a_ball(self, oblique_scan):
        _, mask = plant_lesion(oblique_scan, CENTRE_MM, 9.0)
        distances = np.linalg.norm(places_of(mask) - CENTRE_MM, axis=1)
        inner = np.linalg.norm(
            apply_affine(OBLIQUE, np.argwhere(voxels(mask) == 0)) - CENTRE_MM, axis=1
        ).min()
        assert inner > 9.0 * 0.7  # solid up to here, so in one piece around its centre
        assert distances.max() > inner + 1.0

    @pytest.mark.parametrize("contrast", [-0.4, 0.3])
    def test_is_darker_or_brighter_by_its_contrast(self, oblique_scan, contrast):
        scan, _ = plant_lesion(oblique_scan, CENTRE_MM, 9.0, contrast=contrast)
        i, j, k = np.rint(apply_affine(np.linalg.inv(OBLIQUE), CENTRE_MM)).astype(int)
        assert voxels(scan)[i, j, k] == pytest.approx(0.8 * (1 + contrast), rel=1e-3)
        assert voxels(scan)[0, 0, 0] == np.float32(0.8)

    def test_has_a_soft_edge(self, oblique_scan):
        scan, _ = plant_lesion(oblique_scan, CENTRE_MM, 9.0, contrast=-0.5)
        between = (voxels(scan) > 0.8 * 0.55) & (voxels(scan) < 0.8 * 0.95)
        assert between.sum() > 50

    def test_leaves_the_given_scan_and_its_grid_alone(self, oblique_scan):
        before = voxels(oblique_scan).copy()
        scan, mask = plant_lesion(oblique_scan, CENTRE_MM, 9.0)
        assert np.array_equal(voxels(oblique_scan), before)
        for image in (scan, mask):
            assert image.shape == oblique_scan.shape
            assert np.array_equal(image.affine, OBLIQUE)

    def test_is_the_same_each_time_and_another_with_another_seed(self, oblique_scan):
        first, again, other = (
            plant_lesion(oblique_scan, CENTRE_MM, 9.0, seed=seed) for seed in (1, 1, 2)
        )
        for one, two in zip(first, again, strict=True):
            assert np.array_equal(voxels(one), voxels(two))
        assert not np.array_equal(voxels(first[1]), voxels(other[1]))

    def test_keeps_to_the_tissue(self, oblique_scan):
        tissue = np.ones(oblique_scan.shape, dtype=np.float32)
        tissue[:, :, 36:] = 0
        scan, mask = plant_lesion(oblique_scan, (2.0, 0.0, 8.0), 9.0, tissue=tissue)
        assert 0 < voxels(mask).sum() == voxels(mask)[:, :, :36].sum()
        assert np.all(voxels(scan)[:, :, 36:] == np.float32(0.8))

    def test_may_reach_over_the_edge_of_the_scan(self, oblique_scan):
        corner = apply_affine(OBLIQUE, (0, 0, 0))
        _, mask = plant_lesion(oblique_scan, corner, 9.0)
        assert voxels(mask)[0, 0, 0] == 1

    @pytest.mark.parametrize("centre", [(500.0, 0.0, 0.0), (-500.0, 0.0, 0.0)])
    def test_refuses_a_place_outside_the_scan(self, oblique_scan, centre):
        with pytest.raises(ScanError, match="Choose a centre inside the brain"):
            plant_lesion(oblique_scan, centre, 9.0)


class TestTruthLabels:
    """Labels from tissue maps."""

    def test_lesion_paints_over_tissue(self):
        grey = np.array([0.0, 0.9, 0.1, 0.9, 0.1, 0.5])
        white = np.array([0.0, 0.1, 0.9, 0.1, 0.9, 0.5])
        lesion = np.array([0, 0, 0, 1, 1, 0])
        labels = truth_labels(grey, white, lesion)
        assert labels.tolist() == [0, 1, 2, 3, 3, 0]
        assert labels.dtype == np.uint8


class TestDemoScan:
    """The files that the demo writes."""

    @pytest.mark.parametrize("which", [0, 1])
    def test_affine_is_the_templates(self, demo_files, volumes, which):
        image = nib.load(demo_files[which])
        assert image.shape == volumes.t1.shape
        assert np.array_equal(image.affine, volumes.t1.affine)
        assert np.array_equal(image.get_qform(), volumes.t1.affine)
        assert image.header["qform_code"] == image.header["sform_code"] == 4
        assert image.header.get_xyzt_units()[0] == "mm"

    def test_types(self, demo_files):
        scan, truth = map(nib.load, demo_files)
        assert [path.name for path in demo_files] == ["demo_scan.nii.gz", "demo_truth.nii.gz"]
        assert scan.get_data_dtype() == np.int16
        assert truth.get_data_dtype() == np.uint8

    def test_every_label_is_there_and_lies_in_the_brain(self, demo_files):
        scan, truth = (np.asarray(nib.load(path).dataobj) for path in demo_files)
        assert np.unique(truth).tolist() == sorted(LABELS.values())
        assert scan.min() == 0
        assert (scan[truth > 0] > 0).all()

    def test_tissues_are_the_templates_outside_the_lesion(self, demo_files, volumes):
        scan, truth = (np.asarray(nib.load(path).dataobj) for path in demo_files)
        well = truth != LABELS["lesion"]
        assert np.array_equal((voxels(volumes.grey) > 0.5)[well], (truth == 1)[well])
        assert np.array_equal((voxels(volumes.white) > 0.5)[well], (truth == 2)[well])
        changed = np.abs(scan - 1000 * voxels(volumes.t1)) > 1
        places = apply_affine(volumes.t1.affine, np.argwhere(changed))
        distances = np.linalg.norm(places - HELD_OUT_CENTRE_MM, axis=1)
        assert distances.max() < HELD_OUT_DISTANCE_MM / 2 + 2

    def test_lesion_lies_where_stated(self, demo_files):
        truth = nib.load(demo_files[1])
        lesion = np.asarray(truth.dataobj) == LABELS["lesion"]
        centre = apply_affine(truth.affine, np.argwhere(lesion)).mean(0)
        assert np.linalg.norm(centre - HELD_OUT_CENTRE_MM) < 2.0
        assert lesion.sum() == pytest.approx(4 / 3 * np.pi * DEMO_RADIUS_MM**3, rel=0.4)

    def test_lesion_is_darker_than_around_it(self, demo_files):
        scan, truth = (np.asarray(nib.load(path).dataobj) for path in demo_files)
        ill, well = np.median(scan[truth == LABELS["lesion"]]), np.median(scan[truth == 2])
        assert ill / well == pytest.approx(1 + DEMO_CONTRAST, abs=0.1)

    @pytest.mark.slow
    def test_is_the_same_each_time(self, demo_files, tmp_path):
        for first, again in zip(demo_files, write_demo_scan(tmp_path), strict=True):
            assert np.array_equal(nib.load(first).dataobj, nib.load(again).dataobj)

    def test_its_place_is_held_out(self):
        assert is_held_out(HELD_OUT_CENTRE_MM)
        beside = np.array(HELD_OUT_CENTRE_MM)
        beside[1] += HELD_OUT_DISTANCE_MM - 0.1
        assert is_held_out(beside)
        beside[1] += 0.2
        assert not is_held_out(beside)


def test_without_nilearn_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(MissingExtraError, match=r'pip install "seg3dcam\[demo\]"'):
        write_demo_scan(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
