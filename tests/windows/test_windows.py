"""Windows: MONAI's prediction, exact gradients through the stitching, blending, memory limits."""

from __future__ import annotations

import pytest
import torch
import toy
from helpers_engine import slow_unless
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from torch import nn

from seg3dcam import GradCAM, HiResCAM, SliceGradCAM, WindowPlan, XResCAM, targets
from seg3dcam.errors import ConfigError, ModelError, Seg3dcamWarning
from seg3dcam.geometry import FeatureGrid, interpolate
from seg3dcam.windows import Blend, Windows, plan_windows

LAYER = "model.1.submodule"


def unet(norm: str = "batch") -> nn.Module:
    torch.manual_seed(0)
    network = UNet(3, 1, 3, (4, 8, 12), (2, 2), num_res_units=1, norm=norm)
    for module in network.modules():  # statistics as after training, so that no feature is empty
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.double().eval()


def volume(*shape: int) -> torch.Tensor:
    return torch.rand(1, 1, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


PLANS = {
    "gaussian, misaligned": (WindowPlan(16, overlap=0.4), (21, 27, 18)),
    "constant, aligned": (WindowPlan(16, overlap=0.5, mode="constant"), (24, 32, 16)),
    "batches of 3": (WindowPlan(16, overlap=0.25, sw_batch_size=3), (20, 24, 33)),
    "smaller than the window": (WindowPlan(24, overlap=0.5), (13, 30, 24)),
    "another size on each axis": (WindowPlan((16, 12, 8), overlap=(0.5, 0.25, 0)), (18, 22, 20)),
    "reflected padding": (WindowPlan(24, overlap=0.5, padding_mode="reflect"), (15, 24, 29)),
    "one axis whole": (WindowPlan((16, -1, 16), overlap=0.5), (20, 16, 20)),
}


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def case(request: pytest.FixtureRequest) -> tuple[WindowPlan, torch.Tensor]:
    plan, shape = request.param
    return plan, volume(*shape)


def through_monai(
    network: nn.Module, x: torch.Tensor, plan: WindowPlan, activations: list | None = None
) -> torch.Tensor:
    """Predict with MONAI, in one autograd graph if `activations` collects the layer's tensors."""
    places: list = []

    def predictor(batch: torch.Tensor, coordinates: list) -> torch.Tensor:
        places.extend(coordinates)
        return network(batch).clone()

    def collect(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        activations.append(leaf)
        return leaf.clone()

    hook = (
        network.get_submodule(LAYER).register_forward_hook(collect)
        if activations is not None
        else None
    )
    logits = sliding_window_inference(
        x,
        plan.roi_size,
        plan.sw_batch_size,
        predictor,
        overlap=plan.overlap,
        mode=plan.mode,
        padding_mode=plan.padding_mode,
        with_coord=True,
    )
    if hook is not None:
        hook.remove()
    return logits


@pytest.mark.few(3)
def test_the_prediction_is_monais(case: tuple[WindowPlan, torch.Tensor]) -> None:
    plan, x = case
    network = toy.shared(unet)
    result = HiResCAM(network, LAYER, sliding_window=plan)(x, targets.ClassLogit(1))
    assert torch.equal(result.logits, through_monai(network, x, plan).detach())


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "target",
    [
        slow_unless(True, targets.ClassLogOdds(1), name="log-odds"),
        slow_unless(False, targets.ClassProbability(2, region="volume"), name="probability"),
        slow_unless(False, targets.MaskOutput(), name="mask output"),
        slow_unless(
            False,
            lambda logits: (logits.softmax(1)[:, 1] ** 2).flatten(1).mean(1).sqrt(),
            name="a nonlinear function",
        ),
    ],
)
@pytest.mark.parametrize("norm", ["batch", slow_unless(False, "instance")])
def test_hires_cam_is_the_gradient_of_one_giant_graph(
    case: tuple[WindowPlan, torch.Tensor], target, norm: str
) -> None:
    """Sum over windows of gradient x activation, all taken from one graph through MONAI."""
    plan, x = case
    network = toy.shared(unet, norm)
    result = HiResCAM(network, LAYER, sliding_window=plan)(x, target)

    batches: list[torch.Tensor] = []
    logits = through_monai(network, x, plan, batches)
    gradients = torch.autograd.grad(target(logits).sum(), batches)
    windows = plan_windows(plan, x.shape[2:])
    maps = torch.cat([(a * g).sum(1) for a, g in zip(batches, gradients, strict=True)]).detach()
    expected = place_by_hand(maps, windows)

    found = result.maps[LAYER][0]
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def place_by_hand(
    maps: torch.Tensor, windows: Windows, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Add windows' maps of a stride-2 layer (feature u at voxel 2u) and interpolate to voxels.

    Along an axis where every window starts on the layer's grid the maps are added there, otherwise
    at voxels. With `weights` (*roi), the weighted mean is taken instead of the sum.
    """
    rows = zip(*windows.starts, strict=True)
    steps = [2 if all(start % 2 == 0 for start in row) else 1 for row in rows]
    grid = FeatureGrid(tuple(maps.shape[1:]), (2.0,) * 3, (0.0,) * 3)
    sizes = tuple(roi // step for roi, step in zip(windows.roi, steps, strict=True))
    maps = interpolate(maps, grid, FeatureGrid(sizes, tuple(map(float, steps)), (0.0,) * 3))
    places = tuple(slice(None, None, step) for step in steps)
    importance = torch.ones(maps.shape[1:]) if weights is None else weights[places]
    shape = [n // step for n, step in zip(windows.padded_shape, steps, strict=True)]
    total = torch.zeros(shape, dtype=maps.dtype)
    norm = torch.zeros_like(total)
    for values, start in zip(maps, windows.starts, strict=True):
        place = tuple(
            slice(s // step, s // step + n)
            for s, step, n in zip(start, steps, values.shape, strict=True)
        )
        total[place] += values * importance
        norm[place] += importance
    if weights is not None:
        total /= norm
    before = tuple(float(-b) for b in windows.before)
    grid = FeatureGrid(tuple(total.shape), tuple(map(float, steps)), before)
    return interpolate(total, grid, FeatureGrid.of_voxels(windows.shape))


@pytest.mark.few(5)
@pytest.mark.parametrize("region", ["box", "volume"])
def test_grad_cam_pools_its_weights_over_all_windows(
    case: tuple[WindowPlan, torch.Tensor], region: str
) -> None:
    """Weights: gradients of the giant graph over all windows; maps: blended by MONAI's shares."""
    plan, x = case
    where = targets.Box((2, 3, 1), (7, 8, 6)) if region == "box" else "volume"
    target = targets.ClassLogit(1, region=where)
    network = toy.shared(unet)
    result = GradCAM(network, LAYER, sliding_window=plan)(x, target)

    batches: list[torch.Tensor] = []
    logits = through_monai(network, x, plan, batches)
    gradients = torch.cat(torch.autograd.grad(target(logits).sum(), batches))
    windows = plan_windows(plan, x.shape[2:])
    activations = torch.cat(batches).detach()
    voxels = 1.0
    for padded, roi, size in zip(
        windows.padded_shape, windows.roi, activations.shape[2:], strict=True
    ):
        voxels *= padded / roi * size
    weights = gradients.sum((0, 2, 3, 4)) / voxels
    maps = (weights[:, None, None, None] * activations).sum(1)

    expected = place_by_hand(maps, windows, windows.importance)

    found = result.maps[LAYER][0]
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("cam", [GradCAM, SliceGradCAM, HiResCAM, XResCAM])
def test_one_window_and_no_window_give_the_plain_numbers(cam) -> None:
    network, x = toy.shared(unet), volume(16, 20, 12)
    plain = cam(network, LAYER)(x, targets.ClassLogit(1))
    for plan in (WindowPlan((16, 20, 12)), WindowPlan(-1), WindowPlan((16, 20, 12), overlap=0.9)):
        windowed = cam(network, LAYER, sliding_window=plan)(x, targets.ClassLogit(1))
        assert torch.equal(windowed.maps[LAYER], plain.maps[LAYER])
        assert torch.equal(windowed.native[LAYER], plain.native[LAYER])
        assert torch.equal(windowed.score, plain.score)


def test_slice_weights_of_whole_axes_are_pooled_over_a_row_of_windows() -> None:
    """Windows side by side in y and x share the weights of a slice: the same as without windows.

    The network looks at each voxel alone, so cutting it into windows changes nothing but how the
    gradient's mean is taken.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Tanh(), nn.Conv3d(4, 2, 1)).double()
    x = volume(8, 12, 12)
    target = targets.ClassProbability(1, region="volume")
    for cam in (SliceGradCAM, GradCAM, HiResCAM):
        plain = cam(network, "1")(x, target).maps["1"]
        for plan in (
            WindowPlan((8, 6, 6), overlap=0, mode="constant"),
            WindowPlan((4, 6, 6), overlap=0, mode="constant"),
        ):
            windowed = cam(network, "1", sliding_window=plan)(x, target).maps["1"]
            torch.testing.assert_close(windowed, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid_stride", [1, 2, 4])
def test_a_constant_stays_constant_through_blending(
    case: tuple[WindowPlan, torch.Tensor], grid_stride: int
) -> None:
    plan, x = case
    windows = plan_windows(plan, x.shape[2:])
    shape = tuple(-(-r // grid_stride) for r in windows.roi)
    grid = FeatureGrid(shape, (float(grid_stride),) * 3, ((grid_stride - 1) / 2,) * 3)
    blend = Blend(windows, grid, torch.zeros(1, dtype=torch.double))
    group = blend.group()
    for window in range(len(windows)):
        group.add(window, torch.full((1, *shape), 7.0, dtype=torch.double))
    group.finish()
    voxels = interpolate(blend.total, blend.grid, FeatureGrid.of_voxels(x.shape[2:]))
    torch.testing.assert_close(voxels, torch.full_like(voxels, 7.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "cache_gb", [0.0, 2e-5, 2.0], ids=["nothing kept", "some kept", "all kept"]
)
def test_activations_kept_or_computed_again_give_the_same_map(cache_gb: float) -> None:
    network, x = toy.shared(unet), volume(24, 32, 24)
    target = targets.ClassLogit(1, region=targets.Box((0, 0, 0), (6, 6, 6)))
    plan = WindowPlan(16, overlap=0.5, sw_batch_size=2)
    reference = GradCAM(network, LAYER, sliding_window=plan)(x, target).maps[LAYER]
    limited = WindowPlan(16, overlap=0.5, sw_batch_size=2, cache_gb=cache_gb)
    found = GradCAM(network, LAYER, sliding_window=limited)(x, target).maps[LAYER]
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-15)


def test_a_window_without_a_seed_gets_no_backward_pass() -> None:
    network, x = unet(), volume(16, 16, 64)
    runs = []
    plan = WindowPlan(16, overlap=0)
    target = targets.ClassLogit(1, region=targets.Voxel((3, 3, 20)))
    HiResCAM(network, LAYER, sliding_window=plan)(x, target)  # gets to know the network
    network.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    result = HiResCAM(network, LAYER, sliding_window=plan)(x, target)
    network._forward_hooks.clear()
    assert result.windows == 4
    assert runs.count(False) >= 4, "the first pass runs every window without a graph"
    assert runs.count(True) == 1, "only the window around the voxel is run with one"
    outside = torch.cat([result.maps[LAYER][..., :14], result.maps[LAYER][..., 34:]], -1)
    assert not outside.any()
    assert result.maps[LAYER][..., 16:32].any()


@pytest.mark.slow
def test_a_batch_in_windows_gives_what_its_items_give_alone() -> None:
    network = toy.shared(unet)
    x = torch.cat([volume(20, 18, 16), 1 - volume(20, 18, 16)])
    plan = WindowPlan(12, overlap=0.5, sw_batch_size=4)
    target = targets.ClassLogit(1, region="volume")
    for cam in (GradCAM, HiResCAM, SliceGradCAM):
        together = cam(network, LAYER, sliding_window=plan)(x, target)
        for item in range(2):
            alone = cam(network, LAYER, sliding_window=plan)(x[item : item + 1], target)
            torch.testing.assert_close(together.maps[LAYER][item], alone.maps[LAYER][0])
            torch.testing.assert_close(together.score[item], alone.score[0])


def test_several_targets_share_the_prediction_and_give_what_each_gives_alone() -> None:
    network, x = toy.shared(unet), volume(20, 18, 16)
    plan = WindowPlan(12, overlap=0.5)
    wanted = [targets.ClassLogit(c, region="volume") for c in range(3)]
    for window in (plan, None):
        x_fit = x[..., :16, :16, :] if window is None else x
        cam = GradCAM(network, [LAYER, "model.0"], sliding_window=window)
        for target, result in zip(wanted, cam.each(x_fit, wanted), strict=True):
            alone = cam(x_fit, target)
            for layer in (LAYER, "model.0"):
                torch.testing.assert_close(result.maps[layer], alone.maps[layer])


def test_the_seam_is_no_stronger_than_the_map_elsewhere() -> None:
    """Weights and scaling of each window's own, as other tools do, leave steps at its borders."""
    network, x = toy.shared(unet), volume(16, 16, 48)
    plan = WindowPlan(16, overlap=0.5)
    found = GradCAM(network, LAYER, sliding_window=plan)(x, targets.ClassLogit(1, "volume"))
    steps = found.maps[LAYER][0].diff(dim=-1).abs().mean((0, 1))
    borders = steps[[7, 15, 23, 31, 39]]
    assert borders.mean() < 2 * steps.mean()


def test_native_maps_exist_for_one_window_only() -> None:
    from seg3dcam.errors import InputError

    result = HiResCAM(toy.shared(unet), LAYER, sliding_window=WindowPlan(12))(
        volume(20, 12, 12), targets.ClassLogit(1, "volume")
    )
    with pytest.raises(InputError, match=r"cut into 2 windows.*use .maps"):
        _ = result.native


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi_size": 16, "overlap": 1.0}, r"overlap 1.0: a fraction, 0 <= overlap < 1"),
        ({"roi_size": 16, "mode": "hann"}, r"'hann': legal are 'gaussian' and 'constant'"),
        ({"roi_size": 16, "sw_batch_size": 0}, r"sw_batch_size 0"),
        *(
            (
                {"roi_size": size},
                r"roi_size .*: whole numbers of voxels from 1 up",
            )
            for size in (0, -2, 2.5, True, "16", None, (16, 0, 16), (16, 2.5, 16))
        ),
    ],
)
def test_settings_that_make_no_windows_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowPlan(**settings)


def test_a_plan_for_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"roi_size \(16, 16\) has 2 numbers; the volume has 3"):
        plan_windows(WindowPlan((16, 16)), (20, 20, 20))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "constant"])
def test_a_volume_is_padded_by_the_value_only_where_the_mode_takes_one(mode: str) -> None:
    windows = plan_windows(WindowPlan((9, 6), padding_mode=mode, cval=0.5), (6, 6))
    x = torch.rand(2, 1, 6, 6)
    value = 0.5 if mode == "constant" else None
    padded = windows.pad(x)
    assert torch.equal(padded, nn.functional.pad(x, (0, 0, 1, 2), mode, value))
    assert torch.equal(windows.crop(padded), x)


def test_windows_of_a_network_that_halves_its_output_are_refused() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1), nn.Conv3d(2, 2, 1)).double()
    with pytest.raises(ModelError, match=r"logits of shape .* for a window of \(8, 8, 8\)"):
        HiResCAM(network, "0", sliding_window=WindowPlan(8))(volume(16, 8, 8), targets.MaskOutput())


@pytest.mark.few(3)
@pytest.mark.parametrize("cam", [GradCAM, SliceGradCAM, HiResCAM])
@pytest.mark.parametrize("overlap", [0.3, 0.5])
def test_a_constant_map_through_windows_is_degenerate(cam, overlap: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Sigmoid(), nn.Conv3d(4, 2, 1))
    network[2].weight.data.abs_()
    plan = WindowPlan(8, overlap=overlap)
    with pytest.warns(Seg3dcamWarning, match="the same value everywhere"):
        result = cam(network, "1", sliding_window=plan)(
            torch.ones(1, 1, 20, 17, 12), targets.ClassLogit(1, "volume")
        )
    assert result.status["1"] == "degenerate"
    assert not result.volume().any()
    assert not result.volume(scale="minmax").any()


