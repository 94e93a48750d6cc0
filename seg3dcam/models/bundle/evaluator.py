"""What the evaluator of a MONAI bundle and its dataset use: inferer, transforms and data loader.

What counts are the entries to which the evaluator's arguments refer. An entry that merely has the
name `inferer` or `preprocessing` may be another one.
"""

from __future__ import annotations

from typing import Any

from monai.engines.utils import default_prepare_batch
from monai.inferers import SimpleInferer

from seg3dcam.errors import ModelError
from seg3dcam.models.bundle.config import IN_PYTHON, Bundle

#: Data loaders and datasets that pass each scan on as the transforms made it.
_LOADERS = ("DataLoader", "ThreadDataLoader")
_DATASETS = (
    *("Dataset", "CacheDataset", "PersistentDataset", "SmartCacheDataset", "LMDBDataset"),
    "CacheNTransDataset",
)

#: Functions that join scans into a batch and leave a single scan as it is.
_COLLATE = ("list_data_collate", "pad_list_data_collate")

#: Arguments of an evaluator that may change its prediction -> the values that change nothing.
_USUAL: dict[str, tuple[Any, ...]] = {
    "mode": (None, "eval"),
    "prepare_batch": (None, default_prepare_batch),
    "iteration_update": (None,),
    "decollate": (None, True),
    "to_kwargs": (None, {}),
}


def check_evaluator(bundle: Bundle) -> None:
    """Raise ModelError for an evaluator that does more than run one network by its inferer."""
    evaluator = bundle.evaluator()
    if evaluator is None:
        return
    target = evaluator["_target_"]
    if target not in ("SupervisedEvaluator", "monai.engines.SupervisedEvaluator"):
        raise ModelError(
            f"{bundle.place}: evaluator is {target}; legal is SupervisedEvaluator, which runs one "
            f"network. Explain the network {IN_PYTHON}"
        )
    for argument, usual in _USUAL.items():
        identity = bundle.used(argument)
        if identity is None:
            continue
        found = bundle.parsed(identity)
        if getattr(found, "value", found) not in usual:
            raise ModelError(
                f"{bundle.place}: evaluator#{argument} is {bundle.get(identity)!r}, by which "
                f"the evaluator predicts in another way than is explained. Set it to null (--set "
                f"evaluator#{argument}=null), or explain the network {IN_PYTHON}"
            )


def inferer(bundle: Bundle) -> Any:
    """Return the inferer by which the evaluator runs the network."""
    identity = bundle.used("inferer")
    return SimpleInferer() if identity is None else bundle.parsed(identity)


def preprocessing(bundle: Bundle) -> list[Any]:
    """Return the transforms that turn a file into the network's input."""
    identity = _transform_of_dataset(bundle)
    bundle.parsed(identity)  # raises ModelError if the config does not have it
    return bundle.transforms(identity)


def postprocessing(bundle: Bundle) -> list[Any]:
    """Return the transforms that the evaluator applies to a prediction."""
    identity = bundle.used("postprocessing")
    return [] if identity is None else bundle.transforms(identity)


def _transform_of_dataset(bundle: Bundle) -> str:
    """Return the id of the transforms in the dataset that the evaluator reads."""
    loader = bundle.used("val_data_loader", "dataloader")
    if loader is None or bundle.get(loader) is None:
        return "preprocessing"
    value = _plain(bundle, loader, _LOADERS, "dataset")
    collate = str(value.get("collate_fn") or _COLLATE[0]).rstrip("()").rpartition(".")[2]
    if collate.lstrip("$") not in _COLLATE:
        raise ModelError(
            f"{bundle.place}: {loader}#collate_fn is {value['collate_fn']!r}, which can change "
            f"what the network sees; legal are {', '.join(_COLLATE)}"
        )
    dataset = bundle.followed(f"{loader}::dataset")
    _plain(bundle, dataset, _DATASETS, "transform")
    return bundle.followed(f"{dataset}::transform")


def _plain(bundle: Bundle, identity: str, legal: tuple[str, ...], argument: str) -> dict[str, Any]:
    """Return an entry of the config; ModelError unless it has a legal class and an argument."""
    value = bundle.get(identity)
    target = str(value.get("_target_")) if isinstance(value, dict) else repr(value)
    if not isinstance(value, dict) or target.rpartition(".")[2] not in legal:
        found = target
    elif value.get(argument) is None:
        found = f"{target} without {argument}"
    else:
        return value
    raise ModelError(
        f"{bundle.place}: {identity.replace('::', '#')} is {found}, so which transforms make the "
        f"network's input is not seen; legal is {legal[0]} with {argument}, such as '@"
        f"{'dataset' if argument == 'dataset' else 'preprocessing'}'. Set it so with --set, or "
        f"explain the network {IN_PYTHON}"
    )
