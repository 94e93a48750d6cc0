"""How maps come about: from an input, targets and formulas to the raw maps of layers.

run                 which formula goes which way, and in what order
passes              windows through the network: the prediction, and activations again
gradients, seed     gradients of scores at the layers
maps                formulas of activations and gradients, step by step over windows
curvature           gradients corrected by the Hessian (ShapleyCAM)
rescoring           Score-CAM and Ablation-CAM
full_gradients      FullGrad
input_attributions  captum's attributions of the input
layer_map           what comes out: a raw, signed map and its status
evidence            what speaks for the target and against it in raw maps
scales              the scales at which maps are shown
gradient_check      whether the gradient follows the score
memory              what happens where memory does not suffice
"""
