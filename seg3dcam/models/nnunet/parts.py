"""nnU-Net's own classes that plans and checkpoints name: found, checked, and put together.

nnU-Net itself takes anything that has the name in one of its modules, imports what the plans tell
it to import, and calls it. Here a name must lead to a class of the right kind in the right package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import pydoc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seg3dcam.errors import MissingExtraError, ModelError
from seg3dcam.models.nnunet.schemas import Checkpoint, Configuration, Dataset, Plans
from seg3dcam.models.weights import check_finite, check_fit, without_prefix

#: The packages from which a network and its parts may come without trust.
TRUSTED = ("dynamic_network_architectures.", "torch.nn.")

_TRUST = "If you know it, allow it with --trust (trust=True)"


@dataclass(frozen=True)
class Parts:
    """nnU-Net's own objects for one folder.

    Attributes:
        manager: the PlansManager.
        configuration: the ConfigurationManager of the configuration that was trained.
        labels: the LabelManager.
        trainer: the trainer's class.
    """

    manager: Any
    configuration: Any
    labels: Any
    trainer: Any


def assemble(
    file: Path,
    plans: Plans,
    configuration: Configuration,
    dataset: Dataset,
    checkpoint: Checkpoint,
    trust: bool,
) -> Parts:
    """Return nnU-Net's own objects, made of files that have been checked.

    Args:
        file: the path of plans.json, for messages.

    Raises:
        ModelError: a name leads to nothing, or to something of the wrong kind.
        MissingExtraError: nnU-Net is not installed.
    """
    try:
        from nnunetv2.preprocessing.normalization import default_normalization_schemes as schemes
        from nnunetv2.preprocessing.preprocessors import default_preprocessor
        from nnunetv2.utilities.label_handling import label_handling
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"a nnU-Net folder needs nnU-Net: pip install 'seg3dcam[nnunet]' ({error})"
        ) from error
    name = checkpoint.init_args.configuration
    content = plans.model_dump(exclude_unset=True)
    content["configurations"] = {name: configuration.model_dump(exclude_unset=True)}
    manager = PlansManager(content)
    planned = manager.get_configuration(name)

    def check(key: str, base: type[Any], find: Callable[[], Any], given: str) -> None:
        what = f"{file}: {key} {given!r}"
        _check_kind(_found(find, what), base, what, trust)

    check(
        "preprocessor_name",
        default_preprocessor.DefaultPreprocessor,
        lambda: planned.preprocessor_class,
        configuration.preprocessor_name,
    )
    check(
        "label_manager",
        label_handling.LabelManager,
        lambda: manager.label_manager_class,
        plans.label_manager,
    )
    for scheme in configuration.normalization_schemes:
        check(
            "normalization_schemes",
            schemes.ImageNormalization,
            partial(_by_name, scheme, "nnunetv2.preprocessing.normalization"),
            scheme,
        )
    for key in ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"):
        _check_resampling(planned, key, getattr(configuration, key), file, trust)
    return Parts(
        manager=manager,
        configuration=planned,
        labels=manager.get_label_manager(dataset.model_dump(exclude_unset=True)),
        trainer=_trainer(checkpoint.trainer_name, trust),
    )


def load_network(
    parts: Parts, checkpoint: Checkpoint, channels: int, place: str, trust: bool
) -> nn.Module:
    """Build the network of a checkpoint and load its weights.

    Args:
        channels: how many the network's input has.
        place: the checkpoint's name, for messages.

    Raises:
        ModelError: the network cannot be built, or the weights do not fit it.
    """
    if not trust:
        _check_classes(parts.configuration)
    state = without_prefix(checkpoint.network_weights)
    check_finite(state, place)
    empty = None
    with contextlib.suppress(Exception), torch.device("meta"):
        empty = _built(parts, channels)
    if empty is not None:  # checked first, as it takes no memory whatever the plans ask for
        check_fit(empty, state, place, "the network of plans.json")
        if not trust:
            _check_patch(empty.eval(), channels, parts)
    try:
        built = _built(parts, channels)
    except Exception as error:  # a network's code may raise anything
        raise ModelError(
            f"plans.json: {parts.configuration.network_arch_class_name} cannot be built as "
            f"{checkpoint.trainer_name} does it: {error!r}. Was the model trained with another "
            "version of nnU-Net?"
        ) from error
    check_fit(built, state, place, "the network of plans.json")
    elsewhere = {value.device.type for value in built.state_dict().values()} - {"cpu"}
    if elsewhere:
        raise ModelError(
            f"plans.json: arch_kwargs put parts of the network on the device {elsewhere.pop()}: "
            "leave device out"
        )
    built.load_state_dict(state)
    return built


def _check_patch(empty: nn.Module, channels: int, parts: Parts) -> None:
    """Raise ModelError unless a network on the meta device makes logits of the plans' patch."""
    patch = tuple(parts.configuration.patch_size)
    wanted = (1, parts.labels.num_segmentation_heads, *patch)
    try:
        with torch.no_grad():
            made = empty(torch.empty(1, channels, *patch, device="meta"))
    except NotImplementedError:  # some step needs values, which the meta device does not have
        return
    except Exception as error:  # a network's code may raise anything
        raise ModelError(
            f"plans.json: the network cannot take a patch of {patch} voxels (patch_size): {error}. "
            "Do strides, kernel_sizes and patch_size fit each other?"
        ) from error
    shape = tuple(getattr(made, "shape", ()))
    if shape != wanted:
        raise ModelError(
            f"plans.json: of a patch (1, {channels}, {', '.join(map(str, patch))}) the network "
            f"makes {shape or type(made).__name__}, but {wanted} is needed: do the strides fit?"
        )


