"""DICOM objects out: sound for the standard's checker, and read back exactly where it was."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from helpers_crossed import crossed
from helpers_dicom import complaints, write_series
from helpers_phantom import (
    against_mm,
    make_phantom,
    make_phantom_against,
    make_signed_phantom,
    marker_mm,
    offset_mm,
    silent,
)
from pydicom.sr.codedict import codes

from seg3dcam.errors import ConfigError, MissingExtraError, Seg3dcamWarning
from seg3dcam.export.dicom import DicomExport, save_dicom
from seg3dcam.export.dicom_picture import SMALLEST_SIDE
from seg3dcam.geometry import corner_gap
from seg3dcam.review.look import Look
from seg3dcam.review.pictures.text import LETTER_SIZE, MARGIN, text_mask
from seg3dcam.scan import Scan, load_scan

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: How it is acquired: spacing along R-L, A-P, S-I, and the axes as loaded.
ACQUIRED = {
    "LPS": ((1.6, 1.6, 5.0), "LPS"),
    "LPI": ((1.6, 1.8, 5.0), "LPS"),
    "LIP": ((1.6, 5.0, 1.6), "LIP"),
    "PIR": ((5.0, 1.6, 1.8), "PIR"),
}
LOOK = Look(window="soft tissue", threshold=0.3)


def explained(folder, acquired="LPS", modality="CT", spacing=None, **fields):
    """Return the phantom explained on a scan that was loaded from a DICOM series."""
    usual, loaded_as = ACQUIRED[acquired]
    options = {
        name: fields.pop(name) for name in ("layers", "classes", "rotation") if name in fields
    }
    written = make_phantom(acquired, spacing or usual, **options)
    write_series(folder, written.scan.data[0].numpy(), written.affine, modality, **fields)
    phantom = make_phantom(loaded_as, spacing or usual, **options)
    scan = load_scan(folder)
    assert corner_gap(scan.affine, phantom.affine, scan.shape) < 1e-4
    return replace(phantom, scan=scan)


@pytest.fixture(scope="module", params=crossed(ACQUIRED, rows=2))
def written(request, tmp_path_factory):
    """The explanation of every acquisition, and its files."""
    folder = tmp_path_factory.mktemp("dicom")
    explanation = explained(folder / "in", request.param)
    return explanation, save_dicom(folder / "out", explanation, LOOK)


@pytest.fixture(scope="module")
def axial(tmp_path_factory):
    return explained(tmp_path_factory.mktemp("axial"), spacing=(3.2, 3.2, 10.0))


def of_kind(files, kind):
    found = [file for file in files if kind in file.parent.name + file.stem]
    return found if kind == "_pictures" else found[0]


def frames_of(image):
    """Return (position in LPS, item) of every frame, in the file's order."""
    for item in image.PerFrameFunctionalGroupsSequence:
        place = item.PlanePositionSequence[0].ImagePositionPatient
        yield np.array(place, np.float64), item


def slice_at(explanation, place):
    """Return the index of the slice whose first voxel lies at a position in LPS."""
    index = np.linalg.solve(explanation.affine, LPS @ [*place, 1.0])
    np.testing.assert_allclose(index[:2], 0, atol=1e-4)
    assert index[2] == pytest.approx(round(index[2]), abs=1e-4)
    return round(index[2])


# --------------------------------------------------------------------------- the standard's view


@pytest.mark.slow
def test_the_checker_finds_no_error(written):
    _, files = written
    pictures = of_kind(files, "_pictures")
    for file in (pictures[0], pictures[-1], files[-2], files[-1]):
        assert complaints(file) == [], file


@pytest.mark.parametrize("modality", ["MR", "PT"])
def test_the_checker_finds_no_error_for_mr_and_pet(tmp_path, modality):
    explanation = explained(tmp_path / "in", modality=modality, spacing=(10.0, 9.0, 12.0))
    files = save_dicom(tmp_path / "out", explanation, LOOK)
    for file in (files[0], files[-2], files[-1]):
        assert complaints(file) == [], file


# ------------------------------------------------------------------------------- value and place


