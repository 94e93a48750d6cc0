"""CAMs of tensors: `BaseCAM` and its named subclasses. Read this file first.

cam = GradCAM(model, target_layers="auto")
result = cam(x, target=1)          # x (B, C, D, H, W) or (B, C, H, W)
result.volume()                    # (B, D, H, W) in [0, 1]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from monai.data import MetaTensor
from torch import nn

from seg3dcam.capture import capturing
from seg3dcam.errors import InputError, Seg3dcamWarning
from seg3dcam.geometry import FeatureGrid, ras_affine
from seg3dcam.layers import LayerRef, LayerSpec, resolve_layers, unwrap
from seg3dcam.methods import METHODS, PooledGradient
from seg3dcam.methods.pooled import Block, Mode
from seg3dcam.outputs import OutputSelection
from seg3dcam.passes import FirstPass, Progress, attribute, predict, silent
from seg3dcam.probe import measure_grids
from seg3dcam.result import CamResult, LayerMap
from seg3dcam.suggest import auto_layer
from seg3dcam.targets import Activation, as_target, name_of, score_and_seed
from seg3dcam.windows import WindowPlan, Windows, plan_windows

#: A class index, a target, or None for the original recipe.
TargetLike = int | Callable[[torch.Tensor], torch.Tensor] | None


class BaseCAM:
    """Explains a segmentation network's output by the activations of some of its layers.

    The model is put into eval mode while a map is computed and is afterwards exactly as it was.

    Args:
        model: any network with a channel-first input (B, C, *S) and logits (B, K, *S).
        target_layers: a dotted name ("decoder.2"), a name with the element of a tuple, list or
            dict ("encoder[0]"), a module, a list of these, "auto" (the bottleneck, see
            `suggest_layers`) or "all" (every convolution). Several layers cost one forward pass.
        sliding_window: a `WindowPlan`; None takes the input as one window.
        output: which of several outputs are the logits: a position, key or function.
        activation: "softmax" or "sigmoid" (one channel, or several that may overlap).
        progress: called with (step, done, total) after every batch of windows.

    Example:
        >>> network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
        >>> from seg3dcam.targets import ClassLogit
        >>> cam = GradCAM(network, target_layers="1")
        >>> result = cam(torch.rand(1, 1, 8, 8, 8), target=ClassLogit(1, region="volume"))
        >>> result.volume().shape
        torch.Size([1, 8, 8, 8])
    """

    method: ClassVar[str] = "slice_grad_cam"

    def __init__(
        self,
        model: nn.Module,
        target_layers: LayerSpec = "auto",
        *,
        sliding_window: WindowPlan | None = None,
        output: OutputSelection = None,
        activation: Activation = "softmax",
        progress: Progress | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.sliding_window = sliding_window
        self.output = output
        self.activation = activation
        self.progress = progress or silent
        self._grids: dict[tuple, dict[LayerRef, FeatureGrid]] = {}
        self._layers = None if _is_auto(target_layers) else resolve_layers(model, target_layers)

    def __call__(self, x: torch.Tensor, target: TargetLike = None) -> CamResult:
        """Explain one target.

        Args:
            x: (B, C, *S) tensor or MetaTensor; a MetaTensor's affine goes into the result.
            target: a class index (`ClassLogOdds`), a target, or a function of logits (B, K, *S)
                that returns (B,). None is the original recipe, `MaskOutput`.

        Raises:
            LayerError, TargetError, ModelError: see `seg3dcam.errors`.
        """
        return self.each(x, [target])[0]

    def each(
        self,
        x: torch.Tensor,
        targets: Sequence[TargetLike] | Callable[[torch.Tensor], Sequence[TargetLike]],
    ) -> list[CamResult]:
        """Explain several targets; the prediction is made once.

        Args:
            x: as for a call.
            targets: a list, or a function of the logits (B, K, *S) that returns one, for targets
                that depend on what is predicted.
        """
        x, affine = _as_input(x)
        windows = plan_windows(self.sliding_window, x.shape[2:])
        layers = self._resolved_layers(x, windows)
        method = self._method()
        pooled = len(windows.groups(method.whole_axes(x.ndim - 2))) < len(windows)
        with capturing(self.model, layers, self.output) as capture:
            x = x.to(torch.promote_types(x.dtype, capture.dtype))  # float64 stays float64
            first = predict(capture, x, windows, keep=pooled, progress=self.progress)
            example = capture.to_model(x.new_empty(1, x.shape[1], *windows.roi))
            shapes = {layer: first.shapes[layer] for layer in layers}
            grids = self._measured_grids(example, shapes)
            chosen = targets(first.logits) if callable(targets) else targets
            results = []
            for number, target in enumerate(as_target(t, self.activation) for t in chosen):
                score, seed = score_and_seed(target, first.logits)
                last = number == len(chosen) - 1
                found = attribute(first, seed, method, grids, last=last, progress=self.progress)
                results.append(self._result(first, target, score, found, affine))
        return results

    def _measured_grids(
        self, example: torch.Tensor, shapes: dict[LayerRef, tuple[int, ...]]
    ) -> dict[LayerRef, FeatureGrid]:
        """Measure the layers' grids, once for each shape of input."""
        key = (tuple(example.shape), tuple(shapes.items()))
        if key not in self._grids:
            self._grids[key] = measure_grids(self.model, example, shapes)
            for layer, grid in self._grids[key].items():
                if not grid.measured and max(grid.stride) > 1:
                    warnings.warn(
                        f"where the voxels of layer '{layer}' lie could not be measured; the map "
                        f"may be shifted by up to {(max(grid.stride) - 1) / 2:g} input voxels",
                        Seg3dcamWarning,
                        stacklevel=4,
                    )
        return self._grids[key]

    def _method(self) -> PooledGradient:
        return METHODS[self.method]

    def _resolved_layers(self, x: torch.Tensor, windows: Windows) -> list[LayerRef]:
        if self._layers is None:
            self._layers = [auto_layer(self.model, (1, x.shape[1], *windows.roi), self.output)]
        return self._layers

    def _result(
        self,
        first: FirstPass,
        target: Callable[..., torch.Tensor],
        score: torch.Tensor,
        found: dict[LayerRef, LayerMap],
        affine: np.ndarray | None,
    ) -> CamResult:
        layers = {str(layer): map_ for layer, map_ in found.items()}
        for name, layer in layers.items():
            _warn(name, layer, name_of(target))
        regions = getattr(target, "regions", None)
        return CamResult(
            layers,
            first.windows.shape,
            first.logits,
            score,
            name_of(target),
            self.method,
            self.activation,
            affine,
            len(first.windows),
            regions(first.logits).reshape(len(score), -1).sum(1) if regions else None,
            asdict(self._method()),
        )


