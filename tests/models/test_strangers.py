"""Model files from a stranger: without trust nothing of them runs, and each is named in words."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import pkgutil
import subprocess
import sys
import zipfile
from importlib import import_module
from types import ModuleType

import pytest
import torch
from helpers_cases import Calls, arguments, brightness_network, seg3dcam, write_model, write_yaml
from monai.networks import nets
from safetensors.torch import save_file
from torch import Tensor, nn

from seg3dcam import load_model
from seg3dcam.errors import ConfigError, ModelError
from seg3dcam.models.networks import NETWORKS, check_arguments, network_class
from seg3dcam.models.torchscript import torchscript_state
from seg3dcam.models.weights import read_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # TorchScript is old
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*beta state"),  # of sparse tensors, when they are made
    pytest.mark.filterwarnings("ignore:.*prototype stage"),  # of nested tensors
    pytest.mark.filterwarnings("ignore:.*[Qq]uantiz"),
]

MONAI = "monai.networks.nets"
DNA = "dynamic_network_architectures.architectures"


# ---------------------------------------------------------------- what may be built


def modules_of(package):
    top = import_module(package)
    found = [top]
    for info in pkgutil.walk_packages(top.__path__, package + "."):
        found.append(import_module(info.name))
    return found


def accepted(factory):
    try:
        return network_class(factory, "model.yaml")
    except ModelError:
        return None


@pytest.mark.parametrize("package", [pytest.param(MONAI, marks=pytest.mark.slow), DNA])
def test_of_all_classes_that_can_be_reached_only_networks_are_built(package):
    """Over every attribute of every module, and every attribute of those."""
    direct, beyond = {}, []
    for module in modules_of(package):
        for name, value in vars(module).items():
            direct[f"{module.__name__}:{name}"] = value
            if isinstance(value, ModuleType | type):
                beyond += [f"{module.__name__}:{name}.{inner}" for inner in vars(value)]
    taken = {factory: found for factory in direct if (found := accepted(factory)) is not None}
    for factory, found in taken.items():
        assert found is direct[factory]
        assert issubclass(found, nn.Module)
        assert found.__module__.startswith(package + ".")
        assert found.__name__ in NETWORKS[package]
        assert (found.__module__, found.__name__) != ("torch.nn.modules.module", "Module")
    assert len(beyond) > 1000
    assert not [factory for factory in beyond if accepted(factory)]
    built = {found.__name__ for found in taken.values()}
    newer_spelling = {"SEResNeXt50", "SEResNeXt101"}  # names of the same classes elsewhere
    assert set(NETWORKS[package]) - built <= newer_spelling


@pytest.mark.parametrize(
    "factory",
    [
        "monai.networks.nets.vista3d:monai.apps.nnunet.ModelnnUNetWrapper",
        "monai.networks.nets.vista3d:monai.networks.nets.UNet",
        "monai.networks.nets.resnet:hf_hub_download",
        "monai.networks.nets:resnet18",
        "monai.networks.nets:TorchVisionFCModel",
        "monai.networks.nets:MILModel",
        "monai.networks.nets:Transchex",
        "monai.networks.nets.cell_sam_wrapper:CellSamWrapper",
        "monai.networks.nets.basic_unet:TwoConv",
        "monai.networks.nets.unet:nn.Sequential",
        "monai.networks.nets.unet:Convolution",
        f"{DNA}.unet:UNetDecoder",
        "dynamic_network_architectures.building_blocks.residual:BasicBlockD",
    ],
)
def test_what_is_no_network_of_the_table_needs_trust(tmp_path, factory):
    path = write_model(tmp_path, factory=factory, arguments={})
    with pytest.raises(ModelError, match=r"model\.yaml: factory .*--trust"):
        load_model(path)


def test_a_class_from_elsewhere_is_no_network_by_its_name(monkeypatch):
    foreign = type("SwinUNETR", (nn.Module,), {"__module__": "elsewhere"})
    monkeypatch.setattr(import_module(f"{MONAI}.unet"), "SwinUNETR", foreign, raising=False)
    assert accepted(f"{MONAI}.unet:SwinUNETR") is None
    assert accepted(f"{MONAI}.swin_unetr:SwinUNETR") is nets.SwinUNETR


def test_networks_are_built_from_plain_arguments_as_before():
    built = {
        "UNet": arguments(),
        "BasicUNet": {"features": [4, 4, 4, 4, 4, 4], "act": ["relu", {"inplace": True}]},
        "SwinUNETR": {
            **{"in_channels": 1, "out_channels": 2, "feature_size": 12},
            **{"use_checkpoint": True, "dropout_path_rate": 0.1},
        },
        "EfficientNetBN": {"model_name": "efficientnet-b0", "pretrained": False},
        "EfficientNet": {"blocks_args_str": ["r1_k3_s11_e1_i32_o16_se0.25"], "spatial_dims": 3},
        "FlexibleUNet": {"in_channels": 1, "out_channels": 2, "backbone": "resnet18"},
        "Unet": arguments(),  # MONAI's own other spelling
    }
    for name, given in built.items():
        network = network_class(f"{MONAI}:{name}", "model.yaml")
        check_arguments(network, given, "model.yaml")
        assert isinstance(network(**given), nn.Module)


# ---------------------------------------------------------------- arguments

FETCHING = {
    "pretrained": ({"pretrained": True}, "pretrained True"),
    "an address": ({"pretrained_url": "https://example.org/w.pth"}, "pretrained_url"),
    "a path": ({"path": "w.pth"}, "path"),
    "a word as a path": ({"cache_dir": "weights"}, "cache_dir"),
    "weights": ({"weights": "DEFAULT"}, "weights"),
    "checkpoint": ({"checkpoint": "last"}, "checkpoint"),
    "load_from": ({"load_from": {"name": "last"}}, r"load_from\.name"),
    "in a list": ({"pretrained": [False]}, r"pretrained '\[False\]'"),
    "in an empty list": ({"pretrained": []}, "pretrained"),
    "in a mapping of nothing": ({"pretrained_url": {"": 0}}, "pretrained_url"),
    "in a list of nothing": ({"pretrained": [None]}, "pretrained"),
    "in a mapping": ({"act": ["relu", {"filename": "x"}]}, r"act\[1\]\.filename"),
    "a file's name elsewhere": ({"act": "relu.pt"}, "act"),
    "a folder elsewhere": ({"norm": "../norm"}, "norm"),
    "an address elsewhere": ({"norm": "file:x"}, "norm"),
    "the home folder": ({"norm": "~"}, "norm"),
    "an address as a key": ({"norm": {"http://x": 1}}, "norm"),
    "a class": ({"act": nn.ReLU}, "act"),
    "a function": ({"norm": [print]}, r"norm\[0\]"),
}


@pytest.mark.parametrize(("given", "said"), FETCHING.values(), ids=FETCHING)
def test_arguments_that_read_or_fetch_need_trust(given, said):
    with pytest.raises(ModelError, match=rf"model\.yaml: arguments\.{said} .*--trust"):
        check_arguments(nets.UNet, {**arguments(), **given}, "model.yaml")


@pytest.mark.parametrize("name", NETWORKS[MONAI])
def test_no_network_fetches_by_an_argument(name):
    """Every argument of every network whose code speaks of weights to fetch or of files."""
    network = accepted(f"{MONAI}:{name}") or accepted(f"{MONAI}.unet:{name}")
    if network is None:
        return
    parameters = inspect.signature(network).parameters
    for argument in [n for n in parameters if "pretrained" in n or "url" in n or "filename" in n]:
        for value in (True, "x", "https://example.org", [False], [None], [], {}, {"": ""}, [[0]]):
            with pytest.raises(ModelError, match=argument):
                check_arguments(network, {argument: value}, "model.yaml")


def test_a_default_that_fetches_is_refused_and_can_be_set(tmp_path):
    given = {"model_name": "efficientnet-b0"}
    path = write_model(tmp_path, factory=f"{MONAI}:EfficientNetBN", arguments=given)
    with pytest.raises(ModelError, match=r"pretrained=True where .* set arguments\.pretrained to"):
        load_model(path)


# ---------------------------------------------------------------- all at once, watched

_WATCHED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import monai.networks.nets, torch
from seg3dcam import load_model
from seg3dcam.errors import InputError
import seg3dcam.models.factory, seg3dcam.models.exported, seg3dcam.models.bundle.load

folder, models = sys.argv[1], sys.argv[2:]
seen, said = [], []

def watch(event, given):
    writes = event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")
    if writes or event.partition(".")[0] in ("socket", "subprocess", "urllib", "shutil", "ftplib"):
        seen.append(f"{event} {given!r}")
    if event in ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir"):
        seen.append(f"{event} {given!r}")
    if event == "import" and given[0] in ("nets", "antigravity", "this", "huggingface_hub"):
        seen.append(f"{event} {given[0]}")

sys.addaudithook(watch)
for model in models:
    try:
        load_model(model)
        said.append("built")
    except InputError as error:
        said.append(str(error))
print(json.dumps([seen, said]))
"""


