"""Capturing gives the true activations and gradients, however the network is wrapped or called.

The truth is the gradient of a twin in float64 that is not hooked, wrapped, or changed in place.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import seeded

from seg3dcam import AblationCAM, EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, WindowPlan, targets
from seg3dcam.cams.calls import each_by
from seg3dcam.errors import LayerError, ModelError
from seg3dcam.network.capture import capturing
from seg3dcam.network.layers import resolve_layers
from seg3dcam.network.layouts import INPUT

TARGET = "block.conv"
VOLUME = targets.ClassLogit(1, region="volume")


class Block(nn.Module):
    """The target layer (`conv`) and what follows it."""

    def __init__(self, *, inplace=False):
        super().__init__()
        self.conv = nn.Conv3d(3, 5, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        return self.act(self.conv(x))


class Net(nn.Module):
    """Stem, block, head: three stages, so that the block's parent and what follows are apart."""

    def __init__(self, *, inplace=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = nn.Conv3d(1, 3, 3, padding=1)
            self.block = Block(inplace=inplace)
            self.head = nn.Sequential(
                nn.ConvTranspose3d(5, 4, 2, 2), nn.ReLU(inplace=inplace), nn.Conv3d(4, 3, 1)
            )

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


class CheckpointedBlock(Net):
    reentrant = False

    def forward(self, x):
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant))


class CheckpointedHead(Net):
    reentrant = False

    def forward(self, x):
        return checkpoint(self.head, self.block(self.stem(x)), use_reentrant=self.reentrant)


class CheckpointedAll(Net):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class FrozenEncoder(Net):
    """Runs its encoder without a graph, as feature extractors do."""

    def forward(self, x):
        with torch.no_grad():
            features = self.stem(x)
        return self.head(self.block(features))


def truth(net, x, seed, *, after_activation=False):
    """Return activations and gradients of the target layer, computed by hand in float64."""
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    with torch.inference_mode(False), torch.enable_grad():
        activations = twin.block.conv(twin.stem(x.clone().double()))
        if after_activation:
            activations = activations.relu().detach().requires_grad_()
            logits = twin.head(activations)
        else:
            activations = activations.detach().requires_grad_()
            logits = twin.head(activations.relu())
        (gradients,) = torch.autograd.grad(logits, activations, seed.double())
    return activations.detach(), gradients


def captured(model, x, seed, layer=TARGET):
    """Return logits, activations and gradients as `capturing` finds them."""
    layers = resolve_layers(model, layer)
    with capturing(model, layers) as capture:
        logits = capture.forward(x)
        gradients = capture.gradients(logits, seed)
        activations = capture.activations
    return logits.detach(), activations[layers[0]], gradients[layers[0]]


