"""CAMs inside of code for training and inference.

EpochCams     explains chosen validation cases, every few epochs, in a training loop of your own
CamHandler    does the same, attached to a MONAI or ignite engine (extra `ignite`)
CamCallback   does the same for Lightning (extra `lightning`)
CamInferer    is a MONAI inferer that gives maps instead of logits
Camd          is a MONAI dictionary transform for post-processing

In a plain loop one line is enough, also for a batch of plain tensors:
`GradCAM(model, "decoder.2")(batch, 1).save("cam.nii.gz", affine=np.eye(4), item=0)`.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Name -> its module, which is imported when the name is first used.
_PLACES = {
    "CamCallback": "lightning_callback",
    "CamHandler": "ignite_handler",
    "CamInferer": "inferer",
    "Camd": "transform",
    "EpochCams": "epoch_cams",
}

__all__ = ["CamCallback", "CamHandler", "CamInferer", "Camd", "EpochCams"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
