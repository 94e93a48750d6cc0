"""Load a scene with 3D Slicer's own code, and say in JSON on the last line what is there.

    python slicer_reader.py scene.mrml pictures

The folder `pictures` gets the three slice views: as PNG, with outlines and colour legend, and in
`views.npz` the pixels of scan and CAM blended, and where they lie.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

VIEWS = ("Red", "Green", "Yellow")
SIZE = 512
DRAWN = (
    "vtkMRMLSegmentationsDisplayableManager2D",
    "vtkMRMLColorLegendDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
    "vtkMRMLOrientationMarkerDisplayableManager",
)


def main(path: Path, pictures: Path) -> None:
    heard = vtk.vtkStringOutputWindow()
    vtk.vtkOutputWindow.SetInstance(heard)
    scene, said = slicer.vtkMRMLScene(), slicer.vtkMRMLMessageCollection()
    views, _kept_alive = start(scene)
    read = {".mrml": read_scene, ".mrb": read_bundle}[path.suffix]
    loaded = read(scene, path, said)
    found = {
        "loaded": bool(loaded),
        "said": said.GetAllMessagesAsString(),
        "volumes": [volume(node) for node in nodes(scene, "vtkMRMLScalarVolumeNode")],
        "segments": [s for n in nodes(scene, "vtkMRMLSegmentationNode") for s in segments(n)],
        "views": {name: described(view) for name, (view, _) in views.items()},
        "slices": scene.GetNumberOfNodesByClass("vtkMRMLSliceNode"),
        "active": scene.GetFirstNodeByClass("vtkMRMLSelectionNode").GetActiveVolumeID(),
    }
    pictures.mkdir(exist_ok=True)
    np.savez(pictures / "views.npz", **{name: blended(view) for name, (view, _) in views.items()})
    found["heard"] = heard.GetOutput()  # before a window asks for a screen
    for name, (view, window) in views.items():
        view.GetSliceNode().Modified()  # as when the window appears
        save(window, pictures / f"{name}.png")
    print(json.dumps(found))  # noqa: T201


def start(scene):
    """Do what the program does when it starts: its colours, and its three slice views."""
    scene.RegisterNodeClass(slicer.vtkMRMLColorLegendDisplayNode())
    colours, application = slicer.vtkMRMLColorLogic(), slicer.vtkMRMLApplicationLogic()
    colours.SetMRMLScene(scene)
    application.SetMRMLScene(scene)
    logics = vtk.vtkCollection()
    application.SetSliceLogics(logics)
    views = {}
    for name in VIEWS:
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(application)
        logic.SetMRMLScene(scene)
        logics.AddItem(logic)
        logic.AddSliceNode(name).SetDimensions(SIZE, SIZE, 1)
        views[name] = logic, windowed(application, logic)
    return views, (application, colours)


def read_scene(scene, path, said):
    scene.SetURL(str(path))
    return scene.Import(said)


def read_bundle(scene, path, said):
    with tempfile.TemporaryDirectory() as folder:  # where the program unpacks it
        cache, manager = slicer.vtkCacheManager(), slicer.vtkDataIOManager()
        cache.SetRemoteCacheDirectory(folder)
        manager.SetCacheManager(cache)
        scene.SetDataIOManager(manager)
        return scene.ReadFromMRB(str(path), False, said)


def nodes(scene, kind):
    return [scene.GetNthNodeByClass(n, kind) for n in range(scene.GetNumberOfNodesByClass(kind))]


def array(matrix):
    return [[matrix.GetElement(row, column) for column in range(4)] for row in range(4)]


def volume(node):
    place = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(place)
    shown = node.GetDisplayNode()
    colors = shown.GetColorNode()
    table = vtk_to_numpy(colors.GetLookupTable().GetTable())
    voxels = vtk_to_numpy(node.GetImageData().GetPointData().GetScalars())
    return {
        "id": node.GetID(),
        "name": node.GetName(),
        "description": node.GetDescription(),
        "attributes": {name: node.GetAttribute(name) for name in node.GetAttributeNames()},
        "affine": array(place),
        "shape": node.GetImageData().GetDimensions(),
        "sum": float(voxels.sum(dtype=np.float64)),
        "peak": int(voxels.argmax()),
        "display": shown.GetID(),
        "window": shown.GetWindow(),
        "level": shown.GetLevel(),
        "auto": shown.GetAutoWindowLevel(),
        "threshold": [shown.GetApplyThreshold(), shown.GetLowerThreshold()],
        "colours": colors.GetName(),
        "table": table[:, :3].tolist(),
    }


def segments(node):
    shown, all_of_it = node.GetDisplayNode(), node.GetSegmentation()
    for number in range(all_of_it.GetNumberOfSegments()):
        one = all_of_it.GetNthSegment(number)
        labels = slicer.vtkOrientedImageData()
        node.GetBinaryLabelmapRepresentation(all_of_it.GetNthSegmentID(number), labels)
        place = vtk.vtkMatrix4x4()
        labels.GetImageToWorldMatrix(place)
        scalars = labels.GetPointData().GetScalars()
        inside = vtk_to_numpy(scalars) if scalars else np.zeros(0)
        extent = labels.GetExtent()
        size = [high - low + 1 for low, high in zip(extent[::2], extent[1::2], strict=True)]
        where = np.argwhere(inside.reshape(size[::-1]))[:, ::-1] + extent[::2]
        yield {
            "name": one.GetName(),
            "colour": one.GetColor(),
            "affine": array(place),
            "voxels": len(where),
            "middle": where.mean(0).tolist() if len(where) else None,
            "fill": shown.GetVisibility2DFill(),
            "visible": shown.GetSegmentVisibility(all_of_it.GetNthSegmentID(number)),
            "outline": shown.GetVisibility2DOutline(),
            "of": node.GetNodeReferenceID("referenceImageGeometryRef"),
        }


def described(view):
    node, blend = view.GetSliceNode(), view.GetSliceCompositeNode()
    return {
        "background": blend.GetBackgroundVolumeID(),
        "foreground": blend.GetForegroundVolumeID(),
        "opacity": blend.GetForegroundOpacity(),
        "orientation": node.GetOrientation(),
        "place": array(node.GetSliceToRAS()),
        "field_of_view": node.GetFieldOfView(),
    }


def blended(view):
    """The pixels of scan and CAM, without outlines and legend: (row, column, 3), from the top."""
    view.GetBlend().Update()
    pixels = vtk_to_numpy(view.GetBlend().GetOutput().GetPointData().GetScalars())
    pixels = pixels.reshape(SIZE, SIZE, 4)[::-1]
    return pixels[..., :3] * (pixels[..., 3:] > 0)  # outside of the scan: clear, on black


def windowed(application, view):
    """A window with scan and CAM, and what the program draws over them."""
    renderer, window = vtk.vtkRenderer(), vtk.vtkRenderWindow()
    window.SetOffScreenRendering(1)
    window.SetSize(SIZE, SIZE)
    window.AddRenderer(renderer)
    mapper, actor = vtk.vtkImageMapper(), vtk.vtkActor2D()
    mapper.SetColorWindow(255)
    mapper.SetColorLevel(127.5)
    mapper.SetInputConnection(view.GetBlend().GetOutputPort())
    actor.SetMapper(mapper)
    renderer.AddViewProp(actor)
    interactor = vtk.vtkRenderWindowInteractor()
    interactor.SetRenderWindow(window)
    group = slicer.vtkMRMLDisplayableManagerGroup()
    group.SetRenderer(renderer)
    for kind in DRAWN:
        manager = getattr(slicer, kind)()
        manager.SetMRMLApplicationLogic(application)
        group.AddDisplayableManager(manager)
    group.SetMRMLDisplayableNode(view.GetSliceNode())
    return window, group, interactor


def save(windowed, path):
    window, *_ = windowed
    window.Render()
    grabbed, writer = vtk.vtkWindowToImageFilter(), vtk.vtkPNGWriter()
    grabbed.SetInput(window)
    grabbed.ReadFrontBufferOff()
    writer.SetInputConnection(grabbed.GetOutputPort())
    writer.SetFileName(str(path))
    writer.Write()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