def assert_true(model, net, x, seed, layer=TARGET, **settings):
    """Compare what is captured in `model`, which wraps or equals `net`, with the truth."""
    _, activations, gradients = captured(model, x, seed, layer)
    expected_activations, expected_gradients = truth(net, x, seed, **settings)
    assert expected_gradients.abs().max() > 0.01
    torch.testing.assert_close(activations, expected_activations, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.fixture
def x():
    return torch.rand(
        2, 1, 6, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture
def seed():
    shape = (2, 3, 6, 8, 4)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------- how the network is made


@pytest.mark.parametrize(
    "net",
    [
        Net(),
        Net(inplace=True),
        Net().requires_grad_(False),
        Net(inplace=True).requires_grad_(False),
        CheckpointedBlock(),
        CheckpointedBlock(inplace=True),
        CheckpointedHead(),
        CheckpointedAll(),
        FrozenEncoder(),
    ],
    ids=lambda net: (
        type(net).__name__
        + " in-place" * net.block.act.inplace
        + " frozen" * (not net.stem.weight.requires_grad)
    ),
)
def test_gradient_is_that_of_the_plain_twin(net, x, seed):
    net = net.double()
    assert_true(net, net, x, seed)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_target_itself_works_in_place(inplace, x, seed):
    net = Net(inplace=inplace).double()
    assert_true(net, net, x, seed, "block.act", after_activation=True)


def test_single_precision_is_close_to_the_twin(x, seed):
    net = Net(inplace=True)
    _, activations, gradients = captured(net, x.float(), seed.float())
    expected_activations, expected_gradients = truth(net, x, seed)
    torch.testing.assert_close(activations.double(), expected_activations, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients.double(), expected_gradients, rtol=1e-4, atol=1e-6)


def test_input_that_requires_a_gradient_gets_none(x, seed):
    net, x = Net().double(), x.requires_grad_()
    assert_true(net, net, x, seed)
    assert x.grad is None


@pytest.mark.parametrize("network", [CheckpointedBlock, CheckpointedHead])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_refused(network, x, seed):
    net = network().double()
    net.reentrant = True
    with pytest.raises((LayerError, ModelError), match="use_reentrant=False"):
        captured(net, x, seed)


def test_gradients_switched_off_inside_the_network_is_refused(x, seed):
    net = Net().double()
    net.forward = torch.no_grad()(net.forward)
    with pytest.raises(LayerError, match=r"switches gradients off.*no_grad"):
        captured(net, x, seed)


# -------------------------------------------------------------------------------------- wrappers


def test_data_parallel(x, seed):
    net = Net().double()
    assert_true(nn.DataParallel(net), net, x, seed)


@pytest.fixture
def one_process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    start = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=start, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel(x, seed):
    net = Net().double()
    parallel = nn.parallel.DistributedDataParallel(net)
    assert_true(parallel, net, x, seed)
    parallel(x).sum().backward()  # training goes on
    assert all(parameter.grad is not None for parameter in net.parameters())


def compile_outside(net):
    return torch.compile(net, backend="eager"), TARGET


def compile_in_place(net):
    net.compile(backend="eager")
    return net, TARGET


def compile_the_block(net):
    outer = copy.copy(net)
    outer._modules = dict(net._modules, block=torch.compile(net.block, backend="eager"))
    return outer, "block._orig_mod.conv"


def compile_the_target_in_place(net):
    net.block.conv.compile(backend="eager")
    return net, TARGET


# The compiler itself looks at .grad of every tensor that a user's call brings in.
compiler_looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@compiler_looks_at_grad
@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize(
    "compiling", [compile_outside, compile_in_place, compile_the_block, compile_the_target_in_place]
)
def test_compiled(compiling, called_before, x, seed):
    torch.compiler.reset()
    net = Net().double()
    model, layer = compiling(net)
    if called_before:
        model(x)
    assert_true(model, net, x, seed, layer)
    torch.testing.assert_close(model(x), net.head(net.block(net.stem(x))))  # still usable


@compiler_looks_at_grad
def test_a_compiled_submodule_may_itself_be_the_target(x, seed):
    torch.compiler.reset()
    net = Net().double()
    net.block.conv = torch.compile(net.block.conv, backend="eager")
    net(x)
    plain = Net().double()
    expected = truth(plain, x, seed)
    for layer in (TARGET, net.block.conv):
        _, activations, gradients = captured(net, x, seed, layer)
        torch.testing.assert_close((activations, gradients), expected, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------- how it is called


CALLERS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_the_mode_of_the_caller_does_not_matter(caller, x):
    """Through the whole CAM: the map is the one of the plain twin."""
    net = Net(inplace=True).float()
    ones = torch.zeros(2, 3, 6, 8, 4)
    ones[:, 1] = 1
    activations, gradients = truth(net, x, ones)
    expected = (activations * gradients).sum(1)
    with CALLERS[caller]():
        given = x.float() * 1  # made in the caller's mode
        result = HiResCAM(net, TARGET)(given, VOLUME)
    found = result.native[TARGET]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_results_of_an_inference_mode_caller_are_ordinary_tensors(x):
    net = Net().double()
    with torch.inference_mode():
        result = HiResCAM(net, TARGET)(x * 1, VOLUME)
    assert not result.native[TARGET].is_inference()
    assert not result.logits.is_inference()


@pytest.mark.parametrize("caller", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_parameters_made_in_inference_mode_are_refused(caller, x):
    with torch.inference_mode():
        net = Net().double()
    with caller(), pytest.raises(ModelError, match=r"inference_mode.*outside"):
        GradCAM(net, TARGET)(x, VOLUME)


# ------------------------------------------------------------------------------- several layers


@pytest.mark.parametrize("order", [["stem", TARGET, "head.0"], ["head.0", TARGET, "stem"]])
def test_several_layers_in_one_pass_equal_each_alone(order, x, seed):
    """A leaf at an inner layer must not cut the outer one off."""
    net = Net(inplace=True).double()
    layers = resolve_layers(net, order)
    with capturing(net, layers) as capture:
        gradients = capture.gradients(capture.forward(x), seed)
        activations = capture.activations
    for layer in layers:
        _, alone, gradient = captured(net, x, seed, layer.name)
        assert gradient.abs().max() > 0
        torch.testing.assert_close(activations[layer], alone)
        torch.testing.assert_close(gradients[layer], gradient)


def test_graph_may_be_used_twice(x, seed):
    net = CheckpointedHead().double()
    layers = resolve_layers(net, TARGET)
    with capturing(net, layers) as capture:
        logits = capture.forward(x)
        first = capture.gradients(logits, seed, keep_graph=True)
        second = capture.gradients(logits, 2 * seed)
    torch.testing.assert_close(second[layers[0]], 2 * first[layers[0]])


def test_observing_equals_explaining(x, seed):
    net = Net(inplace=True).double()
    logits, activations, _ = captured(net, x, seed)
    layers = resolve_layers(net, TARGET)
    with capturing(net, layers) as capture:
        torch.testing.assert_close(capture.observe(x, copy=True), logits)
        torch.testing.assert_close(capture.activations[layers[0]], activations)
        torch.testing.assert_close(capture.observe_layers(x)[layers[0]], activations)


class Branches(Net):
    """Returns its features as tuple, dict and nest; shows what ran."""

    class Many(nn.Module):
        def forward(self, x):
            return x * 2, {"fine": x * 3, "count": torch.arange(3)}, [x + 1]

    def __init__(self):
        super().__init__()
        self.many = self.Many()

    def forward(self, x):
        x = self.block(self.stem(x))
        double, named, (shifted,) = self.many(x)
        return self.head(double + named["fine"] + shifted)


@pytest.mark.parametrize(
    ("name", "factor", "shift"), [("many[0]", 2, 0), ("many[1][fine]", 3, 0), ("many[2][-1]", 1, 1)]
)
def test_element_of_a_layer_that_returns_several(name, factor, shift, x, seed):
    """The head's input is the sum of three elements, so each has the gradient of that sum."""
    net = Branches().double()
    logits, activations, gradients = captured(net, x, seed, name)
    with torch.no_grad():
        features = net.block(net.stem(x))
    total = (6 * features + 1).requires_grad_()
    expected = net.head(total)
    (gradient,) = torch.autograd.grad(expected, total, seed)
    torch.testing.assert_close(logits, expected.detach())
    torch.testing.assert_close(activations, factor * features + shift)
    torch.testing.assert_close(gradients, gradient)


# ------------------------------------------------------------------- layers that explain nothing


class Twice(Net):
    def forward(self, x):
        return self.head(self.block.act(self.block.act(self.block.conv(self.stem(x)))))


class Aside(Net):
    """One layer feeds nothing, another never runs."""

    def __init__(self):
        super().__init__()
        self.aside, self.spare = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1)

    def forward(self, x):
        stem = self.stem(x)
        self.aside(stem)
        return self.head(self.block(stem))


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        (Twice, "block.act", "'block.act' ran 2 times in one forward pass"),
        (Aside, "spare", "'spare' did not run in the forward pass"),
        (Aside, "aside", "does not depend on aside"),
        (Aside, ["aside", TARGET], "does not depend on layer 'aside'"),
        (
            Branches,
            "many",
            r"'many': that is a tuple, not a tensor. The layer gives 'many\[0\]' \(",
        ),
        (Branches, "many", r"'many\[1\]\[fine\]' \(2, 5, 3, 4, 2\).*'many\[2\]\[0\]'"),
        (Branches, "many[7]", r"there is no element \[7\]. The layer gives 'many\[0\]'"),
        (Branches, "many[1]", r"'many\[1\]': that is a dict, not a tensor"),
        (Branches, "many[1][coarse]", r"there is no element \[coarse\]"),
        (Branches, "many[1][count]", r"dtype is torch.int64, which has no gradient"),
        (Branches, "many[0][0]", r"'many\[0\]\[0\]'.*The layer gives 'many\[0\]'"),
        (Net, "stem[0]", r"'stem\[0\]'.*The layer gives 'stem' \(2, 3, 6, 8, 4\)"),
        (Net, "stem[a]", r"there is no element \[a\] in a tensor. The layer gives 'stem' \("),
    ],
)
def test_a_layer_that_gives_no_map_is_refused(network, layer, message, x):
    with pytest.raises(LayerError, match=message):
        GradCAM(network().double(), layer)(x, VOLUME)


def test_a_layer_that_runs_twice_is_refused_in_windows_too(x):
    cam = GradCAM(Twice().double(), "block.act", sliding_window=WindowPlan(4))
    with pytest.raises(LayerError, match="ran 2 times"):
        cam(x, VOLUME)


def test_the_pooled_vector_of_a_classifier_is_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(LayerError, match="'3'"):
        GradCAM(net, "3")(torch.rand(1, 1, 8, 8), VOLUME)


# ---------------------------------------------------------------- layers that others may do without


class Odd(Net):
    """Has layers of every kind that gives no map, next to those that do."""

    def __init__(self):
        super().__init__()
        self.aside, self.spare, self.many = nn.Conv3d(3, 2, 1), nn.Conv3d(3, 2, 1), Branches.Many()
        self.pool = nn.Flatten()

    def forward(self, x):
        stem = self.stem(x)
        self.aside(stem)
        features = self.block.act(self.block(stem))
        self.many(features)
        return self.head(features) + self.pool(features).mean()


REASONS = {
    "aside": "does not depend on layer 'aside'",
    "spare": "'spare' did not run",
    "many": "that is a tuple",
    "pool": "pooled vectors",
    "block.act": "ran 2 times",
    "head": None,
    "stem": None,
    "block": None,
}


def test_layers_of_a_pattern_are_dropped_where_they_give_no_map(x, seed):
    net = Odd().double()
    layers = resolve_layers(net, ["*", "block.act*"])
    assert {str(layer) for layer in layers} == set(REASONS)
    seen = {layer for layer in layers if REASONS[str(layer)] is None or str(layer) == "aside"}
    with capturing(net, layers) as capture:
        for _ in range(2):  # dropped once is dropped for good
            logits = capture.forward(x)
            gradients = capture.gradients(logits, seed)
            assert [str(layer) for layer in gradients] == [
                str(layer) for layer in layers if REASONS[str(layer)] is None
            ]
            assert set(capture.activations) == seen == set(capture.shapes)
            for layer, reason in capture.dropped.items():
                assert REASONS[str(layer)] in reason
        assert set(capture.observe_layers(x)) == seen
        capture.observe(x, copy=True)
        assert set(capture.activations) == seen
    for layer, gradient in gradients.items():
        (alone,) = resolve_layers(net, layer.name)
        torch.testing.assert_close(gradient, captured(net, x, seed, alone.name)[2])


@pytest.mark.parametrize("spec", [["block.*", "stem"], ["block.t*", "head.1"]])
@pytest.mark.parametrize("network", [CheckpointedBlock, CheckpointedAll])
def test_dropping_agrees_with_checkpoints(network, spec, x, seed):
    """What is replayed in the backward pass must do as the forward pass did."""
    net = network().double()
    net.block.twice, net.block.aside = nn.ReLU(), nn.Conv3d(5, 2, 1).double()

    def forward(x):
        features = net.block.conv(x)
        net.block.aside(features)
        return net.block.twice(net.block.twice(features))

    net.block.forward = forward
    layers = resolve_layers(net, spec)
    with capturing(net, layers) as capture:
        gradients = capture.gradients(capture.forward(x), seed)
    kept = {"block.conv", "stem"} if "stem" in spec else {"head.1"}
    assert {str(layer) for layer in gradients} == kept
    assert set(capture.dropped) == set(layers) - set(gradients)


def test_a_layer_that_is_also_named_is_required(x):
    net = Odd().double()
    layers = resolve_layers(net, ["*", "spare"])
    with (
        capturing(net, layers) as capture,
        pytest.raises(LayerError, match="'spare' did not run"),
    ):
        capture.forward(x)


def test_nothing_left_is_refused_with_the_reasons(x, seed):
    net = Odd().double()
    layers = resolve_layers(net, ["s*e", "many*", "po*l", "as*"])
    message = r"none of the 4 target layers gives a map. .*spare: .* did not run.*; and 1 more$"
    with capturing(net, layers) as capture:
        logits = capture.forward(x.requires_grad_())
        with pytest.raises(LayerError, match=message):
            capture.gradients(logits, seed)


def test_all_explains_every_convolution_that_can_be(x, seed):
    net = Odd().double()
    layers = resolve_layers(net, "all")
    with capturing(net, layers) as capture:
        gradients = capture.gradients(capture.forward(x), seed)
    assert [str(layer) for layer in gradients] == ["stem", "block.conv", "head.0", "head.2"]
    assert [str(layer) for layer in capture.dropped] == ["spare", "aside"]


class DeeplySupervised(nn.Module):
    """Its head of the coarser level is compared in training; otherwise it feeds nothing."""

    def __init__(self):
        super().__init__()
        self.fine, self.down = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, 2, 1)
        self.coarse, self.up = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 2, 2, 2)
        self.joined, self.head = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.supervision = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        fine = self.fine(x).relu()
        coarse = self.coarse(self.down(fine).relu()).relu()
        aside = self.supervision(coarse)
        logits = self.head(self.joined(torch.cat([self.up(coarse), fine], 1)).relu())
        return [logits, aside] if self.training else logits


