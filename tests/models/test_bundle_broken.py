"""Broken and hostile bundles: errors of our own with file and key; nothing runs without trust."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_bundles import NAMES, SPLEEN, metadata, of_image, of_prediction, write_bundle

from seg3dcam import load_model, load_scan
from seg3dcam.errors import ConfigError, ModelError, Seg3dcamError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MONAI's own

SOFTMAX = of_prediction("Activationsd", softmax=True)


#: Nine lists, each of which holds the one before nine times.
BOMB = "a: &a [x]\n" + "\n".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]"
    for before, after in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi")
)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


#: What is said -> the change of the config that it is said of.
CONFIGS = {
    r"inference.json: .*nope": {"inferer": "%nope"},
    r"inference.json: .*other.json": {"inferer": "%other.json::inferer"},
    r"inference.json: inferer: roi_size nan": {"inferer#roi_size": float("nan")},
    r"inference.json: inferer: roi_size \(inf,": {"inferer#roi_size": [float("inf"), 16, 16]},
    r"inference.json: inferer: roi_size '96'": {"inferer#roi_size": "96"},
    r"inference.json: inferer: roi_size \(16, 'b', 16\)": {"inferer#roi_size": [16, "b", 16]},
    r"inference.json: inferer: roi_size \(\)": {"inferer#roi_size": []},
    r"inference.json: inferer: roi_size True": {"inferer#roi_size": True},
    r"inference.json: inferer: roi_size 16.5": {"inferer#roi_size": 16.5},
    r"inference.json: inferer.*overlap 1.5|inferer cannot be built": {"inferer#overlap": 1.5},
    r"inference.json: inferer: overlap 'half'|inferer cannot": {"inferer#overlap": "half"},
    r"inference.json: inferer.*sw_batch_size 0": {"inferer#sw_batch_size": 0},
    r"inference.json: inferer cannot be built: 'round' is not": {"inferer#mode": "round"},
    r"network_def cannot be built: .*circular": {"network_def": "@a", "a": "@network_def"},
    r"network_def cannot be built: .*not defined": {"network_def#channels": "@nowhere"},
    r"network_def cannot be built: .*NoNet": {"network_def#_target_": "NoNet"},
    r"network_def cannot be built: .*elsewhere.Net": {"network_def#_target_": "elsewhere.Net"},
    r"network_def is a NoneType": {"network_def#_disabled_": True},
    r"network_def is a partial|is a type": {"network_def#_mode_": "callable"},
    r"UNet opens a debugger": {"network_def#_mode_": "debug"},
    r"LoadImaged opens a debugger": {"preprocessing#transforms#0#_debug_": True},
    r"network_def cannot be built: .*division": {"network_def#_requires_": ["$1 / 0"]},
    r"Remove or rename img_sizes in the config; legal": {"network_def#img_sizes": 96},
    r"network_def cannot be built: .*9": {"network_def": "$exit(9)"},
    r"inferer is one of|inferer int": {"inferer": 3},
    r"preprocessing.*has no LoadImaged": {"preprocessing": []},
    r"has no preprocessing": {"preprocessing": None},
    r"preprocessing.* has no LoadImaged, so": {"preprocessing": "nothing"},
    r"nested more than 64 levels": {"extra": deep(100)},
    r"cannot be read as JSON: it is nested too deep|nested more": {"extra": "DEEP"},
    r"initialize cannot be built": {"initialize": "$@network.load_nothing()"},
}


def set_at(content: dict, identity: str, value) -> None:
    *path, last = identity.split("#")
    for part in path:
        content = content[int(part) if part.isdecimal() else part]
    content[int(last) if last.isdecimal() and isinstance(content, list) else last] = value


@pytest.mark.few(11)
@pytest.mark.parametrize("message", CONFIGS)
def test_a_broken_config_is_an_error_with_its_key(message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    file = root / "configs" / "inference.json"
    content = json.loads(file.read_text())
    for identity, value in CONFIGS[message].items():
        set_at(content, identity, value)
    text = json.dumps(content).replace('"DEEP"', "[" * 50_000 + "]" * 50_000)
    file.write_text(text)
    with pytest.raises(Seg3dcamError, match=f"(?s){message}"):
        load_model(f"bundle:{root}", trust=True)


@pytest.mark.parametrize("size", [0, None, -1, [16, 0, None]], ids=str)
def test_sizes_that_monai_takes_for_a_whole_axis(size, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN, change=lambda c: c["inferer"].update(roi_size=size))
    found = load_model(f"bundle:{root}", trust=True).window.roi_size
    assert found == ((16, -1, -1) if isinstance(size, list) else -1)


#: The same of the metadata.
METADATA = {
    "expected keys and values, a JSON object; found a list": [],
    "network_data_format: .*got -1": {"network_data_format": -1},
    r"network_data_format.outputs: .*got \[\]": {"network_data_format": {"outputs": []}},
    r"network_data_format.outputs.pred: .*got \[\]": {
        "network_data_format": {"outputs": {"pred": []}}
    },
    r"network_data_format.inputs.image: .*got \[\]": {
        "network_data_format": {"inputs": {"image": []}}
    },
    r"outputs.pred.channel_def: .*got \[": {
        "network_data_format": {"outputs": {"pred": {"channel_def": ["a"]}}}
    },
    r"outputs.pred.channel_def.0: .*got None": {
        "network_data_format": {"outputs": {"pred": {"channel_def": {"0": None}}}}
    },
    r"inputs.image.num_channels: .*got 'many'": {
        "network_data_format": {"inputs": {"image": {"num_channels": "many"}}}
    },
    r"inputs.image.num_channels: .*got 0": {
        "network_data_format": {"inputs": {"image": {"num_channels": 0}}}
    },
    r"version: .*got \[": {"version": [1]},
}


@pytest.mark.parametrize("message", METADATA)
def test_broken_metadata_are_an_error_with_its_key(message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    (root / "configs" / "metadata.json").write_text(json.dumps(METADATA[message]))
    for trust in (True, False):
        with pytest.raises(ConfigError, match=f"(?s)metadata.json.*{message}"):
            load_model(f"bundle:{root}", trust=trust)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("large_files: 5", "large_files.yml:.*large_files: .*got 5"),
        ("large_files: [3]", "large_files.yml:.*large_files.0: .*got 3"),
        ("large_files: [{url: x}]", "large_files.yml:.*path: missing"),
        ("- a", "large_files.yml: expected keys and values, a YAML object; found a list"),
        ("a: [", "large_files.yml: cannot be read as YAML"),
    ],
)
def test_a_broken_list_of_large_files_is_an_error_with_its_key(listed, message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    (root / "models" / "model.pt").unlink()
    (root / "large_files.yml").write_text(listed)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_model(f"bundle:{root}", trust=True)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "nested more than 64 levels"),
        (BOMB, "nested more than 64 levels deep, or more than 1000000 entries"),
        ("a: 1\na: 2", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read as YAML"),
        ("a: 2026-13-45", "cannot be read as YAML"),
        ("a: " + "9" * 5000, "cannot be read as YAML"),
        ("", "expected keys and values"),
        ("just text", "expected keys and values"),
    ],
    ids=["itself", "bomb", "twice", "object", "date", "digits", "empty", "text"],
)
def test_broken_yaml_is_an_error_with_its_file(text, message, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    (root / "configs" / "inference.json").unlink()
    (root / "configs" / "inference.yaml").write_text(text)
    for trust in (True, False):
        with pytest.raises(ConfigError, match=f"inference.yaml: {message}"):
            load_model(f"bundle:{root}", trust=trust)


@pytest.mark.parametrize("place", ["a\0b", "bundle.json", "configs"], ids=["nul", "file", "inner"])
def test_places_that_are_no_bundle_are_refused(place, tmp_path):
    root = write_bundle(tmp_path / "b", SPLEEN)
    (root / "bundle.json").write_text("{}")
    with pytest.raises(ModelError, match=r"NUL|no such folder|no MONAI bundle"):
        load_model(f"bundle:{root / place}", trust=True)
    with pytest.raises(ModelError, match=r"NUL|no configs"):
        load_model(f"bundle:{root}", config="configs/a\0.json", trust=True)


def test_an_old_torch_load_says_what_to_do(tmp_path):
    class Odd:
        pass

    globals()["Odd"] = Odd
    Odd.__qualname__ = "Odd"
    code = "$torch.load(@bundle_root + '/a.pt')"
    root = write_bundle(
        tmp_path / "b",
        SPLEEN,
        change=lambda c: c.update(arch=code),
    )
    file = root / "configs" / "inference.json"
    content = json.loads(file.read_text())
    content["network_def"]["channels"] = "@arch"
    file.write_text(json.dumps(content))
    torch.save(Odd(), root / "a.pt")
    with pytest.raises(ModelError, match=r"reading it could run code.*weights_only=False"):
        load_model(f"bundle:{root}", trust=True)
    del globals()["Odd"]


# ---------------------------------------------------------------- trust

#: Changes of a config, each of which writes a file, asks for one, or imports foreign code.
HOSTILE = {
    "expression": {"network_def": "$open(@marker, 'w')"},
    "import line": {"imports": ["$import evil"]},
    "import from": {"x": "$from evil import y"},
    "import in an expression": {"network_def": "$__import__('evil')"},
    "its own scripts": {"network_def": {"_target_": "scripts.evil.Net"}},
    "a system call": {"inferer": {"_target_": "os.system", "command": "touch $MARKER"}},
    "a download": {
        "network_def": {
            "_target_": "monai.apps.download_url",
            **{"url": "http://127.0.0.1:9/x", "filepath": "@marker"},
        }
    },
    "a bundle of elsewhere": {
        "network_def": {"_target_": "monai.bundle.load", "name": "x", "bundle_dir": "@marker"}
    },
    "a macro of another file": {"network_def": "%/etc/hostname.json"},
    "a saver": {"postprocessing": {**SOFTMAX, "_target_": "SaveImaged", "output_dir": "@marker"}},
    "words that are code": {
        "preprocessing": of_image("Lambdad", func="$lambda x: open(@marker, 'w')")
    },
    "what it requires": {
        "network_def": {"_target_": "UNet", "_requires_": ["$open(@marker, 'w')"]}
    },
    "a debugger": {"network_def": {"_target_": "UNet", "_mode_": "debug"}},
    "in initialize": {"initialize": ["$open(@marker, 'w')"]},
    "in disabled": {"network_def": {"_target_": "UNet", "_disabled_": "$open(@marker, 'w')"}},
}

#: Loads a bundle without trust while every file that is written or asked for, every request, every
#: process and every import of a module beside the bundle is recorded.
WATCH = """
import sys
import seg3dcam.cli.commands, seg3dcam.models.bundle.load
from seg3dcam import load_model
from seg3dcam.errors import ModelError
root, seen = sys.argv[1], []

