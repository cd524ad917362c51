"""Channel groups: one forward pass over the graph that labels what can only be removed together.

The state of a tensor is one label vector per prunable axis; an axis without a vector cannot be cut. Operators that
compute across an axis end labels and start fresh ones, element-wise operators join them, operators that move data
move them (one rule per operator family, see :mod:`.rules`). What no rule knows pins the labels that reach it, with the
reason. Constants impose nothing: they take the labels of the tensors they meet and are sliced per use.

A *unit* is a class of labels that go or stay together. A *group* is the units of producers that share any of them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import ConfigError
from .graph import Graph, Node
from .labels import Labels, Vector
from .probe import Probe, Shape
from .records import Axes, ChannelGroup, Contraction, Fork, Operand, Pin, Producer, Released, Work
from .registry import close_matches

# Analyses tried beyond the first one, where an axis that was chosen to be cut turned out to be stuck.
MOST_PASSES = 8
# Vectors longer than this are looked at unit by unit where positions do not matter.
LONG = 4096


@dataclass
class Context:
    """What the rules see and fill in during one pass."""

    graph: Graph
    probe: Probe
    release_norms: bool = False
    select_inputs: bool = False
    options: dict[tuple[str, int], int] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    axes: dict[str, Axes] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    choices: dict[tuple[str, int], tuple[int, Vector]] = field(default_factory=dict)

    # -- reading -----------------------------------------------------------------------------------------------------
    def shape(self, name: str) -> Shape:
        """Shape of a tensor at the probed sizes; ``()`` for an absent optional input."""
        return self.probe.shapes.get(name, ())

    def static(self, name: str) -> bool:
        """Whether the tensor does not depend on data and has a known value."""
        return self.graph.is_static(name) and (name in self.graph.initializers or name in self.probe.values)

    def varies(self, name: str) -> bool:
        """Whether a static tensor follows a dynamic input size."""
        return name in self.probe.varying

    def value(self, name: str) -> np.ndarray | None:
        """Value of a static tensor, ``None`` when it has none."""
        if not self.static(name):
            return None
        if name in self.probe.values:
            return self.probe.values[name]
        return self.graph.constant(name)

    def vectors(self, name: str) -> Axes:
        """Label vectors of a tensor by axis (empty when nothing of it can be cut)."""
        return self.axes.get(name, {})

    # -- writing -----------------------------------------------------------------------------------------------------
    def set(self, name: str, axes: Axes) -> None:
        """Give a tensor its vectors; axes of length 1 are never labelled."""
        shape = self.shape(name)
        kept = {a: v for a, v in axes.items() if a < len(shape) and shape[a] > 1 and len(v) == shape[a]}
        if kept:
            self.axes[name] = kept

    def fresh(self, node: Node, axis: int, n: int, *, output: int = 0, weight: tuple[int, int] | None = None) -> Vector:
        """Start ``n`` labels on an output axis."""
        vector = self.labels.fresh(n)
        self.produce(node, axis, vector, output=output, weight=weight)
        return vector

    def produce(
        self, node: Node, axis: int, vector: Vector, *, output: int = 0, weight: tuple[int, int] | None = None
    ) -> None:
        """Record that ``node`` makes ``vector`` on an output axis; an axis of length 1 has nothing to cut."""
        if self.shape(node.outputs[output])[axis] > 1:
            self.producers.append(Producer(node, output, axis, vector, weight))

    def fork(self, node: Node, axis: int, source: Vector) -> Vector:
        """Let ``node`` keep fewer positions of its first input than others do; return the labels of what it keeps."""
        vector = self.fresh(node, axis, len(source))
        self.forks.append(Fork(node, axis, source, vector))
        return vector

    def join(self, a: Vector, b: Vector) -> None:
        """Positions of ``a`` and ``b`` go or stay together."""
        self.labels.join(a, b)

    def pin(self, vector: Vector, node: Node | str, reason: str) -> None:
        """Labels that must stay because of ``node``."""
        self.pins.append(Pin(vector, f"{node}: {reason}"))

    def pin_inputs(self, node: Node, reason: str) -> None:
        """Pin whatever reaches ``node``."""
        for name in dict.fromkeys([*node.inputs, *sorted(node.captured)]):
            for vector in self.vectors(name).values():
                self.pin(vector, node, reason)

    def pin_except(self, node: Node, name: str, keep: Sequence[int], reason: str) -> Axes:
        """Pin all vectors of a tensor but those on the axes ``keep``; return the kept ones."""
        kept: Axes = {}
        for axis, vector in self.vectors(name).items():
            if axis in keep:
                kept[axis] = vector
            else:
                self.pin(vector, node, reason.format(axis=axis))
        return kept

    def operand(self, node: Node, index: int, axes: Axes) -> None:
        """Let a static input follow labels; axes of length 1 broadcast and are left alone."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        if not name:
            return
        shape = self.shape(name)
        axes = {a: v for a, v in axes.items() if shape[a] == len(v) and shape[a] > 1}
        if axes:
            self.operands.append(Operand(node, index, axes))

    def spread(self, node: Node, same: Callable[[int], int]) -> Axes:
        """Vectors of a node's first input; a constant there gets fresh labels, since nothing else says what it meets.

        Args:
            node: one that spreads its first input over a dynamic size.
            same: the output axis that each input axis goes to.
        """
        x, y = node.inputs[0], node.outputs[0]
        if not self.static(x) or self.varies(x):
            return self.vectors(x)
        moving = self.probe.moving_axes(y)
        axes = {
            a: self.labels.fresh(n)
            for a, n in enumerate(self.shape(x))
            if n > 1 and n == self.shape(y)[same(a)] and not moving[same(a)]
        }
        self.operand(node, 0, axes)
        return axes

    def choose(self, node: Node, which: int, ranked: Sequence[int], vectors: dict[int, Vector]) -> int:
        """Take one of several axes that could be cut; a later pass may take the next one.

        Args:
            node: where the choice is made.
            which: number of the choice within the node.
            ranked: candidate axes, best first.
            vectors: the labels that each candidate would keep apart.
        """
        key = (node.name, which)
        option = self.options.get(key, 0) % len(ranked)
        self.choices[key] = (len(ranked), vectors[ranked[option]])
        return ranked[option]