def dynunet():
    kernels, strides = (3, 3, 3), (1, 2, 2)
    return DynUNet(2, 1, 2, kernels, strides, (2, 2), filters=(2, 3, 4), deep_supervision=True)


#: Network -> how it is made, the head that feeds nothing, and two of its other layers.
SUPERVISED = {
    "small": (DeeplySupervised, "supervision", ["fine", "head"]),
    "DynUNet": (
        dynunet,
        "deep_supervision_heads.0.conv.conv",
        ["input_block.conv1.conv", "output_block.conv.conv"],
    ),
}


@functools.cache
def supervised(name):
    """Return a network, the same one for all tests, so that its grids are measured once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SUPERVISED[name][0]().eval()


# Windows do not depend on the network, and the small one is measured in a moment.
@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("small", None),
        ("small", WindowPlan(8, cache_gb=0)),
        ("small", WindowPlan(8)),
        pytest.param("DynUNet", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("other", [AblationCAM, EigenCAM, GradCAMPlusPlus])
@pytest.mark.filterwarnings("ignore::seg3dcam.errors.Seg3dcamWarning")
def test_a_layer_without_a_gradient_does_not_stop_the_others(other, name, plan):
    """In training this network's heads of the coarser levels are compared; here they feed nothing.

    Later passes, for which it was said that this layer is there, must still find it.
    """
    net, (_, head, names) = supervised(name), SUPERVISED[name]
    x = torch.rand(2, 1, 8, 16, generator=torch.Generator().manual_seed(1))
    cams, alone = (
        [HiResCAM(net, layers, sliding_window=plan), other(net, layers, sliding_window=plan)]
        for layers in ("all", names)
    )
    found = each_by(cams, x, [VOLUME])[0]
    for result, expected in zip(found, each_by(alone, x, [VOLUME])[0], strict=True):
        assert "does not depend on" in result.dropped[head]
        assert head not in result.layers
        assert len(result.layers) > 5
        for layer in names:
            torch.testing.assert_close(result.layers[layer].values, expected.layers[layer].values)
    of_gradients = cams[1].formula.gradients_at == "layers"
    assert head in other(net, "all", sliding_window=plan)(x, VOLUME).dropped or not of_gradients


# --------------------------------------------------------------------- more than the first gradient


class Smooth(nn.Module):
    """A network with second derivatives; layers in three layouts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, 2)
        self.tokens, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.inner = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.ConvTranspose2d(3, 2, 2, 2)
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.behind(self.with_class_token(self.embed(x)), x.shape[2] // 2)

    def with_class_token(self, grid):
        tokens = grid.flatten(2).transpose(1, 2)
        return self.tokens(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))

    def behind(self, tokens, height):
        tokens = (tokens * tokens[:, :1]).sigmoid()[:, 1:]
        grid = self.last(tokens.unflatten(1, (height, -1)))
        return self.after(grid.movedim(-1, 1))

    def after(self, grid):
        return self.head(self.inplace(self.inner(torch.tanh(grid))))


