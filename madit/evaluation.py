"""What pictures show: high-band power, two-sided detail, noise, layout and label accuracies, each with an interval.

Power is never called detail: a wrecked picture has much of it. Detail is judged on both sides, as the distance of the
log power from a reference, with a noise estimate beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from madit.errors import ConfigError
from madit.pictures import as_images, high_band_power, layout, luma, noise_sigma, periodogram, radial_frequency

CONFIDENCE = 0.95
N_RESAMPLES = 2000
MIN_MCNEMAR = 200
"""Pictures under which a McNemar test is marked as weak."""

_QUANTISATION = 1 / 12  # variance of rounding to 8 bits: the least power that a stored picture can show
_BATCH = 256

METRICS = {
    "high_band_power": ("luma power above 0.125 cycles/pixel", "grey levels²"),
    "noise_sigma": ("noise estimate", "grey levels"),
    "log2_power_ratio": ("log₂ of high-band power over the reference's", ""),
    "detail_distance": ("detail: |log₂ power ratio| to the reference", ""),
    "excess_noise": ("noise estimate minus the reference's", "grey levels"),
    "layout_correlation": ("layout: luma correlation with the reference", ""),
    "layout_ssim": ("layout: SSIM with the reference", ""),
    "accuracy": ("classifier accuracy", ""),
}
"""Name of each metric -> what it is, and its unit; also the attributes of the variables."""


def evaluate(
    images: Any,
    reference: Any = None,
    classifiers: Any = None,
    labels: Mapping[str, Any] | None = None,
    seed: int = 0,
    paired: bool | None = None,
) -> xr.Dataset:
    """Metrics of a set of pictures, each the mean over pictures with a 95 % interval `_low`, `_high`.

    Without a reference: `high_band_power`, `noise_sigma`. With one: `log2_power_ratio`, `detail_distance`,
    `excess_noise`, and if paired `layout_correlation`, `layout_ssim`. With classifiers and labels: `accuracy` over
    `factor`. Intervals are percentile bootstraps over pictures; those of accuracies are Wilson's.

    Args:
        images: a folder, a list of PIL pictures, or an array (n, row, column, rgb), uint8 or float in [0, 1].
        reference: pictures to compare with, of the same size: the same prompts and seeds, or real pictures.
        classifiers: a model or a mapping name -> model; each has `predict(uint8 images) -> {factor: indices}`, or is
            called on float images in [0, 1] and gives indices (n,) or logits (n, class) by factor.
        labels: true index by factor, (n,).
        seed: of the bootstrap.
        paired: whether picture i goes with reference i; None: if there are as many. Unpaired, `detail_distance` is
            the distance of the means, and there is no layout.

    Returns:
        Dataset of scalars, units and meaning in the attributes of each, `n` and `paired` in the Dataset's.

    Raises:
        ConfigError: for pictures that cannot be read or compared, or labels that do not fit.

    >>> stripes = np.zeros((4, 32, 32, 3), np.uint8)
    >>> stripes[:, ::2] = 200
    >>> table = evaluate(stripes, reference=stripes // 2)
    >>> round(float(table.log2_power_ratio), 3)
    2.0
    """
    per_image = measure(images, reference, paired)
    table = _means(per_image, seed)
    if "reference_log2_power" in per_image and not per_image.attrs["paired"]:
        _add_unpaired(table, per_image, seed)
    table = table.assign_attrs(per_image.attrs)
    if classifiers is not None:
        table = table.merge(_accuracies(right(classifiers, as_images(images), labels)))
    return _described(table)


def compare(
    conditions: Mapping[str, Any],
    reference: Any = None,
    classifiers: Any = None,
    labels: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    seed: int = 0,
    paired: bool | None = None,
) -> xr.Dataset:
    """`evaluate` for several conditions of the same samples, with paired differences to a baseline.

    For each metric m of single pictures, `m_difference` (condition minus baseline) with its bootstrap interval; for
    accuracies also `accuracy_p`, the exact McNemar test (not corrected for the number of comparisons).

    Args:
        conditions: name -> pictures, as for `evaluate`; picture i is the same prompt and seed in all of them.
        reference: as for `evaluate`.
        classifiers: as for `evaluate`.
        labels: as for `evaluate`.
        baseline: the condition to compare with; None: the first.
        seed: of the bootstrap; all conditions are resampled alike.
        paired: as for `evaluate`.

    Returns:
        Dataset over `condition` (and `factor`); attribute `baseline`.

    Raises:
        ConfigError: for no conditions, an unknown baseline, or conditions of unequal size.

    >>> flat, noisy = np.full((4, 16, 16, 3), 0.5), np.random.default_rng(0).random((4, 16, 16, 3))
    >>> table = compare({"flat": flat, "noisy": noisy})
    >>> bool(table.high_band_power_difference.sel(condition="noisy") > 0)
    True
    """
    if not conditions:
        raise ConfigError("expected at least one condition, got none")
    base = next(iter(conditions)) if baseline is None else baseline
    if base not in conditions:
        raise ConfigError(f"expected a baseline of {', '.join(conditions)}; got {base!r}")
    pictures = {name: as_images(images) for name, images in conditions.items()}
    sizes = {name: len(images) for name, images in pictures.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"expected conditions of the same samples, got {sizes} pictures")
    reference = None if reference is None else as_images(reference)
    measured = {name: measure(images, reference, paired) for name, images in pictures.items()}
    hits = {} if classifiers is None else {n: right(classifiers, images, labels) for n, images in pictures.items()}
    rows = []
    for name in pictures:
        row = _means(measured[name], seed)
        if "reference_log2_power" in measured[name] and not measured[name].attrs["paired"]:
            _add_unpaired(row, measured[name], seed)
        row = row.merge(_differences(measured[name], measured[base], seed))
        if "reference_log2_power" in measured[name]:
            row = row.merge(_distance_difference(measured[name], measured[base], seed))
        if hits:
            row = row.merge(_accuracies(hits[name])).merge(_accuracy_differences(hits[name], hits[base], seed))
        rows.append(row)
    table = xr.concat(rows, dim=xr.Variable("condition", np.array(list(pictures), dtype=object)), join="exact")
    return _described(table.assign_attrs(measured[base].attrs, baseline=base))


def measure(images: Any, reference: Any = None, paired: bool | None = None) -> xr.Dataset:
    """The metrics of each single picture, over `sample`; `evaluate` gives their means.

    Args:
        images: as for `evaluate`.
        reference: as for `evaluate`.
        paired: as for `evaluate`.

    Returns:
        Dataset over `sample`; unpaired also `reference_log2_power` over `reference_sample`.

    Raises:
        ConfigError: for pictures that cannot be read or compared.
    """
    pictures = as_images(images)
    lumas = [luma(picture) for picture in pictures]
    power = np.array([high_band_power(y) for y in lumas])
    noise = np.array([noise_sigma(y) for y in lumas])
    data = {"high_band_power": power, "noise_sigma": noise}
    attrs: dict[str, Any] = {"n": len(pictures), "confidence": CONFIDENCE}
    if reference is None:
        return xr.Dataset({k: ("sample", v) for k, v in data.items()}, attrs=attrs)
    others = as_images(reference)
    if others.shape[1:3] != pictures.shape[1:3]:
        raise ConfigError(
            f"expected reference pictures of {pictures.shape[1:3]} pixels, got {others.shape[1:3]}; "
            "spectra of different sizes cannot be compared"
        )
    paired = len(others) == len(pictures) if paired is None else paired
    if paired and len(others) != len(pictures):
        raise ConfigError(f"expected {len(pictures)} paired reference pictures, got {len(others)}")
    targets = [luma(picture) for picture in others]
    log_power = np.log2(np.maximum(power, _QUANTISATION))
    log_target = np.log2(np.maximum([high_band_power(y) for y in targets], _QUANTISATION))
    noise_target = np.array([noise_sigma(y) for y in targets])
    attrs |= {"paired": int(paired), "n_reference": len(others)}
    if not paired:
        data |= {"log2_power_ratio": log_power - log_target.mean(), "excess_noise": noise - noise_target.mean()}
        result = xr.Dataset({k: ("sample", v) for k, v in data.items()}, attrs=attrs)
        result["reference_log2_power"] = ("reference_sample", log_target)
        result["reference_noise"] = ("reference_sample", noise_target)
        return result
    ratio = log_power - log_target
    layouts = np.array([layout(a, b) for a, b in zip(lumas, targets, strict=True)])
    data |= {
        "log2_power_ratio": ratio,
        "detail_distance": np.abs(ratio),
        "excess_noise": noise - noise_target,
        "layout_correlation": layouts[:, 0],
        "layout_ssim": layouts[:, 1],
    }
    return xr.Dataset({k: ("sample", v) for k, v in data.items()}, attrs=attrs)


def radial_spectrum(images: Any, seed: int = 0) -> xr.Dataset:
    """Power spectral density of luma by radial frequency, mean over pictures with a 95 % bootstrap interval.

    S(f) = N P averaged over the ring of width 1/size about f, up to 0.5 cycles/pixel; white noise of variance s^2 has
    S = s^2.

    Args:
        images: as for `evaluate`.
        seed: of the bootstrap.

    Returns:
        Dataset `power`, `power_low`, `power_high` over `frequency` (cycles/pixel), in grey levels².
    """
    pictures = as_images(images)
    shape = pictures.shape[1:3]
    step = 1 / min(shape)
    ring = np.rint(radial_frequency(shape) / step).astype(int).ravel()
    keep = np.arange(1, int(0.5 / step) + 1)
    count = np.bincount(ring)
    spectra = np.stack([np.bincount(ring, periodogram(luma(p)).ravel() * ring.size)[keep] for p in pictures])
    spectra /= count[keep]
    low, high = _interval(spectra, seed)
    data = {"power": spectra.mean(0), "power_low": low, "power_high": high}
    coords = {"frequency": keep * step}
    result = xr.Dataset({k: ("frequency", v) for k, v in data.items()}, coords, {"n": len(pictures)})
    result["power"].attrs = {"long_name": "power spectral density of luma", "units": "grey levels²"}
    result["frequency"].attrs = {"long_name": "spatial frequency", "units": "cycles/pixel"}
    return result


def right(classifiers: Any, images: Any, labels: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
    """Whether the classifiers read each picture's factors as labelled, factor -> bool (n,).

    A classifier of several factors adds a row under its own name: all of them right at once.

    Raises:
        ConfigError: without labels, with labels of another length, or with none that a classifier reads.
    """
    pictures = as_images(images)
    if not labels:
        raise ConfigError("expected labels (factor -> true index of each picture) with classifiers, got none")
    truth = {name: np.asarray(values) for name, values in labels.items()}
    for name, values in truth.items():
        if values.shape != (len(pictures),):
            raise ConfigError(f"expected {len(pictures)} labels of {name!r}, got shape {values.shape}")
    models = classifiers if isinstance(classifiers, Mapping) else {"all factors": classifiers}
    result: dict[str, np.ndarray] = {}
    for name, model in models.items():
        guesses = _predict(model, pictures)
        hits = {factor: guess == truth[factor] for factor, guess in guesses.items() if factor in truth}
        if not hits:
            raise ConfigError(f"expected labels for one of {sorted(guesses)}, got labels of {sorted(truth)}")
        result |= hits
        if len(hits) > 1:
            result[name] = np.all(list(hits.values()), axis=0)
    return result


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided McNemar test of two paired series of right (True) and wrong answers; the p value.

    Under the null hypothesis, the number of pairs where only `a` is right is Binomial(discordant pairs, 1/2).

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 1], bool), np.array([0, 0, 0, 0, 0, 0], bool))
    0.03125
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return 1.0 if only_a + only_b == 0 else float(stats.binomtest(only_a, only_a + only_b).pvalue)


def _predict(model: Any, pictures: np.ndarray) -> dict[str, np.ndarray]:
    outputs: list[Any]
    chunks = [pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH)]
    if hasattr(model, "predict"):
        outputs = [model.predict(c if c.dtype == np.uint8 else np.rint(c * 255).astype(np.uint8)) for c in chunks]
    elif callable(model):
        outputs = [model(c.astype(np.float32) / (255 if c.dtype == np.uint8 else 1)) for c in chunks]
    else:
        raise ConfigError(f"expected a classifier with `predict` or that can be called, got {type(model).__name__}")
    joined = {factor: np.concatenate([np.asarray(o[factor]) for o in outputs]) for factor in outputs[0]}
    return {factor: value.argmax(-1) if value.ndim == 2 else value for factor, value in joined.items()}


def _interval(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap of the mean over the first axis; NaN for a single row."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    result = stats.bootstrap(
        (values,), np.mean, axis=0, n_resamples=N_RESAMPLES, batch=200, method="percentile", rng=seed,
        confidence_level=CONFIDENCE,
    ).confidence_interval  # fmt: skip
    return result.low, result.high


def _means(per_image: xr.Dataset, seed: int, suffix: str = "") -> xr.Dataset:
    names = [str(k) for k, v in per_image.items() if v.dims == ("sample",)]
    values = np.stack([per_image[k].values for k in names], axis=1)
    low, high = _interval(values, seed)
    table = xr.Dataset()
    for i, name in enumerate(names):
        table[name + suffix] = values[:, i].mean()
        table[f"{name}{suffix}_low"], table[f"{name}{suffix}_high"] = low[i], high[i]
    return table


def _differences(a: xr.Dataset, b: xr.Dataset, seed: int) -> xr.Dataset:
    return _means((a - b).drop_dims("reference_sample", errors="ignore"), seed, "_difference")


def _add_unpaired(table: xr.Dataset, per_image: xr.Dataset, seed: int) -> None:
    """Put in the intervals that also resample the reference, and the distance of the means."""
    sources: dict[str, tuple[xr.DataArray, Any]] = {
        "log2_power_ratio": (per_image.log2_power_ratio + per_image.reference_log2_power.mean(), np.asarray),
        "excess_noise": (per_image.noise_sigma, np.asarray),
        "detail_distance": (per_image.log2_power_ratio + per_image.reference_log2_power.mean(), np.abs),
    }
    for name, (values, shape) in sources.items():
        other = per_image.reference_noise if name == "excess_noise" else per_image.reference_log2_power

        def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1, shape: Any = shape) -> np.ndarray:
            return shape(x.mean(axis) - y.mean(axis))

        low = high = np.nan
        if min(values.size, other.size) > 1:
            low, high = stats.bootstrap(
                (values.values, other.values), statistic, n_resamples=N_RESAMPLES, method="percentile", rng=seed,
                confidence_level=CONFIDENCE,
            ).confidence_interval  # fmt: skip
        table[name] = float(statistic(values.values, other.values))
        table[f"{name}_low"], table[f"{name}_high"] = low, high


def _distance_difference(a: xr.Dataset, b: xr.Dataset, seed: int) -> xr.Dataset:
    """Difference of two unpaired detail distances: a and b are resampled together, the reference on its own."""
    reference = a.reference_log2_power.values
    powers = np.stack([x.log2_power_ratio.values + reference.mean() for x in (a, b)])

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        distance = np.abs(x.mean(axis) - y.mean(axis))
        return distance - distance[1:]

    low = high = np.full(2, np.nan)
    if min(powers.shape[1], reference.size) > 1:
        low, high = stats.bootstrap(
            (powers, reference[None]), statistic, axis=-1, n_resamples=N_RESAMPLES, method="percentile", rng=seed,
            confidence_level=CONFIDENCE,
        ).confidence_interval  # fmt: skip
    values = statistic(powers, reference[None])[0], low[0], high[0]
    return xr.Dataset(dict(zip([f"detail_distance_difference{s}" for s in ("", "_low", "_high")], values, strict=True)))


def _accuracies(hits: Mapping[str, np.ndarray]) -> xr.Dataset:
    rows = []
    for hit in hits.values():
        wilson = stats.binomtest(int(hit.sum()), hit.size).proportion_ci(CONFIDENCE, method="wilson")
        rows.append((hit.mean(), wilson.low, wilson.high))
    columns = zip(("accuracy", "accuracy_low", "accuracy_high"), np.array(rows).T, strict=True)
    return xr.Dataset({k: ("factor", v) for k, v in columns}, {"factor": np.array(list(hits), dtype=object)})


def _accuracy_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], seed: int) -> xr.Dataset:
    values = np.stack([a[k].astype(float) - b[k] for k in a], axis=1)
    low, high = _interval(values, seed)
    data = {"accuracy_difference": values.mean(0), "accuracy_difference_low": low, "accuracy_difference_high": high}
    data["accuracy_p"] = np.array([mcnemar(a[k], b[k]) for k in a])
    result = xr.Dataset({k: ("factor", v) for k, v in data.items()}, {"factor": np.array(list(a), dtype=object)})
    n = len(values)
    note = "" if n >= MIN_MCNEMAR else f"; n = {n} is under {MIN_MCNEMAR}: weak"
    result["accuracy_p"].attrs = {"long_name": f"exact McNemar p against the baseline{note}", "units": ""}
    return result


def _described(table: xr.Dataset) -> xr.Dataset:
    for name, (meaning, unit) in METRICS.items():
        for kind in ("", "_difference"):
            if name + kind in table:
                table[name + kind].attrs = {"long_name": meaning + (", minus baseline" if kind else ""), "units": unit}
    return table
