"""CAMs of tensors: what all methods share. Read this file first.

cam = GradCAM(model, target_layers="auto")
result = cam(x, target=1)          # x (B, C, D, H, W) or (B, C, H, W)
result.volume()                    # (B, D, H, W) in [0, 1]

The methods are in `catalogue`; what happens in a call is in `calls` and `steps`; what a call
returns is in `result`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import nn

from seg3dcam.cams.calls import TargetLike, each_by
from seg3dcam.cams.result import CamResult
from seg3dcam.engine.memory import advising
from seg3dcam.errors import ConfigError, LayerError, TargetError, nearest
from seg3dcam.methods.base import Formula
from seg3dcam.methods.pooled import PooledGradient
from seg3dcam.network.ensemble import members_of, unwrap
from seg3dcam.network.layers import LayerRef, LayerSpec, Layout, resolve_layers
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.network.suggest import auto_layer
from seg3dcam.progress import Progress, silent
from seg3dcam.targets import Activation
from seg3dcam.windows import WindowPlan, Windows


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

    __signature__: ClassVar[inspect.Signature | None]
    #: The method's key.
    method: ClassVar[str] = "slice_grad_cam"
    #: The method's formula: the class has it with the default settings, an object with its own.
    formula: Formula = PooledGradient(block="slice")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class that names a method, but no formula, the formula of this method.

        Its signature shows the settings that the formula has.

        Raises:
            ConfigError: there is no such method.
        """
        super().__init_subclass__(**kwargs)
        if "method" in vars(cls) and "formula" not in vars(cls):
            cls.formula = _formula_of(cls)
        own_init = cls.__init__ is not BaseCAM.__init__
        cls.__signature__ = None if own_init else _signature_with_settings(cls.formula)

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
        self.check_settings(settings)
        self.formula = self.formula.with_settings(settings)
        self.layers: list[LayerRef] | None = None  # "auto" is settled when the first input comes
        if self.formula.explains == "input":
            self.layers = []
        elif not (isinstance(target_layers, str) and target_layers == "auto"):
            self.layers = resolve_layers(model, target_layers, reshape_transform)
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
        return asdict(self.formula)

    @advising
    def layers_for(self, x: torch.Tensor, windows: Windows) -> list[LayerRef]:
        """Return the target layers; "auto" is settled by the first input (B, C, *S) that comes."""
        if self.layers is None:
            window = self.members[0].seen((1, x.shape[1], *windows.roi))
            self.layers = [auto_layer(self.model, window, self.output)]
        return self.layers

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError for a setting that the method does not have."""
        legal = tuple(cls.formula.own_settings)
        for name in settings:
            if name not in legal:
                choices = nearest(name, legal) if legal else "this method has none"
                raise ConfigError(f"{cls.__name__} has no setting {name!r}: {choices}")


def _signature_with_settings(formula: Formula) -> inspect.Signature:
    """Return the signature of `BaseCAM` with a formula's settings in place of `**settings`."""
    signature = inspect.signature(BaseCAM)
    every = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(formula, field))
        for name, field in formula.own_settings.items()
    ]
    return signature.replace(parameters=[*every, *own])


def _formula_of(cls: type[BaseCAM]) -> Formula:
    """Return the formula of the method that a class names."""
    known = {cam.method: cam.formula for cam in _with_formulas(BaseCAM)}
    if cls.method not in known:
        raise ConfigError(
            f"{cls.__name__} names the method {cls.method!r}, {nearest(cls.method, known)}. A "
            f"method of your own has a formula: method, formula = {cls.method!r}, <a Formula>"
        )
    return known[cls.method]


def _with_formulas(cam: type[BaseCAM]) -> Iterator[type[BaseCAM]]:
    """Yield a class and those derived from it, as far as they define a method with its formula."""
    if {"method", "formula"} <= vars(cam).keys():
        yield cam
    for derived in cam.__subclasses__():
        yield from _with_formulas(derived)


def methods_by_key(names: Mapping[str, Any]) -> dict[str, type[BaseCAM]]:
    """Return the methods that a file defines, by their keys, in the file's order.

    Args:
        names: the file's names, `vars()`.
    """
    return {
        cam.method: cam
        for cam in names.values()
        if isinstance(cam, type)
        and issubclass(cam, BaseCAM)
        and cam.__module__ == names["__name__"]
    }
