"""A small image of SimpleITK, and what SimpleITK reads of a file."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own convention)
from scipy.spatial.transform import Rotation

VOXEL = (3, 1, 2)
TURN = Rotation.from_euler("xyz", [20, -35, 70], degrees=True).as_matrix()


def itk_image(rng, dtype="int16", shape=(5, 4, 6)):
    """An image with a turned grid; its array is z, y, x."""
    image = sitk.GetImageFromArray(rng.integers(0, 90, shape[::-1]).astype(dtype))
    image.SetSpacing((0.7, 1.5, 3.0))
    image.SetOrigin((-10.0, 22.0, 35.5))
    image.SetDirection(TURN.ravel().tolist())
    return image


def ras_of(image, voxel=VOXEL):
    x, y, z = image.TransformIndexToPhysicalPoint(voxel)
    return (-x, -y, z)


def place_of(scan, voxel=VOXEL):
    return (scan.affine @ [*voxel, 1])[:3]


def check_equals_itk(scan, path):
    image = sitk.ReadImage(str(path))
    expected = sitk.GetArrayFromImage(image).T.astype(np.float32)
    np.testing.assert_array_equal(scan.data[0].numpy(), expected)
    np.testing.assert_allclose(place_of(scan), ras_of(image), atol=1e-6)
    np.testing.assert_allclose(scan.spacing, image.GetSpacing(), rtol=1e-9)
