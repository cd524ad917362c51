"""The error hierarchy, importable by every layer.

A message says what is wrong, where, and what to do. Library code raises; only ``cli`` prints and exits.
Each class carries the exit code that the commands' contract gives it.
"""

from __future__ import annotations


class PruneOnnxError(Exception):
    """Base of every error that is the user's to mend: shown as one message, without a traceback."""

    exit_code = 1


class ConfigError(PruneOnnxError):
    """A wrong option, configuration key or name (exit code 2)."""

    exit_code = 2


class ModelError(PruneOnnxError):
    """An ONNX file that is missing, truncated, invalid or uses what cannot be run."""


class DataError(PruneOnnxError):
    """A data set or calibration file that is missing, corrupt or of the wrong shape."""


class PlanError(PruneOnnxError):
    """A budget that cannot be met (the message names the best reachable value) or a plan that does not fit."""


class VerificationError(PruneOnnxError):
    """The written graph does not compute what it should; nothing is written."""


class ProviderError(PruneOnnxError):
    """The execution provider that was asked for is not available or did not run every node."""


class OutputError(PruneOnnxError):
    """An output that exists already or cannot be written."""


class TrainingError(PruneOnnxError):
    """Training diverged or cannot be resumed."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what was begun is put away as after Ctrl-C, then the program ends."""
