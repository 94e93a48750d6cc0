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
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from scipy.interpolate import CubicSpline
from scipy.special import expit, log_softmax, logsumexp

from seg3dcam.checks import check_whole_number
from seg3dcam.errors import ConfigError, EvaluationError, Seg3dcamError, TargetError
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.explaining.placement import place_scan
from seg3dcam.explaining.reliability import Reliability, near_masks, reliability
from seg3dcam.geometry import spacing_of
from seg3dcam.models.seg_model import SegModel
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_labels, load_scan
from seg3dcam.targets.ground_truth import check_on_grid, truth_mask

#: Of each case at most so many voxels are drawn at random, and so many numbers are kept.
MOST_VOXELS, MOST_NUMBERS = 200_000, 4_000_000

#: Temperatures are looked for between these. One at an end mends nothing.
COLDEST, HOTTEST = 0.05, 20.0

#: Logarithms of the temperatures at which losses are taken; between them they are smooth.
_LOGS = np.linspace(math.log(COLDEST), math.log(HOTTEST), 61)


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the probabilities of the cases that it was fitted on.

    Attributes:
        temperature: what logits are divided by. Above 1 the network was too sure.
        before, after: class -> reliability at temperature 1 and at this one, near the class.
        held_out: class -> reliability of every case at the temperature that the other cases give,
            which says what a new case may expect; empty with one case.
        loss_before, loss_after: the mean negative log-likelihood of a voxel.
        loss_held_out: the same, of every case at the temperature that the other cases give; with
            one case None.
        target, labels: as they were given.
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
    loss_held_out: float | None
    target: str | None
    labels: tuple[int, ...]
    cases: int
    left_out: tuple[int, ...]
    voxels: int

    @property
    def at_an_end(self) -> bool:
        """Whether no temperature that was tried is best, so that none should be used."""
        return not COLDEST * 1.02 < self.temperature < HOTTEST / 1.02

    @property
    def helps(self) -> bool:
        """Whether the truths are likelier by it, also those of cases that it was not fitted on."""
        found = self.loss_after if self.loss_held_out is None else self.loss_held_out
        return found < self.loss_before * (1 - 1e-3)

    @property
    def worse(self) -> list[str]:
        """The classes whose calibration error grows all the same."""
        then = self.held_out or self.after
        return [name for name, one in self.before.items() if then[name].ece > one.ece]


