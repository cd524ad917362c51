"""The order of calibrated pruning, and the control of every comparison."""

from __future__ import annotations

from ..errors import ConfigError
from .base import ACTIVATIONS, Evidence, Scores, criterion


@criterion("obs", needs=ACTIVATIONS)
def obs(evidence: Evidence) -> Scores:
    """What the layers that read a channel lose when refitted without it (structured OBS); needs --calibration.

    All readers of coupled channels together. Global: by the damage measured at the output, see ``allocate``. The
    reconstruction makes this choice itself, layer after layer; there are no scores to be had before it.
    """
    raise ConfigError("criterion 'obs' chooses while it refits; it has no scores. Pass --calibration with a budget.")


@criterion("random", comparable=True)
def random(evidence: Evidence) -> Scores:
    """A random order, the control of every comparison; follows --seed.

    Global: as it is, uniform in every group.
    """
    return evidence.rng.random(evidence.analysis.units)
