"""CAMs of tensors: what all methods share. Read this file first; the methods are in `cams.py`.

cam = GradCAM(model, target_layers="auto")
result = cam(x, target=1)          # x (B, C, D, H, W) or (B, C, H, W)
result.volume()                    # (B, D, H, W) in [0, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from seg3dcam.cams.result import CamResult
from seg3dcam.engine.gradient_check import gradient_gaps
from seg3dcam.engine.layer_map import LayerMap, added
from seg3dcam.engine.maps import Maps
from seg3dcam.engine.memory import advising
from seg3dcam.engine.passes import (
    FirstPass,
    Progress,
    predict,
    predict_member,
    seeded_windows,
    silent,
)
from seg3dcam.engine.run import (
    Asked,
    looks_at_layers,
    maps_of,
    needs_activations,
    needs_gradient_of,
    needs_graph,
    needs_own_logits,
)
from seg3dcam.errors import ConfigError, LayerError, ModelError, TargetError, nearest, tell
from seg3dcam.geometry import FeatureGrid
from seg3dcam.methods import METHODS
from seg3dcam.network.capture import Capture, begun_again, capturing
from seg3dcam.network.checked_input import as_input, on_grid_of, telling_axes
from seg3dcam.network.ensemble import Member, members_of, unwrap
from seg3dcam.network.grid_measurement import measured_in_window
from seg3dcam.network.layers import LayerRef, LayerSpec, Layout, moved_to, resolve_layers
from seg3dcam.network.layouts import INPUT
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.suggest import auto_layer
from seg3dcam.targets import Activation, OwnTarget, as_targets, name_of, placed
from seg3dcam.windows import WindowPlan, Windows, plan_windows

#: A class index, a target, a family of targets, or None for the original recipe.
TargetLike = int | Callable[[torch.Tensor], torch.Tensor] | Any | None


class BaseCAM:
    """Explains a segmentation network's output by the activations of some of its layers.

    The model is put into eval mode while a map is computed and is afterwards exactly as it was. One
    thread at a time explains a network; what is measured on it is kept with the network, so that
    further CAM objects of it cost no more than their maps.

    Args:
        model: any network with a channel-first input (B, C, *S) and logits (B, K, *S), or an
            `Ensemble` of networks and flips.
        target_layers: a dotted name ("decoder.2"), one with `*` ("encoder.stages.*"), a name with
            the element of a tuple, list or dict ("encoder[0]"), a module, a list of these, "auto"
            (the bottleneck, or the middle of the depth where there is none, see `suggest_layers`)
            or "all" (every convolution). Several layers cost one forward pass. Channels-last and
            token layers are understood.
        sliding_window: a `WindowPlan`; None takes the input as one window.
        output: which of several outputs are the logits: a position, key or function.
        activation: "softmax" or "sigmoid" (one channel, or several that may overlap).
        reshape_transform: for layers of a layout of their own: a function from what the layer
            gives to (B, C, *s).
        progress: called with (step, done, total) after every batch of windows.
        settings: the method's own, see the class.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
        >>> from seg3dcam import GradCAM
        >>> from seg3dcam.targets import ClassLogit
        >>> cam = GradCAM(network, target_layers="1")
        >>> result = cam(torch.rand(1, 1, 8, 8, 8), target=ClassLogit(1, region="volume"))
        >>> result.volume().shape
        torch.Size([1, 8, 8, 8])
    """

    method: ClassVar[str] = "slice_grad_cam"
    #: What the method can be told beside what every method can.
    own_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        target_layers: LayerSpec = "auto",
        *,
        sliding_window: WindowPlan | None = None,
        output: OutputSelection = None,
        activation: Activation = "softmax",
        reshape_transform: Layout | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        self.model = unwrap(model)
        self.members = members_of(model)
        self.sliding_window = sliding_window
        self.output = output
        self.activation = activation
        self.progress = progress or silent
        if not isinstance(sliding_window, WindowPlan | None):
            raise ConfigError(
                f"sliding_window {sliding_window!r}: give a WindowPlan, such as "
                "WindowPlan(96, overlap=0.5), or None for one window"
            )
        if not callable(self.progress):
            raise ConfigError(f"progress {progress!r}: a function of (step, done, total), or None")
        self._function = self._configured(settings)
        self._layers: list[LayerRef] | None = None
        if not looks_at_layers(self._function):
            self._layers = []
        elif not _is_auto(target_layers):
            self._layers = resolve_layers(model, target_layers, reshape_transform)
        elif reshape_transform is not None:
            raise LayerError("a reshape_transform is made for one layer: name the target layer")

    def __call__(self, x: torch.Tensor, target: TargetLike = None) -> CamResult:
        """Explain one target.

        Args:
            x: (B, C, *S) tensor or MetaTensor; a MetaTensor's affine goes into the result.
            target: a class index (`ClassLogOdds`), a target, or a function of logits (B, K, *S)
                that returns (B,). None is the original recipe, `MaskOutput`.

        Raises:
            LayerError, TargetError, ModelError: see `seg3dcam.errors`.
        """
        results = self.each(x, [target])
        if len(results) != 1:
            raise TargetError(f"{target!r} stands for {len(results)} targets: use each()")
        return results[0]

    def each(
        self,
        x: torch.Tensor,
        targets: Sequence[TargetLike] | Callable[[torch.Tensor], Sequence[TargetLike]],
    ) -> list[CamResult]:
        """Explain several targets with the forward passes of one.

        Without windows that is one in all; in windows one to predict, and one more for each window
        that matters to a target.

        Args:
            x: as for a call.
            targets: a list, in which a family such as `EveryComponent` stands for several, or a
                function of the logits (B, K, *S) that returns one.
        """
        return [row[0] for row in each_by([self], x, targets)]

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, for provenance."""
        function = self._function
        return asdict(function) if hasattr(function, "__dataclass_fields__") else {}

    def _configured(self, settings: Mapping[str, Any]) -> Any:
        """Return the method's function with these settings."""
        check_settings(self, settings, self.own_settings)
        function: Any = METHODS[self.method]
        return replace(function, **settings) if settings else function

    @advising
    def _resolved_layers(self, x: torch.Tensor, windows: Windows) -> list[LayerRef]:
        if self._layers is None:
            window = self.members[0].seen((1, x.shape[1], *windows.roi))
            self._layers = [auto_layer(self.model, window, self.output)]
        return self._layers


