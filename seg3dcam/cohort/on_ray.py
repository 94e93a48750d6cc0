"""Workers of a cohort on a Ray cluster, or on one that is started on this machine.

All machines have to see the model, and scans and results at no address, under the same paths.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from seg3dcam.cohort.plan import PlannedCase
from seg3dcam.cohort.work import CaseWorker, Work
from seg3dcam.cohort.workers import Worker
from seg3dcam.errors import ConfigError, MissingExtraError

#: The address that starts Ray on this machine.
LOCAL = "local"

#: Addresses by which Ray finds a cluster itself.
_WORDS = (LOCAL, "auto")

#: Seconds to wait for an answer of a cluster.
_ANSWER = 5

#: Volumes do not travel through Ray, only their paths: its store of objects may be small.
_STORE = 100_000_000


@dataclass(frozen=True)
class RayCluster:
    """A cluster that is connected.

    Attributes:
        address: what was given.
        cpus, gpus: what one worker takes of a machine; a part of a GPU may be 0.5.
    """

    address: str
    cpus: float
    gpus: float

    def workers(self) -> int:
        """Return how many workers the cluster holds."""
        import ray

        has = ray.cluster_resources()
        fit = [has.get("CPU", 0) / self.cpus] if self.cpus else []
        fit += [has.get("GPU", 0) / self.gpus] if self.gpus else []
        if (found := int(min(fit))) < 1:
            raise ConfigError(
                f"the Ray cluster at {self.address} has {has.get('CPU', 0):g} CPUs and "
                f"{has.get('GPU', 0):g} GPUs: a worker of {self.cpus:g} CPUs and {self.gpus:g} "
                "GPUs does not fit; let one take less"
            )
        return found

    def opened(self, work: Work) -> Callable[[], Worker]:
        """Return what starts a worker somewhere in the cluster."""
        threads = replace(work, threads=max(1, int(self.cpus)))
        return lambda: _RayWorker(threads, self.cpus, self.gpus)


@contextmanager
def connected(address: str, cpus: float | None, gpus: float | None) -> Iterator[RayCluster]:
    """Connect to a cluster; at the end what was begun here is ended.

    Args:
        address: "host:port", "ray://host:port", "auto" for the one on this machine, or "local" to
            start one here. Where this process is connected already, that cluster is taken.
        cpus: of a worker; None is one.
        gpus: of a worker; None is one where the cluster has any.

    Raises:
        ConfigError: nobody answers, or the address is none.
        MissingExtraError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray: pip install 'seg3dcam[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _check_answers(address)
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == LOCAL:
            settings |= {"include_dashboard": False, "object_store_memory": _STORE}
        try:
            ray.init(address=address, **settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _unanswered(address, error) from error
    try:
        of_gpus = gpus if gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        yield RayCluster(address, 1 if cpus is None else cpus, of_gpus)
    finally:
        if ours:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ConfigError unless something listens at an address: Ray itself tries for minutes."""
    if address in _WORDS:
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
        if host is None or port is None:
            raise ValueError("a host and a port are needed")
        socket.create_connection((host, port), _ANSWER).close()
    except (OSError, ValueError) as error:
        raise _unanswered(address, error) from error


def _unanswered(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address!r} ({error}); legal are host:port, ray://host:port, "
        "auto for a cluster that runs on this machine, and local to start one here"
    )


class _RayWorker:
    """An actor of Ray, which is never restarted: another one takes its place."""

    def __init__(self, work: Work, cpus: float, gpus: float) -> None:
        import ray

        kind = ray.remote(CaseWorker)
        self._actor: Any = kind.options(num_cpus=cpus, num_gpus=gpus, max_restarts=0).remote(work)

    def load(self) -> Future[None]:
        future: Future[None] = self._actor.load.remote().future()
        return future

    def explain(self, one: PlannedCase) -> Future[str | None]:
        future: Future[str | None] = self._actor.explain.remote(one).future()
        return future

    def reason(self, error: BaseException) -> BaseException | None:
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError):
            return error.cause if isinstance(error.cause, BaseException) else error
        return None if isinstance(error, RayError) else error

    def close(self) -> None:
        import ray

        ray.kill(self._actor)

    def join(self) -> None:
        """Ray does not say when an actor's process has ended, and needs nobody to wait for it."""
