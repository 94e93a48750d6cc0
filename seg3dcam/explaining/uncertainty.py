"""Where is a network unsure? Entropy, and how far the members of an ensemble disagree.

    found = uncertainty("ct.nii.gz", model, flips=(0, 1, 2))
    found.save("results")  # entropy.nii.gz, mutual_information.nii.gz, figures.json
    found.pairwise_dice    # {'liver': 0.97, 'tumour': 0.71}
    found.lesions[0]       # the same of the largest lesion of the first class

Members are the folds of an ensemble, a network seen through flips, and passes with dropout
switched on. Entropy is high where the mean of their probabilities is undecided; mutual information
is the part of it that comes from their disagreement, which more data of that kind could mend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seg3dcam.checks import check_whole_number
from seg3dcam.errors import ConfigError
from seg3dcam.evaluate.rerun import Rerun
from seg3dcam.explaining.lesions import LesionUncertainty, lesions_of
from seg3dcam.explaining.placement import Placement, place_scan
from seg3dcam.files import check_writable, write_json
from seg3dcam.files.writers.nifti import write_nifti
from seg3dcam.geometry import resample
from seg3dcam.models import SegModel
from seg3dcam.network.ensemble import Ensemble, Member, members_of
from seg3dcam.progress import Progress, silent
from seg3dcam.scan import Scan, load_scan

#: Dropout of PyTorch, which may be switched on.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Uncertainty:
    """Where and how far a network is unsure, on the scan's grid.

    Attributes:
        scan: the scan.
        entropy: (X, Y, Z), of the mean of the members' probabilities, from 0 to 1: divided by its
            largest possible value. Of classes that may overlap it is the mean of theirs.
        mutual_information: (X, Y, Z), in the same unit; None with one member.
        pairwise_dice: class -> the mean Dice of the masks of each two members; 1 where no member
            draws the class. Empty with one member.
        mean_entropy: class -> the mean of the entropy over the class's mask; None without a mask.
        lesions: the connected parts of what the mean of the members draws, those of each class but
            the background, the largest first; see `LesionUncertainty`.
        members: how many there are.
    """

    scan: Scan
    entropy: torch.Tensor
    mutual_information: torch.Tensor | None
    pairwise_dice: Mapping[str, float]
    mean_entropy: Mapping[str, float | None]
    lesions: tuple[LesionUncertainty, ...]
    members: int

    def save(self, folder: str | Path) -> list[Path]:
        """Write entropy.nii.gz, with several members mutual_information.nii.gz, and figures.json.

        They replace those of an earlier call.

        Raises:
            OutputError: they cannot be written.
        """
        place = check_writable(folder)
        volumes = {"entropy": self.entropy, "mutual_information": self.mutual_information}
        figures = {
            "members": self.members,
            "classes": {
                name: {"mean_entropy": entropy, "pairwise_dice": self.pairwise_dice.get(name)}
                for name, entropy in self.mean_entropy.items()
            },
            "lesions": [asdict(lesion) for lesion in self.lesions],
        }
        if self.mutual_information is None:
            (place / "mutual_information.nii.gz").unlink(missing_ok=True)
        written = [
            write_nifti(
                place / f"{name}.nii.gz",
                volume.float().numpy(),
                self.scan.affine,
                reference=self.scan.header,
                intent_name=name[:15],
            )
            for name, volume in volumes.items()
            if volume is not None
        ]
        return [*written, write_json(place / "figures.json", figures)]


def uncertainty(
    scan: Scan | str | Path,
    model: SegModel,
    *,
    flips: Sequence[int] = (),
    dropout: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Uncertainty:
    """Return where a network is unsure about a scan.

    An `Ensemble` has its members as they are. Flips and passes with dropout make more of each.

    Args:
        scan: what `load_scan` takes.
        model: the network.
        flips: spatial axes of the network's input (0, 1, 2); all combinations of them are members.
        dropout: so many passes of each member with dropout switched on; 0 is one without.
        seed: of dropout.
        progress: called with ("members", done, total).

    Raises:
        ConfigError: illegal flips, or dropout for a network without any.
        ScanError, ModelError: as `explain`.

    Source: Kendall and Gal, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer
    Vision?", 2017; pairwise Dice as in Roy et al., "Bayesian QuickNAT", 2019.

    Example:
        >>> import numpy as np
        >>> from seg3dcam import SegModel, load_scan
        >>> network = nn.Conv3d(1, 2, 3, padding=1)
        >>> scan = load_scan(np.random.rand(8, 8, 8), affine=np.eye(4))
        >>> found = uncertainty(scan, SegModel(network, class_names=["none", "all"]), flips=[0])
        >>> found.members, tuple(found.entropy.shape)
        (2, (8, 8, 8))
    """
    check_whole_number("dropout", dropout, least=0)
    check_whole_number("seed", seed, least=0)
    members = _members(model.module, flips)
    layers = _dropout_layers(members) if dropout else []
    placement = place_scan(load_scan(scan), model, progress or silent)
    sums = _Sums(model.activation)
    passes = list(itertools.product(members, range(max(1, dropout))))
    for number, (member, draw) in enumerate(passes):
        (progress or silent)("members", number, len(passes))
        x, window = placement.network_input, model.window
        with _dropping(layers, seed + draw):
            one = Rerun(member, x, sliding_window=window, output=model.output, kept_gb=0)
        model.check_logits(one.logits)
        sums.add(one.logits[0].cpu().float() / model.temperature)
    return sums.found(placement, model)


class _Sums:
    """Sums over members, whose probabilities are in memory one after another."""

    def __init__(self, activation: str) -> None:
        self._activation = activation
        self._mean = torch.zeros(())
        self._entropy = torch.zeros(())
        self._masks: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> None:
        """Take one member's logits (K, *S)."""
        self._classes = len(logits)
        self._overlapping = self._activation == "sigmoid" or len(logits) == 1
        probability = logits.sigmoid() if self._overlapping else logits.softmax(0)
        self._mean = self._mean + probability
        self._entropy = self._entropy + self._entropy_of(probability)
        self._masks.append(self._drawn(probability))

    def found(self, placement: Placement, model: SegModel) -> Uncertainty:
        """Return what was found, on the scan's grid."""
        names = [model.class_name(index) for index in range(self._classes)]
        count = len(self._masks)
        mean = self._mean / count
        entropy = self._entropy_of(mean)
        # Rounding may leave a little less than nothing.
        shared = (entropy - self._entropy / count).clamp(min=0) if count > 1 else None
        masks = self._own(self._drawn(mean))
        of_members = [self._own(labels) for labels in self._masks]
        lesions = [
            lesion
            for index in range(0 if self._overlapping else 1, self._classes)
            for lesion in lesions_of(
                names[index],
                mean[index],
                masks[index],
                [own[index] for own in of_members],
                entropy,
                shared,
                placement.affine,
            )
        ]

        def on_scan(values: torch.Tensor) -> torch.Tensor:
            scan = placement.scan
            return resample(values, placement.affine, scan.affine, scan.shape)

        return Uncertainty(
            placement.scan,
            on_scan(entropy),
            None if shared is None else on_scan(shared),
            self._pairwise(names, of_members) if count > 1 else {},
            {
                name: float(entropy[mask].mean()) if mask.any() else None
                for name, mask in zip(names, masks, strict=True)
            },
            tuple(lesions),
            count,
        )

    def _entropy_of(self, probability: torch.Tensor) -> torch.Tensor:
        """Return the entropy (*S) of probabilities (K, *S), from 0 to 1."""
        if self._overlapping:
            both = torch.special.entr(probability) + torch.special.entr(1 - probability)
            return both.mean(0) / math.log(2)
        return torch.special.entr(probability).sum(0) / math.log(self._classes)

    def _drawn(self, probability: torch.Tensor) -> torch.Tensor:
        """Return what is drawn, in few bytes: masks (K, *S), or labels (*S)."""
        return probability > 0.5 if self._overlapping else probability.argmax(0).to(torch.int16)

    def _own(self, labels: torch.Tensor) -> list[torch.Tensor]:
        """Return a mask (*S) for each class."""
        return list(labels) if self._overlapping else [labels == k for k in range(self._classes)]

    def _pairwise(
        self, names: Sequence[str], of_members: Sequence[Sequence[torch.Tensor]]
    ) -> dict[str, float]:
        """Return class -> mean Dice of each two members' masks."""
        return {
            name: float(
                np.mean(
                    [
                        _dice(one[index], other[index])
                        for one, other in itertools.combinations(of_members, 2)
                    ]
                )
            )
            for index, name in enumerate(names)
        }