@begun_again
def each_by(
    cams: Sequence[BaseCAM],
    x: torch.Tensor,
    targets: Sequence[TargetLike] | Callable[[torch.Tensor], Sequence[TargetLike]],
) -> list[list[CamResult]]:
    """Explain several targets by several methods; for each target a list with every method's.

    Methods of activations and gradients share their forward passes.

    Args:
        cams: of one model, with the same layers, windows, output and activation.
        x, targets: as for `BaseCAM.each`.

    Raises:
        ConfigError: they are not; or there is none.
    """
    _check_alike(cams)
    lead = next((cam for cam in cams if looks_at_layers(cam._function)), cams[0])
    functions = [cam._function for cam in cams]
    x, affine = as_input(x)
    windows = plan_windows(lead.sliding_window, x.shape[2:])

    def ask(logits: torch.Tensor) -> list[Asked]:
        """Evaluate the targets at the prediction."""
        listed = as_targets(_listed(targets, logits), logits, lead.activation)
        moved = [placed(t, lambda mask: on_grid_of(mask, affine, x.shape[2:])) for t in listed]
        return [Asked.of(target, logits) for target in moved]

    with telling_axes(lead.members[0], x):
        layers = lead._resolved_layers(x, windows)
        if len(lead.members) == 1:
            found = _explain_member(lead, lead.members[0], layers, x, windows, functions, ask)
        else:
            found = _explain_ensemble(lead, layers, x, windows, functions, ask)
    for layer, reason in found.dropped.items():
        tell(f"no map of layer '{layer}': {reason}")
    if found.draws:
        tell(
            f"the network draws random numbers when it predicts ({found.draws}): prediction and "
            "maps belong to one draw, the same in every pass. Other draws, from another random "
            "seed, give others: compare several"
        )
    return [
        [
            _result(cam, windows, found, one, maps, affine)
            for cam, maps in zip(cams, row, strict=True)
        ]
        for one, row in zip(found.asked, found.table, strict=True)
    ]