@pytest.mark.slow
def test_no_file_no_request_no_import_of_hostile_models(tmp_path, evil_archive):
    """What is refused is refused before anything happens, as Python's own audit sees it."""
    (tmp_path / "nets.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "plans.json").write_text("{}")
    (tmp_path / "net.pt2").write_bytes(evil_archive.read_bytes())
    torch.save(brightness_network(), tmp_path / "pickled.pt")
    hostile = [
        {"factory": "nets:MeshNet"},
        {"factory": "antigravity:webbrowser"},
        {"factory": "monai.networks.nets.vista3d:monai.apps.nnunet.ModelnnUNetWrapper"},
        {"factory": f"{MONAI}:EfficientNetBN", "arguments": {"model_name": "efficientnet-b0"}},
        {"factory": f"{MONAI}:HoVerNet", "arguments": {"pretrained_url": "http://127.0.0.1/x"}},
        {"factory": f"{MONAI}:TorchVisionFCModel", "arguments": {"pretrained": True}},
        {"factory": f"{MONAI}:DenseNet121", "arguments": {"pretrained": True}},
        {"factory": f"{MONAI}:ResNetFeatures", "arguments": {"model_name": "resnet10"}},
        {"weights": str(evil_archive)},
        {"weights": "pickled.pt"},
    ]
    models = [
        str(write_model(tmp_path / str(n), **change).rename(tmp_path / f"m{n}.yaml"))
        for n, change in enumerate(hostile)
    ]
    for name, content in {
        "program": {"exported": "net.pt2", "classes": ["a"]},
        "bundle": {"bundle": "."},
    }.items():
        models.append(str(write_yaml(tmp_path / f"{name}.yaml", content)))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    command = [sys.executable, "-c", _WATCHED, str(tmp_path), *models]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    seen, said = json.loads(run.stdout.splitlines()[-1])
    assert seen == []
    assert len(said) == len(models)
    assert "built" not in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- TorchScript


class WritesWhenLoaded(nn.Module):
    """TorchScript that writes a file when it is loaded."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.mark = mark

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return (self.weight, self.mark, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight = state[0]
        self.mark = state[1]
        self.training = state[2]
        torch.save(state[0], state[1])


@pytest.fixture(scope="module")
def evil_archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")
    torch.jit.script(WritesWhenLoaded(str(folder / "mark"))).save(folder / "evil.pt")
    return folder / "evil.pt"


SUFFIXES = ["net.pt", "net.pth", "net.ts", "net.zip", "net.safetensors", "net.ckpt", "net"]


@pytest.mark.parametrize("name", SUFFIXES)
def test_the_code_of_a_torchscript_archive_runs_with_trust_alone(tmp_path, evil_archive, name):
    mark = evil_archive.parent / "mark"
    mark.unlink(missing_ok=True)
    (tmp_path / name).write_bytes(evil_archive.read_bytes())
    path = write_model(tmp_path, weights=name)
    with pytest.raises(ModelError, match=rf"{name}: .*made by code of its own.*--trust"):
        load_model(path)
    assert not mark.exists()
    state = read_state(tmp_path / name, trust=True)
    assert mark.exists()  # so the attack is a real one
    assert torch.equal(state["weight"], torch.ones(2))


@pytest.mark.parametrize("name", SUFFIXES)
def test_weights_are_read_by_content_whatever_the_suffix(tmp_path, name):
    network = brightness_network()
    x = torch.rand(1, 1, 16, 16, 16)
    for write in (
        lambda file: torch.jit.trace(network, x).save(str(file)),
        lambda file: torch.save(network.state_dict(), file),
        lambda file: save_file(network.state_dict(), file),
    ):
        write(tmp_path / name)
        module = load_model(write_model(tmp_path, weights=name)).module
        assert torch.equal(module(x), network(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.few(4)
@pytest.mark.filterwarnings("ignore:The TorchScript type system")
@pytest.mark.parametrize("how", ["traced", "scripted"])
@pytest.mark.parametrize(
    "network",
    [
        nets.UNet(3, 1, 2, [4, 8], [2], num_res_units=1, norm="batch"),
        nets.SegResNet(3, 8, 1, 2),
        nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2]),
        nn.Sequential(nn.Conv3d(1, 2, 3, bias=False), nn.BatchNorm3d(2)),
        nn.Conv3d(1, 2, 3).double(),
        nn.Conv3d(1, 2, 3).bfloat16(),
    ],
    ids=["UNet", "SegResNet", "DynUNet", "buffers", "float64", "bfloat16"],
)
def test_torchscript_weights_are_those_that_torch_reads(tmp_path, network, how):
    dtype = next(network.parameters()).dtype
    x = torch.rand(1, 1, 16, 16, 16).to(dtype)
    network.eval()
    script = torch.jit.trace(network, x) if how == "traced" else torch.jit.script(network)
    script.save(str(tmp_path / "net.ts"))
    own = torchscript_state(tmp_path / "net.ts")
    expected = torch.jit.load(tmp_path / "net.ts").state_dict()
    assert list(own) == list(expected)
    for key, value in expected.items():
        assert own[key].dtype == value.dtype
        assert torch.equal(own[key], value)


def test_shared_and_strided_weights_are_those_that_torch_reads(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    network.register_buffer("part", torch.arange(24.0).reshape(4, 6).T[1:4])
    torch.jit.script(network).save(str(tmp_path / "net.ts"))
    own = torchscript_state(tmp_path / "net.ts")
    assert own.keys() == network.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in network.state_dict().items())


def with_pickle(source, target, data):
    """Copy a TorchScript archive with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name))


