"""Is a map true? Faithfulness, localisation, sanity and complexity, each beside its controls."""

from typing import TYPE_CHECKING

from seg3dcam.importing import lazy

if TYPE_CHECKING:
    from seg3dcam.evaluate.blocks import Curve
    from seg3dcam.evaluate.comparing import compare
    from seg3dcam.evaluate.comparison import Candidate, Comparison
    from seg3dcam.evaluate.confidence import (
        AverageDrop,
        Confidence,
        average_drop,
        kept_confidence,
    )
    from seg3dcam.evaluate.context import ContextEvidence, context_evidence
    from seg3dcam.evaluate.faithfulness import context_deletion, deletion, insertion
    from seg3dcam.evaluate.places import Figure, Localisation, localisation, mass_inside
    from seg3dcam.evaluate.quantus import quantus_measures
    from seg3dcam.evaluate.rerun import Rerun
    from seg3dcam.evaluate.sanity import Check, class_sensitivity, randomisation, stability
    from seg3dcam.evaluate.segments import supervoxels
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "AverageDrop",
    "Candidate",
    "Check",
    "Comparison",
    "Confidence",
    "ContextEvidence",
    "Curve",
    "Figure",
    "Localisation",
    "Rerun",
    "average_drop",
    "class_sensitivity",
    "compare",
    "context_deletion",
    "context_evidence",
    "deletion",
    "insertion",
    "kept_confidence",
    "localisation",
    "mass_inside",
    "quantus_measures",
    "randomisation",
    "stability",
    "supervoxels",
]
