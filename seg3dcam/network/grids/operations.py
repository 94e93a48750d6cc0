"""Change the operations of a network while it runs, for measurements only and not for maps.

Kernels are changed where they are used, in `F.conv3d` and the like, and not where they are stored.
So it does not matter whether they belong to a module of PyTorch or of the user, are the result of a
weight normalisation, or are computed by another network.
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
# Their names in an exported program after `run_decompositions`. They return (output, statistics
# ...).
_CORE_NORMS = (
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "native_group_norm",
    "native_layer_norm",
)
# These would cut the ramp off.
_LIMITS = ("relu6", "hardtanh", "clamp", "clip", "clamp_", "hardtanh_", "tanh", "tanh_")
# These would drop voxels of the ramp.
_DROPOUTS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("feature_alpha_dropout", "dropout_"),
)
_ATTENTION = ("scaled_dot_product_attention",)
# These change values, but move nothing.
_ACTIVATIONS = (
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_"),
    *("elu", "elu_", "celu", "celu_", "selu", "selu_", "gelu", "silu", "silu_", "mish", "mish_"),
    *("softplus", "hardswish", "hardswish_", "hardtanh", "hardtanh_"),
    *("threshold", "_threshold", "threshold_"),
)

# Upsampled paths are made small by this factor, so that the skip connections, which have the finer
# places, dominate where the two meet. Residual blocks double what goes through them, so without the
# factor the coarse levels would dominate.
FADED = 1e-3


class PlainOperations(TorchFunctionMode):
    """Makes a network plain, so that it passes its input on, unchanged and at the same place.

    Kernels are reduced to their central taps and averaged over channels. Biases, normalisation and
    attention are switched off. Upsampled paths become small.

    Args:
        level: the mean of the input. Upsampled paths are scaled to `FADED` times this level.
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
    """Return gradients of scalars as `torch.autograd.grad` does, but with the modes still on.

    `torch.autograd.grad` itself would switch them off while it runs.
    """
    seeds = tuple(torch.ones_like(output) for output in outputs)
    settings = retain_graph, create_graph, tuple(inputs), allow_unused
    found: tuple[torch.Tensor | None, ...] = _engine_run_backward(
        tuple(outputs), seeds, *settings, accumulate_grad=False
    )
    return found


class _ChangedOperations(TorchFunctionMode):
    """Changes operations, including those that a checkpoint runs again in the backward pass."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.grad:
            with self:
                return _gradients(*args[:2], **kwargs)
        return self._changed(func, _name(func), args, kwargs)

    def _changed(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the result that replaces that of an operation."""
        raise NotImplementedError


class MirroredOperations(_ChangedOperations):
    """Mirrors every kernel in space, or none; upsampled paths become small.

    A network with mirrored kernels has a mirrored receptive field. So the middle of the two
    receptive fields depends only on the network's structure, and not on its weights.

    Args:
        mirrored: whether the kernels are mirrored.
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


class RandomOperations(_ChangedOperations):
    """Turns a network into an untrained one of the same structure.

    The weights of kernels get random signs, and activation functions are replaced by the identity.
    So no activation function closes a path, and no path cancels another one because of training.

    Args:
        seed: for the signs. Two kernels with the same values get the same signs.
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
        # If the kernel itself depends on the image, that dependence must not count.
        weight = weight.detach()
        # The seed follows from the values, so a checkpoint that runs again gets the same signs.
        values = float(weight.abs().double().sum())
        seed = hash((self._seed, tuple(weight.shape), values)) % 2**63
        generator = torch.Generator("cpu").manual_seed(seed)
        signs = torch.randint(0, 2, weight.shape, generator=generator, device="cpu") * 2 - 1
        return weight * signs.to(weight)


def _name(func: Any) -> str:
    """Return an operation's name, without the name of its overload."""
    return getattr(getattr(func, "overloadpacket", func), "__name__", "")


def _transposes(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation is a transposed convolution.

    The seventh argument of aten.convolution says that.
    """
    if name == "convolution":
        return bool(args[6] if len(args) > 6 else kwargs.get("transposed"))
    return name in _TRANSPOSED


def _shuffles(name: str, args: tuple, output: Any) -> bool:
    """Tell whether an operation is the last step of a sub-pixel upsampling.

    That step is (B, C, d, r, h, s) -> (B, C, d r, h s). Windows of tokens are merged in the same
    way, but with their channels last.
    """
    if name not in ("reshape", "view") or not isinstance(args[0], torch.Tensor):
        return False
    before, after = args[0].shape, output.shape
    pairs = [a * b for a, b in zip(before[2::2], before[3::2], strict=False)]
    return len(before) == 2 * len(after) - 2 > 4 and [*before[:2], *pairs] == [*after]


def _with_weight(
    args: tuple, kwargs: dict[str, Any], change: _Change, *, bias: bool
) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments (input, weight, bias, ...) of an operation with its weight changed.

    Args:
        bias: whether the bias stays.
    """
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    # A network in half precision may get inputs in single precision.
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
    """Return a constant transposed kernel, since central taps alone would leave gaps."""
    return torch.full_like(weight, 1 / weight[0].numel())


def _mean(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of a linear layer that averages its inputs."""
    return torch.full_like(weight, 1 / weight.shape[1])


def _mirrored(weight: torch.Tensor) -> torch.Tensor:
    return weight.flip(list(range(2, weight.ndim)))
