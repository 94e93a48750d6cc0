"""Quantus' measures of a map are those of this package, where both have one of the same name."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import toy

from seg3dcam.errors import ConfigError, EvaluationError, InputError, MissingExtraError
from seg3dcam.evaluate import localisation, quantus_measures
from seg3dcam.evaluate.complexity import entropy, gini
from seg3dcam.evaluate.quantus import MEASURES, REFUSED

SHAPES = {"2D": (9, 14), "3D": (7, 9, 10)}


def signed_map(shape):
    values = toy.random_input(1, 1, *shape, seed=1)[0, 0].numpy()
    return values + region_of(shape)


def region_of(shape):
    region = np.zeros(shape, dtype=bool)
    region[tuple(slice(2, 6) for _ in shape)] = True
    return region


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_quantus(shape):
    pytest.importorskip("quantus")
    values, region = signed_map(shape), region_of(shape)
    before = values.copy()
    found = quantus_measures(values, region)
    assert np.array_equal(values, before)
    own = localisation(values, region, draws=1)
    assert set(found) == set(MEASURES)
    assert found["RelevanceMassAccuracy"] == pytest.approx(own.mass.value, abs=1e-9)
    assert found["AttributionLocalisation"] == pytest.approx(own.mass.value, abs=1e-6)
    assert found["RelevanceRankAccuracy"] == pytest.approx(own.rank.value, abs=1e-9)
    assert found["AUC"] == pytest.approx(own.roc_auc.value, abs=1e-9)
    assert found["PointingGame"] == own.pointing.value
    # Quantus adds 1e-7 to every voxel.
    assert found["Sparseness"] == pytest.approx(gini(values), abs=1e-5)
    assert found["Complexity"] == pytest.approx(entropy(values) * np.log(values.size), abs=1e-5)
    assert found["EffectiveComplexity"] == values.size


def test_without_a_region_only_what_needs_none():
    pytest.importorskip("quantus")
    values = signed_map(SHAPES["3D"])
    assert set(quantus_measures(values)) == {"Sparseness", "Complexity", "EffectiveComplexity"}
    assert set(quantus_measures(values, names=["Complexity"])) == {"Complexity"}


def test_what_is_refused_still_means_nothing():
    """Where one of them works one day, its reason is to be written anew."""
    quantus = pytest.importorskip("quantus")
    assert set(REFUSED) <= set(dir(quantus))
    assert set(MEASURES) <= set(dir(quantus))


def test_bad_input():
    values, region = signed_map(SHAPES["3D"]), region_of(SHAPES["3D"])
    for name in REFUSED:
        with pytest.raises(ConfigError, match="means nothing here"):
            quantus_measures(values, region, names=[name])
    with pytest.raises(ConfigError, match=r"no classifier.*Sparseness"):
        quantus_measures(values, region, names=["Sparsness"])
    with pytest.raises(EvaluationError, match="compares a map with a region"):
        quantus_measures(values, names=["AUC"])
    with pytest.raises(EvaluationError, match="is empty"):
        quantus_measures(values, region & False)
    with pytest.raises(EvaluationError, match="0 everywhere"):
        quantus_measures(0 * values)
    with pytest.raises(InputError, match="one grid"):
        quantus_measures(values, region[1:])
    with pytest.raises(InputError, match="NaN"):
        quantus_measures(values * np.nan)


def test_without_quantus_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "quantus", None)
    with pytest.raises(MissingExtraError, match=r"seg3dcam\[quantus\]"):
        quantus_measures(signed_map(SHAPES["3D"]))
