"""CAM methods by key: functions of activations and gradients (B, C, *S) that give a map (B, *S).

A map is raw: signed, before ReLU, resizing and scaling. Score-CAM and Ablation-CAM take a function
`rescore` in place of gradients, ShapleyCAM the curvature as a third argument, and FullGrad what
flows through every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seg3dcam.methods.base import Method
from seg3dcam.methods.eigen import KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM
from seg3dcam.methods.full_grad import FullGradient
from seg3dcam.methods.perturbation import AblationCAM, Perturbation, ScoreCAM
from seg3dcam.methods.pointwise import ElementWise, LayerCAM
from seg3dcam.methods.pooled import PooledGradient, ShapleyCAM
from seg3dcam.methods.statistics import FEM, GradCAMPlusPlus, RandomWeights, XGradCAM

METHODS: dict[str, Callable[..., Any]] = {
    "grad_cam": PooledGradient(block=None),
    "slice_grad_cam": PooledGradient(block="slice"),
    "hires_cam": PooledGradient(block=1),
    "xres_cam": PooledGradient(block=2),
    "grad_cam_plus_plus": GradCAMPlusPlus(),
    "xgrad_cam": XGradCAM(),
    "layer_cam": LayerCAM(),
    "grad_cam_elementwise": ElementWise(),
    "eigen_cam": EigenCAM(),
    "eigen_grad_cam": EigenGradCAM(),
    "seg_eigen_cam": SegEigenCAM(),
    "kpca_cam": KPCACAM(),
    "fem": FEM(),
    "score_cam": ScoreCAM(),
    "ablation_cam": AblationCAM(),
    "shapley_cam": ShapleyCAM(),
    "full_grad": FullGradient(),
    "random": RandomWeights(),
}

__all__ = ["METHODS", "FullGradient", "Method", "Perturbation", "PooledGradient"]