@pytest.mark.few(1)
def test_the_map_is_exact_by_position(written):
    explanation, files = written
    image = pydicom.dcmread(of_kind(files, "_map"))
    frames = np.frombuffer(image.FloatPixelData, "<f4").reshape(-1, image.Rows, image.Columns)
    volume = explanation.volume().numpy()
    seen = []
    for frame, (place, item) in zip(frames, frames_of(image), strict=True):
        k = slice_at(explanation, place)
        np.testing.assert_array_equal(frame, volume[:, :, k].T)
        source = item.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == explanation.scan.series[k].SOPInstanceUID
        seen.append(k)
    assert sorted(seen) == list(range(explanation.scan.shape[2]))


def test_highdicom_reads_the_map_to_the_same_place(written):
    explanation, files = written
    found = highdicom.imread(of_kind(files, "_map")).get_volume()
    affine = LPS @ found.affine
    centre = marker_mm(explanation.affine, explanation.scan.shape)
    assert offset_mm(found.array.astype(np.float64), affine, centre) < 0.5
    peak = np.unravel_index(found.array.argmax(), found.array.shape)
    mm = (affine @ [*peak, 1])[:3]
    np.testing.assert_allclose(mm, explanation.peak()[1], atol=1e-4)


def test_the_map_says_what_it_is(written):
    explanation, files = written
    image = pydicom.dcmread(of_kind(files, "_map"))
    shared = image.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert quantity.CodeMeaning == "Class activation"
    window = shared.FrameVOILUTSequence[0]
    assert (window.WindowWidth, window.WindowCenter) == (1, 0.5)
    source = explanation.scan.series[0]
    for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID", "BodyPartExamined"):
        assert image[name].value == source[name].value
    assert image.SeriesInstanceUID != source.SeriesInstanceUID
    assert (image.Manufacturer, image.SoftwareVersions) == ("seg3dcam", "0.1.0")


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A map whose strongest value, -1, is against its target, and what is written of it."""
    folder = tmp_path_factory.mktemp("signed")
    explanation = replace(explained(folder / "in"), maps=make_signed_phantom().maps)
    look = replace(LOOK, colormap="", signed=True)
    return explanation, save_dicom(folder / "out", explanation, look)


@pytest.mark.slow
def test_a_signed_map_holds_both_signs_and_says_so(signed):
    explanation, files = signed
    file = of_kind(files, "_map")
    assert complaints(file) == []
    image = pydicom.dcmread(file)
    frames = np.frombuffer(image.FloatPixelData, "<f4").reshape(-1, image.Rows, image.Columns)
    volume = explanation.volume(scale="signed").numpy()
    assert volume.min() == -1
    for frame, (place, _) in zip(frames, frames_of(image), strict=True):
        np.testing.assert_array_equal(frame, volume[:, :, slice_at(explanation, place)].T)
    shared = image.SharedFunctionalGroupsSequence[0]
    window = shared.FrameVOILUTSequence[0]
    assert (window.WindowWidth, window.WindowCenter) == (2, 0)
    mapping = shared.RealWorldValueMappingSequence[0]
    assert "below 0 against it" in mapping.LUTExplanation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no DICOM Segmentation")
def test_a_map_that_is_all_against_is_written_signed(tmp_path):
    against = make_phantom_against()
    explanation = plain(explained(tmp_path / "in"))
    explanation = replace(
        explanation, maps=against.maps, status=against.status, only_against=against.only_against
    )
    for signed in (False, True):
        files = save_dicom(
            tmp_path / f"{signed}", explanation, replace(LOOK, colormap="", signed=signed)
        )
        image = pydicom.dcmread(of_kind(files, "_map"))
        values = np.frombuffer(image.FloatPixelData, "<f4")
        assert (values.min(), values.max()) == (-1 * signed, 0)
        blue = 0
        for file in of_kind(files, "_pictures"):
            image = pydicom.dcmread(file)
            pixels = image.pixel_array[area(image, explanation.scan)].astype(int)
            blue += (pixels[..., 2] - pixels[..., 0] > 60).sum()
        assert (blue > 500) == signed
        assert ("no CAM" in image.SeriesDescription) == (not signed)


@pytest.mark.slow
def test_signed_pictures_show_each_sign_in_its_colour_at_its_place(signed):
    explanation, files = signed
    pictures = of_kind(files, "_pictures")
    assert complaints(pictures[0]) == []
    bare = save_dicom(
        pictures[0].parent / "bare", plain(explanation), replace(LOOK, colormap="", signed=True)
    )
    marker = marker_mm(explanation.affine, explanation.scan.shape)
    for towards, place in ((-1, against_mm(explanation)), (1, marker)):
        weight, moment = 0.0, np.zeros(3)
        for file in of_kind(bare, "_pictures"):
            image = pydicom.dcmread(file)
            inside = area(image, explanation.scan)
            pixels = image.pixel_array.astype(int)
            heat = np.zeros(pixels.shape[:2])
            heat[inside] = (towards * (pixels[..., 0] - pixels[..., 2]))[inside] > 25
            rows, columns = np.nonzero(heat)
            moment += picture_affine(image) @ np.stack([columns, rows, np.ones(len(rows))]).sum(1)
            weight += len(rows)
        assert weight > 100
        assert np.linalg.norm(LPS[:3, :3] @ moment / weight - place) < 1.5


def test_the_segment_of_a_signed_map_is_what_speaks_for_the_target(signed):
    explanation, files = signed
    image = highdicom.seg.segread(of_kind(files, "_segments"))
    labels = {n: image.get_segment_description(n).segment_label for n in image.segment_numbers}
    assert sorted(labels.values()) == ["CAM from 0.30: lesion", "prediction: lesion"]
    wanted = explanation.volume(scale="signed").numpy() >= 0.3
    (number,) = [n for n, label in labels.items() if label.startswith("CAM")]
    count = 0
    for frame, (place, item) in zip(image.pixel_array, frames_of(image), strict=True):
        if item.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number:
            k = slice_at(explanation, place)
            np.testing.assert_array_equal(frame, wanted[:, :, k].T)
            count += int(frame.sum())
    assert count == wanted.sum() > 0


def test_segments_are_exact(written):
    explanation, files = written
    image = highdicom.seg.segread(of_kind(files, "_segments"))
    wanted = {
        "prediction: lesion": explanation.mask.numpy(),
        "CAM from 0.30: lesion": explanation.volume().numpy() >= 0.3,
    }
    labels = {n: image.get_segment_description(n).segment_label for n in image.segment_numbers}
    assert sorted(labels.values()) == sorted(wanted)
    count = 0
    for number, label in labels.items():
        for frame, (place, item) in zip(image.pixel_array, frames_of(image), strict=True):
            which = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            if which == number:
                k = slice_at(explanation, place)
                np.testing.assert_array_equal(frame, wanted[label][:, :, k].T)
                count += int(frame.sum())
        description = image.get_segment_description(number)
        assert description.segmented_property_type == codes.NCIt.ImagingRegionOfInterest
        made_by = description.algorithm_identification
        assert made_by.name == {1: "segmentation network", 2: "seg3dcam hires_cam"}[number]
    assert count == sum(int(mask.sum()) for mask in wanted.values())


def test_simple_itk_reads_the_segments(written):
    explanation, files = written
    file = of_kind(files, "_segments")
    image = SimpleITK.ReadImage(file)
    frames, items = SimpleITK.GetArrayFromImage(image), list(frames_of(pydicom.dcmread(file)))
    np.testing.assert_allclose(image.GetOrigin(), items[0][0], atol=1e-6)
    for frame, (place, item) in zip(frames, items, strict=True):
        if item.SegmentIdentificationSequence[0].ReferencedSegmentNumber == 1:
            k = slice_at(explanation, place)
            np.testing.assert_array_equal(frame > 0, explanation.mask.numpy()[:, :, k].T)
    # Spacing is left out: SimpleITK reads 1 mm for every DICOM segmentation.
    direction = np.array(image.GetDirection()).reshape(3, 3)[:, :2]
    found = explanation.affine[:3, :2] / np.linalg.norm(explanation.affine[:3, :2], axis=0)
    np.testing.assert_allclose(LPS[:3, :3] @ direction, found, atol=1e-5)


# -------------------------------------------------------------------------------------- pictures


def plain(explanation):
    """Return the same without outlines."""
    return replace(explanation, class_index=None, truth=None)


def colour_of(pixels):
    """Return how far a picture is from grey."""
    return np.ptp(pixels.astype(np.int64), axis=-1)


def picture_affine(image):
    """Return pixel (column, row) -> LPS mm, as any viewer computes it."""
    right, down = np.array(image.ImageOrientationPatient, np.float64).reshape(2, 3)
    down_mm, right_mm = (float(step) for step in image.PixelSpacing)
    first = np.array(image.ImagePositionPatient, np.float64)
    return np.stack([right * right_mm, down * down_mm, first], axis=1)


def area(image, scan):
    """Return the rows and columns of a picture that show its slice."""
    zoom = round(scan.spacing[0] / float(image.PixelSpacing[1]))
    columns, rows, _ = (size * zoom for size in scan.shape)
    return np.s_[MARGIN : MARGIN + rows, MARGIN : MARGIN + columns]


@pytest.mark.few(1)
@pytest.mark.parametrize("acquired", crossed(ACQUIRED, rows=2))
def test_the_heat_in_the_pictures_is_where_the_marker_is(tmp_path, acquired):
    explanation = plain(explained(tmp_path / "in", acquired))
    scan = explanation.scan
    files = of_kind(save_dicom(tmp_path / "out", explanation, LOOK), "_pictures")
    weight, moment = 0.0, np.zeros(3)
    for file in files:
        image = pydicom.dcmread(file)
        heat = np.zeros((image.Rows, image.Columns))
        place = area(image, scan)
        heat[place] = colour_of(image.pixel_array[place]) > 25
        rows, columns = np.nonzero(heat)
        ones = np.ones(len(rows))
        moment += picture_affine(image) @ np.stack([columns, rows, ones]).sum(1)
        weight += len(rows)
    centre = LPS[:3, :3] @ moment / weight
    wanted = marker_mm(scan.affine, scan.shape)
    assert np.linalg.norm(centre - wanted) < 0.5 * min(scan.spacing)


@pytest.mark.parametrize("columns", [30, 64, 2 * SMALLEST_SIDE])
def test_a_single_voxel_is_drawn_at_its_place(tmp_path, columns):
    volume = np.zeros((columns, 20, 3))
    volume[7, 11, 1] = 1000
    affine = LPS @ np.array([[0.5, 0.1, 0, 9], [-0.1, 0.7, 0, 5], [0, 0, 2, 3], [0, 0, 0, 1]])
    affine[:3, 1] *= 0.5 * 0.7 / 0.5
    affine[:3, 1] -= affine[:3, 0] * (affine[:3, 0] @ affine[:3, 1]) / 0.26  # a right angle
    write_series(tmp_path / "in", volume, affine)
    scan = load_scan(tmp_path / "in")
    phantom = make_phantom()
    explanation = replace(
        plain(phantom),
        scan=scan,
        maps={"l": torch.zeros(scan.shape)},
        status={"l": "zero"},
        native_spacing={"l": (1.0, 1.0, 1.0)},
        prediction=torch.zeros((2, *scan.shape), dtype=torch.bool),
    )
    with pytest.warns(Seg3dcamWarning, match="no DICOM Segmentation"):
        files = save_dicom(tmp_path / "out", explanation, Look(window=(1000, 500)))
    image = pydicom.dcmread(files[1])
    place = area(image, scan)
    light = np.zeros((image.Rows, image.Columns))
    light[place] = image.pixel_array[place].mean(-1)
    rows, cols = np.nonzero(light)
    centre = np.average(
        np.stack([cols, rows, np.ones(len(rows))]), axis=1, weights=light[rows, cols]
    )
    np.testing.assert_allclose(
        LPS[:3, :3] @ picture_affine(image) @ centre, (affine @ [7, 11, 1, 1])[:3], atol=1e-3
    )


def test_simple_itk_reads_the_pictures_as_a_volume(written):
    explanation, files = written
    pictures = of_kind(files, "_pictures")
    image = SimpleITK.ReadImage(pictures)
    scan, first = explanation.scan, pydicom.dcmread(pictures[0])
    zoom = round(scan.spacing[0] / float(first.PixelSpacing[1]))
    peak, mm = explanation.peak()
    index = image.TransformPhysicalPointToContinuousIndex((LPS[:3, :3] @ mm).tolist())
    wanted = [MARGIN + zoom * peak[0] + (zoom - 1) / 2, MARGIN + zoom * peak[1] + (zoom - 1) / 2]
    np.testing.assert_allclose(index, [*wanted, peak[2]], atol=1e-3)
    stored = [pydicom.dcmread(file).pixel_array for file in pictures]
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), stored)


def test_letters_stand_on_their_sides(written):
    explanation, files = written
    image = pydicom.dcmread(of_kind(files, "_pictures")[0])
    place = area(image, explanation.scan)
    grey = image.pixel_array.mean(-1).astype(np.uint8)
    edges = {
        "left": grey[place[0], :MARGIN],
        "right": grey[place[0], place[1].stop :],
        "top": grey[:MARGIN, place[1].stop // 2 - 30 :][:, :90],
        "bottom": grey[place[0].stop : place[0].stop + MARGIN, place[1]],
    }
    column, row = (explanation.affine[:3, n] for n in range(2))
    towards = {"right": column, "left": -column, "bottom": row, "top": -row}
    for edge, strip in edges.items():
        side = towards[edge]
        world = int(np.abs(side).argmax())
        assert read_letter(strip) == ("RAS" if side[world] > 0 else "LPI")[world], edge
    names = {"R": "R", "L": "L", "A": "A", "P": "P", "S": "H", "I": "F"}
    assert image.PatientOrientation == [names[read_letter(edges[e])] for e in ("right", "bottom")]


def read_letter(strip):
    """Return the letter that a strip of a picture holds."""

    def likeness(letter):
        mask = text_mask(letter, LETTER_SIZE, True)
        mask = mask[:, mask.any(axis=0)][mask.any(axis=1)]
        room = np.pad(strip, 4)
        return cv2.matchTemplate(room, mask, cv2.TM_CCOEFF_NORMED).max()

    scores = {letter: likeness(letter) for letter in "RLAPSI"}
    best = max(scores, key=scores.get)
    assert scores[best] > 0.9
    return best


def test_pictures_say_what_they_are(written):
    explanation, files = written
    for k, file in enumerate(of_kind(files, "_pictures")):
        image = pydicom.dcmread(file)
        source = image.SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == explanation.scan.series[k].SOPInstanceUID
        assert (image.InstanceNumber, image.BurnedInAnnotation) == (k + 1, "NO")
        assert image.ImageType == ["DERIVED", "SECONDARY"]
        assert image.SeriesDescription == "research CAM pictures: lesion, model.1, hires_cam"
        assert "research use only, not for diagnosis" in image.DerivationDescription
        assert image.FrameOfReferenceUID == explanation.scan.series[0].FrameOfReferenceUID


def test_only_heat_and_outlines_are_coloured(axial, tmp_path):
    files = save_dicom(tmp_path, axial, LOOK)
    volume = axial.volume().numpy()
    for k, file in enumerate(of_kind(files, "_pictures")):
        image = pydicom.dcmread(file)
        place = area(image, axial.scan)
        coloured = colour_of(image.pixel_array[place]).max() > 25
        outlined = bool(axial.mask[:, :, k].any() or axial.truth[:, :, k].any())
        assert coloured == (outlined or volume[:, :, k].max() >= 0.3)


# ------------------------------------------------------------------------------ identity and UIDs


@pytest.mark.slow
def test_the_same_result_gives_the_same_objects(axial, tmp_path):
    def uids(folder, look, explanation=axial):
        files = save_dicom(folder, explanation, look)
        return [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]

    first = uids(tmp_path / "1", LOOK)
    assert first == uids(tmp_path / "2", LOOK)
    assert len(set(first)) == axial.scan.shape[2] + 2
    assert all(pydicom.uid.UID(uid).is_valid for uid in first)
    assert not set(first) & set(uids(tmp_path / "3", Look(window="lung", threshold=0.3)))
    assert not set(first) & {
        pydicom.dcmread(file).SOPInstanceUID
        for file in save_dicom(tmp_path / "5", axial, LOOK, case="another name")
    }
    other = replace(axial, maps={"model.1": axial.maps["model.1"] ** 2})
    assert not set(first) & set(uids(tmp_path / "4", LOOK, other))


def test_several_classes_and_layers(tmp_path):
    one = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0), layers=("a", "b", "c"))
    two = replace(one, class_index=0, label="background")
    export = DicomExport(tmp_path / "out", LOOK)
    export.add(one, "lesion")
    export.add(two, "background")
    files = export.finish()
    assert {file.relative_to(tmp_path / "out").parts[0] for file in files} == {
        *("lesion_pictures", "lesion_map.dcm", "lesion_segments.dcm"),
        *("background_pictures", "background_map.dcm", "background_segments.dcm"),
    }
    assert sorted(files) == sorted(f for f in (tmp_path / "out").rglob("*") if f.is_file())
    images = [pydicom.dcmread(file) for file in files]
    series = {(image.SeriesInstanceUID, int(image.SeriesNumber)) for image in images}
    assert sorted(number for _, number in series) == [301, 302, 303, 304, 305, 306]
    assert {image.StudyInstanceUID for image in images} == {one.scan.series[0].StudyInstanceUID}
    assert "mean of 3 layers" in images[0].SeriesDescription


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("case", "burned_in"),
    [("scan 43a725f6", "NO"), ("P-1", "YES"), ("zoë, left lung", "YES"), ("case 7", "NO")],
)
def test_a_case_that_names_the_patient_is_said_to_be_burned_in(tmp_path, case, burned_in):
    explanation = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0))
    files = save_dicom(tmp_path / "out", explanation, LOOK, case=case)
    assert pydicom.dcmread(files[0]).BurnedInAnnotation == burned_in


# -------------------------------------------------------------------------------- unusual sources


def test_a_very_large_series_number_gives_legal_ones(tmp_path):
    def large(header, k):
        header.SeriesNumber = "99999999"

    explanation = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0), change=large)
    files = save_dicom(tmp_path / "out", explanation, LOOK)
    numbers = [int(pydicom.dcmread(file).SeriesNumber) for file in files]
    assert len(set(numbers)) == 3
    assert 0 < min(numbers) <= max(numbers) < 2**31


def test_a_name_in_other_letters_is_carried_over(tmp_path):
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"

    def japanese(header, k):
        header.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        header.PatientName = name

    explanation = explained(
        tmp_path / "in", spacing=(10.0, 9.0, 12.0), classes=("背景", "Läsion"), change=japanese
    )
    for file in save_dicom(tmp_path / "out", explanation, LOOK):
        image = pydicom.dcmread(file)
        assert str(image.PatientName) == name
        assert image.SpecificCharacterSet == "ISO_IR 192"
        assert "Läsion" in image.SeriesDescription
        assert complaints(file) == []


def test_an_anonymised_source(tmp_path):
    def strip(header, k):
        for name in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID"),
            *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
            *("FrameOfReferenceUID", "PositionReferenceIndicator", "SliceThickness"),
            *("SeriesNumber", "BodyPartExamined", "SpecificCharacterSet", "SeriesDescription"),
        ):
            del header[name]

    explanation = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0), change=strip)
    images = []
    for file in save_dicom(tmp_path / "out", explanation, LOOK):
        assert complaints(file) == []
        images.append(pydicom.dcmread(file))
    assert len({image.FrameOfReferenceUID for image in images}) == 1
    assert not images[0].PatientName


def test_odd_values_of_a_source_are_no_obstacle(tmp_path):
    def odd(header, k):
        for name, vr, value in (
            ("PatientSex", "CS", "unknown"),
            ("PatientBirthDate", "DA", "1970"),
            ("AccessionNumber", "SH", "longer than sixteen characters"),
            ("StudyTime", "TM", "noon"),
        ):
            header.add(pydicom.DataElement(name, vr, value, validation_mode=0))

    explanation = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0), change=odd)
    for file in save_dicom(tmp_path / "out", explanation, LOOK):
        assert pydicom.dcmread(file).PatientSex == "unknown"


def test_a_tilted_gantry(tmp_path):
    shear = np.eye(3)
    shear[1, 2] = np.tan(np.radians(12))
    with pytest.warns(Seg3dcamWarning, match="gantry tilt"):
        explanation = explained(tmp_path / "in", spacing=(10.0, 9.0, 12.0), rotation=shear)
    files = save_dicom(tmp_path / "out", explanation, LOOK)
    image = pydicom.dcmread(of_kind(files, "_map"))
    for place, _ in frames_of(image):
        slice_at(explanation, place)
    for file in (files[0], files[-2], files[-1]):
        assert complaints(file) == []


def test_two_slices_of_a_constant_scan(tmp_path):
    write_series(tmp_path / "in", np.full((12, 10, 2), 40.0), np.diag([-1.0, -1.0, 4.0, 1.0]))
    with pytest.warns(Seg3dcamWarning, match="constant"):
        scan = load_scan(tmp_path / "in")
    heat = torch.zeros(scan.shape)
    heat[3, 4, 1] = 1
    explanation = replace(
        make_phantom(),
        scan=scan,
        maps={"l": heat},
        status={"l": "ok"},
        native_spacing={"l": (1.0, 1.0, 1.0)},
        prediction=torch.zeros((2, *scan.shape), dtype=torch.bool),
        truth=None,
    )
    files = save_dicom(tmp_path / "out", explanation)  # the prediction is empty
    segments = highdicom.seg.segread(of_kind(files, "_segments"))
    assert segments.get_segment_description(1).segment_label == "CAM from 0.20: lesion"
    assert segments.number_of_segments == 1
    assert segments.pixel_array.sum() == 1
    assert len(of_kind(files, "_pictures")) == 2


# ------------------------------------------------------------------------------------ no heat


@pytest.mark.parametrize("status", ["zero", "degenerate", "nonfinite"])
def test_without_heat_the_pictures_say_so(axial, tmp_path, status):
    explanation = silent(axial, status)
    if status == "nonfinite":
        with pytest.warns(Seg3dcamWarning, match="no DICOM Parametric Map was written: no CAM"):
            files = save_dicom(tmp_path, explanation, LOOK)
    else:
        files = save_dicom(tmp_path, explanation, LOOK)
        image = pydicom.dcmread(of_kind(files, "_map"))
        assert not np.frombuffer(image.FloatPixelData, "<f4").any()
    assert any("_map" in str(file) for file in files) == (status != "nonfinite")
    segments = highdicom.seg.segread(of_kind(files, "_segments"))
    assert [
        segments.get_segment_description(n).segment_label for n in segments.segment_numbers
    ] == ["prediction: lesion"]
    pictures = of_kind(files, "_pictures")
    image = pydicom.dcmread(pictures[0])
    assert explanation.notice() in image.DerivationDescription
    words = text_mask(explanation.notice().split(":")[1][:30])  # they may be broken into lines
    light = image.pixel_array[:, :, 0]  # amber is bright in red
    assert cv2.matchTemplate(light, words, cv2.TM_CCOEFF_NORMED).max() > 0.9
    assert complaints(pictures[0]) == []


def test_without_heat_there_is_no_colour(axial, tmp_path):
    explanation = plain(silent(axial, "zero"))
    with pytest.warns(Seg3dcamWarning, match="no DICOM Segmentation was written"):
        files = save_dicom(tmp_path, explanation, LOOK)
    for file in of_kind(files, "_pictures"):
        image = pydicom.dcmread(file)
        assert colour_of(image.pixel_array[area(image, axial.scan)]).max() == 0
    assert not any("_segments" in str(file) for file in files)


# ---------------------------------------------------------------------------------- bad input


def test_names_that_are_no_file_names(tmp_path):
    explanation = explained(
        tmp_path / "in", spacing=(10.0, 9.0, 12.0), classes=("background", "../x\\y\n" + "ä" * 90)
    )
    files = save_dicom(tmp_path / "out", explanation, LOOK)
    assert all(file.resolve().is_relative_to((tmp_path / "out").resolve()) for file in files)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    segments = pydicom.dcmread(of_kind(files, "_segments"))
    label = segments.SegmentSequence[0].SegmentLabel
    assert label.startswith("prediction: ../x/y ä")
    assert label.endswith("ä…")
    for file in files[-2:]:
        assert complaints(file) == []


def test_what_is_no_series_is_refused(axial, tmp_path):
    with pytest.raises(ConfigError, match=r"must be a DICOM series: load_scan\('folder"):
        save_dicom(tmp_path, make_phantom())
    scan = axial.scan
    cropped = Scan(scan.data, scan.affine, scan.name, None, scan.series[1:])
    with pytest.raises(ConfigError, match=r"its DICOM series \[\(47, 41, 13\)\].*neither cropped"):
        save_dicom(tmp_path, replace(axial, scan=cropped))
    bare = copy.deepcopy(scan.series)
    for header in bare:
        del header["StudyInstanceUID"]
    stripped = Scan(scan.data, scan.affine, scan.name, None, bare)
    with pytest.raises(ConfigError, match="has no StudyInstanceUID, so nothing can refer to"):
        save_dicom(tmp_path, replace(axial, scan=stripped))
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(axial, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingExtraError, match=r'pip install "seg3dcam\[dicom\]"'):
        save_dicom(tmp_path, axial)
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_left_as_it_was(axial, tmp_path):
    before = [header.to_json() for header in axial.scan.series]
    save_dicom(tmp_path, axial, LOOK)
    assert [header.to_json() for header in axial.scan.series] == before


def test_file_names_tell_no_patient(axial, tmp_path):
    names = [str(Path(f).relative_to(tmp_path)) for f in save_dicom(tmp_path, axial, LOOK)]
    assert names[0] == "lesion_pictures/0001.dcm"
    assert not any(word in name for name in names for word in ("ller", "P-1"))
