"""CAMs during training: in the right place, and the training does not notice."""

from __future__ import annotations

import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from scipy import ndimage
from torch import nn

from seg3dcam import GradCAM, HiResCAM
from seg3dcam.errors import (
    ConfigError,
    InputError,
    LayerError,
    OutputError,
    Seg3dcamWarning,
    TargetError,
)
from seg3dcam.integrations import CamHandler, EpochCams
from seg3dcam.integrations.epoch_cams import images_of
from seg3dcam.targets import ClassLogit

EXAMPLES = Path(__file__).parents[2] / "examples"
README = EXAMPLES.with_name("README.md")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard, MONAI, Lightning
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name))


def random_states() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# ---------------------------------------------------------------- MONAI


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The example's training with the handler: its folder, its losses, and the random states."""
    out = tmp_path_factory.mktemp("trained")
    losses = example("train_monai").train(out)
    return SimpleNamespace(out=out, losses=losses, states=random_states())


@pytest.mark.slow
def test_a_monai_training_is_bit_identical_with_the_handler(trained):
    assert len(trained.losses) == 12
    assert example("train_monai").train(None) == trained.losses
    assert random_states() == trained.states
    assert trained.losses[-1] < trained.losses[0]


@pytest.mark.slow
def test_a_monai_training_in_half_precision_is_bit_identical_too(tmp_path, monkeypatch):
    """MONAI's autocast is CUDA's: here it is the CPU's."""
    monkeypatch.setattr(torch, "autocast", on_cpu(torch.autocast))
    of = example("train_monai")
    losses, states = of.train(tmp_path, amp=True), random_states()
    assert of.train(None, amp=True) == losses
    assert random_states() == states
    assert len(losses) == 12
    assert losses[-1] < losses[0]


def on_cpu(autocast):
    def replaced(device, *args, **kwargs):
        return (
            autocast("cpu", dtype=torch.bfloat16)
            if device == "cuda"
            else autocast(device, *args, **kwargs)
        )

    return replaced


@pytest.mark.slow
def test_chosen_cases_of_chosen_epochs_are_written_in_place(trained, capsys, monkeypatch):
    of, out = example("train_monai"), trained.out
    monkeypatch.setitem(of.main.__globals__, "train", lambda _: trained.losses)
    of.main(out)
    written = sorted(str(f.relative_to(out)) for f in (out / "cams").rglob("*.*"))
    names = ("cam_ball_whole_volume.nii.gz", "cam_ball_whole_volume.png")
    assert written == [
        f"cams/epoch_{epoch:04d}/case_{case}/{name}"
        for epoch in (2, 4)
        for case in (0, 2)
        for name in names
    ]
    assert all(str(out / file) in capsys.readouterr().out for file in written[1:2])
    case = of.make_case(90)
    ball = case["label"][0].numpy() > 0
    image = nib.load(out / "cams/epoch_0004/case_0" / names[0])
    assert np.array_equal(image.affine, of.AFFINE)
    heat = image.get_fdata()
    near = ndimage.binary_dilation(ball, iterations=4)  # a stride of the bottleneck
    assert near[np.unravel_index(heat.argmax(), heat.shape)]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"case_{n}/cam_ball_whole_volume" for n in (0, 2)]
    assert [e.step for e in events.Images("case_0/cam_ball_whole_volume")] == [2, 4]


