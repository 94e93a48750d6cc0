"""Predict changed versions of one input, running only the windows that a change touches.

The logits of a volume are a weighted sum of its windows' logits. A change of some voxels changes
the logits of the windows that see them, and no others. These windows are run again, and the rest
comes from logits that were kept, so the result is the same as that of a full rerun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from seg3dcam.engine.memory import BatchLimit, advising
from seg3dcam.engine.passes import check_resolution, suited
from seg3dcam.errors import InputError
from seg3dcam.network.capture import capturing
from seg3dcam.network.checked_input import as_input, telling_axes
from seg3dcam.network.ensemble import members_of
from seg3dcam.network.outputs import OutputSelection
from seg3dcam.progress import Progress, silent
from seg3dcam.windows import WindowPlan, plan_windows
from seg3dcam.windows.plan import box_of

#: Window -> its logits (K, *roi), the mean over the members of an ensemble.
Parts = dict[int, torch.Tensor]


class Rerun:
    """A network's prediction of one input, from which those of changed inputs are made.

    Args:
        network: any network that a CAM takes, also an `Ensemble`. It is left as it is.
        x: (1, C, *S).
        sliding_window: the windows, None for one window, the volume itself.
        output: which of the network's outputs are the logits, see `BaseCAM`.
        kept_gb: how many GB of windows' logits are kept, of the input as it is and of the last
            change, for each. What does not fit is computed again where it is needed, with the same
            result.
        progress: called with ("rerunning", done, total) after every batch of windows.

    Attributes:
        x: (1, C, *S), in the network's precision.
        logits: (1, K, *S), of the input as it is.
        windows: the windows of the volume.
        windows_run: how many windows went through the network so far; those of an ensemble's
            members count by themselves.

    Raises:
        InputError: `x` is no batch of one, or is no input that a CAM takes.
        ModelError: the logits do not have the resolution of the input.

    >>> network = nn.Conv3d(1, 2, 3, padding=1)
    >>> x = torch.rand(1, 1, 12, 8, 8)
    >>> rerun = Rerun(network, x, sliding_window=WindowPlan((4, 8, 8), overlap=0))
    >>> changed = x.clone()
    >>> changed[..., :2, :, :] = 0
    >>> logits = rerun.start().change(changed)
    >>> torch.equal(logits[..., 4:, :, :], rerun.logits[..., 4:, :, :]), round(rerun.cost, 3)
    (True, 1.333)
    """

    def __init__(
        self,
        network: nn.Module,
        x: torch.Tensor,
        *,
        sliding_window: WindowPlan | None = None,
        output: OutputSelection = None,
        kept_gb: float = 4.0,
        progress: Progress | None = None,
    ) -> None:
        self._members = members_of(network)
        self._output = output
        self._progress = progress or silent
        self.sliding_window = sliding_window
        self.windows_run = 0
        x = as_input(x)[0].clone()  # the caller may change its own in place
        if len(x) != 1:
            raise InputError(f"one input (1, C, *S) is changed at a time; got {tuple(x.shape)}")
        windows = plan_windows(sliding_window, x.shape[2:])
        with telling_axes(self._members[0], x):
            for member in self._members:
                with capturing(member, [], output) as capture:
                    x, windows = suited(capture, x, windows)
            self.x, self.windows = x, windows
            self._at_once = BatchLimit(windows.plan.sw_batch_size)
            self._room = kept_gb * 1e9
            self._total_importance = windows.total_importance(x)
            self._padded = windows.pad(x)
            self._parts: Parts = {}
            everything = set(range(len(windows)))
            self._sum = self._summed(self._padded, None, everything, self._parts)
        self.logits = self._finished(self._sum)

    @property
    def cost(self) -> float:
        """The windows run so far, in predictions of the whole volume."""
        return self.windows_run / (len(self.windows) * len(self._members))

    def start(self) -> Changes:
        """Return a series of changes that begins with the input as it is."""
        return Changes(self)

    def _finished(self, total: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, K, *S) of a sum over windows (K, *padded_shape)."""
        return self.windows.crop(total / self._total_importance)[None]

    def _touched(self, changed: torch.Tensor) -> set[int]:
        """Return the windows that see one of the changed voxels, (*padded_shape) bool."""
        starts, roi = self.windows.starts, self.windows.roi
        return {w for w, start in enumerate(starts) if changed[box_of(start, roi)].any()}

    @advising
    def _summed(
        self, padded: torch.Tensor, total: torch.Tensor | None, touched: set[int], parts: Parts
    ) -> torch.Tensor:
        """Return the sum of the windows' weighted logits, with the touched windows run again.

        Args:
            padded: the input (1, C, *padded_shape).
            total: the sum before, (K, *padded_shape), None for nothing; it is not changed.
            touched: the windows that are run again.
            parts: the logits that are kept; those of the touched windows are replaced.
        """
        windows = self.windows
        fresh = torch.zeros(windows.padded_shape, dtype=torch.bool, device=padded.device)
        for window in touched:
            fresh[box_of(windows.starts[window], windows.roi)] = True
        found = padded.new_empty(0) if total is None else total.masked_fill(fresh, 0)
        # Always in the same order, so that the sums are those of a full rerun bit by bit.
        summed = sorted(self._touched(fresh))
        run = [window for window in summed if window in touched or window not in parts]
        logits_of = self._run(padded, run)
        for window in summed:
            if window in touched or window not in parts:
                logits = next(logits_of)
                self._keep(parts, window, logits)
            else:
                logits = parts[window]
            if not len(found):
                found = logits.new_zeros(len(logits), *windows.padded_shape)
            box = box_of(windows.starts[window], windows.roi)
            found[box] += logits * (windows.importance.to(logits) * fresh[box])
        return found

    def _keep(self, parts: Parts, window: int, logits: torch.Tensor) -> None:
        """Keep a window's logits if there is room for them; else forget the older ones."""
        size = logits.numel() * logits.element_size()
        parts.pop(window, None)
        if (len(parts) + 1) * size <= self._room:
            parts[window] = logits

    def _run(self, padded: torch.Tensor, which: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the mean logits (K, *roi) of windows over the members."""
        done = 0
        for part in self._at_once.each(len(which), lambda part: self._mean(padded, which[part])):
            done += len(part)
            self.windows_run += len(part) * len(self._members)
            self._progress("rerunning", done, len(which))
            yield from part

    def _mean(self, padded: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        batch, all_logits = self.windows.cut(padded, which), []
        for member in self._members:
            with capturing(member, [], self._output) as capture:
                # A copy: a network may change its input in place.
                logits = capture.observe(capture.to_model(batch.clone()), copy=False)
                check_resolution(logits, self.windows.roi)
                all_logits.append(logits.to(batch))
        # Summed in this order, as the logits of an ensemble are elsewhere.
        return sum(all_logits[1:], all_logits[0]) / len(self._members)


class Changes:
    """A series of inputs, each made of the one before; made by `Rerun.start`.

    Attributes:
        logits: (1, K, *S), of the last input.
    """

    def __init__(self, rerun: Rerun) -> None:
        self._rerun = rerun
        self._padded, self._sum = rerun._padded, rerun._sum
        self._parts = dict(rerun._parts)
        self.logits = rerun.logits

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, K, *S) of the next input (1, C, *S) of the series.

        Raises:
            InputError: it has another shape than the first, or voxels that are not finite.
        """
        rerun = self._rerun
        if x.shape != rerun.x.shape:
            raise InputError(
                f"a changed input has the shape of the first, {tuple(rerun.x.shape)}; got "
                f"{tuple(x.shape)}"
            )
        padded = rerun.windows.pad(as_input(x)[0].to(rerun.x)).clone()
        touched = rerun._touched((padded != self._padded).any(1)[0])
        if touched:
            self._sum = rerun._summed(padded, self._sum, touched, self._parts)
            self._padded, self.logits = padded, rerun._finished(self._sum)
        return self.logits
