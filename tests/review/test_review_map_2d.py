"""The map of a 2D network as a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_review import read, written_words
from torch import nn

from seg3dcam import GradCAM, targets
from seg3dcam.errors import ConfigError, InputError
from seg3dcam.review.look import Look
from seg3dcam.review.pictures.map_2d import save_map

TARGET = targets.ClassLogit(0, "volume")


def bright_network(axes: int = 2) -> nn.Module:
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
    network = nn.Sequential(kind(1, 2, 1, bias=False))
    nn.init.ones_(network[0].weight)
    return network


def spot(row: int, column: int) -> torch.Tensor:
    """An image (1, 40, 60) that is bright around one pixel."""
    image = torch.full((1, 40, 60), 0.1)
    image[0, row - 2 : row + 3, column - 2 : column + 3] = 1
    return image


@pytest.fixture
def x() -> torch.Tensor:
    return torch.stack([spot(8, 50), spot(30, 10)])


@pytest.fixture
def result(x):
    return GradCAM(bright_network(), "0")(x, TARGET)


@pytest.mark.parametrize(("item", "row", "column"), [(0, 8, 50), (1, 30, 10)])
def test_the_item_asked_for_is_drawn_where_it_is_in_the_array(result, item, row, column, tmp_path):
    """Rows down, columns to the right: 400 pixels for 40 rows, behind a margin."""
    picture = read(result.save(tmp_path / "cam.png", item=item)).astype(float)
    heat = picture[24:424, 24:624].sum(2)
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y / 10 - (row + 0.5)) < 3
    assert abs(x / 10 - (column + 0.5)) < 3
    assert heat[5, 300] < heat.max() / 2


def test_over_its_input(result, x, tmp_path):
    with written_words() as words:
        picture = read(save_map(tmp_path / "new" / "cam.png", result, x, item=1)).astype(int)
    grey, overlay = picture[24:424, 24:624], picture[24:424, 630:1230]
    assert np.ptp(grey, axis=2).max() == 0
    colour = np.ptp(overlay, axis=2) > 40
    y, x = np.nonzero(colour)
    assert (round(y.mean() / 10 - 0.5), round(x.mean() / 10 - 0.5)) == (30, 10)
    said = " ".join(words)
    assert "logit of class 0" in said
    assert "grad_cam" in said
    assert "layer and status: 0: ok" in said


def test_both_signs_have_their_colours(x, tmp_path):
    network = bright_network()
    with torch.no_grad():
        network[0].weight[0] = -1
    # All evidence speaks against: the usual view has nothing to draw, and says so.
    with pytest.warns(match="all evidence speaks against"):
        result = GradCAM(network, "0")(x[:1], TARGET)
    with written_words() as words:
        result.save(tmp_path / "usual.png")
    assert "no CAM: the map is zero or not usable" in " ".join(words)
    blue = read(result.save(tmp_path / "signed.png", scale="signed"))[24:424, 24:624].astype(int)
    assert (blue[..., 0] - blue[..., 2]).max() > 100
    save_map(tmp_path / "look.png", result, x[:1], look=Look(signed=True))


def test_one_of_several_items_must_be_chosen(result, tmp_path):
    for save in (result.save, lambda path: save_map(path, result)):
        with pytest.raises(
            InputError, match=r"2 items, and a file holds one: .*item=0\), up to item=1"
        ):
            save(tmp_path / "cam.png")
    with pytest.raises(InputError, match="item 2 of the batch: legal are 0 to 1"):
        result.save(tmp_path / "cam.png", item=2)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(result, x, tmp_path):
    with pytest.raises(ConfigError, match=r"2D map's path must end in \.png, not 'cam\.nii\.gz'"):
        result.save(tmp_path / "cam.nii.gz", item=0)
    with pytest.raises(InputError, match=r"not the one that was explained: \(2, C, 40, 60\)"):
        save_map(tmp_path / "cam.png", result, x[..., 1:], item=0)
    volume = GradCAM(bright_network(3), "0")(torch.rand(1, 1, 4, 4, 4), TARGET)
    with pytest.raises(InputError, match="a map of 3 axes is no picture"):
        save_map(tmp_path / "cam.png", volume)


@pytest.mark.parametrize("shape", [(3, 5), (1, 40), (1500, 20)], ids=str)
def test_any_shape_can_be_looked_at(shape, tmp_path):
    result = GradCAM(bright_network(), "0")(torch.rand(1, 1, *shape), TARGET)
    picture = read(result.save(tmp_path / "cam.png"))
    assert min(picture.shape[:2]) > 100
    assert max(picture.shape[:2]) < 1700


def test_a_volume_of_several_items_is_not_saved_as_its_first(tmp_path):
    result = GradCAM(bright_network(3), "0")(torch.rand(3, 1, 4, 5, 6), TARGET)
    with pytest.raises(InputError, match="3 items, and a file holds one"):
        result.save(tmp_path / "cam.nii.gz", affine=np.eye(4))
    assert result.save(tmp_path / "cam.nii.gz", affine=np.eye(4), item=2).is_file()
