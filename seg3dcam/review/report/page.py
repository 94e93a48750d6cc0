"""One HTML file to review CAMs with: double click, offline, in any browser, without WebGL.

save_report("case.html", explanations, Look(window="abdomen"), case="case 12")

The page (`report/`) draws three planes from the scan's slices, stored once as 8-bit pictures, from
maps on coarser grids, and from masks of one bit a voxel; `report_data` makes these.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seg3dcam.errors import ConfigError, InputError, Seg3dcamWarning
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.findings import find_signed_peaks, findings
from seg3dcam.files import atomic
from seg3dcam.geometry import peak_voxel, same_grid, spacing_of
from seg3dcam.review.look import WINDOWS, Look, choose_window, colours
from seg3dcam.review.pictures.closeup import closeup_mm
from seg3dcam.review.pictures.display import edge_letters, obliquity_degrees, plan_view
from seg3dcam.review.report import data
from seg3dcam.review.report import maps as report_maps

__all__ = ["LIMIT_MB", "Report", "notebook_view", "save_report"]

#: A file of this size still goes by mail.
LIMIT_MB = 15.0
#: Notebooks keep every output inside their own file.
NOTEBOOK_MB = 6.0
NOTEBOOK_HEIGHT = 820

#: Base64 writes 4 letters for 3 bytes.
BASE64 = 4 / 3
#: Maps may take what the scan without loss leaves, or half of the file; each one at most this part
#: of what the ones before it have left.
MAP_SHARE = 1 / 3

#: Figures that the list of peaks says better.
PEAK_KEYS = {"peak_voxel", "peak_mm", "peaks"}

SCRIPTS = ("volume.js", "draw.js", "view.js", "panels.js", "feedback.js", "controls.js")
#: Layer -> the number of its map in the page, and the value that is 1 there.
Kept = dict[str, tuple[int, float]]

PAGE_SLOT = re.compile(r"\{\{(\w+)\}\}")


def save_report(
    path: str | os.PathLike[str],
    explanations: Explanation | Iterable[Explanation],
    look: Look | None = None,
    *,
    case: str = "",
    limit_mb: float = LIMIT_MB,
) -> Path:
    """Save a page to review one or several explanations of a scan.

    The scan is stored as well as `limit_mb` allows, from every grey code to shrunk slices, and the
    page says how. Nothing of the scan's name or path gets into it.

    Args:
        path: the file, ending in .html.
        explanations: all of one scan, for example what `explain_each` returns.
        look: window, threshold, opacity and colours that the page starts with.
        case: how the page names the case; empty: not at all.
        limit_mb: largest size of the file, in millions of bytes.

    Returns:
        The file.

    Raises:
        ConfigError: another suffix, or a limit that is not above 0.
        InputError: no explanation, or explanations of scans on different grids.
        OutputError: the file cannot be written.

    Warns:
        Seg3dcamWarning: the file is larger than `limit_mb`, whatever is done.

    Example:
        >>> import tempfile
        >>> from seg3dcam.scan import load_scan
        >>> voxels = np.random.default_rng(0).normal(40, 12, (16, 16, 8))
        >>> scan, cam = load_scan(voxels, affine=np.eye(4)), torch.zeros(16, 16, 8)
        >>> cam[4, 5, 6] = 1
        >>> explanation = Explanation(
        ...     scan, {"conv": cam}, {"conv": "ok"}, torch.ones(1, 16, 16, 8).bool(), ["lesion"],
        ...     "log-odds", "hires_cam", 0, 1.0, {"conv": (1.0, 1.0, 1.0)}, "lesion")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_report(folder + "/case.html", explanation).stat().st_size < 500_000
        True
    """
    report = Report(path, look or Look(), case, limit_mb=limit_mb)
    for one in [explanations] if isinstance(explanations, Explanation) else explanations:
        report.add(one, f"{one.label} {one.method}")
    return report.finish()[0]


def notebook_view(explanation: Explanation, look: Look | None = None) -> str:
    """Return the page of one explanation as an HTML fragment, for the output of a notebook."""
    page = _Page(explanation, look or Look(), "", NOTEBOOK_MB)
    page.add(explanation, explanation.label)
    srcdoc = html.escape("".join(page.parts()))
    # Without allow-same-origin the page can reach nothing of the notebook.
    return (
        f'<iframe srcdoc="{srcdoc}" title="CAM review" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"></iframe>'
    )


class Report:
    """Writes the page of a case whose explanations come one by one.

    Args:
        path: the file, ending in .html.
        look: what the page starts with.
        case: how the page names the case; empty: not at all.
        limit_mb: largest size of the file, in millions of bytes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        look: Look,
        case: str = "",
        *,
        limit_mb: float = LIMIT_MB,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(f"the report's path must end in .html, not {self.path.name!r}")
        if not limit_mb > 0:  # also refuses NaN
            raise ConfigError(f"limit_mb must be above 0, not {limit_mb!r}")
        self._settings = look, case, limit_mb
        self._page: _Page | None = None

    def add(self, explanation: Explanation, name: str) -> None:
        """Reduce an explanation to what the page shows; its volumes are not kept."""
        if self._page is None:
            self._page = _Page(explanation, *self._settings)
        self._page.add(explanation, name)

    def finish(self) -> list[Path]:
        """Write the file."""
        if self._page is None:
            raise InputError("a report needs at least one explanation: call add() before finish()")
        with (
            atomic(self.path) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(self._page.parts())
        size = self.path.stat().st_size
        if size > self._page.limit:
            warnings.warn(
                f"{self.path.name} has {size / 1e6:.1f} MB, more than {self._page.limit / 1e6:g}: "
                "the scan cannot be stored any smaller. Explain fewer targets and layers in one "
                "report, crop the scan, or raise limit_mb",
                Seg3dcamWarning,
                stacklevel=2,
            )
        return [self.path]


# ---------------------------------------------------------------- what the page holds


class _Page:
    """Collects small things; `parts` joins them to the text of a page about one scan."""

    def __init__(self, first: Explanation, look: Look, case: str, limit_mb: float) -> None:
        self.look, self.case, self.limit = look, case, limit_mb * 1e6
        self.affine = first.affine
        self.frame = data.plan_frame(first.scan.shape, first.affine)
        self.scan, self.greys = self._scan_of(first)
        lossless = data.foreseen_bytes(self.greys.codes, data.ENCODINGS[0]) * BASE64
        self.map_room = self.limit - min(lossless, self.limit / 2)
        self.items: list[dict[str, Any]] = []
        self.maps: list[dict[str, Any]] = []
        self.masks: dict[str, dict[str, Any]] = {}  # base64 -> profile, each mask once

    def add(self, explanation: Explanation, name: str) -> None:
        shape, affine = explanation.scan.shape, explanation.affine
        if shape != self.frame.shape or not same_grid(self.affine, affine, shape):
            raise InputError(
                f"{explanation.label}: its scan lies on another grid ({shape} voxels) than that of "
                f"the first explanation ({self.frame.shape}). A report is about one scan: write "
                "one for each"
            )
        kept = self._add_maps(explanation)
        self.items.append(
            {
                "name": name,
                "label": explanation.label or explanation.class_name,
                "class": explanation.class_name,
                "target": explanation.target,
                "method": explanation.method,
                "model": str(explanation.origin.model.name),
                "score": f"{explanation.score:.4g}",
                "prediction": self._add_mask(explanation.measured),
                "explained": explanation.measured_as.capitalize(),
                "truth": self._add_mask(explanation.truth),
                "layers": [
                    self._layer(explanation, layer, kept) for layer in explanation.shown_layers
                ],
            }
        )

    def _scan_of(self, explanation: Explanation) -> tuple[dict[str, Any], data.Greys]:
        """Return what the page says of the scan, and the scan in 8 bits."""
        scan, affine, frame = explanation.scan, explanation.affine, self.frame
        voxels = scan.data[0].numpy()
        window = choose_window(voxels, self.look.window)
        ct = data.is_ct(float(voxels.min()), self.look.window)
        greys = data.grey_codes(voxels, frame, window, ct)
        degrees = obliquity_degrees(affine)
        planes = ("axial", "coronal", "sagittal")
        said = {
            "shape": frame.by_axis(scan.shape),
            "spacing": frame.by_axis(spacing_of(affine)),
            "affine": frame.affine.tolist(),
            "axes": frame.by_axis("ijk"),
            "flipped": list(reversed(frame.flips)),
            "letters": {p: edge_letters(plan_view(scan.shape, affine, p)) for p in planes},
            "oblique": round(degrees) if degrees > 1 else 0,
            "channels": len(scan.data),
            "closeup": closeup_mm(scan.shape, affine, (0, 0, 0), None, 0),
            "values": [float(f"{value:.6g}") for value in greys.values],
            "window": {"low": window.low, "high": window.high, "text": window.text},
            "presets": WINDOWS if ct else {},
        }
        return said, greys

    def _add_mask(self, mask: torch.Tensor | None) -> int | None:
        """Keep a mask unless it is known already, and return its number."""
        if mask is None:
            return None
        packed = _base64(data.pack_mask(mask, self.frame))
        if packed not in self.masks:
            self.masks[packed] = {"profile": data.mask_profile(mask, self.frame)}
        return list(self.masks).index(packed)

    def _layer(self, explanation: Explanation, layer: str | None, kept: Kept) -> dict[str, Any]:
        """Return what the page says of one layer, or of all together."""
        frame, notice = self.frame, explanation.notice(layer, self.look.scale)
        found = findings(explanation, layer, self.look.scale)
        shown = {key: value for key, value in found.items() if key not in PEAK_KEYS}
        volume = None if notice else explanation.volume(layer, scale=self.look.scale)
        listed = found["peaks"]
        if self.look.signed and volume is not None:
            listed = [peak._asdict() for peak in find_signed_peaks(volume, explanation.affine)]
        peaks = [
            {**peak, "at": frame.place(peak["voxel"]), "mm": [round(x, 2) for x in peak["mm"]]}
            for peak in listed
        ]
        names = explanation.maps if layer is None else [layer]
        return {
            "name": explanation.layer_name(layer),
            "notice": notice,
            "found": shown,
            "peaks": peaks,
            "closeup": _closeup(explanation, volume, self.look),
            "maps": [] if volume is None else _weights(explanation, names, volume, kept, self.look),
            "profile": None if volume is None else data.map_profile(volume, frame, self.look),
        }

    def _add_maps(self, explanation: Explanation) -> Kept:
        """Keep every usable layer's map: layer -> its number, and the value that is 1 in it."""
        spacing, origin = explanation.scan.spacing, explanation.origin
        kept = {}
        for layer, values in explanation.maps.items():
            largest = float(self.look.strength(values).max())
            if explanation.left_out(layer, self.look.scale) or not largest > 0:
                continue
            lattice = None
            if layer in origin.layers and origin.prepared.affine is not None:
                lattice = report_maps.lattice_of(
                    origin.layers[layer], origin.prepared.affine, explanation.affine
                )
            cells = np.divide(explanation.native_spacing[layer], spacing).tolist()
            share = self.map_room * MAP_SHARE / BASE64
            packed = report_maps.pack_map(
                values.float() / largest, self.frame, lattice, cells, share, self.look.signed
            )
            self.map_room -= len(packed.data) * BASE64
            kept[layer] = len(self.maps), largest
            self.maps.append({**packed._asdict(), "data": _base64(packed.data)})
        return kept

    def parts(self) -> Iterator[str]:
        """Yield the page's text, piece by piece."""
        script = "".join(map(_source, SCRIPTS))
        style = _source("view.css")
        content = {
            "policy": "; ".join(
                [
                    "default-src 'none'",
                    f"script-src '{_digest(script)}'",
                    f"style-src '{_digest(style)}'",
                    "base-uri 'none'",
                    "form-action 'none'",
                ]
            ),
            "style": style,
            "maps": "\n".join(one["data"] for one in self.maps),
            "masks": "\n".join(self.masks),
            "script": script,
        }
        page = _source("page.html")
        taken = len(page) + sum(map(len, content.values())) + len(_json(self._meta(None)))
        room = (self.limit - taken - 1000) / BASE64 - 3 * len(self.greys.codes)  # rounding, lines
        slices = data.pack_slices(self.greys.codes, room)
        content["slices"] = "\n".join(map(_base64, slices.pictures))
        content["meta"] = _json(self._meta(slices))
        for number, part in enumerate(PAGE_SLOT.split(page)):
            yield content[part] if number % 2 else part

    def _id(self) -> str:
        """Return what tells this page from others: a reader's notes are kept under it."""
        held = [self.case, *(one["data"] for one in self.maps), *self.masks]
        held += [one["name"] for one in self.items]
        return hashlib.sha256("\n".join(held).encode()).hexdigest()[:16]

    def _meta(self, slices: data.Slices | None) -> dict[str, Any]:
        stored = (
            {}
            if slices is None
            else {
                "shape": slices.shape,
                "step": slices.step,
                "start": [(step - 1) / 2 for step in slices.step],
                "mime": slices.mime,
                "text": slices.encoding.text,
            }
        )
        return {
            "version": version("seg3dcam"),
            "date": date.today().isoformat(),
            "case": self.case,
            "id": self._id(),
            "scan": {**self.scan, "stored": stored},
            "look": {
                "threshold": self.look.threshold,
                "opacity": self.look.opacity,
                "colours": colours(self.look.colormap).tolist(),
                "signed": self.look.signed,
                "ends": self.look.ends,
            },
            "zero": report_maps.zero_code(self.look.signed),
            "maps": [{k: v for k, v in one.items() if k != "data"} for one in self.maps],
            "masks": list(self.masks.values()),
            "items": self.items,
        }


def _closeup(explanation: Explanation, volume: torch.Tensor | None, look: Look) -> float | None:
    """Return the mm around the peak that a close-up shows; None where there is no peak."""
    if volume is None:
        return None
    strength = look.strength(volume.numpy())
    peak = peak_voxel(strength)
    return closeup_mm(volume.shape, explanation.affine, peak, strength, look.threshold)


def _weights(
    explanation: Explanation,
    names: Iterable[str],
    volume: torch.Tensor,
    kept: Kept,
    look: Look,
) -> list[tuple[int, float]]:
    """Say which maps the page adds up to draw `volume`: their numbers and weights.

    `Explanation.volume` adds layers in their own units and divides by the sum's largest value;
    each of the page's maps is divided by its own.
    """
    peak = peak_voxel(look.strength(volume))
    found = {name: kept[name] for name in names if name in kept}
    parts = (float(explanation.maps[name][peak]) for name in found)
    height = abs(sum(part if look.signed else max(0.0, part) for part in parts))
    return [(number, largest / height) for number, largest in found.values()] if height else []


# ---------------------------------------------------------------- text


def _source(name: str) -> str:
    return (files("seg3dcam.review.report") / "assets" / name).read_text(encoding="utf-8")


def _base64(blob: bytes) -> str:
    return base64.b64encode(blob).decode("ascii")


def _digest(text: str) -> str:
    """What a policy calls the one script, or style, that may run."""
    return "sha256-" + _base64(hashlib.sha256(text.encode()).digest())


def _json(value: Any) -> str:
    """Write JSON that no text in it can end early, as `</script>` would."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
