"""Attributions of the input's voxels, computed by captum, behind the same call as a CAM.

They are what CAMs are compared with. The map has the name "input" and the input's resolution.
Through windows it explains the slope of the score at the prediction, sum of dS/dL . L: exact for
gradients, and for all where the score is linear in the logits. Needs `seg3dcam[captum]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seg3dcam.cams.base import BaseCAM, check_settings
from seg3dcam.engine.input_attributions import Comparator


class InputAttribution(BaseCAM):
    """Base of the attributions.

    Args:
        settings: those of `seg3dcam.engine.input_attributions.Comparator` that the method looks at.
    """

    method = "gradient"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings, for provenance."""
        return {name: getattr(self._function, name) for name in self.own_settings}

    def _configured(self, settings: Mapping[str, Any]) -> Comparator:
        check_settings(self, settings, self.own_settings)
        return Comparator(self.method, **settings)  # type: ignore[arg-type]


class Gradient(InputAttribution):
    """Gradient: how fast the score changes with each voxel.

    Formula: map (B, *S) = sum over channels of |dS/dx|.
    Paper: Simonyan et al. 2014, arXiv:1312.6034.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; noisy in deep networks.
    """

    method = "gradient"


class GradientXInput(InputAttribution):
    """Gradient x input: what each voxel contributes if the score were linear.

    Formula: map (B, *S) = sum over channels of x dS/dx.
    Paper: Shrikumar et al. 2017, arXiv:1605.01713.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; voxels of value 0 get nothing.
    """

    method = "gradient_x_input"


class SmoothGrad(InputAttribution):
    """SmoothGrad: the gradient averaged over noisy copies of the input.

    Formula: map (B, *S) = sum over channels of |mean over samples of dS/dx at x + noise|.
    Paper: Smilkov et al. 2017, arXiv:1706.03825.
    Cost: 1 forward for the prediction, then `samples` forward and backward.
    Class-specific: yes, with a target that is.
    Undefined: never; depends on the noise, a fraction of the input's range.
    """

    method = "smooth_grad"
    own_settings = ("samples", "noise", "batch")


class IntegratedGradients(InputAttribution):
    """Integrated gradients: the gradient along the way from a baseline to the input.

    Formula: map (B, *S) = sum over channels of (x - x0) mean over the way of dS/dx.
    Paper: Sundararajan et al. 2017, arXiv:1703.01365.
    Cost: 1 forward for the prediction, then `steps` forward and backward.
    Class-specific: yes, with a target that is.
    Undefined: never; sums to S(x) - S(x0), and means nothing without its baseline.
    """

    method = "integrated_gradients"
    own_settings = ("baseline", "steps", "batch")


class GuidedBackprop(InputAttribution):
    """Guided backpropagation: the gradient with negative parts cut at every ReLU.

    Formula: as the gradient, its backward pass through nn.ReLU cut at 0; summed over channels.
    Paper: Springenberg et al. 2015, arXiv:1412.6806.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: hardly: it reconstructs the image.
    Undefined: only nn.ReLU is changed: without any it is the gradient. A warning counts the other
        activations; functional ones, as F.relu, cannot be seen.
    """

    method = "guided_backprop"


class Occlusion(InputAttribution):
    """Occlusion: what the score loses when a block of voxels is hidden.

    Formula: map (u) = mean over blocks that hold u of S(x) - S(x with the block at the baseline).
    Paper: Zeiler & Fergus 2014, arXiv:1311.2901.
    Cost: 1 forward for the prediction, then 1 without a block and 1 for every block; blocks
        overlap by half.
    Class-specific: yes, with a target that is.
    Undefined: never; a block smaller than what the network looks for shows nothing.
    """

    method = "occlusion"
    own_settings = ("baseline", "block", "batch")


#: Key -> class.
ATTRIBUTIONS: dict[str, type[BaseCAM]] = {
    cam.method: cam
    for cam in (
        Gradient,
        GradientXInput,
        SmoothGrad,
        IntegratedGradients,
        GuidedBackprop,
        Occlusion,
    )
}