@pytest.fixture
def smooth():
    return seeded(Smooth())


@pytest.fixture
def image():
    return torch.rand(2, 1, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_scaling_channels_keeps_the_class_token(smooth, image):
    scale = torch.tensor([[0, 1, 2, 0.3, 1], [1, 1, 0, 1, -1]], dtype=torch.float64)
    tokens = smooth.with_class_token(smooth.embed(image))
    factors = torch.cat([torch.ones_like(tokens[:, :1]), scale[:, None].expand(-1, 24, -1)], 1)
    expected = smooth.behind(tokens * factors, 4).detach()
    layers = resolve_layers(smooth, ["tokens", "embed"])
    with capturing(smooth, layers) as capture:
        logits = capture.observe(image, copy=True)
        before = capture.activations
        found = capture.scaled(image, layers[0], scale)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert not found.requires_grad
        assert (found - logits).abs().max() > 0.01
        torch.testing.assert_close(capture.activations, before, rtol=0, atol=0)
        torch.testing.assert_close(capture.scaled(image, layers[0], scale * 0 + 1), logits)


@pytest.mark.parametrize("layer", ["last", "inner"])
def test_scaling_channels_of_a_grid(layer, smooth, image):
    """Three copies of one input, each without one channel: as Ablation-CAM does."""
    layers = resolve_layers(smooth, layer)
    scale = 1 - torch.eye(3, dtype=torch.float64)
    with capturing(smooth, layers) as capture:
        capture.observe(image, copy=False)
        found = capture.scaled(image[:1].expand(3, -1, -1, -1), layers[0], scale)
    for channel in range(3):
        module = getattr(smooth, layer)
        silent = copy.deepcopy(smooth)
        with torch.no_grad():
            getattr(silent, layer).weight[channel] = 0
            getattr(silent, layer).bias[channel] = 0
            torch.testing.assert_close(found[channel : channel + 1], silent(image[:1]))
        assert not module._forward_hooks


def test_scaling_needs_a_pass_of_this_size(smooth, image):
    layers = resolve_layers(smooth, "inner")
    with capturing(smooth, layers) as capture:
        for seen in (None, image[..., :8]):
            if seen is not None:
                capture.observe(seen, copy=False)
            with pytest.raises(ValueError, match=r"no pass over inputs \(2, 1, 8, 12\) has shown"):
                capture.scaled(image, layers[0], torch.ones(2, 3))


@pytest.mark.parametrize("caller", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_second_derivatives(caller, smooth, image):
    """H a, computed whole, of a score that is not linear in the logits either."""
    tokens = smooth.with_class_token(smooth.embed(image)).detach()
    grid = smooth.last((tokens * tokens[:, :1]).sigmoid()[:, 1:].unflatten(1, (4, -1))).detach()

    def score(logits):
        return (logits**3).sum()

    def of_tokens(flat):
        return score(smooth.behind(flat.view_as(tokens), 4))

    def of_grid(flat):
        return score(smooth.after(flat.view_as(grid).movedim(-1, 1)))

    whole = torch.autograd.functional.hessian
    after_class = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, 1:]], 1)
    expected_tokens = (whole(of_tokens, tokens.flatten()) @ after_class.flatten()).view_as(tokens)
    expected_tokens = expected_tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    expected_grid = (whole(of_grid, grid.flatten()) @ grid.flatten()).view_as(grid).movedim(-1, 1)

    layers = resolve_layers(smooth, ["tokens", "last"])
    with caller(), capturing(smooth, layers) as capture:
        value = score(capture.forward(image))
        gradients = capture.gradients(value, torch.ones_like(value), create_graph=True)
        activations = capture.activations
        found = [
            capture.derivative((gradients[layer] * activations[layer]).sum(), layer)
            for layer in layers
        ]
    assert expected_grid.abs().max() > 1e-3
    torch.testing.assert_close(found, [expected_tokens, expected_grid], rtol=1e-9, atol=1e-12)
    assert not found[0].requires_grad


