"""The layer and method that show the evidence win, and where none does, that is said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers_planted import PlantedUNet, planted
from test_faithfulness import SHAPE

from seg3dcam.errors import ConfigError, EmptyRegionError, EvaluationError, LayerError
from seg3dcam.evaluate import compare, context_deletion
from seg3dcam.evaluate.areas import FallingCurve
from seg3dcam.evaluate.compare import METHODS
