"""One score per unit, by a criterion's name; the criteria themselves are in :mod:`.criteria`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .analysis import Analysis
from .criteria import CRITERIA, LABELS, WEIGHTS, Criterion, Evidence, Loss, Scores, Taps
from .errors import ConfigError
from .progress import SILENT, Progress

__all__ = ["CRITERIA", "check_needs", "importance"]


def check_needs(chosen: Criterion, *, calibration: bool, labels: bool) -> None:
    """Refuse a criterion that looks at what is not there.

    Raises:
        ConfigError: activations without calibration data, or a loss without labels.
    """
    if chosen.needs != WEIGHTS and not calibration:
        raise ConfigError(
            f"criterion {chosen.name!r} looks at activations, so it needs calibration data. "
            "Pass --calibration, or use --criterion l2."
        )
    if chosen.needs == LABELS and not labels:
        raise ConfigError(
            f"criterion {chosen.name!r} needs labels, and the calibration data has none. Give an .npz with 'labels', "
            "a folder with one sub-folder a class or a data set's name, or use --criterion obs."
        )


def importance(
    analysis: Analysis,
    name: str,
    *,
    scope: str = "global",
    seed: int = 0,
    taps: Taps | None = None,
    loss: Loss | None = None,
    enough: Callable[[np.ndarray], bool] | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """Score every unit.

    Args:
        analysis: the graph's analysis.
        name: a criterion's name.
        scope: ``global`` makes scores comparable between groups.
        seed: of the random criterion.
        taps: shows activations, where there is calibration data.
        loss: of the masked network, where that data has labels.
        enough: tells a keep-set that is as small as the budget asks; an order of removal need not go on from there.
        progress: told how far the criterion is.

    Raises:
        ConfigError: unknown name, or there is nothing that the criterion could look at.
    """
    chosen = CRITERIA.get(name)
    check_needs(chosen, calibration=taps is not None, labels=loss is not None)
    scores = chosen.score(Evidence(analysis, np.random.default_rng(seed), taps, loss, enough, progress))
    if scope == "global" and not chosen.comparable:
        for group in analysis.groups:
            known = scores[group.units]
            mean = known[np.isfinite(known)].mean() if np.isfinite(known).any() else 0.0
            if mean > 0:
                scores[group.units] = known / mean
    return scores
