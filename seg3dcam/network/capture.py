"""The model, touched inside one `with`: activations and gradients out, everything put back.

A forward hook on each target layer swaps the layer's output for a clone of a detached leaf, and
the gradient comes from `torch.autograd.grad` with respect to that leaf. Nothing before the layer
enters the graph, no parameter receives a gradient, and in-place operations that follow the layer
meet the clone. This holds with in-place activations, frozen parameters, non-reentrant
checkpointing, DataParallel, and callers in `no_grad` or `inference_mode`.

The network goes on with what its layers gave; what is handed out is channel-first, (B, C, *s):
see `seg3dcam.network.layouts`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import nn

from seg3dcam.errors import LayerError, ModelError, Seg3dcamError
from seg3dcam.network.ensemble import Member, members_of
from seg3dcam.network.kinds import takes_hooks
from seg3dcam.network.known import Known, opened, watched
from seg3dcam.network.layers import LayerRef, Layout
from seg3dcam.network.layout_evidence import Witnesses, settle
from seg3dcam.network.layouts import INPUT, pulled_back, spatial_shape
from seg3dcam.network.outputs import OutputSelection, select_output
from seg3dcam.network.random_draws import (
    Drawn,
    drawing_from,
    owned_generators,
    parameters_by_memory,
    random_state,
    set_random_state,
)
from seg3dcam.network.untouched import check_explainable, untouched

Asked = ParamSpec("Asked")
Result = TypeVar("Result")

#: Draws that no operation of PyTorch's shows.
OF_LIBRARIES = "of NumPy or Python"

#: Seeds from which a network is run to see what it draws, and seconds that are waited each time for
#: what other threads draw.
TRIALS = ((1, 0.01), (1, 0.05), (2, 0.01))

#: So often in a network's life: other threads that draw meanwhile get numbers of these seeds.
MOST_TRIALS = 3

#: How often an explanation is begun: each network of an ensemble may draw only now and then.
AGAIN = 8


class _LayersReached(BaseException):
    """Ends a forward pass once every target layer has run. No network should catch it."""


class FoundLateError(Seg3dcamError):
    """A pass showed what those before it should have heeded; it is `known` from now on."""


def _drawn_late(draws: str) -> FoundLateError:
    return FoundLateError(
        f"the network draws random numbers ({draws}), but only now and then, as its input or a "
        "setting is: explain it again, now that this is known"
    )


def begun_again(run: Callable[Asked, Result]) -> Callable[Asked, Result]:
    """Let a function begin again where it was found out late what a network is like.

    Raises:
        ModelError: something else was found out each time.
    """

    @functools.wraps(run)
    def running(*args: Asked.args, **kwargs: Asked.kwargs) -> Result:
        late: FoundLateError | None = None
        for _ in range(AGAIN):
            try:
                return run(*args, **kwargs)
            except FoundLateError as error:
                late = error
        raise ModelError(str(late)) from late

    return running


@contextlib.contextmanager
def capturing(
    model: nn.Module | Member,
    layers: Sequence[LayerRef],
    output: OutputSelection = None,
) -> Iterator[Capture]:
    """Hook the target layers of a model in eval mode; put everything back at the end.

    Inside, parameters are frozen, autocast and reduced-precision arithmetic are off, and gradients
    can be taken whatever mode the caller is in. Afterwards, also after an exception, hooks, the
    mode of every submodule, `requires_grad`, buffers, attributes, random states and precision
    settings are as they were; `.grad` is never written. Other threads that want to capture this
    network, or one that it shares modules with, wait.

    Args:
        model: any `nn.Module`; DataParallel, DistributedDataParallel and compiled wrappers are
            looked through. Of an ensemble its first member, or the member that is given.
        layers: what `seg3dcam.network.layers.resolve_layers` returned for this model.
        output: which of the network's outputs are the logits, see `seg3dcam.network.outputs`.

    Raises:
        ModelError: a network that cannot be explained, such as one of lazy or meta parameters; it
            has not been touched.
    """
    member = model if isinstance(model, Member) else members_of(model)[0]
    model = member.network
    with contextlib.ExitStack() as stack:
        known = stack.enter_context(opened(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        check_explainable(model)
        _check_hooks(layers)
        capture = Capture(member, layers, output, known)
        stack.enter_context(torch.autocast(capture.device.type, enabled=False))
        stack.enter_context(untouched(model, capture.overwritten))
        stack.enter_context(watched(model))
        # Before the layers' own hooks, which swap what modules give.
        for module in filter(takes_hooks, filter(Witnesses.may_be, model.modules())):
            stack.callback(module.register_forward_hook(capture.on_witness).remove)
        for layer in layers:
            hook = partial(_call_hook, capture, layer)
            stack.callback(layer.module.register_forward_hook(hook).remove)
        stack.callback(capture.clear)
        if known.overwrites:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_copy, _as_saved))
        try:
            yield capture
        except RuntimeError as error:
            if known.overwrites or "modified by an inplace operation" not in str(error):
                raise
            known.overwrites = True
            raise FoundLateError(
                "the network overwrites, in place, a tensor that its gradient needs: explain it "
                "again, now that this is known and copies are kept"
            ) from error


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return what autograd keeps for the backward pass: not to be overwritten."""
    return tensor.detach().clone()


