"""The weights of a MONAI bundle: the file that its config would load, and no other unsaid.

A config loads weights in one of these ways, and MONAI runs them in this order: by an expression
of `initialize` or of the list that is run, mostly `@checkpointloader(@evaluator)`; and by a
CheckpointLoader among the evaluator's handlers. Its network may also have loaded them by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ReferenceResolver
from torch import nn

from seg3dcam.errors import ModelError, tell
from seg3dcam.models.bundle_config import Bundle, Loader, is_loader
from seg3dcam.models.state import check_finite, check_fit, read_state, some, without_prefix

#: Where a bundle keeps its weights, where its config does not say.
WEIGHTS = ("models/model.pt", "models/model.safetensors", "models/model.ts")

#: What of a config is run: first, then the lists that bundles call by one of these names.
_RUN = ("initialize", "run", "inference", "infer", "evaluating", "evaluate")


def load_weights(bundle: Bundle, network: nn.Module) -> str:
    """Load the weights that the config would load, and return their place for provenance.

    Raises:
        ModelError: no weights, or such that do not fit; a random network is never returned.
    """
    before = {key: value.clone() for key, value in network.state_dict().items()}
    loader, called = _called_loader(bundle, network)
    if loader is None and (called or _loads_itself(bundle)):
        _check_changed(network, before, f"{bundle.place}: its own code", called)
        return "loaded by the config's own code"
    place = bundle.root / _path(bundle, loader) if loader else _unsaid(bundle, network)
    name = f"bundle {bundle.name}: {place.name}"
    state = _state(bundle, place, _key(loader, network) if loader else None)
    if loader and not loader.strict:
        state = _known(state, network, name)
    check_fit(network, state, name, f"the network of {bundle.config.name}")
    check_finite(state, name)
    network.load_state_dict(state)
    _check_changed(network, before, name, True)
    return str(place.relative_to(bundle.root)) if place.is_relative_to(bundle.root) else place.name


# ---------------------------------------------------------------- what the config says


def _called_loader(bundle: Bundle, network: nn.Module) -> tuple[Loader | None, bool]:
    """Return the last CheckpointLoader that the config calls, and whether any code loads."""
    last, by_code = None, False
    for identity, text in _run_expressions(bundle):
        refers = _references(text)
        loaders = [key for key in refers if is_loader(bundle.get(key))]
        by_itself = bool(refers & {"network", "network_def"}) and "load" in text
        if loaders or by_itself:
            bundle.parsed(identity)
            by_code |= by_itself
        for key in loaders:
            last = _of_network(bundle, key, network, only_called=True) or last
    for key in _handlers(bundle):
        last = _of_network(bundle, key, network) or last
    return last, by_code


def _run_expressions(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Give (id, text) of the expressions that MONAI runs, in its order."""
    for key in _RUN:
        value = bundle.get(key)
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries):
            if isinstance(entry, str) and entry.startswith("$"):
                yield (f"{key}::{number}" if isinstance(value, list) else key), entry


def _references(text: str) -> set[str]:
    return set(ReferenceResolver.match_refs_pattern(text))


def _handlers(bundle: Bundle) -> list[str]:
    """Return the ids of the CheckpointLoaders that the engines' arguments lead to."""
    engines = [key for _, text in _run_expressions(bundle) for key in sorted(_references(text))]
    waiting = [key for key in ["evaluator", *engines] if not is_loader(bundle.get(key))]
    seen: set[str] = set()
    found = []
    while waiting:
        identity = waiting.pop(0)
        value = bundle.get(identity)
        if identity in seen or value is None:
            continue
        seen.add(identity)
        if is_loader(value):
            found.append(identity)
        waiting += ReferenceResolver.find_refs_in_config(value, identity)
    return found


def _of_network(
    bundle: Bundle, identity: str, network: nn.Module, *, only_called: bool = False
) -> Loader | None:
    """Return a loader that loads into the network; None: it does not, or it is disabled."""
    loader = bundle.parsed(identity)
    if not isinstance(loader, Loader) or (only_called and not loader.called):
        return None
    return loader if _key(loader, network) is not None else None


def _key(loader: Loader, network: nn.Module) -> str | None:
    """Return the key under which a loader finds the network in a checkpoint."""
    listed = loader.load_dict if isinstance(loader.load_dict, dict) else {}
    of_networks = {key: value for key, value in listed.items() if isinstance(value, nn.Module)}
    for key, value in of_networks.items():
        if value is network or getattr(value, "module", None) is network:
            return str(key)
    return str(next(iter(of_networks))) if len(of_networks) == 1 else None


def _path(bundle: Bundle, loader: Loader) -> str:
    if not isinstance(loader.load_path, str | Path) or "\0" in str(loader.load_path):
        raise ModelError(
            f"{bundle.place}: load_path of its CheckpointLoader is {loader.load_path!r}; the path "
            "of a file is legal"
        )
    return str(loader.load_path)


# ---------------------------------------------------------------- what it does not say


def _unsaid(bundle: Bundle, network: nn.Module) -> Path:
    """Return a file that the config does not load, and say so; ModelError if there is none."""
    places = {}
    for key in _all_loaders(bundle.resolved):
        loader = _of_network(bundle, key, network)
        if loader is not None:
            places[bundle.root / _path(bundle, loader)] = key
    if len(places) > 1:
        listed = ", ".join(f"{place.name} ({key})" for place, key in places.items())
        raise ModelError(
            f"{bundle.place} names several files of weights and loads none: {listed}. Say which: "
            "set initialize to ['$@<id of the loader>(@evaluator)']"
        )
    for place, key in places.items():
        tell(
            f"{bundle.place}: {key.replace('::', '#')} is a CheckpointLoader that nothing there "
            f"calls as the config is; its {place.name} is loaded all the same"
        )
        return place
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
    return found


def _all_loaders(value: Any, identity: str = "") -> Iterator[str]:
    """Give the id of every CheckpointLoader in a config."""
    if is_loader(value):
        yield identity
    elif isinstance(value, dict | list):
        for _, inner, entry in ReferenceResolver.iter_subconfigs(identity, value):
            yield from _all_loaders(entry, inner)


def _loads_itself(bundle: Bundle) -> bool:
    """Tell whether a network has the same weights whatever the random numbers are."""
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(bundle.fresh_network().state_dict())
    one, other = states
    return all(torch.equal(value, other[key]) for key, value in one.items())


# ---------------------------------------------------------------- files


def _state(bundle: Bundle, place: Path, key: str | None) -> dict[str, torch.Tensor]:
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
    state = read_state(place, key, trust=True)  # a bundle is not read without
    if not state:
        raise ModelError(f"{name}: holds no weights")
    return without_prefix(state)


def _known(
    state: dict[str, torch.Tensor], network: nn.Module, name: str
) -> dict[str, torch.Tensor]:
    """Return the weights that the network has, as a loader that is not strict; say what is left."""
    own = network.state_dict()
    extra = [key for key in state if key not in own]
    if extra:
        tell(f"{name}: weights that the network does not have are left out: {some(extra)}")
    return {key: value for key, value in state.items() if key in own}


def _check_changed(
    network: nn.Module, before: dict[str, torch.Tensor], name: str, loaded: bool
) -> None:
    """Raise ModelError where a network is as it was before weights were loaded."""
    after = network.state_dict()
    if loaded and all(torch.equal(value, after[key]) for key, value in before.items()):
        raise ModelError(
            f"{name}: these weights are the ones that the network has before any are loaded: the "
            "file holds an untrained network"
        )
