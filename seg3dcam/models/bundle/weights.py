"""The network of a MONAI bundle with the weights that it has when its evaluator predicts.

MONAI runs the expressions under `initialize`, then those under `run` up to the evaluator, which
starts by calling its handlers. Here the same is done in the same order with every expression that
concerns the network. The bundle's own code runs, and each CheckpointLoader loads when its turn
comes, wherever in the config it is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ReferenceResolver
from monai.handlers import CheckpointLoader
from torch import nn

from seg3dcam.errors import ModelError, some, tell
from seg3dcam.models.bundle.config import IN_PYTHON, Bundle, unwrapped
from seg3dcam.models.bundle.stand_ins import Engine, PredictionStart, is_engine
from seg3dcam.models.weights import State, check_finite, check_fit, read_state, without_prefix

#: Where bundles usually keep their weights, for a config that does not say it.
WEIGHTS = ("models/model.pt", "models/model.safetensors", "models/model.ts")

#: Other names that bundles give to the list `run`.
_RUN = ("inference", "infer", "evaluating", "evaluate")

#: Words in the entries of a config that load weights.
_LOADS = ("CheckpointLoader", "load_state_dict")


@dataclass
class _Load:
    """One load by a CheckpointLoader.

    Attributes:
        after: the module's weights after the load.
        changed: whether the load changed any of them.
    """

    file: Path
    module: nn.Module
    after: dict[str, torch.Tensor]
    changed: bool


def loaded_network(bundle: Bundle) -> tuple[nn.Module, str]:
    """Return the network that the evaluator runs, and where its weights come from.

    Raises:
        ModelError: there are no weights, or they do not fit. A network with random weights is never
            returned.
    """
    loads = _run_up_to_prediction(bundle)
    network = bundle.network()
    of_network = [load for load in loads if _tensors(load.module) & _tensors(network)]
    loaded = {tensor for load in of_network for tensor in _tensors(load.module)}
    if not _tensors(network) <= loaded and not _always_the_same(bundle):
        return network, _load_unsaid(bundle, network, of_network)
    if not of_network:
        return network, "loaded by the config's own code"
    if not any(load.changed for load in of_network):
        _refuse_untrained(f"{bundle.place}: {of_network[-1].file.name}")
    last = of_network[-1]
    later = "" if _equal(last.after, last.module) else ", then changed by the config's own code"
    return network, _shown(bundle, last.file) + later


def _tensors(network: nn.Module) -> set[int]:
    """Return the identities of a network's parameters and buffers."""
    return {id(tensor) for tensor in (*network.parameters(), *network.buffers())}


def _shown(bundle: Bundle, file: Path) -> str:
    """Return the name of a file in the provenance."""
    return str(file.relative_to(bundle.root)) if file.is_relative_to(bundle.root) else file.name


# ---------------------------------------------------------------- what MONAI runs


def _run_up_to_prediction(bundle: Bundle) -> list[_Load]:
    """Do to the network what MONAI does before the evaluator predicts; return what was loaded."""
    loads: list[_Load] = []
    with _loading_by(bundle, loads):
        try:
            for identity in _expressions(bundle):
                bundle.parsed(identity)
            evaluator = bundle.evaluator() and bundle.parsed("evaluator")
            if isinstance(evaluator, Engine):
                evaluator.run()
        except PredictionStart:  # from here on the weights stay as they are
            return loads
    return loads


def _expressions(bundle: Bundle) -> list[str]:
    """Return the ids of the expressions that MONAI runs and that refer to the network."""
    first, then = _entries(bundle, "initialize"), _entries(bundle, _list_to_run(bundle))
    reaching = {entry: _reached(bundle, entry) for entry in [*first, *then]}
    of_network = [entry for entry, ids in reaching.items() if ids & {"network_def", "network"}]
    engines = {key for entry in then for key in reaching[entry] if is_engine(bundle.get(key))}
    if engines and bundle.followed("evaluator") not in engines:
        raise ModelError(
            f"{bundle.place}: what is run is {sorted(engines)[0].replace('::', '#')}, where the "
            "id evaluator is explained: rename it to evaluator"
        )
    alone = [entry for entry in then if entry in of_network]
    if alone and not engines:
        raise ModelError(
            f"{bundle.place}: {alone[0].replace('::', '#')} runs the network without an evaluator, "
            f"by {bundle.get(alone[0])!r}; what it does is not followed. Explain the network "
            + IN_PYTHON
        )
    return of_network


