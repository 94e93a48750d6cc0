"""Attributions of the input's voxels, computed by captum, behind the same call as a CAM.

They are what CAMs are compared with. The map has the name "input" and the input's resolution.
Through windows it explains the slope of the score at the prediction, the sum of dS/dL . L. That is
exact for gradients, and for every attribution where the score is linear in the logits.

Captum is needed: pip install 'seg3dcam[captum]'.
"""

from __future__ import annotations

from seg3dcam.cams.base import BaseCAM, methods_by_key
from seg3dcam.methods.input_attributions import (
    GradientTimesInput,
    GuidedGradient,
    HiddenBlocks,
    NoisyGradients,
    PathGradients,
    PlainGradient,
)


class Gradient(BaseCAM):
    """Gradient: how fast the score changes with each voxel.

    Formula: map (B, *S) = sum over channels of |dS/dx|.
    Paper: Simonyan et al. 2014, arXiv:1312.6034.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; noisy in deep networks.
    """

    method, formula = "gradient", PlainGradient()


class GradientXInput(BaseCAM):
    """Gradient x input: what each voxel contributes if the score were linear.

    Formula: map (B, *S) = sum over channels of x dS/dx.
    Paper: Shrikumar et al. 2017, arXiv:1605.01713.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; voxels of value 0 get nothing.
    """

    method, formula = "gradient_x_input", GradientTimesInput()


class SmoothGrad(BaseCAM):
    """SmoothGrad: the gradient averaged over noisy copies of the input.

    Formula: map (B, *S) = sum over channels of |mean over samples of dS/dx at x + noise|.
    Paper: Smilkov et al. 2017, arXiv:1706.03825.
    Cost: 1 forward for the prediction, then `samples` forward and backward.
    Class-specific: yes, with a target that is.
    Undefined: never; depends on the noise, a fraction of the input's range.

    Args:
        samples: how many noisy copies.
        noise: the standard deviation of the noise, as a fraction of the input's range.
        batch: how many copies go through the network at once.
    """

    method, formula = "smooth_grad", NoisyGradients()


class IntegratedGradients(BaseCAM):
    """Integrated gradients: the gradient along the way from a baseline to the input.

    Formula: map (B, *S) = sum over channels of (x - x0) mean over the way of dS/dx.
    Paper: Sundararajan et al. 2017, arXiv:1703.01365.
    Cost: 1 forward for the prediction, then `steps` forward and backward.
    Class-specific: yes, with a target that is.
    Undefined: never; sums to S(x) - S(x0), and means nothing without its baseline.

    Args:
        baseline: the value of a voxel that says nothing.
        steps: how many points there are on the way.
        batch: how many points go through the network at once.
    """

    method, formula = "integrated_gradients", PathGradients()


class GuidedBackprop(BaseCAM):
    """Guided backpropagation: the gradient with negative parts cut at every ReLU.

    Formula: as the gradient, its backward pass through nn.ReLU cut at 0; summed over channels.
    Paper: Springenberg et al. 2015, arXiv:1412.6806.
    Cost: 1 forward for the prediction, then 1 forward and 1 backward.
    Class-specific: hardly: it reconstructs the image.
    Undefined: only nn.ReLU is changed: without any it is the gradient. A warning counts the other
        activations; functional ones, as F.relu, cannot be seen.
    """

    method, formula = "guided_backprop", GuidedGradient()


class Occlusion(BaseCAM):
    """Occlusion: what the score loses when a block of voxels is hidden.

    Formula: map (u) = mean over blocks that hold u of S(x) - S(x with the block at the baseline).
    Paper: Zeiler & Fergus 2014, arXiv:1311.2901.
    Cost: 1 forward for the prediction, then 1 without a block and 1 for every block; blocks
        overlap by half.
    Class-specific: yes, with a target that is.
    Undefined: never; a block smaller than what the network looks for shows nothing.

    Args:
        baseline: the value of a voxel that says nothing.
        block: input voxels that are hidden together, one number or one for each axis. A block must
            be larger than what the network looks for.
        batch: how many changed inputs go through the network at once.
    """

    method, formula = "occlusion", HiddenBlocks()


#: Method key -> class, of all methods in this file.
ATTRIBUTIONS: dict[str, type[BaseCAM]] = methods_by_key(vars())
