"""What a network does, changed operation by operation while it runs: for measuring, not for maps.

Kernels are changed where they are used, in `F.conv3d` and its like, not where they are kept. So it
does not matter whether a module of PyTorch's holds them, one of the user's own, a normalisation of
weights, or another network that computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

_Change = Callable[..., torch.Tensor]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_UPSAMPLING = ("interpolate", "upsample", "_upsample", "pixel_shuffle")
_NORMS = (
    "batch_norm",
    "instance_norm",
    "group_norm",
    "layer_norm",
    "rms_norm",
    "local_response_norm",
)
# As `run_decompositions` names them in an exported program; they return (output, statistics ...).
_CORE_NORMS = (
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_group_norm",
    "native_layer_norm",
)
# What would cut the ramp off, or drop voxels of it.
_LIMITS = ("relu6", "hardtanh", "clamp", "clip", "clamp_", "hardtanh_", "tanh", "tanh_")
_DROPOUTS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("feature_alpha_dropout", "dropout_"),
)
_ATTENTION = ("scaled_dot_product_attention",)
# They bend what they are given, and move nothing.
_ACTIVATIONS = (
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_"),
    *("elu", "elu_", "celu", "celu_", "selu", "selu_", "gelu", "silu", "silu_", "mish", "mish_"),
    *("softplus", "hardswish", "hardswish_", "hardtanh", "hardtanh_"),
    *("threshold", "_threshold", "threshold_"),
)

# Where an upsampled path meets a skip connection, the skip connection knows the place. Residual
# blocks double what goes through them, so that the coarse levels would drown it.
FADED = 1e-3


class PlainOperations(TorchFunctionMode):
    """Makes a network plain: it passes on what it is shown, at its place, with no change of form.

    Kernels are reduced to their central taps, averaged over channels; biases, normalisation and
    attention are off. What is upsampled becomes small.

    Args:
        level: the mean of what is shown, in whose proportion upsampled paths become small.
    """

    def __init__(self, level: float) -> None:
        super().__init__()
        self._level = level

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _name(func)
        if name in (*_NORMS, *_LIMITS, *_DROPOUTS):
            return args[0] if args else kwargs["input"]
        if name in _CORE_NORMS:
            return args[0], *func(*args, **kwargs)[1:]
        transposed = _transposes(name, args, kwargs)
        if transposed or name in _CONVOLUTIONS or name == "convolution":
            kernel = _all_taps if transposed else _central_taps
            args, kwargs = _with_weight(args, kwargs, kernel, bias=False)
        elif name == "linear":
            args, kwargs = _with_weight(args, kwargs, _mean, bias=False)
        output = func(*args, **kwargs)
        if name in _ATTENTION:
            return torch.zeros_like(output)
        if transposed or name.startswith(_UPSAMPLING) or _shuffles(name, args, output):
            level = output[0].mean()  # of the constant ramp
            return output * (FADED * self._level / level) if level else output
        return output


def _gradients(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    *,
    retain_graph: bool,
    create_graph: bool,
    allow_unused: bool,
    **_: Any,
) -> tuple[torch.Tensor | None, ...]:
    """Return gradients of scalars as `torch.autograd.grad` does, which leaves the modes."""
    seeds = tuple(torch.ones_like(output) for output in outputs)
    settings = retain_graph, create_graph, tuple(inputs), allow_unused
    found: tuple[torch.Tensor | None, ...] = _engine_run_backward(
        tuple(outputs), seeds, *settings, accumulate_grad=False
    )
    return found


class _OnTheWayBack(TorchFunctionMode):
    """Changes operations, also where a checkpoint computes them again for a gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.grad:
            with self:
                return _gradients(*args[:2], **kwargs)
        return self._changed(func, _name(func), args, kwargs)

    def _changed(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what an operation of this name is to give."""
        raise NotImplementedError


class MirroredOperations(_OnTheWayBack):
    """Mirrors every kernel in space, or none; what is upsampled becomes small.

    The receptive field of a network with mirrored kernels is the mirrored one, so the middle of
    both is where the network's structure puts it, whatever its weights are.
    """

    def __init__(self, mirrored: bool) -> None:
        super().__init__()
        self._mirrored = mirrored

    def _changed(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        transposed = _transposes(name, args, kwargs)
        if self._mirrored and (transposed or name in _CONVOLUTIONS or name == "convolution"):
            args, kwargs = _with_weight(args, kwargs, _mirrored, bias=True)
        output = func(*args, **kwargs)
        upsampled = transposed or name.startswith(_UPSAMPLING) or _shuffles(name, args, output)
        return output * FADED if upsampled else output


class RandomOperations(_OnTheWayBack):
    """Makes a network one of many of the same structure, as if it had never been trained.

    The weights of kernels get random signs; activation functions pass on what they are given. So no
    path is closed by the image, and none cancels another by what was learned.

    Args:
        seed: of the signs; kernels of the same values get the same ones.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def _changed(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name in _ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        if name in (*_CONVOLUTIONS, *_TRANSPOSED, "convolution"):
            args, kwargs = _with_weight(args, kwargs, self._signed, bias=True)
        return func(*args, **kwargs)

    def _signed(self, weight: torch.Tensor) -> torch.Tensor:
        # Where the image makes a kernel, that is no place that the layer looks at.
        weight = weight.detach()
        # Checkpoints compute a part of the network again: its kernels are then the same.
        values = float(weight.abs().double().sum())
        seed = hash((self._seed, tuple(weight.shape), values)) % 2**63
        generator = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(0, 2, weight.shape, generator=generator, device="cpu") * 2 - 1
        return weight * signs.to(weight)


def _name(func: Any) -> str:
    """Return an operation's name, without an overload's."""
    return getattr(getattr(func, "overloadpacket", func), "__name__", "")


def _transposes(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell a transposed convolution; of aten.convolution its seventh argument does."""
    if name == "convolution":
        return bool(args[6] if len(args) > 6 else kwargs.get("transposed"))
    return name in _TRANSPOSED


def _shuffles(name: str, args: tuple, output: Any) -> bool:
    """Tell the last step of a sub-pixel upsampling: (B, C, d, r, h, s) -> (B, C, d r, h s).

    Windows of tokens are put together in the same way, but with their channels last.
    """
    if name not in ("reshape", "view") or not isinstance(args[0], torch.Tensor):
        return False
    before, after = args[0].shape, output.shape
    pairs = [a * b for a, b in zip(before[2::2], before[3::2], strict=False)]
    return len(before) == 2 * len(after) - 2 > 4 and [*before[:2], *pairs] == [*after]


def _with_weight(
    args: tuple, kwargs: dict[str, Any], change: _Change, *, bias: bool
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments (input, weight, bias, ...) of an operation with another weight."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    # Of a network in half precision: what is shown to it may be more exact.
    weight, rest = change(named["weight"]).to(named["input"].dtype), args[3:]
    others = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
    return (named["input"], weight, named.get("bias") if bias else None, *rest), others


def _central_taps(weight: torch.Tensor) -> torch.Tensor:
    """Return a kernel that averages over input channels and looks straight ahead in space."""
    kernel = torch.zeros_like(weight)
    middle = [slice((size - 1) // 2, size // 2 + 1) for size in weight.shape[2:]]
    kernel[(slice(None), slice(None), *middle)] = 1
    return kernel / kernel[0].sum()


def _all_taps(weight: torch.Tensor) -> torch.Tensor:
    """Return the transposed kernel: with the central taps alone it would leave gaps."""
    return torch.full_like(weight, 1 / weight[0].numel())


def _mean(weight: torch.Tensor) -> torch.Tensor:
    return torch.full_like(weight, 1 / weight.shape[1])


def _mirrored(weight: torch.Tensor) -> torch.Tensor:
    return weight.flip(list(range(2, weight.ndim)))
