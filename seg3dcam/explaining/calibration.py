"""Make a network's probabilities true: one temperature for all logits, fitted on cases with truths.

    found = calibrate([("ct_1.nii.gz", "truth_1.nii.gz"), ...], model)
    found.temperature                                # 1.6: the network is too sure
    replace(model, temperature=found.temperature)    # or `temperature: 1.6` in the model's YAML

A temperature changes no mask and no map. It changes probabilities, and with them confidence,
entropy and expected calibration error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit, log_softmax, logsumexp

from seg3dcam.checks import check_whole_number
from seg3dcam.errors import EvaluationError, Seg3dcamError, TargetError
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.explaining.placement import place_scan
from seg3dcam.explaining.reliability import Reliability, near_masks, reliability
from seg3dcam.geometry import spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_labels, load_scan
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask

#: Of each case at most so many voxels are kept, drawn at random.
MOST_VOXELS = 200_000

#: Temperatures are looked for between these. One at an end mends nothing.
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the probabilities of the cases that it was fitted on.

    Attributes:
        temperature: what logits are divided by. Above 1 the network was too sure.
        before, after: class -> reliability at temperature 1 and at this one.
        held_out: class -> reliability of every case at the temperature that the other cases give,
            which says what a new case may expect; empty with one case.
        loss_before, loss_after: the mean negative log-likelihood of a voxel.
        cases: how many cases counted.
        left_out: the numbers of the cases in which neither truth nor prediction has a voxel.
        voxels: how many voxels counted.
    """

    temperature: float
    before: dict[str, Reliability]
    after: dict[str, Reliability]
    held_out: dict[str, Reliability]
    loss_before: float
    loss_after: float
    cases: int
    left_out: tuple[int, ...]
    voxels: int

    @property
    def at_an_end(self) -> bool:
        """Whether no temperature that was tried is best, so that none should be used."""
        return not COLDEST * 1.01 < self.temperature < HOTTEST / 1.01


