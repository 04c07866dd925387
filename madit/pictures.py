"""Pictures as arrays, and what one picture holds: luma, spectrum, noise, layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image
from scipy import ndimage, stats
from scipy.signal import windows

from madit.errors import ConfigError

HIGH_BAND = 0.125
"""Lower edge of the high band, in cycles per pixel: periods under 8 pixels."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], float)


def as_images(images: Any) -> np.ndarray:
    """Read pictures into one array (n, row, column, rgb), uint8 or float in [0, 1] (values a little outside clip).

    Args:
        images: a folder, a list of PIL pictures or arrays, or an array (n, row, column, rgb).

    Raises:
        ConfigError: for an empty folder, pictures of different sizes, or values that are not pictures.
    """
    if isinstance(images, str | Path):
        folder = Path(images)
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise ConfigError(f"expected a folder with pictures ({', '.join(_SUFFIXES)}), got none in {folder}")
        images = [Image.open(file) for file in files]
    elif isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, np.ndarray | xr.DataArray):
        images = [np.asarray(i.convert("RGB") if isinstance(i, Image.Image) else i) for i in images]
        shapes = sorted({i.shape for i in images})
        if len(shapes) != 1:
            raise ConfigError(f"expected one or more pictures of one size, got sizes {shapes}")
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ConfigError(f"expected pictures (n, row, column, 3), got an array of shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ConfigError(f"expected pictures as uint8 or float in [0, 1], got {array.dtype}")
    if not np.isfinite(array).all() or array.min() < -0.5 or array.max() > 1.5:
        raise ConfigError(f"expected float pictures in [0, 1], got values from {array.min():.3g} to {array.max():.3g}")
    return np.clip(array, 0, 1).astype(np.float64)


def luma(image: np.ndarray) -> np.ndarray:
    """Luma of ITU-R BT.601 in grey levels (0 to 255), (row, column), of one picture (row, column, rgb)."""
    return image @ _LUMA * (1.0 if image.dtype == np.uint8 else 255.0)


def radial_frequency(shape: Sequence[int]) -> np.ndarray:
    """Radial frequency in cycles/pixel of each FFT bin of a (row, column) array."""
    return np.hypot(*np.meshgrid(*(np.fft.fftfreq(size) for size in shape), indexing="ij"))


def periodogram(y: np.ndarray) -> np.ndarray:
    """Hann-weighted variance by frequency, (row, column) in FFT order.

    P = |FFT(w (y - m))|^2 / (N sum w^2), where m is the w-weighted mean and N the number of pixels. P sums to the
    weighted variance; white noise of variance s^2 has P = s^2 / N everywhere.
    """
    window = np.outer(*(windows.hann(size, sym=False) for size in y.shape))
    centred = (y - (y * window).sum() / window.sum()) * window
    return np.abs(np.fft.fft2(centred)) ** 2 / (y.size * (window**2).sum())


def high_band_power(y: np.ndarray) -> float:
    """Part of the Hann-weighted variance of luma above 0.125 cycles/pixel, in the square of y's unit."""
    return float(periodogram(y)[radial_frequency(y.shape) > HIGH_BAND].sum())


def noise_sigma(y: np.ndarray) -> float:
    """Standard deviation of white noise in a picture: median |L| / (6 * 0.6745).

    L is the picture through Immerkaer's mask, which removes all that varies along rows only or columns only; the
    median ignores sparse edges. Fine two-dimensional texture that fills most of the picture still counts as noise.

    Source: Immerkaer 1996, "Fast noise variance estimation"; the median as in Donoho and Johnstone 1994.
    """
    response = ndimage.correlate(y, _IMMERKAER)[1:-1, 1:-1]
    return float(np.median(np.abs(response)) / (6 * stats.norm.ppf(0.75)))


def layout(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Correlation and SSIM of two lumas after area averaging to min(32, size / 4) on each side."""
    rows, columns = (max(2, min(32, size // 4)) for size in a.shape)
    a, b = (
        np.asarray(Image.fromarray(y.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX), float)
        for y in (a, b)
    )
    if np.array_equal(a, b):
        return 1.0, 1.0
    spread = a.std() * b.std()
    correlation = ((a - a.mean()) * (b - b.mean())).mean() / spread if spread > 1e-9 else 0.0  # flat: no shared layout
    return float(correlation), ssim(a, b)


def ssim(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Mean structural similarity under a Gaussian window of 1.5 pixels, edges mirrored.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, eq. 13, with K1 = 0.01 and K2 = 0.03.
    """
    smooth = lambda y: ndimage.gaussian_filter(y, 1.5, truncate=3.5)  # noqa: E731
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(value.mean())
