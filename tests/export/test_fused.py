"""The fused picture volume: every voxel's colour, in its place, and grey where there is no heat."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (its own convention)
import torch
from helpers_phantom import (
    BODY,
    against_mm,
    make_phantom,
    make_signed_phantom,
    marker_mm,
    offset_mm,
    silent,
)

from seg3dcam.errors import InputError, OutputError
from seg3dcam.export import write_fused
from seg3dcam.review.look import Look, choose_window, colours
from seg3dcam.scan import Scan

LOOK = Look(window="soft tissue", threshold=0.3, opacity=0.4, colormap="viridis")


@pytest.fixture(scope="module")
def phantom():
    return make_phantom("PIR", layers=("model.1", "model.2"))


def read(path):
    image = nib.load(path)
    rgb = np.asanyarray(image.dataobj)
    assert image.header["datatype"] == 128
    return np.stack([rgb[part] for part in "RGB"], -1), image.affine


def expected(explanation, look, layer=None):
    """Voxel by voxel in float64, from the meaning of `Look`."""
    low, high, _ = choose_window(explanation.scan.data[0].numpy(), look.window)
    grey = np.clip((explanation.scan.data[0].double().numpy() - low) / (high - low), 0, 1) * 255
    if look.signed:
        cam = explanation.volume(layer, scale="signed").double().numpy()
        heat = colours(look.colormap)[np.round((cam + 1) / 2 * 255).astype(int)]
    else:
        cam = explanation.volume(layer).double().numpy()
        heat = colours(look.colormap)[np.round(cam * 255).astype(int)]
    strength = np.abs(cam)
    alpha = np.where(strength < look.threshold, 0, look.opacity * np.minimum(1, strength / 0.5))
    return grey[..., None] * (1 - alpha[..., None]) + heat * alpha[..., None]


@pytest.mark.parametrize("layer", [None, "model.2"])
@pytest.mark.parametrize("name", ["fused.nii", "fused.nii.gz"])
def test_every_voxel(tmp_path, phantom, layer, name, monkeypatch):
    monkeypatch.setattr("seg3dcam.files.writers.volumes._SLAB_BYTES", 4 * 28 * 81 * 5)
    found, affine = read(write_fused(tmp_path / name, phantom, LOOK, layer))
    assert np.abs(found - expected(phantom, LOOK, layer)).max() <= 0.501  # rounded
    np.testing.assert_allclose(affine, phantom.affine, atol=1e-4)


def test_every_voxel_of_a_signed_picture(tmp_path):
    phantom, look = make_signed_phantom("PIR"), Look(threshold=0.3, opacity=0.8, signed=True)
    found, affine = read(write_fused(tmp_path / "a.nii.gz", phantom, look))
    # float32 and float64 may round a level to different sides, one of 255.
    assert np.abs(found - expected(phantom, look)).max() <= 3
    red, _, blue = np.moveaxis(found.astype(float), -1, 0)
    marker = marker_mm(phantom.affine, phantom.scan.shape)
    for heat, place in ((np.maximum(blue - red, 0), against_mm(phantom)), (red - blue, marker)):
        assert offset_mm(np.maximum(heat, 0), affine, place) < min(phantom.scan.spacing) / 2
    silent_place = phantom.maps["model.1"].numpy() == 0
    assert (np.ptp(found[silent_place], axis=-1) == 0).all()


def test_layers_differ(tmp_path, phantom):
    one, other = (
        read(write_fused(tmp_path / "a.nii", phantom, LOOK, layer))[0] for layer in phantom.maps
    )
    assert (one != other).any()


def test_the_heat_is_on_the_marker(tmp_path, phantom):
    found, affine = read(write_fused(tmp_path / "a.nii.gz", phantom, LOOK))
    coloured = np.ptp(found.astype(int), axis=-1).astype(float)
    marker = marker_mm(phantom.affine, phantom.scan.shape)
    assert offset_mm(coloured, affine, marker) < min(phantom.scan.spacing) / 2


def test_itk_reads_the_same(tmp_path, phantom):
    path = write_fused(tmp_path / "a.nii.gz", phantom, LOOK)
    image = sitk.ReadImage(str(path))
    assert image.GetPixelIDTypeAsString() == "vector of 8-bit unsigned integer"
    found = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3)
    np.testing.assert_array_equal(found, read(path)[0])
    voxel = phantom.peak()[0]
    lps = image.TransformIndexToPhysicalPoint([int(i) for i in voxel])
    np.testing.assert_allclose(lps * np.array([-1, -1, 1]), phantom.peak()[1], atol=1e-3)


def test_no_heat_below_the_threshold(tmp_path, phantom):
    found, _ = read(write_fused(tmp_path / "a.nii", phantom, LOOK))
    cold = phantom.volume().numpy() < LOOK.threshold
    assert (np.ptp(found[cold].astype(int), axis=-1) == 0).all()
    assert (np.ptp(found[~cold].astype(int), axis=-1) > 0).mean() > 0.9
    body = cold & (phantom.scan.data[0].numpy() == BODY)
    assert set(found[body].ravel()) == {128}  # in the middle of the window


@pytest.mark.parametrize("status", ["zero", "nonfinite", "degenerate"])
def test_without_heat_the_scan_stays_grey(tmp_path, phantom, status):
    found, _ = read(write_fused(tmp_path / "a.nii", silent(phantom, status), LOOK))
    assert (np.ptp(found.astype(int), axis=-1) == 0).all()
    assert len(np.unique(found)) > 2


@pytest.mark.parametrize("scan", ["constant", "two slices", "two channels"])
def test_unusual_scans(tmp_path, phantom, scan):
    short = replace(
        phantom,
        scan=Scan(phantom.scan.data[..., :2], phantom.affine, ""),
        maps={name: values[..., :2] for name, values in phantom.maps.items()},
        prediction=phantom.prediction[..., :2],
        truth=None,
    )
    unusual = {
        "constant": replace(
            phantom, scan=Scan(torch.full_like(phantom.scan.data, 7), phantom.affine, "")
        ),
        "two slices": short,
        "two channels": replace(
            phantom,
            scan=Scan(torch.cat([phantom.scan.data, phantom.scan.data * 0]), phantom.affine, ""),
        ),
    }[scan]
    look = Look()
    found, _ = read(write_fused(tmp_path / "a.nii", unusual, look))
    assert np.abs(found - expected(unusual, look)).max() <= 0.501


def test_the_scans_name_is_not_in_the_file(tmp_path, phantom):
    header = nib.Nifti1Header()
    header.set_data_shape(phantom.scan.shape)
    header.set_sform(phantom.affine, 1)
    header["descrip"] = header["db_name"] = b"DOE^JANE"
    scan = replace(phantom.scan, name="DOE_JANE", header=header)
    path = write_fused(tmp_path / "a.nii", replace(phantom, scan=scan), LOOK)
    assert b"DOE" not in path.read_bytes()


def test_what_cannot_be_written(tmp_path, phantom):
    with pytest.raises(OutputError, match=r"Legal for NIfTI"):
        write_fused(tmp_path / "a.nrrd", phantom)
    with pytest.raises(InputError, match=r"no map of layer 'model\.9'"):
        write_fused(tmp_path / "a.nii", phantom, LOOK, "model.9")
    assert not list(tmp_path.iterdir())