def watch(event, arguments):
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        seen.append((event, str(arguments)[:200]))
    elif event == "exec" and ("<string>" in str(arguments) or root in str(arguments)):
        seen.append((event, str(arguments)[:200]))
    elif event.startswith(("socket.connect", "socket.getaddrinfo", "urllib", "http", "shutil")):
        seen.append((event, str(arguments)[:200]))
    elif event == "open":
        path, mode, flags = arguments
        if (mode and set(str(mode)) & set("wax+")) or root in str(path):
            seen.append(("open", str(path), str(mode)))
    elif event == "import" and arguments[0].split(".")[0] in ("evil", "scripts"):
        seen.append((event, arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        seen.append((event, str(arguments)))

sys.addaudithook(watch)
try:
    load_model("bundle:" + root)
except ModelError as error:
    message = str(error)
else:
    raise SystemExit("it was loaded")
ours = {f"{root}/configs/{name}" for name in ("inference.json", "metadata.json")}
other = [entry for entry in seen if not (entry[0] == "open" and entry[1] in ours)]
assert not other, other
assert "--trust" in message, message
print("untouched")
"""


@pytest.mark.slow
def test_nothing_of_a_hostile_bundle_runs_without_trust(tmp_path):
    """Each in the same process, so that it takes seconds: the hook names the one that did it."""
    loop = WATCH.replace("root, seen = sys.argv[1], []", "roots, seen = sys.argv[1:], []")
    head, tail = loop.split("sys.addaudithook(watch)\n")
    body = "\n".join("    " + line for line in tail.splitlines())
    first = "try:\n    load_model('bundle:' + roots[0])\nexcept ModelError:\n    pass\n"  # imports
    loop = f"for root in roots:\n    seen.clear()\n{body}\n"
    script = f"{head}root = ''\n{first}sys.addaudithook(watch)\n{loop}"
    roots = []
    for number, change in enumerate(HOSTILE.values()):
        root, marker = tmp_path / f"b{number}", tmp_path / f"ran{number}"
        evil = f"open({str(marker)!r}, 'w')"
        write_bundle(
            root,
            SPLEEN,
            change=lambda c, change=change, marker=marker: c.update(change, marker=str(marker)),
            about=metadata(1, NAMES[2]),
            scripts={"evil": evil, "__init__": evil},
            weights=False,
        )
        (root / "evil.py").write_text(evil)
        roots.append(str(root))
    done = subprocess.run(
        [sys.executable, "-c", script, *roots],
        capture_output=True,
        text=True,
        env={**os.environ, "MARKER": str(tmp_path / "ran")},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("untouched") == len(HOSTILE)
    assert not list(tmp_path.glob("ran*"))


def test_what_transforms_would_write_is_not_written_with_trust(tmp_path, capfd):
    """With trust the bundle's own code runs; writers among its transforms still write nothing."""

    def change(config):
        places = {"output_dir": str(tmp_path / "saved")}
        writers = [of_image("SaveImaged", **places), of_image("DataStatsd", name="printed")]
        config["preprocessing"]["transforms"] += writers

    root = write_bundle(tmp_path / "b", SPLEEN, change=change)
    scan = load_scan(np.random.default_rng(0).random((12, 12, 12)), affine=np.eye(4))
    load_model(f"bundle:{root}", trust=True).prepare(scan)
    assert not (tmp_path / "saved").exists()
    assert "printed" not in "".join(capfd.readouterr())


def test_a_long_list_of_code_is_cut(tmp_path):
    root = write_bundle(
        tmp_path / "b",
        SPLEEN,
        change=lambda c: c.update(long="$" + "x" * 10_000, many=[f"$f({n})" for n in range(99)]),
    )
    with pytest.raises(ModelError, match=r"and \d+ more") as caught:
        load_model(f"bundle:{Path(root)}")
    assert len(str(caught.value)) < 4000
