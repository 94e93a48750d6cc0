"""A scan in, an explanation on the scan's own grid out.

`explain` goes the whole way: `placement` knows where the scan and the network's input lie to each
other, and `assembly` makes an `explanation.Explanation` of each result, with the `provenance` of
its maps. `findings` measures an explanation; `features` shows what the channels of a layer hold.

`certainty`, `uncertainty`, `reliability` and `calibration` are about the network's probabilities:
how sure it is, where it is unsure, whether that is true, and what makes it true.
"""