#: For every target a list with every method's maps.
Table = list[list[Maps]]


@dataclass(frozen=True)
class _Found:
    """What a network gave.

    Attributes:
        logits: (B, K, *S).
        asked: what was asked of them.
        table: its maps.
        dropped: layers without a map, and why.
        draws: the operation with which it draws random numbers, "" for none.
    """

    logits: torch.Tensor
    asked: list[Asked]
    table: Table
    dropped: Mapping[LayerRef, str]
    draws: str


@advising
def _explain_member(
    lead: BaseCAM,
    member: Member,
    layers: Sequence[LayerRef],
    x: torch.Tensor,
    windows: Windows,
    functions: Sequence[Any],
    ask: Callable[[torch.Tensor], list[Asked]],
    together: torch.Tensor | None = None,
) -> _Found:
    """Explain one network.

    Args:
        together: the logits of the ensemble that it belongs to, which are explained.
    """
    shared = any(
        len(windows.groups(f.whole_axes(x.ndim - 2))) < len(windows)
        for f in functions
        if hasattr(f, "whole_axes")
    )
    with capturing(member, layers, lead.output) as capture:
        x = x.to(torch.promote_types(x.dtype, capture.dtype))  # float64 stays float64
        windows = _apart_if_drawing(capture, x, windows)
        graph = any(map(needs_graph, functions))
        keep = any(needs_activations(f, shared) for f in functions)
        if together is None:
            first = predict(capture, x, windows, graph=graph, keep=keep, progress=lead.progress)
        else:
            first = predict_member(
                capture,
                x,
                windows,
                together,
                graph=graph,
                keep=keep,
                own=any(map(needs_own_logits, functions)),
                progress=lead.progress,
            )
        _check_draws(capture, functions, len(x))
        example = capture.to_model(x.new_empty(1, x.shape[1], *windows.roi))
        grids = measured_in_window(capture, example, first.shapes) if first.shapes else {}
        _tell_unmeasured(grids)
        asked = ask(first.logits)
        checked = _layers_with_gradients(first, functions)
        gaps, reason = _gaps(first, asked, checked, lead.output)
        table = maps_of(first, asked, functions, grids, lead.output, lead.progress)
        unchecked = [la for la in checked if la not in gaps and la not in capture.dropped]
        _tell_unchecked(unchecked, reason)
        table = _without_numbers(table, asked)
    return _Found(
        first.logits,
        asked,
        _with_gaps(table, functions, gaps),
        capture.dropped,
        capture.known.draws or "",
    )


@advising
def _explain_ensemble(
    lead: BaseCAM,
    layers: Sequence[LayerRef],
    x: torch.Tensor,
    windows: Windows,
    functions: Sequence[Any],
    ask: Callable[[torch.Tensor], list[Asked]],
) -> _Found:
    """Explain the mean logits of several networks and flips, one member after another."""
    logits = _mean_logits(lead, x, windows)
    asked = ask(logits)
    dropped: dict[LayerRef, str] = {}
    draws = ""
    total: Table | None = None
    for member in lead.members:
        own = moved_to(member.network, layers)
        found = _explain_member(lead, member, own, x, windows, functions, lambda _: asked, logits)
        dropped |= found.dropped
        draws = draws or found.draws
        if total is None:
            total = found.table
        else:
            total = _combined(lambda a, b: added(a, b, windows.shape), total, found.table)
    count = len(lead.members)
    mean = _combined(
        lambda m: replace(m, values=m.values / count, ceiling=m.ceiling / count), total or []
    )
    return _Found(logits, asked, mean, dropped, draws)