def _as_input(x: torch.Tensor) -> tuple[torch.Tensor, np.ndarray | None]:
    """Return a plain tensor and, of a MetaTensor, its affine or the items' affines in RAS."""
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        given = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
        raise InputError(
            f"the input must be a tensor (B, C, *S), such as (1, 1, 96, 96, 96); got {given}"
        )
    if not x.is_floating_point():
        raise InputError(f"the input must be floating point, as the network is; got {x.dtype}")
    if 0 in x.shape:
        raise InputError(f"the input is empty: shape {tuple(x.shape)}")
    affine = None
    if isinstance(x, MetaTensor):
        affine = ras_affine(x.affine.cpu().numpy(), x.meta.get("space"))
        if affine.ndim == 3 and (affine == affine[0]).all():  # a batch from one grid
            affine = affine[0]
        x = x.as_tensor()
    # A tensor made in inference mode cannot enter a graph; its clone, made outside of it, can.
    with torch.inference_mode(False):
        x = x.clone() if x.is_inference() else x.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # sums in half precision overflow
    if not torch.isfinite(x).all():
        raise InputError(
            f"the input has {int((~torch.isfinite(x)).sum())} voxels that are NaN or infinite"
        )
    return x, affine


def _is_auto(spec: LayerSpec) -> bool:
    return isinstance(spec, str) and spec == "auto"


_TROUBLE = {
    "zero": "no voxel speaks for the target, or contributions cancel (the raw map runs from "
    "{low:.3g} to {high:.3g})",
    "nonfinite": "NaN or infinity in the map",
    "degenerate": "the same value everywhere ({high:.3g})",
}


def _warn(name: str, layer: LayerMap, target: str) -> None:
    if layer.status != "ok":
        low, high = float(layer.values.min()), float(layer.values.max())
        reason = _TROUBLE[layer.status].format(low=low, high=high)
        warnings.warn(
            f"layer '{name}' explains nothing of '{target}' (status \"{layer.status}\"): {reason}",
            Seg3dcamWarning,
            stacklevel=4,
        )


class SliceGradCAM(BaseCAM):
    """The original 3D recipe: gradients averaged over axes 3 and 4, a weight per channel and slice.

    w_kz = mean over y, x of dS/dA_k(z, y, x); map(z, y, x) = sum_k w_kz A_k(z, y, x). In 2D it is
    Grad-CAM. One forward and one backward pass. With its default target `MaskOutput` the whole
    mask output is backpropagated, so the map is not specific to a class; name a class to be so.
    A slice is one of the layer's grid, not of the scan.
    """

    method = "slice_grad_cam"


class GradCAM(BaseCAM):
    """Grad-CAM (Selvaraju et al. 2017): w_k = mean over u of dS/dA_k(u); map = sum_k w_k A_k.

    One forward and one backward pass; class-specific with a class target. Coarse, may paint
    outside the mask, and is zero where gradients cancel.
    """

    method = "grad_cam"


class HiResCAM(BaseCAM):
    """HiResCAM (Draelos & Carin 2020): map(u) = sum_k dS/dA_k(u) A_k(u).

    One forward and one backward pass; class-specific with a class target. For a linear head the
    map sums to the score without its bias. The best default for segmentation.
    """

    method = "hires_cam"


class XResCAM(BaseCAM):
    """Seg-XRes-CAM (Hasany et al. 2023): gradients pooled over blocks of the layer's grid.

    map(u) = sum_k pool(dS/dA_k)(u) A_k(u). Blocks of one voxel are HiResCAM, the whole grid is
    Grad-CAM. One forward and one backward pass.

    Args:
        window: feature voxels of a block, one number or one for each axis; None is a whole axis.
        mode: "mean" or "max" over a block.
    """

    method = "xres_cam"

    def __init__(
        self,
        model: nn.Module,
        target_layers: LayerSpec = "auto",
        *,
        window: Block = 2,
        mode: Mode = "mean",
        **settings: Any,
    ) -> None:
        super().__init__(model, target_layers, **settings)
        self._pooling = PooledGradient(window, mode)

    def _method(self) -> PooledGradient:
        return self._pooling


#: Method key -> class.
CAMS: dict[str, type[BaseCAM]] = {
    cam.method: cam for cam in (GradCAM, SliceGradCAM, HiResCAM, XResCAM)
}
