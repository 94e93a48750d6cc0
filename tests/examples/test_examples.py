"""The examples run as their README says, and what they draw is what they promise."""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread, imsave
from torch import nn
from torch.nn import functional

from seg3dcam import METHODS, GradCAM, SliceGradCAM
from seg3dcam.errors import Seg3dcamWarning, TargetError
from seg3dcam.targets import ClassLogit, DetectionClass, detection_map

pytestmark = pytest.mark.usefixtures("measured_once")

EXAMPLES = Path(__file__).parents[2] / "examples"
#: These have tests of their own: here, in tests/integrations and for the demo's model.
OTHERS = [
    *("shortcut.py", "train_demo_model.py", "train_lightning.py", "train_monai.py"),
    "train_plain.py",
]

WRITTEN = {
    "classifier_2d.py": ["heat_on_picture.png", "picture.png", "sum_with_picture.png"],
    "every_convolution.py": 20,
    "detector_heads.py": ["leaf.png"],
    "transformer_tokens.py": ["tokens.png"],
    "feature_maps.py": 8 + 16 + 32 + 16 + 4,  # the channels, and a mosaic for each layer
    "bundle.py": [
        *("cam_ball.nii.gz", "cam_ball.png", "inference.json", "metadata.json", "model.pt"),
        "scan.nii.gz",
    ],
    "nnunet.py": [
        *("cam_ball.nii.gz", "cam_ball.png", "case_0000.nii.gz", "checkpoint_final.pth"),
        *("dataset.json", "plans.json"),
    ],
    "original_recipe.py": ["axial_010.png", "cam.nii.gz", "scan.nii.gz"],
}


@functools.cache
def example(name: str) -> SimpleNamespace:
    """Return what a script defines; loaded once, and not run."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name))


def commands() -> dict[str, list[str]]:
    """Return script -> its command in the README's table."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    return {
        script: shlex.split(command)
        for script, command in re.findall(r"^\| \[`(\S+)`\].*\| `(python [^`]+)` \|$", text, re.M)
    }


def caught(network: nn.Module, name: str, x: torch.Tensor, score) -> tuple[torch.Tensor, ...]:
    """Return a layer's activations and the gradient of a score of the output, by plain hooks."""
    found = {}

    def keep(module, args, output):
        found["a"] = output
        output.retain_grad()

    network.eval()
    handle = network.get_submodule(name).register_forward_hook(keep)
    try:
        score(network(x)).backward()
    finally:
        handle.remove()
        network.zero_grad()
    return found["a"].detach(), found["a"].grad


def as_input(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float()


def jet(heat: np.ndarray) -> np.ndarray:
    return matplotlib.colormaps["jet"](heat)[..., :3]


def pixels(path: Path) -> np.ndarray:
    """Return a picture's colours in [0, 1]."""
    return imread(path)[..., :3]


# ---------------------------------------------------------------- all


def test_every_script_is_in_the_table():
    assert sorted(commands()) == sorted(file.name for file in EXAMPLES.glob("*.py"))
    assert sorted([*WRITTEN, *OTHERS]) == sorted(commands())
    for script, words in commands().items():
        assert words[1] == f"examples/{script}"


def _each_script():
    """Return every script; slow are those of which other tests here run most of the lines."""
    quick = ("detector_heads.py", "bundle.py", "nnunet.py")
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in WRITTEN]


@pytest.mark.slow
@pytest.mark.parametrize("script", _each_script())
def test_the_command_of_the_table_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*commands()[script][1:], "--out", str(tmp_path / "new")])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    written = sorted(file.name for file in tmp_path.rglob("*.*") if file.is_file())
    expected = WRITTEN[script]
    assert (len(written) if isinstance(expected, int) else written) == expected
    printed = capsys.readouterr().out
    assert str(tmp_path / "new") in printed
    assert all(Path(path).is_file() for path in re.findall(r"\S+\.(?:png|nii\.gz)", printed))


def test_every_example_says_how_to_run_it():
    for script in commands():
        assert f"    python examples/{script}" in (EXAMPLES / script).read_text(encoding="utf-8")


# ---------------------------------------------------------------- a classifier


