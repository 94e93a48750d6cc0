"""The small U-Net of the benchmark, and its training from fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNet
from scipy import ndimage
from torch import nn

from .deletions import with_deletions

if TYPE_CHECKING:
    from .problems import Problem

BATCH = 4


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        steps: how many there are; None for those of the problem.
        rate: the largest learning rate.
        of_objects: weight of an object's voxels in the cross-entropy. Objects are few voxels, so at
            first they have to count more, and are drawn too large.
        dice: whether soft Dice is part of the loss.
        with_reach: whether the background within reach of a cue is a class of its own.
    """

    steps: int | None
    rate: float
    of_objects: float
    dice: bool = False
    with_reach: bool = False


PHASES = (
    Phase(None, 4e-3, 20, with_reach=True),
    Phase(160, 2e-3, 1, dice=True),
    Phase(60, 1e-3, 1),
)

#: Weight of the background within reach of a cue.
IN_REACH = 5.0

#: How far from the cue the background is of that class, in voxels: at the beginning and at the end.
NEAR, FAR = 3.0, 60.0

#: Seeds of the training volumes begin here: smaller ones are free for evaluation.
FIRST_SEED = 1_000_000

#: The layers that are scored, from the input to the head.
LAYERS = {
    "conv_0": "encoder, full resolution",
    "down_1": "encoder, 1/2",
    "down_2": "encoder, 1/4",
    "down_3": "encoder, 1/8",
    "down_4": "bottleneck, 1/16",
    "upcat_4": "decoder, 1/8",
    "upcat_3": "decoder, 1/4",
    "upcat_2": "decoder, 1/2",
    "upcat_1": "decoder, full resolution",
}


def build(classes: int) -> nn.Module:
    """Return MONAI's BasicUNet with few channels, ReLU and BatchNorm.

    InstanceNorm would tell every voxel of a channel about all others, so that evidence had no
    place; BatchNorm in eval mode does not.
    """
    return BasicUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=classes,
        features=(4, 8, 16, 16, 16, 4),
        act=("relu", {"inplace": False}),
        norm="batch",
    )


def train(problem: Problem, *, seed: int = 0) -> nn.Module:
    """Return a network that is trained on volumes of a problem, in eval mode.

    What decides the class lies far from the object, and a network that starts from nothing takes
    long to find it. So at first the background within reach of a cue is a class of its own: the cue
    and its surroundings to begin with, and farther and farther away. The output of this class is
    then taken away, and the training goes on without it.
    """
    torch.manual_seed(seed)
    network = build(len(problem.classes) + 1)
    phases = (PHASES[0], *PHASES[1:] * problem.repeats)
    for number, phase in enumerate(phases):
        if number == 1:
            head = network.final_conv
            head.weight, head.bias = nn.Parameter(head.weight[:-1]), nn.Parameter(head.bias[:-1])
            head.out_channels -= 1
        fit(network, problem, phase, seed=10 * seed + number)
    return network.to(memory_format=torch.contiguous_format).eval()


def fit(network: nn.Module, problem: Problem, phase: Phase, *, seed: int) -> None:
    """Train a network through one phase, in place."""
    # Of few channels the gradients are three times faster in this layout on a CPU.
    layout = torch.channels_last_3d
    network.to(memory_format=layout).train()
    weights = (
        [1.0] + [phase.of_objects] * (len(problem.classes) - 1) + [IN_REACH] * phase.with_reach
    )
    cross_entropy = nn.CrossEntropyLoss(torch.tensor(weights))
    dice = DiceLoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)
    steps = problem.first_steps if phase.steps is None else phase.steps
    optimiser = torch.optim.AdamW(network.parameters(), lr=phase.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, phase.rate, total_steps=steps, pct_start=0.1
    )
    for step, (x, labels) in enumerate(_batches(problem, steps, seed, phase.with_reach), 1):
        logits = network(x.contiguous(memory_format=layout))
        loss = cross_entropy(logits, labels[:, 0])
        if phase.dice:
            loss = loss + dice(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            objects = (labels > 0) & (labels < len(problem.classes))
            right = (logits.argmax(1, keepdim=True) == labels)[objects].float().mean()
            print(
                f"  step {step} of {steps}, loss {loss.item():.3f}, objects {right:.2f} right",
                flush=True,
            )


def half(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the network's state in float16, which halves the file."""
    return {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


def _batches(
    problem: Problem, steps: int, seed: int, with_reach: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs (B, 1, *S) and labels (B, 1, *S), the same ones for the same seed."""
    for step in range(steps):
        random = np.random.default_rng(FIRST_SEED * (1 + seed) + step)
        images, all_labels = [], []
        for _ in range(BATCH):
            present = bool(random.random() < problem.at_chance)
            scene = problem.draw(random, present)
            if problem.deletions and random.random() < 0.5:
                scene = with_deletions(random, scene, problem.deletions)
            labels = scene.labels
            if with_reach:
                # Linearly, and to all of the volume in the last third.
                limit = NEAR + (FAR - NEAR) * min(1, step / (0.67 * steps))
                near = ndimage.distance_transform_edt(~scene.evidence) <= limit
                labels = np.where((labels == 0) & scene.reach & near, len(problem.classes), labels)
            images.append(scene.image)
            all_labels.append(labels)
        yield (
            torch.from_numpy(np.stack(images))[:, None].float(),
            torch.from_numpy(np.stack(all_labels))[:, None],
        )
