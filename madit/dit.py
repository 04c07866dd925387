"""`DiT`: a diffusers pipeline, its blocks and sites, and the nnsight model over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from madit import arch
from madit.channels import ModelFingerprint
from madit.sites import Site


class DiT:
    """A diffusion transformer inside a loaded diffusers pipeline; nothing is copied.

    Args:
        pipeline: any classic diffusers pipeline whose transformer is of a known family.

    Raises:
        UnknownFamilyError: if the transformer has no adapter.

    >>> dit = DiT.from_pretrained("shapes")
    >>> len(dit.blocks)
    6
    """

    def __init__(self, pipeline: Any, name: str = "", revision: str = ""):
        transformer = getattr(pipeline, "transformer", None)
        self.family = arch.family_of(transformer if transformer is not None else pipeline)
        self.pipeline = pipeline
        self.name = name or str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__)
        self.revision = revision
        self.blocks = arch.bind(transformer, self.family)

    @classmethod
    def from_pretrained(cls, model: str | Path, **kwargs: Any) -> DiT:
        """Load an embedded model by name, a local diffusers folder, or a hub id.

        Args:
            model: a name in `madit.zoo.names()`, a folder, or a hub id; a folder of that name goes first.
            **kwargs: passed to `DiffusionPipeline.from_pretrained` (`torch_dtype`, `revision`, ...).

        Raises:
            UnknownFamilyError: if the model's transformer has no adapter.
            OSError: what diffusers raises where there is no such model.
        """
        from madit import zoo

        name = str(model)
        pipeline = zoo.load_pipeline(name, **kwargs)
        return cls(pipeline, name=name, revision=str(kwargs.get("revision", "")))

    @property
    def transformer(self) -> Any:
        """The pipeline's transformer."""
        return self.pipeline.transformer

    @cached_property
    def model(self) -> Any:
        """The nnsight model over the pipeline, for free tracing; made at first use."""
        from madit import tracing

        return tracing.wrap(self.pipeline)

    @property
    def width(self) -> int:
        """Number of channels of the residual stream."""
        return arch.width(self.transformer, self.family)

    def sites(self) -> list[str]:
        """Names of all sites in forward order."""
        return [str(site) for block in self.blocks for site in block.sites()]

    def site(self, name: str) -> Site:
        """Check a site's name against this model; raises `SiteError` where it does not have it."""
        from madit.errors import SiteError

        site = Site.parse(name)
        if site.block >= len(self.blocks) or site not in self.blocks[site.block].sites():
            near = self.blocks[min(site.block, len(self.blocks) - 1)].sites()
            raise SiteError(
                f"expected a site of {self.name} ({len(self.blocks)} blocks), got {name!r}; "
                f"block {near[0].block} has {', '.join(str(s) for s in near)}"
            )
        return site

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Class, config and weights of the transformer, to recognise results made on it."""
        config = {k: v for k, v in dict(self.transformer.config).items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        return ModelFingerprint(
            name=self.name,
            revision=self.revision,
            transformer=type(self.transformer).__name__,
            config_hash=hashlib.sha256(text.encode()).hexdigest(),
            weights_hash=_weights_hash(self.transformer),
        )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without the pipeline's own progress bar."""
        before = dict(getattr(self.pipeline, "_progress_bar_config", {}))
        self.pipeline.set_progress_bar_config(**{**before, "disable": True})
        try:
            yield
        finally:
            self.pipeline.set_progress_bar_config(**before)

    def __repr__(self) -> str:
        return f"DiT({self.name!r}, family={self.family.name!r}, blocks={len(self.blocks)}, width={self.width})"


def as_dit(model: Any) -> DiT:
    """A `DiT` as it is; a pipeline wrapped."""
    return model if isinstance(model, DiT) else DiT(model)


def _weights_hash(transformer: Any) -> str:
    """A hash over the first values of every parameter: cheap on billions of weights, and stable over dtypes' storage.

    Empty on the meta device, where there are no values.
    """
    digest = hashlib.sha256()
    for name, parameter in transformer.named_parameters():
        if parameter.device.type == "meta":
            return ""
        head = parameter.detach().reshape(-1)[:16].float().cpu().numpy()
        digest.update(name.encode() + head.tobytes())
    return digest.hexdigest()