def _dice(one: torch.Tensor, other: torch.Tensor) -> float:
    size = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / size if size else 1.0


def _members(network: nn.Module, flips: Sequence[int]) -> list[nn.Module]:
    """Return every member as a network that takes and gives whole windows."""
    axes = list(dict.fromkeys(flips))
    if any(axis not in (0, 1, 2) for axis in axes):
        raise ConfigError(f"flips {list(flips)!r}: legal are the axes 0, 1 and 2")
    more = [set(some) for n in range(len(axes) + 1) for some in itertools.combinations(axes, n)]
    found: dict[tuple[int, tuple[int, ...]], nn.Module] = {}
    for member in members_of(network):
        for flip in more:
            # A flip that the ensemble has already, seen twice, is the same member once.
            both = tuple(sorted(set(member.flips) ^ flip))
            found.setdefault((id(member.network), both), _alone(member, both))
    return list(found.values())


def _alone(member: Member, flips: tuple[int, ...]) -> nn.Module:
    """Return an ensemble of one member through one flip."""
    one = Ensemble([member.network], slices=member.slices)
    one.flips = [flips]
    return one


def _dropout_layers(members: Sequence[nn.Module]) -> list[nn.Module]:
    found = {
        id(module): module
        for member in members
        for module in member.modules()
        if isinstance(module, _DROPOUTS) and module.p > 0
    }
    if not found:
        raise ConfigError("dropout: this network has no dropout layer with a rate above 0")
    return list(found.values())


@contextmanager
def _dropping(layers: Sequence[nn.Module], seed: int) -> Iterator[None]:
    """Let dropout layers drop, whatever mode they are in; random numbers are put back."""
    if not layers:
        yield
        return

    def drop(layer: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> object:
        copied = type(layer)(layer.p)
        return copied.train()(given[0])

    handles = [layer.register_forward_hook(drop) for layer in layers]
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        for handle in handles:
            handle.remove()
