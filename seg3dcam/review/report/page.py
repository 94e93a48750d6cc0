"""Write a report: one HTML file to review CAMs with, offline, in any browser, without WebGL.

    save_report("case.html", explanations, Look(window="abdomen"), case="case 12")

The page holds the slices of the scan as 8-bit pictures, the maps on coarser grids, and the masks
with one bit per voxel. From these it draws all three planes. `content` collects them, `packing` and
`maps` make them small, and `assets` holds the HTML, CSS and JavaScript of the page.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from pathlib import Path

from seg3dcam.errors import ConfigError, InputError, tell
from seg3dcam.explaining.explanation import Explanation
from seg3dcam.files import atomic
from seg3dcam.review.look import Look
from seg3dcam.review.report.content import Page
from seg3dcam.review.writing import write_all

__all__ = ["LIMIT_MB", "Report", "notebook_view", "save_report"]

#: Default limit in millions of bytes, which most mail servers accept as an attachment.
LIMIT_MB = 15.0
#: Limit in millions of bytes for a page in a notebook, whose file holds every output.
NOTEBOOK_MB = 6.0
#: Height in pixels of a page in a notebook.
NOTEBOOK_HEIGHT = 820


def save_report(
    path: str | os.PathLike[str],
    explanations: Explanation | Iterable[Explanation],
    look: Look | None = None,
    *,
    case: str = "",
    limit_mb: float = LIMIT_MB,
) -> Path:
    """Save a page to review one or several explanations of a scan.

    The scan is stored as well as `limit_mb` allows: without loss, compressed, or as shrunk slices.
    The page says which. It contains neither the scan's name nor its path.

    Args:
        path: the file, ending in .html.
        explanations: one or several of one scan, for example what `explain_each` returns.
        look: window, threshold, opacity and colours that the page starts with.
        case: name of the case in the page; "" for none.
        limit_mb: largest size of the file, in millions of bytes.

    Returns:
        The file.

    Raises:
        ConfigError: the path has another suffix, or the limit is not above 0.
        InputError: there is no explanation, or their scans lie on different grids.
        OutputError: the file cannot be written.

    Warns:
        Seg3dcamWarning: the file could not be made smaller than `limit_mb`.

    Example:
        >>> import tempfile, numpy as np, torch
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
    return write_all(report, explanations, lambda one: f"{one.label} {one.method}")[0]


def notebook_view(explanation: Explanation, look: Look | None = None) -> str:
    """Return the page of one explanation as a fragment of HTML for a notebook's output."""
    page = Page(explanation, look or Look(), "", NOTEBOOK_MB)
    page.add(explanation, explanation.label)
    srcdoc = html.escape("".join(page.parts()))
    # Without allow-same-origin the page has no access to the notebook.
    return (
        f'<iframe srcdoc="{srcdoc}" title="CAM review" sandbox="allow-scripts allow-downloads" '
        f'style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0"></iframe>'
    )


class Report:
    """Writes the page of a case whose explanations come one by one.

    Args:
        path: the file, ending in .html.
        look: window, threshold, opacity and colours that the page starts with.
        case: name of the case in the page; "" for none.
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
        self._page: Page | None = None

    def add(self, explanation: Explanation, name: str) -> None:
        """Keep what the page shows of an explanation; its volumes are not kept."""
        if self._page is None:
            self._page = Page(explanation, *self._settings)
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
            tell(
                f"{self.path.name} has {size / 1e6:.1f} MB, more than {self._page.limit / 1e6:g}: "
                "the scan cannot be stored any smaller. Explain fewer targets and layers in one "
                "report, crop the scan, or raise limit_mb"
            )
        return [self.path]
