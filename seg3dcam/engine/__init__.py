"""How maps come about: from an input, targets and methods to the raw maps of layers.

run             which method goes which way, and in what order
passes          windows through the network: predict, take gradients, look at activations
mapping         methods of activations and gradients, step by step over windows
curvature       gradients corrected by the Hessian (ShapleyCAM)
rescoring       Score-CAM and Ablation-CAM
full_gradients  FullGrad
comparators     captum's attributions of the input
"""