def test_overlays_are_what_their_articles_compute():
    of = example("classifier_2d")
    picture = np.array([[[0.5, 0.25, 0.0], [1.0, 1.0, 1.0]]])
    heat = np.array([[0.0, 1.0]])  # jet runs from half blue to half red
    assert np.allclose(of.heat_on(picture, heat), [[[0.5, 0.25, 0.2], [1, 1, 1]]])
    expected = np.array([[[0.5, 0.25, 0.5], [1.5, 1, 1]]]) / 1.5
    assert np.allclose(of.sum_with(picture, heat), expected)
    with pytest.raises(ValueError, match="from 0 to 255"):
        of.sum_with(picture * 255, heat)


@pytest.mark.slow
def test_the_classifier_explains_the_class_of_the_largest_logit(tmp_path, capsys):
    of = example("classifier_2d")
    of.main(tmp_path / "top")
    picture, network = of.draw_picture(), of.build_network()
    x = of.as_input(picture)
    with torch.no_grad():
        best = int(network.eval()(x).argmax())
    assert f"class {best}," in capsys.readouterr().out

    a, g = caught(network, "layer4", x, lambda logits: logits[0, best])
    raw = METHODS["grad_cam"](a, g)
    result = GradCAM(network, "layer4")(x, of.top_class)
    assert result.native["layer4"].shape == (1, 7, 7)
    torch.testing.assert_close(result.native["layer4"], raw, rtol=1e-4, atol=1e-7)
    heat = result.volume()[0].numpy()
    written = pixels(tmp_path / "top" / "heat_on_picture.png")
    assert np.abs(written - np.clip(0.4 * jet(heat) + picture, 0, 1)).max() < 1 / 255

    of.main(tmp_path / "named", category=best)
    of.main(tmp_path / "other", category=(best + 1) % 1000)
    named, other = (pixels(tmp_path / n / "heat_on_picture.png") for n in ("named", "other"))
    assert np.array_equal(named, written)
    assert np.abs(other - written).max() > 0.1


