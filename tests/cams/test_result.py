"""The views of a result: what is drawn of a raw map, its dtype, its place, what it admits."""

from __future__ import annotations

import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import toy
from monai.data import DataLoader, Dataset, MetaTensor
from monai.utils import SpaceKeys

from seg3dcam import CamResult, GradCAM, HiResCAM, SliceGradCAM, WindowPlan, targets
from seg3dcam.engine.evidence import Evidence, scaled
from seg3dcam.engine.layer_map import LayerMap
from seg3dcam.errors import InputError, OutputError, Seg3dcamWarning
from seg3dcam.geometry import FeatureGrid

SCALES = ["max", "minmax", "raw"]
nan, inf = float("nan"), float("inf")


def layer_map(values, stride: float = 1, offset: float = 0, magnitude=None) -> LayerMap:
    """Make a layer's map from numbers (B, *s), judged against the evidence behind each item."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if magnitude is None:
        magnitude = values.abs().flatten(1).mean(1)
    ndim = values.ndim - 1
    grid = FeatureGrid(tuple(values.shape[1:]), (stride,) * ndim, (offset,) * ndim)
    magnitude = torch.as_tensor(magnitude, dtype=torch.float64)
    return LayerMap(values, grid, grid, magnitude)


def result_of(*layers: LayerMap, shape: tuple[int, ...] | None = None, **fields) -> CamResult:
    """Make the result of layers called "a", "b", ..., on an input of `shape`."""
    shape = shape or layers[0].grid.shape
    batch = len(layers[0].values)
    return CamResult(
        dict(zip("abc", layers, strict=False)),
        shape,
        fields.pop("logits", torch.zeros(batch, 2, *shape)),
        torch.zeros(batch),
        "target",
        "method",
        **fields,
    )


def view(result: CamResult, *args, **settings) -> list:
    return result.volume(*args, **settings).tolist()


# -------------------------------------------------------------------------------------- scaling

#: values of one item -> what each scale draws
DRAWN = [
    ([1.0, 2.0, 5.0], {"max": [0.2, 0.4, 1], "minmax": [0, 0.25, 1], "raw": [1, 2, 5]}),
    ([-4.0, 0.0, 2.0], {"max": [0, 0, 1], "minmax": [0, 0, 1], "raw": [0, 0, 2]}),
    ([-4.0, 1e-3, 4e-3], {"max": [0, 0.25, 1], "minmax": [0, 0.25, 1], "raw": [0, 1e-3, 4e-3]}),
]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("values", "drawn"), DRAWN, ids=str)
def test_negative_evidence_is_cut_and_the_rest_scaled(values, drawn, scale, per_layer):
    found = result_of(layer_map([values])).volume(scale=scale, per_layer=per_layer)
    assert found[0].tolist() == pytest.approx(drawn[scale], rel=1e-12)


#: name -> (values of one item, the evidence behind it, status)
NOTHING = {
    "zero": ([0.0, 0.0, 0.0], 0.0, "zero"),
    "negative": ([-1.0, -2.0, 0.0], 1.0, "zero"),
    "rounding noise": ([-1e-9, 1e-9, 0.0], 1.0, "zero"),
    "constant": ([3.0, 3.0, 3.0], 3.0, "degenerate"),
    "NaN": ([1.0, nan, 2.0], 1.0, "nonfinite"),
    "infinite": ([1.0, inf, 2.0], inf, "nonfinite"),
    "NaN everywhere": ([nan, nan, nan], nan, "nonfinite"),
}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", list(NOTHING))
def test_what_explains_nothing_is_said_and_drawn_as_zeros(name, scale, per_layer):
    values, magnitude, status = NOTHING[name]
    result = result_of(layer_map([values], magnitude=[magnitude]))
    assert result.status == {"a": status}
    assert view(result, scale=scale, per_layer=per_layer) == [[0, 0, 0]]
    assert view(result, "a", scale=scale, per_layer=per_layer) == [[0, 0, 0]]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", list(NOTHING))
def test_an_item_is_drawn_as_it_is_alone_whatever_else_is_in_the_batch(name, scale):
    """One empty item of a batch may not blank the others."""
    values, magnitude, status = NOTHING[name]
    good = [1.0, 2.0, 5.0]
    alone = view(result_of(layer_map([good])), scale=scale)
    result = result_of(layer_map([good, values], magnitude=[2.0, magnitude]))
    assert result.status == {"a": status}  # the worst item counts
    assert view(result, scale=scale) == [alone[0], [0, 0, 0]]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("scale", ["max", "minmax"])
def test_items_are_scaled_each_on_its_own(scale, per_layer):
    result = result_of(layer_map([[0.0, 1.0, 2.0], [0.0, 300.0, 100.0]]))
    expected = [[0, 0.5, 1], [0, 1, 1 / 3]]
    assert result.volume(scale=scale, per_layer=per_layer).numpy() == pytest.approx(
        np.array(expected), rel=1e-12
    )


@pytest.mark.parametrize("scale", ["max", "minmax"])
def test_constant_and_zero_items_become_zeros_and_never_ones(scale):
    maps = torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [0.0, 1.0, 4.0]])
    assert scaled(maps, scale).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0.25, 1]]


def test_raw_maps_are_kept_signed_and_unscaled():
    values = torch.tensor([[-4.0, 0.0, 2.0]], dtype=torch.float64)
    result = result_of(layer_map(values))
    result.volume()
    result.volume(scale="minmax", per_layer=True)
    assert torch.equal(result.maps["a"], values)
    assert torch.equal(result.native["a"], values)


# --------------------------------------------------------------------------------- layers, grids


# ------------------------------------------------------------------------------------ both signs


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([-4.0, 0.0, 2.0], [-1, 0, 0.5]),
        ([-1.0, 0.0, 2.0], [-0.5, 0, 1]),
        ([0.0, 1.0, 2.0], [0, 0.5, 1]),
    ],
)
@pytest.mark.parametrize("per_layer", [False, True])
def test_signed_keeps_both_signs_on_one_scale(values, drawn, per_layer):
    result = result_of(layer_map([values]))
    assert view(result, scale="signed", per_layer=per_layer) == [pytest.approx(drawn)]
    assert result.maps["a"].tolist() == [values]  # the raw map stays as it is


def test_signed_items_are_scaled_each_on_its_own():
    result = result_of(layer_map([[-4.0, 2.0], [1.0, 8.0]]))
    assert view(result, scale="signed") == [[-1, 0.5], [0.125, 1]]


def test_signed_layers_speak_against_each_other():
    """One layer's evidence against cancels another one's for; each sign alone does not."""
    result = result_of(layer_map([[-4.0, 2.0, 1.0]]), layer_map([[4.0, -6.0, 3.0]]))
    assert view(result, scale="signed") == [[0, -1, 1]]
    assert view(result) == [[1, 0.5, 1]]
    per_layer = [[-4 / 9, -2 / 3, 1]]  # (-1 + 2/3, 1/2 - 1, 1/4 + 1/2) on its own scale
    assert view(result, scale="signed", per_layer=True) == [pytest.approx(per_layer[0])]


def test_signed_leaves_out_what_is_not_usable():
    noise, good = layer_map([[1e-9, -2e-9]], magnitude=[1.0]), layer_map([[-3.0, 1.0]])
    assert result_of(noise).status == {"a": "zero"}
    assert view(result_of(noise), scale="signed") == [[0, 0]]
    assert view(result_of(noise, good), scale="signed") == [pytest.approx([-1, 1 / 3])]
    assert view(result_of(layer_map([[nan, 1.0]]), good), scale="signed") == [[0, 0]]
    assert view(result_of(layer_map([[2.0, 2.0]])), scale="signed") == [[0, 0]]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([-0.16, 0.0, -0.04], [-1, 0, -0.25]),
        ([-4.0, 1e-9, -1.0], [-1, 2.5e-10, -0.25]),  # what speaks for the target is rounding noise
        ([-1e-9, 0.0, -2e-9], [0, 0, 0]),  # all of it is
        ([-3.0, -3.0, -3.0], [0, 0, 0]),  # the same everywhere
    ],
    ids=str,
)
def test_what_is_all_against_its_target_is_shown_signed_alone(values, drawn, per_layer):
    result = result_of(layer_map([values, [1.0, -2.0, 0.0]], magnitude=[1.0, 1.0]))
    assert result.status == {"a": "zero"}
    shown = view(result, scale="signed", per_layer=per_layer)
    assert shown[0] == pytest.approx(drawn, rel=1e-9, abs=1e-12)
    assert shown[1] == [0.5, -1, 0]
    for scale in SCALES:
        assert view(result, scale=scale, per_layer=per_layer)[0] == [0, 0, 0]


def test_what_misses_gradients_is_not_shown_signed_either():
    negative = replace(layer_map([[-1.0, -2.0, 0.0]]), missing=0.3)
    assert view(result_of(negative), scale="signed") == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("path", "settings", "error", "message"),
    [
        (None, {}, OutputError, "None is no path: name a file, such as 'cam.nii.gz'"),
        ("a.nii", {"item": "a"}, InputError, "item 'a' of the batch: legal are 0 to 0"),
        (
            "a.nii",
            {"affine": "a"},
            OutputError,
            r"a\.nii: the affine is not a matrix of numbers\. Legal: a \(4, 4\)",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused(path, settings, error, message):
    result = result_of(layer_map(toy.random_input(1, 2, 3, 4)))
    with pytest.raises(error, match=message):
        result.save(path, **{"affine": np.eye(4), **settings})


def test_a_signed_volume_is_saved_with_its_range(tmp_path):
    result = result_of(layer_map([[[[-4.0, 2.0], [0.0, 1.0]]] * 2]))
    image = nib.load(result.save(tmp_path / "cam.nii.gz", affine=np.eye(4), scale="signed"))
    assert (image.header["cal_min"], image.header["cal_max"]) == (-1, 1)
    assert np.asarray(image.dataobj)[0].tolist() == [[-1, 0.5], [0, 0.25]]


# ------------------------------------------------------------------------------ evidence against


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.12, -4.31, -1.0], True),
        ([0.12, -1.19], False),  # a tenth of it speaks for the target
        ([0.12, -1.21], True),
        ([3.0, *[-0.5] * 100], False),  # a weak background: the strongest value speaks for it
        ([1.0, 0.0], False),
    ],
)
def test_what_is_mostly_against_its_target_is_said(values, said):
    found = layer_map([values]).caution
    assert found.startswith("mostly evidence against the target: at most 0.12 for it") == said
    assert bool(found) == said


def test_evidence_is_summed_by_sign():
    values = np.random.default_rng(0).normal(-0.3, 1, (4, 5, 6))
    found = Evidence.of(torch.tensor(values))
    assert found.sum_for == pytest.approx(values[values > 0].sum())
    assert found.sum_against == pytest.approx(-values[values < 0].sum())
    assert (found.most_for, found.most_against) == (values.max(), -values.min())
    assert found.against == pytest.approx(found.sum_against / np.abs(values).sum())
    assert Evidence.of(torch.zeros(3)).against is None


def test_of_a_batch_the_items_are_named():
    values = [[0.1, -4.0], [1.0, -1.0], [0.2, -9.0]]
    words = layer_map(values).caution.split("; ")
    assert [word.partition(":")[0] for word in words] == ["item 0", "item 2"]


def test_a_map_of_mostly_evidence_against_warns_at_the_users_line():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1, bias=False), torch.nn.Identity())
    torch.nn.init.ones_(network[0].weight)
    x = torch.full((1, 1, 4, 4, 4), -1.0)
    x[..., 0, 0] = 0.1
    with pytest.warns(Seg3dcamWarning, match="'0'.*mostly evidence against.*signed") as caught:
        result = HiResCAM(network, "0")(x, targets.ClassLogit(0, region="volume"))
    assert [warning.filename for warning in caught] == [__file__]
    assert result.status == {"0": "ok"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HiResCAM(network, "0")(-x, targets.ClassLogit(0, region="volume"))


def test_a_map_that_is_all_against_warns_and_names_the_signed_view():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1, bias=False), torch.nn.Identity())
    torch.nn.init.ones_(network[0].weight)
    x = -torch.arange(64.0).view(1, 1, 4, 4, 4)
    match = '\'0\' shows nothing.*"zero".*all evidence speaks against the target.*"signed"'
    with pytest.warns(Seg3dcamWarning, match=match):
        result = HiResCAM(network, "0")(x, targets.ClassLogit(0, region="volume"))
    torch.testing.assert_close(result.volume(scale="signed"), x[0] / 63)


def test_layers_are_averaged_and_then_scaled():
    result = result_of(layer_map([[1.0, 0.0, 3.0]]), layer_map([[-5.0, 2.0, 5.0]]))
    assert view(result) == [[1 / 8, 1 / 4, 1]]  # mean of (1, 0, 3) and (0, 2, 5), over 4
    assert view(result, scale="raw") == [[0.5, 1, 4]]
    assert view(result, "a") == [[1 / 3, 0, 1]]
    assert view(result, "b") == [[0, 0.4, 1]]


def test_per_layer_gives_every_layer_the_same_say():
    loud, quiet = layer_map([[0.0, 1000.0, 500.0]]), layer_map([[0.0, 0.001, 0.002]])
    result = result_of(loud, quiet)
    assert view(result, per_layer=True)[0] == pytest.approx([0, 1, 1], rel=1e-12)
    assert view(result)[0] == pytest.approx([0, 1, 0.5], abs=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_rounding_noise_of_one_layer_is_not_blown_up_beside_another(scale, per_layer):
    """Scaled to [0, 1] on its own, noise would count as much as evidence."""
    noise = layer_map([[1e-9, -1e-9, 0.0]], magnitude=[1.0])
    good = layer_map([[0.0, 0.0, 1.0]])
    result = result_of(noise, good)
    assert result.status == {"a": "zero", "b": "ok"}
    found = result.volume(scale=scale, per_layer=per_layer)[0]
    assert found[2] > 0
    assert found[:2].abs().max() <= 1e-8 * found[2]


def test_coarse_map_is_resized_first_and_cut_afterwards():
    """Feature voxels lie at 0.5 and 2.5; between them the signed map passes through zero."""
    result = result_of(layer_map([[-1.0, 1.0]], stride=2, offset=0.5), shape=(4,))
    assert result.maps["a"].tolist() == [[-1, -0.5, 0.5, 1]]
    assert view(result) == [[0, 0, 0.5, 1]]


def test_the_recipe_cuts_first_and_resizes_afterwards():
    result = result_of(layer_map([[-1.0, 1.0]], stride=2, offset=0.5), shape=(4,))
    assert view(result, per_layer=True) == [[0, 0.25, 0.75, 1]]


def test_strided_grid_lies_where_the_convolution_looked():
    """A strided 1x1x1 convolution sees input voxels 0, 2, 4 ..., so that is where its map lies."""
    conv = torch.nn.Conv3d(1, 1, 1, stride=2)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    network = torch.nn.Sequential(conv, torch.nn.Upsample(scale_factor=2.0)).double()
    x = torch.zeros(1, 1, 8, 6, 10, dtype=torch.float64)
    x[0, 0, 4, 2, 6] = 1
    result = HiResCAM(network, "0")(x, targets.ClassLogit(0, "volume"))
    peak = (result.maps["0"][0] == result.maps["0"].max()).nonzero()
    assert peak.tolist() == [[4, 2, 6]]
    assert result.maps["0"][0, 4, 2, 5:8].tolist() == [4, 8, 4]  # 8 voxels of output for each
    assert result.native_spacing == {"0": (2, 2, 2)}


def test_native_spacing_is_in_mm_where_the_affine_is_known():
    affine = np.array([[0, 0, 5, 1], [0.8, 0, 0, 2], [0, -0.5, 0, 3], [0, 0, 0, 1.0]])
    layer = layer_map(toy.random_input(1, 2, 2, 2), stride=4)
    result = result_of(layer, shape=(8, 8, 8), affine=affine)
    assert result.native_spacing["a"] == pytest.approx((3.2, 2, 20), rel=1e-12)
    assert result_of(layer, shape=(8, 8, 8)).native_spacing == {"a": (4, 4, 4)}


def test_native_maps_exist_only_where_there_is_one_window():
    x = toy.random_input(1, 1, 8, 8, 12)
    network = toy.plain(3, seed=3)
    whole = GradCAM(network, "1")(x)
    assert whole.native["1"].shape == (1, 8, 8, 12)
    windowed = GradCAM(network, "1", sliding_window=WindowPlan(8))(x)
    assert windowed.windows == 2
    with pytest.raises(InputError, match=r"cut into 2 windows.*use \.maps"):
        windowed.native  # noqa: B018
    assert windowed.native_spacing == {"1": (1, 1, 1)}


# ----------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_is_that_slice_of_the_volume(axis):
    result = result_of(layer_map(toy.random_input(2, 4, 3, 5)))
    for settings in ({}, {"scale": "minmax", "per_layer": True}, {"layer": "a", "scale": "raw"}):
        volume = result.volume(**settings)
        for index in range(result.shape[axis]):
            expected = volume.numpy().take(index, axis=1 + axis)
            found = result.slice(index, axis, **settings).numpy()
            assert np.array_equal(found, expected)


def test_slice_of_z_is_the_default():
    values = torch.arange(24.0).reshape(1, 4, 3, 2)
    result = result_of(layer_map(values))
    assert result.slice(2, scale="raw").tolist() == [[[12, 13], [14, 15], [16, 17]]]


@pytest.mark.parametrize(
    ("index", "axis", "message"),
    [
        (4, 0, "slice 4 along axis 0: legal are 0 to 3"),
        (1.5, 0, "slice 1.5 along axis 0: legal are 0 to 3"),
        ("a", 0, "slice 'a' along axis 0: legal are 0 to 3"),
        (0, None, "axis None: legal are 0 to 2"),
        (-1, 0, "slice -1 along axis 0: legal are 0 to 3"),
        (3, 1, "slice 3 along axis 1: legal are 0 to 2"),
        (5, 2, "slice 5 along axis 2: legal are 0 to 4"),
        (0, 3, "axis 3: legal are 0 to 2"),
        (0, -1, "axis -1: legal are 0 to 2"),
    ],
)
def test_slice_out_of_bounds_names_what_is_legal(index, axis, message):
    result = result_of(layer_map(toy.random_input(1, 4, 3, 5)))
    with pytest.raises(InputError, match=message):
        result.slice(index, axis)


def test_wrong_words_are_refused_with_the_legal_ones():
    result = result_of(layer_map(toy.random_input(1, 4)))
    with pytest.raises(InputError, match=r"scale 'median': legal are 'max', 'minmax', 'raw' and"):
        result.volume(scale="median")
    with pytest.raises(InputError, match=r"no map of layer 'z': there are \['a'\]"):
        result.volume("z")


# ------------------------------------------------------------------------------- through a network


@pytest.mark.parametrize("cam", [GradCAM, SliceGradCAM, HiResCAM])
def test_infinite_gradient_is_called_nonfinite_and_never_drawn(cam):
    x = toy.random_input(1, 1, 3, 4, 5)  # the ReLU gives zeros, where the root's slope is infinite
    with pytest.warns(Seg3dcamWarning, match=r"\"nonfinite\"\): NaN or infinity"):
        result = cam(toy.infinite_slope(), "0")(x, targets.ClassLogit(1, "volume"))
    assert result.status == {"0": "nonfinite"}
    for scale in SCALES:
        for per_layer in (False, True):
            assert not result.volume(scale=scale, per_layer=per_layer).any()
    assert not result.slice(1).any()


def test_constant_map_is_called_degenerate():
    network = toy.seeded(torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1), torch.nn.Conv3d(1, 1, 1)))
    network[1].weight.data.copy_(network[0].weight.data[:1])  # their product is positive
    network[0].bias.data.zero_()
    x = torch.ones(1, 1, 3, 4, 5, dtype=torch.float64)
    with pytest.warns(Seg3dcamWarning, match="the same value everywhere"):
        result = GradCAM(network, "0")(x, targets.ClassLogit(0, "volume"))
    assert result.status == {"0": "degenerate"}
    assert not result.volume().any()
    assert (result.maps["0"] > 0).all()


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_one_empty_item_does_not_blank_the_batch():
    """A scan without anything in it beside one that has the class."""
    network = toy.remote_cue((0, 4, 4))
    x = torch.zeros(2, 2, 4, 8, 8, dtype=torch.float64)
    x[0, 1, 1, 5, 6] = 1
    cam, target = HiResCAM(network, "0"), targets.ClassLogit(1, "volume")
    together, alone = cam(x, target), cam(x[:1], target)
    assert together.status == {"0": "zero"}
    assert alone.volume().sum() == 1
    assert torch.equal(together.volume()[0], alone.volume()[0])
    assert not together.volume()[1].any()


DTYPES = [
    (torch.float64, torch.float64, 1e-12),
    (torch.float32, torch.float32, 1e-5),
    (torch.float16, torch.float32, 2e-2),
    (torch.bfloat16, torch.float32, 1e-1),
]


@pytest.mark.parametrize("cam", [GradCAM, HiResCAM])
@pytest.mark.parametrize(("dtype", "expected", "tolerance"), DTYPES, ids=str)
def test_half_precision_gives_float32_maps_and_float64_stays(dtype, expected, tolerance, cam):
    network, x = toy.shared(toy.plain, 3, seed=3), toy.random_input(1, 1, 4, 5, 6)
    target = targets.ClassLogit(1, "volume")
    exact = cam(network, "1")(x, target).maps["1"]
    result = cam(toy.shared(toy.converted, network, dtype), "1")(x.to(dtype), target)
    for found in (result.maps["1"], result.native["1"], result.volume(), result.slice(2)):
        assert found.dtype == expected
    assert (result.maps["1"] - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_scan_through_a_half_precision_network_gives_float32_maps(dtype):
    network = toy.plain(3, seed=3).to(dtype)
    x = toy.random_input(1, 1, 4, 5, 6).float()
    result = HiResCAM(network, "1")(x, targets.ClassLogit(1, "volume"))
    assert result.maps["1"].dtype == torch.float32
    assert result.status == {"1": "ok"}


def test_prediction_is_the_arg_max_or_each_logit_above_zero():
    logits = torch.tensor([[[2.0, -1.0, 0.5], [1.0, -2.0, 0.7]]])
    layer = layer_map([[0.0, 1.0, 2.0]])
    found = result_of(layer, logits=logits).prediction
    assert found.tolist() == [[0, 0, 1]]
    found = result_of(layer, logits=logits, activation="sigmoid").prediction
    assert found.tolist() == [[[True, False, True], [True, False, True]]]
    found = result_of(layer, logits=logits[:, :1]).prediction
    assert found.tolist() == [[[True, False, True]]]


# ------------------------------------------------------------------------------------- the affine

# A rotation (its rows are orthonormal) of voxels of 0.7 x 0.8 x 2.5 mm, x running to the left.
ROTATION = np.array([[-0.96, 0.28, 0], [0.168, 0.576, -0.8], [-0.224, -0.768, -0.6]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = ROTATION * [0.7, 0.8, 2.5]
OBLIQUE[:3, 3] = 90.3, -120.7, -519.1
FLIPPED = np.diag([-1.0, -1.0, 1.0, 1.0]) @ OBLIQUE


def explained(x: torch.Tensor) -> CamResult:
    return HiResCAM(toy.shared(toy.plain, 3, seed=3), "1")(x, targets.ClassLogit(1, "volume"))


def meta_tensor(affine=OBLIQUE, seed: int = 0, **meta) -> MetaTensor:
    """Return one scan (1, 4, 5, 6) as a loader gives it."""
    x = toy.random_input(1, 4, 5, 6, seed=seed)
    return MetaTensor(x, affine=torch.as_tensor(affine), meta=meta)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (None, OBLIQUE),
        ("RAS", OBLIQUE),
        (SpaceKeys.RAS, OBLIQUE),
        ("LPS", FLIPPED),
        (SpaceKeys.LPS, FLIPPED),
    ],
    ids=["unsaid", "RAS", "RAS key", "LPS", "LPS key"],
)
def test_affine_of_a_meta_tensor_lands_in_the_result_in_ras(space, expected):
    meta = {} if space is None else {"space": space}
    result = explained(meta_tensor(**meta)[None])
    assert np.array_equal(result.affine, expected)
    assert result.native_spacing["1"] == pytest.approx((0.7, 0.8, 2.5), rel=1e-12)


def test_meta_tensor_gives_the_same_plain_map_as_a_tensor():
    x = meta_tensor()[None]
    found, plain = explained(x), explained(x.as_tensor())
    assert type(found.maps["1"]) is torch.Tensor
    assert torch.equal(found.maps["1"], plain.maps["1"])
    assert plain.affine is None


def batched(*items: MetaTensor) -> MetaTensor:
    """Return the items as MONAI's DataLoader batches them: the affine becomes (B, 4, 4)."""
    return next(iter(DataLoader(Dataset(list(items)), batch_size=len(items))))