def _list_to_run(bundle: Bundle) -> str:
    """Return the key of the list that is run."""
    if bundle.get("run") is not None:
        return "run"
    found = [key for key in _RUN if bundle.get(key) is not None]
    if any(bundle.get(key) != bundle.get(found[0]) for key in found):
        raise ModelError(
            f"{bundle.place} has {' and '.join(found)} but no run, so which of them is run is not "
            "known: rename the one that is meant to run"
        )
    return found[0] if found else "run"


def _entries(bundle: Bundle, key: str) -> list[str]:
    """Return the ids of the entries that are listed under a key to be run."""
    value = bundle.get(key)
    if isinstance(value, list):
        return [f"{key}::{number}" for number, entry in enumerate(value) if entry is not None]
    return [] if value is None else [key]


def _reached(bundle: Bundle, identity: str) -> set[str]:
    """Return the ids of all entries to which an entry refers, directly or through others."""
    waiting, seen = [identity], set()
    while waiting:
        key = waiting.pop()
        if key not in seen:
            seen.add(key)
            waiting += ReferenceResolver.find_refs_in_config(bundle.get(key), key)
    return seen


# ---------------------------------------------------------------- what loaders load


@contextmanager
def _loading_by(bundle: Bundle, loads: list[_Load]) -> Iterator[None]:
    """Let every CheckpointLoader, also a subclass, load by `_load`, which checks the file."""

    def load(loader: CheckpointLoader, engine: Any = None) -> None:
        for key, module in loader.load_dict.items():
            if isinstance(module, nn.Module):
                loads.append(_load(bundle, loader, str(key), module))

    own = CheckpointLoader.__call__
    setattr(CheckpointLoader, "__call__", load)  # noqa: B010 (mypy forbids the assignment)
    try:
        yield
    finally:
        setattr(CheckpointLoader, "__call__", own)  # noqa: B010


def _load(bundle: Bundle, loader: CheckpointLoader, key: str, module: nn.Module) -> _Load:
    """Load weights into a module as MONAI's CheckpointLoader does, or refuse them."""
    if not loader.strict_shape:
        raise ModelError(
            f"{bundle.place}: a CheckpointLoader with strict_shape false leaves weights out, and a "
            "file that holds a state dict alone it does not load at all: set strict_shape to true"
        )
    module = unwrapped(module)
    file = bundle.root / _path(bundle, loader)
    name = f"bundle {bundle.name}: {file.name}"
    before = _copied(module)
    state = _state(bundle, file, key)
    if not loader.strict:
        state = _known(state, module, name)
    _load_checked(bundle, module, state, name)
    return _Load(file, module, _copied(module), not _equal(before, module))


def _copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def _equal(state: State, module: nn.Module) -> bool:
    own = module.state_dict()
    return all(torch.equal(value, own[key]) for key, value in state.items())


def _path(bundle: Bundle, loader: CheckpointLoader) -> str:
    if not isinstance(loader.load_path, str | Path) or "\0" in str(loader.load_path):
        raise ModelError(
            f"{bundle.place}: load_path of its CheckpointLoader is {loader.load_path!r}; the path "
            "of a file is legal"
        )
    return str(loader.load_path)


def _load_checked(bundle: Bundle, module: nn.Module, state: State, name: str) -> None:
    check_fit(module, state, name, f"the network of {bundle.config.name}")
    check_finite(state, name)
    module.load_state_dict(state)


# ---------------------------------------------------------------- what the config does not say


def _load_unsaid(bundle: Bundle, network: nn.Module, loads: list[_Load]) -> str:
    """Load weights that the config itself does not load, and warn; ModelError if in doubt."""
    if loads:
        raise ModelError(
            f"{bundle.place}: {loads[-1].file.name} holds a part of the network's weights only; "
            "the others would be random. Load them as well, by a CheckpointLoader of evaluator"
        )
    said = list(_loading(bundle.resolved))
    if (file := _load_uncalled(bundle, network, said)) is not None:
        return _shown(bundle, file)
    if said:
        raise ModelError(
            f"{bundle.place}: {', '.join(said).replace('::', '#')} can load weights, but nothing "
            "there has it load those of the evaluator's network, so MONAI would predict with "
            "random ones. Call it in initialize or name it among the evaluator's handlers, or "
            "switch on what switches it off (--set)"
        )
    found = next((bundle.root / name for name in WEIGHTS if (bundle.root / name).is_file()), None)
    if found is None:
        raise ModelError(
            f"bundle {bundle.name}: no weights. {bundle.config.name} has no CheckpointLoader, and "
            f"there is no {' or '.join(WEIGHTS)}" + bundle.download()
        )
    tell(
        f"{bundle.place}: no CheckpointLoader in it says which weights are loaded; "
        f"{found.relative_to(bundle.root)} is taken, where bundles mostly keep them"
    )
    before = _copied(network)
    name = f"bundle {bundle.name}: {found.name}"
    _load_checked(bundle, network, without_prefix(_state(bundle, found)), name)
    if _equal(before, network):
        _refuse_untrained(name)
    return _shown(bundle, found)