def calibrate(
    cases: Iterable[tuple[Any, Scan | str | Path]],
    model: SegModel,
    target: str | int | None = None,
    *,
    label: int | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the temperature at which a network's probabilities are likeliest to be true.

    Voxels near the true and the predicted classes count, see `near_masks`.

    Args:
        cases: pairs of a scan, as `load_scan` takes it, and its label map on the scan's grid, as
            `load_labels` reads it.
        model: the network. Its own temperature is left aside.
        target: the class whose probability is to be true; None for all classes together, which
            needs labels that are the classes' indices.
        label: the class's label in the truths; None for what `truth_mask` takes.
        names: of the cases, for errors; None for their numbers.
        seed: of the voxels that are drawn, where a case has many.
        progress: called with (step, done, total).

    Raises:
        EvaluationError: no case has a voxel of a class, in truth or prediction.
        TargetError: a truth on another grid or with other labels; a network whose classes overlap
            and no target.
        ScanError, ModelError: as `explain`.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = nn.Conv3d(1, 2, 1)
        >>> network.weight.data[:] = torch.tensor([-4.0, 4.0]).reshape(2, 1, 1, 1, 1)
        >>> network.bias.data[:] = 0
        >>> truth = np.zeros((12, 12, 12), np.uint8)
        >>> truth[:6] = 1
        >>> image = np.where(truth, 1.0, -1.0)
        >>> image[:6, :6, :6] = -1.0  # a quarter of the class looks like background
        >>> place = {"affine": np.eye(4)}
        >>> case = load_scan(image, **place), load_scan(truth, **place)
        >>> found = calibrate([case], SegModel(network, class_names=["none", "all"]))
        >>> round(found.temperature, 1), found.after["all"].ece < found.before["all"].ece
        (4.1, True)
    """
    check_whole_number("seed", seed, least=0)
    random = np.random.default_rng(seed)
    drawn: list[_Voxels] = []
    left_out = []
    for number, (given, truth) in enumerate(cases):
        (progress or silent)("cases", number, max(number + 1, len(names or ())))
        try:
            scan = load_scan(given)
            labels = truth if isinstance(truth, Scan) else load_labels(truth, frame=scan.frame)
            voxels = _of_case(scan, labels, model, target, label, random)
        except Seg3dcamError as error:
            name = names[number] if names else f"case {number + 1}"
            raise type(error)(f"{name}: {error}") from error
        if voxels is None:
            left_out.append(number)
        else:
            drawn.append(voxels)
    if not drawn:
        raise EvaluationError(
            "no case has a voxel of the class, in its truth or its prediction: a temperature is "
            "fitted where there is something to segment"
        )
    temperature = _fitted(drawn)
    count = len(drawn)
    of_others = [_fitted([*drawn[:n], *drawn[n + 1 :]]) for n in range(count)] if count > 1 else []
    return Calibration(
        temperature,
        _pooled(model, drawn, [1.0] * count),
        _pooled(model, drawn, [temperature] * count),
        _pooled(model, drawn, of_others) if of_others else {},
        _loss(drawn, 1.0),
        _loss(drawn, temperature),
        count,
        tuple(left_out),
        sum(len(one.logits) for one in drawn),
    )


@dataclass(frozen=True)
class _Voxels:
    """Voxels that were drawn from one case.

    Attributes:
        logits: (N, K) float64.
        there: class -> whether each voxel is of it, (N,) bool; of all classes that count.
        overlapping: whether every channel is a probability by itself (sigmoid).
    """

    logits: NDArray[np.float64]
    there: dict[int, NDArray[np.bool_]]
    overlapping: bool

    def log_odds(self, index: int, temperature: float) -> NDArray[np.float64]:
        """Return the logarithm of p / (1 - p) of a class in every voxel, (N,)."""
        cooled = self.logits / temperature
        own: NDArray[np.float64] = cooled[:, index]
        return own if self.overlapping else own - logsumexp(np.delete(cooled, index, 1), axis=1)

    def reliability(self, index: int, temperature: float) -> Reliability:
        """Return how true the probabilities of a class are."""
        return reliability(expit(self.log_odds(index, temperature)), self.there[index])

    def loss(self, temperature: float) -> float:
        """Return the sum over all voxels of the negative log-likelihood of the truth."""
        if len(self.there) == 1:
            ((index, there),) = self.there.items()
            against = np.where(there, -1, 1) * self.log_odds(index, temperature)
            return float(np.logaddexp(0, against).sum())
        likelihood = log_softmax(self.logits / temperature, axis=1)
        labels = sum(index * there for index, there in self.there.items())
        return -float(likelihood[np.arange(len(likelihood)), labels].sum())


def _of_case(
    scan: Scan,
    truth: Scan,
    model: SegModel,
    target: str | int | None,
    label: int | None,
    random: np.random.Generator,
) -> _Voxels | None:
    """Return voxels of a case near its masks; None where there are none."""
    placement = place_scan(scan, model, silent)
    check_on_grid("truth", truth.shape, truth.affine, scan)
    labels = placement.mask_to_network(truth)
    run = Rerun(
        model.module,
        placement.network_input,
        sliding_window=model.window,
        output=model.output,
        kept_gb=0,
    )
    model.check_logits(run.logits)
    logits = run.logits[0].float().cpu()
    overlapping = model.activation == "sigmoid" or len(logits) == 1
    classes = _classes(model, len(logits), overlapping, target)
    names = [model.class_name(index) for index in range(len(logits))]
    there = {
        index: truth_mask(
            labels, label, class_index=index, class_names=names, background=not overlapping
        )
        for index in classes
    }
    best = None if overlapping else logits.argmax(0)
    drawn = [logits[index] > 0 if best is None else best == index for index in classes]
    region = near_masks([*there.values(), *drawn], spacing_of(placement.affine)).ravel()
    chosen = np.flatnonzero(region)
    if len(chosen) > MOST_VOXELS:
        chosen = np.sort(random.choice(chosen, MOST_VOXELS, replace=False))
    if not len(chosen):
        return None
    return _Voxels(
        logits.flatten(1)[:, chosen].numpy().T.astype(np.float64),
        {index: mask.flatten()[chosen].numpy() for index, mask in there.items()},
        overlapping,
    )


def _classes(
    model: SegModel, count: int, overlapping: bool, target: str | int | None
) -> Sequence[int]:
    """Return the indices of the classes that count."""
    if target is not None:
        return [model.class_index(target)]
    if not overlapping:
        return range(1, count)
    if count > 1:
        listed = ", ".join(f"{index} {model.class_name(index)}" for index in range(count))
        raise TargetError(
            "the classes of this network overlap, and one label map cannot hold them all: name one "
            f"with target, and its label in the truths with label, of {listed}"
        )
    return [0]


def _fitted(drawn: Sequence[_Voxels]) -> float:
    """Return the temperature of the smallest loss, over all voxels alike."""
    found = optimize.minimize_scalar(
        lambda log: _loss(drawn, math.exp(log)),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(float(found.x))


def _loss(drawn: Sequence[_Voxels], temperature: float) -> float:
    total = sum(one.loss(temperature) for one in drawn)
    return total / sum(len(one.logits) for one in drawn)


def _pooled(
    model: SegModel, drawn: Sequence[_Voxels], temperatures: Sequence[float]
) -> dict[str, Reliability]:
    """Return class -> reliability over all cases, each at a temperature of its own."""
    return {
        model.class_name(index): reduce(
            add,
            (
                one.reliability(index, temperature)
                for one, temperature in zip(drawn, temperatures, strict=True)
            ),
        )
        for index in drawn[0].there
    }
