"""YAML and JSON that may be anybody's: plain values, or an error that names file and place."""

from __future__ import annotations

import time

import pytest
from helpers_cases import Place, seg3dcam, write_model, write_yaml

from seg3dcam import load_model
from seg3dcam.errors import ConfigError, ModelError, Seg3dcamWarning
from seg3dcam.job.settings import Job
from seg3dcam.settings import DEEPEST, LARGEST, parse_yaml, read_json, read_yaml, validate

NINES = "9" * 5000


def bomb():
    """Twelve lines that stand for 9**12 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


REFUSED_YAML = {
    "5,000 digits": (f"window: {{roi_size: {NINES}}}", "9…9+ cannot be read as a whole number"),
    "5,000 digits, negative": (f"a: -{NINES}", "cannot be read as a whole number"),
    "hexadecimal digits": (f"a: 0x{'f' * 5000}", "a is a whole number of about 6021 digits"),
    "a whole number beyond 64 bits": ("a: [9223372036854775808]", r"a\[0\] is a whole number"),
    "sixties": ("a: " + ":".join(["59"] * 999), "a is a whole number of about"),
    "sixties with a point": ("a: " + ":".join(["59"] * 999) + ".5", "not valid YAML"),
    "no digits": ("a: 0b_", "0b_ cannot be read as a whole number"),
    "a false number": ("a: !!float abc", "could not convert"),
    "a false truth": ("a: !!bool perhaps", "not valid YAML"),
    "a list as a mapping": ("a: !!map [1]", "expected a mapping"),
    "bytes": ("a: !!binary aGVsbG8=", "tag"),
    "a set": ("a: !!set {b, c}", "tag"),
    "pairs": ("a: !!pairs [b: c]", "tag"),
    "a date by its tag": ("a: !!timestamp 2024-01-01", "tag"),
    "a Python object": ("a: !!python/name:os.system x", "tag"),
    "a merge by its tag": ("a: &a {b: 1}\nc: {!!merge x: *a}", "tag"),
    "lists in lists": ("a: " + "[" * 500, "nested too deeply; legal are 64"),
    "closed lists in lists": ("a: " + "[" * 90 + "]" * 90, "nested too deeply"),
    "mappings in mappings": ("a: " + "{b: " * 90 + "1" + "}" * 90, "nested too deeply"),
    "itself": ("a: &a [*a]", "nested too deeply"),
    "a bomb of aliases": (bomb(), "stands for more than 50000 values"),
    "an alias of nothing": ("a: *b", "undefined alias"),
    "a key twice": ("a: 1\nb: 2\na: 3", "a is given twice"),
    "a key twice below": ("b: {a: 1, a: 2}", "a is given twice"),
    "a list as a key": ("? [1, 2]\n: 3", "unhashable key"),
    "NUL": ("a: \0b", "special characters are not allowed"),
    "half a character": ('a: "\\ud800"', "a holds one half of a character"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "too large": ("a: " + "x" * LARGEST["YAML"], "more than 250000 bytes"),
    "UTF-16": ("a: b".encode("utf-16"), "cannot be read as text"),
    "Latin-1": ("a: ä".encode("latin-1"), "cannot be read as text"),
    "a number": ("5", "expected 'key: value' lines, found int"),
    "nothing": ("", "expected 'key: value' lines, found NoneType"),
}


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@pytest.mark.parametrize(("text", "said"), REFUSED_YAML.values(), ids=REFUSED_YAML)
def test_yaml_that_is_refused(tmp_path, text, said):
    file = written(tmp_path / "model.yaml", text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"model\.yaml: (.|\n)*{said}") as caught:
        load_model(file)
    assert time.monotonic() - start < 10
    assert len(str(caught.value)) < 1000


REFUSED_JSON = {
    "5,000 digits": (f'{{"a": {NINES}}}', "cannot be read as a whole number"),
    "beyond 64 bits": (f'{{"a": [{"9" * 30}]}}', r"a\[0\] is a whole number of about"),
    "lists in lists": ('{"a": ' + "[" * 100_000, "nested too deeply"),
    "closed lists in lists": ('{"a": ' + "[" * 90 + "]" * 90 + "}", "nested too deeply"),
    "half a character": ('{"a": "\\ud800"}', "one half of a character"),
    "NUL": ('{"a\0": 1}', "control character"),
    "cut off": ('{"a": ', "Expecting value"),
    "a list": ("[]", "expected a JSON object, found list"),
    "UTF-16": ("{}".encode("utf-16"), "cannot be read as text"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED_JSON.values(), ids=REFUSED_JSON)
def test_json_that_is_refused(tmp_path, text, said):
    with pytest.raises(ConfigError, match=rf"plans\.json: .*{said}"):
        read_json(written(tmp_path / "plans.json", text))


def test_a_key_twice_in_json_is_said(tmp_path):
    file = written(tmp_path / "plans.json", '{"a": {"b": 1, "b": 2}}')
    with pytest.warns(Seg3dcamWarning, match=r"plans\.json: b is given twice; the last one counts"):
        assert read_json(file) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2024-01-01", "2024-01-01"),
        ("a: 2024-99-99", "2024-99-99"),
        ("a: =", "="),
        ("a: 0x10", 16),
        ("a: -9223372036854775808", -(2**63)),
        ("a: 1.5e+3", 1500.0),
        ("a: [yes, ~, 1]", [True, None, 1]),
        ("a: &b [1, 2]", [1, 2]),
        ("\ufeffa: 'Läsion 肝臓'", "Läsion 肝臓"),
        ("a: " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1), None),
    ],
    ids=[
        *("date", "false date", "equals", "hexadecimal", "64 bits", "float", "list", "anchor"),
        *("byte order mark", "as deep as legal"),
    ],
)
def test_what_is_plain_is_read(tmp_path, text, value):
    found = read_yaml(written(tmp_path / "a.yaml", text))["a"]
    assert found == value or value is None


def test_an_alias_stands_for_its_value(tmp_path):
    file = written(tmp_path / "a.yaml", "a: &size [64, 64]\nb: {c: *size}")
    assert read_yaml(file) == {"a": [64, 64], "b": {"c": [64, 64]}}


@pytest.mark.parametrize("read", [read_yaml, read_json, load_model])
@pytest.mark.parametrize("name", ["folder", "loop", "loop/a", "none", "a\0b", "n" * 5000, "file/a"])
def test_paths_that_lead_to_no_text(tmp_path, read, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"no such file|cannot be read as text"):
        read(tmp_path / name)


def test_a_file_without_an_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match=r"/dev/zero: .* more than"):
        read_yaml("/dev/zero")


@pytest.mark.few(21)
@pytest.mark.parametrize("key", ["arguments", "classes", "prepare", "window", "weights", "factory"])
@pytest.mark.parametrize(
    "value",
    [5, [1], {"a": 1}, None, True, "z" * 3000, {1: 2}, [[[]]], {"a": {"b": [None]}}, 1e308],
    ids=["5", "list", "map", "null", "true", "long", "number as key", "lists", "maps", "huge"],
)
def test_any_value_in_any_place_of_a_spec(tmp_path, key, value):
    """It builds the model or says what is wrong, in a message of a readable length."""
    path = write_model(tmp_path)
    write_yaml(path, {**read_yaml(path), key: value})
    said = complaint(path)
    assert "model.yaml" in said or key == "weights" or not said
    assert len(said) < 8000


def complaint(path):
    try:
        load_model(path)
    except (ConfigError, ModelError) as error:
        return str(error)
    return ""


def test_very_many_unknown_keys_are_counted(tmp_path):
    file = write_yaml(tmp_path / "job.yaml", {f"key_{n}": 1 for n in range(1000)})
    with pytest.raises(ConfigError, match="and 990 more") as caught:
        validate(read_yaml(file), Job, "job.yaml")
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize("text", ["[1, 2", NINES, "!!set {a}", "&a [*a]"], ids=lambda t: t[:9])
def test_a_value_of_the_command_line_that_is_none(tmp_path, text):
    with pytest.raises(ConfigError):
        parse_yaml(text)
    place = Place.at(tmp_path)
    outcome = place.explain("--settings", f"window={text}", "--method", "xres_cam")
    assert outcome.code == 2
    assert "cannot be read as a value" in outcome.complaint


def test_a_hostile_job_ends_with_2(tmp_path):
    file = written(tmp_path / "job.yaml", bomb())
    outcome = seg3dcam("explain", "--config", file)
    assert outcome.code == 2
    assert "job.yaml" in outcome.complaint