def _load_uncalled(bundle: Bundle, network: nn.Module, said: list[str]) -> Path | None:
    """Load by the only loader of the network, though nothing calls it; None if there is none.

    Some configs come without their evaluator, or with a loader that a script of theirs calls. The
    loader still says which weights are meant. That is not so where an expression that runs refers
    to the loader without calling it, as behind a switch that is off.
    """
    run = [*_entries(bundle, "initialize"), *_entries(bundle, _list_to_run(bundle))]
    if any(identity in _reached(bundle, entry) for entry in run for identity in said):
        return None
    made = [bundle.parsed(identity) for identity in said if _is_made(bundle, identity)]
    loaders = [
        loader
        for loader in made
        if isinstance(loader, CheckpointLoader)
        if any(isinstance(m, nn.Module) and _tensors(m) for m in loader.load_dict.values())
    ]
    if len(loaders) != 1 or len(said) != 1:
        return None
    loads: list[_Load] = []
    with _loading_by(bundle, loads):
        loaders[0](None)
    of_network = [load for load in loads if _tensors(network) <= _tensors(load.module)]
    if not of_network:
        return None
    tell(
        f"{bundle.place}: {said[0].replace('::', '#')} is a CheckpointLoader that nothing there "
        f"calls; its {of_network[0].file.name} is loaded all the same"
    )
    if not of_network[0].changed:
        _refuse_untrained(f"{bundle.place}: {of_network[0].file.name}")
    return of_network[0].file


def _is_made(bundle: Bundle, identity: str) -> bool:
    return isinstance(bundle.get(identity), dict)


def _loading(value: Any, identity: str = "") -> Iterator[str]:
    """Yield the ids of all entries in a config that load weights when they are called."""
    text = str(value.get("_target_")) if isinstance(value, dict) else value
    if isinstance(text, str) and any(word in text for word in _LOADS):
        yield identity
    elif isinstance(value, dict | list):
        for _, inner, entry in ReferenceResolver.iter_subconfigs(identity, value):
            yield from _loading(entry, inner)


def _always_the_same(bundle: Bundle) -> bool:
    """Tell whether the network has the same weights whatever the random numbers are."""
    one, other = (_state_by_seed(bundle, seed) for seed in (1, 2))
    return all(torch.equal(value, other[key]) for key, value in one.items())


def _state_by_seed(bundle: Bundle, seed: int) -> State:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same warnings were given the first time
        torch.manual_seed(seed)
        again = bundle.again()
        _run_up_to_prediction(again)
        return again.network().state_dict()


# ---------------------------------------------------------------- files


def _state(bundle: Bundle, place: Path, key: str | None = None) -> State:
    name = f"bundle {bundle.name}: {place.name}"
    if not place.is_file():
        present = ", ".join(sorted(p.name for p in place.parent.glob("*"))) or "nothing"
        raise ModelError(
            f"bundle {bundle.name}: the weights {place} are missing; {place.parent.name} holds "
            f"{present}" + bundle.download()
        )
    with place.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise ModelError(f"{name} is a pointer of Git LFS, not the weights: run git lfs pull")
    return read_state(place, key, trust=True)  # without trust no bundle is read


def _known(state: State, network: nn.Module, name: str) -> State:
    """Return the weights that the network has, for a loader that is not strict; name the others."""
    own = network.state_dict()
    extra = [key for key in state if key not in own]
    if extra:
        tell(f"{name}: weights that the network does not have are left out: {some(extra)}")
    return {key: value for key, value in state.items() if key in own}


def _refuse_untrained(name: str) -> None:
    raise ModelError(
        f"{name}: these weights are the ones that the network has before any are loaded: the file "
        "holds an untrained network"
    )
