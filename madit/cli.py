"""The `madit` command: each verb is the function of that name, its options the function's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from madit import console
from madit.cli_export import export
from madit.errors import ConfigError
from madit.options import (
    Channels,
    Device,
    Dtype,
    Model,
    Out,
    OutFile,
    PipeKwargs,
    Prompts,
    Scale,
    Seeds,
    Steps,
    Store,
    channel_set,
    given,
    open_store,
)
from madit.progress import progress

app = typer.Typer(
    name="madit",
    cls=console.Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find the massive activations of a Diffusion Transformer, test what they do, and guide with them.\n\n"
    "Example: madit demo --out out/demo",
)

app.add_typer(export, name="export")


def main() -> None:
    """Run the command."""
    app()


@app.command()
def demo(
    out: Out = Path("out/demo"),
    samples: Annotated[int | None, typer.Option(min=4, help="Pictures for each condition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the prompts, pictures and controls.")] = None,
) -> None:
    """Run the whole flow on the embedded models; HTML report.

    Example: madit demo --out out/demo
    """
    from madit.workflows.demo import demo as run

    console.quiet_libraries()
    run(out, **given(samples=samples, seed=seed))


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Embedded model, diffusers folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Prompt to run.")] = "a red circle",
    pipe_kwargs: PipeKwargs = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Check by behaviour that madit reads a model rightly.

    Exit code 1 if it does not.

    Example: madit doctor shapes
    """
    from madit.workflows import doctor as workflow

    dit = console.load(model, device, dtype)
    checks = workflow.doctor(dit, prompt, pipe_kwargs=console.mapping(pipe_kwargs, "--pipe-kwargs"))
    console.table(repr(dit), ("block", "module", "kind", "sites"), workflow.site_table(dit))
    console.table("checks", ("check", "result", "detail"), [(c.name, c.verdict, c.detail) for c in checks])
    if not all(c.passed for c in checks):
        raise typer.Exit(1)


@app.command()
def sites(model: Annotated[str, typer.Argument(help="Embedded model, diffusers folder or hub id.")]) -> None:
    """List the names of a model's sites in forward order.

    Example: madit sites shapes
    """
    typer.echo("\n".join(console.load(model).sites()))