#: Opcodes: a function of our own, a state that would set its attributes, BUILD.
SETS_ATTRIBUTES = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00spoilK\x01s\x86b."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps(Calls(eval, "open('mark', 'w')")), "eval is no tensor"),
        (pickle.dumps(Calls(torch.load, "x")), "load is no tensor"),
        (pickle.dumps(Calls(getattr, [], "append")), "getattr is no tensor"),
        (SETS_ATTRIBUTES, "with a state of its own"),
        (pickle.dumps({"a": 1}), "holds no module"),
        (b"\x80\x02", "cannot be read without running"),
        (b"", "cannot be read without running"),
        (b"\x80\x05\x8d" + b"\xff" * 7 + b"\x0f.", "cannot be read without running"),
    ],
    ids=["eval", "load", "getattr", "attributes", "dict", "truncated", "empty", "long text"],
)
def test_a_damaged_torchscript_archive_runs_nothing(tmp_path, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(nn.Conv3d(1, 2, 3)).save(str(tmp_path / "good.ts"))
    with_pickle(tmp_path / "good.ts", tmp_path / "bad.ts", data)
    with pytest.raises(ModelError, match=rf"bad\.ts: .*{said}(.|\n)*--trust"):
        read_state(tmp_path / "bad.ts")
    assert not (tmp_path / "mark").exists()


def test_a_tensor_cannot_leave_its_storage(tmp_path):
    torch.jit.script(nn.Conv3d(1, 2, 3)).save(str(tmp_path / "good.ts"))
    with zipfile.ZipFile(tmp_path / "good.ts") as archive:
        data = archive.read("good/data.pkl")
    size = bytes([*b"(K\x02K\x01K\x03K\x03K\x03t"])
    assert size in data
    data = data.replace(size, bytes([*b"(K\xffK\x01K\x03K\x03K\x03t"]))
    with_pickle(tmp_path / "good.ts", tmp_path / "bad.ts", data)
    with pytest.raises(ModelError, match="out of bounds"):
        read_state(tmp_path / "bad.ts")


def test_a_frozen_torchscript_archive_says_where_its_weights_are(tmp_path):
    script = torch.jit.trace(nn.Conv3d(1, 2, 3).eval(), torch.rand(1, 1, 4, 4, 4))
    torch.jit.freeze(script).save(str(tmp_path / "frozen.ts"))
    with pytest.raises(ModelError, match="frozen one keeps its weights as constants"):
        read_state(tmp_path / "frozen.ts")


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(30_000_000))
    with pytest.raises(ModelError, match=r"bomb\.pt: .* bytes unpack to 30000000"):
        read_state(tmp_path / "bomb.pt")


