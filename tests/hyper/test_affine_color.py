"""Affine and colour augmentation: what each strength does, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper import AffineColorAugmentation
from ift_tune.hyper.affine_color import STARTS, affine_matrices

OFF = dict.fromkeys(STARTS, 1e-9)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2.0 - 1.0


def make(**strengths: float) -> AffineColorAugmentation:
    return AffineColorAugmentation(starts=OFF | strengths, like=images(1))


def matrices(
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    scale: float = 0.0,
    shear: float = 0.0,
    aspect: float = 1.0,
) -> Tensor:
    one = [torch.tensor([v], dtype=torch.float64) for v in (angle, scale, shear)]
    where = torch.tensor([shift], dtype=torch.float64)
    return affine_matrices(one[0], where, one[1], one[2], aspect=aspect)


def moved(x: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear, which reproduces ramps exactly."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def test_weakest_strengths_change_nothing() -> None:
    x = images(4, 2, 9, 6)
    torch.testing.assert_close(make().inputs(x, None), x, rtol=0.0, atol=1e-6)


def test_a_quarter_turn_is_rot90() -> None:
    x = images(1, 1, 6, 6)
    found = moved(x, matrices(angle=math.pi / 2))
    assert any(torch.allclose(found, torch.rot90(x, k, (2, 3))) for k in (1, 3))


def test_a_turn_is_one_in_pixels_of_oblong_images() -> None:
    """Turned by 90 degrees about the centre, pixel (0, 1) from there goes to distance 1 again."""
    x = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    x[0, 0, 2, 5] = 1.0
    found = moved(x, matrices(angle=math.pi / 2, aspect=9 / 5))
    expected = torch.zeros_like(x)
    expected[0, 0, 1, 4] = 1.0
    assert any(torch.allclose(found, e, atol=1e-9) for e in (expected, expected.flip(2)))


def test_a_shift_is_a_fraction_of_width_and_height() -> None:
    x = images(1, 1, 8, 8)
    found = moved(x, matrices(shift=(0.25, -0.125)))  # 2 pixels right, 1 up
    torch.testing.assert_close(found[..., :7, 2:], x[..., 1:, :6])
    torch.testing.assert_close(found[..., :7, 0], x[..., 1:, 0])  # the border goes on


def test_scale_magnifies_about_the_centre() -> None:
    ramp = torch.linspace(-1.0, 1.0, 16, dtype=torch.float64).expand(1, 1, 16, 16)
    found = moved(ramp, matrices(scale=math.log(2.0)))
    torch.testing.assert_close(found[..., 4:12, 4:12], 0.5 * ramp[..., 4:12, 4:12])


def test_shear_pushes_rows_aside_by_their_height() -> None:
    ramp = torch.arange(16, dtype=torch.float64).expand(1, 1, 16, 16)
    found = moved(ramp, matrices(shear=0.5))
    height = torch.arange(16, dtype=torch.float64)[:, None] - 7.5
    inside = (slice(None), slice(None), slice(4, 12), slice(4, 12))
    torch.testing.assert_close(found[inside], (ramp + 0.5 * height)[inside])


def test_brightness_is_one_shift_of_an_image_of_that_deviation() -> None:
    x = images(4000, 1, 2, 2)
    added = (make(brightness=0.1).inputs(x, None).detach() - x).flatten(1)
    assert float((added - added[:, :1]).abs().max()) < 1e-6
    assert float(added[:, 0].std()) == pytest.approx(0.2, rel=0.05)


def test_noise_is_each_pixels_own_of_that_deviation() -> None:
    x = images(1000, 1, 4, 4)
    added = (make(noise=0.1).inputs(x, None).detach() - x).flatten(1)
    assert float(added.std()) == pytest.approx(0.2, rel=0.05)
    assert float(torch.corrcoef(added[:, :2].T)[0, 1]) == pytest.approx(0.0, abs=0.15)


def test_contrast_is_a_log_normal_factor_about_the_mean() -> None:
    x = images(4000, 1, 2, 2)
    found = make(contrast=0.3).inputs(x, None).detach()
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(found.mean(dim=(1, 2, 3), keepdim=True), mean, atol=1e-6, rtol=0.0)
    factors = ((found - mean) / (x - mean)).flatten(1)
    assert float((factors / factors[:, :1] - 1.0).abs().max()) < 1e-3
    assert float(factors[:, 0].log().std()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("name", STARTS)
def test_each_strength_reaches_the_images_by_a_derivative_that_is_right(name: str) -> None:
    """In every pixel, against central differences: C¹ resampling, so all seeds pass."""
    kind = AffineColorAugmentation(starts={name: 3.0 * STARTS[name]}, like=images(1))
    x, weights, place = images(3, 1, 7, 7), images(3, 1, 7, 7).flip(0), list(STARTS).index(name)

    def value() -> Tensor:
        torch.manual_seed(4)
        return (weights * kind.inputs(x, None)).sum()

    (gradient,) = torch.autograd.grad(value(), kind.raw)
    with torch.no_grad():
        ends = []
        for step in (1e-5, -2e-5):
            kind.raw[place] += step
            ends.append(float(value()))
    assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)
    assert float(gradient[place]) != 0.0


def test_rows_of_pixels_are_seen_as_images_and_come_back_as_rows() -> None:
    x = images(3, 2, 5, 4)
    rows = AffineColorAugmentation(shape=(2, 5, 4), like=x)
    torch.manual_seed(2)
    as_images = rows.inputs(x, None)
    torch.manual_seed(2)
    assert torch.equal(rows.inputs(x.flatten(1), None), as_images.flatten(1))
    with pytest.raises(UsageError, match="shape="):
        AffineColorAugmentation().inputs(x.flatten(1), None)


def test_the_coarse_space_sets_the_strengths() -> None:
    kind = AffineColorAugmentation()
    space = kind.coarse_space()
    assert list(space) == list(STARTS)
    assert all(k.low < k.start < k.high for k in space.values())
    assert {n: k.start for n, k in space.items()} == pytest.approx(STARTS)
    values = {name: 2.0 * parameter.start for name, parameter in space.items()}
    kind.set_coarse(values)
    assert kind.summary() == pytest.approx(values)


@pytest.mark.parametrize("starts", [{"rotate": 1.0}, {"scale": 0.0}, {"noise": math.inf}])
def test_wrong_strengths_are_refused(starts: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="strength"):
        AffineColorAugmentation(starts=starts)
