"""Run a network inside of a `with`, and take its activations and gradients.

    with capturing(network, layers) as capture:
        logits = capture.forward(x)
        gradients = capture.gradients(logits, seed)

A forward hook on each target layer replaces the layer's output by a clone of a detached leaf, and
the gradient comes from `torch.autograd.grad` with respect to that leaf. So nothing that lies
before the layer enters the graph, no parameter receives a gradient, and an in-place operation after
the layer changes only the clone. This works with in-place activations, frozen parameters,
non-reentrant checkpointing, DataParallel, and for callers in `no_grad` or `inference_mode`.

The network itself continues with tensors in the layout of its layers. The tensors that a `Capture`
returns have their channels first, (B, C, *s); see `seg3dcam.network.layouts`.
"""

from seg3dcam.network.capture.capture import Capture
from seg3dcam.network.capture.context import capturing
from seg3dcam.network.capture.retry import FoundLateError, begun_again

__all__ = ["Capture", "FoundLateError", "begun_again", "capturing"]
