"""The model, touched inside one `with`: activations and gradients out, everything put back.

A forward hook on each target layer swaps the layer's output for a clone of a detached leaf, and
the gradient comes from `torch.autograd.grad` with respect to that leaf. Nothing before the layer
enters the graph, no parameter receives a gradient, and in-place operations that follow the layer
meet the clone. This holds with in-place activations, frozen parameters, non-reentrant
checkpointing, DataParallel, and callers in `no_grad` or `inference_mode`.

The network goes on with what its layers gave; what is handed out is channel-first, (B, C, *s):
see `seg3dcam.layouts`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from seg3dcam.ensemble import Member, members_of
from seg3dcam.errors import LayerError, ModelError, Seg3dcamError
from seg3dcam.layers import LayerRef, Layout
from seg3dcam.layouts import INPUT, pulled_back, spatial_shape
from seg3dcam.outputs import OutputSelection, select_output
from seg3dcam.witnesses import Witnesses, settle


class _LayersReached(BaseException):
    """Ends a forward pass once every target layer has run. No network should catch it."""


@contextlib.contextmanager
def capturing(
    model: nn.Module | Member,
    layers: Sequence[LayerRef],
    output: OutputSelection = None,
    settled: dict[LayerRef, Layout] | None = None,
) -> Iterator[Capture]:
    """Hook the target layers of a model in eval mode; put everything back at the end.

    Inside, parameters are frozen, autocast and reduced-precision arithmetic are off, and gradients
    can be taken whatever mode the caller is in. Afterwards, also after an exception, hooks, the
    mode of every submodule, `requires_grad`, buffers, tensors kept in attributes, random states
    and precision settings are as they were; `.grad` is never written.

    Args:
        model: any `nn.Module`; DataParallel, DistributedDataParallel and compiled wrappers are
            looked through. Of an ensemble its first member, or the member that is given.
        layers: what `seg3dcam.layers.resolve_layers` returned for this model.
        output: which of the network's outputs are the logits, see `seg3dcam.outputs`.
        settled: layouts that evidence settled in earlier captures of this model; those that it
            settles in this one are added, so that nothing is found out twice.
    """
    member = model if isinstance(model, Member) else members_of(model)[0]
    model = member.network
    capture = Capture(member, layers, output, {} if settled is None else settled)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(capture.device.type, enabled=False))
        stack.enter_context(_frozen_in_eval_mode(model))
        stack.enter_context(_kept_notes(model))
        stack.enter_context(_kept_random_state())
        stack.enter_context(_full_precision())
        stack.enter_context(_eager(model))
        # Before the layers' own hooks, which swap what modules give.
        for module in filter(Witnesses.may_be, model.modules()):
            stack.callback(module.register_forward_hook(capture.on_witness).remove)
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

    A layer that is not `required` is dropped, once and for all, where it gives no map; if none is
    left, that is an error. One that has activations but no gradient is among `dropped` too, and
    later passes still show its activations. `INPUT` among the layers stands for the network's own
    input.

    What goes in and comes out lies in the volume's window; the network itself may see it flipped,
    or as a slice (`Member`).

    Attributes:
        model: the network, without wrappers.
        member: the network and how it sees its input.
        dropped: layer -> why it was dropped.
    """

    def __init__(
        self,
        member: Member,
        layers: Sequence[LayerRef],
        output: OutputSelection,
        settled: dict[LayerRef, Layout],
    ):
        self.dropped: dict[LayerRef, str] = {}
        self.member = member
        self.model = model = member.network
        self._layers = list(layers)
        self._output = output
        self._mode: Literal["off", "count", "observe", "leaf", "replay", "scale"] = "off"
        self._stop_early = False
        self._weights: dict[str, torch.Tensor] = {}
        self._example = next((p for p in model.parameters() if p.is_floating_point()), None)
        # Of the last pass; tensors as the layers gave them.
        self._input_shape: torch.Size = torch.Size()
        self._runs: dict[LayerRef, int] = {}
        self._tensors: dict[LayerRef, torch.Tensor] = {}
        self._versions: dict[LayerRef, int] = {}
        self._given: dict[LayerRef, torch.Size] = {}
        self._layouts: dict[LayerRef, Layout] = {}
        self._witnesses = Witnesses(())
        # Of all passes.
        self._settled = settled
        self._gone: set[LayerRef] = set()  # dropped, and not even looked at
        self._multipliers: dict[LayerRef, torch.Tensor] = {}
        self._copies = False

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
        """Layer -> spatial shape of its activations in the last pass, as the network has them."""
        return {
            layer: spatial_shape(self._layouts[layer], self._given[layer])
            for layer in self._layers
            if layer in self._layouts
        }

    @property
    def activations(self) -> dict[LayerRef, torch.Tensor]:
        """Layer -> (B, C, *s) of the last pass, detached."""
        return {
            layer: self._laid_out(layer, self._tensors[layer].detach())
            for layer in self._layers
            if layer in self._tensors
        }

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
            x = self.member.into(x)
            with torch.no_grad():
                self._run(x, "observe")
                self._read_layers(x)
        finally:
            self._stop_early, self._weights = False, {}
        return self.activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x`, with a graph that starts at the target layers."""
        logits = self._forward(x, "leaf")
        if not logits.requires_grad:
            names = ", ".join(map(str, self._layers[:3])) or "its input"
            names += f" and {len(self._layers) - 3} more" * (len(self._layers) > 3)
            raise LayerError(
                f"the network's output does not depend on {names} through a graph: the layer "
                "feeds another output, or the network's forward() switches gradients off "
                "(torch.no_grad, reentrant checkpointing: use_reentrant=False works)"
            )
        return logits

    def scaled(self, x: torch.Tensor, layer: LayerRef, scale: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x` where a layer's channels are multiplied; without a graph.

        Shapes and activations stay those of the last pass, which must have had inputs of this size.

        Args:
            layer: one of the target layers.
            scale: (B, C), a factor for each item of the batch and channel; 0 removes a channel.
                What the layer's layout leaves out, such as a class token, stays as it is.
        """
        x = self.member.into(x)
        if x.shape[1:] != self._input_shape[1:] or layer not in self._layouts:
            raise ValueError(f"no pass over inputs {tuple(x.shape)} has shown layer '{layer}'")
        shape = (len(x), *self._given[layer][1:])
        layout, factors = self._layouts[layer], scale[(..., *[None] * (x.ndim - 2))]
        untouched = 1 - pulled_back(layout, torch.ones_like(factors), shape)
        multiplier = pulled_back(layout, factors, shape) + untouched
        self._multipliers = {layer: multiplier}
        try:
            with torch.no_grad():
                output = self._call(x, "scale")
        finally:
            self._multipliers = {}
        return self._logits(output, x)

    def gradients(
        self,
        outputs: torch.Tensor,
        seed: torch.Tensor,
        *,
        keep_graph: bool = False,
        create_graph: bool = False,
    ) -> dict[LayerRef, torch.Tensor]:
        """Return d(seed . outputs)/d(activations) of every target layer, shaped as they are.

        Layers that the outputs do not depend on are left out.

        Args:
            outputs: the logits of `forward`, or whatever was computed from them.
            seed: shaped like `outputs`.
            keep_graph: whether the graph will be needed again.
            create_graph: whether the gradients get a graph of their own, for second derivatives.
        """
        layers = [layer for layer in self._layers if layer in self._tensors]
        tensors = [self._tensors[layer] for layer in layers]
        found = self._grad(outputs, tensors, seed, keep_graph or create_graph, create_graph)
        gradients = {}
        for layer, gradient in zip(layers, found, strict=True):
            if gradient is None:
                self._drop(
                    layer,
                    f"the score does not depend on layer '{layer}': the layer feeds another "
                    "output, or nothing. suggest_layers(model, input_shape) lists layers that work",
                )
            else:
                gradients[layer] = self._laid_out(layer, gradient)
        return gradients

    def derivative(self, value: torch.Tensor, layer: LayerRef) -> torch.Tensor:
        """Return d(value)/d(activations) of one layer, shaped as they are; the graph is kept.

        Of a value made from gradients that have a graph it is a second derivative. It is zero
        where the value does not depend on the layer, as that of a piecewise linear network.

        Args:
            value: a scalar with a graph, or without one.
        """
        found = None
        if value.requires_grad:
            (found,) = self._grad(value, [self._tensors[layer]], None, True, False)
        if found is None:
            found = torch.zeros_like(self._tensors[layer])
        return self._laid_out(layer, found.detach())

    def clear(self) -> None:
        """Let go of the last pass's tensors."""
        self._tensors = {}

    def layouts_of(
        self, shapes: Mapping[LayerRef, Sequence[int]], x: torch.Tensor
    ) -> tuple[dict[LayerRef, Layout], dict[LayerRef, LayerError]]:
        """Return how tensors of the last pass are laid out, and why others have no layout.

        Args:
            shapes: layer -> what it gave for `x`.
        """
        return settle(shapes, x, self._witnesses, self._settled, partial(self._call, mode="off"))

    def _forward(self, x: torch.Tensor, mode: Literal["count", "observe", "leaf"]) -> torch.Tensor:
        x = self.member.into(x)
        output = self._run(x, mode)
        self._read_layers(x)
        return self._logits(output, x)

    def _logits(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the logits among what the network gave for `x`, as they lie in the window."""
        return self.member.back(select_output(output, self._output, tuple(x.shape[2:])))

    def _laid_out(self, layer: LayerRef, raw: torch.Tensor) -> torch.Tensor:
        """Return what a layer gave, or its gradient, as (B, C, *s) in the window."""
        return self.member.back(self._layouts[layer](raw))

    def _run(self, x: torch.Tensor, mode: Literal["count", "observe", "leaf"]) -> Any:
        """Return the network's output, None where it was stopped at the last layer.

        Observed activations are copied only where something after the layer works in place on them:
        that is seen afterwards, by their version, and the pass is run again.
        """
        own = x.clone() if mode == "observe" and not self._copies else x
        self._begin(x)
        output = None
        with contextlib.suppress(_LayersReached):
            output = self._call(own, mode)
        if any(t._version != self._versions[layer] for layer, t in self._tensors.items()):
            self._copies = True
            return self._run(x, mode)
        return output

    def _begin(self, x: torch.Tensor) -> None:
        self._input_shape = x.shape
        self._versions = {}
        self._runs = {layer: 0 for layer in self._layers if layer not in self._gone}
        self._tensors, self._given, self._layouts = {}, {}, {}
        self._witnesses = Witnesses(x.shape)

    def _call(
        self, x: torch.Tensor, mode: Literal["off", "count", "observe", "leaf", "scale"]
    ) -> Any:
        self._mode = mode
        try:
            if INPUT in self._runs:
                changed = self.on_output(INPUT, x)
                x = x if changed is None else changed
            with _other_weights(self.model, self._weights):
                return self.model(x)
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

    def on_output(self, layer: LayerRef, output: Any) -> Any:
        """Take what a layer gave; return what the network is to go on with (None: the same)."""
        if self._mode == "off" or layer not in self._runs:
            return None
        try:
            tensor = layer.pick(output)
        except LayerError as error:
            self._refuse(layer, error)
            return None
        if self._mode == "scale":
            if layer in self._multipliers:
                return layer.put(output, tensor * self._multipliers[layer].to(tensor))
            return None
        if self._mode != "replay":
            self._runs[layer] += 1
            self._given[layer] = tensor.shape
            self._witnesses.gave(layer, tensor)
        if self._mode == "count":
            return None
        if self._mode == "observe":
            kept = tensor.detach().clone() if self._copies else tensor.detach()
            self._tensors[layer], self._versions[layer] = kept, kept._version
            if self._stop_early and len(self._tensors) == len(self._runs):
                raise _LayersReached
            return None
        # A leaf, unless another target layer upstream needs the graph to go through this one.
        leaf = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        passed_on = leaf.clone()
        if self._mode == "leaf":
            self._tensors[layer], self._versions[layer] = leaf, leaf._version
            self._witnesses.alike(tensor, passed_on)
        return layer.put(output, passed_on)

    def on_witness(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note what a module shows of the layouts of tensors."""
        if self._mode in ("count", "observe", "leaf"):
            self._witnesses.look(module, args, output)

    def _read_layers(self, x: torch.Tensor) -> None:
        """Find the layouts of what the layers gave; refuse or drop those that give no map."""
        for layer, runs in self._runs.items():
            if runs == 0:
                reason = f"layer '{layer}' did not run in the forward pass, so it explains nothing"
            elif runs > 1:
                reason = (
                    f"layer '{layer}' ran {runs} times in one forward pass: its activations are "
                    "not one map. Choose a layer that runs once, for example the block around it"
                )
            else:
                continue
            if layer not in self._gone:
                self._refuse(layer, reason)
        self._layouts, refused = self.layouts_of(self._given, x)
        for layer, error in refused.items():
            self._refuse(layer, error)

    def _refuse(self, layer: LayerRef, reason: str | LayerError) -> None:
        """Raise, or drop the layer and look at it no more."""
        self._drop(layer, reason)
        self._gone.add(layer)
        for of_the_pass in (self._tensors, self._given, self._layouts):
            of_the_pass.pop(layer, None)

    def _drop(self, layer: LayerRef, reason: str | LayerError) -> None:
        """Raise, or drop the layer where others may do without it."""
        if layer.required:
            raise reason if isinstance(reason, LayerError) else LayerError(reason)
        self.dropped[layer] = str(reason)
        if len(self.dropped) == len(self._layers):
            shown = [f"{name}: {why}" for name, why in list(self.dropped.items())[:3]]
            more = len(self.dropped) - len(shown)
            raise LayerError(
                f"none of the {len(self._layers)} target layers gives a map. "
                + "; ".join(shown)
                + (f"; and {more} more" if more else "")
            )

    def _grad(
        self,
        outputs: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        seed: torch.Tensor | None,
        keep_graph: bool,
        create_graph: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        self._mode = "replay"  # non-reentrant checkpoints run their part of the forward pass again
        try:
            return torch.autograd.grad(
                outputs,
                tensors,
                seed,
                retain_graph=keep_graph,
                create_graph=create_graph,
                allow_unused=True,
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


@contextlib.contextmanager
def _other_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a network work with other parameters, by name; a tied one is replaced everywhere.

    `torch.func.functional_call` does not put back those of a module that has two names, and the
    encoder of a nnU-Net has: `encoder` and `decoder.encoder`.
    """
    others = {id(p): weights[name] for name, p in model.named_parameters() if name in weights}
    own = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in others
    ]
    try:
        for module, name, parameter in own:
            module._parameters[name] = others[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


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


#: Attributes of every module: hooks, submodules, parameters, buffers.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def _kept_notes(model: nn.Module) -> Iterator[None]:
    """Put back the tensors that modules keep in attributes of their own.

    DynUNet notes the heads of its last pass: their graph would stay, and forbid a deepcopy.
    """

    def notes(module: nn.Module) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and _holds_tensors(value)
        }

    before = [(module, notes(module)) for module in model.modules()]
    kept = [value for _, notes_before in before for value in notes_before.values()]
    inside = [(value, copy.copy(value)) for value in kept if isinstance(value, list | dict)]
    try:
        yield
    finally:
        for module, notes_before in before:
            for name in notes(module).keys() - notes_before.keys():
                del vars(module)[name]
            vars(module).update(notes_before)
        for value, items in inside:
            value.clear()
            value.extend(items) if isinstance(value, list) else value.update(items)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return isinstance(value, torch.Tensor)
    return any(isinstance(item, torch.Tensor) for item in value)


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    # Of every card: a network without parameters draws where its input lies.
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cards):
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
