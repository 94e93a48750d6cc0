"""A factory beside its YAML: found with trust, each folder its own, other imports untouched."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from helpers_cases import arguments, brightness_network, contents, write_model

from seg3dcam import load_model
from seg3dcam.errors import ModelError

REAL = Path(__file__).parents[3] / "shared" / "real"
X = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

NETS = """
from monai.networks.nets import UNet
{imports}

class Net(UNet):
    which = {which!r}

def net(**arguments):
    import {late}
    return Net(**arguments)
"""


def write_place(folder, which, *, imports="", late="json", factory="nets:Net"):
    path = write_model(folder, factory=factory)
    (folder / "nets.py").write_text(NETS.format(which=which, imports=imports, late=late))
    return path


@pytest.fixture(autouse=True)
def untouched_imports():
    """What is imported, and from where, is after every test as before."""
    import monai.networks.nets  # noqa: F401 - so that it is there before

    path, modules = list(sys.path), dict(sys.modules)
    yield
    assert sys.path == path
    assert {n: m for n, m in sys.modules.items() if n in modules} == modules
    assert not {"nets", "parts", "package", "plain"} & set(sys.modules)


def test_a_module_beside_the_yaml_is_found_with_trust(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = write_place(tmp_path, "one")
    before = contents(tmp_path)
    with pytest.raises(ModelError, match=r"factory nets:Net is not from .*run its code.*--trust"):
        load_model(path)
    module = load_model(path, trust=True).module
    assert module.which == "one"
    assert torch.equal(module(X), brightness_network()(X))
    assert copy.deepcopy(module).which == "one"
    assert contents(tmp_path) == before  # no __pycache__ in somebody's folder


def test_two_folders_have_their_own_modules(tmp_path):
    """Also where both import a second one beside them, at once or when they are called."""
    models = {}
    for which in ("one", "two"):
        imports, factory = "from parts import NAME", "nets:net"
        path = write_place(tmp_path / which, which, imports=imports, late="parts", factory=factory)
        (tmp_path / which / "parts.py").write_text(f"NAME = {which!r}\n")
        models[which] = load_model(path, trust=True).module
    for which, module in models.items():
        assert module.which == which


@pytest.mark.parametrize("init", [True, False], ids=["with __init__", "without"])
def test_packages_beside_the_yaml(tmp_path, init):
    name = "package" if init else "plain"
    for which in ("one", "two"):
        folder = tmp_path / which
        path = write_place(folder, which, factory=f"{name}.nets:Net")
        (folder / name).mkdir()
        (folder / "nets.py").rename(folder / name / "nets.py")
        if init:
            (folder / name / "__init__.py").touch()
        assert load_model(path, trust=True).module.which == which


def test_a_module_of_the_caller_with_the_same_name_stays(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "nets.py").write_text("OWN = 1\n")
    monkeypatch.syspath_prepend(other)
    import nets

    try:
        path = write_place(tmp_path / "one", "one")
        assert load_model(path, trust=True).module.which == "one"
        assert sys.modules["nets"] is nets
    finally:
        del sys.modules["nets"]


def test_the_same_module_is_not_imported_twice(tmp_path, monkeypatch):
    """A script beside its YAML gets networks of the classes that it knows."""
    path = write_place(tmp_path, "one")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import nets

    try:
        assert type(load_model(path, trust=True).module) is nets.Net
    finally:
        del sys.modules["nets"]
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["torch", "monai", "random", "seg3dcam"])
def test_what_runs_already_is_not_replaced(tmp_path, name):
    path = write_place(tmp_path, "one")
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    assert load_model(path, trust=True).module.which == "one"
    path = write_model(tmp_path, factory="monai.networks.nets:UNet", arguments=arguments())
    assert load_model(path, trust=True).module is not None


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def broken(:", "invalid syntax"),
        ("import no_such_package", "no_such_package"),
        ("1 / 0", "division by zero"),
        ("x = 1", "no 'Net' in nets"),
    ],
    ids=["syntax", "import", "exception", "no such name"],
)
def test_a_damaged_module_is_named(tmp_path, code, said):
    path = write_place(tmp_path, "one")
    (tmp_path / "nets.py").write_text(code)
    with pytest.raises(ModelError, match=rf"model\.yaml: .*{said}"):
        load_model(path, trust=True)


def test_a_module_that_is_nowhere_is_named(tmp_path):
    path = write_model(tmp_path, factory="no_such_nets:Net")
    with pytest.raises(ModelError, match=r"no_such_nets cannot be imported: No module named"):
        load_model(path, trust=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="real networks are not here")
def test_real_networks_beside_their_yaml():
    path = REAL / "model5_gw_ae.yaml"
    with pytest.raises(ModelError, match="--trust"):
        load_model(path)
    model = load_model(path, trust=True)
    assert model.class_names == ("background", "white matter", "grey matter")
    assert model.in_channels == 1
