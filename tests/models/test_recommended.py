"""What is recommended beside a model is used for its weights and class alone, and told of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers_cases import Place, voxels

from seg3dcam import explain, load_model, load_scan, targets
from seg3dcam.errors import ConfigError, Seg3dcamWarning
from seg3dcam.explaining.explain import explain_each
from seg3dcam.models import SegModel
from seg3dcam.models.recommended import (
    Recommendation,
    advice_for,
    read_recommendations,
    write_recommendation,
)

AUTO, LAYER = "model.1.submodule", "model.0"


def recommendation(**changes):
    settings = {
        "class_name": "lesion",
        "class_index": 2,
        "layer": LAYER,
        "method": "grad_cam",
        "cases": ["scan 1a2b3c4d"],
        "figures": {"context_deletion": 0.02, "mask_alone": 0.54},
        "versions": {"seg3dcam": "0.1.0"},
    }
    return Recommendation(**settings | changes)


@pytest.fixture
def place(tmp_path):
    return Place.at(tmp_path)


def recommend(place, **changes):
    """Write a recommendation beside the model; return its file."""
    model = load_model(place.model)
    return write_recommendation(model.recommended, model.fingerprint(), recommendation(**changes))


def layers_and_methods(record):
    return {(*entry["layers"], entry["method"]["name"]) for entry in record["explanations"]}


# ------------------------------------------------------------------------------------ the file


def test_the_file_lies_beside_the_model(tmp_path, place):
    assert load_model(place.model).recommended == tmp_path / "model.recommended.json"
    assert SegModel(load_model(place.model).module).recommended is None


def test_recommendations_for_other_classes_stay_and_those_for_other_weights_go(place):
    path = recommend(place)
    recommend(place, class_name="organ", class_index=1, layer="model.1")
    recommend(place, method="hires_cam")
    found = read_recommendations(path)
    assert [(one.class_index, one.layer, one.method) for one in found.recommended] == [
        (1, "model.1", "grad_cam"),
        (2, LAYER, "hires_cam"),
    ]
    write_recommendation(path, "0" * 16, recommendation())
    assert len(read_recommendations(path).recommended) == 1


def test_a_file_of_something_else_is_not_replaced(place):
    path = place.folder / "model.recommended.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="mine: unknown key"):
        recommend(place)
    assert path.read_text() == '{"mine": 1}'


# ---------------------------------------------------------------------------- what explain does


def test_auto_is_what_is_recommended_and_says_so(place):
    recommend(place)
    outcome = place.explain("--target", "lesion")
    assert outcome.code == 0
    assert outcome.out.startswith(
        f"auto is layer {LAYER} by grad_cam, which model.recommended.json recommends for lesion "
        "(context deletion 0.02, mask alone 0.54, 1 scan)\n"
    )
    assert layers_and_methods(place.record) == {(LAYER, "grad_cam")}
    assert place.record["runs"][0]["job"]["layer"] == LAYER
    assert place.record["runs"][0]["job"]["method"] == ["grad_cam"]


def test_what_the_user_names_is_taken(place):
    recommend(place)
    outcome = place.explain("--target", "lesion", "--method", "hires_cam")
    assert f"auto is layer {LAYER}, which" in outcome.out
    assert "recommends for lesion by grad_cam, while hires_cam was asked for (" in outcome.out
    assert layers_and_methods(place.record) == {(LAYER, "hires_cam")}
    named = place.explain("--target", "lesion", "--layer", AUTO)
    assert "recommend" not in named.out
    assert (AUTO, "hires_cam") in layers_and_methods(place.record)


def test_a_recommendation_that_comes_later_is_another_job(place):
    """What was done without it is no longer what is asked for, and both are kept."""
    before = place.explain("--target", "lesion")
    assert "auto" not in before.out
    recommend(place)
    assert place.explain("--target", "lesion").code == 0
    assert len(place.record["runs"]) == 2
    assert layers_and_methods(place.record) == {(AUTO, "hires_cam"), (LAYER, "grad_cam")}
    again = place.explain("--target", "lesion")
    assert "holds this case already" in again.out
    assert again.out.startswith("auto is layer")
    # The same layer and method by name are the same job.
    named = place.explain("--target", "lesion", "--layer", LAYER, "--method", "grad_cam")
    assert "holds this case already" in named.out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--target", "organ"), "it is for lesion, and not for organ"),
        (
            ("--target", "organ", "--target", "lesion"),
            "it is for lesion, and not for organ, lesion together",
        ),
        ((), "it is for lesion; name the class to use it"),
    ],
)
def test_for_another_class_it_is_not_used(place, options, why):
    recommend(place)
    outcome = place.explain(*options)
    assert outcome.out.startswith(f"model.recommended.json is not used: {why}\n")
    assert {layer for layer, _ in layers_and_methods(place.record)} == {AUTO}


def test_for_other_weights_it_is_not_used(place):
    path = recommend(place)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"weights_sha256": "0" * 16}))
    outcome = place.explain("--target", "lesion")
    assert outcome.out.startswith(
        "model.recommended.json is not used: it was made for other weights than this model's\n"
    )
    assert layers_and_methods(place.record) == {(AUTO, "hires_cam")}


def test_classes_of_two_recommendations_use_neither(place):
    recommend(place)
    recommend(place, class_name="organ", class_index=1, layer="model.1.submodule.conv")
    outcome = place.explain("--target", "lesion", "--target", "organ")
    assert outcome.out.startswith(
        "model.recommended.json is not used: it has another layer for each of lesion, organ; "
        "explain them one by one\n"
    )
    assert {layer for layer, _ in layers_and_methods(place.record)} == {AUTO}


def test_classes_of_one_recommendation_are_explained_together(place):
    recommend(place)
    recommend(place, class_name="organ", class_index=1)
    outcome = place.explain("--target", "lesion", "--target", "organ")
    assert outcome.out.startswith("auto is layer")
    assert layers_and_methods(place.record) == {(LAYER, "grad_cam")}


# ------------------------------------------------------------------------------------ in Python


def scan_of(place):
    return load_scan(voxels(), affine=np.eye(4))


@pytest.mark.parametrize(
    "target",
    ["lesion", 2, targets.ClassLogit(2), targets.EveryComponent(2)],
    ids=["name", "index", "target", "family"],
)
def test_python_uses_it_too(place, target):
    recommend(place)
    model = load_model(place.model)
    with pytest.warns(Seg3dcamWarning, match=f"auto is layer {LAYER} by grad_cam"):
        found = next(iter(explain_each(scan_of(place), model, [target])))
    assert (list(found.maps), found.method) == ([LAYER], "grad_cam")


def test_python_says_nothing_where_there_is_nothing_to_say(place):
    model = load_model(place.model)
    assert list(explain(scan_of(place), model, "lesion").maps) == [AUTO]
    recommend(place)
    found = explain(scan_of(place), model, "lesion", layers=LAYER)
    assert found.method == "hires_cam"
    found = explain(scan_of(place), replace(model, recommended=None), "lesion")
    assert list(found.maps) == [AUTO]


def test_targets_of_no_class_do_not_use_it(place):
    recommend(place)
    with pytest.warns(Seg3dcamWarning, match="it is for lesion; name the class to use it"):
        found = explain(scan_of(place), load_model(place.model), targets.MaskOutput())
    assert list(found.maps) == [AUTO]


def test_an_attribution_of_the_input_is_recommended_without_a_layer(place):
    recommend(place, layer="input", method="gradient")
    model = load_model(place.model)
    with pytest.warns(Seg3dcamWarning, match="auto is the input by gradient"):
        found = explain(scan_of(place), model, "lesion")
    assert (list(found.maps), found.method) == (["input"], "gradient")
    assert list(explain(scan_of(place), model, "lesion", method="hires_cam").maps) == [AUTO]


# ------------------------------------------------------------------------------- from a stranger

HOSTILE = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "expected a JSON object"),
    "another key": ('{"weights_sha256": "%s", "recommended": [], "run": "x"}', "unknown key"),
    "no hash": ('{"weights_sha256": "../../x", "recommended": []}', "weights_sha256"),
    "nothing for any class": (
        '{"weights_sha256": "%s", "recommended": []}',
        "is not used",
    ),
    "deep": ("[" * 100_000, "JSON"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_told_of_and_not_used(place, name):
    content, why = HOSTILE[name]
    weights = load_model(place.model).fingerprint()
    path = place.folder / "model.recommended.json"
    path.write_text(content.replace("%s", weights))
    outcome = place.explain("--target", "lesion")
    assert outcome.code == 0
    first, second = outcome.out.splitlines()[:2]
    assert "recommend" in first
    assert why in first + second
    assert layers_and_methods(place.record) == {(AUTO, "hires_cam")}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layer": "model.9"}, "the network has no layer 'model.9'"),
        ({"layer": "all"}, "'all' names no single layer"),
        ({"layer": "model.*"}, "names no single layer"),
        ({"layer": "auto"}, "'auto' names no single layer"),
        ({"method": "os.system"}, "there is no method 'os.system'"),
        ({"layer": "\x1b[2J" + "x" * 400}, "the network has no layer '[2Jxxx"),
        ({"class_name": "\x1b[2J\nlesion", "class_index": 1}, "it is for [2J lesion, and not"),
    ],
)
def test_a_strangers_recommendation_is_plain_words(place, changes, why):
    """No pattern, no method of its own, nothing that a terminal obeys, no long lines."""
    recommend(place, **changes)
    outcome = place.explain("--target", "lesion")
    assert outcome.code == 0
    first = outcome.out.splitlines()[0]
    assert why in first
    assert "\x1b" not in outcome.out
    assert len(first) < 300
    assert layers_and_methods(place.record) == {(AUTO, "hires_cam")}


@pytest.mark.parametrize("key", ["class_name", "layer", "method"])
def test_words_have_a_length(key):
    with pytest.raises(ValueError, match=key):
        recommendation(**{key: "x" * 501})
    with pytest.raises(ValueError, match=key):
        recommendation(**{key: ""})


def test_advice_costs_nothing_where_there_is_no_file(place, monkeypatch):
    model = load_model(place.model)
    monkeypatch.setattr(SegModel, "fingerprint", lambda self: pytest.fail("hashed for nothing"))
    assert advice_for(model, [2]).words == ""
