"""Whether a model, and the process around it, are the same after an explanation as before it.

`State` reads everything that an explanation might touch; `untouched` compares two readings.
"""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import nn


class State:
    """A reading of everything that must not change."""

    def __init__(self, model: nn.Module):
        self.things = {}  # compared with ==
        self.tensors = {}  # compared voxel by voxel
        self.alive = []  # so that an id is never given to a second object
        for name, module in model.named_modules():
            self._read_module(name, module)
        self._read_process()

    def _read_module(self, prefix, module):
        for name, value in vars(module).items():
            if "hooks" in name:
                self._keep(f"{prefix}.{name}", None if value is None else list(value.items()))
        self.things[f"{prefix}.training"] = module.training
        self.things[f"{prefix}.inplace"] = getattr(module, "inplace", None)
        self.things[f"{prefix}.forward"] = "forward" in vars(module)
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{prefix}.{name}"
            self._keep_tensor(where, parameter)
            self._keep_tensor(f"{where}.grad", parameter.grad)
            self.things[f"{where} needs"] = (parameter.requires_grad, parameter.is_leaf)
            self.things[f"{where} hooks"] = list(parameter._backward_hooks or ())
        for name, buffer in module._buffers.items():
            self._keep_tensor(f"{prefix}.{name}", buffer)
        self.things[f"{prefix} persistent"] = sorted(module._non_persistent_buffers_set)

    def _read_process(self):
        backends, self.things["modes"] = torch.backends, modes()
        for name, switches in {
            "matmul": backends.cuda.matmul,
            "cudnn": backends.cudnn,
            "cudnn.conv": getattr(backends.cudnn, "conv", None),
            "cudnn.rnn": getattr(backends.cudnn, "rnn", None),
            "mkldnn.matmul": getattr(backends.mkldnn, "matmul", None),
            "mkldnn.conv": getattr(backends.mkldnn, "conv", None),
        }.items():
            for switch in ("fp32_precision", "allow_tf32", "benchmark", "deterministic"):
                with contextlib.suppress(AttributeError):
                    self.things[f"{name}.{switch}"] = getattr(switches, switch)
        everywhere = nn.modules.module
        for name in (n for n in vars(everywhere) if n.startswith("_global") and "hooks" in n):
            self._keep(name, list(getattr(everywhere, name).items()))
        self.tensors["rng"] = torch.get_rng_state()
        self.things["python rng"] = random.getstate()
        self.things["numpy rng"] = str(np.random.get_state())

    def _keep(self, name, value):
        self.alive.append(value)
        self.things[name] = value

    def _keep_tensor(self, name, tensor):
        self._keep(f"{name} is", id(tensor))
        if tensor is not None:
            self.alive.append(tensor)
            self.things[f"{name} at"] = (tensor.data_ptr(), tensor.dtype, tensor.device)
            self.tensors[name] = tensor.detach().clone()

    def assert_same(self, other: State):
        assert self.things == other.things
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            torch.testing.assert_close(
                other.tensors[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name
            )


def modes():
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast dtype": [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "anomaly": torch.is_anomaly_enabled(),
    }


@contextlib.contextmanager
def untouched(model):
    before = State(model)
    yield
    before.assert_same(State(model))
