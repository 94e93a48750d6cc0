"""CAMs of tensors: `BaseCAM`, the methods by name, and what they return.

base          `BaseCAM`, what all methods share; read this first
catalogue     the CAM methods, each with its formula and description, and the tables of all methods
method_cards  the docstrings of the methods by their entries, read without importing PyTorch
attributions  captum's attributions of the input, behind the same call
calls         a call: several targets and methods, which share their passes
steps         its steps: predict, evaluate the targets, check the gradients, make the maps
tables        the maps of all targets and methods of a call
notices       what a call warns of, in words
result        what a call returns
feature_maps  what the channels of a layer hold
"""
