"""Score every method at every layer on volumes whose evidence is known."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.calls import each_by
from seg3dcam.cams.catalogue import ALL_METHODS
from seg3dcam.errors import EvaluationError
from seg3dcam.evaluate import localisation, mass_inside, randomisation
from seg3dcam.evaluate.baselines import baseline_of
from seg3dcam.evaluate.controls import input_alone, mask_alone, nearness, random_maps, rank_p_value
from seg3dcam.evaluate.segments import grid_blocks, grown, ordered, segments_outside
from seg3dcam.geometry import FeatureGrid

from .networks import LAYERS
from .problems import Problem
from .training import dice

#: Methods that are the same as another one on these networks of ReLUs.
SAME_AS = {"shapley_cam": "grad_cam", "grad_cam_elementwise": "layer_cam"}

#: KPCA-CAM is refused on finer grids.
COARSE = ("down_2", "down_3", "down_4", "upcat_4", "upcat_3")

MARGIN, BLOCK, STEPS, DRAWS = 2, 4, 25, 20


#: What passes has at most this p-value among random maps, and its area is smaller by this than that
#: of the mask and of nearness to it. A class that keeps this Dice needs nothing around it.
SIGNIFICANT, BETTER, NEEDS_NOTHING = 0.05, 0.05, 0.95

#: Inputs that go through the network together: on one thread of a CPU one by one takes four times
#: as long.
AT_ONCE = 8


@dataclass
class Score:
    """A method at a layer, on several volumes of a problem; one entry of a list for each volume.

    Attributes:
        areas: context deletion with the baseline "mean".
        blurred: the same with "blur"; None where the first area is no better than the mask's, so
            that the map cannot pass any more.
        passed: whether the map passes, as `seg3dcam.evaluate.context_evidence` decides it.
        inside: part of the map's positive mass in "evidence", "object" and "rival".
    """

    method: str
    layer: str
    areas: list[float] = field(default_factory=list)
    blurred: list[float | None] = field(default_factory=list)
    passed: list[bool] = field(default_factory=list)
    inside: list[dict[str, float]] = field(default_factory=list)

    @property
    def area(self) -> float:
        return statistics.median(self.areas)


class Field:
    """One volume of a problem, on which any number of maps is held against the same controls.

    Areas are those of `seg3dcam.evaluate.context_deletion`; the inputs of a curve go through the
    network together.

    Attributes:
        left: Dice of the class if everything around it is deleted.
        controls: name -> area.
    """

    def __init__(self, problem: Problem, network: nn.Module, seed: int) -> None:
        self.x, _, self.evidence = problem.volume(seed)
        self.rival = torch.from_numpy(problem.scene(seed).rival)
        self._network = copy.deepcopy(network).to(memory_format=torch.channels_last_3d)
        self._class = problem.class_index
        with torch.no_grad():
            self.mask = network(self.x).argmax(1)[0] == self._class
        self._blocks = grid_blocks(self.mask.shape, BLOCK)
        self._free = segments_outside(self._blocks, grown(self.mask.numpy(), MARGIN))
        self._counts = np.round(np.arange(STEPS + 1) * len(self._free) / STEPS).astype(int)
        self._all = self._places(torch.zeros(self.mask.shape))
        self.left = self._dices([(self._all, STEPS)], "mean")[0]
        named = {
            "the evidence itself": self.evidence.double(),
            "mask alone": mask_alone(self.mask),
            "nearness to the mask": nearness(self.mask),
            "input alone": input_alone(self.x),
        }
        self.controls = dict(zip(named, self.areas(list(named.values())), strict=True))
        self._random: dict[tuple[int, ...], list[float]] = {}

    def areas(self, maps: Sequence[torch.Tensor], baseline: str = "mean") -> list[float]:
        """Return the areas of context deletion by maps (*S), of whole curves."""
        fractions = self._counts / self._counts[-1]
        found = []
        for values in maps:
            places = self._places(values)
            heights = self._dices([(places, step) for step in range(1, STEPS + 1)], baseline)
            found.append(float(np.trapezoid([1.0, *heights], fractions)))
        return found

    def _places(self, values: torch.Tensor) -> torch.Tensor:
        """Return after how many others each voxel's block is deleted, (*S)."""
        order = ordered(values.double().numpy(), self._blocks, self._free, seed=0)
        rank = np.full(int(self._blocks.max()) + 1, len(order))
        rank[order] = np.arange(len(order))
        return torch.from_numpy(rank[self._blocks])

    def _dices(self, wanted: Sequence[tuple[torch.Tensor, int]], baseline: str) -> list[float]:
        """Return Dice with its first prediction at steps of curves."""
        replacement = baseline_of(baseline, self.x, 0)(self.mask)[0]
        found = []
        for first in range(0, len(wanted), AT_ONCE):
            changed = [
                torch.where(places < self._counts[step], replacement, self.x[0])
                for places, step in wanted[first : first + AT_ONCE]
            ]
            batch = torch.stack(changed).contiguous(memory_format=torch.channels_last_3d)
            with torch.no_grad():
                logits = self._network(batch)
            masks = (logits.argmax(1) == self._class).numpy()
            found += [dice(mask, self.mask.numpy()) for mask in masks]
        return found

    def random(self, grid: FeatureGrid) -> list[float]:
        """Return the areas of random maps of a layer's resolution; those of equal grids once."""
        if grid.shape not in self._random:
            drawn = random_maps(grid, tuple(self.mask.shape), draws=DRAWS, seed=0)
            self._random[grid.shape] = self.areas(list(drawn))
        return self._random[grid.shape]

    @property
    def random_areas(self) -> dict[str, list[float]]:
        """Shape of a layer's grid, in words -> the areas of random maps."""
        return {" x ".join(map(str, shape)): areas for shape, areas in self._random.items()}

    def judge(self, found: Sequence[tuple[Score, torch.Tensor, FeatureGrid]]) -> None:
        """Add to scores what their maps (*S) get on this volume."""
        rivals = min(self.controls["mask alone"], self.controls["nearness to the mask"])
        areas = self.areas([values for _, values, _ in found])
        hopeful = [
            number
            for number, area in enumerate(areas)
            if self.left < NEEDS_NOTHING and area < rivals - BETTER
        ]
        blurred = dict(
            zip(hopeful, self.areas([found[n][1] for n in hopeful], "blur"), strict=True)
        )
        regions = {"evidence": self.evidence, "object": self.mask, "rival": self.rival}
        for number, (score, values, grid) in enumerate(found):
            score.areas.append(areas[number])
            score.blurred.append(blurred.get(number))
            score.passed.append(
                number in blurred
                and blurred[number] < rivals - BETTER
                and rank_p_value(areas[number], self.random(grid)) <= SIGNIFICANT
            )
            positive = bool((values > 0).any())
            score.inside.append(mass_inside(values, regions) if positive else {})


