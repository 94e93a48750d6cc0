"""Does a map depend on what the network has learnt, on the class, and on the input alone?

Each check answers with a `Check`: figures, the limit that they are held against, and whether the
map passes. The target's voxels are those of the first prediction in every check, so that maps
differ by the network, the class or the input, and not because another mask is explained.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from seg3dcam.cams.base import BaseCAM
from seg3dcam.cams.result import CamResult
from seg3dcam.checks import check_number, check_whole_number
from seg3dcam.engine.head_check import modules_from_the_end, randomised, rank_correlation
from seg3dcam.errors import EvaluationError, InputError, ModelError, Seg3dcamWarning
from seg3dcam.network.capture import capturing
from seg3dcam.network.facts import take_over
from seg3dcam.network.layers import moved_to
from seg3dcam.targets import ClassLogOdds, as_target, fixed, name_of
from seg3dcam.targets.regions import Prediction
from seg3dcam.windows import plan_windows

#: A map whose ranks correlate by more than this with that of a random network shows the
#: architecture and the input, and little of what was learnt.
RANDOMISED = 0.7

#: A map whose ranks correlate by more than this with that of a network in which everything behind
#: the layer is random, and nothing before it, depends on the layer's activations alone.
UNMOVED = 0.99

#: So many draws of random weights are looked at before a map fails.
DRAWS = 3

#: Maps of two classes over the same voxels whose ranks correlate by more than this are one map.
OTHER_CLASS = 0.95

#: A map may change by this fraction of its length while the prediction stays the same.
UNSTABLE = 0.5

#: The prediction counts as the same from this Dice up.
SAME_PREDICTION = 0.95


@dataclass(frozen=True)
class Check:
    """The result of a sanity check.

    Attributes:
        stages: what was changed for each figure.
        spearman: correlation of the ranks of the map's values with those of the first map, on the
            layer's own grid; 0 for a map that is constant.
        ssim: structural similarity of the two maps as they are drawn, on the input's grid; None
            where a volume is too small for it.
        worst: the figure that decides.
        limit: the largest figure with which a map passes.
        why: in words.
    """

    stages: tuple[str, ...]
    spearman: tuple[float, ...]
    ssim: tuple[float | None, ...]
    worst: float
    limit: float
    why: str

    @property
    def passed(self) -> bool:
        return self.worst <= self.limit


def randomisation(
    cam: BaseCAM, x: torch.Tensor, target: Any, *, stages: int = 8, seed: int = 0
) -> Check:
    """Randomise the weights of the network from its head to its input, and compare the maps.

    A map of what the network has learnt gets lost on the way. One that stays shows the architecture
    or the input, such as an edge detector does. A copy of the network is changed; its parameters
    are drawn from normal distributions with their own means and standard deviations.

    There are two ways to fail. The map of a network that is random altogether is still much the
    same. Or the map stays as it is while everything behind its layer is random: then it shows what
    the layer responds to, whatever the network makes of it.

    Args:
        cam: a method, with its network and one target layer.
        x: (1, C, *S).
        target: what is explained, as for a call of `cam`.
        stages: the network's modules are randomised in so many steps.
        seed: of the random weights.

    Raises:
        EvaluationError: the network cannot be copied, or the map is constant to begin with.
        InputError: there is more than one target layer, or input.

    Source: Adebayo et al., Sanity checks for saliency maps (NeurIPS 2018), cascading randomisation.
    """
    check_whole_number("stages", stages)
    original, at_first = _first_map(cam, x, target)
    found = _randomised_once(cam, x, original, at_first, stages, seed)
    # A map of few features may come out alike by chance, or turned over: then others differ.
    for draw in range(1, DRAWS):
        if not found.passed:
            again = _randomised_once(cam, x, original, at_first, stages, seed + draw)
            found = min(found, again, key=lambda check: check.worst)
    return found


def _randomised_once(
    cam: BaseCAM, x: torch.Tensor, original: CamResult, at_first: Any, stages: int, seed: int
) -> Check:
    """Return the check by one draw of random weights."""
    changed = _copied(cam)
    networks = list({id(member.network): member.network for member in changed.members}.values())
    from_the_head, behind = _names_from_the_head(changed, x)
    groups = _groups(from_the_head, stages)
    found, names = [], []
    generator = torch.Generator("cpu").manual_seed(seed)
    for group in groups:
        for network in networks:
            modules = dict(network.named_modules())
            for name in group:
                _randomise(modules[name], generator)
        with warnings.catch_warnings():
            # What is said of maps of random networks is not for the user.
            warnings.simplefilter("ignore", Seg3dcamWarning)
            found.append(_similarity(original, changed(x, at_first)))
        names.append(f"down to {group[-1] or 'the network itself'}")
    spearman, ssim = zip(*found, strict=True)
    worst = spearman[-1]
    why = f"with all weights random, ranks correlate by {worst:.2f}"
    ends = itertools.accumulate(len(group) for group in groups)
    of_behind = [figure for figure, end in zip(spearman, ends, strict=True) if end <= behind]
    if of_behind and of_behind[-1] > max(worst, UNMOVED):
        worst = of_behind[-1]
        why = (
            f"with all weights behind the layer random, ranks still correlate by {worst:.2f}: the "
            "map shows what the layer responds to, whatever the network makes of it"
        )
    return Check(tuple(names), spearman, ssim, worst, RANDOMISED, why)


def class_sensitivity(
    cam: BaseCAM, x: torch.Tensor, class_index: int, *, others: Sequence[int] | None = None
) -> Check:
    """Compare the map of a class with those of other classes, over the same voxels.

    A method that does not look at the class gives one map for all. The opposite map for another
    class, as for the only other one of a softmax, depends on the class by its sign, and passes.

    Args:
        cam, x: as for `randomisation`.
        class_index: the class; the voxels are those where it is predicted.
        others: the classes to compare with, None for all others.

    Raises:
        EvaluationError: there is no other class.
    """
    target = ClassLogOdds(class_index)
    original, at_first = _first_map(cam, x, target)
    classes = range(original.logits.shape[1]) if others is None else others
    rivals = [index for index in classes if index != class_index]
    if not rivals:
        raise EvaluationError("undefined: the network has one class, and none to compare it with")
    region = at_first.regions(original.logits)
    with warnings.catch_warnings():
        # What is said of the maps of other classes is not for the user.
        warnings.simplefilter("ignore", Seg3dcamWarning)
        found = [
            _similarity(original, cam(x, ClassLogOdds(index, region, activation=cam.activation)))
            for index in rivals
        ]
    spearman, ssim = zip(*found, strict=True)
    worst = max(range(len(rivals)), key=lambda number: spearman[number])
    return Check(
        tuple(f"class {index}" for index in rivals),
        spearman,
        ssim,
        spearman[worst],
        OTHER_CLASS,
        f"ranks correlate by {spearman[worst]:.2f} with the map of class {rivals[worst]} over the "
        "same voxels",
    )


def stability(
    cam: BaseCAM,
    x: torch.Tensor,
    class_index: int,
    *,
    noise: float = 0.01,
    draws: int = 5,
    seed: int = 0,
) -> Check:
    """Add noise to the input and compare the maps of inputs whose prediction stays the same.

    Args:
        cam, x, class_index: as for `class_sensitivity`.
        noise: standard deviation, as a fraction of the range of each channel.
        draws: how many inputs are made.

    Returns:
        A check whose `worst` is the largest change of the map, divided by the map's length.

    Raises:
        EvaluationError: with every noise the prediction is another one.

    Source: Alvarez-Melis and Jaakkola, On the robustness of interpretability methods (2018).
    """
    check_number("noise", noise, above=0)
    check_whole_number("draws", draws)
    original, at_first = _first_map(cam, x, ClassLogOdds(class_index))
    overlapping = cam.activation == "sigmoid" or original.logits.shape[1] == 1
    mask = Prediction(original.logits, class_index, overlapping).mask()
    generator = torch.Generator("cpu").manual_seed(seed)
    flat = x.flatten(2)
    width = (flat.amax(2) - flat.amin(2))[(..., *[None] * (x.ndim - 2))]
    figures, found, kept = [], [], []
    for draw in range(draws):
        drawn = torch.randn(x.shape, generator=generator, device="cpu").to(x)
        other = cam(x + noise * width * drawn, at_first)
        now = Prediction(other.logits, class_index, overlapping).mask()
        dice = 2 * int((now & mask).sum()) / (int(now.sum()) + int(mask.sum()))
        if dice >= SAME_PREDICTION:
            before, after = (_values(result) for result in (original, other))
            figures.append(float((after - before).norm() / before.norm()))
            found.append(_similarity(original, other))
            kept.append(f"draw {draw}")
    if not found:
        raise EvaluationError(
            f"undefined: with noise of {noise:g} of the range the prediction itself is another one "
            "in every draw; give less noise"
        )
    spearman, ssim = zip(*found, strict=True)
    return Check(
        tuple(kept),
        spearman,
        ssim,
        max(figures),
        UNSTABLE,
        f"with noise of {100 * noise:g} % of the range the map changes by up to "
        f"{100 * max(figures):.0f} %",
    )


def _first_map(cam: BaseCAM, x: torch.Tensor, target: Any) -> tuple[CamResult, Any]:
    """Return the map of the network as it is, and the target with its voxels fixed."""
    if len(x) != 1:
        raise InputError(f"one input (1, C, *S) is checked at a time; got {tuple(x.shape)}")
    given = as_target(target, cam.activation)
    original = cam(x, given)
    if len(original.layers) != 1:
        raise InputError(
            f"the layers {', '.join(original.layers)}: one target layer is checked at a time"
        )
    values = _values(original)
    if values.min() == values.max():
        raise EvaluationError(
            f"undefined: the map of {name_of(given)} is {float(values.flatten()[0]):g} everywhere"
        )
    return original, fixed(given, original.logits)


def _values(result: CamResult) -> torch.Tensor:
    """Return the raw map of the only layer, on its own grid."""
    (layer,) = result.layers.values()
    return layer.values


def _similarity(one: CamResult, other: CamResult) -> tuple[float, float | None]:
    if _values(one).shape != _values(other).shape:
        raise EvaluationError("undefined: the changed network's map has another shape")
    return rank_correlation(_values(one), _values(other)), _ssim(one.volume(), other.volume())


def _ssim(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Return the structural similarity of two drawn maps (1, *S); None if they are too small."""
    from monai.metrics.regression import compute_ssim_and_cs

    axes = one.ndim - 1
    if axes == 1:
        return None
    width = min(7, *(size - 1 + size % 2 for size in one.shape[1:]))
    if width < 3:
        return None
    found, _ = compute_ssim_and_cs(
        one[None].double(),
        other[None].double(),
        spatial_dims=axes,
        kernel_size=(width,) * axes,
        kernel_sigma=(1.5,) * axes,
        data_range=1.0,
    )
    return float(found.mean())