def _apart_if_drawing(capture: Capture, x: torch.Tensor, windows: Windows) -> Windows:
    """Return windows that go one by one through a network that draws random numbers.

    Every pass starts from the same random state, but the draws of a batch are others than those of
    its items.
    """
    if len(windows) == 1:  # one pass for all
        return windows
    capture.find_out_whether_it_draws(
        lambda: capture.to_model(windows.cut(windows.pad(x[:1]), [0]).clone())
    )
    return windows.one_by_one() if capture.known.draws else windows


def _check_draws(capture: Capture, functions: Sequence[Any], items: int) -> None:
    """Raise ModelError where items of a batch would be looked at again with other draws."""
    if capture.known.draws and items > 1 and not all(map(needs_graph, functions)):
        raise ModelError(
            f"the network draws random numbers ({capture.known.draws}), others for a batch than "
            f"for its items, which this method looks at one by one: explain the {items} items in "
            "calls of their own"
        )


def _layers_with_gradients(first: FirstPass, functions: Sequence[Any]) -> list[LayerRef]:
    """Return the layers whose gradients the maps are made of; `INPUT` may be among them."""
    needed = {needs_gradient_of(function) for function in functions}
    return [*(first.shapes if "layers" in needed else ()), *[INPUT] * ("input" in needed)]


def _gaps(
    first: FirstPass, asked: Sequence[Asked], layers: Sequence[LayerRef], output: OutputSelection
) -> tuple[dict[LayerRef, float], str]:
    """Find out where gradients miss a branch of the network, and why not everywhere."""
    if not layers:
        return {}, ""
    seeded = [w for one in asked for w in seeded_windows(first, [0], one.seed)]
    window = first.cut([0], seeded[:1] or [0])
    return gradient_gaps(first.capture, window, layers, output)


def _without_numbers(table: Table, asked: Sequence[Asked]) -> Table:
    """Let the maps of items whose score is no number hold none: a gradient may not show that."""

    def blanked(one: Asked, map_: LayerMap) -> LayerMap:
        bad = ~torch.isfinite(one.score).to(map_.values.device)
        if not bad.any():
            return map_
        shape = (-1, *[1] * (map_.values.ndim - 1))
        return replace(map_, values=map_.values.masked_fill(bad.view(shape), math.nan))

    return [
        [{layer: blanked(one, map_) for layer, map_ in maps.items()} for maps in row]
        for one, row in zip(asked, table, strict=True)
    ]


def _with_gaps(table: Table, functions: Sequence[Any], gaps: Mapping[LayerRef, float]) -> Table:
    """Note in the maps that are made of gradients which part of the score they miss."""

    def noted(function: Any, maps: Maps) -> Maps:
        kind = needs_gradient_of(function)
        if kind == "nothing":
            return maps
        return {
            layer: replace(map_, missing=gaps.get(INPUT if kind == "input" else layer, 0.0))
            for layer, map_ in maps.items()
        }

    return [[noted(f, maps) for f, maps in zip(functions, row, strict=True)] for row in table]


def _combined(combine: Callable[..., LayerMap], *tables: Table) -> Table:
    """Combine the maps at each place of several tables; a layer that one lacks is left out."""
    return [
        [
            {
                layer: combine(*(maps[layer] for maps in cells))
                for layer in cells[0]
                if all(layer in maps for maps in cells)
            }
            for cells in zip(*rows, strict=True)
        ]
        for rows in zip(*tables, strict=True)
    ]


