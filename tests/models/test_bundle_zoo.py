"""Every volumetric segmentation bundle of MONAI's model zoo: its layout, and MONAI's own file."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers_bundles import random, run_by_monai, write_bundle, write_scan, write_weights
from helpers_zoo import LARGE, LAYOUTS, QUICK, REFUSED, WHOLE_BODY, Layout
from scipy import ndimage

from seg3dcam import explain, load_model, load_scan, suggest_layers
from seg3dcam.cams.attributions import Gradient
from seg3dcam.errors import ModelError, Seg3dcamWarning
from seg3dcam.targets import ClassLogit

#: Turned about two axes, flipped, and thick: voxel -> RAS mm.
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.1) @ np.diag([0.9, 1.1, 2.4]) @ np.diag([-1, 1, 1]),
    [12.0, -30.0, 55.0],
)


def noise(channels: int = 1, shape: tuple[int, ...] = (26, 30, 17)) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(channels, *shape))
    return ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.0)) * 500 + 60


def middle(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Return where the middle of a grid lies, in mm."""
    return nib.affines.apply_affine(affine, (np.asarray(shape) - 1) / 2)


def write(layout: Layout, root: Path, *, for_monai: bool = False) -> Path:
    """Write a bundle with random weights."""
    config = copy.deepcopy(layout.config)
    if for_monai:
        for argument in layout.dropped:
            del config["network_def"][argument]
    options = {"kind": layout.kind, "about": layout.about(), "scripts": layout.scripts}
    write_bundle(root, config, weights=False, **options)
    layout.prepare(root)
    built = {key: value for key, value in layout.for_monai.items() if "__" not in key}
    spaced = copy.deepcopy(config) | built
    for argument in layout.dropped:
        spaced["network_def"].pop(argument, None)
    if "dints_space" in spaced:
        spaced["dints_space"]["device"] = "cpu"
    write_weights(root / "models" / layout.weights, spaced, random)
    return root


@pytest.mark.few(2)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer .* (explains|shows) nothing")  # the network is random
@pytest.mark.filterwarnings("ignore:.*mostly (evidence )?against")
@pytest.mark.filterwarnings("ignore:where the voxels of layer .* lie could not be measured")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in LAYOUTS],
)
def test_the_prediction_is_the_file_that_monai_writes(name, tmp_path):
    layout = LAYOUTS[name]
    channels = noise(layout.scan_channels)
    files = [
        write_scan(tmp_path / f"scan{n}.nii.gz", channels[n : n + 1], OBLIQUE)
        for n in range(len(channels))
    ]
    data: dict[str, object] = {"image": [str(file) for file in files]}
    if len(layout.images) > 1:
        data = {key: str(file) for key, file in zip(layout.images, files, strict=True)}
        data["label"] = str(write_scan(tmp_path / "truth.nii.gz", channels[:1] > 60, OBLIQUE))
    reference = write(layout, tmp_path / "monai", for_monai=True)
    logits, written = run_by_monai(
        reference, data, layout.kind, run=layout.run, first="scan", **layout.for_monai
    )

    root = write(layout, tmp_path / "bundle")
    shutil.copytree(reference / "models", root / "models", dirs_exist_ok=True)
    keys = {"inputs": list(layout.images)} if len(layout.images) > 1 else {}
    load = lambda: load_model(f"bundle:{root}", trust=True, **keys)  # noqa: E731
    if layout.warns:
        with pytest.warns(Seg3dcamWarning, match=layout.warns):
            model = load()
    else:
        model = load()
    assert model.class_names == tuple(layout.names)
    scan = load_scan([str(file) for file in files])
    prepared = model.prepare(scan)
    gradient = Gradient(model.module, sliding_window=model.window, activation=model.activation)
    own = gradient(prepared.as_tensor()[None], ClassLogit(0, "volume")).logits[0]
    assert (own - logits).abs().max() < 1e-4
    gap = middle(prepared.shape[1:], prepared.affine.numpy()) - middle(scan.shape, scan.affine)
    assert np.linalg.norm(gap) < 4  # mm: it lies where the scan lies
    if name in LARGE:  # no layer is measured here, but there is one
        assert suggest_layers(model.module, (1, layout.channels, *model.window.roi_size))
        found = explain(scan, model, ClassLogit(0, "volume"), method="gradient")
    else:
        found = explain(scan, model, ClassLogit(0, "volume"))
    masks = found.prediction.numpy()
    values = np.asarray(written.dataobj)
    assert np.array_equal(layout.joined(masks), np.rint(values))
    assert any(0.01 < mask.mean() < 0.99 for mask in masks)  # something to compare
    assert np.allclose(written.affine, found.affine, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_explained_is_refused(name, tmp_path):
    config, scripts, message = REFUSED[name]
    layout = Layout(config, ["background", "one"])
    root = write_bundle(
        tmp_path / "b", config, about=layout.about(), scripts=scripts, weights=False
    )
    with pytest.raises(ModelError, match=message):
        load_model(f"bundle:{root}", trust=True)


@pytest.mark.parametrize("highres", [True, False], ids=["high", "low"])
def test_the_resolution_decides_on_the_weights(highres, tmp_path):
    layout = LAYOUTS["wholeBody_ct"]
    root = write(layout, tmp_path / "b")
    low = root / "models" / "model_lowres.pt"
    write_weights(low, WHOLE_BODY, lambda network: torch.nn.init.ones_(next(network.parameters())))
    model = load_model(
        f"bundle:{root}", trust=True, overrides={"displayable_configs#highres": highres}
    )
    wanted = torch.load(root / "models" / "model.pt" if highres else low)
    own = model.module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in wanted.items())
    assert model.spec["weights"] == f"models/{'model' if highres else 'model_lowres'}.pt"
    prepared = model.prepare(load_scan(noise()[0], affine=OBLIQUE))
    assert torch.allclose(prepared.pixdim, torch.full((3,), 1.5 if highres else 3.0).double())


def test_an_architecture_that_is_not_there_says_how_to_get_it(tmp_path):
    root = write(LAYOUTS["pancreas_ct_dints"], tmp_path / "b")
    (root / "models" / "search_code.pt").unlink()
    (root / "large_files.yml").write_text("large_files: [{path: models/search_code.pt}]")
    message = "network_def cannot be built: .*search_code.pt.*download_large_files"
    with pytest.raises(ModelError, match=message):
        load_model(f"bundle:{root}", trust=True)
