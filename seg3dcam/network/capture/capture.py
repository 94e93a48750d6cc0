"""The class `Capture`, which runs a network and records what its target layers give."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from seg3dcam.errors import LayerError, ModelError, Seg3dcamError, some
from seg3dcam.network.capture.modes import COUNT, LEAF, OBSERVE, OFF, REPLAY, Mode, change
from seg3dcam.network.capture.record import LayersReached, PassRecord
from seg3dcam.network.capture.repeated_draws import RepeatedDraws
from seg3dcam.network.capture.target_layers import TargetLayers, fault_of_runs
from seg3dcam.network.ensemble import Member
from seg3dcam.network.facts import NetworkFacts
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layout_evidence import settle_layouts
from seg3dcam.network.layouts import INPUT, pulled_back, spatial_shape
from seg3dcam.network.outputs import OutputSelection, select_output


class Capture:
    """Runs a network and returns the activations and gradients of its target layers.

    It is made by `capturing`, whose `with` guarantees that the model is put back.

    A layer that is not `required` is dropped for good if it gives no map. If no layer is left, that
    is an error. A layer with activations but without a gradient is listed in `dropped`, too, but
    later passes still return its activations. `INPUT` among the layers stands for the network's own
    input.

    All tensors, given or returned, lie in the window of the volume. The network itself may see that
    window flipped, or as a slice (see `Member`).

    Attributes:
        model: the network, without wrappers.
        member: the network and how it sees its input.
        known: the facts about the network, from this capture or earlier ones.
        overwritten: name of a parameter that the network's passes write to -> its values before.
    """

    def __init__(
        self,
        member: Member,
        layers: Sequence[LayerRef],
        output: OutputSelection,
        known: NetworkFacts,
    ) -> None:
        self.member = member
        self.model: nn.Module = member.network
        self.known = known
        self.overwritten: dict[str, torch.Tensor] = {}
        self._targets = TargetLayers(layers)
        self._output = output
        self._draws = RepeatedDraws(self.model, known, self.overwritten)
        self._example = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        self._thread = threading.get_ident()
        self._mode = OFF
        self._record = PassRecord()  # of the last pass in which layers were recorded
        self._copies = False  # whether the network overwrites activations in place

    # --------------------------------------------------------------------- the network's own traits

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

    def find_out_whether_it_draws(self, example: Callable[[], torch.Tensor]) -> None:
        """Find out whether the network draws random numbers, and fill in `known.draws`.

        Args:
            example: makes an input (B, C, *S); called only if one is needed.
        """
        if self.known.draws is None:
            with torch.no_grad():
                self._call(self.member.into(example()), OFF)

    # ------------------------------------------------------------------------ what the layers give

    @property
    def dropped(self) -> dict[LayerRef, str]:
        """Layer -> why it was dropped."""
        return self._targets.dropped

    @property
    def shapes(self) -> dict[LayerRef, tuple[int, ...]]:
        """Layer -> spatial shape of its activations in the last pass, as the network has them."""
        record = self._record
        return {
            layer: spatial_shape(record.layouts[layer], record.shapes[layer])
            for layer in self._targets.all
            if layer in record.layouts
        }

    @property
    def activations(self) -> dict[LayerRef, torch.Tensor]:
        """Layer -> activations (B, C, *s) of the last pass, detached."""
        tensors = self._record.tensors
        return {
            layer: self._laid_out(layer, tensors[layer].detach())
            for layer in self._targets.all
            if layer in tensors
        }

    def clear(self) -> None:
        """Release the tensors of the last pass."""
        self._record.tensors = {}

    # ----------------------------------------------------------------------- passes without a graph

    def observe(self, x: torch.Tensor, *, copy: bool) -> torch.Tensor:
        """Return the logits of `x` without a graph.

        Args:
            copy: whether the activations are kept as well.
        """
        with torch.no_grad():
            return self._forward(x, OBSERVE if copy else COUNT)

    def observe_layers(self, x: torch.Tensor) -> dict[LayerRef, torch.Tensor]:
        """Return the activations of `x`. The network stops once every target layer has run."""
        x = self.member.into(x)
        with torch.no_grad():
            self._run(x, OBSERVE, stops=True)
            self._read_layers(x)
        return self.activations

    def scaled(self, x: torch.Tensor, layer: LayerRef, scale: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x` if a layer's channels are multiplied; without a graph.

        `shapes` and `activations` stay those of the last pass, whose input must have had this size.

        Args:
            layer: one of the target layers.
            scale: (B, C), a factor for each item of the batch and each channel; 0 removes a
                channel. Values that the layer's layout leaves out, such as a class token, stay
                unchanged.
        """
        factors = scale[(..., *[None] * (x.ndim - 2))]
        raw = self._as_given(x, layer, factors)
        # The factor is 1 for values that the layout leaves out, such as a class token.
        raw = raw + 1 - self._as_given(x, layer, torch.ones_like(factors))
        return self._changed(x, {layer: lambda given: given * raw.to(given)})

    def nudged(self, x: torch.Tensor, steps: Mapping[LayerRef, torch.Tensor]) -> torch.Tensor:
        """Return the logits of `x` if something is added to layers' activations; without a graph.

        Args:
            x: an input shaped as in the last pass.
            steps: layer -> what is added, shaped like its activations.
        """
        raw = {layer: self._as_given(x, layer, step) for layer, step in steps.items()}
        return self._changed(x, {layer: partial(_sum, raw[layer]) for layer in steps})

    # -------------------------------------------------------------------------- passes with a graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of `x`, with a graph that starts at the target layers."""
        logits = self._forward(x, LEAF)
        if not logits.requires_grad:
            layers = self._targets.all
            names = some([str(layer) for layer in layers], 3) or "its input"
            raise LayerError(
                f"the network's output does not depend on {names} through a graph: the layer "
                "feeds another output, or the network's forward() switches gradients off "
                "(torch.no_grad, reentrant checkpointing: use_reentrant=False works)"
            )
        return logits

    def traced(self, x: torch.Tensor) -> dict[LayerRef, torch.Tensor]:
        """Return the activations of `x` with a graph, in which each depends on those before it.

        The network stops once every target layer has run. See `derivative`.
        """
        x = self.member.into(x)
        self._run(x, LEAF, stops=True)
        self._read_layers(x)
        tensors = self._record.tensors
        return {layer: self._laid_out(layer, tensor) for layer, tensor in tensors.items()}

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
            outputs: the logits from `forward`, or values computed from them.
            seed: weights, shaped like `outputs`.
            keep_graph: whether the graph will be needed again.
            create_graph: whether the gradients get a graph of their own, for second derivatives.
        """
        layers = [layer for layer in self._targets.all if layer in self._record.tensors]
        tensors = [self._record.tensors[layer] for layer in layers]
        found = self._grad(outputs, tensors, seed, keep_graph or create_graph, create_graph)
        gradients = {}
        for layer, gradient in zip(layers, found, strict=True):
            if gradient is None:
                self._targets.drop(
                    layer,
                    f"the score does not depend on layer '{layer}': the layer feeds another "
                    "output, or nothing, or nothing that has a gradient (detach(), argmax). "
                    "suggest_layers(model, input_shape) lists layers that work",
                )
            else:
                gradients[layer] = self._laid_out(layer, gradient)
        return gradients

    def derivative(self, value: torch.Tensor, layer: LayerRef) -> torch.Tensor:
        """Return d(value)/d(activations) of one layer, shaped as they are; the graph is kept.

        If the value was computed from gradients with a graph, this is a second derivative. It is
        zero if the value does not depend on the layer, as in a piecewise linear network.

        Args:
            value: a scalar with a graph, or without one.
        """
        tensor = self._record.tensors[layer]
        found = self._grad(value, [tensor], None, True, False)[0] if value.requires_grad else None
        return self._laid_out(layer, torch.zeros_like(tensor) if found is None else found.detach())

    def _grad(
        self,
        outputs: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        seed: torch.Tensor | None,
        keep_graph: bool,
        create_graph: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        # Non-reentrant checkpoints run their part of the forward pass again, so the mode is REPLAY.
        try:
            with self._in_mode(REPLAY), self._draws.replayed():
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

    # ------------------------------------------------------------------------------------- one pass

    def _forward(self, x: torch.Tensor, mode: Mode) -> torch.Tensor:
        x = self.member.into(x)
        output = self._run(x, mode)
        self._read_layers(x)
        return self._logits(output, x)

    def _changed(
        self, x: torch.Tensor, changes: Mapping[LayerRef, Callable[[torch.Tensor], torch.Tensor]]
    ) -> torch.Tensor:
        """Return the logits of `x` with changed outputs of layers; the record is not changed."""
        x = self.member.into(x)
        with torch.no_grad():
            output = self._call(x, change(changes))
        return self._logits(output, x)

    def _run(self, x: torch.Tensor, mode: Mode, *, stops: bool = False) -> Any:
        """Return the network's output, None if it was stopped after the last layer.

        Observed activations are copied only if a later operation overwrites them in place. Their
        version counters show that after the pass, which is then run again.
        """
        own = x.clone() if mode is OBSERVE and not self._copies else x
        layers = self._targets.accepted
        self._record = PassRecord(layers, x.shape, copies=self._copies, stops=stops)
        output = None
        with contextlib.suppress(LayersReached):
            output = self._call(own, mode)
        if self._record.was_overwritten():
            self._copies = True
            return self._run(x, mode, stops=stops)
        return output

    def _call(self, x: torch.Tensor, mode: Mode) -> Any:
        """Return the network's output; random numbers are the same in every call."""
        try:
            with self._in_mode(mode):
                if INPUT in self._record.runs:
                    changed = self.on_output(INPUT, x)
                    x = x if changed is None else changed
                spare = self._draws.copy_for_trials(x)
                with self._draws.same_draws():
                    output = self.model(x)
            if spare is not None:
                self._draws.settle_who_drew(spare)
            return output
        except (Seg3dcamError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the network failed on an input of shape {tuple(x.shape)}: {error}{_hint(error)}"
            ) from error

    @contextlib.contextmanager
    def _in_mode(self, mode: Mode) -> Iterator[None]:
        """Set the mode in which layers' outputs are treated; switch the hooks off afterwards."""
        self._mode = mode
        try:
            yield
        finally:
            self._mode = OFF

    def on_output(self, layer: LayerRef, output: Any) -> Any:
        """Treat the output of a layer; return what replaces it, None if nothing does."""
        mode = self._mode
        if not mode.listens or layer not in self._record.runs or self._is_of_another_thread():
            return None
        try:
            tensor = layer.pick(output)
        except LayerError as error:
            self._refuse(layer, error)
            return None
        if mode.records:
            self._record.note(layer, tensor)
        passed_on = mode.act(self._record, layer, tensor)
        return None if passed_on is None else layer.put(output, passed_on)

    def on_evidence(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note the evidence of layouts that a module gives."""
        if self._mode.records and not self._is_of_another_thread():
            self._record.evidence.look(module, args, output)

    def _is_of_another_thread(self) -> bool:
        """Tell whether another thread is running the network at the same time."""
        return not self._mode.every_thread and threading.get_ident() != self._thread

    # ------------------------------------------------------------------ what a layer's tensor means

    def layouts_of(
        self, shapes: Mapping[LayerRef, Sequence[int]], x: torch.Tensor
    ) -> tuple[dict[LayerRef, Layout], dict[LayerRef, LayerError]]:
        """Return how tensors of the last pass are laid out, and why others have no layout.

        Args:
            shapes: layer -> shape of its output for `x`.
        """
        run = partial(self._call, mode=OFF)
        return settle_layouts(shapes, x, self._record.evidence, self.known.layouts, run)

    def _read_layers(self, x: torch.Tensor) -> None:
        """Find the layouts of the layers' outputs; refuse or drop layers that give no map."""
        record, accepted = self._record, self._targets.accepted
        for layer, runs in record.runs.items():
            fault = fault_of_runs(layer, runs)
            if fault and layer in accepted:
                self._refuse(layer, fault)
        record.layouts, refused = self.layouts_of(record.shapes, x)
        for layer, error in refused.items():
            self._refuse(layer, error)

    def _refuse(self, layer: LayerRef, reason: str | LayerError) -> None:
        """Raise LayerError if the layer is required; otherwise drop it for good."""
        self._targets.refuse(layer, reason)
        self._record.forget(layer)

    def _logits(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the logits in the network's output for `x`, moved back to the window."""
        return self.member.back(select_output(output, self._output, tuple(x.shape[2:])))

    def _laid_out(self, layer: LayerRef, raw: torch.Tensor) -> torch.Tensor:
        """Return a layer's output, or the gradient there, as (B, C, *s) in the window."""
        return self.member.back(self._record.layouts[layer](raw))

    def _as_given(self, x: torch.Tensor, layer: LayerRef, values: torch.Tensor) -> torch.Tensor:
        """Return values (B, C, *s) in the layout of a layer's output for `x`."""
        record, seen = self._record, self.member.into(x)
        if tuple(seen.shape[1:]) != record.input_shape[1:] or layer not in record.layouts:
            raise ValueError(f"no pass over inputs {tuple(seen.shape)} has shown layer '{layer}'")
        shape = (len(seen), *record.shapes[layer][1:])
        return pulled_back(record.layouts[layer], self.member.into(values), shape)


def _hint(error: Exception) -> str:
    """Return advice about an error that the network raised, "" if there is none."""
    text = str(error)
    if "must match" in text:
        return (
            ". Most networks need sizes that are multiples of their coarsest stride: pad the "
            "input, or explain it in windows (WindowPlan)"
        )
    if "modified inplace" in text or "out=..." in text:
        return (
            ". The network predicts, but has no gradient: let it make a new tensor there (part = "
            "part + 1 for part += 1), or name a layer and take a method without gradients "
            "(score_cam, ablation_cam)"
        )
    return ""


def _sum(step: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    return given + step.to(given)
