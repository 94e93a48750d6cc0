"""The CAM methods by name: what each is, and its formula.

A method is one class here, with a key, a formula of `seg3dcam.methods` and a docstring; the tables
at the end of the file are made of the classes. The fields of the formula are the method's settings.

Every docstring states formula, paper, cost, whether the map depends on the class, and where it is
undefined; `seg3dcam.cams.method_cards` reads these entries, and `seg3dcam methods` prints them. In
the formulas A (B, C, *S) are activations, G = dS/dA gradients, S is the score, and u a voxel of the
layer's grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seg3dcam.cams.attributions import ATTRIBUTIONS
from seg3dcam.cams.base import BaseCAM, methods_by_key
from seg3dcam.methods.eigen import (
    KernelComponent,
    PrincipalComponent,
    ProductComponent,
    SizedComponent,
)
from seg3dcam.methods.full_grad import FullGradient
from seg3dcam.methods.perturbation import AblatedChannels, MaskedInputs
from seg3dcam.methods.pointwise import PositiveGradients, PositiveProducts
from seg3dcam.methods.pooled import BlockGradient, CorrectedGradient, PooledGradient
from seg3dcam.methods.statistics import (
    ActivationWeightedGradient,
    AlphaWeights,
    FarAboveMean,
    RandomWeights,
)


class GradCAM(BaseCAM):
    """Grad-CAM: one weight per channel. Coarse; may paint outside the mask.

    Formula: w (B, C) = mean of G (B, C, *S) over S; map (B, *S) = sum_k w_k A_k.
    Paper: Selvaraju et al. 2017, arXiv:1610.02391; for segmentation Vinogradova et al. 2020.
    Cost: 1 forward, 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; zero where the gradients of a channel cancel.
    """

    method, formula = "grad_cam", PooledGradient(block=None)


class SliceGradCAM(BaseCAM):
    """The original 3D recipe: one weight per channel and slice. In 2D it is Grad-CAM.

    Formula: w (B, C, Z, 1, 1) = mean of G over axes 3 and 4; map (B, *S) = sum_k w_kz A_k.
    Paper: none; the recipe of the articles that this library began with.
    Cost: 1 forward, 1 backward.
    Class-specific: no with its default target `MaskOutput`, which backpropagates the whole mask
        output; yes with a class.
    Undefined: never; zero where the gradients of a slice cancel.

    A slice is one of the layer's grid, not of the scan.
    """

    method, formula = "slice_grad_cam", PooledGradient(block="slice")


class HiResCAM(BaseCAM):
    """HiResCAM: the feature voxels that the score is made of. The best default here.

    Formula: map (B, *S) = sum_k G_k A_k, voxel by voxel.
    Paper: Draelos & Carin 2020, arXiv:2011.08891.
    Cost: 1 forward, 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never. For a linear head the map sums to the score without its bias.
    """

    method, formula = "hires_cam", PooledGradient(block=1)


class XResCAM(BaseCAM):
    """Seg-XRes-CAM: gradients pooled over blocks. Between HiResCAM and Grad-CAM.

    Formula: map (B, *S) = sum_k pool(G_k) A_k, each block's value repeated over its voxels.
    Paper: Hasany et al. 2023, CVPR workshops.
    Cost: 1 forward, 1 backward.
    Class-specific: yes, with a target that is.
    Undefined: never; the block must be stated with the map.

    Args:
        window: feature voxels of a block, one number or one for each axis; None is a whole axis.
            One voxel is HiResCAM, the whole grid Grad-CAM.
        mode: "mean" or "max" over a block.
    """

    method, formula = "xres_cam", BlockGradient()


class GradCAMPlusPlus(BaseCAM):
    """Grad-CAM++: positive gradients, each weighted by what the others leave to it.

    Formula: w (B, C) = sum_u g / (2 + S_k g), g = ReLU(G), S_k = sum_u A_k; map = sum_k w_k A_k.
    Paper: Chattopadhay et al. 2018, arXiv:1710.11063; its alpha with G^2 cancelled, no epsilon.
    Cost: 1 forward, 1 backward; with windows, activations that were not kept are computed twice
        more.
    Class-specific: yes, with a target that is.
    Undefined: for activations < 0 (a warning); the score's scale changes the map's shape.
    """

    method, formula = "grad_cam_plus_plus", AlphaWeights()


class XGradCAM(BaseCAM):
    """XGrad-CAM: gradients weighted by each voxel's part in its channel.

    Formula: w (B, C) = sum_u G A / S_k, S_k = sum_u A_k; map (B, *S) = sum_k w_k A_k.
    Paper: Fu et al. 2020, arXiv:2008.02312.
    Cost: 1 forward, 1 backward; with windows, activations that were not kept are computed twice
        more.
    Class-specific: yes, with a target that is.
    Undefined: where S_k is 0, as after InstanceNorm: weight 0 and status "degenerate".
    """

    method, formula = "xgrad_cam", ActivationWeightedGradient()


class LayerCAM(BaseCAM):
    """LayerCAM: only gradients that speak for the score. Hides the evidence against it.

    Formula: map (B, *S) = sum_k ReLU(G_k) A_k, voxel by voxel.
    Paper: Jiang et al. 2021, IEEE TIP.
    Cost: 1 forward, 1 backward.
    Class-specific: partly; it survives a randomised network better than it should.
    Undefined: never.
    """

    method, formula = "layer_cam", PositiveGradients()


class GradCAMElementWise(BaseCAM):
    """Element-wise Grad-CAM: only products that speak for the score. Covers too much.

    Formula: map (B, *S) = sum_k ReLU(G_k A_k), voxel by voxel.
    Paper: none; known from pytorch-grad-cam.
    Cost: 1 forward, 1 backward.
    Class-specific: partly; nothing can cancel.
    Undefined: never.
    """

    method, formula = "grad_cam_elementwise", PositiveProducts()


class EigenCAM(BaseCAM):
    """EigenCAM: what varies most in the activations, whatever the class.

    Formula: X (N, C) = A, centred; map = X v, v the first eigenvector of the C x C matrix X'X.
    Paper: Muhammad & Yeasin 2020, arXiv:2008.00299.
    Cost: 1 forward; with windows, activations that were not kept are computed twice more. Memory
        C x C, never N x N.
    Class-specific: no: the same map for every target.
    Undefined: the sign is a convention (the larger side is positive); constant activations.
    """

    method, formula = "eigen_cam", PrincipalComponent()


class EigenGradCAM(BaseCAM):
    """EigenGrad-CAM: what varies most in the products of gradients and activations.

    Formula: X (N, C) = G A, centred; map = X v, v the first eigenvector of X'X.
    Paper: none; known from pytorch-grad-cam.
    Cost: 1 forward, 1 backward; with windows, 2 forward and 2 backward.
    Class-specific: yes, with a target that is.
    Undefined: the sign is chosen to agree with HiResCAM.
    """

    method, formula = "eigen_grad_cam", ProductComponent()


class SegEigenCAM(BaseCAM):
    """Seg-Eigen-CAM: what varies most in the activations, weighted by how much they matter.

    Formula: X (N, C) = |G| A, centred; map = X v, v the first eigenvector of X'X.
    Paper: Chung & Ying 2025, Applied Sciences 15, 7562.
    Cost: 1 forward, 1 backward; with windows, 2 forward and 2 backward.
    Class-specific: in where, not in for or against: |G| has no sign.
    Undefined: the sign is a convention (the larger side is positive).
    """

    method, formula = "seg_eigen_cam", SizedComponent()


class KPCACAM(BaseCAM):
    """KPCA-CAM: EigenCAM with a kernel, for curved variation; whatever the class.

    Formula: K (N, N) = kernel of the centred activations, centred; map = first component of K.
    Paper: Karmani et al. 2024, arXiv:2410.00267.
    Cost: 1 forward; with windows, activations that were not kept are computed twice more. Memory
        N x N: refused above 16^3 feature voxels, those of all windows together.
    Class-specific: no: the same map for every target.
    Undefined: the sign is a convention (the larger side is positive); constant activations.

    Args:
        kernel: "sigmoid", tanh(gamma x.y + 1), or "rbf", exp(-gamma |x - y|^2).
        gamma: default 1 / C.
    """

    method, formula = "kpca_cam", KernelComponent()


class FEM(BaseCAM):
    """FEM: where channels are far above their own mean, whatever the class.

    Formula: map (B, *S) = sum_k mean(A_k) [A_k > mu_k + 2 sigma_k].
    Paper: Ahmed Asif Fuad et al. 2020, feature-based explanation method.
    Cost: 1 forward; with windows, activations that were not kept are computed twice more.
    Class-specific: no: the same map for every target.
    Undefined: never; zero where no voxel stands out.
    """

    method, formula = "fem", FarAboveMean()


class ScoreCAM(BaseCAM):
    """Score-CAM: channels weighted by the score of the input seen through them. No gradients.

    Formula: map = sum_k w_k A_k, w = softmax over k of s_k. s_k is the score of x multiplied by
        A_k, scaled to [0, 1] on the input's grid. If the target sums over a region, its mean is
        used.
    Paper: Wang et al. 2020, arXiv:1910.01279.
    Cost: 2 + C forward. With windows, only those that contain the region. Activations that were
        not kept are computed again for each batch of channels.
    Class-specific: yes, with a target that is.
    Undefined: never; weights are positive, so evidence against the class is not seen.

    Args:
        memory_gb: memory that a batch of masked inputs may take, together with everything that
            the network computes from it.
    """

    method, formula = "score_cam", MaskedInputs()


class AblationCAM(BaseCAM):
    """Ablation-CAM: channels weighted by what the score loses without them. No gradients.

    Formula: map = sum_k w_k A_k, w_k = (S - S_k) / |S|, S_k the score with channel k at zero.
    Paper: Desai & Ramaswamy 2020, WACV; with |S|, so that a negative score flips nothing.
    Cost: 2 + C forward. With windows, only those that contain the region.
    Class-specific: yes, with a target that is.
    Undefined: for a score of 0 the weights are not divided.

    Args:
        memory_gb: memory that a batch of ablated passes may take.
    """

    method, formula = "ablation_cam", AblatedChannels()


class ShapleyCAM(BaseCAM):
    """ShapleyCAM: Grad-CAM with the gradient corrected for curvature.

    Formula: w (B, C) = mean over u of G - HA / 2, H the Hessian of the score; map = sum_k w_k A_k.
    Paper: Cai 2025, arXiv:2501.06261.
    Cost: 1 forward, 5 backward; with windows, 2 forward.
    Class-specific: yes, with a target that is.
    Undefined: for networks that cannot be differentiated twice. Equals Grad-CAM where the score
        is piecewise linear, as a logit of a ReLU network is.
    """

    method, formula = "shapley_cam", CorrectedGradient(block=None)


class FullGrad(BaseCAM):
    """FullGrad: a score linear in the logits, split into contributions of the input and the biases.

    Formula: map = psi(x G_x) + sum over layers of psi(b_k G_k), on the input's own voxels.
    Paper: Srinivas & Fleuret 2019, arXiv:1905.00780.
    Cost: 2 forward, 1 backward, with the activations of all layers in memory, and two small passes
        for each axis; one more forward for a network with nn.Linear.
    Class-specific: yes, with a target that is.
    Undefined: if the score is not linear in the logits (as log-odds), its slope is decomposed
        instead. Incomplete with InstanceNorm, GroupNorm, LayerNorm, attention and smooth
        activations. A warning says so and gives both sums (for the latter only with "signed").

    It explains the input, under the name "input"; target layers are not asked for.

    Args:
        psi: "signed" keeps signs and sums, "paper" takes absolute values and scales every channel.
    """

    method, formula = "full_grad", FullGradient()


class RandomCAM(BaseCAM):
    """Random weights: the control. A map that does not beat it explains nothing.

    Formula: map (B, *S) = sum_k w_k A_k, w_k drawn evenly from -1 to 1.
    Paper: none.
    Cost: 1 forward; with windows, activations that were not kept are computed once more.
    Class-specific: no: the same map for every target.
    Undefined: never.

    Args:
        seed: of the drawing.
    """

    method, formula = "random", RandomWeights()


#: Method key -> class, of all methods in this file.
CAMS: dict[str, type[BaseCAM]] = methods_by_key(vars())

#: Method key -> formula, for activations and gradients of your own.
METHODS: dict[str, Callable[..., Any]] = {key: cam.formula for key, cam in CAMS.items()}  # type: ignore[misc]

#: Every method by its key, attributions of the input included.
ALL_METHODS: dict[str, type[BaseCAM]] = CAMS | ATTRIBUTIONS
