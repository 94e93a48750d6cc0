"""Write the XML of a 3D Slicer scene: its nodes and the references between them.

If a reference leads nowhere, Slicer drops parts of the scene without a word. So every node that is
referred to is in the scene. Comments say what the settings are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

import numpy as np
from numpy.typing import NDArray

from seg3dcam.files import printable

#: Slice view -> its x axis, y axis and normal in RAS, in Slicer's radiological convention.
VIEWS = {
    "Red": ((-1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "Green": ((-1, 0, 0), (0, 0, 1), (0, 1, 0)),
    "Yellow": ((0, -1, 0), (0, 0, 1), (-1, 0, 0)),
}
#: The lowest CAM value that is drawn, whatever the threshold is; 0 is never drawn.
LEAST_THRESHOLD = 0.01
#: The field of view of a slice view, relative to the scan's size.
MARGIN = 1.05

#: Masks are not filled, which would hide the CAM.
OUTLINES = {
    "visibility": "true",
    "visibility2D": "true",
    "Visibility2DFill": "false",
    "Visibility2DOutline": "true",
    "sliceIntersectionThickness": "2",
}
LEGEND = {
    "visibility": "true",
    "visibility2D": "true",
    "titleText": "CAM, relative",
    "labelFormat": "%.2f",
    "position": "0.95 0.5",
    "size": "0.12 0.5",
    "orientation": "Vertical",
}
SIGNED_LEGEND = LEGEND | {"titleText": "CAM: below 0 against"}

_TABLE = "vtkMRMLColorTableNodeCAM1"
_GREY = "vtkMRMLColorTableNodeGrey"


@dataclass(frozen=True)
class SceneVolume:
    """A volume of the scene and how it is shown.

    - `name`, `description`, `attributes`: the texts of its node.
    - `file`: its file in the scene's folder, named with letters, digits, dots, hyphens and
      underscores only.
    - `low`, `high`: the values drawn in the first and the last colour. If `low` of a CAM is below
      0, the colour table decides what is transparent.
    - `threshold`: a CAM is transparent below it; None for a scan, which is drawn in grey.
    - `heat`: whether it is a CAM with heat to show.
    """

    name: str
    file: str
    low: float
    high: float
    threshold: float | None = None
    heat: bool = False
    description: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Viewpoint:
    """What the slice views show, in RAS mm.

    The slices go through `point`. `middle` and `size` are those of the scan's bounding box, and
    `spacing` is the scan's smallest spacing.
    """

    point: NDArray[np.float64]
    middle: NDArray[np.float64]
    size: NDArray[np.float64]
    spacing: float


def scene_xml(
    volumes: Sequence[SceneVolume],
    viewpoint: Viewpoint,
    *,
    table: tuple[str, str],
    masks: str | None,
    hidden: Sequence[str],
    opacity: float,
    folder: str = "",
) -> bytes:
    """Write a scene with the first volume in the background and the first CAM with heat over it.

    Args:
        volumes: first the scans, then the CAMs.
        viewpoint: what the slice views show.
        table: name and file of the CAMs' colour table.
        masks: the file of the segmentation; None if there is none.
        hidden: identifiers of its segments that are not visible at first.
        opacity: opacity of the CAM.
        folder: folder of the files, relative to that of the scene: "", or such as "Data/".
    """
    root = ET.Element("MRML")
    _add_table(root, *table, folder)
    for number, volume in enumerate(volumes, 1):
        _add_volume(root, number, volume, folder)
    if masks is not None:
        _add_masks(root, folder + masks, hidden)
    front = next((n for n, volume in enumerate(volumes, 1) if volume.heat), None)
    _add_views(root, front, opacity, viewpoint)
    ET.indent(root)
    return ET.tostring(root, encoding="UTF-8", xml_declaration=True) + b"\n"


def _add_table(root: ET.Element, name: str, file: str, folder: str) -> None:
    storage = "vtkMRMLColorTableStorageNodeCAM1"
    _add(root, "ColorTableStorage", storage, {"fileName": folder + file})
    table = {"name": name, "type": "13", "numcolors": "256"}  # type 13: a table from a file
    _add(root, "ColorTable", _TABLE, table, {"storage": storage})


def _add_volume(root: ET.Element, number: int, volume: SceneVolume, folder: str) -> None:
    storage = f"vtkMRMLVolumeArchetypeStorageNode{number}"
    display = f"vtkMRMLScalarVolumeDisplayNode{number}"
    legend = f"vtkMRMLColorLegendDisplayNode{number}"
    is_cam = volume.threshold is not None
    colour = {
        "colorNodeID": _TABLE if is_cam else _GREY,
        "autoWindowLevel": "0",  # otherwise Slicer would compute window and level from the voxels
        "window": repr(volume.high - volume.low),
        "level": repr((volume.high + volume.low) / 2),
    }
    signed = is_cam and volume.low < 0
    if volume.threshold is not None and not signed:
        colour |= {
            "applyThreshold": "1",
            "lowerThreshold": repr(max(volume.threshold, LEAST_THRESHOLD)),
            "upperThreshold": "1000000",
        }
    words = {
        "name": volume.name,
        "description": volume.description,
        "attributes": _attributes(volume.attributes),
    }
    displays = f"{display} {legend}" if is_cam else display
    _add(root, "VolumeArchetypeStorage", storage, {"fileName": folder + volume.file})
    _add(root, "VolumeDisplay", display, colour)
    if is_cam:
        shown = SIGNED_LEGEND if signed else LEGEND
        _add(root, "ColorLegendDisplay", legend, shown, {"primaryDisplay": display})
    _add(root, "Volume", _volume_id(number), words, {"display": displays, "storage": storage})


def _add_masks(root: ET.Element, file: str, hidden: Sequence[str]) -> None:
    storage, display = "vtkMRMLSegmentationStorageNode1", "vtkMRMLSegmentationDisplayNode1"
    links = {
        "display": display,
        "storage": storage,
        "referenceImageGeometryRef": _volume_id(1),
    }
    _add(root, "SegmentationStorage", storage, {"fileName": file})
    invisible = "".join(f"{segment} Visible:false|" for segment in hidden)
    outlines = OUTLINES | {"SegmentationDisplayProperties": invisible}
    _add(root, "SegmentationDisplay", display, outlines)
    _add(root, "Segmentation", "vtkMRMLSegmentationNode1", {"name": "Masks"}, links)


def _add_views(root: ET.Element, front: int | None, opacity: float, viewpoint: Viewpoint) -> None:
    shown = {"backgroundVolume": _volume_id(1)}
    chosen = {"ActiveVolume": _volume_id(1)}
    if front is not None:
        shown["foregroundVolume"] = chosen["SecondaryVolume"] = _volume_id(front)
    # Nodes with a singleton tag or a layout name do not become new nodes: Slicer applies their
    # settings to its own nodes.
    singleton = {"singletonTag": "Singleton"}
    _add(root, "Selection", "vtkMRMLSelectionNodeSingleton", singleton, chosen)
    side = float(viewpoint.size.max()) * MARGIN
    for view, axes in VIEWS.items():
        blend = {"layoutName": view, "foregroundOpacity": repr(opacity), "linkedControl": "1"}
        # Slicer does not fit views to a scene. Without these the slices would lie at the origin.
        where = {
            "name": view,
            "layoutName": view,
            "fieldOfView": _numbers([side, side, viewpoint.spacing]),
            "sliceToRAS": _numbers(_slice_to_ras(axes, viewpoint).ravel()),
            "rulerType": "thin",
            "orientationMarkerType": "axes",  # labelled R, A and S
            "orientationMarkerSize": "medium",
        }
        _add(root, "SliceComposite", f"vtkMRMLSliceCompositeNode{view}", blend, shown)
        _add(root, "Slice", f"vtkMRMLSliceNode{view}", where)


def _slice_to_ras(axes: Sequence[Sequence[float]], viewpoint: Viewpoint) -> NDArray[np.float64]:
    """Return the matrix of a slice through the viewpoint's point, centred on the scan's middle."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(axes).T
    normal = matrix[:3, 2]
    matrix[:3, 3] = viewpoint.middle + normal * (normal @ (viewpoint.point - viewpoint.middle))
    return matrix


# ------------------------------------------------------------------------------------------- text


def _add(
    root: ET.Element,
    tag: str,
    identifier: str,
    settings: Mapping[str, str],
    links: Mapping[str, str] | None = None,
) -> None:
    """Append a node; `links` maps a role to the identifiers of the nodes that have it."""
    found = {"id": identifier} | {key: printable(text) for key, text in settings.items() if text}
    if links:
        found["references"] = "".join(f"{role}:{to};" for role, to in links.items())
    ET.SubElement(root, tag, found)


def _volume_id(number: int) -> str:
    return f"vtkMRMLScalarVolumeNode{number}"


def _attributes(values: Mapping[str, str]) -> str:
    """Write the attributes of a node in Slicer's form.

    >>> _attributes({"Layer": "a;b", "Class": "50% stenosis"})
    'Layer:a%3Bb;Class:50%25 stenosis'
    """
    return ";".join(
        f"{key}:{value.replace('%', '%25').replace(';', '%3B')}" for key, value in values.items()
    )


def _numbers(values: Sequence[float] | NDArray[np.float64]) -> str:
    return " ".join(repr(float(value)) for value in values)
