"""Networks whose evidence is known, because the volumes they were trained on had it planted.

`PROBLEMS` names them. A problem gives volumes with the mask of what decides its class, and a small
trained network, of which `Problem.load` reads the weights in `weights/`:

    problem = PROBLEMS["remote_cue"]
    network = problem.load()
    x, truth, evidence = problem.volume(seed=1)
"""

from .problems import PROBLEMS, Problem
from .volumes import Scene

__all__ = ["PROBLEMS", "Problem", "Scene"]
