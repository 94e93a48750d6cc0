"""Pictures to review a CAM with, slice by slice, as radiologists look at scans.

    review = review_explanation(explanation, Look(window="lung"), case="case 7")
    save_slices("slices", review)

A `Review` holds what all pictures of a case share. `review_volumes` makes one from arrays.

save_slices     one PNG for each slice
save_montage    several slices in one PNG
save_planes     the three planes through the peak
save_profile    curves along the slices
save_cine       a film
save_thumbnail  a small picture of the slice through the peak
save_report     one HTML page with everything
save_features   the channels of a layer

`seg3dcam.review.pictures.map_2d.save_map` writes the map of a 2D network.
"""

from seg3dcam.review.look import WINDOWS, Look
from seg3dcam.review.pictures.cine import save_cine
from seg3dcam.review.pictures.features import save_features
from seg3dcam.review.pictures.montage import save_montage
from seg3dcam.review.pictures.planes import save_planes
from seg3dcam.review.pictures.profile import save_profile
from seg3dcam.review.pictures.slices import save_slices
from seg3dcam.review.pictures.thumbnail import save_thumbnail
from seg3dcam.review.plan import Review, review_explanation, review_volumes
from seg3dcam.review.report import Report, save_report

__all__ = [
    "WINDOWS",
    "Look",
    "Report",
    "Review",
    "review_explanation",
    "review_volumes",
    "save_cine",
    "save_features",
    "save_montage",
    "save_planes",
    "save_profile",
    "save_report",
    "save_slices",
    "save_thumbnail",
]
