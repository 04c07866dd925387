"""What the figures draw: data, limits, labels; and that drawing leaves matplotlib alone."""

from __future__ import annotations

import figure_data
import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from madit import evaluation, figures
from madit.errors import ConfigError, StoreError

MASSIVE = figure_data.MASSIVE


@pytest.fixture(scope="module")
def tree():
    return figure_data.run()


@pytest.fixture(scope="module")
def table():
    conditions = {name: figure_data.picture(12, c) for name, c in {"plain": 0.3, "zero": 0.05, "random": 0.29}.items()}
    reader = lambda images: {"texture": (images.std((1, 2, 3)) > 0.12).astype(int)}  # noqa: E731
    return evaluation.compare(conditions, conditions["plain"], reader, {"texture": np.ones(12, int)})


def test_heatmap_shows_the_largest_ratio_of_recorded_cells_on_a_log_scale(tree):
    ax = figures.magnitude_heatmap(tree)
    mesh = ax.collections[0]
    expected = [[1, 1, 1, 1], [200, 400, 600, 800], [400, 800, 1200, 1600]]
    np.testing.assert_allclose(mesh.get_array().reshape(3, 4), expected)
    assert isinstance(mesh.norm, LogNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1, 1600)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1.00\n1000", "0.75\n750", "0.50\n500", "0.25\n250"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"]
    assert ax.get_ylabel() == "output of block"


def test_heatmap_outlines_the_cut(tree):
    border = [line.get_xydata().tolist() for line in figures.magnitude_heatmap(tree, ratio=500).lines]
    # block 1 passes 500 from step 2 on, block 2 from step 1 on
    assert [[1.5, 0.5], [1.5, 1.5]] in border
    assert [[0.5, 1.5], [0.5, 2.5]] in border
    assert len(border) == 5


def test_profile_names_massive_channels_and_only_those(tree):
    figure = figures.channel_profile(tree, figure_data.channel_set())
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["block 0", "block 1", "block 2"]
    assert [[t.get_text() for t in ax.texts] for ax in figure.axes] == [[], [str(MASSIVE)], [str(MASSIVE)]]
    for block, ax in enumerate(figure.axes):
        expected = [max(figure_data.magnitude(block, t, c) for t in range(4)) for c in range(figure_data.WIDTH)]
        np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
        assert ax.get_yscale() == "log"
    assert len(figures.channel_profile(tree, blocks=[2]).axes) == 1


def test_token_map_puts_tokens_on_their_row_and_column(tree):
    ax = figures.token_map(tree, block=1, channel=2, sample=1, step=0)
    image = ax.images[0]
    np.testing.assert_allclose(image.get_array(), np.arange(16).reshape(4, 4) - 7.5)
    assert image.get_clim() == (-7.5, 7.5)
    assert image.get_interpolation() == "nearest"
    assert "channel 2, block 1, σ = 1.00" in ax.get_title(loc="left")


def test_token_map_needs_raw_values():
    with pytest.raises(StoreError, match="values='raw'"):
        figures.token_map(figure_data.run(raw=False), 1, 2)


def test_magnitude_against_sigma_has_a_line_for_each_prompt(tree):
    ax = figures.magnitude_against_sigma(tree, block=2, channel=MASSIVE)
    prompts = ax.lines[: figure_data.SAMPLES]
    for line in prompts[:-1]:
        np.testing.assert_allclose(line.get_xdata(), figure_data.SIGMA)
        np.testing.assert_allclose(line.get_ydata(), [400, 800, 1200, 1600])
    assert np.isnan(prompts[-1].get_ydata()[-1])  # not recorded: a gap, not a zero
    assert ax.xaxis_inverted()
    assert "each of 4 prompts" in " ".join(t.get_text() for t in ax.get_legend().get_texts())
    np.testing.assert_allclose(ax.lines[figure_data.SAMPLES + 2].get_ydata(), 1)


def test_seeds_of_one_prompt_are_one_line(tree):
    one = figure_data.run()
    same = one["/statistics/img"].to_dataset().assign_coords(prompt=("sample", np.array(["a"] * 4, dtype=object)))
    one["/statistics/img"] = xr.DataTree(same)
    ax = figures.magnitude_against_sigma(one, 1, MASSIVE)
    assert "each of 1 prompts" in " ".join(t.get_text() for t in ax.get_legend().get_texts())


def test_attribution_bars_are_the_indices_with_their_bounds():
    effects = figure_data.effects()
    ax = figures.attribution_bars(effects, 1, MASSIVE)
    bars = [c for c in ax.containers if isinstance(c, BarContainer)]
    np.testing.assert_allclose([p.get_height() for p in bars[0]], [0.05, 0.7, 0.15, 0.0])
    np.testing.assert_allclose([p.get_height() for p in bars[1]], [0.1, 0.75, 0.2, 0.05])
    segments = ax.collections[0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[0.01, 0.13], [0.66, 0.78], [0.11, 0.23], [-0.04, 0.08]])
    assert ax.get_ylim()[0] <= -0.04
    assert [t.get_text() for t in ax.get_xticklabels()] == ["latent", "timestep", "pooled\ntext", "text\ntokens"]
    assert bars[1].patches[0].get_hatch()  # told apart without colour


