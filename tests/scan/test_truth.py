"""A class's mask out of a label map, or a refusal that lists the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_phantom import make_phantom

from seg3dcam.errors import InputError, TargetError
from seg3dcam.scan import Scan
from seg3dcam.targets.ground_truth import truth_mask

SOFTMAX = {"class_names": ["background", "liver", "tumour"], "background": True}
SIGMOID = {"class_names": ["liver", "tumour"], "background": False}
ONE = {"class_names": ["tumour"], "background": False}


def mask(values, label=None, index=0, **network):
    return truth_mask(torch.tensor(values), label, class_index=index, **network).tolist()


@pytest.mark.parametrize(
    ("values", "label", "index", "network", "found"),
    [
        ([0, 1, 2], None, 2, SOFTMAX, [0, 0, 1]),
        ([0, 1, 1], None, 2, SOFTMAX, [0, 0, 0]),  # absent from this scan
        ([0, 0, 0], None, 2, SOFTMAX, [0, 0, 0]),
        ([0, 255, 7], 255, 2, SOFTMAX, [0, 1, 0]),
        ([0, 0, 0], 255, 2, SOFTMAX, [0, 0, 0]),
        ([0, 1, 1], None, 0, ONE, [0, 1, 1]),
        ([0, 4, 1], 4, 0, SIGMOID, [0, 1, 0]),
    ],
)
def test_mask(values, label, index, network, found):
    assert mask(values, label, index, **network) == [bool(v) for v in found]


@pytest.mark.parametrize(
    ("values", "label", "index", "network", "said"),
    [
        ([0, 255], None, 1, SOFTMAX, r"label 255, and the network has the classes 0 to 2"),
        ([0, 1, 2, 9], None, 1, SOFTMAX, "labels 1, 2, 9"),
        ([0, 1, 2], 3, 1, SOFTMAX, "labels 1, 2, and none of them is 3"),
        ([0, 1], None, 1, SIGMOID, "channels of a sigmoid output are no labels"),
        ([0, 2], None, 0, ONE, "label 2"),
    ],
)
def test_labels_of_another_scheme(values, label, index, network, said):
    with pytest.raises(TargetError, match=said) as refused:
        mask(values, label, index, **network)
    assert "Say with label" in str(refused.value)


@pytest.fixture(scope="module")
def phantom():
    return make_phantom()


def labels(phantom, values, affine=None):
    return Scan(values[None].float(), phantom.affine if affine is None else affine, "truth")


def test_with_truth(phantom):
    with_truth = phantom.with_truth(labels(phantom, phantom.truth * 5), 5)
    assert torch.equal(with_truth.truth, phantom.truth)


def test_one_fraction_in_a_truth_is_refused(phantom):
    """Also far from the class: the map was interpolated, and no class is where it seems to be."""
    blurred = phantom.truth.float()
    blurred[0, 0, 0] = 0.5
    for label in (None, 1):
        with pytest.raises(TargetError, match=r"1 values .*no whole numbers, such as 0\.5"):
            phantom.with_truth(labels(phantom, blurred), label)


def test_truth_on_another_grid(phantom):
    shifted = phantom.affine + np.array([[0, 0, 0, 1.0], *[[0, 0, 0, 0]] * 3])
    with pytest.raises(TargetError, match="lies elsewhere in the patient"):
        phantom.with_truth(labels(phantom, phantom.truth, shifted))
    with pytest.raises(TargetError, match="must lie on the same grid"):
        phantom.with_truth(labels(phantom, phantom.truth[1:]))


def test_rounding_of_other_programs_is_accepted(phantom):
    rounded = phantom.affine.astype(np.float32).astype(np.float64)
    assert phantom.with_truth(labels(phantom, phantom.truth, rounded)).truth.any()


def test_a_target_about_no_class_has_no_truth(phantom):
    about_none = replace(phantom, class_index=None)
    with pytest.raises(TargetError, match="about no class"):
        about_none.with_truth(labels(phantom, phantom.truth))


@pytest.mark.parametrize("what", ["map of model.1", "prediction", "truth"])
def test_an_explanation_on_another_grid_than_its_scan(phantom, what):
    crop = {
        "map of model.1": {"maps": {"model.1": phantom.maps["model.1"][:-1]}},
        "prediction": {"prediction": phantom.prediction[:, :-1]},
        "truth": {"truth": phantom.truth[..., None]},
    }
    with pytest.raises(InputError, match=f"{what}: .* but the scan has"):
        replace(phantom, **crop[what])
