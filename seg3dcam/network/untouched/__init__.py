"""Leave a network and its process as they were: everything that changes is put back.

All states are noted before anything changes. Each is put back separately, so that a failure does
not affect the others. A network that could not be put back is refused before it is touched.
"""

from seg3dcam.network.untouched.context import check_explainable, untouched

__all__ = ["check_explainable", "untouched"]
