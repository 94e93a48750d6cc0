"""The networks that a model's YAML may build without trust, and the arguments that it may give.

A YAML may come from anybody. Without trust it can only choose a network from a table and give it
plain values, which neither read a file nor send a request. Everything else would run code that the
user has to know first.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from seg3dcam.errors import ModelError, nearest

#: Packages -> their networks. The classes are defined in the package itself; a class that a module
#: has only imported is not accepted, nor is a part of a network. Some networks are left out, since
#: building them can download or read a file whatever the arguments are, or needs more than plain
#: values: TorchVisionFCModel, MILModel, Transchex and its parts, NetAdapter, CellSamWrapper, DiNTS,
#: VISTA3D.
NETWORKS: dict[str, tuple[str, ...]] = {
    "monai.networks.nets": (
        *("AHNet", "AttentionUnet", "AutoEncoder", "BasicUNet", "BasicUNetPlusPlus"),
        *("CheckpointUNet", "Classifier", "DAF3D", "DenseNet", "DenseNet121", "DenseNet169"),
        *("DenseNet201", "DenseNet264", "DynUNet", "EfficientNet", "EfficientNetBN"),
        *("FlexibleUNet", "HighResNet", "HoVerNet", "HyenaNDUNETR", "MedNeXt", "NaViT"),
        *("Quicknat", "RegUNet", "Regressor", "ResNet", "Restormer", "SENet", "SENet154"),
        *("SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNeXt50"),
        *("SEResNext101", "SEResNeXt101", "SegResNet", "SegResNetDS", "SegResNetDS2"),
        *("SegResNetVAE", "SwinUNETR", "UNet", "UNETR", "VNet", "VarAutoEncoder", "ViT"),
        *("ViTAutoEnc", "VoxelMorphUNet"),
    ),
    "dynamic_network_architectures.architectures": (
        *("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "ResNetD", "VGG"),
        *("ResNet18", "ResNet34", "ResNet50", "ResNet152", "ResNet50bn", "ResNet152bn"),
        *("ResNet18_CIFAR", "ResNet34_CIFAR", "ResNet50_CIFAR", "ResNet152_CIFAR"),
        *("ResNet50bn_CIFAR", "ResNet152bn_CIFAR"),
        *("VGG16", "VGG19", "VGG16_cifar", "VGG19_cifar"),
    ),
    "torchvision.models": (
        *("AlexNet", "DenseNet", "GoogLeNet", "Inception3", "MNASNet", "MaxVit", "MobileNetV2"),
        *("S3D", "ShuffleNetV2", "SqueezeNet", "SwinTransformer", "SwinTransformer3d"),
        *("VisionTransformer",),
    ),
}

#: An argument with one of these words in its name sends a request, whatever its value is.
_REQUESTS = {"pretrained", "download"}

#: An argument with one of these words in its name names a file or an address, if its value is text.
#: Numbers and true or false do not, as in use_checkpoint or dropout_path_rate.
_PLACES = {
    *("cache", "checkpoint", "checkpoints", "ckpt", "dir", "directory", "file", "filename"),
    *("filepath", "folder", "hub", "load", "path", "paths", "repo", "repository", "resource"),
    *("uri", "url", "urls", "weight", "weights"),
}

#: Characters that occur in paths and addresses, but not in the name of an activation or a norm.
_PLACE = re.compile(r"[/\\:~%\x00-\x1f]|^\.|\.[A-Za-z]\w*$")

_TRUST = "allow it with --trust (trust=True)"


def network_class(factory: str, where: str) -> type[nn.Module]:
    """Return a network that may be built without trust.

    Args:
        factory: `package.module:Class`.
        where: the YAML's name, for messages.

    Raises:
        ModelError: it is not in the table, or cannot be imported.

    >>> network_class("monai.networks.nets:UNet", "model.yaml").__name__
    'UNet'
    """
    place, name = factory.split(":")
    package = next((p for p in NETWORKS if place == p or place.startswith(p + ".")), None)
    if package is None:
        raise ModelError(
            f"{where}: factory {factory} is not from {', '.join(NETWORKS)}; importing it would run "
            f"its code. If you know it, {_TRUST}"
        )
    found = vars(imported(place, f"{where}: factory {factory}")).get(name)
    networks = NETWORKS[package]
    if found is None and "." not in name:
        raise ModelError(f"{where}: no {name!r} in {place}: {nearest(name, networks)}")
    if not (
        isinstance(found, type)
        and issubclass(found, nn.Module)
        and found.__module__.startswith(package + ".")
        and found.__qualname__ in networks
    ):
        raise ModelError(
            f"{where}: factory {factory} is no torch.nn.Module class of the networks that may be "
            f"built unasked. If you know what it runs, {_TRUST}; or name one directly: "
            + nearest(name.rpartition(".")[2], networks)
        )
    return found


def imported(place: str, what: str) -> Any:
    """Import a module.

    Raises:
        ModelError: it is not installed, or its installation is damaged.
    """
    try:
        return importlib.import_module(place)
    except Exception as error:  # a damaged package raises anything: torchvision a RuntimeError
        raise ModelError(f"{what}: {place} cannot be imported: {error}") from error


def check_arguments(network: type[nn.Module], arguments: Mapping[str, Any], where: str) -> None:
    """Raise ModelError unless a network's arguments are plain values and name no file or address.

    The defaults of the other arguments are checked too, since some networks download weights by
    default.

    Args:
        where: the YAML's name, for messages.
    """
    for place, names, value in _each(arguments, "arguments"):
        plain = value is None or isinstance(value, str | int | float)
        named = any(_names_a_place(name, value) for name in names)
        if plain and not named and not (isinstance(value, str) and _PLACE.search(value)):
            continue
        reason = "may read a file or send a request" if plain else f"is a {type(value).__name__}"
        raise ModelError(
            f"{where}: {place} {value!r} of {network.__name__} {reason}; without trust, arguments "
            "are numbers, words, lists and mappings of those. The network's weights are given by "
            f"weights: leave {place} out or set it to false; or, if you know what it does, {_TRUST}"
        )
    for name, parameter in inspect.signature(network).parameters.items():
        if name not in arguments and _names_a_place(name, parameter.default):
            raise ModelError(
                f"{where}: {network.__name__} takes {name}={parameter.default!r} where it is left "
                f"out, and may read a file or send a request for it: set arguments.{name} to "
                f"false; or {_TRUST}"
            )


def _each(
    value: Any, place: str, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Yield every value and key at any depth as (its place, the names that lead to it, itself).

    A list or mapping whose name stands for a file or a request is yielded as a whole: a network may
    only ask whether the argument is given, whatever it holds.
    """
    if isinstance(value, Mapping | list | tuple) and any(_names_a_place(n, True) for n in names):
        yield place, names, str(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield place, (), key
            yield from _each(inner, f"{place}.{key}", (*names, str(key)))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _each(inner, f"{place}[{number}]", names)
    else:
        yield place, names, value


def _names_a_place(name: str, value: Any) -> bool:
    """Tell by its name and value whether an argument stands for a file or a request."""
    if value is inspect.Parameter.empty or not value:
        return False
    words = {word for word in re.split(r"[\W_]+", name.lower()) if word}
    if words & _REQUESTS or (words and words <= _PLACES):
        return True
    return isinstance(value, str) and bool(words & _PLACES)