@pytest.mark.parametrize("network", [Net, CheckpointedHead, CheckpointedAll])
def test_a_piecewise_linear_network_has_no_second_derivative(network, x, seed):
    net = network(inplace=True).double()
    layers = resolve_layers(net, TARGET)
    with capturing(net, layers) as capture:
        gradients = capture.gradients(capture.forward(x), seed, create_graph=True)
        (product,) = (
            (g * a).sum()
            for g, a in zip(gradients.values(), capture.activations.values(), strict=True)
        )
        found = capture.derivative(product, layers[0])
    torch.testing.assert_close(found, torch.zeros_like(gradients[layers[0]]), rtol=0, atol=0)


@pytest.mark.parametrize("network", [Net, CheckpointedBlock, CheckpointedAll])
def test_the_input_may_be_a_layer(network, x, seed):
    net = network(inplace=True).double()
    layers = [INPUT, *resolve_layers(net, TARGET)]
    with capturing(net, layers) as capture:
        gradients = capture.gradients(capture.forward(x), seed)
        activations, shapes = capture.activations, capture.shapes
        torch.testing.assert_close(capture.observe_layers(x), activations)
    leaf = x.clone().requires_grad_()
    twin = copy.deepcopy(net).eval()
    (expected,) = torch.autograd.grad(twin(leaf), leaf, seed)
    torch.testing.assert_close(gradients[INPUT], expected)
    torch.testing.assert_close(activations[INPUT], x)
    assert shapes[INPUT] == tuple(x.shape[2:])
    torch.testing.assert_close(gradients[layers[1]], truth(net, x, seed)[1])