class Bright(nn.Module):
    """Class 1 is what is bright; batch statistics would betray a forward pass in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(1)
        self.conv = nn.Conv3d(1, 2, 1)
        nn.init.ones_(self.conv.weight)

    def forward(self, x):
        return self.conv(torch.relu(self.norm(x)))


def bright_cases(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": MetaTensor(torch.rand(1, 6, 7, 8, generator=generator) + n), "label": 0}
        for n in range(count)
    ]


def evaluator_of(network: nn.Module, **settings) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(bright_cases(3)), batch_size=2),
        network=network,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("decollate", [True, False])
def test_decollated_or_not_the_networks_input_is_explained(decollate, tmp_path):
    def spoil(data):  # what comes after the network does not count
        return {**data, "image": data["image"] * 0} if isinstance(data, dict) else data

    network = Bright().train()
    evaluator = evaluator_of(network, decollate=decollate, postprocessing=spoil)
    target = ClassLogit(1, "volume")
    handler = CamHandler(network, "norm", out=tmp_path, class_idx=target, cases=[2])
    handler.attach(evaluator)
    evaluator.run()
    assert network.training
    assert int(network.norm.num_batches_tracked) == 0
    (file,) = tmp_path.rglob("*.nii.gz")
    assert file.parent.name == "case_2"
    x = bright_cases(3)[2]["image"]
    cam = nib.load(file).get_fdata()
    assert np.corrcoef(cam.ravel(), x.numpy().ravel())[0, 1] > 0.999


@pytest.mark.slow
def test_an_ignite_engine_learns_the_epoch_of_the_training(tmp_path):
    network, trainer_epoch = Bright(), [0]
    evaluator = Engine(lambda engine, batch: network(batch[0]))
    CamHandler(
        network,
        "norm",
        out=tmp_path,
        class_idx=[ClassLogit(0, "volume"), ClassLogit(1, "volume")],
        interval=3,
        global_epoch_transform=lambda _: trainer_epoch[0],
    ).attach(evaluator)
    batches = [(torch.rand(2, 1, 6, 7, 8), None)]
    for trainer_epoch[0] in range(1, 8):
        evaluator.run(batches)
    folders = sorted(f.name for f in tmp_path.iterdir())
    assert folders == ["epoch_0003", "epoch_0006"]
    assert len(list(tmp_path.rglob("*.png"))) == 4
    assert Events.ITERATION_COMPLETED  # the event that batches are taken at


@pytest.mark.slow
def test_pictures_become_artifacts(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    network = Bright()
    evaluator = evaluator_of(network)
    CamHandler(
        network, "norm", out=tmp_path / "o", class_idx=ClassLogit(1, "volume"), mlflow=True
    ).attach(evaluator)
    with mlflow.start_run():
        evaluator.run(5)
    (picture,) = (tmp_path / "runs").rglob("*.png")
    assert picture.parts[-4:-1] == ("cams", "epoch_0005", "case_0")


# ---------------------------------------------------------------- what may pass, and what not


@pytest.mark.slow
def test_what_may_pass_does_not_stop_a_training(tmp_path, monkeypatch):
    network = Bright()
    nn.init.zeros_(network.conv.weight)
    network.conv.bias.data = torch.tensor([1.0, 0.0])
    cams = EpochCams(tmp_path, targets=[1], target_layers="norm")
    image = bright_cases(1)[0]["image"]
    with pytest.warns(Seg3dcamWarning, match="no CAM of case 0 in epoch 1: .*voxel"):
        assert cams.write(network, image, epoch=1, case=0) == []
    with pytest.warns(Seg3dcamWarning, match="no CAM of case 0 in epoch 2"):
        assert cams.write(network, image * 0, epoch=2, case=0) == []

    def full(*args, **kwargs):
        raise OutputError("no space left on device")

    monkeypatch.setattr("seg3dcam.explaining.explanation.Explanation.save", full)
    cams = EpochCams(tmp_path, targets=[ClassLogit(1, "volume")], target_layers="norm")
    with pytest.warns(Seg3dcamWarning, match="no space left"):
        assert cams.write(Bright(), image, epoch=3, case=0) == []
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_wrong_settings_are_errors_at_once(tmp_path):
    network = Bright()
    for settings, message in (
        ({"method": "grad_camm"}, "method 'grad_camm': legal are"),
        ({"interval": 0}, "interval 0: a whole number"),
        ({"cases": [-1]}, "numbers of validation cases"),
        ({"summary_writer": 3}, "summary_writer int has no add_image"),
    ):
        with pytest.raises(ConfigError, match=message):
            CamHandler(network, out=tmp_path, **settings)
    for settings, error in (
        ({"target_layers": "nrm"}, LayerError),
        ({"class_idx": 7, "target_layers": "norm"}, TargetError),
        ({"class_idx": "b", "class_names": ["a", "c"], "target_layers": "norm"}, TargetError),
    ):
        evaluator = evaluator_of(network)
        CamHandler(network, out=tmp_path, **settings).attach(evaluator)
        evaluator.logger.setLevel(100)
        with pytest.raises(error):
            evaluator.run()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        CamHandler(network, out=tmp_path / "file" / "x")


def test_images_are_found_in_every_usual_batch(tmp_path):
    x = torch.rand(2, 1, 4, 4, 4)
    items = [{"image": x[0]}, {"image": x[1]}]
    for batch in (x, {"image": x, "label": 0}, items, (x, 0), [x, 0], [x[0], x[1]], (items, 0)):
        found = images_of(batch)
        assert torch.equal(torch.stack(found), x)
    with pytest.raises(InputError, match=r"type dict.*batch_transform="):
        images_of({"scan": x})
    with pytest.raises(InputError, match=r"without a batch; got \(1, 4, 4\)"):
        EpochCams(tmp_path).write(Bright(), torch.rand(1, 4, 4), epoch=1, case=0)
    with pytest.raises(InputError, match=r"got \(2, 1, 4, 4, 4\): give batch\[0\]"):
        EpochCams(tmp_path).write(Bright(), torch.rand(2, 1, 4, 4, 4), epoch=1, case=0)


@pytest.mark.parametrize("kind", ["tensor", "MetaTensor"])
def test_the_readmes_lines_for_a_loop_of_your_own_work_on_a_batch(kind, tmp_path, monkeypatch):
    """Of plain tensors as a loader gives them, and of what MONAI gives."""
    lines = re.findall(r"`((?:GradCAM|EpochCams)\(.*\))`", README.read_text(encoding="utf-8"))
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    network = nn.Module()
    network.decoder = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.Conv3d(2, 2, 1))
    network.forward = lambda x: network.decoder(x)
    nn.init.ones_(network.decoder[0].weight)
    with torch.no_grad():
        network.decoder[2].weight.copy_(
            torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 2, 1, 1, 1)
        )
        network.decoder[2].bias.zero_()
    batch = torch.rand(2, 1, 6, 7, 8) + 1
    batch = batch if kind == "tensor" else MetaTensor(batch)
    names = {"GradCAM": GradCAM, "EpochCams": EpochCams, "torch": torch}
    for line in lines:
        eval(line, names | {"model": network, "network": network, "batch": batch})
    assert nib.load("cam.nii.gz").shape == (6, 7, 8)
    assert list((tmp_path / "cams" / "epoch_0005" / "case_0").glob("*.nii.gz"))


# ---------------------------------------------------------------- Lightning


@pytest.mark.slow
def test_a_lightning_training_is_bit_identical_with_the_callback(lightning, tmp_path, capsys):
    of = example("train_lightning")
    one, states = of.train(tmp_path / "with"), random_states()
    other = of.train(tmp_path / "without", explain=False)
    assert random_states() == states
    assert one.losses == other.losses
    assert one.losses[-1] < one.losses[0]
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    written = sorted(str(f.relative_to(tmp_path)) for f in (tmp_path / "with").rglob("*.png"))
    # 5: what validate() shows after the last epoch; none of the sanity check, which is before 1.
    assert [file.split("/")[2] for file in written] == ["epoch_0002", "epoch_0004"]
    events = list((tmp_path / "with").rglob("events*"))
    assert events


@pytest.mark.slow
def test_validation_in_inference_mode_is_explained(lightning, tmp_path):
    of = example("train_lightning")
    from seg3dcam.integrations import CamCallback

    callback = CamCallback(
        out=tmp_path, target_layers="net.2", class_idx=ClassLogit(1, "volume"), network=None
    )

    class Whole(of.Segmenter):
        def forward(self, x):
            assert not torch.is_inference_mode_enabled() or not x.requires_grad
            return self.net(x)

    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data = torch.utils.data.DataLoader(of.make_cases(2, seed=9), batch_size=2)
    module = Whole()
    trainer.validate(module, data, verbose=False)
    (file,) = tmp_path.rglob("*.nii.gz")
    scans, _ = of.make_cases(2, seed=9).tensors
    expected = HiResCAM(module.net, "2")(scans[:1], ClassLogit(1, "volume")).volume()[0]
    assert np.abs(nib.load(file).get_fdata() - expected.numpy()).max() < 1e-5
    wrong = CamCallback(out=tmp_path, network="nett")
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[wrong],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(ConfigError, match=r"network 'nett' is no network in Whole; it has net"):
        trainer.validate(module, data, verbose=False)


# ---------------------------------------------------------------- a plain loop


def test_a_plain_training_is_bit_identical_with_the_line(tmp_path):
    of = example("train_plain")
    network, losses = of.train(tmp_path)
    states = random_states()
    other, without = of.train(None)
    assert random_states() == states
    assert losses == without
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["cam_2.nii.gz", "cam_4.nii.gz"]
    assert np.array_equal(nib.load(tmp_path / files[0]).affine, np.diag([1.5, 1.5, 2, 1]))


# ---------------------------------------------------------------- the room


@pytest.mark.slow
def test_the_room_loads_nothing_optional():
    code = (
        "import sys, seg3dcam.integrations as i; i.EpochCams; i.CamInferer; i.Camd;"
        "print([m for m in ('lightning', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
