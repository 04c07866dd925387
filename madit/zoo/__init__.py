"""The embedded models: `shapes` (trained, nothing planted) and `shapes-detail` (constructed positive control)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent / "models"
_FOLDERS = {"shapes": "shapes", "shapes-detail": "shapes_detail"}


def names() -> tuple[str, ...]:
    """Names that `DiT.from_pretrained` knows without a hub."""
    return tuple(_FOLDERS)


def path(name: str) -> Path:
    """The folder of an embedded model; raises `KeyError` on other names."""
    return _HERE / _FOLDERS[name]


def facts(name: str) -> dict[str, Any]:
    """How an embedded model was made: `description`, `notes`, `constructed`, and if planted `channels` and `block`."""
    return json.loads((path(name) / "facts.json").read_text())


def along_training(name: str = "shapes") -> Any:
    """Statistics of an embedded model's block outputs at snapshots of its training, as an xarray Dataset."""
    import xarray as xr

    return xr.load_dataset(path(name) / "along_training.nc", engine="scipy")


def load_pipeline(model: str, **kwargs: Any) -> Any:
    """Load an embedded model by name, or anything `DiffusionPipeline.from_pretrained` takes."""
    from diffusers import DiffusionPipeline

    from madit.zoo import components  # noqa: F401  (diffusers loads classes only from modules already imported)

    if model not in _FOLDERS or Path(model).is_dir():
        return DiffusionPipeline.from_pretrained(model, **kwargs)
    with _quietly():
        return DiffusionPipeline.from_pretrained(path(model), **kwargs)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars, and without being told that a `PixelCodec` is not an `AutoencoderKL`."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    loggers = (of_diffusers, of_transformers)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in loggers]
    for log in loggers:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bar in before:
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def __getattr__(name: str) -> Any:
    if name == "plant":  # planting needs torch, which `import madit.zoo` must not load
        from madit.zoo.planting import plant

        return plant
    raise AttributeError(f"module 'madit.zoo' has no attribute {name!r}")
