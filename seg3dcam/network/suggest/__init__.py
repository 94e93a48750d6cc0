"""Suggest layers that are worth explaining: the bottleneck, and the levels after and before it.

If all layers of a network are as fine as its output, there is no bottleneck. Then the middle of its
depth is suggested instead, since the last layers only repeat the mask.

One pass with a random input (`probing`) shows the output of every module, its resolution, and
whether the network's output depends on it. Layers are chosen (`choice`) and described (`reasons`)
by what that pass and its autograd graph (`graph`) show.
"""

from seg3dcam.network.suggest.suggestion import Suggestion, auto_layer, suggest_layers

__all__ = ["Suggestion", "auto_layer", "suggest_layers"]
