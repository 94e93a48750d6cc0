"""The table of model sources: what each of them has, and that one more is a file and a line."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest
from torch import nn

from seg3dcam import models
from seg3dcam.errors import ConfigError
from seg3dcam.models import SegModel, load_model
from seg3dcam.models.load import SOURCES, Source, relative_to
from seg3dcam.settings import Settings

FOLDER = Path(models.__file__).parent

#: A source of networks that return their input. Its file would lie in seg3dcam/models.
IDENTITY = '''"""Networks that return their input."""

from pydantic import Field
from torch import nn

from seg3dcam.models.seg_model import SegModel
from seg3dcam.settings import Settings


class Spec(Settings):
    """The settings in a model's YAML."""

    identity: str
    channels: int = Field(1, ge=1)


def build(spec, path, trust):
    """Return the model."""
    return SegModel(nn.Identity(), in_channels=spec.channels, name=spec.identity)
'''


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_has_settings_and_a_builder(kind):
    module = import_module(SOURCES[kind].module)
    assert issubclass(module.Spec, Settings)
    assert module.Spec.model_fields[kind].is_required()
    others = [name for name, field in module.Spec.model_fields.items() if field.is_required()]
    assert SOURCES[kind].path_is_enough == (others == [kind])
    assert callable(module.build)


@pytest.fixture
def identity(tmp_path, monkeypatch):
    (tmp_path / "identity_source.py").write_text(IDENTITY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "identity", Source("identity_source", path_is_enough=True))


@pytest.mark.usefixtures("identity")
def test_a_further_source_is_one_file_and_one_line(tmp_path):
    short = load_model("identity:same", channels=2)
    assert isinstance(short, SegModel)
    assert isinstance(short.module, nn.Identity)
    assert (short.name, short.in_channels) == ("same", 2)
    (tmp_path / "model.yaml").write_text("identity: same\n")
    assert load_model(tmp_path / "model.yaml").in_channels == 1
    assert relative_to(Path("jobs"), "identity:same") == "identity:jobs/same"
    with pytest.raises(ConfigError, match=r"channel: unknown key, did you mean 'channels'"):
        load_model("identity:same", channel=2)


@pytest.mark.parametrize("name", ["__init__", "load", "specs"])
def test_the_table_and_shared_settings_load_no_framework(name):
    """Settings are looked up before anything is computed, so they must not wait for PyTorch."""
    body = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = {getattr(node, "module", None) or node.names[0].name for node in imports}
    standard = {"__future__", "collections.abc", "dataclasses", "importlib", "pathlib", "typing"}
    assert found - standard <= {
        "pydantic",
        "seg3dcam.checks",
        "seg3dcam.errors",
        "seg3dcam.importing",
        "seg3dcam.settings",
    }
