"""Settings: what is legal, and that the examples in `configs/` are and say everything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers_cases import Place, seg3dcam, write_yaml
from monai.networks.nets import SegResNet, UNet
from pydantic import BaseModel

from seg3dcam import METHODS
from seg3dcam.errors import ConfigError
from seg3dcam.job.settings import Job
from seg3dcam.models import exported
from seg3dcam.models.bundle import load as bundle
from seg3dcam.models.factory import Spec as FactorySpec
from seg3dcam.models.nnunet import load as nnunet
from seg3dcam.models.specs import Intensity, Prepare, Window
from seg3dcam.network.layers import resolve_layers
from seg3dcam.settings import read_json, read_yaml, validate
from seg3dcam.windows import WindowPlan

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "seg3dcam" / "demo" / "model.yaml"
JOBS = sorted((ROOT / "configs").glob("*_job.yaml"))
MODELS = [*sorted((ROOT / "configs").glob("*_model.yaml")), DEMO]
OTHERS = {"bundle": bundle.Spec, "nnunet": nnunet.Spec, "exported": exported.Spec}
NETWORKS = {"UNet": UNet, "SegResNet": SegResNet}


def keys(content):
    """Return every key at every depth, but not those of a network's arguments."""
    found = set()
    for key, value in content.items():
        found.add(key)
        if isinstance(value, dict) and key != "arguments":
            found |= keys(value)
    return found


def network(spec):
    """Return the network on the meta device, where it needs no memory."""
    with torch.device("meta"):
        return NETWORKS[spec.factory.split(":")[1]](**spec.arguments).eval()


# ------------------------------------------------------------------------------------- examples


def test_every_example_is_a_job_or_a_model():
    others = {ROOT / "configs" / f"{kind}.yaml" for kind in OTHERS}
    assert {*JOBS, *MODELS, *others} == {*(ROOT / "configs").iterdir(), DEMO}
    assert len(JOBS) == 2
    assert len(MODELS) == 3


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_example_job(path):
    job = validate(read_yaml(path), Job, path.name)
    spec_file = path.parent / job.model
    spec = validate(read_yaml(spec_file), FactorySpec, spec_file.name)
    assert set(job.target) <= set(spec.classes)
    assert job.method in METHODS
    if job.layer != "auto":
        assert resolve_layers(network(spec), job.layer)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_example_model_takes_its_window_and_gives_its_classes(path):
    spec = validate(read_yaml(path), FactorySpec, path.name)
    roi = spec.window.plan().roi_size
    with torch.no_grad():
        logits = network(spec)(torch.empty(1, spec.arguments["in_channels"], *roi, device="meta"))
    assert logits.shape == (1, len(spec.classes), *roi)


def test_examples_hold_every_setting():
    examples = [*JOBS, *MODELS]
    shown = set().union(*(keys(yaml.safe_load(path.read_text())) for path in examples))
    legal = {
        name
        for kind in (Intensity, Prepare, Window, FactorySpec, Job)
        for name in kind.model_fields
    }
    assert shown == legal


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("ct_job.yaml", [Job]), ("ct_model.yaml", [FactorySpec, Prepare, Intensity, Window])],
)
def test_every_key_is_explained(name, kinds):
    """By a comment above it, or as an alternative in a comment."""
    lines = (ROOT / "configs" / name).read_text(encoding="utf-8").splitlines()
    for key in (key for kind in kinds for key in kind.model_fields):
        place = next(i for i, line in enumerate(lines) if re.match(rf" *#? *{key}:( |$)", line))
        assert lines[place].strip().startswith("#") or lines[place - 1].strip().startswith("#"), key


@pytest.mark.parametrize("kind", OTHERS)
def test_models_from_elsewhere_are_legal_and_explained(kind):
    path = ROOT / "configs" / f"{kind}.yaml"
    content = read_yaml(path)
    spec = validate(content, OTHERS[kind], path.name)
    lines = path.read_text(encoding="utf-8").splitlines()
    for key in content:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{key}: "))
        assert lines[place - 1].startswith("#"), key
    if kind != "exported":  # whose other keys are those of the CT model
        assert set(content) == set(OTHERS[kind].model_fields)
        required = {kind: content[kind]}
        changed = {"classes", "folds"}  # shown, and no defaults
        assert validate(required, OTHERS[kind], "").model_copy(
            update={key: content[key] for key in changed & set(content)}
        ) == spec.model_copy(update={"config": None} if kind == "bundle" else {})


def test_values_of_the_ct_job_are_the_defaults():
    """Its comments name the defaults; these keys alone say something else."""
    job = validate(read_yaml(ROOT / "configs" / "ct_job.yaml"), Job, "ct_job.yaml")
    defaults = Job(scan="", model="")
    changed = {key for key in Job.model_fields if getattr(job, key) != getattr(defaults, key)}
    assert changed == {"scan", "model", "out", "target", "intensity_window", "axis"}


@pytest.mark.slow
def test_an_example_job_runs(tmp_path):
    """The CT job, with a tiny network and a tiny scan in the place of its own."""
    place = Place.at(tmp_path, classes=["background", "liver", "tumour"])
    content = read_yaml(ROOT / "configs" / "ct_job.yaml")
    content |= {"scan": place.scan.name, "model": place.model.name, "out": str(place.out)}
    outcome = seg3dcam("explain", "--config", write_yaml(tmp_path / "ct_job.yaml", content))
    assert outcome.code == 0, outcome.err
    assert [case["target"]["class"] for case in place.record["explanations"]] == ["tumour", "liver"]