#: Number of classes -> a network, which all problems of so many classes share.
_SHARED: dict[int, nn.Module] = {}


def loaded(problem: Problem) -> nn.Module:
    """Return a problem's network, in the module of the problem before if that fits.

    Where the voxels of the layers lie is measured once for a module, and takes longer than all of
    its maps. It does not depend on the weights.
    """
    network = _SHARED.setdefault(len(problem.classes), problem.load())
    network.load_state_dict(problem.load().state_dict())
    return network


def maps(
    network: nn.Module, x: torch.Tensor, class_index: int
) -> Iterator[tuple[str, str, torch.Tensor, FeatureGrid]]:
    """Yield method, layer, map (*S) and grid of every combination."""
    for key, method in ALL_METHODS.items():
        if key in SAME_AS:
            continue
        layers = COARSE if key == "kpca_cam" else LAYERS
        of_layers = method.formula.explains == "layers"
        cam = method(network, list(layers)) if of_layers else method(network)
        with warnings.catch_warnings():
            # What a map is worth is measured here; what a single call would say is not needed.
            warnings.simplefilter("ignore")
            ((result,),) = each_by([cam], x, [class_index])
        for layer, values in result.maps.items():
            yield cam.method, layer, values[0], result.layers[layer].grid


def scores(problem: Problem, seeds: Sequence[int]) -> tuple[list[Score], list[Field]]:
    """Return the score of every method at every layer, and the volumes that they come from."""
    network, fields = loaded(problem), []
    found: dict[tuple[str, str], Score] = {}
    for seed in seeds:
        here = Field(problem, network, seed)
        here.judge(
            [
                (found.setdefault((method, layer), Score(method, layer)), values, grid)
                for method, layer, values, grid in maps(network, here.x, problem.class_index)
            ]
        )
        fields.append(here)
        print(f"  {problem.name}: volume {seed}", flush=True)
    return list(found.values()), fields


# ------------------------------------------------------------------------------- the best of them


@dataclass
class Details:
    """What is looked at for a few scores only; one entry of a list for each volume.

    Attributes:
        pointing: whether the highest voxel lies in the evidence.
        roc_auc: the chance that a voxel of the evidence has a higher value than another one; a
            random map gets 0.5.
        randomised: the figure that decides the check of randomisation on the first volume, and
            whether the map passes it; None where it was not asked for.
    """

    pointing: list[float] = field(default_factory=list)
    roc_auc: list[float] = field(default_factory=list)
    randomised: tuple[float, bool] | None = None


def details(
    problem: Problem,
    fields: Sequence[Field],
    scores: Sequence[Score],
    randomised: Collection[tuple[str, str]],
) -> list[Details]:
    """Return what else is known of a few scores; of some of them how they fare randomised."""
    network, found = loaded(problem), []
    for score in scores:
        cam, of = _cam(network, score), Details()
        for number, here in enumerate(fields):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = cam(here.x, problem.class_index)
                (values,) = result.maps.values()
                try:
                    if number == 0 and (score.method, score.layer) in randomised:
                        check = randomisation(cam, here.x, problem.class_index, stages=4)
                        of.randomised = check.worst, check.passed
                    place = localisation(values[0], here.evidence, draws=1)
                except EvaluationError:
                    continue  # a constant map lies nowhere
            of.pointing.append(place.pointing.value)
            of.roc_auc.append(place.roc_auc.value)
        found.append(of)
    return found


def _cam(network: nn.Module, score: Score) -> BaseCAM:
    cam = ALL_METHODS[score.method]
    return cam(network) if score.layer == "input" else cam(network, score.layer)
