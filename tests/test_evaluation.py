"""Metrics against closed forms: cosines, white noise, blur, binomial tables."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from PIL import Image
from scipy import ndimage

from madit import evaluation, pictures
from madit.errors import ConfigError


def grey(y: np.ndarray) -> np.ndarray:
    """Pictures (n, row, column, 3) of lumas in [0, 1]."""
    return np.repeat(np.asarray(y)[..., None], 3, axis=-1)


def cosine(frequency: float, amplitude: float, size: int = 32) -> np.ndarray:
    """A horizontal wave in [0, 1], frequency in cycles/pixel."""
    wave = 0.5 + amplitude * np.cos(2 * np.pi * frequency * np.arange(size))
    return np.tile(wave, (size, 1))


def noise(sigma: float, n: int = 8, size: int = 64, seed: int = 0) -> np.ndarray:
    """Grey pictures with white noise of `sigma` grey levels."""
    rng = np.random.default_rng(seed)
    return grey(np.clip(0.5 + rng.normal(0, sigma / 255, (n, size, size)), 0, 1))


def test_power_of_a_cosine_is_half_its_squared_amplitude():
    wave = grey([cosine(0.25, 0.1)])
    power = float(evaluation.evaluate(wave).high_band_power)
    assert power == pytest.approx((0.1 * 255) ** 2 / 2, rel=1e-9)


def test_a_wave_below_the_band_has_no_high_band_power():
    # 2 cycles per 32 pixels: the Hann window leaks to bins 1 and 3 only, the band starts above bin 4
    assert float(evaluation.evaluate(grey([cosine(2 / 32, 0.3)])).high_band_power) < 1e-18


def test_periodogram_sums_to_the_weighted_variance():
    y = np.random.default_rng(1).normal(size=(12, 20))
    rows, columns = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(k) / k) for k in y.shape)
    window = np.outer(rows, columns)
    centred = y - (window * y).sum() / window.sum()
    expected = (window**2 * centred**2).sum() / (window**2).sum()
    assert pictures.periodogram(y).sum() == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [4.0, 12.0])
def test_white_noise_has_its_sigma_flat_spectrum_and_share_of_the_band(sigma):
    images = noise(sigma)
    table = evaluation.evaluate(images)
    assert float(table.noise_sigma) == pytest.approx(sigma, rel=0.05)
    share = (pictures.radial_frequency((64, 64)) > pictures.HIGH_BAND).mean()
    assert float(table.high_band_power) == pytest.approx(share * sigma**2, rel=0.05)
    spectrum = evaluation.radial_spectrum(images)
    np.testing.assert_allclose(spectrum.power[4:], sigma**2, rtol=0.2)
    assert float(spectrum.frequency[-1]) == 0.5


def test_noise_estimate_ignores_stripes_and_sparse_edges():
    stripes = cosine(0.25, 0.4)
    box = np.full((32, 32), 0.2)
    box[8:20, 8:20] = 0.9
    assert float(evaluation.evaluate(grey([stripes, stripes.T, box])).noise_sigma) == pytest.approx(0, abs=1e-9)


def test_radial_spectrum_of_a_blur_is_divided_by_its_transfer_function():
    y = noise(20, n=24, size=64)
    blurred = grey(ndimage.gaussian_filter(y[..., 0], (0, 1, 1), mode="wrap"))
    a, b = evaluation.radial_spectrum(y), evaluation.radial_spectrum(blurred)
    expected = np.exp(-4 * np.pi**2 * a.frequency**2)
    band = (a.frequency > 0.05) & (a.frequency < 0.3)
    np.testing.assert_allclose((b.power / a.power)[band], expected[band], rtol=0.25)
    assert (a.power_low <= a.power).all()
    assert (a.power <= a.power_high).all()


@pytest.mark.parametrize(("gain", "expected"), [(2.0, 2.0), (0.5, -2.0), (1.0, 0.0)])
def test_detail_is_two_sided(gain, expected):
    reference = np.stack([cosine(0.25, 0.1), cosine(0.375, 0.2)])
    table = evaluation.evaluate(grey(0.5 + gain * (reference - 0.5)), reference=grey(reference))
    assert float(table.log2_power_ratio) == pytest.approx(expected, abs=1e-9)
    assert float(table.detail_distance) == pytest.approx(abs(expected), abs=1e-9)


def test_one_sharp_and_one_blurred_picture_do_not_cancel():
    reference = np.stack([cosine(0.25, 0.1)] * 2)
    table = evaluation.evaluate(grey([cosine(0.25, 0.2), cosine(0.25, 0.05)]), grey(reference))
    assert float(table.log2_power_ratio) == pytest.approx(0, abs=1e-9)
    assert float(table.detail_distance) == pytest.approx(2)


def test_flat_pictures_have_the_power_of_rounding_and_a_finite_ratio():
    table = evaluation.evaluate(np.zeros((3, 32, 32, 3), np.uint8), grey([cosine(0.25, 0.1)] * 3))
    assert float(table.log2_power_ratio) == pytest.approx(np.log2((1 / 12) / ((0.1 * 255) ** 2 / 2)))


def test_unpaired_reference_compares_the_means_and_has_no_layout():
    reference = grey([cosine(0.25, a) for a in (0.1, 0.2, 0.4)])
    table = evaluation.evaluate(grey([cosine(0.25, 0.2)] * 4), reference)
    expected = np.mean([2.0, 0.0, -2.0])
    assert float(table.log2_power_ratio) == pytest.approx(expected, abs=1e-9)
    assert float(table.detail_distance) == pytest.approx(abs(expected), abs=1e-9)
    assert table.log2_power_ratio_low < 0 < table.log2_power_ratio_high
    assert "layout_ssim" not in table
    assert not table.attrs["paired"]


def test_layout_is_blind_to_fine_texture_and_sees_a_moved_shape():
    base = np.full((6, 32, 32), 0.2)
    base[:, 4:16, 4:16] = 0.8
    textured = base + 0.1 * cosine(0.5, 1.0)[None] - 0.05
    moved = base[:, ::-1, ::-1]
    same = evaluation.evaluate(grey(textured), grey(base))
    other = evaluation.evaluate(grey(moved), grey(base))
    assert float(same.layout_correlation) == pytest.approx(1, abs=1e-6)
    assert float(same.layout_ssim) > 0.99
    assert float(other.layout_correlation) < 0
    assert float(other.layout_ssim) < 0.3
    shuffled = evaluation.evaluate(noise(40, size=32, seed=1), noise(40, size=32, seed=2))
    assert abs(float(shuffled.layout_correlation)) < 0.2


def test_layout_correlation_against_numpy_on_block_means():
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 32, 32))
    small = [255 * y.reshape(8, 4, 8, 4).mean((1, 3)) for y in (a, b)]
    expected = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1]
    assert pictures.layout(255 * a, 255 * b)[0] == pytest.approx(expected, abs=1e-5)


def test_ssim_of_a_scaled_constant_is_its_luminance_term():
    a, b = np.full((8, 8), 100.0), np.full((8, 8), 50.0)
    c1 = (0.01 * 255) ** 2
    assert pictures.ssim(a, b) == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1))


def test_inputs_of_every_kind_give_the_same_table(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = evaluation.evaluate(images)
    pil = [Image.fromarray(image) for image in images]
    stored = xr.DataArray(images, dims=("sample", "pixel_row", "pixel_column", "rgb"))
    for given in (tmp_path, str(tmp_path), pil, list(images), images / 255, stored):
        xr.testing.assert_allclose(evaluation.evaluate(given), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 8, 8)), r"expected pictures \(n, row, column, 3\), got an array of shape \(2, 3, 8, 8\)"),
        (np.full((1, 8, 8, 3), 200.0), r"expected float pictures in \[0, 1\], got values from 200 to 200"),
        (np.full((1, 8, 8, 3), np.nan), "got values from nan"),
        (np.zeros((1, 8, 8, 3), int), "got int64"),
        ([np.zeros((8, 8, 3)), np.zeros((9, 8, 3))], "one size"),
        ([], "got sizes"),
        ("nowhere", "expected a folder with pictures"),
    ],
)
def test_bad_pictures_are_refused_in_one_line(images, message):
    with pytest.raises(ConfigError, match=message) as error:
        evaluation.evaluate(images)
    assert "\n" not in str(error.value)


def test_references_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="reference pictures of"):
        evaluation.evaluate(noise(3, size=32), noise(3, size=16))
    with pytest.raises(ConfigError, match="expected 8 paired reference pictures, got 4"):
        evaluation.evaluate(noise(3, size=16), noise(3, n=4, size=16), paired=True)


class _Reader:
    """Reads factor `bright` from the mean, and `left` from which half is brighter."""

    def predict(self, images):
        assert images.dtype == np.uint8
        halves = (
            images[:, :, : images.shape[2] // 2].mean((1, 2, 3)),
            images[:, :, images.shape[2] // 2 :].mean((1, 2, 3)),
        )
        return {"bright": (images.mean((1, 2, 3)) > 127).astype(int), "left": (halves[0] > halves[1]).astype(int)}


def test_accuracies_have_wilson_intervals_and_a_row_for_all_factors():
    levels = np.array([0.1, 0.2, 0.8, 0.9])
    images = np.broadcast_to(levels[:, None, None, None], (4, 8, 8, 3)).copy()
    images[:2, :, :4] += 0.1
    labels = {"bright": [0, 0, 1, 0], "left": [1, 0, 0, 0], "unread": [0, 0, 0, 0]}
    table = evaluation.evaluate(images, classifiers={"meaning": _Reader()}, labels=labels)
    assert table.accuracy.sel(factor=["bright", "left", "meaning"]).values.tolist() == [0.75, 0.75, 0.5]
    n, p, z = 4, 0.75, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = (centre - half) / (1 + z * z / n)
    assert float(table.accuracy_low.sel(factor="bright")) == pytest.approx(expected)


def test_a_callable_classifier_gets_floats_and_may_return_logits():
    def model(images):
        assert images.dtype == np.float32
        assert images.max() <= 1
        mean = images.mean((1, 2, 3))
        return {"bright": np.stack([1 - mean, mean], axis=1)}

    images = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (20, 240, 250)])
    table = evaluation.evaluate(images, classifiers=model, labels={"bright": [0, 1, 0]})
    assert table.factor.values.tolist() == ["bright"]
    assert float(table.accuracy[0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "expected labels"),
        ({"bright": [0]}, "expected 3 labels of 'bright'"),
        ({"other": [0, 0, 0]}, r"expected labels for one of \['bright', 'left'\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ConfigError, match=message):
        evaluation.evaluate(np.zeros((3, 8, 8, 3), np.uint8), classifiers=_Reader(), labels=labels)


def test_mcnemar_against_the_binomial_sum():
    a = np.array([1] * 7 + [0] * 2 + [1] * 20, bool)
    b = np.array([0] * 7 + [1] * 2 + [1] * 20, bool)
    # 2 P(X <= 2), X ~ Binomial(9, 1/2): 2 (1 + 9 + 36) / 512
    assert evaluation.mcnemar(a, b) == pytest.approx(2 * 46 / 512)
    assert evaluation.mcnemar(b, a) == evaluation.mcnemar(a, b)
    assert evaluation.mcnemar(a, a) == 1


def test_bootstrap_interval_of_a_normal_mean():
    rng = np.random.default_rng(5)
    values = rng.normal(3, 2, (400, 1))
    (low,), (high,) = evaluation._interval(values, seed=0)
    half = 1.96 * values.std() / 20
    assert float(high - low) == pytest.approx(2 * half, rel=0.1)
    assert float(low) == pytest.approx(values.mean() - half, abs=0.1 * half)


def test_one_picture_has_no_interval():
    table = evaluation.evaluate(noise(5, n=1))
    assert np.isnan(table.high_band_power_low)
    assert float(table.high_band_power) > 0


def test_compare_pairs_samples_so_that_common_variation_cancels():
    rng = np.random.default_rng(0)
    amplitude = rng.uniform(0.02, 0.3, 40)
    base = grey([cosine(0.25, a) for a in amplitude])
    louder = grey([cosine(0.25, 1.1 * a) for a in amplitude])
    reader = lambda images: {"strong": (images.std((1, 2, 3)) > 0.1).astype(int)}  # noqa: E731
    labels = {"strong": np.ones(40, int)}
    table = evaluation.compare({"plain": base, "louder": louder}, base, reader, labels)
    assert table.attrs["baseline"] == "plain"
    row = table.sel(condition="louder")
    assert float(row.log2_power_ratio_difference) == pytest.approx(2 * np.log2(1.1))
    assert float(row.log2_power_ratio_difference_high - row.log2_power_ratio_difference_low) < 1e-9
    power = (amplitude * 255) ** 2 / 2
    assert float(row.high_band_power_difference) == pytest.approx(0.21 * power.mean())
    zero = table.sel(condition="plain")
    assert float(zero.high_band_power_difference) == 0
    before, after = amplitude / np.sqrt(2) > 0.1, 1.1 * amplitude / np.sqrt(2) > 0.1
    assert (after & ~before).any()
    assert float(row.accuracy_difference[0]) == pytest.approx(after.mean() - before.mean())
    assert float(row.accuracy_p[0]) == evaluation.mcnemar(after, before)
    assert "n = 40 is under 200" in table.accuracy_p.attrs["long_name"]


def test_unpaired_detail_distances_differ_by_what_pairing_leaves():
    rng = np.random.default_rng(1)
    amplitude = rng.uniform(0.1, 0.2, 30)
    base = grey([cosine(0.25, a) for a in amplitude])
    louder = grey([cosine(0.25, 2 * a) for a in amplitude])
    real = grey([cosine(0.25, a) for a in rng.uniform(0.1, 0.2, 50)])
    row = evaluation.compare({"plain": base, "louder": louder}, real).sel(condition="louder")
    log_power = np.log2((amplitude * 255) ** 2 / 2)
    target = np.mean([np.log2(pictures.high_band_power(pictures.luma(p))) for p in real])
    expected = abs(log_power.mean() + 2 - target) - abs(log_power.mean() - target)
    assert float(row.detail_distance_difference) == pytest.approx(expected)
    assert row.detail_distance_difference_low < row.detail_distance_difference < row.detail_distance_difference_high
    assert row.detail_distance_difference_low > 0


def test_compare_does_not_depend_on_order_and_follows_its_seed():
    images = {"a": noise(5, size=16), "b": noise(9, size=16, seed=1), "c": noise(7, size=16, seed=2)}
    first = evaluation.compare(images, baseline="a", seed=3)
    second = evaluation.compare(dict(reversed(images.items())), baseline="a", seed=3)
    xr.testing.assert_identical(first, second.sel(condition=["a", "b", "c"]))
    other = evaluation.compare(images, baseline="a", seed=4)
    assert (first.high_band_power == other.high_band_power).all()
    assert (first.high_band_power_low != other.high_band_power_low).all()


@pytest.mark.parametrize(
    ("conditions", "baseline", "message"),
    [
        ({}, None, "at least one condition"),
        ({"a": noise(3, size=16)}, "b", "expected a baseline of a; got 'b'"),
        ({"a": noise(3, size=16), "b": noise(3, n=2, size=16)}, None, "same samples"),
    ],
)
def test_compare_refuses_what_is_not_paired(conditions, baseline, message):
    with pytest.raises(ConfigError, match=message):
        evaluation.compare(conditions, baseline=baseline)