def _built(parts: Parts, channels: int) -> nn.Module:
    """Let the trainer build the network, as nnU-Net's own predictor does."""
    build_network = parts.trainer.build_network_architecture
    configuration = parts.configuration
    if "plans_manager" in inspect.signature(build_network).parameters:
        given: tuple[Any, ...] = (parts.manager, configuration)
    else:  # before nnU-Net 2.8
        given = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    heads = parts.labels.num_segmentation_heads
    return build_network(*given, channels, heads, enable_deep_supervision=False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide what nnU-Net prints, which cannot be switched off."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
        warnings.filterwarnings("ignore", "Network class .* not found. Attempting to locate")
        yield


# ---------------------------------------------------------------- what a name leads to


def _by_name(name: str, package: str) -> Any:
    """Return what nnU-Net finds under a name in the modules of one of its packages."""
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    (place,) = importlib.import_module(package).__path__
    return recursive_find_python_class(place, name, package)


def _found(find: Callable[[], Any], what: str) -> Any:
    try:
        found = find()
    except Exception as error:  # nnU-Net imports every module that it searches
        raise ModelError(f"{what}: nnU-Net does not find it: {error!r}") from error
    if found is None:
        raise ModelError(f"{what}: there is none in the installed nnU-Net")
    return found


def _check_kind(found: Any, base: type[Any], what: str, trust: bool) -> None:
    """Raise ModelError unless an object is a class of a kind, and nnU-Net's own without trust."""
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ModelError(f"{what}: this is no {base.__name__}")
    if not trust and not found.__module__.startswith("nnunetv2."):
        raise ModelError(f"{what}: {found.__module__} is no part of nnU-Net. {_TRUST}")


def _check_resampling(planned: Any, key: str, name: str, file: Path, trust: bool) -> None:
    """Raise ModelError unless this is a resampling function that takes the planned arguments."""
    what = f"{file}: {key} {name!r}"
    bound = _found(lambda: getattr(planned, key), what)
    if not inspect.isfunction(bound.func) or not (
        trust or bound.func.__module__.startswith("nnunetv2.preprocessing.resampling")
    ):
        raise ModelError(f"{what}: this is no resampling function of nnU-Net")
    try:
        inspect.signature(bound.func).bind("data", "new shape", "from", "to", **bound.keywords)
    except TypeError as error:
        raise ModelError(f"{what}: {key}_kwargs do not fit it: {error}") from error


def _trainer(name: str, trust: bool) -> Any:
    """Return the trainer's class, which builds the network."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    try:
        found = _by_name(name, "nnunetv2.training.nnUNetTrainer")
        if found is None and trust and importlib.util.find_spec("nnunetv2.utilities.find_objects"):
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

            found = recursive_find_trainer_class_by_name(name)
    except RuntimeError:  # what nnU-Net raises where it finds nothing
        found = None
    except Exception as error:  # it imports every module that it searches
        raise ModelError(f"trainer {name!r}: nnU-Net fails to look for it: {error!r}") from error
    if not (inspect.isclass(found) and issubclass(found, nnUNetTrainer)):
        raise ModelError(
            f"trainer {name!r} is not in the installed nnU-Net. A trainer of your own lies where "
            "nnU-Net finds it for prediction: in nnunetv2/training/nnUNetTrainer, or since nnU-Net "
            "2.8 in a folder of nnUNet_extTrainer, which is looked at with --trust (trust=True)"
        )
    return found


def _check_classes(configuration: Any) -> None:
    """Raise ModelError unless the plans' network and its parts are classes of trusted packages."""
    arguments = configuration.network_arch_init_kwargs
    named = {
        "network_class_name": configuration.network_arch_class_name,
        **{key: arguments[key] for key in configuration.network_arch_init_kwargs_req_import},
    }
    for key, name in named.items():
        if name is not None and not _is_known(name):
            raise ModelError(
                f"plans.json: architecture {key} {name!r} is no network of "
                "dynamic_network_architectures or torch.nn; importing and calling it would run its "
                f"code. {_TRUST}"
            )


def _is_known(name: str) -> bool:
    """Tell whether a full name is that of a class of networks in a trusted package.

    Only modules inside the trusted packages are imported. A name that leads through something that
    such a module has imported from elsewhere is not accepted.
    """
    if not name.startswith(TRUSTED):
        return False
    module, _, last = name.rpartition(".")
    try:
        part = vars(importlib.import_module(module)).get(last)
    except Exception:  # a module that is not there, or cannot be imported here
        part = None
    if part is None and name.startswith("dynamic_network_architectures."):
        # Classes of this package have moved between modules, so nnU-Net searches for them by name.
        part = _by_name(last, "dynamic_network_architectures.architectures")
    return (
        inspect.isclass(part)
        and issubclass(part, nn.Module)
        and part.__module__.startswith(TRUSTED)
        and pydoc.locate(name) in (part, None)
    )
