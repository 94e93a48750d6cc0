"""Entropy, mutual information and pairwise Dice beside slow float64 references."""

from __future__ import annotations

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from seg3dcam import SegModel, load_scan
from seg3dcam.errors import ConfigError
from seg3dcam.explaining.explain import explain_each
from seg3dcam.explaining.lesions import lesions_of
from seg3dcam.explaining.uncertainty import uncertainty
from seg3dcam.network.ensemble import Ensemble
from seg3dcam.targets import EveryComponent
from seg3dcam.windows import WindowPlan

SHAPE = (10, 9, 8)
NAMES = ["none", "organ", "lesion"]


def network(seed, classes=3, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout3d(dropout)]
    made = nn.Sequential(*layers, nn.Conv3d(4, classes, 3, padding=1))
    with torch.no_grad():
        made[-1].weight *= 6
    return made.eval()


@pytest.fixture
def scan():
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    return load_scan(voxels, affine=np.diag([1, 2, 3, 1]))


def probabilities(members, scan, activation):
    """Return the probabilities of members, each a function (1, 1, *S) -> (1, K, *S), in float64."""
    x = scan.data[None].double()
    logits = torch.stack([member(x)[0] for member in members])
    return (logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)).numpy()


def entropy(p, activation):
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.nan_to_num(-p * np.log(p))
        other = np.nan_to_num(-(1 - p) * np.log(1 - p))
    if activation == "sigmoid":
        return (own + other).mean(0) / np.log(2)
    return own.sum(0) / np.log(len(p))


def dice(one, other):
    size = one.sum() + other.sum()
    return 2 * (one & other).sum() / size if size else 1.0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_figures_of_folds_are_those_of_the_definition(scan, activation):
    folds = [network(seed) for seed in range(3)]
    model = SegModel(Ensemble(folds), class_names=NAMES, activation=activation)
    found = uncertainty(scan, model)
    with torch.no_grad():
        p = probabilities([fold.double() for fold in folds], scan, activation)
    mean = p.mean(0)
    expected = entropy(mean, activation)
    shared = expected - np.mean([entropy(one, activation) for one in p], axis=0)
    assert found.members == 3
    assert np.allclose(found.entropy.numpy(), expected, atol=1e-5)
    assert np.allclose(found.mutual_information.numpy(), shared, atol=1e-5)
    assert shared.max() > 0.1
    masks = (
        p > 0.5
        if activation == "sigmoid"
        else p.argmax(1)[:, None] == np.arange(3)[:, None, None, None]
    )
    for index, name in enumerate(NAMES):
        pairs = [dice(a[index], b[index]) for a, b in itertools.combinations(masks, 2)]
        assert found.pairwise_dice[name] == pytest.approx(np.mean(pairs), abs=1e-6)
    drawn = mean[2] > 0.5 if activation == "sigmoid" else mean.argmax(0) == 2
    assert found.mean_entropy["lesion"] == pytest.approx(expected[drawn].mean(), abs=1e-5)


class Drawn(nn.Module):
    """A member that draws boxes: its logits are +3 inside and -3 outside of them."""

    def __init__(self, *boxes):
        super().__init__()
        self.logits = torch.full((1, 1, 12, 10, 8), -3.0)
        for box in boxes:
            self.logits[(0, 0, *(slice(*ends) for ends in box))] = 3.0

    def forward(self, x):
        return self.logits + 0 * x


