"""Reads a report back, from its bytes and its affine alone, to compare it with the volumes."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


class Reader:
    """A page's data; volumes are given back in the order of the scan's own array."""

    def __init__(self, page: Path | str, affine: NDArray[np.float64], shape: tuple[int, ...]):
        text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
        blocks = dict(re.findall(r'<script type="[^"]+" id="(\w+)">(.*?)</script>', text, re.S))
        self.text = text
        self.meta: dict[str, Any] = json.loads(blocks["meta"])
        self.bytes = {
            name: [base64.b64decode(line) for line in blocks[name].split()]
            for name in ("maps", "masks", "slices")
        }
        # Where every voxel of the scan lies in the page, (3, X, Y, Z): through the patient.
        to_page = np.linalg.inv(self.meta["scan"]["affine"]) @ affine
        voxels = np.indices(shape).reshape(3, -1)
        place = to_page[:3, :3] @ voxels + to_page[:3, 3:]
        assert np.abs(place - place.round()).max() < 1e-3
        self.place = place.reshape(3, *shape)

    def scan(self) -> NDArray[np.float64]:
        stored = self.meta["scan"]["stored"]
        slices = [np.frombuffer(blob, np.uint8) for blob in self.bytes["slices"]]
        codes = np.stack([cv2.imdecode(one, cv2.IMREAD_GRAYSCALE) for one in slices])
        assert codes.shape == tuple(reversed(stored["shape"]))
        values = np.array(self.meta["scan"]["values"])[codes]
        return self._read(values, stored["start"], stored["step"])

    def volume(self, item: int, layer: int) -> NDArray[np.float64]:
        shown = self.meta["items"][item]["layers"][layer]
        least = -np.inf if self.meta["look"]["signed"] else 0
        return sum(  # type: ignore[return-value]
            weight * np.maximum(self._map(int(number)), least) for number, weight in shown["maps"]
        )

    def _map(self, number: int) -> NDArray[np.float64]:
        packed, zero = self.meta["maps"][number], self.meta["zero"]
        steps = np.frombuffer(zlib.decompress(self.bytes["maps"][number]), np.uint8)
        codes = steps.reshape(packed["shape"][::-1]).cumsum(2).astype(np.uint8).astype(float)
        low, high = packed["ends"]
        above = (codes - zero) / (255 - zero) * high
        values = np.where(codes < zero, (zero - codes) / zero * low, above)
        return self._read(values, packed["start"], packed["step"])

    def mask(self, number: int) -> NDArray[np.bool_]:
        bits = np.frombuffer(zlib.decompress(self.bytes["masks"][number]), np.uint8)
        shape = self.meta["scan"]["shape"][::-1]
        inside = np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little").reshape(shape)
        return self._read(inside.astype(float), [0] * 3, [1] * 3) > 0.5

    def _read(
        self, values: NDArray[np.float64], start: list[float], step: list[float]
    ) -> NDArray[np.float64]:
        """Values (Z, Y, X) of a grid in the page, at every voxel of the scan."""
        at = [(self.place[n] - start[n]) / step[n] for n in (2, 1, 0)]
        return ndimage.map_coordinates(values, at, order=1, mode="nearest")
