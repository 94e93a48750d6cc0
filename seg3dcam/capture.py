"""The model, touched inside one `with`: activations and gradients out, everything put back.

A forward hook on each target layer swaps the layer's output for a clone of a detached leaf, and
the gradient comes from `torch.autograd.grad` with respect to that leaf. Nothing before the layer
enters the graph, no parameter receives a gradient, and in-place operations that follow the layer
meet the clone. This holds with in-place activations, frozen parameters, non-reentrant
checkpointing, DataParallel, and callers in `no_grad` or `inference_mode`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from seg3dcam.errors import LayerError, ModelError, Seg3dcamError
from seg3dcam.layers import LayerRef, check_layout, unwrap
from seg3dcam.outputs import OutputSelection, select_output


class _LayersReached(BaseException):
    """Ends a forward pass once every target layer has run. No network should catch it."""


@contextlib.contextmanager
def capturing(
    model: nn.Module, layers: Sequence[LayerRef], output: OutputSelection = None
) -> Iterator[Capture]:
    """Hook the target layers of a model in eval mode; put everything back at the end.

    Inside, parameters are frozen, autocast and reduced-precision arithmetic are off, and gradients
    can be taken whatever mode the caller is in. Afterwards, also after an exception, hooks, the
    mode of every submodule, `requires_grad`, buffers, random states and precision settings are as
    they were; `.grad` is never written.

    Args:
        model: any `nn.Module`; DataParallel, DistributedDataParallel and compiled wrappers are
            looked through.
        layers: what `seg3dcam.layers.resolve_layers` returned for this model.
        output: which of the network's outputs are the logits, see `seg3dcam.outputs`.
    """
    model = unwrap(model)
    capture = Capture(model, layers, output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(capture.device.type, enabled=False))
        stack.enter_context(_frozen_in_eval_mode(model))
        stack.enter_context(_kept_random_state(model))
        stack.enter_context(_full_precision())
        stack.enter_context(_eager(model))
        for layer in layers:
            hook = partial(_call_hook, capture, layer)
            stack.callback(layer.module.register_forward_hook(hook).remove)
        stack.callback(capture.clear)
        yield capture


def _call_hook(capture: Capture, layer: LayerRef, module: nn.Module, args: Any, output: Any) -> Any:
    return capture.on_output(layer, output)


class Capture:
    """Runs a network and hands out the activations and gradients of its target layers.

    Made by `capturing`; a `with` around it guarantees that the model is put back.

    Attributes:
        activations: layer -> (B, C, *s) of the last pass, detached, as the layer gave them.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerRef], output: OutputSelection):
        self._model = model
        self._layers = list(layers)
        self._output = output
        self._runs: dict[LayerRef, int] = {}
        self._tensors: dict[LayerRef, torch.Tensor] = {}
        self._mode = "off"  # off | count | observe | leaf | replay
        self._stop_early = False
        self._weights: dict[str, torch.Tensor] = {}
        self._shapes: dict[LayerRef, torch.Size] = {}
        self._example = next((p for p in model.parameters() if p.is_floating_point()), None)

    @property
    def device(self) -> torch.device:
        """Where the network is (the CPU if it has no parameters)."""
        return torch.device("cpu") if self._example is None else self._example.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating dtype (float32 if it has no parameters)."""
        return torch.float32 if self._example is None else self._example.dtype

    def to_model(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` on the device and in the floating dtype of the network."""
        return x if self._example is None else x.to(self._example)

    @property
    def shapes(self) -> dict[LayerRef, tuple[int, ...]]:
        """Layer -> spatial shape of its activations in the last pass."""
        return {layer: tuple(shape[2:]) for layer, shape in self._shapes.items()}

    @property
    def activations(self) -> dict[LayerRef, torch.Tensor]:
        return {layer: tensor.detach() for layer, tensor in self._tensors.items()}

    def observe(self, x: torch.Tensor, *, copy: bool) -> torch.Tensor:
        """Return the logits of `x` without a graph; `copy` the activations on the way."""
        with torch.no_grad():
            return self._forward(x, "observe" if copy else "count")

    def observe_layers(
        self, x: torch.Tensor, weights: dict[str, torch.Tensor] | None = None
    ) -> dict[LayerRef, torch.Tensor]:
        """Return the activations of `x`; the network stops once every target layer has run.

        Args:
            weights: parameters to use in place of the network's own, by name.
        """
        self._stop_early, self._weights = True, weights or {}
        try:
            with torch.no_grad(), contextlib.suppress(_LayersReached):
                self._forward(x, "observe")
        finally:
            self._stop_early, self._weights = False, {}
        return self.activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x`, with a graph that starts at the target layers."""
        logits = self._forward(x, "leaf")
        if not logits.requires_grad:
            names = ", ".join(str(layer) for layer in self._layers) or "its input"
            raise LayerError(
                f"the network's output does not depend on {names} through a graph: the layer "
                "feeds another output, or the network's forward() switches gradients off "
                "(torch.no_grad, reentrant checkpointing: use_reentrant=False works)"
            )
        return logits

    def gradients(
        self, logits: torch.Tensor, seed: torch.Tensor, *, keep_graph: bool = False
    ) -> dict[LayerRef, torch.Tensor]:
        """Return d(seed . logits)/d(activations) of every target layer, shaped as they are."""
        tensors = [self._tensors[layer] for layer in self._layers]
        self._mode = "replay"  # non-reentrant checkpoints run their part of the forward pass again
        try:
            found = torch.autograd.grad(
                logits, tensors, seed, retain_graph=keep_graph, allow_unused=True
            )
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            raise ModelError(
                "the network uses reentrant checkpointing, which cannot give gradients of "
                "activations: pass use_reentrant=False, or switch checkpointing off"
            ) from error
        finally:
            self._mode = "off"
        for layer, gradient in zip(self._layers, found, strict=True):
            if gradient is None:
                raise LayerError(
                    f"the score does not depend on layer '{layer}': the layer feeds another "
                    "output, or nothing. suggest_layers(model, input_shape) lists layers that work"
                )
        return dict(zip(self._layers, found, strict=True))

    def clear(self) -> None:
        """Let go of the last pass's tensors."""
        self._tensors = {}

    def _forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        self._mode, self._runs, self._tensors = mode, dict.fromkeys(self._layers, 0), {}
        try:
            output = functional_call(self._model, self._weights, (x,))
        except (Seg3dcamError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            hint = (
                ". Most networks need sizes that are multiples of their coarsest stride: pad the "
                "input, or explain it in windows (WindowPlan)"
                if "must match" in str(error)
                else ""
            )
            raise ModelError(
                f"the network failed on an input of shape {tuple(x.shape)}: {error}{hint}"
            ) from error
        finally:
            self._mode = "off"
        self._check_layers(x)
        return select_output(output, self._output, tuple(x.shape[2:]))

    def on_output(self, layer: LayerRef, output: Any) -> Any:
        """Take what a layer gave; return what the network is to go on with (None: the same)."""
        if self._mode == "off":
            return None
        tensor = layer.pick(output)
        if self._mode != "replay":
            self._runs[layer] += 1
            self._shapes[layer] = tensor.shape
        if self._mode == "count":
            return None
        if self._mode == "observe":
            self._tensors[layer] = tensor.detach().clone()
            if self._stop_early and len(self._tensors) == len(self._layers):
                raise _LayersReached
            return None
        # A leaf, unless another target layer upstream needs the graph to go through this one.
        tensor = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        if self._mode == "leaf":
            self._tensors[layer] = tensor
        return layer.put(output, tensor.clone())

    def _check_layers(self, x: torch.Tensor) -> None:
        for layer, runs in self._runs.items():
            if runs == 0:
                raise LayerError(
                    f"layer '{layer}' did not run in the forward pass, so it explains nothing"
                )
            if runs > 1:
                raise LayerError(
                    f"layer '{layer}' ran {runs} times in one forward pass: its activations are "
                    "not one map. Choose a layer that runs once, for example the block around it"
                )
            check_layout(layer, self._shapes[layer], x.shape)


@contextlib.contextmanager
def _frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    if any(parameter.is_inference() for parameter, _ in parameters):
        raise ModelError(
            "the network's parameters were made inside torch.inference_mode(), where autograd "
            "cannot follow: build or load the network outside of it"
        )
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        # Set directly: a train() or eval() of the network's own may do more than set the mode.
        for module, _ in modes:
            module.training = False
        for parameter, _ in parameters:
            parameter.requires_grad = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad = requires_grad
        for module, _ in modes:
            module._buffers.clear()  # also of those that the forward pass registered
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if buffer is not None and before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


@contextlib.contextmanager
def _kept_random_state(model: nn.Module) -> Iterator[None]:
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Switch off TF32 and bfloat16 arithmetic on float32 numbers."""
    b: Any = torch.backends
    if hasattr(b.cuda.matmul, "fp32_precision"):
        operations = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]
        switch, exact = "fp32_precision", "ieee"
    else:  # before torch 2.9
        operations, switch, exact = [b.cuda.matmul, b.cudnn], "allow_tf32", ""
    before = [getattr(operation, switch) for operation in operations]
    try:
        for operation in operations:
            setattr(operation, switch, exact)
        yield
    finally:
        for operation, value in zip(operations, before, strict=True):
            setattr(operation, switch, value)


@contextlib.contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled parts eagerly: compiled code does not call hooks that came after it."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