# ---------------------------------------------------------------- exported programs


@pytest.mark.parametrize("name", ["net.pt2", "net.pt", "net.pth", "net"])
def test_a_program_is_not_even_opened_without_trust(tmp_path, monkeypatch, name):
    def never(*given, **named):
        raise AssertionError("it was read")

    monkeypatch.setattr(torch.export, "load", never)
    monkeypatch.setattr(torch, "load", never)
    (tmp_path / name).write_bytes(pickle.dumps(Calls(eval, "1")))
    path = write_yaml(tmp_path / "model.yaml", {"exported": name, "classes": ["a"]})
    with pytest.raises(ModelError, match=rf"{name}: .*can run code .*--trust"):
        load_model(path)


@pytest.mark.parametrize("keep", [0, 100, 3000], ids=["empty", "start", "cut off"])
def test_a_damaged_program_is_one_sentence(tmp_path, keep, monkeypatch):
    """With trust; PyTorch would log a traceback of its own."""
    logged = []
    monkeypatch.setattr(logging.getLogger("torch.export"), "handle", logged.append)
    program = torch.export.export(nn.Conv3d(1, 2, 1), (torch.rand(1, 1, 4, 4, 4),))
    torch.export.save(program, tmp_path / "good.pt2")
    (tmp_path / "bad.pt2").write_bytes((tmp_path / "good.pt2").read_bytes()[:keep])
    path = write_yaml(tmp_path / "model.yaml", {"exported": "bad.pt2", "classes": ["a"]})
    with pytest.raises(ModelError, match=r"bad\.pt2: cannot be read as an exported program"):
        load_model(path, trust=True)
    assert not logged