@dataclass
class Analysis:
    """Everything that scoring, planning and cutting need to know about a graph.

    Attributes:
        axes: tensor name to {axis: unit ids of its positions}.
        pinned: per unit, whether it must stay.
        groups: channel groups in the order of their first producer.
        group_of: per unit, its group's index.
        vectors: every distinct vector of unit ids; each must keep one position at least.
    """

    graph: Graph
    probe: Probe
    axes: dict[str, Axes]
    operands: list[Operand]
    producers: list[Producer]
    contractions: list[Contraction]
    works: list[Work]
    released: list[Released]
    forks: list[Fork]
    pinned: np.ndarray
    groups: list[ChannelGroup]
    group_of: np.ndarray
    _vectors: list[Vector] | None = field(default=None, repr=False)

    def drop_unread(self, keep: np.ndarray) -> np.ndarray:
        """Return ``keep`` without the sources that only forks read and that all of these dropped."""
        if not self.forks:
            return keep
        only_forks = np.zeros(self.units, bool)
        needed = self.pinned.copy()
        for fork in self.forks:
            only_forks[fork.source] = True
            needed[fork.source[keep[fork.labels]]] = True
        for contraction in self.contractions:
            needed[contraction.labels] = True
        return keep & (needed | ~only_forks)

    @property
    def units(self) -> int:
        """Number of removable units, pinned ones included."""
        return len(self.pinned)

    def value(self, name: str) -> np.ndarray | None:
        """Value of a static tensor, ``None`` when it has none."""
        if not self.graph.is_static(name):
            return None
        if name in self.probe.values:
            return self.probe.values[name]
        return self.graph.constant(name)

    def vectors(self) -> list[Vector]:
        """Return the units of every distinct vector; each vector must keep at least one position."""
        if self._vectors is None:
            # Most of them are one array wherever they occur; comparing contents is for the rest.
            arrays = {id(vector): vector for axes in self.axes.values() for vector in axes.values()}
            lean = [self._distinct(vector) if len(vector) > LONG else vector for vector in arrays.values()]
            self._vectors = list({vector.tobytes(): vector for vector in lean}.values())
        return self._vectors

    def _distinct(self, vector: Vector) -> Vector:
        """The units of a vector, once each: a map laid out as one line repeats each of them for every pixel."""
        found = np.zeros(self.units, bool)
        found[vector] = True
        return np.flatnonzero(found)


