"""Measure where the voxels of a layer lie in the network's input."""
