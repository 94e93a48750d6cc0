"""The scores and regions that have a name, as jobs and the command line ask for them.

A line holds all that is known of one: what it is called, what it is made of, and what it needs.
Classes stand here by their names in `seg3dcam.targets`, so that nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedScore:
    """A score that has a name.

    Attributes:
        type_name: its class in `seg3dcam.targets`.
        of_class: the score of one class, else of the whole output.
        needs_named_class: the class has to be named, else every predicted class is explained.
        needs_other_class: it compares with another class.
        needs_truth: it compares with a truth.
        over_region: it is summed over a region, which may be chosen.
        default_region: the region that is meant where none is chosen.
    """

    type_name: str
    of_class: bool = True
    needs_named_class: bool = True
    needs_other_class: bool = False
    needs_truth: bool = False
    over_region: bool = True
    default_region: str = "predicted"


@dataclass(frozen=True)
class NamedRegion:
    """A region that has a name.

    Attributes:
        type_name: its class in `seg3dcam.targets`; "" where targets take the region by its name.
        of_class: it is about one class, else any output has it.
        needs_truth: it is made of a truth.
        is_family: it stands for several targets, one for each of its parts.
        words: what it is, where the name does not say it.
    """

    type_name: str = ""
    of_class: bool = True
    needs_truth: bool = False
    is_family: bool = False
    words: str = ""


#: Score -> its target; the first is the default.
SCORES = {
    "log_odds": NamedScore("ClassLogOdds", needs_named_class=False),
    "logit": NamedScore("ClassLogit"),
    "probability": NamedScore("ClassProbability"),
    "contrast": NamedScore("Contrast", needs_other_class=True),
    "finer": NamedScore("Finer"),
    "soft_dice": NamedScore("SoftDice", needs_truth=True, over_region=False),
    "mask_output": NamedScore(
        "MaskOutput", of_class=False, needs_named_class=False, default_region="volume"
    ),
}

#: Region -> how it is made; the first is the default.
REGIONS = {
    "predicted": NamedRegion(of_class=False),
    "volume": NamedRegion(of_class=False),
    "boundary": NamedRegion("Boundary"),
    "components": NamedRegion("EveryComponent", is_family=True, words="each lesion by itself"),
    "false_negatives": NamedRegion("FalseNegatives", needs_truth=True),
    "false_positives": NamedRegion("FalsePositives", needs_truth=True),
    "true_positives": NamedRegion("TruePositives", needs_truth=True),
}
