"""The options that several commands share, and what their values mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from madit.errors import ConfigError

Model = Annotated[str, typer.Option("--model", help="Embedded model, diffusers folder or hub id.")]
Store = Annotated[str, typer.Argument(help="A store that `madit record` wrote.")]
Channels = Annotated[Path | None, typer.Option("--channels", help="Channel set (JSON) that `madit locate` wrote.")]
Prompts = Annotated[list[str], typer.Option("--prompts", help="A .txt, .jsonl or .csv file, or a text; repeatable.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, like 0,1,2 or 0-3.")]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", min=1, help="Denoising steps.")]
Scale = Annotated[float | None, typer.Option("--guidance-scale", help="Classifier-free (Flux: embedded) guidance.")]
PipeKwargs = Annotated[str | None, typer.Option("--pipe-kwargs", help='JSON for the pipeline: {"height": 512}.')]
Device = Annotated[str | None, typer.Option("--device", help="Torch device; default: CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Torch dtype to load in, like bfloat16.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
OutFile = Annotated[Path | None, typer.Option("--out", help="File to write; without it only a table is printed.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: what was not is left to the function's own default."""
    return {name: value for name, value in options.items() if value is not None}


def open_store(store: str) -> Any:
    """The run in a store, as a lazy DataTree."""
    from madit.store import open_run

    return open_run(store)


def channel_set(path: Path | None, store: str | None = None) -> Any:
    """The channels of a file, or those located in a run; exactly one of the two is to be given."""
    from madit.channels import ChannelSet
    from madit.location import locate as find

    if (path is None) == (store is None):
        raise ConfigError("expected either --channels FILE or --store STORE, got both or neither")
    return ChannelSet.load(path) if path is not None else find(open_store(str(store)))