def analyse(
    graph: Graph, probe: Probe, *, release_norms: bool = False, select_inputs: bool = False, ignore: Sequence[str] = ()
) -> Analysis:
    """Find the channel groups of a graph.

    Args:
        graph: the model.
        probe: shapes and static values from one run.
        release_norms: let axes that a normalisation or mean runs across be cut (statistics then change).
        select_inputs: let a BatchNormalization that shares its input with other readers (pre-activation and dense
            nets) drop channels of its own, through a Gather.
        ignore: globs of node names whose channels stay.

    Raises:
        ConfigError: a glob matches no node.
    """

    def run(options: dict[tuple[str, int], int]) -> Context:
        return _pass(Context(graph, probe, release_norms, select_inputs, options), ignore)

    best = run({})
    best_free = _free(best)
    passes = 0
    together = True
    tried: set[tuple[str, int]] = set()
    while passes < MOST_PASSES:
        dead = [key for key in _dead_choices(best) if together or key not in tried]
        if not dead:
            break
        if not together:
            dead = dead[:1]
            tried.update(dead)
        other = run({**best.options, **{key: best.options.get(key, 0) + 1 for key in dead}})
        passes += 1
        free = _free(other)
        if free > best_free:
            best, best_free = other, free
            tried.clear()
        else:
            together = False  # what helps in one place may harm in another: one choice at a time from here
    return _resolve(best)


def _dead_choices(ctx: Context) -> list[tuple[str, int]]:
    """Choices of an axis along which nothing can be cut, and that have another option."""
    if not ctx.choices:
        return []
    root = ctx.labels.roots()
    pinned = _pinned_roots(ctx, root)
    dead = []
    for key, (count, vector) in ctx.choices.items():
        roots = root[vector]
        if ctx.options.get(key, 0) < count - 1 and (pinned[roots].all() or (roots == roots[0]).all()):
            dead.append(key)
    return dead


def _pass(ctx: Context, ignore: Sequence[str]) -> Context:
    """Run every rule once, in topological order."""
    from .rules import rule_for

    graph = ctx.graph
    for node in graph.nodes:
        if not any(name in graph.dynamic for name in node.outputs):
            continue
        rule_for(node).propagate(node, ctx)
        for name in node.captured:
            for vector in ctx.vectors(name).values():
                ctx.pin(vector, node, "its body reads the tensor")
    for name in graph.outputs:
        for vector in ctx.vectors(name).values():
            ctx.pin(vector, f"graph output {name!r}", "its shape is the model's interface")
    for glob in ignore:
        hit = [node.name for node in graph.nodes if fnmatch.fnmatchcase(node.name, glob)]
        if not hit:
            raise ConfigError(f"--ignore {glob!r} matches no node.{close_matches(glob, [n.name for n in graph.nodes])}")
        for producer in ctx.producers:
            if producer.node.name in hit:
                ctx.pin(producer.labels, producer.node, f"--ignore {glob}")
    return ctx


def _pinned_roots(ctx: Context, root: Vector) -> np.ndarray:
    pinned = np.zeros(ctx.labels.count, bool)
    for pin in ctx.pins:
        pinned[root[pin.labels]] = True
    return pinned


