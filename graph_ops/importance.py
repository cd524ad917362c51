"""Importance criteria: one score per unit, from the weights alone.

A unit stands for coupled channels of several layers, so its score gathers all of them. Under ``--scope global`` scores
of different groups are compared; criteria whose scale differs from layer to layer are divided by their group's mean
first (as Torch-Pruning's group importance does), those that are comparable by design are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .analysis import Analysis
from .errors import ConfigError
from .registry import Registry

Scores = np.ndarray
"""float64 (units,); NaN where the criterion has nothing to say (such units are kept)."""


@dataclass(frozen=True)
class Criterion:
    """A named criterion.

    Attributes:
        name: as on the command line.
        score: (analysis, random generator) to one score per unit, higher is more important.
        comparable: whether scores of different groups are on one scale.
    """

    name: str
    score: Callable[[Analysis, np.random.Generator], Scores]
    comparable: bool

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        return self.score.__doc__ or ""


CRITERIA: Registry[Criterion] = Registry("criterion")


def criterion(name: str, *, comparable: bool = False) -> Callable[[Callable], Callable]:
    """List a scoring function under ``name``."""

    def add(score: Callable[[Analysis, np.random.Generator], Scores]) -> Callable:
        CRITERIA.register(name)(Criterion(name, score, comparable))
        return score

    return add


def importance(analysis: Analysis, name: str, *, scope: str = "global", seed: int = 0) -> Scores:
    """Score every unit.

    Args:
        analysis: the graph's analysis.
        name: a criterion's name.
        scope: ``global`` makes scores comparable between groups.
        seed: of the random criterion.

    Raises:
        ConfigError: unknown name, or the graph has nothing that the criterion could look at.
    """
    chosen = CRITERIA.get(name)
    scores = chosen.score(analysis, np.random.default_rng(seed))
    if scope == "global" and not chosen.comparable:
        for group in analysis.groups:
            known = scores[group.units]
            mean = known[np.isfinite(known)].mean() if np.isfinite(known).any() else 0.0
            if mean > 0:
                scores[group.units] = known / mean
    return scores


def _gather(analysis: Analysis, norm: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """Mean over all members of a unit of a measure of the producing weights, each layer's relative to its own mean.

    A sum would favour units with many members: in a group whose parts differ in that (split and shuffled streams,
    dense and dual paths), all of the part with fewer members would go before one channel of the other. Without the
    layer's mean the parts with larger filters would win in the same way.
    """
    total = np.zeros(analysis.units)
    members = np.zeros(analysis.units)
    for producer in analysis.producers:
        if producer.weight is None:
            continue
        index, axis = producer.weight
        weight = analysis.value(producer.node.inputs[index])
        if weight is None:
            continue
        per_channel = _by_channel(weight, axis, norm)
        scale = per_channel.mean() if len(per_channel) else 0.0
        # A grouped ConvTranspose stores the outputs of one group there, and the labels of the others repeat them.
        labels = producer.labels[: len(per_channel)]
        np.add.at(total, labels, per_channel / scale if scale > 0 else per_channel)
        np.add.at(members, labels, 1)
    return np.where(members > 0, total / np.maximum(members, 1), np.nan)


def _by_channel(weight: np.ndarray, axis: int, norm: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a norm to every slice of ``axis`` in float64, a few at a time: a large layer never exists twice."""
    rows = np.moveaxis(weight, axis, 0)
    step = max(1, 2**17 // max(1, weight.size // len(rows)))
    parts = [
        norm(np.asarray(rows[i : i + step], np.float64).reshape(len(rows[i : i + step]), -1))
        for i in range(0, len(rows), step)
    ]
    return np.concatenate(parts)


@criterion("l1")
def l1(analysis: Analysis, rng: np.random.Generator) -> Scores:
    """Sum of absolute weights of the producing filters (Li et al. 2017)."""
    return _gather(analysis, lambda rows: np.abs(rows).sum(1))


@criterion("l2")
def l2(analysis: Analysis, rng: np.random.Generator) -> Scores:
    """Euclidean norm of the producing filters."""
    return _gather(analysis, lambda rows: np.sqrt(np.square(rows).sum(1)))


@criterion("bn-gamma", comparable=True)
def bn_gamma(analysis: Analysis, rng: np.random.Generator) -> Scores:
    """Absolute BatchNorm scale, ranked over the net (Network Slimming, Liu et al. 2017); needs BN in the graph."""
    total = np.zeros(analysis.units)
    seen = np.zeros(analysis.units, bool)
    for operand in analysis.operands:
        if operand.node.op_type == "BatchNormalization" and operand.input == 1:
            scale = np.abs(np.asarray(analysis.value(operand.node.inputs[1]), np.float64))
            np.add.at(total, operand.axes[0], scale)
            seen[operand.axes[0]] = True
    if not seen.any():
        raise ConfigError(
            "criterion 'bn-gamma' needs BatchNormalization nodes and the graph has none (exporters fold "
            "them into the convolutions). Export with BN kept, or use --criterion l2."
        )
    return np.where(seen, total, np.nan)


@criterion("obs")
def obs(analysis: Analysis, rng: np.random.Generator) -> Scores:
    """What the layers that read a channel lose when refitted without it (structured OBS); needs --calibration."""
    raise ConfigError("criterion 'obs' looks at calibration data; pass --calibration, or use --criterion l2.")


@criterion("random", comparable=True)
def random(analysis: Analysis, rng: np.random.Generator) -> Scores:
    """A random order, the control of every comparison; follows --seed."""
    return rng.random(analysis.units)
