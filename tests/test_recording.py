"""`record` against plain hooks, plain pipeline calls and closed forms."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import hooked
import numpy as np
import pytest
import torch
import xarray as xr
from diffusers import FlowMatchHeunDiscreteScheduler

from madit import recording, store
from madit.dit import DiT
from madit.errors import (
    ActivationWarning,
    ConfigError,
    DiskSpaceError,
    PromptError,
    SiteError,
    StoreExistsError,
    UnsupportedPipelineError,
)
from madit.intervention import intervene
from madit.location import locate
from madit.recording import estimate, record, select_sites
from madit.sites import Site
from madit.zoo import small

PROMPTS = ["a red circle", "a dog"]
SHORT = {"max_sequence_length": 8}
SMALL = {**SHORT, "height": 32, "width": 32}
HALVES = {"uncond": slice(0, 2), "cond": slice(2, 4)}
WHOLE = slice(0, 2)


def small_sd3(seed: int = 0) -> Any:
    return small.small_sd3(seed, layers=3)


def small_sd35() -> Any:
    return small.small_sd35(layers=3)  # dual attention in block 0


def small_flux() -> Any:
    return small.small_flux(layers=1, single_layers=2)


def heun() -> Any:
    pipeline = small_sd3()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    return pipeline


# name: pipeline, scale, further arguments, and by hand for 3 steps what each call is: (step, {branch: rows})
SCENARIOS: dict[str, tuple[Any, float, dict[str, Any], list[tuple[int, dict[str, slice]]]]] = {
    "sd3, CFG in one batch": (small_sd3, 4.0, SHORT, [(i, HALVES) for i in range(3)]),
    "sd3, no CFG": (small_sd3, 1.0, SHORT, [(i, {"cond": WHOLE}) for i in range(3)]),
    "sd3, two-call solver": (heun, 4.0, SHORT, [(i, HALVES) for i in range(5)]),
    "sd3.5, skipped layers": (
        small_sd35,
        4.0,
        {**SHORT, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5},
        [(0, HALVES), (1, HALVES), (1, {"skip": WHOLE}), (2, HALVES)],
    ),
    "flux, embedded guidance": (small_flux, 3.5, SMALL, [(i, {"cond": WHOLE}) for i in range(3)]),
    "flux, CFG in two calls": (
        small_flux,
        3.5,
        {**SMALL, "true_cfg_scale": 2.0, "negative_prompt": "a cat"},
        [(i, {branch: WHOLE}) for i in range(3) for branch in ("cond", "uncond")],
    ),
}


def plain(pipeline: Any, scale: float, more: dict[str, Any], **kwargs: Any) -> Any:
    """The pipeline itself, on the batch that `record` makes of PROMPTS with batch_size 2."""
    negative = {k: [v] * 2 for k, v in more.items() if k == "negative_prompt"}
    with torch.no_grad():
        return pipeline(
            PROMPTS,
            generator=[torch.Generator().manual_seed(7) for _ in range(2)],
            num_inference_steps=3,
            guidance_scale=scale,
            **{**more, **negative, **kwargs},
        ).images


def go(pipeline: Any, path: Path, scale: float = 4.0, more: dict[str, Any] = SHORT, **kwargs: Any) -> xr.DataTree:
    settings = {"seeds": (7,), "num_inference_steps": 3, "guidance_scale": scale, "batch_size": 2, **kwargs}
    return record(pipeline, PROMPTS, path, pipe_kwargs=more, **settings)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_value_and_label_equals_what_plain_hooks_read(name: str, tmp_path: Path) -> None:
    make, scale, more, expected = SCENARIOS[name]
    pipeline = make()
    calls, images = hooked.read(pipeline, lambda: plain(pipeline, scale, more))
    tree = go(pipeline, tmp_path / "run.zarr", scale, more, sites=["*"], values="both").load()

    assert len(calls) == len(expected)
    img = tree["statistics/img"]
    assert sorted(img["branch"].values) == sorted({b for _, rows in expected for b in rows})
    seen = np.zeros(img["recorded"].shape, bool)
    for (step, rows), call in zip(expected, calls, strict=True):
        for branch, where in rows.items():
            seen[:, step, list(img["branch"].values).index(branch)] = True
            for sample in range(2):
                at = {"sample": sample, "step": step, "branch": branch}
                _compare(tree, at, {site: value[where][sample] for site, value in call.items()})
    np.testing.assert_array_equal(img["recorded"].values, seen)
    np.testing.assert_array_equal(tree["outputs"]["image"].values, np.stack([np.asarray(i) for i in images]))


def _compare(tree: xr.DataTree, at: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    """All that the store holds of one cell, against one row of each site."""
    cell = {g[1:]: tree[g].to_dataset().sel(at) for g in tree.groups if "block" in tree[g].dims or "embedding/" in g}
    for name, value in values.items():
        site = Site.parse(name)
        group = {"resid_post": "statistics", "resid_pre": "entering"}.get(site.kind, "updates")
        if value.ndim == 1:
            got = _at(cell[f"modulation/{site.stream}"], site.kind, block=site.block)
            np.testing.assert_array_equal(got, value.numpy())
            continue
        place: dict[str, Any] = {"block": site.block}
        if site.kind == "resid_pre" and site.block == 0:
            group, place = "embedding", {}
        if group == "updates":
            place["kind"] = site.kind
        for statistic, truth in hooked.statistics(value).items():
            # order statistics are values of h and so exact; sums are of float32
            tolerance = 0 if statistic in ("max_abs", "abs_quantile", "median_abs") else 1e-5
            got = _at(cell[f"{group}/{site.stream}"], statistic, **place)
            np.testing.assert_allclose(got, truth, rtol=tolerance, atol=tolerance / 10)
        if group == "statistics":
            got = _at(cell[f"activations/{site.stream}"], "activation", **place)
            np.testing.assert_array_equal(got, value.numpy())
    for skipped in set(range(3)) - {Site.parse(name).block for name in values}:  # by skip-layer guidance
        assert np.isnan(_at(cell["statistics/img"], "mean", block=skipped)).all()


def _at(data: xr.Dataset, name: str, **labels: Any) -> np.ndarray:
    """As `sel`, in a fraction of its time."""
    array = data[name]
    index = {dim: list(data[dim].values).index(label) for dim, label in labels.items()}
    return array.values[tuple(index.get(dim, slice(None)) for dim in array.dims)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_images_and_latents_are_those_of_the_pipeline(name: str, tmp_path: Path) -> None:
    make, scale, more, _ = SCENARIOS[name]
    untouched = make()  # never wrapped by nnsight
    images = plain(untouched, scale, more)
    latents = plain(untouched, scale, more, output_type="latent")
    outputs = go(make(), tmp_path / "run.zarr", scale, more)["outputs"]
    np.testing.assert_array_equal(outputs["image"].values, np.stack([np.asarray(i) for i in images]))
    np.testing.assert_array_equal(outputs["latent"].values, latents.numpy())


def test_step_labels_are_the_schedulers(tmp_path: Path) -> None:
    pipeline = heun()
    img = go(pipeline, tmp_path / "run.zarr")["statistics/img"]
    np.testing.assert_allclose(img["timestep"], pipeline.scheduler.timesteps)
    np.testing.assert_allclose(img["sigma"], pipeline.scheduler.sigmas[:5])
    assert img["sigma"].values[1] == img["sigma"].values[2]  # a two-call solver visits a level twice
    flux = go(small_flux(), tmp_path / "flux.zarr", 3.5, SMALL)["statistics/img"]
    np.testing.assert_allclose(flux["timestep"], flux["sigma"], rtol=1e-6)  # Flux receives t / 1000


@pytest.mark.parametrize(("make", "more"), [(small_sd3, SHORT), (small_sd35, SHORT), (small_flux, SMALL)])
def test_embedding_and_updates_add_up_to_the_state(make: Any, more: dict[str, Any], tmp_path: Path) -> None:
    sites = ["blocks.0.*.resid_pre", "*.update*", "*.resid_post"]
    tree = go(make(), tmp_path / "run.zarr", 3.5, more, sites=sites)
    for stream in ("img", "txt"):
        state = tree[f"statistics/{stream}"]["mean"]
        written = tree[f"updates/{stream}"]["mean"].sum("kind").cumsum("block")
        total = tree[f"embedding/{stream}"]["mean"] + written.sel(block=state["block"])
        xr.testing.assert_allclose(total.transpose(*state.dims), state, rtol=1e-4, atol=1e-5)
        assert float(abs(written).max()) > 0.01  # not a law about zeros


def test_the_default_is_the_image_streams_outputs_gates_and_embedding(tmp_path: Path) -> None:
    tree = go(small_sd35(), tmp_path / "run.zarr")
    assert set(tree.groups) >= {"/statistics/img", "/embedding/img", "/modulation/img", "/outputs"}
    assert not {"/statistics/txt", "/activations", "/updates", "/entering"} & set(tree.groups)
    gates = tree["modulation/img"].to_dataset()
    assert set(gates.data_vars) == {"gate_msa", "gate_msa2", "gate_mlp", "recorded"}
    missing = gates["gate_msa2"].isnull().all(["sample", "step", "branch", "channel"])
    assert missing.values.tolist() == [False, True, True]  # dual attention in the first block only
    assert tree["statistics/img"]["mean"].dims == ("sample", "step", "branch", "block", "channel")
    assert tree["statistics/img"]["abs_quantile"].dims[-2:] == ("quantile", "channel")


def test_root_attributes_say_what_was_run(tmp_path: Path) -> None:
    pipeline = small_sd3()
    attrs = go(pipeline, tmp_path / "run.zarr").attrs
    assert (attrs["format_version"], attrs["kind"], attrs["dtype"]) == (1, "run", "float32")
    assert json.loads(attrs["model"]) == DiT(pipeline).fingerprint.model_dump()
    assert json.loads(attrs["settings"])["num_inference_steps"] == 3
    assert set(json.loads(attrs["libraries"])) >= {"torch", "diffusers", "nnsight"}


def test_channels_of_a_run_over_some_blocks_fit_the_whole_model(tmp_path: Path) -> None:
    pipeline = small_sd3()
    tree = go(pipeline, tmp_path / "run.zarr", sites=["blocks.1.img.resid_post"])
    depth = len(pipeline.transformer.transformer_blocks)
    assert tree.attrs["n_blocks"] == depth > 2
    found = locate(tree, top_k=1)
    assert found.n_blocks == depth
    assert found.blocks() == (1,)


def test_results_do_not_depend_on_batching(tmp_path: Path) -> None:
    pipeline = small_sd3()
    one, two = (go(pipeline, tmp_path / f"{n}.zarr", batch_size=n, seeds=(0, 1)) for n in (1, 3))
    for name in ("statistics/img", "embedding/img", "outputs"):
        left, right = (tree[name].to_dataset().drop_vars("image", errors="ignore") for tree in (one, two))
        xr.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)  # the model's own error between batch shapes
    assert one["outputs"]["seed"].values.tolist() == [0, 1, 0, 1]
    assert one["outputs"]["prompt"].values.tolist() == [p for p in PROMPTS for _ in range(2)]


def test_bf16_activations_are_kept_bit_for_bit(tmp_path: Path) -> None:
    pipeline = small_sd3().to(torch.bfloat16)
    calls, _ = hooked.read(pipeline, lambda: plain(pipeline, 1.0, SHORT))
    tree = go(pipeline, tmp_path / "run.zarr", 1.0, values="both", sites=["*.resid_post"])
    got = tree["activations/img"]["activation"]
    assert got.dtype == np.float32
    assert tree.attrs["dtype"] == "bfloat16"
    for step, call in enumerate(calls):
        truth = call["blocks.2.img.resid_post"].float()
        np.testing.assert_array_equal(got.sel(step=step, block=2, branch="cond").values, truth.numpy())
        mean = tree["statistics/img"]["mean"].sel(step=step, block=2, branch="cond")
        np.testing.assert_allclose(mean.values, truth.double().mean(1), rtol=1e-5, atol=1e-6)


def test_raw_values_lie_on_the_token_grid(tmp_path: Path) -> None:
    for name, make, more in (("sd3", small_sd3, SHORT), ("flux", small_flux, SMALL)):
        tree = go(make(), tmp_path / name, 1.0, more, values="raw")
        data = tree["activations/img"]
        assert "statistics" not in tree.children
        n = int(data.sizes["token"] ** 0.5)
        assert data["row"].values.tolist() == [i // n for i in range(n * n)]
        assert data["column"].values.tolist() == [i % n for i in range(n * n)]


def test_an_edit_is_seen_downstream_and_makes_another_run(tmp_path: Path) -> None:
    pipeline = small_sd3()
    clean = go(pipeline, tmp_path / "clean.zarr")["statistics/img"]["mean"].load()

    def edit(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 3.0}

    handle = pipeline.transformer.transformer_blocks[2].register_forward_pre_hook(edit, with_kwargs=True)
    edited = go(pipeline, tmp_path / "edited.zarr")["statistics/img"]["mean"].load()
    first = {"step": 0}
    xr.testing.assert_equal(edited.isel(first).sel(block=[0, 1]), clean.isel(first).sel(block=[0, 1]))
    assert float(abs(edited - clean).isel(first).sel(block=2).mean()) > 1.0
    with pytest.raises(StoreExistsError, match="edits"):
        go(pipeline, tmp_path / "clean.zarr")
    handle.remove()


def test_a_run_inside_intervene_is_known_by_the_edits_arguments(tmp_path: Path) -> None:
    pipeline = small_sd3()
    means = {}
    for factor in (0.0, 0.5):
        with intervene(pipeline, {0: [3]}, blocks=[1], factor=factor):
            path = tmp_path / f"{factor}.zarr"
            means[factor] = go(pipeline, path)["statistics/img"]["mean"].sel(step=0, block=1).load()
            go(pipeline, path)  # the same edit: opened as it is
    assert float(abs(means[0.0] - means[0.5]).max()) > 0
    with intervene(pipeline, {0: [3]}, blocks=[1], factor=0.5) as dit:
        with pytest.raises(StoreExistsError, match="another `edits`"):
            go(dit, tmp_path / "0.0.zarr")
        dit.pipeline(["a"], num_inference_steps=1, **SHORT)
    with pytest.raises(StoreExistsError, match="another `edits`"):
        go(pipeline, tmp_path / "0.0.zarr")


class Crash(Exception):  # noqa: N818
    pass


def test_a_run_that_crashed_between_batches_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = small_sd3()
    sites = ["*.resid_post", "*.gate*"]
    settings = {"seeds": (0, 1), "batch_size": 1, "sites": sites, "values": "both", "num_inference_steps": 2}
    whole = go(pipeline, tmp_path / "whole.zarr", **settings)
    write = store.Files.write

    def crash(self: store.Files, key: str, data: bytes) -> None:  # all shards are there, the marker is not
        if key.endswith("batch-000002.json"):
            raise Crash
        write(self, key, data)

    monkeypatch.setattr(store.Files, "write", crash)
    with pytest.raises(Crash):
        go(pipeline, tmp_path / "run.zarr", **settings)
    monkeypatch.setattr(store.Files, "write", write)
    with pytest.warns(UserWarning, match="unfinished"):
        part = store.open_run(tmp_path / "run.zarr")
    assert part["statistics/img"]["recorded"].values[:2].all()

    ran: list[list[str]] = []
    batch = recording._Job.run_batch
    monkeypatch.setattr(
        recording._Job, "run_batch", lambda self, samples, advance: ran.append(samples) or batch(self, samples, advance)
    )
    resumed = go(pipeline, tmp_path / "run.zarr", **settings)
    assert ran == [[("a dog", 0)], [("a dog", 1)]]
    for group in whole.groups[1:]:  # the root says when it was made
        xr.testing.assert_identical(resumed[group].to_dataset().load(), whole[group].to_dataset().load())
    assert store.verify(tmp_path / "run.zarr") == []
    ran.clear()
    go(pipeline, tmp_path / "run.zarr", **settings)
    assert ran == []  # a finished run is opened as it is


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seeds", {"seeds": (8,)}),
        ("num_inference_steps", {"num_inference_steps": 2}),
        ("guidance_scale", {"scale": 2.0}),
        ("sites", {"sites": ["blocks.1.img.resid_post"]}),
        ("values", {"values": "both"}),
        ("pipe_kwargs", {"more": {**SHORT, "negative_prompt": "dog"}}),
    ],
)
def test_another_run_is_refused_naming_the_first_setting_that_differs(
    name: str, change: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, recorded: tuple[Any, Path]
) -> None:
    pipeline, path = recorded
    with pytest.raises(StoreExistsError, match=f"another `{name}`"):
        go(pipeline, path, **change)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pipeline, path = small_sd3(), tmp_path_factory.mktemp("recorded") / "run.zarr"
    go(pipeline, path)
    return pipeline, path


def test_other_weights_or_prompts_are_another_run(recorded: tuple[Any, Path]) -> None:
    pipeline, path = recorded
    with pytest.raises(StoreExistsError, match="another `weights_hash`"):
        go(small_sd3(seed=1), path)
    with pytest.raises(StoreExistsError, match="another `prompts`"):
        record(pipeline, ["a cat"], path, num_inference_steps=3, pipe_kwargs=SHORT)


def test_the_estimate_is_what_the_store_holds(tmp_path: Path) -> None:
    for name in ("sd3, CFG in one batch", "sd3.5, skipped layers", "flux, CFG in two calls"):
        make, scale, more, _ = SCENARIOS[name]
        settings = {"num_inference_steps": 3, "guidance_scale": scale, "sites": ["*"], "values": "both"}
        guess = estimate(make(), PROMPTS, seeds=(7,), batch_size=2, pipe_kwargs=more, **settings)
        tree = go(make(), tmp_path / name, scale, more, sites=["*"], values="both")
        sizes = {g[1:]: sum(v.nbytes for v in tree[g].data_vars.values()) for g in tree.groups if tree[g].data_vars}
        assert guess.groups == sizes
        assert (guess.bytes, guess.samples) == (sum(sizes.values()), 2)


def test_too_little_disk_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_sd3()
    need = estimate(pipeline, PROMPTS, seeds=(7,), num_inference_steps=3, batch_size=2, pipe_kwargs=SHORT).bytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": need - 1}))
    steps: list[int] = []
    handle = pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(DiskSpaceError, match=rf"{need} bytes free .* got {need - 1}"):
        go(pipeline, tmp_path / "run.zarr")
    handle.remove()
    assert steps == []
    assert not (tmp_path / "run.zarr").exists()


def test_values_that_are_not_finite_are_flagged_and_said(tmp_path: Path) -> None:
    pipeline = small_sd3()

    def spoil(module: Any, args: tuple, output: Any) -> Any:
        text, image = output
        return text, image.index_fill(2, torch.tensor([3]), float("inf"))

    handle = pipeline.transformer.transformer_blocks[1].register_forward_hook(spoil)
    with pytest.warns(ActivationWarning, match=r"blocks\.2\.img\.resid_post, step 0"):
        tree = go(pipeline, tmp_path / "run.zarr")
    handle.remove()
    flagged = tree["statistics/img"]["flagged"].all(["sample", "branch"])
    assert flagged.sel(step=0).values.tolist() == [False, False, True]


def test_a_clean_run_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = small_sd3()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        go(pipeline, tmp_path / "run.zarr")
    assert capfd.readouterr() == ("", "")


def test_calls_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    pipeline = small_sd3()
    forward = pipeline.scheduler.step

    def step(model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        pipeline.transformer(  # a second call in the step, which nothing labels
            hidden_states=torch.cat([sample] * 2),
            timestep=timestep.expand(4),
            encoder_hidden_states=torch.zeros(4, 8, 32),
            pooled_projections=torch.zeros(4, 32),
        )
        return forward(model_output, timestep, sample, **kwargs)

    pipeline.scheduler.step = step
    with pytest.raises(UnsupportedPipelineError, match="got two at step 0"):
        go(pipeline, tmp_path / "run.zarr")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": "all"}, ConfigError, "'statistics', 'raw' or 'both'"),
        ({"seeds": ()}, ConfigError, "at least one seed"),
        ({"seeds": (1, 1)}, ConfigError, "none twice"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"num_inference_steps": 0}, ConfigError, "num_inference_steps"),
        ({"sites": []}, SiteError, "at least one site"),
        ({"sites": ["blocks.9.img.resid_post"]}, SiteError, "4 blocks"),
        ({"sites": ["blocks.*.img.gate_msa2"]}, SiteError, "pattern"),
        ({"more": {"num_images_per_prompt": 2}}, ConfigError, "several `seeds`"),
        ({"more": {"generator": None}}, ConfigError, "argument `seeds`"),
        ({"more": {"output_type": "np"}}, ConfigError, "/outputs"),
        ({"more": {"negative_prompt": ["a", "b"]}}, ConfigError, "one text"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type, message: str, tmp_path: Path, pipelines: Any) -> None:
    with pytest.raises(error, match=message):
        go(pipelines["sd3"], tmp_path / "run.zarr", **change)
    assert not (tmp_path / "run.zarr").exists()


def test_no_prompts(tmp_path: Path, pipelines: Any) -> None:
    with pytest.raises(PromptError, match="at least one prompt"):
        record(pipelines["sd3"], [], tmp_path / "run.zarr")


def test_site_patterns_select_in_forward_order(pipelines: Any) -> None:
    dit = DiT(pipelines["sd3"])
    assert [str(s) for s in select_sites(dit, ["blocks.2.img.gate_*", "blocks.1.txt.resid_post"])] == [
        "blocks.1.txt.resid_post",
        "blocks.2.img.gate_msa",
        "blocks.2.img.gate_mlp",
    ]