def _as_saved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_hooks(layers: Sequence[LayerRef]) -> None:
    """Raise LayerError for a layer that cannot be looked at."""
    for layer in layers:
        if not takes_hooks(layer.module):
            raise LayerError(
                f"layer '{layer}' is TorchScript, which takes no hooks: choose the layer before or "
                "behind it, or put the module that it was made from back in its place"
            )


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
        known: what was found out about the network, now or earlier.
        dropped: layer -> why it was dropped.
        overwritten: name of a parameter that the network's passes write to -> its values before.
    """

    def __init__(
        self, member: Member, layers: Sequence[LayerRef], output: OutputSelection, known: Known
    ) -> None:
        self.dropped: dict[LayerRef, str] = {}
        self.overwritten: dict[str, torch.Tensor] = {}
        self.member = member
        self.model = model = member.network
        self.known = known
        self._layers = list(layers)
        self._output = output
        self._mode: Literal["off", "count", "observe", "leaf", "replay", "change"] = "off"
        self._stop_early = False
        self._thread = threading.get_ident()
        self._owned = owned_generators(model)
        self._random = random_state(self._owned)
        # Whether another thread, or the network, drew in the last pass.
        self._doubtful = False
        self._parameters = parameters_by_memory(model)
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
        self._gone: set[LayerRef] = set()  # dropped, and not even looked at
        self._changes: dict[LayerRef, Callable[[torch.Tensor], torch.Tensor]] = {}
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

    def find_out_whether_it_draws(self, example: Callable[[], torch.Tensor]) -> None:
        """Know from here on, `known.draws`, whether the network draws random numbers.

        Args:
            example: makes an input (B, C, *S), if one is needed.
        """
        if self.known.draws is None:
            with torch.no_grad():
                self._call(self.member.into(example()), "off")

    def observe_layers(self, x: torch.Tensor) -> dict[LayerRef, torch.Tensor]:
        """Return the activations of `x`; the network stops once every target layer has run."""
        self._stop_early = True
        try:
            x = self.member.into(x)
            with torch.no_grad():
                self._run(x, "observe")
                self._read_layers(x)
        finally:
            self._stop_early = False
        return self.activations

    def traced(self, x: torch.Tensor) -> dict[LayerRef, torch.Tensor]:
        """Return the activations of `x` with a graph, in which each depends on those before it.

        The network stops once every target layer has run. See `derivative`.
        """
        self._stop_early = True
        try:
            x = self.member.into(x)
            self._run(x, "leaf")
            self._read_layers(x)
        finally:
            self._stop_early = False
        return {layer: self._laid_out(layer, tensor) for layer, tensor in self._tensors.items()}

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
        factors = scale[(..., *[None] * (x.ndim - 2))]
        raw = self._as_given(x, layer, factors)
        # One where the layout takes nothing from, such as a class token.
        raw = raw + 1 - self._as_given(x, layer, torch.ones_like(factors))
        return self._changed(x, {layer: lambda given: given * raw.to(given)})

    def nudged(self, x: torch.Tensor, steps: Mapping[LayerRef, torch.Tensor]) -> torch.Tensor:
        """Return the logits of `x` where something is added to layers' activations; no graph.

        Args:
            x: shaped as in the last pass.
            steps: layer -> what is added, shaped like its activations.
        """
        raw = {layer: self._as_given(x, layer, step) for layer, step in steps.items()}
        return self._changed(x, {layer: partial(_sum, raw[layer]) for layer in steps})

    def _as_given(self, x: torch.Tensor, layer: LayerRef, values: torch.Tensor) -> torch.Tensor:
        """Return (B, C, *s) values laid out as a layer of the last pass gives them for `x`."""
        seen = self.member.into(x)
        if seen.shape[1:] != self._input_shape[1:] or layer not in self._layouts:
            raise ValueError(f"no pass over inputs {tuple(seen.shape)} has shown layer '{layer}'")
        shape = (len(seen), *self._given[layer][1:])
        return pulled_back(self._layouts[layer], self.member.into(values), shape)

    def _changed(
        self, x: torch.Tensor, changes: Mapping[LayerRef, Callable[[torch.Tensor], torch.Tensor]]
    ) -> torch.Tensor:
        """Return the logits of `x` where layers give something else; shapes stay known."""
        x = self.member.into(x)
        self._changes = dict(changes)
        try:
            with torch.no_grad():
                output = self._call(x, "change")
        finally:
            self._changes = {}
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
                    "output, or nothing, or nothing that has a gradient (detach(), argmax). "
                    "suggest_layers(model, input_shape) lists layers that work",
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
        run = partial(self._call, mode="off")
        return settle(shapes, x, self._witnesses, self.known.layouts, run)

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
        self, x: torch.Tensor, mode: Literal["off", "count", "observe", "leaf", "change"]
    ) -> Any:
        self._mode = mode
        try:
            if INPUT in self._runs:
                changed = self.on_output(INPUT, x)
                x = x if changed is None else changed
            alone = threading.active_count() == 1 or self.known.trials >= MOST_TRIALS
            spare = None if alone else x.detach().clone()  # networks may write to their input
            self._doubtful = False
            with self._same_draws():
                output = self.model(x)
            if self._doubtful and spare is not None:
                self.known.trials += 1
                self._find_out_who_drew(spare)
            return output
        except (Seg3dcamError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ModelError(
                f"the network failed on an input of shape {tuple(x.shape)}: {error}{_hint(error)}"
            ) from error
        finally:
            self._mode = "off"

    @contextlib.contextmanager
    def _same_draws(self) -> Iterator[None]:
        """Start every pass of a network that draws random numbers from the same state.

        Whether it draws is found out in its first complete pass.

        Raises:
            FoundLateError: it draws in this pass, and drew nothing in those before.
        """
        known = self.known
        noted = Drawn(self._parameters, self.overwritten)
        if known.draws:
            with drawing_from(self._random), noted:
                yield
            return
        late = known.draws == ""
        stopped: _LayersReached | None = None
        complete = False
        with contextlib.nullcontext() if late else drawing_from(self._random):
            before = random_state(self._owned)
            try:
                with noted:
                    yield
                complete = True
            except _LayersReached as reached:
                stopped = reached
            finally:
                now = random_state(self._owned)
                # Another thread may have drawn meanwhile, but not by an operation of this one.
                own = noted.operation or threading.active_count() == 1
                if not before.owned_equals(now) or (own and not before.equals(now)):
                    known.draws = noted.operation or OF_LIBRARIES
                    set_random_state(before)
                elif complete:
                    known.draws = ""
                    self._doubtful = not before.equals_in_libraries(now)
        if late and known.draws:
            raise _drawn_late(known.draws)
        if stopped is not None:
            raise stopped

    def _find_out_who_drew(self, x: torch.Tensor) -> None:
        """Run the network again from states of our own: its own draws lead from one to another.

        Always to the same one, however long it is waited for what other threads draw; to another
        one from another state, unless somebody has set a seed.

        Raises:
            FoundLateError: as `_same_draws`.
        """
        late, before = self.known.draws == "", random_state(self._owned)
        self._mode = "off"
        ends = []
        for seed, pause in TRIALS:
            start = before.seeded(seed)
            with torch.no_grad(), drawing_from(start):
                try:
                    self.model(x.clone())
                except Exception:
                    return  # nobody knows; the pass before has shown that it works
                time.sleep(pause)
                ends.append(random_state())
        one, again, other = ends
        drawn = not before.seeded(TRIALS[0][0]).equals_in_libraries(one)
        if drawn and one.equals_in_libraries(again) and not one.equals_in_libraries(other):
            self.known.draws = OF_LIBRARIES
            if late:
                set_random_state(self._random)
                raise _drawn_late(OF_LIBRARIES)

    def on_output(self, layer: LayerRef, output: Any) -> Any:
        """Take what a layer gave; return what the network is to go on with (None: the same)."""
        if self._mode == "off" or layer not in self._runs or self._of_another_thread():
            return None
        try:
            tensor = layer.pick(output)
        except LayerError as error:
            self._refuse(layer, error)
            return None
        if self._mode == "change":
            if layer in self._changes:
                return layer.put(output, self._changes[layer](tensor))
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
            self._stop_if_reached()
            return None
        # A leaf, unless another target layer upstream needs the graph to go through this one.
        leaf = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        passed_on = leaf.clone()
        if self._mode == "leaf":
            self._tensors[layer], self._versions[layer] = leaf, leaf._version
            self._witnesses.alike(tensor, passed_on)
            self._stop_if_reached()
        return layer.put(output, passed_on)

    def _stop_if_reached(self) -> None:
        if self._stop_early and len(self._tensors) == len(self._runs):
            raise _LayersReached

    def on_witness(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note what a module shows of the layouts of tensors."""
        if self._mode in ("count", "observe", "leaf") and not self._of_another_thread():
            self._witnesses.look(module, args, output)

    def _of_another_thread(self) -> bool:
        """Tell a pass that somebody else sends through the network at the same time.

        A backward pass replays checkpoints in threads of autograd's.
        """
        return self._mode != "replay" and threading.get_ident() != self._thread

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
        draws = drawing_from(self._random) if self.known.draws else contextlib.nullcontext()
        try:
            with draws:
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


def _hint(error: Exception) -> str:
    """Return what to do about an error of the network's, "" where nothing is known."""
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