def _copied(cam: BaseCAM) -> BaseCAM:
    """Return the same method for a copy of its network."""
    networks = {id(member.network): member.network for member in cam.members}
    try:
        copies = {key: copy.deepcopy(network) for key, network in networks.items()}
    except Exception as error:
        raise EvaluationError(
            f"undefined: the network cannot be copied ({error}), and the weights of your own are "
            "not touched"
        ) from error
    for key, network in networks.items():
        _check_apart(copies[key], network)
        _unparametrised(copies[key])
    for member in cam.members:
        take_over(copies[id(member.network)], member.network)
    other = copy.copy(cam)
    other.members = [replace(m, network=copies[id(m.network)]) for m in cam.members]
    other.model = other.members[0].network
    if cam.layers is not None:
        other.layers = moved_to(other.model, cam.layers)
    return other


def _check_apart(copied: nn.Module, network: nn.Module) -> None:
    """Raise EvaluationError if a copy shares weights with the network, which would be changed."""
    own, copies = (
        {p.untyped_storage().data_ptr() for p in of.parameters() if p.layout is torch.strided}
        for of in (network, copied)
    )
    if own & copies - {0}:  # 0 is that of parameters without elements
        raise EvaluationError(
            "undefined: a copy of the network shares weights with it, and your own are not touched"
        )


