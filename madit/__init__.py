"""madit: mechanistic interpretability for Diffusion Transformers.

Contents, in the order of the flow:

    DiT               a diffusers pipeline with its blocks, sites and nnsight model
    record            run it and keep statistics or raw activations in a zarr store
    open_run          open a store as a lazy xarray.DataTree
    locate            massive-activation channels -> ChannelSet
    record_factorial  single forwards over a factorial design of the model's inputs
    attribute         Sobol indices: timestep, text, latent -> xarray.Dataset
    intervene         edit channels of the residual stream, undone on exit
    controls          random, norm-matched and other control edits
    GuidanceConfig    Detail Guidance as a document
    guide             Detail Guidance in any classic pipeline
    DetailGuidance    Detail Guidance as a guider of modular pipelines
    evaluate          detail, layout and label metrics with intervals
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DiT": "madit.dit",
    "record": "madit.recording",
    "record_factorial": "madit.recording",
    "open_run": "madit.store",
    "locate": "madit.location",
    "ChannelSet": "madit.channels",
    "attribute": "madit.attribution",
    "intervene": "madit.intervention",
    "controls": "madit.intervention",
    "GuidanceConfig": "madit.configs",
    "guide": "madit.guidance",
    "DetailGuidance": "madit.guider",
    "evaluate": "madit.evaluation",
    "PromptSet": "madit.prompts",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from madit.attribution import attribute
    from madit.channels import ChannelSet
    from madit.configs import GuidanceConfig
    from madit.dit import DiT
    from madit.evaluation import evaluate
    from madit.guidance import guide
    from madit.guider import DetailGuidance
    from madit.intervention import controls, intervene
    from madit.location import locate
    from madit.prompts import PromptSet
    from madit.recording import record, record_factorial
    from madit.store import open_run


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("zoo", "errors", "figures"):
        return importlib.import_module(f"madit.{name}")
    raise AttributeError(f"module 'madit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