def test_constant_channels_say_so_and_others_are_refused():
    effects = figure_data.effects()
    assert figures.explained(effects) == [(1, MASSIVE)]
    ax = figures.attribution_bars(effects, 2, MASSIVE)
    assert "constant" in ax.texts[0].get_text()
    effects["constant"] = effects["constant"].astype(float) * np.nan
    with pytest.raises(ConfigError, match=r"expected a \(block, channel\) with effects: \[\(1, 5\)\]; got \(2, 5\)"):
        figures.attribution_bars(effects, 2, MASSIVE)


def test_image_grid_has_a_row_for_each_condition_and_keeps_pixels():
    images = {"before": figure_data.picture(10), "after": figure_data.picture(10, 0.1)}
    figure = figures.image_grid(images, captions=[f"prompt {i}" for i in range(10)], columns=4)
    assert len(figure.axes) == 8
    np.testing.assert_array_equal(figure.axes[5].images[0].get_array(), images["after"][1])
    assert {ax.images[0].get_interpolation() for ax in figure.axes} == {"nearest"}
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == ["before", "after"]
    assert [ax.get_title() for ax in figure.axes[:4]] == [f"prompt {i}" for i in range(4)]


def test_spectra_are_drawn_with_bounds_and_told_apart_without_colour():
    spectra = {k: evaluation.radial_spectrum(figure_data.picture(6, c)) for k, c in {"a": 0.3, "b": 0.1}.items()}
    ax = figures.radial_spectra(spectra)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), spectra["b"].power)
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    assert ax.get_xlim() == (0, 0.5)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    low = ax.collections[0].get_paths()[0].vertices[:, 1].min()
    assert low == pytest.approx(float(spectra["a"].power_low.min()))


def test_dose_curve_draws_the_metric_its_band_and_references():
    doses = [0.0, 0.5, 2.0]
    rows = [evaluation.evaluate(figure_data.picture(6, 0.2 + w / 4)) for w in doses]
    table = xr.concat(rows, dim=xr.Variable("scale", doses, {"long_name": "guidance scale w"}))
    ax = figures.dose_curve(table, "high_band_power", references={"real": 500.0})
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.stack([doses, table.high_band_power], axis=1))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(float(table.high_band_power_high.max()))
    assert ax.lines[1].get_ydata() == [500, 500]
    assert ax.get_xlabel() == "guidance scale w"
    assert "grey levels²" in ax.get_ylabel()


def test_dose_curve_of_two_series():
    value = np.array([[1.0, 2.0], [3.0, 5.0]])
    data = {"m": value, "m_low": value - 1, "m_high": value + 1}
    coords = {"method": ["DG", "CFG"], "scale": [0.0, 1.0]}
    table = xr.Dataset({k: (("method", "scale"), v) for k, v in data.items()}, coords)
    ax = figures.dose_curve(table, "m")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [3, 5]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["DG", "CFG"]


def test_forest_draws_each_condition_and_marks_controls(table):
    figure = figures.forest(table, ["accuracy:texture", "detail_distance"], controls=["random"])
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["plain", "zero", "random"]
    points = [line for line in right.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose([p.get_xdata()[0] for p in points], table.detail_distance)
    assert [p.get_ydata()[0] for p in points] == [2, 1, 0]
    assert [p.get_markerfacecolor() == "white" for p in points] == [False, False, True]
    bars = [line.get_xdata() for line in right.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == 1]
    np.testing.assert_allclose(bars[0], [table.detail_distance_low[1], table.detail_distance_high[1]])
    assert left.get_xlabel().replace("\n", " ") == "classifier accuracy: texture"


@pytest.mark.parametrize(
    ("metric", "message"),
    [("beauty", "expected a metric of"), ("accuracy", "expected accuracy:FACTOR with a factor of texture")],
)
def test_unknown_metrics_are_refused(table, metric, message):
    with pytest.raises(ConfigError, match=message):
        figures.forest(table, [metric])


def test_drawing_leaves_matplotlib_as_it_was(tree):
    before = dict(mpl.rcParams)
    figures.magnitude_heatmap(tree)
    figures.channel_profile(tree)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_figure_draws_into_given_axes(tree):
    figure = Figure()
    ax = figure.subplots()
    assert figures.magnitude_heatmap(tree, ax=ax) is ax


def test_text_is_large_enough_for_print(tree, table):
    drawn = [
        figures.magnitude_heatmap(tree).figure,
        figures.channel_profile(tree, figure_data.channel_set()),
        figures.magnitude_against_sigma(tree, 1, MASSIVE).figure,
        figures.attribution_grid(figure_data.effects(), [(1, MASSIVE)]),
        figures.forest(table, ["detail_distance"]),
    ]
    sizes = [t.get_fontsize() for figure in drawn for t in figure.findobj(mpl.text.Text) if t.get_text()]
    assert min(sizes) >= 8


def test_palette_differs_under_deuteranopia():
    # Machado, Oliveira and Fernandes 2009, severity 1
    matrix = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = np.array([mpl.colors.to_rgb(c) for c in figures.PALETTE[:4]]) @ matrix.T
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(4, 1)]
    assert distance.min() > 0.15
    assert to_hex(figures.PALETTE[0]) == figures.PALETTE[0]
