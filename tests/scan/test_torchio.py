"""TorchIO's images and subjects: the scan that their files give, and the same place."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from seg3dcam import SegModel, explain, load_scan
from seg3dcam.errors import ScanError
from seg3dcam.targets import ClassLogit

tio = pytest.importorskip("torchio")

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([-0.9, 1.1, 2.4]), [12.0, -30.0, 55.0]
)


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).random((9, 10, 11)).astype(np.float32)
    data[3, 7, 5] = 9
    path = tmp_path / "t1.nii.gz"
    nib.save(nib.Nifti1Image(data, OBLIQUE), path)
    return path


def test_an_image_is_the_scan_of_its_file(file):
    own, of_file = load_scan(tio.ScalarImage(file)), load_scan(file)
    assert torch.equal(own.data, of_file.data)
    assert np.allclose(own.affine, of_file.affine, atol=1e-9)


def test_a_subjects_images_are_channels_and_its_labels_are_not(file):
    image = tio.ScalarImage(file)
    other = tio.ScalarImage(tensor=image.data * 2, affine=image.affine)
    label = tio.LabelMap(tensor=image.data > 5, affine=image.affine)
    scan = load_scan(tio.Subject(t1=image, truth=label, t2=other, age=50))
    assert torch.equal(scan.data, torch.cat([image.data, image.data * 2]))
    assert np.allclose(scan.affine, OBLIQUE, atol=1e-6)


def test_a_cue_lies_right_after_transforms(file):
    """Of a subject that was turned and resampled, the transformed image is explained."""
    subject = tio.Compose([tio.ToCanonical(), tio.Resample(0.8)])(
        tio.Subject(t1=tio.ScalarImage(file))
    )
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU())
    with torch.no_grad():
        network[0].weight.fill_(1)
        network[0].bias.fill_(0)
    found = explain(subject, SegModel(network), ClassLogit(1, "volume"), layers="0")
    _, position = found.peak()
    place = nib.affines.apply_affine(OBLIQUE, (3, 7, 5))
    assert np.linalg.norm(np.subtract(position, place)) < 0.8
    back = tio.ScalarImage(tensor=found.volume()[None], affine=found.affine)
    assert back.spatial_shape == subject.t1.spatial_shape
    on_scan = tio.Resample(tio.ScalarImage(file))(back).data[0].numpy()
    assert np.unravel_index(on_scan.argmax(), on_scan.shape) == (3, 7, 5)


def test_what_is_no_scan_is_refused(file):
    image = tio.ScalarImage(file)
    label = tio.LabelMap(tensor=image.data > 5, affine=image.affine)
    with pytest.raises(ScanError, match="no ScalarImage to be explained, only label maps: truth"):
        load_scan(tio.Subject(truth=label))
    with pytest.raises(ScanError, match="only label maps"):
        load_scan(label)
    moved = tio.ScalarImage(tensor=image.data, affine=image.affine @ np.diag([1, 1, 1.1, 1]))
    with pytest.raises(ScanError, match=r"images a \(9, 10, 11\) and b .* on different grids"):
        load_scan(tio.Subject(a=image, b=moved))