def _mean_logits(lead: BaseCAM, x: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Return the logits (B, K, *S) of an ensemble."""
    total: Any = 0
    for member in lead.members:
        with capturing(member, [], lead.output) as capture:
            x = x.to(torch.promote_types(x.dtype, capture.dtype))
            windows = _apart_if_drawing(capture, x, windows)
            own = predict(capture, x, windows, graph=False, keep=False, progress=lead.progress)
            total = total + own.logits
    return total / len(lead.members)


def _check_alike(cams: Sequence[BaseCAM]) -> None:
    """Raise ConfigError unless all explain the same network in the same way."""
    if not cams:
        raise ConfigError("no method given: name at least one")
    for cam in cams:
        pairs = {
            "models": (cam.members, cams[0].members),
            "windows": (cam.sliding_window, cams[0].sliding_window),
            "outputs": (cam.output, cams[0].output),
            "activations": (cam.activation, cams[0].activation),
        }
        for what, (own, first) in pairs.items():
            if own is not first and own != first:
                raise ConfigError(f"methods of different {what} cannot share a pass: give the same")
    layers = [cam._layers for cam in cams if looks_at_layers(cam._function)]
    if any(own != layers[0] for own in layers):
        raise ConfigError(
            "methods of different target layers cannot share a pass: give all of them the same "
            "layers, each map is kept"
        )


def _listed(targets: Any, logits: torch.Tensor) -> Sequence[TargetLike]:
    """Return the targets as a list; a function of the logits returns one."""
    if callable(targets) and not isinstance(targets, OwnTarget):
        targets = targets(logits)
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TargetError(
            f"targets {targets!r}: give a list, such as [1, targets.ClassLogit(2)], or a function "
            "of the logits (B, K, *S) that returns one"
        )
    if not targets:
        raise TargetError("the list of targets is empty: give at least one")
    return targets


def _result(
    cam: BaseCAM,
    windows: Windows,
    found: _Found,
    asked: Asked,
    maps: Maps,
    affine: np.ndarray | None,
) -> CamResult:
    layers = {str(layer): map_ for layer, map_ in maps.items() if layer not in found.dropped}
    for name, layer in layers.items():
        _warn(name, layer, name_of(asked.target))
    return CamResult(
        layers=layers,
        shape=windows.shape,
        logits=found.logits,
        score=asked.score,
        target=name_of(asked.target),
        method=cam.method,
        activation=cam.activation,
        affine=affine,
        windows=len(windows),
        region_voxels=asked.region_voxels,
        settings=cam.settings,
        dropped={str(layer): reason for layer, reason in found.dropped.items()},
        members=len(cam.members),
        draws=found.draws,
    )


def check_settings(cam: BaseCAM, settings: Mapping[str, Any], legal: Sequence[str]) -> None:
    """Raise ConfigError for a setting that a method does not have."""
    for name in settings:
        if name not in legal:
            choices = nearest(name, legal) if legal else "this method has none"
            raise ConfigError(f"{type(cam).__name__} has no setting {name!r}: {choices}")


def _tell_unmeasured(grids: Mapping[LayerRef, FeatureGrid]) -> None:
    """Say which layers' places are assumed."""
    for layer, grid in grids.items():
        if not grid.measured:
            stride = max(grid.stride)
            off = f"shifted by up to {(stride - 1) / 2:g} input voxels, " if stride > 1 else ""
            tell(
                f"where the voxels of layer '{layer}' lie could not be measured; the map may be "
                f"{off}stretched or in another order"
            )


def _tell_unchecked(layers: Sequence[LayerRef], reason: str) -> None:
    """Say which layers' gradients are believed without a check."""
    if not layers:
        return
    which = ", ".join("the input" if la is INPUT else f"layer '{la}'" for la in layers[:3])
    which += f" and {len(layers) - 3} more" * (len(layers) > 3)
    tell(
        f"the gradient at {which} could not be checked"
        + (f" ({reason})" if reason else "")
        + ": the map may miss what branches without a gradient add to the score. Compare it with a "
        "method without gradients, such as score_cam or ablation_cam, or explain smaller windows"
    )


def _is_auto(spec: LayerSpec) -> bool:
    return isinstance(spec, str) and spec == "auto"


def _warn(name: str, layer: LayerMap, target: str) -> None:
    for flag in layer.flags:
        tell(f"layer '{name}', '{target}': {flag}")
    if caution := layer.caution:
        tell(f"layer '{name}', '{target}': {caution}; scale=\"signed\" or --signed shows both")
    if layer.status == "ok":
        return
    if layer.status == "zero" and any(layer.only_against):
        tell(
            f"layer '{name}' shows nothing for '{target}' (status \"zero\"): {layer.reason}; "
            'scale="signed" or --signed shows it'
        )
        return
    tell(
        f"layer '{name}' explains nothing of '{target}' (status \"{layer.status}\"): {layer.reason}"
    )
