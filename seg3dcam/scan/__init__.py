"""A scan: voxels, where they lie in the patient, and a name."""

from seg3dcam.scan.loading import load_labels, load_scan
from seg3dcam.scan.scan import Scan, place_code

__all__ = ["Scan", "load_labels", "load_scan", "place_code"]
