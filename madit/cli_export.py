"""`madit export`: results as documents for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from madit import console
from madit.errors import ConfigError
from madit.options import Channels, channel_set, given

export = typer.Typer(cls=console.Verbs, rich_markup_mode=None, help="Write results as documents.")


@export.command("channels")
def export_channels(
    out: Annotated[Path, typer.Option("--out", help="A .json (channel set) or .csv (evidence table).")],
    store: Annotated[str | None, typer.Option("--store", help="A run to locate them in.")] = None,
    channels: Channels = None,
) -> None:
    """Write massive channels as JSON, or their evidence as a table.

    Example: madit export channels --store run.zarr --out channels.csv
    """
    if out.suffix not in (".json", ".csv"):
        raise ConfigError(f"expected --out to end in .json or .csv, got {out}")
    chosen = channel_set(channels, store)
    if out.suffix == ".json":
        chosen.save(console.ready(out))
    else:
        chosen.to_dataset().to_dataframe().to_csv(console.ready(out), index=False)
    typer.echo(out)


@export.command("guidance")
def export_guidance(
    block: Annotated[int, typer.Option(help="Block whose incoming state is edited in the degraded branch.")],
    scale: Annotated[float, typer.Option(help="w of the guidance; 0 is none.")],
    out: Annotated[Path, typer.Option("--out", help="A .json, or a folder for a guider of modular pipelines.")],
    store: Annotated[str | None, typer.Option("--store", help="A run to locate the channels in.")] = None,
    channels: Channels = None,
    factor: Annotated[float | None, typer.Option(help="Factor of the channels in the degraded branch.")] = None,
    mode: Annotated[Literal["scale", "mean"] | None, typer.Option(help="Scale, or set to the recorded mean.")] = None,
    steps: Annotated[str | None, typer.Option(help="Guided part of the run as fractions, like 0,0.6.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Disrupted image tokens, like 0-31; default all.")] = None,
) -> None:
    """Write a Detail Guidance config (JSON), or a guider's folder for diffusers' modular pipelines.

    Example: madit export guidance --channels channels.json --block 4 --scale 0.25 --out dg.json
    """
    from madit.configs import GuidanceConfig

    chosen = given(
        factor=factor,
        mode=mode,
        steps=console.fractions(steps, "--steps"),
        tokens=console.integers(tokens, "--tokens"),
    )
    config = GuidanceConfig.from_channels(channel_set(channels, store), block=block, scale=scale, **chosen)
    if out.suffix == ".json":
        config.save(console.ready(out))
    else:
        from madit.guider import DetailGuidance

        DetailGuidance.from_config(config).save_pretrained(out)
    typer.echo(out)
