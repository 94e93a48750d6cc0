"""Damaged YAML, weights and records: an error of our own, or what the sound part of them says."""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzz.nested import mutated
from helpers_cases import Place, brightness_network, seg3dcam, write_model, write_yaml
from mutations import mutated_bytes
from safetensors.torch import load_file

from seg3dcam import load_explanation, load_model
from seg3dcam.errors import Seg3dcamError, Seg3dcamWarning
from seg3dcam.files import printable

SEEDS = 80


@pytest.fixture
def folder(tmp_path) -> Path:
    write_model(tmp_path, prepare={"intensity": {"range": [0, 1]}, "spacing": [2, 2, 2]})
    return tmp_path


def as_text(content: Any) -> bytes:
    """Return content as YAML, in which JSON's numbers and texts mean the same."""
    return json.dumps(content, default=str).encode(errors="surrogatepass")


def damaged(name: str, content: Any, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield what was done, and the damaged text; every second one is still YAML."""
    for seed in range(SEEDS):
        rng = random.Random(f"{name} {seed}")
        if seed % 2:
            yield f"seed {seed}", mutated_bytes(text, rng, head=len(text))
        else:
            changed, done = mutated(content, rng)
            yield f"seed {seed}: {done}", as_text(changed)


def faults(cases: Iterator[tuple[str, Any]], fault_of: Any) -> list[str]:
    """Return what went wrong; `fault_of` may end in an error of our own, and in no other."""
    found = []
    for done, content in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Seg3dcamWarning)
                fault = fault_of(content)
        except Seg3dcamError as error:
            fault = None if 20 < len(str(error)) < 20_000 else f"said badly: {error}"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            found.append(f"{done}: {fault}")
    return found


@pytest.mark.parametrize("start", ["model", "model, its own keys"])
def test_models(folder, start):
    path = folder / "model.yaml"
    text = path.read_bytes()
    content = yaml.safe_load(text)
    sound = load_file(folder / "model.safetensors")

    def fault_of(damaged_text: bytes) -> str | None:
        path.write_bytes(damaged_text)
        model = load_model(path)
        said = yaml.safe_load(damaged_text)
        names = [printable(name) or f"class {k}" for k, name in enumerate(said["classes"])]
        if list(model.class_names) != names:
            return f"classes {model.class_names}"
        state = model.module.state_dict()
        if said["weights"] != "random" and any(not state[k].equal(sound[k]) for k in sound):
            return "other weights"
        return None

    assert faults(damaged(start, content, text), fault_of) == []


JOB = {
    "scan": ["a.nii.gz"],
    "model": "none.yaml",
    "target": ["lesion", 2],
    "layer": ["model.0", "auto"],
    "method": "layer_cam",
    "settings": {"window": 4},
    "format": ["png", "html"],
    "intensity_window": [400, 40],
    "threshold": 0.2,
    "set": {"inferer#overlap": 0.5},
}


@pytest.mark.slow
def test_jobs(tmp_path):
    """There is no such model, so that no job is done."""
    path = write_yaml(tmp_path / "job.yaml", JOB)

    def fault_of(text: bytes) -> str | None:
        path.write_bytes(text)
        outcome = seg3dcam("explain", "--config", path, "--out", tmp_path / "out")
        return None if outcome.code in (1, 2) and outcome.err else f"ended with {outcome.code}"

    assert faults(damaged("job", JOB, path.read_bytes()), fault_of) == []
    assert {file.name for file in tmp_path.iterdir()} <= {"job.yaml", "out"}


def _names(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights(folder, suffix):
    """Whatever is loaded is what the format's own library reads."""
    state = brightness_network().state_dict()
    file = folder / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
        content = yaml.safe_load((folder / "model.yaml").read_bytes())
        write_yaml(folder / "model.yaml", content | {"weights": file.name})
    else:
        file = folder / "model.safetensors"
    sound = file.read_bytes()

    def library() -> dict[str, torch.Tensor] | None:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # of other parsers
            warnings.simplefilter("ignore")
            if suffix == ".pt":
                return torch.load(file, map_location="cpu", weights_only=True)
            return load_file(file)
        return None

    def fault_of(content: bytes) -> str | None:
        file.write_bytes(content)
        loaded = load_model(folder / "model.yaml").module.state_dict()
        right = library()
        if right is None:
            return "loaded, and the library refuses it"
        if _names(right) != set(loaded):
            return "other names than the library's"
        different = [k for k in loaded if not loaded[k].equal(right[k].to(loaded[k].dtype))]
        return f"other values of {different}" if different else None

    cases = (
        (f"seed {n}", mutated_bytes(sound, random.Random(f"{suffix} {n}"), 1500))
        for n in range(SEEDS)
    )
    assert faults(cases, fault_of) == []


def test_records(tmp_path):
    place = Place.at(tmp_path)
    assert place.explain("--target", "lesion").code == 0
    path = place.out / "case.json"
    text = path.read_bytes()

    def fault_of(damaged_text: bytes) -> str | None:
        path.write_bytes(damaged_text)
        load_explanation(place.out)
        return None

    assert faults(damaged("record", json.loads(text), text), fault_of) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_a_case_is_never_lost_to_a_damaged_record(tmp_path, seed):
    """The next run writes its own, whatever the record of the last one says."""
    place = Place.at(tmp_path)
    assert place.explain("--target", "lesion").code == 0
    path = place.out / "case.json"
    rng = random.Random(f"rerun {seed}")
    path.write_bytes(as_text(mutated(json.loads(path.read_bytes()), rng)[0]))
    outcome = place.explain("--target", "lesion")
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