# ----------------------------------------------------------------------------- networks that fail


class Failing(Net):
    error: BaseException = RuntimeError("the head is broken")

    def forward(self, x):
        self.block(self.stem(x))
        raise self.error


def test_a_failing_network_is_a_model_error_that_keeps_the_cause(x):
    net = Failing().double()
    with pytest.raises(ModelError, match=r"shape \(2, 1, 6, 8, 4\): the head is broken") as caught:
        GradCAM(net, TARGET)(x, VOLUME)
    assert caught.value.__cause__ is net.error


def test_a_size_that_does_not_fit_gets_the_hint():
    class Skip(Net):
        def forward(self, x):
            return super().forward(x) + x

    odd = torch.rand(1, 1, 5, 8, 4)
    with pytest.raises(ModelError, match=r"multiples of their coarsest stride: pad the input"):
        GradCAM(Skip(), TARGET)(odd, VOLUME)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_what_is_not_the_networks_fault_passes_through(error, x):
    net = Failing().double()
    net.error = error
    with pytest.raises(type(error)) as caught:
        GradCAM(net, TARGET)(x, VOLUME)
    # What does not fit in memory comes with advice, and is still torch's own kind of error.
    assert caught.value is error or caught.value.__cause__ is error


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["plain", "DataParallel"])
@pytest.mark.parametrize("make", ["script", "trace"])
def test_torchscript_is_refused(make, wrap, x):
    net = Net()
    script = torch.jit.script(net) if make == "script" else torch.jit.trace(net, x.float())
    with pytest.raises(ModelError, match=r"TorchScript model takes no hooks.*load_state_dict"):
        GradCAM(wrap(script), TARGET)(x.float(), VOLUME)


def test_a_function_is_no_model():
    with pytest.raises(ModelError, match=r"must be a torch.nn.Module, got function"):
        GradCAM(lambda x: x, TARGET)