@app.command()
def record(
    model: Model,
    prompts: Prompts,
    store: Annotated[str, typer.Option("--store", help="Store to write.")],
    seeds: Seeds = "0",
    num_inference_steps: Steps = None,
    guidance_scale: Scale = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples in a batch.")] = None,
    sites: Annotated[
        str | None, typer.Option(help="Site names, separated by commas; `madit sites` lists them.")
    ] = None,
    values: Annotated[Literal["statistics", "raw", "both"], typer.Option(help="What to keep.")] = "statistics",
    design: Annotated[
        Literal["matched", "label"] | None,
        typer.Option(help="Record a factorial design for `madit attribute` instead."),
    ] = None,
    levels: Annotated[str | None, typer.Option(help='JSON, with --design: {"latent": 8, "timestep": 6}.')] = None,
    pipe_kwargs: PipeKwargs = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Record activations into a store.

    Of whole denoising runs, or with --design of a factorial design of the inputs.

    Example: madit record --model shapes --prompts "a red circle" --seeds 0-3 --store run.zarr
    """
    from madit import recording

    texts = console.prompts_of(prompts)
    numbers = console.integers(seeds, "--seeds") or [0]
    extra = console.mapping(pipe_kwargs, "--pipe-kwargs")
    wanted = None if sites is None else [site.strip() for site in sites.split(",")]
    counts = console.mapping(levels, "--levels") or None
    if design is None and counts:
        raise ConfigError("expected --levels together with --design, got it alone")
    dit = console.load(model, device, dtype)
    if design is None:
        run = given(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size, sites=wanted
        )
        recording.record(dit, texts, store=store, seeds=numbers, values=values, pipe_kwargs=extra, **run)
    else:
        run = given(levels=counts)
        recording.record_factorial(dit, texts, store=store, design=design, seed=numbers[0], pipe_kwargs=extra, **run)
    typer.echo(store)


@app.command()
def locate(
    store: Store,
    ratio: Annotated[
        float | None, typer.Option(help="Multiple of the median magnitude that counts as massive.")
    ] = None,
    coverage: Annotated[float | None, typer.Option(help="Share of tokens that must exceed it.")] = None,
    persistence: Annotated[float | None, typer.Option(help="Share of samples that must pass.")] = None,
    step_share: Annotated[float | None, typer.Option(help="Share of steps at which they must.")] = None,
    criterion: Annotated[Literal["ratio", "sun"] | None, typer.Option(help="Which definition.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Take this many channels a block instead.")] = None,
    stream: Annotated[Literal["img", "txt"] | None, typer.Option(help="Which stream.")] = None,
    branch: Annotated[str | None, typer.Option(help="Which branch decides.")] = None,
    out: OutFile = None,
) -> None:
    """Find the massive channels of a run, block by block.

    Example: madit locate run.zarr --ratio 100 --out channels.json
    """
    from madit import location

    chosen = given(
        ratio=ratio, coverage=coverage, persistence=persistence, step_share=step_share, criterion=criterion,
        top_k=top_k, stream=stream, branch=branch,
    )  # fmt: skip
    channels = location.locate(open_store(store), **chosen)
    columns = ("block", "channel", "ratio", "95 %", "coverage", "constancy", "persistence")
    rows = [
        (
            e.block,
            e.channel,
            e.ratio,
            console.interval(e.ratio_low, e.ratio_high),
            e.coverage,
            e.constancy,
            e.persistence,
        )
        for e in channels.entries
    ]
    console.table("massive channels", columns, rows)
    typer.echo(location.summary(channels))
    if out is not None:
        typer.echo(channels.save(console.ready(out)))


@app.command()
def attribute(
    store: Store,
    channels: Channels = None,
    seed: Annotated[int | None, typer.Option(help="Of the bootstrap.")] = None,
    out: OutFile = None,
) -> None:
    """Say which inputs drive the massive channels.

    First-order and total Sobol indices over a factorial store.

    Example: madit attribute factorial.zarr --channels channels.json --out effects.csv
    """
    from madit import attribution

    if channels is None:
        raise ConfigError("expected --channels FILE, got none; `madit locate RUN --out channels.json` writes one")
    effects = attribution.attribute(open_store(store), channel_set(channels), **given(seed=seed))
    frame = effects.to_dataframe().dropna(how="all", subset=["first_order", "total"]).reset_index()
    shown = [c for c in ("block", "channel", "factor", "first_order", "first_order_low", "first_order_high", "total",
                         "total_low", "total_high") if c in frame]  # fmt: skip
    console.table("Sobol indices", shown, frame[shown].itertuples(index=False))
    if out is not None:
        frame.to_csv(console.ready(out), index=False)
        typer.echo(out)


@app.command()
def intervene(
    model: Model,
    prompts: Prompts,
    blocks: Annotated[str, typer.Option(help="Blocks whose incoming state is edited, like 4 or 4,6-8.")],
    channels: Channels = None,
    store: Annotated[str | None, typer.Option("--store", help="Or a run to locate the channels in.")] = None,
    seeds: Seeds = "0",
    mode: Annotated[Literal["scale", "mean"] | None, typer.Option(help="Scale, or set to the recorded mean.")] = None,
    factor: Annotated[float | None, typer.Option(help="Factor of mode scale; 0 is zeroing.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps to edit, like 0-9; default all.")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to edit: all, cond or uncond.")] = None,
    stream: Annotated[Literal["img", "txt"] | None, typer.Option(help="Stream to edit.")] = None,
    layernorm: Annotated[Literal["live", "frozen"] | None, typer.Option(help="LayerNorms after the edit.")] = None,
    control: Annotated[
        Literal["random", "norm_matched", "all_blocks"] | None, typer.Option(help="Edit a control instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which draw of the control.")] = 0,
    num_inference_steps: Steps = None,
    guidance_scale: Scale = None,
    pipe_kwargs: PipeKwargs = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = Path("out/intervene"),
) -> None:
    """Draw with and without an edit of massive channels.

    Example: madit intervene --model shapes-detail --channels channels.json --blocks 4 --prompts "a red circle"
    """
    from madit import intervention
    from madit.evaluation import compare
    from madit.workflows.generate import generate as draw

    texts = console.prompts_of(prompts)
    edit = given(mode=mode, factor=factor, branch=branch, stream=stream, layernorm=layernorm)
    edit |= given(steps=console.integers(steps, "--steps"), blocks=console.integers(blocks, "--blocks"))
    run = given(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    run |= console.mapping(pipe_kwargs, "--pipe-kwargs")
    chosen = channel_set(channels, store)
    if control is not None:
        chosen = intervention.controls(chosen, kind=control, seed=seed)
        edit |= {"mode": "add"} if control == "norm_matched" else {}
    dit = console.load(model, device, dtype)
    numbers = console.integers(seeds, "--seeds") or [0]
    with progress("pictures", 2 * len(texts) * len(numbers)) as tick:
        clean = draw(dit, texts, numbers, out / "clean", run, tick)
        with intervention.intervene(dit, chosen, **edit):
            edited = draw(dit, texts, numbers, out / "edited", run, tick)
    console.print_metrics(compare({"clean": clean, "edited": edited}, reference=clean, baseline="clean"))
    typer.echo(out)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Model,
    guidance: Annotated[Path | None, typer.Option("--guidance", help="Guidance config (JSON) to draw with.")] = None,
    seeds: Seeds = "0",
    num_inference_steps: Steps = None,
    guidance_scale: Scale = None,
    pipe_kwargs: PipeKwargs = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Out = Path("out/generate"),
) -> None:
    """Draw a prompt, with Detail Guidance if asked.

    Example: madit generate "a large red circle" --model shapes --guidance dg.json --out out/generate
    """
    from contextlib import nullcontext

    from madit.configs import GuidanceConfig
    from madit.guidance import guide
    from madit.workflows.generate import generate as draw

    config = None if guidance is None else GuidanceConfig.load(guidance)
    run = given(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    run |= console.mapping(pipe_kwargs, "--pipe-kwargs")
    numbers = console.integers(seeds, "--seeds") or [0]
    dit = console.load(model, device, dtype)
    guided = nullcontext() if config is None else guide(dit, config)
    with guided, progress("pictures", len(numbers)) as tick:
        draw(dit, [prompt], numbers, out, run, tick)
    typer.echo(out)


@app.command()
def evaluate(
    images: Annotated[Path, typer.Option(help="Folder of pictures.")],
    reference: Annotated[Path | None, typer.Option(help="Folder of pictures to compare with.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the bootstrap.")] = None,
    out: OutFile = None,
) -> None:
    """Measure detail, noise and layout of pictures.

    Example: madit evaluate --images out/edited --reference out/clean --out metrics.csv
    """
    from madit import evaluation

    metrics = evaluation.evaluate(images, reference=reference, **given(seed=seed))
    console.print_metrics(metrics)
    if out is not None:
        metrics.to_pandas().to_csv(console.ready(out), header=False)
        typer.echo(out)


@app.command()
def report(
    store: Store,
    channels: Channels = None,
    factorial: Annotated[str | None, typer.Option(help="Factorial store of the same model, for attribution.")] = None,
    notes: Annotated[str, typer.Option(help="What a reader must know of the model.")] = "",
    out: Out = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about a run.

    Example: madit report run.zarr --channels channels.json --out report.html
    """
    from madit.workflows.report import report as write

    write(
        store,
        out=console.ready(out),
        channels=None if channels is None else channel_set(channels),
        factorial=factorial,
        notes=notes,
    )
    typer.echo(out)