def _unparametrised(network: nn.Module) -> None:
    """Let modules own the weights that are computed of others, so that these can be random.

    To draw what they are computed from may change nothing, such as for an orthogonal weight.
    """
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _names_from_the_head(cam: BaseCAM, x: torch.Tensor) -> tuple[list[str], int]:
    """Return the names of the modules that own parameters, those that ran last first.

    Also returns how many of them ran after the target layer; 0 if it has none, or did not run.
    """
    windows = plan_windows(cam.sliding_window, x.shape[2:])
    layer = cam.layers[0].module if cam.layers else None
    with capturing(cam.members[0], [], cam.output) as capture:
        first = capture.to_model(windows.cut(windows.pad(x), [0]).clone())
        ran, behind = modules_from_the_end(capture, first, layer)
    if not ran:
        raise ModelError("the network has no parameters, so none can be randomised")
    return ran, behind


def _groups(names: Sequence[str], count: int) -> list[list[str]]:
    """Divide names into `count` groups of about one size, or one for each of fewer names."""
    count = min(count, len(names))
    ends = [round(number * len(names) / count) for number in range(count + 1)]
    return [list(names[low:high]) for low, high in itertools.pairwise(ends)]


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw a module's own parameters anew."""
    with torch.no_grad():
        for name, drawn in randomised(module._parameters, generator).items():
            own = module._parameters[name]
            if own is not None:
                own.copy_(drawn)