def test_lesions_are_measured_one_by_one():
    """Three members; of the large lesion one draws half, of the small one another draws nothing."""
    large, half = ((1, 5), (1, 5), (1, 5)), ((1, 5), (1, 5), (1, 3))
    small, apart = ((8, 10), (6, 8), (5, 7)), ((1, 2), (8, 9), (0, 1))
    folds = [Drawn(large, small), Drawn(large, small, apart), Drawn(half)]
    affine = np.array([[-2, 0, 0, 10], [0, 1, 0, 0], [0, 0, 3, -5], [0, 0, 0, 1.0]])
    scan = load_scan(np.arange(960.0).reshape(12, 10, 8), affine=affine)
    model = SegModel(Ensemble(folds), class_names=["lesion"], activation="sigmoid")
    first, second = uncertainty(scan, model).lesions
    assert (first.class_name, first.rank, second.rank) == ("lesion", 0, 1)
    assert first.centre_mm == pytest.approx((10 - 2 * 2.5, 2.5, 3 * 2.5 - 5))
    assert second.centre_mm == pytest.approx((10 - 2 * 8.5, 6.5, 3 * 5.5 - 5))
    assert (first.ml, second.ml) == pytest.approx((64 * 6 / 1000, 8 * 6 / 1000))
    assert (first.drawn_by, second.drawn_by) == (3, 2)
    # Dice of whole and half is 2/3; of something and nothing 0; two that draw nothing do not count.
    assert first.pairwise_dice == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert second.pairwise_dice == pytest.approx((1 + 0 + 0) / 3)
    p = np.stack([1 / (1 + np.exp(-fold.logits[0, 0].double().numpy())) for fold in folds])
    mean = p.mean(0)
    h = entropy(mean[None], "sigmoid")
    shared = h - np.mean([entropy(one[None], "sigmoid") for one in p], axis=0)
    where = (slice(1, 5), slice(1, 5), slice(1, 5))
    assert first.mean_entropy == pytest.approx(h[where].mean(), abs=1e-5)
    assert first.mutual_information == pytest.approx(shared[where].mean(), abs=1e-5)
    # What belongs to the lesion: itself, and three voxels around it that are not drawn.
    near = mean[0:8, 0:8, 0:8] * (mean[0:8, 0:8, 0:8] <= 0.5)
    expected = 2 * mean[where].sum() / (mean[where].sum() + near.sum() + 64)
    assert first.confidence == pytest.approx(expected, abs=1e-5)


def test_members_that_draw_nothing_do_not_agree_about_a_lesion():
    """One sure member of three is enough for the mean; the other two have no Dice of 1."""
    box, empty = ((8, 10), (6, 8), (5, 7)), Drawn()
    sure = Drawn(box)
    sure.logits *= 30
    empty.logits /= 30
    scan = load_scan(np.arange(960.0).reshape(12, 10, 8), affine=np.eye(4))
    model = SegModel(Ensemble([sure, empty, empty]), class_names=["lesion"], activation="sigmoid")
    (lesion,) = uncertainty(scan, model).lesions
    assert (lesion.drawn_by, lesion.pairwise_dice) == (1, 0.0)


def test_lesions_are_those_of_a_slow_reference():
    """Of random masks with many parts, each found again by labelling and counting alone."""
    random = np.random.default_rng(3)
    noise = ndimage.gaussian_filter(random.normal(size=(5, 14, 12, 10)), (0, 1, 1, 1))
    drawn = noise[:4] + noise[4] > 0.05
    members, affine = list(map(torch.from_numpy, drawn)), np.diag([2.0, 1.0, 3.0, 1.0])
    mean = torch.from_numpy(drawn.mean(0)).float()
    entropy, shared = torch.rand(2, *mean.shape)
    found = lesions_of("a", mean, mean > 0.5, members, entropy, shared, affine)
    parts, count = ndimage.label(mean.numpy() > 0.5)
    lesions = sorted((parts == part for part in range(1, count + 1)), key=lambda x: -x.sum())
    assert len(found) == count > 5
    assert {one.drawn_by for one in found} > {4}
    for one, lesion in zip(found, lesions, strict=True):
        own = []
        for mask in drawn:
            labels = ndimage.label(mask)[0]
            own.append(np.isin(labels, np.setdiff1d(labels[lesion], 0)))
        pairs = [(a, b) for a, b in itertools.combinations(own, 2) if a.any() or b.any()]
        assert one.drawn_by == sum(mask.any() for mask in own)
        assert one.pairwise_dice == pytest.approx(np.mean([dice(a, b) for a, b in pairs]))
        assert one.mean_entropy == pytest.approx(entropy.numpy()[lesion].mean(), abs=1e-6)
        assert one.mutual_information == pytest.approx(shared.numpy()[lesion].mean(), abs=1e-6)
        assert one.centre_mm == pytest.approx(np.argwhere(lesion).mean(0) * [2, 1, 3])
        assert one.ml == pytest.approx(lesion.sum() * 6 / 1000)


