"""The embedded models: `shapes` (trained, nothing planted) and `shapes-detail` (constructed positive control)."""

from __future__ import annotations

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


def load_pipeline(model: str, **kwargs: Any) -> Any:
    """Load an embedded model by name, or anything `DiffusionPipeline.from_pretrained` takes."""
    import diffusers
    from diffusers import DiffusionPipeline

    from madit.zoo import components  # noqa: F401  (diffusers loads classes only from modules already imported)

    if model not in _FOLDERS or Path(model).is_dir():
        return DiffusionPipeline.from_pretrained(model, **kwargs)
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()  # it would say that a PixelCodec is not an AutoencoderKL
    try:
        pipeline = DiffusionPipeline.from_pretrained(path(model), **kwargs)
    finally:
        diffusers.logging.set_verbosity(level)
    return pipeline


def __getattr__(name: str) -> Any:
    if name == "plant":  # planting needs torch, which `import madit.zoo` must not load
        from madit.zoo.planting import plant

        return plant
    raise AttributeError(f"module 'madit.zoo' has no attribute {name!r}")
