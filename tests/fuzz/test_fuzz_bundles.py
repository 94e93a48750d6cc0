"""Bundles with one value of their files replaced: right results, or errors of our own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.nested import EXTREMES, changed, mutated
from helpers_bundles import write_bundle
from helpers_zoo import LAYOUTS

from seg3dcam import load_model, load_scan
from seg3dcam.errors import Seg3dcamError

#: What MONAI's parser reads as code, as another part of the config, or as another file.
WORDS = ("$1 / 0", "$None", "$[", "@nope", "@network_def", "@", "%nope", "%", {"_target_": 3})

#: What once failed with a foreign error.
CORPUS = [
    ("inference.json", ("postprocessing", "transforms", 3, "output_dtype"), 10**30),
    ("inference.json", ("inferer", "roi_size"), []),
    ("inference.json", ("postprocessing", "transforms", 1, "keys"), None),
    ("metadata.json", ("network_data_format",), -1),
    ("metadata.json", ("network_data_format", "outputs", "pred"), []),
]


def damaged(files: dict[str, Any], seed: int, count: int) -> Iterator[tuple[str, Any, str]]:
    """Yield the name of a file, its content with one thing changed, and what was changed."""
    rng = random.Random(seed)
    for _ in range(count):
        name = rng.choice(["inference.json", "inference.json", "inference.json", "metadata.json"])
        yield name, *mutated(files[name], rng, [*EXTREMES, *2 * WORDS])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seed", ["corpus", *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3))]
)
def test_a_changed_bundle_is_read_or_refused_by_us(seed, tmp_path):
    layout = LAYOUTS["spleen_ct"]
    root = write_bundle(tmp_path / "b", layout.config, about=layout.about())
    texts = {n: (root / "configs" / n).read_text() for n in ("inference.json", "metadata.json")}
    files = {name: json.loads(text) for name, text in texts.items()}
    scan = load_scan(
        np.random.default_rng(0).random((14, 15, 12)) * 200, affine=np.diag([1.5, 1.5, 2, 1])
    )
    refused = 0
    corpus = (
        (name, changed(files[name], path, "replace", value), f"{path} {value!r}")
        for name, path, value in CORPUS
    )
    for name, content, said in corpus if seed == "corpus" else damaged(files, seed, 40):
        (root / "configs" / name).write_text(json.dumps(content))
        try:
            model = load_model(f"bundle:{root}", trust=True)
            prepared = model.prepare(scan)
            if model.restore is not None:
                masks = model.restore(torch.randn(2, *prepared.shape[1:]), scan, prepared)
                assert masks is None or masks.dtype == torch.bool
        except Seg3dcamError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"{name} {said}: {type(error).__name__}: {error}")
        (root / "configs" / name).write_text(texts[name])
    assert refused
