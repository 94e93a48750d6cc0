"""A cohort on a Ray cluster of three nodes, of which one goes, and a worker, too."""

from __future__ import annotations

import os
import signal
import socket

import psutil
import pytest
from helpers_cohort import content_of, leftovers, write_cohort, write_fragile

from seg3dcam import cohort
from seg3dcam.errors import ConfigError

ray = pytest.importorskip("ray", reason="Ray is an extra")

GOOD = [f"case{number:02d}" for number in range(12)]
SETTINGS = {"target": "lesion", "format": ["nifti"]}


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    # Warnings of Ray's own, such as of its small store of objects, are not what is tested.
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 10**8,
            # By default it takes a minute until a node counts as gone.
            "_system_config": {
                "health_check_initial_delay_ms": 1000,
                "health_check_period_ms": 1000,
                "health_check_failure_threshold": 3,
            },
        },
    )
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=10**8)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_node_and_a_worker_go_and_nothing_is_lost(cluster, tmp_path):
    scans = write_cohort(tmp_path, GOOD, raises=["bad"], crashes=["worst"])
    model, lost = str(write_fragile(tmp_path)), []

    def lose(step, done, total):
        if done == 2 and "node" not in lost:
            lost.append("node")
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        if done == 5 and "worker" not in lost:
            at_work = [p for p in psutil.process_iter() if "CaseWorker" in " ".join(name_of(p))]
            lost.extend(["worker"] * bool(at_work))
            for one in at_work[:1]:
                os.kill(one.pid, signal.SIGKILL)

    settings = {"model": model, "trust": True} | SETTINGS
    address = cluster.address
    result = cohort.run(scans, out=tmp_path / "out", ray=address, progress=lose, **settings)
    assert lost == ["node", "worker"]
    assert sorted(result.done) == GOOD
    assert result.failed["bad"].endswith(": a scan that the network cannot take")
    assert "died 2 times" in result.failed["worst"]

    (scans / "worst.nii.gz").unlink()
    alone = cohort.run(scans, out=tmp_path / "alone", **settings)
    for name in GOOD:
        assert content_of(result.out, name) == content_of(alone.out, name)
    assert leftovers(alone.out) == []

    (result.out / "case03" / "case.json").unlink()
    again = cohort.run(scans, out=tmp_path / "out", ray=address, **settings)
    assert again.done == ("case03",)


def test_an_address_that_nobody_answers(tmp_path):
    scans = write_cohort(tmp_path, ["a"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match="no Ray cluster answers at '127"):
        cohort.run(
            scans, model=str(tmp_path / "model.yaml"), out=tmp_path / "out", ray=address, **SETTINGS
        )
    assert not (tmp_path / "out" / "cohort").exists()


def name_of(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []
