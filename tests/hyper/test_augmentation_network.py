"""The learned augmentation network: the paper's size, any image size, noise from torch alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper import AugmentationNetwork


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_for_colour_images_it_has_the_papers_number_of_weights() -> None:
    assert AugmentationNetwork(3).count == 6659


@pytest.mark.parametrize(("channels", "depth", "width"), [(1, 1, 4), (1, 2, 8), (2, 3, 5)])
def test_number_of_weights_in_closed_form(channels: int, depth: int, width: int) -> None:
    widths = [width * 2**level for level in range(depth)]
    expected = widths[0] * channels + channels
    for before, after in zip([channels + 1, *widths], widths, strict=False):
        expected += 9 * after * (before + after) + 2 * after  # two convolutions
    for w in widths[:-1]:
        expected += 4 * 2 * w * w + w  # up
        expected += 9 * w * (2 * w + w) + 2 * w  # two convolutions after the concatenation
    assert AugmentationNetwork(channels, depth=depth, width=width).count == expected


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (7, 4), (28, 28)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_image_size_is_kept(size: tuple[int, int], depth: int) -> None:
    x = images(2, 1, *size)
    assert AugmentationNetwork(1, depth=depth, width=2).inputs(x, None).shape == x.shape


def test_it_starts_near_the_identity_and_every_tensor_has_a_gradient() -> None:
    kind, x = AugmentationNetwork(1), images(8, 1, 12, 12)
    changed = kind.inputs(x, None)
    assert 0.0 < float((changed - x).detach().abs().mean()) < 0.05
    (changed * images(8, 1, 12, 12).flip(0)).sum().backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in kind.parameters()]
    assert all(g is not None and bool(g.abs().max() > 0.0) for g in grads)


def test_depth_one_is_two_convolutions_and_a_bounded_residual() -> None:
    kind = AugmentationNetwork(1, depth=1, width=3, start=1.0, bound=0.2)
    x = images(4, 1, 6, 6)
    torch.manual_seed(1)
    found = kind.inputs(x, None)
    torch.manual_seed(1)
    noise = torch.randn(4, 1, 6, 6)
    weights = dict(kind.named_parameters())

    def conv(tensor: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(tensor, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    hidden = torch.cat([x, noise], dim=1)
    for layer in ("down.0.0", "down.0.2"):
        hidden = conv(hidden, layer, 1)
        hidden = hidden * torch.sigmoid(hidden)
    change = 0.2 * torch.tanh(conv(hidden, "last", 0) / 0.2)
    torch.testing.assert_close(found, x + change)


def test_the_change_never_exceeds_the_bound() -> None:
    kind = AugmentationNetwork(1, bound=0.3)
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.mul_(100.0)
        x = images(4, 1, 8, 8)
        change = (kind.inputs(x, None) - x).abs().max()
    assert 0.29 < float(change) < 0.3 + 1e-6


def test_noise_comes_from_the_global_generator_and_reaches_the_images() -> None:
    kind, x = AugmentationNetwork(1, start=1.0), images(3, 1, 8, 8)
    torch.manual_seed(5)
    first, second = kind.inputs(x, None), kind.inputs(x, None)
    torch.manual_seed(5)
    again = kind.inputs(x, None)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_the_lower_resolution_is_used() -> None:
    """Far pixels matter: 5 convolutions of 3×3 at full resolution alone see 5 pixels around."""
    kind = AugmentationNetwork(1, start=1.0)
    x = images(1, 1, 32, 32).requires_grad_()
    change = kind.change(x, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(change[0, 0, 16, 16], x)
    reach = gradient[0, 0, 16].abs().nonzero()
    assert int(reach.max() - reach.min()) > 10


def test_rows_of_pixels_are_seen_as_images_and_come_back_as_rows() -> None:
    kind = AugmentationNetwork(2, shape=(2, 5, 4))
    x = images(3, 2, 5, 4)
    torch.manual_seed(2)
    as_images = kind.inputs(x, None)
    torch.manual_seed(2)
    as_rows = kind.inputs(x.flatten(1), None)
    assert torch.equal(as_rows, as_images.flatten(1))


def test_rows_without_a_shape_are_refused_with_the_mend() -> None:
    with pytest.raises(UsageError, match=r"shape=\(channels, height, width\)"):
        AugmentationNetwork(1).inputs(images(3, 16), None)


@pytest.mark.parametrize("shape", [(3, 15), (3, 4, 4)])
def test_rows_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="rows are images of shape"):
        AugmentationNetwork(1, shape=(1, 4, 4)).inputs(images(*shape), None)


def test_other_channels_are_refused_with_the_mend() -> None:
    with pytest.raises(UsageError, match="channels=3"):
        AugmentationNetwork(1).inputs(images(2, 3, 4, 4), None)


def test_bytes_are_refused() -> None:
    with pytest.raises(UsageError, match="floating-point"):
        AugmentationNetwork(1).inputs(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), None)


@pytest.mark.parametrize(
    "wrong",
    [{"depth": 0}, {"width": 0}, {"start": 0.0}, {"bound": 0.0}, {"shape": (3, 4, 4)}],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        AugmentationNetwork(1, **wrong)  # type: ignore[arg-type]


def test_it_takes_the_dtype_of_like() -> None:
    like = nn.Linear(1, 1).double().weight
    assert {p.dtype for p in AugmentationNetwork(1, like=like).parameters()} == {torch.float64}