def _free(ctx: Context) -> int:
    """Number of produced positions that can go: what a choice of axes is judged by. A unit alone cannot."""
    root = ctx.labels.roots()
    pinned = _pinned_roots(ctx, root)
    free = 0
    for producer in ctx.producers:
        roots = root[producer.labels]
        if (roots != roots[0]).any():
            free += int((~pinned[roots]).sum())
    return free


def _resolve(ctx: Context) -> Analysis:
    """Number the units, pin them, and gather them into groups."""
    everything = [v for axes in ctx.axes.values() for v in axes.values()]
    everything += [v for o in ctx.operands for v in o.axes.values()] + [p.labels for p in ctx.producers]
    everything += [f.source for f in ctx.forks]
    everything += [c.labels for c in ctx.contractions] + [v for w in ctx.works for v in w.factors]
    root = ctx.labels.roots()
    seen = np.zeros(ctx.labels.count, bool)
    for vector in {id(v): v for v in everything}.values():
        seen[root[vector]] = True
    used = np.flatnonzero(seen)
    unit = np.full(ctx.labels.count, -1, np.int64)
    unit[used] = np.arange(len(used))
    unit = unit[root]
    cache: dict[int, Vector] = {}

    def units(vector: Vector) -> Vector:
        if id(vector) not in cache:
            cache[id(vector)] = unit[vector]
        return cache[id(vector)]

    pinned = np.zeros(len(used), bool)
    reasons: dict[int, list[str]] = {}
    for pin in ctx.pins:
        ids = units(pin.labels)
        ids = ids[ids >= 0]
        pinned[ids] = True
        for i in set(ids.tolist()):
            if pin.reason not in reasons.setdefault(i, []):
                reasons[i].append(pin.reason)
    # No loop over labels of replaced vectors may outlive ctx, so everything is rewritten in terms of units here.
    producers = [Producer(p.node, p.output, p.axis, units(p.labels), p.weight) for p in ctx.producers]
    groups, group_of = _groups(producers, len(used), reasons)
    return Analysis(
        graph=ctx.graph,
        probe=ctx.probe,
        axes={name: {a: units(v) for a, v in axes.items()} for name, axes in ctx.axes.items()},
        operands=[Operand(o.node, o.input, {a: units(v) for a, v in o.axes.items()}) for o in ctx.operands],
        producers=producers,
        contractions=[
            Contraction(c.node, c.sides, units(c.labels), c.weight, c.out, c.groups, c.padded, c.bias)
            for c in ctx.contractions
        ],
        works=[Work(w.node, w.scale, tuple(units(v) for v in w.factors)) for w in ctx.works],
        released=[Released(r.node, r.axis, units(r.labels)) for r in ctx.released],
        forks=[Fork(f.node, f.axis, units(f.source), units(f.labels)) for f in ctx.forks],
        pinned=pinned,
        groups=groups,
        group_of=group_of,
    )


def _groups(
    producers: list[Producer], count: int, reasons: dict[int, list[str]]
) -> tuple[list[ChannelGroup], np.ndarray]:
    """Units that appear in one producer belong to one group."""
    forest = Labels()
    forest.fresh(count)
    for producer in producers:
        forest.join(producer.labels[1:], producer.labels[:1])
    root = forest.find(np.arange(count))
    members: dict[int, list[Producer]] = {}
    for producer in producers:
        members.setdefault(int(root[producer.labels[0]]), []).append(producer)
    groups: list[ChannelGroup] = []
    group_of = np.full(count, -1, np.int64)
    for makers in members.values():
        every = np.concatenate([p.labels for p in makers])
        _, first = np.unique(every, return_index=True)
        ids = every[np.sort(first)]
        group_of[ids] = len(groups)
        names = tuple(dict.fromkeys(p.node.name for p in makers))
        why = dict.fromkeys(reason for i in ids.tolist() for reason in reasons.get(i, ()))
        groups.append(ChannelGroup(names[0], names, ids, tuple(why)))
    return groups, group_of
