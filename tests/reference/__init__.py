"""The formulas written out slowly: Python loops over channels and voxels, in float64.

Nothing here imports seg3dcam or shares code with it. Where the two agree, both would have to be
wrong in the same way.
"""