def cancelling() -> nn.Module:
    """Two channels whose gradients cancel in the mean, up to rounding."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.Conv3d(2, 1, 3, padding=1))
    network[0].weight.data.fill_(1.0)
    kernel = torch.rand(1, 1, 3, 3, 3)
    network[1].weight.data = torch.cat([kernel, -kernel], 1)
    return network


@pytest.mark.few(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("region", ["volume", targets.Box((4, 4, 4), (8, 8, 8))])
@pytest.mark.parametrize("window", [None, WindowPlan(16, overlap=0.5)])
def test_rounding_noise_is_no_map(dtype, region, window) -> None:
    network = toy.shared(toy.converted, toy.shared(cancelling), dtype)
    x, target = volume(32, 32, 32).float(), targets.ClassLogit(0, region)
    with pytest.warns(Seg3dcamWarning, match="contributions cancel"):
        result = GradCAM(network, "0", sliding_window=window)(x, target)
    assert result.status["0"] == "zero"
    assert not result.volume().any()


@pytest.mark.slow
def test_one_voxel_of_a_large_volume_is_enough_for_a_map() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv3d(4, 1, 1))
    network[2].weight.data.abs_()
    result = GradCAM(network, "1")(
        torch.rand(1, 1, 48, 48, 48), targets.ClassLogit(0, targets.Voxel((3, 4, 5)))
    )
    assert result.status["1"] == "ok"


def biased() -> nn.Module:
    """Return a network whose score overflows in half precision if it is summed there."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Softplus(), nn.Conv3d(4, 2, 1))
    network[2].bias.data.fill_(40.0)
    return network


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, slow_unless(False, WindowPlan(8, overlap=0.5))])
def test_a_model_of_another_precision_than_the_input(dtype, window) -> None:
    network, x = toy.shared(biased), volume(16, 16, 16).float()
    single = HiResCAM(network, "1", sliding_window=window)(x, targets.MaskOutput())
    network = toy.shared(toy.converted, network, dtype)
    other = HiResCAM(network, "1", sliding_window=window)(x, targets.MaskOutput())
    assert other.maps["1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(other.score.float(), single.score, rtol=1e-2, atol=0)


@pytest.mark.parametrize("window", [None, WindowPlan(8, overlap=0.5), WindowPlan(16)])
def test_a_network_that_changes_its_input_in_place_does_not_change_the_users(window) -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 1))
    x = torch.randn(1, 1, 16, 16, 16)
    before = x.clone()
    HiResCAM(network, "1", sliding_window=window)(
        x, lambda logits: logits.square().sum((1, 2, 3, 4))
    )
    assert torch.equal(x, before)


def test_evidence_in_padding_alone_is_no_map() -> None:
    network = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.Conv3d(1, 1, 1, bias=False))
    for module in network:
        module.weight.data.fill_(1.0)
    plan = WindowPlan(16, padding_mode="constant", cval=5.0)
    with pytest.warns(Seg3dcamWarning):
        result = HiResCAM(network, "0", sliding_window=plan)(
            -torch.rand(1, 1, 8, 8, 8), lambda logits: logits.flatten(1).sum(1)
        )
    assert result.status["0"] == "zero"
