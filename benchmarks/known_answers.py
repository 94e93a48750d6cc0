"""The benchmark with known answers: which methods and layers show the evidence that was planted?

    python benchmarks/known_answers.py                        # score everything, about an hour
    python benchmarks/known_answers.py --problem shortcut     # one problem of five
    python benchmarks/known_answers.py --train                # make the networks again, first
    python benchmarks/known_answers.py --check                # have they learnt what was planted?
    python benchmarks/known_answers.py --tables               # tables and pictures again
    python benchmarks/known_answers.py --compare              # what does `compare` recommend?

Figures are kept in `benchmarks/known/figures/`, and the tables of `docs/known_answers.md` are made
of them. Weights lie in `benchmarks/known/weights/`, in float16; the same seeds give the same
networks on the same machine and versions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from known import PROBLEMS, Problem
from known.networks import half, train
from known.pictures import draw
from known.recommended import HEAD, rows
from known.score import Score, details, scores
from known.tables import ALWAYS, overview, picked, read, top, written
from known.training import learnt
from measure import machine
from safetensors.torch import save_file

FIGURES = Path(__file__).parent / "known" / "figures"
PICTURE = Path(__file__).parents[1] / "docs" / "known_answers.png"
PAGE = Path(__file__).parents[1] / "docs" / "known_answers.md"

#: Seeds of the volumes on which layers and methods are compared.
COMPARED = (0, 201)


def make(problem: Problem) -> None:
    """Train a problem's network and keep its weights."""
    start = time.perf_counter()
    network = train(problem)
    problem.weights.parent.mkdir(exist_ok=True)
    save_file(half(network), problem.weights)
    print(f"{problem.name}: trained in {time.perf_counter() - start:.0f} s, {problem.weights}")


def score(problem: Problem, seeds: Sequence[int]) -> None:
    """Score every method at every layer, and keep the figures."""
    start = time.perf_counter()
    found, fields = scores(problem, seeds)
    listed: list[Score] = [
        next(s for s in found if (s.method, s.layer) == pair)
        for pair in picked([asdict(s) for s in found])
    ]
    sanity = {(listed[0].method, listed[0].layer), *ALWAYS}
    more = details(problem, fields, listed, sanity)
    figures = {
        "machine": machine(),
        "learnt": str(learnt(problem, problem.load())),
        "seeds": list(seeds),
        "left": [here.left for here in fields],
        "controls": [here.controls for here in fields],
        "random": [here.random_areas for here in fields],
        "scores": [asdict(s) for s in found],
        "details": [
            {"method": s.method, "layer": s.layer, **asdict(d)}
            for s, d in zip(listed, more, strict=True)
        ],
        "seconds": round(time.perf_counter() - start),
    }
    FIGURES.mkdir(exist_ok=True)
    text = json.dumps(figures, default=float)
    (FIGURES / f"{problem.name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{problem.name}: scored in {figures['seconds']} s")


def write_tables(problem: Problem) -> None:
    """Print a problem's tables and put them into the page."""
    figures = read(FIGURES / f"{problem.name}.json")
    facts = (
        f"{figures['learnt']}. Context: with everything around the object deleted its Dice is "
        + (f"{min(figures['left']):.2f}–{max(figures['left']):.2f}.")
    )
    text = "\n\n".join((facts, overview(figures), top(figures)))
    print(f"\n{problem.name}\n\n{text}")
    written(PAGE, problem.name, text)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", choices=list(PROBLEMS), help="default: all")
    parser.add_argument("--volumes", type=int, default=4, help="how many are scored")
    parser.add_argument("--train", action="store_true", help="make the networks again")
    parser.add_argument("--check", action="store_true", help="only say what they have learnt")
    parser.add_argument("--compare", action="store_true", help="only say what is recommended")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    given = parser.parse_args()
    if given.compare:
        print(HEAD)
        found = [rows(PROBLEMS[name], COMPARED) for name in given.problem or PROBLEMS]
        written(PAGE, "compare", "\n".join((HEAD, *itertools.chain.from_iterable(found))))
        return
    for name in given.problem or PROBLEMS:
        problem = PROBLEMS[name]
        if given.train:
            make(problem)
        if given.train or given.check:
            print(f"{name}: {learnt(problem, problem.load())}", flush=True)
        if given.check or given.train:
            continue
        if not given.tables:
            score(problem, range(given.volumes))
        write_tables(problem)
    if not (given.check or given.train):
        files = {name: FIGURES / f"{name}.json" for name in PROBLEMS}
        draw({n: read(file) for n, file in files.items() if file.exists()}, PICTURE)


if __name__ == "__main__":
    main()
