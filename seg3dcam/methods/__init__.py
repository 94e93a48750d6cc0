"""CAM methods: functions of activations and gradients (B, C, *S) that return a map (B, *S).

`METHODS` lists them by key. A map is raw: signed, before ReLU, resizing and scaling.
"""

from __future__ import annotations

from seg3dcam.methods.pooled import PooledGradient

METHODS: dict[str, PooledGradient] = {
    "grad_cam": PooledGradient(block=None),
    "slice_grad_cam": PooledGradient(block="slice"),
    "hires_cam": PooledGradient(block=1),
    "xres_cam": PooledGradient(block=2),
}

__all__ = ["METHODS", "PooledGradient"]