# ------------------------------------------------------------------------------------- settings


def test_window_settings_are_those_of_the_plan():
    window = Window(
        roi_size=(32, 16, -1),
        overlap=0.5,
        mode="constant",
        sw_batch_size=2,
        sigma_scale=0.25,
        padding_mode="reflect",
        cval=3.0,
    )
    assert window.plan() == WindowPlan((32, 16, -1), 0.5, "constant", 2, 0.25, "reflect", 3.0)


def test_defaults_of_window_and_plan_agree():
    assert Window(roi_size=8).plan() == WindowPlan(8)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Job, {"scan": "a", "model": "b", "target": 3}),
        (Job, {"scan": "a", "model": "b", "target": ["liver", 3]}),
        (Job, {"scan": ["a", "b"], "model": "c", "layer": ["x", "y[0]"]}),
        (Job, {"scan": "a", "model": "b", "intensity_window": [400, 40]}),
        (Job, {"scan": "a", "model": "b", "intensity_window": "soft tissue"}),
        (Job, {"scan": "a", "model": "b", "threshold": 0}),
        (Intensity, {"range": [-100, 200]}),
        (Intensity, {"percentiles": [0, 100]}),
        (Intensity, {"zscore": "all"}),
        (Prepare, {"orientation": "LIP", "spacing": [1, 2, 0.5], "pad_divisible": 1}),
        (Window, {"roi_size": [96, 96, -1], "overlap": 0}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_legal(kind, content):
    settings = validate(content, kind, "file.yaml")
    for key, value in content.items():
        assert getattr(settings, key) == (tuple(value) if is_tuple(settings, key) else value)


def is_tuple(settings: BaseModel, key: str) -> bool:
    return isinstance(getattr(settings, key), tuple)


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (Window, {"roi_size": 8, "overlap": -0.1}, r"overlap: .*greater than or equal to 0"),
        (Window, {"roi_size": 8, "overlap": 1}, r"overlap: .*less than 1"),
        (Window, {"roi_size": 8, "sw_batch_size": 0}, r"sw_batch_size: .*equal to 1, got 0"),
        (Window, {"roi_size": 8, "sigma_scale": 0}, r"sigma_scale: .*greater than 0, got 0"),
        (Window, {"roi_size": 8, "padding_mode": "zeros"}, r"padding_mode: .*'reflect'.*'zeros'"),
        (
            Intensity,
            {"range": [1, 1]},
            r"lower bound must be below the upper one; got \[1.0, 1.0\]",
        ),
        (Intensity, {"range": [float("nan"), 1]}, r"range|lower bound"),
        (Intensity, {"percentiles": [-1, 50]}, r"between 0 and 100"),
        (Prepare, {"pad_divisible": 0}, r"pad_divisible: .*equal to 1, got 0"),
        (Prepare, {"crop_foreground": "perhaps"}, r"crop_foreground: .*boolean.*'perhaps'"),
        (Prepare, {"orientation": "ras"}, r"orientation: .*'ras'"),
        (Job, {"scan": "a"}, r"^file\.yaml:\n  model: missing$"),
        (Job, {"scan": "a", "model": "b", "format": "pdf"}, r"ml:\n  format.0: .*'png'.*'pdf'$"),
        (Job, {"scan": "a", "model": "b", "format": []}, r"format: an empty list"),
        (Job, {"scan": "a", "model": "b", "signed": "perhaps"}, r"signed: .*boolean.*'perhaps'"),
        (
            Job,
            {"scan": "a", "model": "b", "sign": True},
            r"sign: unknown key, did you mean 'signed",
        ),
        (Job, {"scan": "a", "model": "b", "slice": 3, "axis": ["axial", "coronal"]}, "one axis"),
        (
            FactorySpec,
            {"factory": "os.system", "weights": "w", "classes": ["a"]},
            r"factory: .*os",
        ),
        (FactorySpec, {"nets": 1}, r"nets: unknown key, .*\n  weights: missing"),
    ],
    ids=str,
)
def test_illegal(kind, content, said):
    with pytest.raises(ConfigError, match=said):
        validate(content, kind, "file.yaml")


def test_whatever_is_given_is_shown_short():
    for given, shown in (
        (10**5000, "a number of thousands of digits"),
        ("x" * 5000, r"'x{30,40}\.\.\.x{30,40}'"),
        (torch.zeros(3), "Tensor"),
    ):
        with pytest.raises(ConfigError, match=f"mode: .*, got {shown}$"):
            validate({"roi_size": 8, "mode": given}, Window, "model.yaml")


def test_json_of_any_depth_is_read_or_refused(tmp_path):
    file = tmp_path / "content.json"
    file.write_text('{"a": ' + "[" * 63 + "]" * 63 + "}")
    assert list(read_json(file)) == ["a"]
    for depth in (80, 900, 100_000):
        file.write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ConfigError, match=r"content\.json: .*nested too deeply; legal are 64"):
            read_json(file)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Window(roi_size=8).overlap = 0.5


def test_yaml_is_read_as_utf8(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("classes: [Läsion, 肝臓]", encoding="utf-8")
    assert read_yaml(file) == {"classes": ["Läsion", "肝臓"]}


def test_a_key_twice_is_refused(tmp_path):
    """YAML keeps the last one silently; which one is meant is not known."""
    file = tmp_path / "a.yaml"
    file.write_text("method: grad_cam\nscan: a\nmethod: hires_cam\n")
    with pytest.raises(ConfigError, match="method"):
        read_yaml(file)