def calibrate(
    cases: Iterable[tuple[Any, Scan | str | Path]],
    model: SegModel,
    target: str | int | None = None,
    *,
    label: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the temperature at which a network's probabilities are likeliest to be true.

    Voxels near the true and the predicted classes count, see `near_masks`, as far as they lie in
    the scan. Give cases that the network was not trained on: of its training cases it is surer.

    Args:
        cases: pairs of a scan, as `load_scan` takes it, and its label map on the scan's grid, as
            `load_labels` reads it.
        model: the network. Its own temperature is left aside.
        target: the class whose probability is to be true; None for all classes together, which
            needs labels that are the classes' indices.
        label: the label in the truths of the class that `target` names, or all labels that make it
            up; None for what `truth_mask` takes.
        names: of the cases, for errors; None for their numbers.
        seed: of the voxels that are drawn, where a case has many.
        progress: called with (step, done, total).

    Raises:
        EvaluationError: no case has a voxel of a class, in truth or prediction; logits that are not
            finite.
        TargetError: a truth on another grid or with other labels; a network whose classes overlap
            and no target.
        ConfigError: a label and no target.
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
    labels = () if label is None else (label,) if isinstance(label, int) else tuple(label)
    if labels and target is None:
        raise ConfigError("label is that of one class: name the class with target")
    if model.class_names:
        _classes(
            model, len(model.class_names), target
        )  # what is wrong with them is no case's fault
    random = np.random.default_rng(seed)
    drawn: list[_Voxels] = []
    left_out = []
    for number, (given, truth) in enumerate(cases):
        (progress or silent)("cases", number, max(number + 1, len(names or ())))
        try:
            voxels = _of_case(given, truth, model, target, labels, random)
        except Seg3dcamError as error:
            name = names[number] if names else f"case {number + 1}"
            raise type(error)(f"{name}: {error}") from error
        if voxels is None:
            left_out.append(number)
        else:
            drawn.append(voxels)
    _check_found(drawn, labels)
    losses = np.array([one.losses() for one in drawn])
    total = losses.sum(0)
    temperature = _likeliest(total)
    others = [_likeliest(total - own) for own in losses] if len(drawn) > 1 else []
    before = _pooled(model, drawn, [1.0] * len(drawn))
    return Calibration(
        temperature=temperature,
        before=before,
        after=_pooled(model, drawn, [temperature] * len(drawn)),
        held_out=_pooled(model, drawn, others) if others else {},
        loss_before=_loss(drawn, [1.0] * len(drawn)),
        loss_after=_loss(drawn, [temperature] * len(drawn)),
        loss_held_out=_loss(drawn, others) if others else None,
        target=None if target is None else next(iter(before)),
        labels=labels,
        cases=len(drawn),
        left_out=tuple(left_out),
        voxels=sum(len(one.logits) for one in drawn),
    )


@dataclass(frozen=True)
class _Voxels:
    """Voxels that were drawn from one case.

    Attributes:
        logits: (N, K) float32.
        there: class -> whether each voxel is of it, (N,) bool; of all classes that count.
        near: class -> whether each voxel is near it, (N,) bool.
        overlapping: whether every channel is a probability by itself (sigmoid).
    """

    logits: NDArray[np.float32]
    there: dict[int, NDArray[np.bool_]]
    near: dict[int, NDArray[np.bool_]]
    overlapping: bool

    def log_odds(self, index: int, temperature: float) -> NDArray[np.float64]:
        """Return the logarithm of p / (1 - p) of a class in every voxel, (N,)."""
        cooled = self.logits.astype(np.float64) / temperature
        own: NDArray[np.float64] = cooled[:, index]
        return own if self.overlapping else own - logsumexp(np.delete(cooled, index, 1), axis=1)

    def reliability(self, index: int, temperature: float) -> Reliability:
        """Return how true the probabilities of a class are, near the class."""
        probability = expit(self.log_odds(index, temperature))
        return reliability(probability, self.there[index], self.near[index])

    def loss(self, temperature: float) -> float:
        """Return the sum over all voxels of the negative log-likelihood of the truth."""
        if len(self.there) == 1:
            ((index, there),) = self.there.items()
            against = np.where(there, -1, 1) * self.log_odds(index, temperature)
            return float(np.logaddexp(0, against).sum())
        likelihood = log_softmax(self.logits.astype(np.float64) / temperature, axis=1)
        labels = sum(index * there for index, there in self.there.items())
        return -float(likelihood[np.arange(len(likelihood)), labels].sum())

    def losses(self) -> list[float]:
        """Return the loss at every temperature that is tried."""
        return [self.loss(math.exp(log)) for log in _LOGS]


def _of_case(
    given: Any,
    truth: Scan | str | Path,
    model: SegModel,
    target: str | int | None,
    labels: Sequence[int],
    random: np.random.Generator,
) -> _Voxels | None:
    """Return voxels of a case near its masks; None where there are none."""
    scan = load_scan(given)
    true = truth if isinstance(truth, Scan) else load_labels(truth, frame=scan.frame)
    check_on_grid("truth", true.shape, true.affine, scan)
    placement = place_scan(scan, model, silent)
    on_network = placement.mask_to_network(true)
    inside = placement.mask_to_network(replace(true, data=torch.ones_like(true.data))).bool()
    run = Rerun(
        model.module,
        placement.network_input,
        sliding_window=model.window,
        output=model.output,
        kept_gb=0,
    )
    model.check_logits(run.logits)
    logits = run.logits[0].float().cpu()
    if not torch.isfinite(logits).all():
        raise EvaluationError("the network's output is not finite, so it gives no probabilities")
    spacing = spacing_of(placement.affine)
    there, near = {}, {}
    for index in _classes(model, len(logits), target):
        there[index] = _true_mask(on_network, labels, index, model, len(logits))
        drawn = _is_drawn(logits, index, model)
        near[index] = near_masks([there[index], drawn], spacing) & inside.numpy()
    chosen = np.flatnonzero(np.logical_or.reduce(list(near.values())))
    most = min(MOST_VOXELS, MOST_NUMBERS // len(logits))
    if len(chosen) > most:
        chosen = np.sort(random.choice(chosen, most, replace=False))
    if not len(chosen):
        return None
    return _Voxels(
        logits.flatten(1)[:, chosen].numpy().T,
        {index: mask.flatten()[chosen].numpy() for index, mask in there.items()},
        {index: region.ravel()[chosen] for index, region in near.items()},
        _overlapping(model, len(logits)),
    )


def _true_mask(
    on_network: torch.Tensor, labels: Sequence[int], index: int, model: SegModel, count: int
) -> torch.Tensor:
    """Return where a class really is, (*S) bool; a case may have none of the labels given."""
    if labels:
        return torch.isin(on_network, torch.tensor(labels, dtype=on_network.dtype))
    names = [model.class_name(number) for number in range(count)]
    background = not _overlapping(model, count)
    return truth_mask(on_network, None, class_index=index, class_names=names, background=background)


def _is_drawn(logits: torch.Tensor, index: int, model: SegModel) -> torch.Tensor:
    overlapping = _overlapping(model, len(logits))
    return logits[index] > 0 if overlapping else logits.argmax(0) == index


def _overlapping(model: SegModel, count: int) -> bool:
    return model.activation == "sigmoid" or count == 1


def _classes(model: SegModel, count: int, target: str | int | None) -> Sequence[int]:
    """Return the indices of the classes that count, of so many."""
    if target is not None:
        index = model.class_index(target)
        if not 0 <= index < count:
            raise TargetError(f"class {index} does not exist; the classes are 0 to {count - 1}")
        return [index]
    if not _overlapping(model, count):
        return range(1, count)
    if count > 1:
        listed = ", ".join(f"{index} {model.class_name(index)}" for index in range(count))
        raise TargetError(
            "the classes of this network overlap, and one label map cannot hold them all: name one "
            f"with target, and with label all labels of the truths that make it up, of {listed}"
        )
    return [0]


def _check_found(drawn: Sequence[_Voxels], labels: Sequence[int]) -> None:
    """Raise an error unless there is something to fit."""
    if not drawn:
        raise EvaluationError(
            "no case has a voxel of the class, in its truth or its prediction: a temperature is "
            "fitted where there is something to segment"
        )
    if labels and not any(there.any() for one in drawn for there in one.there.values()):
        raise TargetError(f"no truth has a voxel of label {', '.join(map(str, labels))}")


def _likeliest(losses: NDArray[np.float64]) -> float:
    """Return the temperature at which a curve of losses is lowest."""
    curve, best = CubicSpline(_LOGS, losses), int(losses.argmin())
    around = _LOGS[max(0, best - 1)], _LOGS[min(len(_LOGS) - 1, best + 1)]
    found = optimize.minimize_scalar(
        curve, bounds=around, method="bounded", options={"xatol": 1e-6}
    )
    return math.exp(float(found.x))


def _loss(drawn: Sequence[_Voxels], temperatures: Sequence[float]) -> float:
    """Return the mean loss of a voxel, with a temperature for each case."""
    pairs = zip(drawn, temperatures, strict=True)
    return sum(one.loss(t) for one, t in pairs) / sum(len(one.logits) for one in drawn)


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