def test_a_lesion_has_the_confidence_that_its_explanation_has(scan):
    model = SegModel(network(0), class_names=NAMES)
    lesions = [one for one in uncertainty(scan, model).lesions if one.class_name == "lesion"]
    explained = explain_each(scan, model, [EveryComponent(2)], layers="0")
    found = [explanation.confidence for explanation in explained]
    assert len(found) == len(lesions) > 1
    assert [one.confidence for one in lesions] == pytest.approx(found, abs=1e-6)


def test_the_background_has_no_lesions(scan):
    found = uncertainty(scan, SegModel(network(0), class_names=NAMES))
    assert {one.class_name for one in found.lesions} == {"organ", "lesion"}


def test_flips_are_members(scan):
    own = network(0)
    found = uncertainty(scan, SegModel(own, class_names=NAMES), flips=(0, 2))
    twin = network(0).double()

    def flipped(axes):
        return lambda x: twin(x.flip(axes)).flip(axes) if axes else twin(x)

    with torch.no_grad():
        members = [flipped(axes) for axes in ([], [2], [4], [2, 4])]
        p = probabilities(members, scan, "softmax")
    assert found.members == 4
    assert np.allclose(found.entropy.numpy(), entropy(p.mean(0), "softmax"), atol=1e-5)


def test_members_that_agree_share_no_information(scan):
    found = uncertainty(scan, SegModel(Ensemble([network(0), network(0)]), class_names=NAMES))
    assert found.mutual_information.max() < 1e-6
    assert set(found.pairwise_dice.values()) == {1.0}
    assert found.entropy.max() > 0.5


def test_one_member_has_entropy_alone(scan, tmp_path):
    found = uncertainty(scan, SegModel(network(0), class_names=NAMES))
    assert found.members == 1
    assert found.mutual_information is None
    assert found.pairwise_dice == {}
    (tmp_path / "mutual_information.nii.gz").write_bytes(b"of an earlier run with more members")
    file, figures = found.save(tmp_path)
    assert sorted(tmp_path.iterdir()) == [file, figures]
    lesions = json.loads(figures.read_text(encoding="utf-8"))["lesions"]
    assert [lesion["rank"] for lesion in lesions] == [lesion.rank for lesion in found.lesions]
    assert lesions[0]["pairwise_dice"] is lesions[0]["mutual_information"] is None
    image = nib.load(file)
    assert np.allclose(image.affine, scan.affine)
    assert np.allclose(image.get_fdata(), found.entropy.numpy(), atol=1e-6)


def test_dropout_is_switched_on_and_off_again(scan):
    own = network(0, dropout=0.5)
    before = torch.get_rng_state()
    model = SegModel(own, class_names=NAMES)
    one, same, other = (uncertainty(scan, model, dropout=6, seed=seed) for seed in (0, 0, 1))
    assert one.members == 6
    assert one.mutual_information.max() > 0.05
    assert torch.equal(one.entropy, same.entropy)
    assert not torch.equal(one.entropy, other.entropy)
    assert not own.training
    assert not any(module._forward_hooks for module in own.modules())
    assert torch.equal(torch.get_rng_state(), before)
    plain = uncertainty(scan, model)
    assert plain.members == 1
    x = scan.data[None]
    with torch.no_grad():
        assert np.allclose(
            plain.entropy.numpy(), entropy(own(x)[0].softmax(0).numpy(), "softmax"), atol=1e-5
        )


def test_windows_are_blended_as_in_a_prediction(scan):
    own = network(0)
    windowed = SegModel(own, class_names=NAMES, window=WindowPlan(6, overlap=0.5))
    found = uncertainty(scan, windowed)
    from seg3dcam.evaluate.rerun import Rerun

    logits = Rerun(own, scan.data[None], sliding_window=windowed.window).logits[0]
    expected = entropy(logits.double().softmax(0).numpy(), "softmax")
    assert np.allclose(found.entropy.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flips": [3]}, "legal are the axes 0, 1 and 2"),
        ({"dropout": 5}, "no dropout layer"),
        ({"dropout": -1}, "dropout"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_input(scan, settings, words):
    with pytest.raises(ConfigError, match=words):
        uncertainty(scan, SegModel(network(0), class_names=NAMES), **settings)
