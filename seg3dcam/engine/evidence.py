"""What speaks for a target and against it in raw maps: as it is shown, and in figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from seg3dcam.engine.scales import ALL_AGAINST, Scale, check_scale

#: A map that varies by less than this fraction of its maximum is the same everywhere.
CONSTANT = 1e-5

#: If the evidence for a target sums to less than this part of the evidence against it, the heat
#: hides more than ten times as much as it shows.
MOSTLY_AGAINST = 0.1


def scaled(maps: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Scale each item (B, *S) on its own, in place; a constant or zero one becomes zeros.

    >>> scaled(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), "minmax").tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    >>> scaled(torch.tensor([[-4.0, 1.0]]), "signed").tolist()
    [[-1.0, 0.25]]
    """
    check_scale(scale)
    if scale == "raw":
        return maps
    flat = maps.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    bottom = low if scale == "minmax" else torch.zeros_like(low)
    top = torch.maximum(high, -low) if scale == "signed" else high
    constant = high - low <= CONSTANT * top.abs()
    height = torch.where(constant, 1, top - bottom)
    shape = (-1, *[1] * (maps.ndim - 1))
    maps -= bottom.view(shape)
    return maps.div_(height.view(shape)).masked_fill_(constant.view(shape), 0)


def shown_part(values: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return a copy of raw values; the evidence against the target is kept by "signed" alone."""
    return values.clone() if scale == "signed" else values.clamp(min=0)


class Evidence(NamedTuple):
    """The evidence for and against a target in raw maps: sums and largest values, all positive.

    >>> Evidence.of(torch.tensor([0.5, -4.0, -1.0]))
    Evidence(sum_for=0.5, sum_against=5.0, most_for=0.5, most_against=4.0)
    """

    sum_for: float
    sum_against: float
    most_for: float
    most_against: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Evidence:
        """Measure a raw map of any shape."""
        flat = values.detach().cpu().numpy()  # by numpy: in float64, without a copy of the map
        sum_for = float(flat.sum(dtype=np.float64, where=flat > 0))
        sum_against = sum_for - float(flat.sum(dtype=np.float64))
        return cls(sum_for, sum_against, max(0.0, float(flat.max())), max(0.0, -float(flat.min())))

    @classmethod
    def together(cls, parts: Sequence[Evidence]) -> Evidence:
        """Return the evidence of several maps, of at least one."""
        sums_for, sums_against, most_for, most_against = zip(*parts, strict=True)
        return cls(sum(sums_for), sum(sums_against), max(most_for), max(most_against))

    @property
    def against(self) -> float | None:
        """The part of the absolute sum that speaks against the target; None for a zero map."""
        total = self.sum_for + self.sum_against
        return self.sum_against / total if total > 0 else None

    @property
    def caution(self) -> str:
        """Say in words that a map is mostly, or all, evidence against its target; else nothing.

        A weak background against the target outweighs a small lesion in a large scan by its sum
        alone, and is no reason to distrust the heat of the lesion, which is the strongest value.

        >>> Evidence.of(torch.tensor([0.5, -4.0, -2.0])).caution.partition(":")[0]
        'mostly evidence against the target'
        >>> Evidence.of(torch.tensor([0.5, *[-0.1] * 100])).caution
        ''
        >>> Evidence.of(torch.tensor([0.0, -4.0, -2.0])).caution
        'all evidence speaks against the target: at most 4, in sum 6'
        """
        few = self.sum_for < MOSTLY_AGAINST * self.sum_against
        if not (few and self.most_for < self.most_against):
            return ""
        if self.sum_for == 0:
            return (
                f"{ALL_AGAINST}: at most {_three_digits(self.most_against)}, in sum "
                f"{_three_digits(self.sum_against)}"
            )
        return (
            "mostly evidence against the target: at most "
            f"{_three_digits(self.most_for)} for it, in sum {_three_digits(self.sum_for)}, and "
            f"{_three_digits(self.most_against)} against it, in sum "
            f"{_three_digits(self.sum_against)}"
        )


def _three_digits(number: float) -> str:
    """Write 9120 and not 9.12e+03."""
    return f"{float(f'{number:.3g}'):g}"
