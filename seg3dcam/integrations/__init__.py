"""CAMs in the middle of training and inference code.

EpochCams     chosen validation cases, every so many epochs, in a loop of your own
CamHandler    the same, attached to a MONAI or ignite engine (extra `ignite`)
CamCallback   the same, for Lightning (extra `lightning`)
CamInferer    a MONAI inferer that gives maps in place of logits
Camd          a MONAI dictionary transform for post-processing

In a plain loop one line does it, of a batch of plain tensors too:
`GradCAM(model, "decoder.2")(batch, 1).save("cam.nii.gz", affine=np.eye(4), item=0)`.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Name -> the module that it is in; loaded when it is asked for.
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
