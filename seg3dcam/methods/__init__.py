"""The formulas of all methods, one file for each family.

Most are functions of activations and gradients (B, C, *S) that give a map (B, *S). A map is raw:
signed, before ReLU, resizing and scaling. Score-CAM and Ablation-CAM take a function `rescore` in
place of gradients, ShapleyCAM the curvature as a third argument, FullGrad what flows through every
layer, and attributions of the input the network with its score.

`seg3dcam.cams.catalogue` gives every formula its name and its description.
"""
