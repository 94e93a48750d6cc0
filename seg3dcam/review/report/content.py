"""Collect the content of a page, and write the text of the page."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from seg3dcam.errors import InputError
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.explaining.findings import find_signed_peaks, findings
from seg3dcam.geometry import peak_voxel, same_grid, spacing_of
from seg3dcam.review.html import asset, filled, in_base64, in_json, policy
from seg3dcam.review.look import WINDOWS, Look, choose_window, colours
from seg3dcam.review.pictures.closeup import closeup_mm
from seg3dcam.review.pictures.display import edge_letters, obliquity_degrees, plan_view
from seg3dcam.review.report import maps as report_maps
from seg3dcam.review.report import packing
from seg3dcam.review.report.display_order import plan_order

#: Characters of base64 per byte.
BASE64 = 4 / 3
#: The maps together get the room that the lossless scan leaves, but at least half of the file. Each
#: map may take this part of the room that the maps before it have left.
MAP_SHARE = 1 / 3

#: Findings that are left out, since the page has a list of peaks.
PEAK_KEYS = {"peak_voxel", "peak_mm", "peaks"}

SCRIPTS = ("volume.js", "draw.js", "view.js", "panels.js", "feedback.js", "controls.js")

#: Layer -> number of its map in the page, and the raw value that became 1 in that map.
MapNumbers = dict[str, tuple[int, float]]


class Page:
    """The content of a page about one scan.

    `add` takes one explanation after another and keeps only what the page needs; `parts` returns
    the text of the page.
    """

    def __init__(self, first: Explanation, look: Look, case: str, limit_mb: float) -> None:
        self.look, self.case, self.limit = look, case, limit_mb * 1e6
        self.affine = first.affine
        self.order = plan_order(first.scan.shape, first.affine)
        self.scan, self.greys = self._scan_of(first)
        lossless = packing.foreseen_bytes(self.greys.codes, packing.ENCODINGS[0]) * BASE64
        self.map_room = self.limit - min(lossless, self.limit / 2)
        self.items: list[dict[str, Any]] = []
        self.maps: list[dict[str, Any]] = []
        self.masks: dict[str, dict[str, Any]] = {}  # base64 -> profile; equal masks are stored once

    def add(self, explanation: Explanation, name: str) -> None:
        """Add an explanation of the same scan; `name` distinguishes it from the others."""
        shape, affine = explanation.scan.shape, explanation.affine
        if shape != self.order.shape or not same_grid(self.affine, affine, shape):
            raise InputError(
                f"{explanation.label}: its scan lies on another grid ({shape} voxels) than that of "
                f"the first explanation ({self.order.shape}). A report is about one scan: write "
                "one for each"
            )
        numbers = self._add_maps(explanation)
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
                    self._layer(explanation, layer, numbers) for layer in explanation.shown_layers
                ],
            }
        )

    def _scan_of(self, explanation: Explanation) -> tuple[dict[str, Any], packing.Greys]:
        """Return the facts about the scan that the page needs, and the scan in 8 bits."""
        scan, affine, order = explanation.scan, explanation.affine, self.order
        voxels = scan.data[0].numpy()
        window = choose_window(voxels, self.look.window)
        ct = packing.is_ct(float(voxels.min()), self.look.window)
        greys = packing.grey_codes(voxels, order, window, ct)
        degrees = obliquity_degrees(affine)
        planes = ("axial", "coronal", "sagittal")
        said = {
            "shape": order.by_axis(scan.shape),
            "spacing": order.by_axis(spacing_of(affine)),
            "affine": order.affine.tolist(),
            "axes": order.by_axis("ijk"),
            "flipped": list(reversed(order.flips)),
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
        """Add a mask, unless the page has an equal one already, and return its number."""
        if mask is None:
            return None
        packed = in_base64(packing.pack_mask(mask, self.order))
        if packed not in self.masks:
            self.masks[packed] = {"profile": packing.mask_profile(mask, self.order)}
        return list(self.masks).index(packed)

    def _layer(
        self, explanation: Explanation, layer: str | None, numbers: MapNumbers
    ) -> dict[str, Any]:
        """Return what the page says about one layer, or about all layers together."""
        order, look = self.order, self.look
        notice = explanation.notice(layer, look.scale)
        found = findings(explanation, layer, look.scale)
        shown = {key: value for key, value in found.items() if key not in PEAK_KEYS}
        volume = None if notice else explanation.volume(layer, scale=look.scale)
        listed = found["peaks"]
        if look.signed and volume is not None:
            listed = [peak._asdict() for peak in find_signed_peaks(volume, explanation.affine)]
        peaks = [
            {**peak, "at": order.place(peak["voxel"]), "mm": [round(x, 2) for x in peak["mm"]]}
            for peak in listed
        ]
        names = explanation.maps if layer is None else [layer]
        said = explanation.verdict(layer)
        return {
            "name": explanation.layer_name(layer),
            "verdict": None
            if said is None
            else {"finding": said.finding, "words": said.words, "against": said.is_against},
            "notice": notice,
            "found": shown,
            "peaks": peaks,
            "closeup": _closeup(explanation, volume, look),
            "maps": [] if volume is None else _weights(explanation, names, volume, numbers, look),
            "profile": None if volume is None else packing.map_profile(volume, order, look),
        }

    def _add_maps(self, explanation: Explanation) -> MapNumbers:
        """Add the map of every layer that can be shown, and return their numbers."""
        spacing, origin = explanation.scan.spacing, explanation.origin
        numbers = {}
        for layer, values in explanation.maps.items():
            largest = float(self.look.strength(values).max())
            if explanation.left_out(layer, self.look.scale) or not largest > 0:
                continue
            lattice = report_maps.lattice_of(
                origin.layers.get(layer), origin.prepared.affine, explanation.affine
            )
            cells = np.divide(explanation.native_spacing[layer], spacing).tolist()
            share = self.map_room * MAP_SHARE / BASE64
            packed = report_maps.pack_map(
                values.float() / largest, self.order, lattice, cells, share, self.look.signed
            )
            self.map_room -= len(packed.data) * BASE64
            numbers[layer] = len(self.maps), largest
            self.maps.append({**packed._asdict(), "data": in_base64(packed.data)})
        return numbers

    def parts(self) -> Iterator[str]:
        """Yield the text of the page, piece by piece."""
        script = "".join(map(_source, SCRIPTS))
        style = _source("view.css")
        content = {
            "policy": policy(script, style),
            "style": style,
            "maps": "\n".join(one["data"] for one in self.maps),
            "masks": "\n".join(self.masks),
            "script": script,
        }
        page = _source("page.html")
        taken = len(page) + sum(map(len, content.values())) + len(in_json(self._meta(None)))
        room = (self.limit - taken - 1000) / BASE64 - 3 * len(self.greys.codes)  # for rounding
        slices = packing.pack_slices(self.greys.codes, room)
        content["slices"] = "\n".join(map(in_base64, slices.pictures))
        content["meta"] = in_json(self._meta(slices))
        yield from filled(page, content)

    def _id(self) -> str:
        """Return a hash of the page's content, under which a browser stores a reader's notes."""
        held = [self.case, *(one["data"] for one in self.maps), *self.masks]
        held += [one["name"] for one in self.items]
        return hashlib.sha256("\n".join(held).encode()).hexdigest()[:16]

    def _meta(self, slices: packing.Slices | None) -> dict[str, Any]:
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
    """Return the side in mm of the close-up of the peak; None if there is no peak."""
    if volume is None:
        return None
    strength = look.strength(volume.numpy())
    peak = peak_voxel(strength)
    return closeup_mm(volume.shape, explanation.affine, peak, strength, look.threshold)


def _weights(
    explanation: Explanation,
    names: Iterable[str],
    volume: torch.Tensor,
    numbers: MapNumbers,
    look: Look,
) -> list[tuple[int, float]]:
    """Return the numbers and weights of the maps that the page adds up to draw `volume`.

    `Explanation.volume` adds layers in their own units and divides the sum by its largest value.
    The maps of the page, however, have each been divided by their own largest value.
    """
    peak = peak_voxel(look.strength(volume))
    found = {name: numbers[name] for name in names if name in numbers}
    parts = (float(explanation.maps[name][peak]) for name in found)
    height = abs(sum(part if look.signed else max(0.0, part) for part in parts))
    return [(number, largest / height) for number, largest in found.values()] if height else []


def _source(name: str) -> str:
    return asset("seg3dcam.review.report", name)