@pytest.mark.parametrize(
    ("space", "expected"),
    [("RAS", OBLIQUE), ("LPS", FLIPPED), (SpaceKeys.LPS, FLIPPED)],
    ids=["RAS", "LPS", "LPS key"],
)
def test_affine_of_a_batch_from_a_loader(space, expected):
    """The loader turns the affine into (B, 4, 4) and the space into a list."""
    x = batched(meta_tensor(seed=1, space=space), meta_tensor(seed=2, space=space))
    assert x.shape == (2, 1, 4, 5, 6)
    assert x.affine.shape == (2, 4, 4)
    assert np.array_equal(explained(x).affine, expected)


def test_items_that_lie_differently_keep_each_its_own_affine(tmp_path):
    moved = OBLIQUE.copy()
    moved[:3, 3] += 10
    result = explained(batched(meta_tensor(seed=1), meta_tensor(moved, seed=2)))
    assert np.array_equal(result.affine, np.stack([OBLIQUE, moved]))
    for item, affine in enumerate((OBLIQUE, moved)):
        saved = nib.load(result.save(tmp_path / f"{item}.nii.gz", item=item))
        assert saved.affine == pytest.approx(affine, abs=1e-4)  # a header holds float32
        assert saved.get_fdata() == pytest.approx(result.volume()[item].numpy(), abs=1e-6)


def test_items_of_several_spaces_are_each_turned_to_ras():
    x = batched(meta_tensor(seed=1, space="RAS"), meta_tensor(seed=2, space="LPS"))
    assert np.array_equal(explained(x).affine, np.stack([OBLIQUE, FLIPPED]))
