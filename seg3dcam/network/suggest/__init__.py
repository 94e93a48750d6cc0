"""Which layers are worth explaining: the bottleneck and the levels of the decoder.

A network without a bottleneck, whose layers are all as fine as its output, has the middle of its
depth instead, since the last of its layers only give the mask again.

One pass with a random input (`probing`) shows what every module gives, at which resolution, and
whether the output depends on it. Layers are chosen (`choice`) and described (`reasons`) by what
that pass and its autograd graph (`graph`) show.
"""

from seg3dcam.network.suggest.suggestion import Suggestion, auto_layer, suggest_layers

__all__ = ["Suggestion", "auto_layer", "suggest_layers"]