def test_the_classifier_takes_weights_and_a_picture_of_your_own(tmp_path):
    of = example("classifier_2d")
    state = {name: value + 1 for name, value in of.build_network().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    loaded = of.build_network(tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())

    picture = of.draw_picture()
    imsave(tmp_path / "own.png", picture)
    assert np.abs(of.read_picture(tmp_path / "own.png") - picture).max() < 1 / 255
    with pytest.raises(SystemExit, match="no picture"):
        of.read_picture(tmp_path / "none.png")


# ---------------------------------------------------------------- every convolution


class WithSpareHead(nn.Module):
    """Three convolutions that make the score, and one that only makes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2), nn.ReLU()
        )
        self.spare = nn.Conv2d(6, 2, 1)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        features = self.body(x)
        self.spare(features)
        return self.last(features).mean((2, 3))


def test_every_convolution_that_makes_the_score_gets_its_picture(tmp_path, capsys):
    of = example("every_convolution")
    torch.manual_seed(1)
    network, picture = WithSpareHead(), of.draw_picture(32)
    passes = []
    network.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    with pytest.warns(Seg3dcamWarning, match="no map of layer 'spare'"):
        result = of.explain_every_convolution(network, picture, tmp_path)
    names = ["body.0", "body.2", "last"]
    assert passes.count(True) == 2  # one makes the maps, one tries the gradient; others just look
    assert list(result.layers) == names
    assert "no map of spare" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"{number:02d}_{name}.png" for number, name in enumerate(names, 1)
    ]
    for number, name in enumerate(names, 1):
        a, g = caught(network, name, as_input(picture), lambda logits: logits.max())
        raw = (g.mean((2, 3), keepdim=True) * a).sum(1)
        torch.testing.assert_close(result.native[name], raw)
        # Kernels as long as their stride: features lie in the middle, as resizing takes them to.
        cut = raw.clamp(min=0)
        heat = functional.interpolate(cut[None], (32, 32), mode="bilinear")[0, 0]
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        expected = 0.6 * picture + 0.4 * jet(heat.numpy())
        written = pixels(tmp_path / f"{number:02d}_{name}.png")
        assert np.abs(written - expected).max() < 2 / 255


# ---------------------------------------------------------------- a detector


def planted(colour: int) -> np.ndarray:
    """Return a grey picture with a square of one colour, and small ones of the others."""
    picture = np.full((128, 192, 3), 0.4)
    for k in range(3):
        rows, columns = (slice(32, 96), slice(96, 160)) if k == colour else (slice(104, 120),) * 2
        picture[rows, columns] = np.eye(3)[k]
    return picture


@pytest.mark.parametrize("colour", range(3))
def test_all_maps_of_all_heads_point_at_the_planted_thing(colour):
    of = example("detector_heads")
    network, x = of.Detector(), as_input(planted(colour))
    for number, stride in enumerate(of.STRIDES):
        for title, values in of.explain_head(network, x, of.CLASSES[colour], number).items():
            cell = 128 // len(values)
            assert cell == (stride if title == "objectness x class" else 1)
            y, x_ = (cell * n for n in np.unravel_index(values.argmax(), values.shape))
            assert 32 <= y < 96, title
            assert 96 <= x_ < 160, title


def test_a_heads_maps_are_those_computed_by_hand():
    of = example("detector_heads")
    network, x = of.Detector(), as_input(of.draw_picture())
    for number in range(3):
        maps = of.explain_head(network, x, "berry", number)

        def score(heads, number=number):
            numbers = heads[number].unflatten(1, (of.ANCHORS, of.WIDTH))
            return (numbers[:, :, 4].sigmoid() * numbers[:, :, 7].sigmoid()).sum()

        a, g = caught(network, f"stages.{number}", x, score)
        for title, method in (("Grad-CAM", "grad_cam"), ("HiResCAM", "hires_cam")):
            raw = METHODS[method](a, g)
            # Cells are means of patches: they lie in the middle, as resizing takes them to.
            view = functional.interpolate(raw[None], (256, 256), mode="bilinear")[0, 0]
            view = view.clamp(min=0)
            assert np.abs(maps[title] - (view / view.max()).numpy()).max() < 1e-4
        with torch.no_grad():
            head = network(x)[number]
        own = detection_map(head, 2, of.CLASSES)[0].numpy()
        assert np.array_equal(maps["objectness x class"], own)


def test_the_score_of_the_flat_tensor_is_the_sum_of_the_heads():
    of = example("detector_heads")
    x = as_input(of.draw_picture())
    target = DetectionClass("leaf", of.CLASSES)
    layers = ["stages.0", "stages.1", "stages.2"]
    joined = GradCAM(of.Detector(flatten=True), layers)(x, target)
    alone = GradCAM(of.Detector(), "stages.2", output=2)(x, target)
    with torch.no_grad():
        scores = [target(head) for head in of.Detector()(x)]
    torch.testing.assert_close(joined.score, sum(scores))
    # Only the last head sees the last stage.
    torch.testing.assert_close(joined.native["stages.2"], alone.native["stages.2"])


@pytest.mark.slow
def test_a_class_that_the_detector_does_not_have_is_refused(tmp_path):
    of = example("detector_heads")
    with pytest.raises(TargetError, match="did you mean 'leaf'"):
        of.main(tmp_path, "leef")
    with pytest.raises(TargetError, match=r"0 to 2 are legal: 0 \(tomato\), 1 \(leaf\), 2 \(be"):
        of.main(tmp_path, 3)
    assert not list(tmp_path.iterdir())
    of.main(tmp_path / "name", "berry")
    of.main(tmp_path / "index", 2)
    assert np.array_equal(*(pixels(tmp_path / n / "berry.png") for n in ("name", "index")))


# ---------------------------------------------------------------- a transformer


@pytest.mark.slow
def test_the_layout_found_is_the_one_that_is_told():
    of = example("transformer_tokens")
    network, x = of.build_network(), as_input(of.draw_picture())
    results = of.explain_in_three_ways(network, x)
    a, g = caught(network, of.LAYER, x, lambda output: output[0].max())
    a, g = (tokens[:, 1:].reshape(1, 14, 14, 96).permute(0, 3, 1, 2) for tokens in (a, g))
    expected = METHODS["grad_cam"](a, g)
    for result in results.values():
        assert torch.equal(result.native[of.LAYER], results["found"].native[of.LAYER])
        torch.testing.assert_close(result.native[of.LAYER], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_the_last_blocks_patches_are_used_by_nobody():
    of = example("transformer_tokens")
    network, x = of.build_network(), as_input(of.draw_picture())
    last = f"blocks.{of.BLOCKS - 1}"
    with pytest.warns(Seg3dcamWarning, match="explains nothing"):
        result = GradCAM(network, last, output=0)(x, of.top_class)
    assert result.status == {last: "zero"}
    assert not result.native[last].any()


# ---------------------------------------------------------------- feature maps


@pytest.mark.slow
def test_the_stages_pictures_are_their_channels(tmp_path):
    of = example("feature_maps")
    features = of.draw_picture()
    stages = of.show_stages(tmp_path)
    backbone = of.build_backbone().eval()
    for number, (found, stage) in enumerate(zip(stages, backbone, strict=True), 1):
        with torch.no_grad():
            features = stage(features)
        assert np.allclose(found.values, features[0].numpy(), atol=1e-6)
        channel = features[0, 3].numpy()
        level = (channel - channel.min()) / (channel.max() - channel.min())
        zoom = 512 // len(channel)  # a feature voxel is a block of pixels
        written = pixels(tmp_path / f"stage_{number}" / "channel_003.png")
        assert written.shape == (512, 512, 3)
        expected = matplotlib.colormaps["viridis"](level)[..., :3]
        # One step of a colormap's 256 levels, where rounding may differ.
        assert np.abs(written[zoom // 2 :: zoom, zoom // 2 :: zoom] - expected).max() < 0.02


@pytest.mark.slow
def test_the_slice_of_the_unet_is_ranked_by_its_weights(tmp_path):
    of = example("feature_maps")
    found = of.show_slice(tmp_path, index=7)
    a, g = caught(of.build_unet(), found.layer, of.draw_volume(), lambda out: out[:, 1].sum())
    assert np.allclose(found.values, a[0, :, 7].numpy(), atol=1e-6)
    weights = g.mean((2, 3, 4))[0].numpy()
    assert np.allclose(found.weights, weights, rtol=1e-4, atol=1e-7)
    names = [file.name for file in sorted((tmp_path / "unet").glob("rank_*.png"))]
    order = np.argsort(-weights)
    assert names == [f"rank_{r:03d}_channel_{c:03d}.png" for r, c in enumerate(order)]


# ---------------------------------------------------------------- the original recipe


@pytest.mark.slow
def test_the_recipe_is_the_same_by_hand(tmp_path):
    of = example("original_recipe")
    assert of.main(tmp_path) < 1e-5
    torch.manual_seed(6)
    network, x = of.Network().eval(), of.draw_scan()
    maps, fused = of.by_hand(network, x)
    assert float(fused.min()) == 0
    assert float(fused.max()) == pytest.approx(1, abs=1e-5)
    assert [tuple(map_.shape) for map_ in maps] == [(1, 20, 24, 24), (1, 20, 48, 48)]

    image = nib.load(tmp_path / "cam.nii.gz")
    assert np.abs(image.get_fdata() - fused[0].numpy()).max() < 1e-5
    assert np.allclose(image.affine, of.AFFINE)
    scan = nib.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(scan.get_fdata(dtype=np.float32), x[0, 0].numpy())

    # One weight per channel alone, or one class alone, is another map: the comparison sees it.
    layers = ["encoder[0]", "decoder"]
    view = {"scale": "minmax", "per_layer": True}
    pooled = GradCAM(network, layers, output=0)(x).volume(**view)
    assert of.largest_difference(pooled, fused) > 1e-3
    of_class = SliceGradCAM(network, layers, output=0)(x, ClassLogit(0, region="volume"))
    assert of.largest_difference(of_class.volume(**view), fused) > 1e-2


# ---------------------------------------------------------------- the shortcut


@pytest.mark.slow
def test_the_shortcut_looks_fine_and_is_exposed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*commands()["shortcut.py"][1:], "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "shortcut.py"), run_name="__main__")
    of, printed = example("shortcut"), capsys.readouterr().out
    assert str(tmp_path / "shortcut.png") in printed
    assert "points outside the mask at something the prediction depends on" in printed
    found = of.validate(of.PROBLEMS["shortcut"].load())
    assert found["own"] > 0.9
    assert found["painted"] < 0.1
    assert found["added"] > 0.8
    picture = pixels(tmp_path / "shortcut.png")
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture.std() > 0.1
