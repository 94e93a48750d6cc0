"""CAMs of one network in several threads: each right, and the network as it was."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from seg3dcam import GradCAM, HiResCAM, WindowPlan, suggest_layers, targets
from seg3dcam.errors import ModelError

VOLUME = targets.ClassLogit(1, "volume")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, 2, 1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Conv3d(4, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Upsample(scale_factor=4),
        nn.Conv3d(6, 2, 3, padding=1),
    ).train()


def image(seed):
    return torch.rand(1, 1, 8, 8, 16, generator=torch.Generator().manual_seed(seed))


def jobs():
    for seed in range(8):
        for kind in (GradCAM, HiResCAM):
            for layer in ("0", "3"):
                for plan in (None, WindowPlan(8, overlap=0.5)):
                    yield kind, layer, plan, seed


def run(net, job):
    kind, layer, plan, seed = job
    return kind(net, layer, sliding_window=plan)(image(seed), VOLUME).maps[layer]


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("wrapped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_number_of_threads_gives_the_maps_of_one(wrapped):
    """Also of two networks that share their modules."""
    net = network()
    alone = {job: run(net, job) for job in jobs()}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    own = {id(p) for p in net.parameters()}
    fresh = network()
    views = [fresh, nn.Sequential(*fresh) if wrapped else fresh]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda j: run(views[j[3] % 2], j), list(jobs())))
        again = list(pool.map(lambda j: run(net, j), list(jobs())))
    for job, first, second in zip(jobs(), found, again, strict=True):
        torch.testing.assert_close(first, alone[job], rtol=1e-5, atol=1e-6, msg=str(job))
        torch.testing.assert_close(second, alone[job], rtol=1e-5, atol=1e-6, msg=str(job))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert {id(p) for p in net.parameters()} == own
    for module in (*net.modules(), *fresh.modules()):
        assert module.training
        assert not module._forward_hooks
    assert all(p.requires_grad for p in fresh.parameters())


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_a_pass_of_somebody_else_disturbs_no_map():
    net = network().eval()
    expected = run(net, (HiResCAM, "3", None, 0))
    done = threading.Event()

    def predict():
        with torch.no_grad():
            while not done.is_set():
                net(image(5))

    other = threading.Thread(target=predict)
    other.start()
    try:
        for _ in range(20):
            torch.testing.assert_close(run(net, (HiResCAM, "3", None, 0)), expected)
    finally:
        done.set()
        other.join()


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_a_pass_of_somebody_else_hides_no_layer():
    """It runs in the middle of the probing pass, so every module seems to run twice."""
    net = network().eval()
    expected = [s.name for s in suggest_layers(net, (1, 1, 16, 16, 16))]
    me = threading.get_ident()

    def predict():
        with torch.no_grad():
            net(image(5))

    def beside(*_):
        if threading.get_ident() == me:
            other = threading.Thread(target=predict)
            other.start()
            other.join()

    net[2].register_forward_hook(beside)
    assert [s.name for s in suggest_layers(net, (1, 1, 16, 16, 16))] == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_networks_that_share_a_tensor_alone_are_explained_one_after_the_other(kind):
    """The second would note `requires_grad` as the first has set it, and leave it so."""
    one, other = network(), network()
    for net in (one, other):
        HiResCAM(net, "3")(image(0), VOLUME)
    if kind == "parameter":
        other[3].weight = one[3].weight
    else:
        other[1].running_mean = one[1].running_mean
    inside, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def score(logits):
        inside.set()
        may_end.wait(60)
        return logits[:, 1].flatten(1).sum(1)

    def explain_other():
        run(other, (HiResCAM, "3", None, 0))
        ended.set()

    threads = [threading.Thread(target=lambda: HiResCAM(one, "3")(image(0), score))]
    threads[0].start()
    assert inside.wait(60)
    threads.append(threading.Thread(target=explain_other))
    threads[1].start()
    assert not ended.wait(0.5)
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert ended.is_set()
    assert all(p.requires_grad for net in (one, other) for p in net.parameters())


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_a_cam_may_be_asked_for_inside_a_target():
    net, inner = network(), []

    def score(logits):
        inner.append(run(net, (GradCAM, "0", None, 1)))
        return logits[:, 1].flatten(1).sum(1)

    expected = HiResCAM(net, "3")(image(0), VOLUME).maps["3"]
    torch.testing.assert_close(HiResCAM(net, "3")(image(0), score).maps["3"], expected)
    torch.testing.assert_close(inner[0], run(net, (GradCAM, "0", None, 1)))


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_switches_of_the_process_are_put_back_by_the_last():
    """Two networks at once: the second one to finish must not restore what the first had set."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    entered, may_go = threading.Barrier(3), [threading.Event(), threading.Event()]

    def slow(number):
        def score(logits):
            if not may_go[number].is_set():
                entered.wait(60)
                may_go[number].wait(60)
            return logits[:, 1].flatten(1).sum(1)

        HiResCAM(network(), "3")(image(0), score)

    threads = [threading.Thread(target=slow, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    entered.wait(60)  # both are in the middle of an explanation
    for go, thread in zip(may_go, threads, strict=True):
        go.set()
        thread.join()
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_two_networks_inside_each_others_targets_do_not_wait_for_ever():
    networks, both, said = [network(), network()], threading.Barrier(2), []

    def explain(number):
        def score(logits):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(20)
            run(networks[1 - number], (GradCAM, "0", None, 1))
            return logits[:, 1].flatten(1).sum(1)

        try:
            HiResCAM(networks[number], "3")(image(0), score)
        except ModelError as error:
            said.append(str(error))

    threads = [threading.Thread(target=explain, args=(n,), daemon=True) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert any("wait for each other" in text for text in said)
