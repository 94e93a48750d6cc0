"""A model from a file of `torch.export`.

The exported program is unflattened, which gives it submodules again, to which hooks can be
attached. A program that was exported for one shape of input takes no other shape, so the windows
must have it. A TorchScript file takes no hooks at all; its weights can be loaded into the network
of a factory.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from seg3dcam.errors import ModelError
from seg3dcam.files import digest_of
from seg3dcam.models.preparation import build_preparation
from seg3dcam.models.seg_model import SegModel
from seg3dcam.models.specs import NetworkUse
from seg3dcam.models.torchscript import is_torchscript
from seg3dcam.models.weights import check_file, check_finite

#: What to do with a file of another kind, ready to end a message.
_BY_FACTORY = (
    "build the network in Python and load its weights: give factory, arguments and weights: {} in "
    "the model's YAML in place of exported"
)

#: Operations that only a network in train mode has, or that act differently in train mode.
_OF_TRAINING = ("dropout", "native_dropout", "_native_batch_norm_legit_functional")


class Spec(NetworkUse):
    """A network exported by `torch.export`, and how it is used."""

    exported: str = Field(min_length=1, description="the .pt2 file")


def build(spec: Spec, path: Path, trust: bool) -> SegModel:
    """Load an exported program.

    Args:
        path: the file that holds the spec; the program's path is relative to it.
        trust: needed, since `torch.export.load` unpickles the file, which can run code.

    Raises:
        ModelError: the file does not exist, is of another kind, or holds a program that was
            exported in train mode.
    """
    file = path.parent / spec.exported
    program = load_program(file, trust)
    try:
        module = torch.export.unflatten(program)
        shape = _input_shape(program)
        _check_mode(program, file)
        check_finite(dict(module.state_dict()), file.name)
    except ModelError:
        raise
    except Exception as error:  # such as a graph that torch.export itself would never write
        raise ModelError(f"{file.name}: this exported program cannot be used: {error}") from error
    # The windows are checked below. The program's own check of shapes is switched off, since the
    # positions of its layers are measured with inputs of other sizes.
    module.check_input_constraints = False
    plan = spec.window_plan()
    _check_window(plan, shape, file)
    return SegModel(
        module=module,
        class_names=tuple(spec.classes),
        activation=spec.activation,
        prepare=build_preparation(spec.prepare),
        window=plan,
        output=spec.output,
        in_channels=shape[1] if len(shape) > 1 and isinstance(shape[1], int) else None,
        name=f"exported {file.stem}",
        spec={
            **spec.model_dump(mode="json", exclude={"exported", "temperature"}, exclude_none=True),
            "sha256": digest_of(file),
        },
    )


def load_program(file: Path, trust: bool) -> Any:
    """Return the exported program in a file.

    Raises:
        ModelError: the file does not exist, is of another kind, or is not trusted.
    """
    check_file(file, "file")
    if is_torchscript(file):
        raise ModelError(
            f"{file.name}: a TorchScript model takes no hooks: " + _BY_FACTORY.format(file.name)
        )
    if file.suffix in (".onnx", ".engine", ".trt", ".plan"):
        raise ModelError(
            f"{file.name}: an {file.suffix[1:]} file has no layers that PyTorch could explain: "
            "export its PyTorch network by torch.export, or " + _BY_FACTORY.format("<its weights>")
        )
    if not trust:
        raise ModelError(
            f"{file.name}: reading an exported program can run code that is pickled in it. If you "
            "know where it comes from, allow it with --trust (trust=True)"
        )
    try:
        with warnings.catch_warnings(), _without_log():
            warnings.simplefilter("ignore")
            return torch.export.load(str(file))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{file.name}: cannot be read as an exported program ({first_line}); legal is what "
            "torch.export.save wrote. A state dict: " + _BY_FACTORY.format(file.name)
        ) from error


@contextmanager
def _without_log() -> Iterator[None]:
    """Silence PyTorch's log of a damaged file's traceback; the error that follows says the same."""
    log = logging.getLogger("torch.export")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _input_shape(program: Any) -> tuple[int | None, ...]:
    """Return the shape of the program's input, with None where any size is allowed."""
    inputs = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes}
    if len(inputs) != 1 or inputs[0] not in nodes:
        raise ModelError(
            f"the exported program takes {len(inputs)} inputs; networks with one can be explained"
        )
    shape = nodes[inputs[0]].meta["val"].shape
    return tuple(n if isinstance(n, int) else None for n in shape)


def _check_mode(program: Any, file: Path) -> None:
    """Raise ModelError where a program would act as it does in training."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            active = name in _OF_TRAINING and not (name == "dropout" and not node.args[2])
            training = name in ("batch_norm", "instance_norm") and node.args[5] is True
            if active or (training and name == "batch_norm"):
                raise ModelError(
                    f"{file.name}: the network was exported in train mode ({name} is active): call "
                    "network.eval() before torch.export.export"
                )


def _check_window(plan: Any, shape: tuple[int | None, ...], file: Path) -> None:
    """Raise ModelError where the program takes one shape and the windows have another."""
    wanted = shape[2:]
    if plan is None or not any(isinstance(n, int) for n in wanted):
        return
    sizes = plan.roi_size if isinstance(plan.roi_size, list | tuple) else [plan.roi_size]
    roi = tuple(sizes) * (len(wanted) if len(sizes) == 1 else 1)
    fits = all(n is None or n == size for n, size in zip(wanted, roi, strict=False))
    batch = shape[0] is None or shape[0] == plan.sw_batch_size
    if not fits or not batch:
        shown = ["any" if n is None else str(n) for n in shape]
        raise ModelError(
            f"{file.name}: exported for inputs ({', '.join(shown)}): set window.roi_size to "
            f"[{', '.join(shown[2:])}] and sw_batch_size to {shown[0]}, or export it with "
            "dynamic_shapes"
        )
