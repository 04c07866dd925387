"""Every error says what was expected, what came, and what to do; each is also the builtin a caller would catch."""

from __future__ import annotations


class MaditError(Exception):
    """Base of all errors that madit raises on purpose."""


class UnknownFamilyError(MaditError, TypeError):
    """The pipeline's transformer has no adapter."""


class SiteError(MaditError, ValueError):
    """A site, block, stream or channel that this model does not have."""


class PromptError(MaditError, ValueError):
    """A prompt set that is missing, empty or malformed."""


class StoreError(MaditError, ValueError):
    """A store that is not madit's, is of a newer format, or lacks what was asked of it."""


class StoreExistsError(StoreError, FileExistsError):
    """A store that exists and holds a run with other settings."""


class DiskSpaceError(MaditError, OSError):
    """A run that would not fit on the disk; raised before the first step."""


class CriterionError(MaditError, ValueError):
    """A criterion that the recorded statistics cannot answer, or whose parameters make no sense."""


class ConfigError(MaditError, ValueError):
    """A guidance config, channel set or argument that is malformed."""


class ModelMismatchError(MaditError, ValueError):
    """Channels or a config made for another architecture."""


class NothingEditedError(MaditError, RuntimeError):
    """An edit was asked for and touched nothing."""


class UnsupportedPipelineError(MaditError, TypeError):
    """A pipeline on which this operation would give a wrong result."""


class ModelMismatchWarning(UserWarning):
    """Same architecture, other weights."""


class ActivationWarning(UserWarning):
    """Non-finite or clipped activations were recorded."""