# ---------------------------------------------------------------- weights that are none

KEY = next(iter(brightness_network().state_dict()))


def spoiled(value):
    return {**brightness_network().state_dict(), KEY: value}


BAD_TENSORS = {
    "sparse": (lambda: spoiled(torch.eye(3).to_sparse()), rf"{KEY} is sparse"),
    "sparse rows": (lambda: spoiled(torch.eye(3).to_sparse_csr()), rf"{KEY} is sparse"),
    "float8": (lambda: spoiled(torch.ones(3).to(torch.float8_e4m3fn)), rf"{KEY} is .*float8"),
    "complex": (lambda: spoiled(torch.ones(3, dtype=torch.complex64)), rf"{KEY} is .*complex64"),
    "meta": (lambda: spoiled(torch.ones(3, device="meta")), rf"{KEY} is on the meta device"),
    "nested": (
        lambda: spoiled(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
        rf"{KEY} is a nested tensor",
    ),
    "quantized": (
        lambda: spoiled(torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8)),
        rf"{KEY} is quantized",
    ),
    "NaN": (
        lambda: spoiled(torch.full_like(brightness_network().state_dict()[KEY], torch.nan)),
        rf"NaN or infinite values, in {KEY}",
    ),
    "a number as key": (lambda: {7: torch.ones(1)}, "the key 7 is of type int"),
    "no key": (lambda: {None: torch.ones(1)}, "the key None is of type NoneType"),
    "mappings": (lambda: {"a": {"b": torch.ones(1)}}, r"no state dict .* holds \['a'\]"),
    "empty": (dict, "holds no tensors"),
    "empty inside": (lambda: {"state_dict": {}}, "holds no tensors"),
    "a list": (lambda: [torch.ones(1)], "It holds list"),
    "a tensor": (lambda: torch.ones(1), "It holds Tensor"),
}


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize(("content", "said"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_weights_of_another_kind_are_named(tmp_path, content, said, name):
    torch.save(content(), tmp_path / name)
    with pytest.raises(ModelError, match=rf"{name}: .*{said}"):
        load_model(write_model(tmp_path, weights=name))


def saved(tmp_path):
    torch.save(brightness_network().state_dict(), tmp_path / "good.pt")
    return (tmp_path / "good.pt").read_bytes()


BAD_BYTES = {
    "0 bytes": (lambda good: b"", "0 bytes"),
    "half": (lambda good: good[: len(good) // 2], "truncated"),
    "without its end": (lambda good: good[:-30], "truncated"),
    "one byte": (lambda good: good[:1], "cannot be read"),
    "text": (lambda good: b"hello, world", "damaged"),
    "a header of safetensors": (lambda good: b"\xff" * 8 + b"{" + bytes(50), "header"),
    "a pickle": (lambda good: pickle.dumps({"a": 1}), "more than tensors"),
    "noise": (lambda good: bytes(range(256)) * 8, "cannot be read"),
}


@pytest.mark.parametrize(("change", "said"), BAD_BYTES.values(), ids=BAD_BYTES)
def test_damaged_files_of_weights_are_named(tmp_path, change, said):
    (tmp_path / "net.pt").write_bytes(change(saved(tmp_path)))
    with pytest.raises(ModelError, match=rf"net\.pt: cannot be read as weights .*{said}|{said}"):
        load_model(write_model(tmp_path, weights="net.pt"))


@pytest.mark.parametrize(
    "weights", ["a\0b", "x" * 5000, "folder", "loop", "loop/x", "."], ids=lambda text: text[:8]
)
def test_paths_that_lead_to_no_file_are_named(tmp_path, weights):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError, match=r"no such weights file|cannot be reached"):
        load_model(write_model(tmp_path, weights=weights))


def test_a_broken_torchvision_is_named(tmp_path, monkeypatch):
    """It raises RuntimeError where it was built for another PyTorch."""
    package = tmp_path / "broken" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    path = write_model(tmp_path, factory="torchvision.models:AlexNet", arguments={})
    with pytest.raises(ModelError, match="cannot be imported: operator nms does not exist"):
        load_model(path)


# ---------------------------------------------------------------- from the command line


def test_the_command_says_it_and_ends_with_1(tmp_path, evil_archive):
    mark = evil_archive.parent / "mark"
    mark.unlink(missing_ok=True)
    write_model(tmp_path, weights=str(evil_archive))
    outcome = seg3dcam("layers", "--model", tmp_path / "model.yaml")
    assert outcome.code == 1
    assert "--trust" in outcome.complaint
    assert not mark.exists()


def test_a_yaml_of_another_kind_is_a_config_error(tmp_path):
    (tmp_path / "model.yaml").write_text("factory: monai.networks.nets..unet:UNet\n")
    with pytest.raises(ConfigError, match=r"factory: "):
        load_model(tmp_path / "model.yaml")
