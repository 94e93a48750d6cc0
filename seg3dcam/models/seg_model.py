"""`SegModel`: a segmentation network together with how it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seg3dcam.checks import is_number
from seg3dcam.errors import ConfigError, ModelError, TargetError, nearest
from seg3dcam.files import printable, shortened
from seg3dcam.models.specs import LEAST_TEMPERATURE, MOST_TEMPERATURE
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.scan import Scan
from seg3dcam.targets import Activation
from seg3dcam.windows import WindowPlan

if TYPE_CHECKING:
    from monai.data import MetaTensor

#: Most characters in the name of a class: pictures and pages have no room for more.
LONGEST_NAME = 200


def as_is(scan: Scan) -> MetaTensor:
    """Return the scan's voxels with their affine, unchanged: (C, *S)."""
    from monai.data import MetaTensor

    return MetaTensor(scan.data, affine=torch.as_tensor(scan.affine, device="cpu"))


@dataclass(frozen=True)
class SegModel:
    """A network, how scans are prepared for it, and what its channels mean.

    Attributes:
        module: takes an input (B, C, *S) and returns logits (B, K, *S).
        class_names: one name for each of the K channels, or none if they are unknown. Characters
            that cannot be printed, such as line breaks, become spaces; a long name loses its
            middle; a name that is then empty, or the same as another, gets the number of its class.
        activation: "softmax", or "sigmoid" where classes may overlap or there is one channel.
        prepare: turns a scan into the network's input, a MetaTensor (C, *S) whose affine says where
            the prepared voxels lie.
        restore: turns (logits (K, *S) of a prepared scan, the scan, what `prepare` returned) into
            boolean masks (K, X, Y, Z) on the scan's own grid, as the model's own framework makes
            them. Where it is None or returns None, the logits are interpolated linearly on the
            scan's grid and compared there.
        window: the sliding window, or None where the network takes the whole scan at once.
        output: says which of several outputs are the logits.
        in_channels: how many channels the network takes, or None if that is unknown.
        scan_channels: how many channels a scan has, where `prepare` adds others; None means as many
            as `in_channels`.
        name: the model's name in the provenance.
        spec: the settings that the model was made from, for the provenance.
        temperature: logits are divided by it before they become probabilities, so that these say
            how often the network is right, see `calibrate`. It changes no mask and no map.
        recommended: the file in which a comparison keeps the layer and method that it recommends,
            whether there is one or not; None for a model without a place of its own.

    >>> model = SegModel(nn.Conv3d(1, 2, 1), class_names=("background", "liver"))
    >>> model.class_index("liver")
    1
    """

    module: nn.Module
    class_names: Sequence[str] = ()
    activation: Activation = "softmax"
    prepare: Callable[[Scan], MetaTensor] = field(default=as_is)
    restore: Callable[[torch.Tensor, Scan, MetaTensor], torch.Tensor | None] | None = None
    window: WindowPlan | None = None
    output: OutputSelection = None
    in_channels: int | None = None
    scan_channels: int | None = None
    name: str = "model"
    spec: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    recommended: Path | None = None

    def __post_init__(self) -> None:
        """Check the temperature; make class names printable, short and different from each other.

        Raises:
            ConfigError: a temperature that is no number from 0.01 to 100.
        """
        given, least, most = self.temperature, LEAST_TEMPERATURE, MOST_TEMPERATURE
        if not (is_number(given) and least <= given <= most):
            raise ConfigError(
                f"temperature {given!r}: legal are numbers from {least:g} to {most:g}"
            )
        names = [
            shortened(printable(name), LONGEST_NAME) or f"class {k}"
            for k, name in enumerate(self.class_names)
        ]
        different = (
            f"{name} (class {k})" if names.count(name) > 1 else name for k, name in enumerate(names)
        )
        object.__setattr__(self, "class_names", tuple(different))

    def class_index(self, name: str | int) -> int:
        """Return the channel of a class given by name or index.

        Raises:
            TargetError: there is no such class; the message lists those that there are.
        """
        if isinstance(name, int) or (name.isdecimal() and name not in self.class_names):
            index = int(name)
            if self.class_names and not 0 <= index < len(self.class_names):
                listed = ", ".join(f"{i} {n}" for i, n in enumerate(self.class_names))
                raise TargetError(f"class {index} does not exist; the classes are {listed}")
            return index
        if name in self.class_names:
            return list(self.class_names).index(name)
        raise TargetError(f"class {name!r} does not exist: {nearest(name, self.class_names)}")

    def class_name(self, index: int) -> str:
        """Return the name of a channel."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"

    def check_scan(self, scan: Scan) -> None:
        """Raise ModelError unless the scan has as many channels as the network takes."""
        channels, wanted = len(scan.data), self.scan_channels or self.in_channels
        if wanted is not None and channels != wanted:
            raise ModelError(
                f"{scan.title} has {channels} channel{'s' * (channels > 1)}, the model takes "
                f"{wanted}. Channels are the 4th axis of one NIfTI file, or one file "
                "each, in the order of the training"
            )

    def check_logits(self, logits: torch.Tensor) -> None:
        """Raise ModelError unless the logits have one channel for each class name."""
        if self.class_names and logits.shape[1] != len(self.class_names):
            raise ModelError(
                f"the network's output has {logits.shape[1]} channels, but "
                f"{len(self.class_names)} classes are named: {', '.join(self.class_names)}"
            )

    def fingerprint(self) -> str:
        """Return a hash of the weights. Equal weights have equal hashes."""
        digest = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(key.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
                digest.update(
                    value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                )
        return digest.hexdigest()[:16]


def channels_taken(module: nn.Module) -> int | None:
    """Return the input channels of a network's first convolution, or None if it has none."""
    return next((part.in_channels for part in module.modules() if isinstance(part, _ConvNd)), None)
