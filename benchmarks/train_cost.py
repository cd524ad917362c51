"""What the methods cost beside plain training, and what the loop costs beside a usual one.

    python benchmarks/train_cost.py [--parts methods loop selection] [--data-dir DIR]
                                    [--out benchmarks/results/train_cost]

1. methods: one network takes steps (64 images of 32x32) in turns: plain, and with each method's updates. A step's time
   over that of the plain step beside it; and, for the same steps, the time of the updates alone over that of the rest,
   which is known to a hundredth where the quotient of two steps has the machine's noise. Bars: 2 % for network-slimming
   and proximal-ns, 10 % for the group regularisers.
2. loop: an epoch of ResNet-20 (a part of one) by ``fit``, and the same network, optimiser and augmentation in a usual
   torch loop over a DataLoader, with no worker and with two; each in a process of its own, in turns. Bar: at least as
   fast as the better of these.
3. selection: backward selection of a tenth of the filters of a small trained network: a full pass for every
   candidate, as the algorithm is written (some rounds are run, the others' passes counted at the same time each); with
   only what differs computed (``exact``); and with few candidates looked at (``lazy``), in turns with full passes. Bar:
   100 times as fast from the first round on, and the same choice in every round.

Everything takes six minutes on two cores. Without --data-dir images are noise, which costs the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bars
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import data

from prune_onnx.graph_ops.memory import keep_at_hand
from prune_onnx.pipeline import bench
from prune_onnx.pipeline.environment import capture
from prune_onnx.trainers.batches import Batches
from prune_onnx.trainers.config import Schedule, TrainConfig, resolve
from prune_onnx.trainers.data import load_dataset
from prune_onnx.trainers.loop import fit
from prune_onnx.trainers.methods import method_class
from prune_onnx.trainers.methods.backward_selection import BackwardSelection
from prune_onnx.trainers.methods.base import Method
from prune_onnx.trainers.models import build_model
from prune_onnx.trainers.trace import evaluating

BARS = {
    "network-slimming": 0.02, "proximal-ns": 0.02, "hsq-gl12": 0.1, "hsq-gl": 0.1, "hsq-es": 0.1, "group-lasso": 0.1,
    "group-lasso, prox": 0.1, "exclusive-sparsity": 0.1, "group-l12": 0.1,
}  # fmt: skip
"""Most that a method's updates may take, as a share of a plain step."""

NETWORKS = {"resnet20": 16, "vgg16": 6}
"""Networks, and how often each method has its turn."""

STEPS = {"resnet20": 4, "vgg16": 1}
"""Steps of a turn."""

METHODS_BATCH, LOOP_BATCH = 64, 128
LOOP_TURNS, LOOP_STEPS = 10, 8
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
SHAPE = (3, 32, 32)
MARGIN = 4
FASTER = 100.0
SELECTION_IMAGES, SELECTION_ROUNDS, SELECTION_SHARE, SELECTION_TURNS = 64, 2, 0.1, 3

LOOPS = {"ours": None, "DataLoader, 0 workers": 0, "DataLoader, 2 workers": 2}

Images = tuple[np.ndarray, np.ndarray]


def noise(count: int) -> Images:
    """Return random images and labels."""
    draws = np.random.default_rng(0)
    return draws.integers(0, 256, (count, *SHAPE), dtype=np.uint8), draws.integers(0, 10, count)


def interval(values: list[float]) -> dict[str, float]:
    """Return the median of one value a turn, with its interval."""
    found = bench.quantile_interval([np.array([value]) for value in values], 0.5)
    return {"median": found.value, "low": found.low, "high": found.high}


def resolved(name: str, method: str, count: int, model: nn.Module, **options: Any) -> TrainConfig:
    """Return the options of a run on ``count`` images."""
    config = TrainConfig(model=name, dataset="cifar10", method=method, output=Path("run"), validation=0, **options)
    return resolve(config, model, images=count, augment="flip-crop", mean=MEAN, std=STD)


# The methods


class Watched:
    """A method whose updates are timed."""

    def __init__(self, method: Method) -> None:
        self.method, self.seconds = method, 0.0

    def before_step(self) -> None:
        start = time.perf_counter()
        self.method.before_step()
        self.seconds += time.perf_counter() - start

    def after_step(self, lr: float) -> None:
        start = time.perf_counter()
        self.method.after_step(lr)
        self.seconds += time.perf_counter() - start


def methods_on(name: str, turns: int, steps: int) -> list[dict[str, Any]]:
    """Return one row a method: its share of a step, and its step's time over the plain one's."""
    torch.manual_seed(0)
    model = build_model(name, 10, SHAPE)
    shown = Batches(*noise(4 * METHODS_BATCH), mean=MEAN, std=STD, augment="flip-crop")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    watched = {}
    for label in ("plain", *BARS):  # all work on the one network
        method_name, _, prox = label.partition(", ")
        options = {"prox": True} if prox else {}
        config = resolved(name, method_name, len(shown), model, **options)
        method = method_class(method_name).of(config)
        method.prepare(model, Schedule.of(config, len(shown)))
        method.attach(optimizer, shown)
        watched[label] = Watched(method)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch = 0
        while True:
            yield from shown.shuffled(epoch, METHODS_BATCH, len(shown) // METHODS_BATCH)
            epoch += 1

    source = batches()

    def turn(method: Watched) -> tuple[float, float]:
        """Take the steps as the loop does; return seconds of all and of the updates."""
        method.seconds, start = 0.0, time.perf_counter()
        for _ in range(steps):
            inputs, labels = next(source)
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            method.before_step()
            optimizer.step()
            method.after_step(1e-3)
        return time.perf_counter() - start, method.seconds

    model.train()
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in watched}
    with keep_at_hand():  # as the loop does
        for method in watched.values():
            turn(method)
        for number in range(turns):
            for label in list(watched)[:: -1 if number % 2 else 1]:
                times[label].append(turn(watched[label]))
    plain = [whole for whole, _ in times["plain"]]
    return [
        {
            "network": name, "method": label, "bar": bar, "plain_step_ms": 1e3 * float(np.median(plain)) / steps,
            "updates": interval([own / (whole - own) for whole, own in times[label]]),
            "step": interval([whole / other for (whole, _), other in zip(times[label], plain, strict=True)]),
        }
        for label, bar in BARS.items()
    ]  # fmt: skip


# The loop


class Cifar(data.Dataset):
    """A data set as tutorials have it: one image at a time, cropped, flipped and normalised."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        padded = np.zeros((SHAPE[0], SHAPE[1] + 2 * MARGIN, SHAPE[2] + 2 * MARGIN), np.uint8)
        padded[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = self.images[index]
        row, column = torch.randint(0, 2 * MARGIN + 1, (2,)).tolist()
        image = padded[:, row : row + SHAPE[1], column : column + SHAPE[2]]
        if torch.rand(()) < 0.5:
            image = image[:, :, ::-1]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).float().div_(255)
        return pixels.sub_(self.mean).div_(self.std), int(self.labels[index])


def usual_epoch(images: np.ndarray, labels: np.ndarray, workers: int) -> Callable[[], float]:
    """Return a plain torch loop over a DataLoader; it takes one epoch and returns its seconds."""
    loader = data.DataLoader(
        Cifar(images, labels), LOOP_BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    torch.manual_seed(0)
    model = build_model("resnet20", 10, SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def epoch() -> float:
        start = time.perf_counter()
        model.train()
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
        return time.perf_counter() - start

    return epoch


def our_epoch(images: np.ndarray, labels: np.ndarray) -> Callable[[], float]:
    """Return the same by ``fit``."""
    torch.manual_seed(0)
    model = build_model("resnet20", 10, SHAPE)
    config = resolved("resnet20", "plain", len(labels), model, epochs=1, batch_size=LOOP_BATCH)
    shown = Batches(images, labels, mean=MEAN, std=STD, augment="flip-crop")

    def epoch() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return fit(model, method_class("plain").of(config), config, shown, run=Path(folder))[0]["seconds"]

    return epoch


def serve(name: str, images: np.ndarray, labels: np.ndarray, pipe: Connection) -> None:
    """Take an epoch and tell its seconds whenever asked, in a process of its own, till there is nothing asked."""
    workers = LOOPS[name]
    epoch = our_epoch(images, labels) if workers is None else usual_epoch(images, labels, workers)
    epoch()  # starts the workers
    pipe.send(None)
    while pipe.recv():
        pipe.send(epoch())


def loops(images: np.ndarray, labels: np.ndarray, turns: int) -> dict[str, Any]:
    """Return ms a step of each loop, and how many times as long as ours the others take."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    processes = []
    for name in LOOPS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, images, labels, theirs)))
        processes[-1].start()
        pipes[name].recv()
    for number in range(turns):
        for name in list(LOOPS)[:: -1 if number % 2 else 1]:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    steps = len(labels) // LOOP_BATCH
    return {
        "steps": steps,
        "step_ms": {name: 1e3 * float(np.median(values)) / steps for name, values in seconds.items()},
        "longer": {
            name: interval([theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)])
            for name, values in seconds.items() if name != "ours"
        },
    }  # fmt: skip


# Backward selection


def pyramid() -> nn.Module:
    """Return a network for digits that is wide where its maps are small, as VGG is."""
    widths, sizes = (1, 96, 192, 256, 512, 64), ((3, 2, 1), (3, 2, 1), (2, 1, 0), (1, 1, 0), (1, 1, 0))
    layers: list[nn.Module] = []
    for (before, width), (size, stride, padding) in zip(pairwise(widths), sizes, strict=True):
        convolution = nn.Conv2d(before, width, size, stride, padding, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], 10))


def full_passes(model: nn.Module, method: BackwardSelection, wanted: int) -> list[tuple[str, int]]:
    """Take filters away as the algorithm is written: a pass of the whole network for each candidate.

    Args:
        model: its outputs are masked behind the BatchNorm layers.
        method: says which layers take part, and the images.
        wanted: how many filters go.
    """
    inputs, labels = (torch.cat(parts) for parts in zip(*method.scoring_batches(method.samples), strict=True))
    places = taking_part(method)
    masks = {name: torch.ones(len(place.bias)) for name, place in places.items()}
    hooks = [place.register_forward_hook(lambda _m, _x, y, mask=masks[name]: y * mask.view(1, -1, 1, 1))
             for name, place in places.items()]  # fmt: skip
    gone: list[tuple[str, int]] = []
    with torch.no_grad(), evaluating(model):
        for _ in range(wanted):
            losses = {}
            for name, mask in masks.items():
                for channel in mask.nonzero().flatten().tolist() if mask.sum() > 1 else ():
                    mask[channel] = 0
                    losses[name, channel] = F.cross_entropy(model(inputs), labels).item()
                    mask[channel] = 1
            gone.append(min(losses, key=lambda place: losses[place]))
            masks[gone[-1][0]][gone[-1][1]] = 0
    for hook in hooks:
        hook.remove()
    return gone


def taking_part(method: BackwardSelection) -> dict[str, nn.Module]:
    """Return the BatchNorms behind the layers whose filters may go: all but the last convolution."""
    return {layer.name: layer.norm for layer in method._taken[:-1]}


def selections() -> dict[str, Any]:
    """Return the seconds of the three ways, and in how many rounds each took the filter that ``exact`` takes.

    Lazy runs have full passes right before and right after them: what the machine does besides slows both.
    """
    found = load_dataset("digits")
    torch.manual_seed(0)
    model = pyramid()
    shown = Batches(found.train_images, found.train_labels, mean=(0.5,), std=(0.5,))
    config = TrainConfig(model="bn-cnn", dataset="digits", output=Path("run"), epochs=6)
    config = resolve(config, model, images=len(shown), augment="none", mean=(0.5,), std=(0.5,))
    with tempfile.TemporaryDirectory() as folder:
        fit(model, method_class("plain").of(config), config, shown, run=Path(folder))
    trained = {name: value.clone() for name, value in model.state_dict().items()}

    def prepared(variant: str) -> BackwardSelection:
        model.load_state_dict(trained, strict=False)
        method = BackwardSelection(prune_ratio=SELECTION_SHARE, rewind=False, variant=variant, samples=SELECTION_IMAGES)
        method.prepare(model, Schedule(lr=0.1, steps_per_epoch=1, epochs=2, restarts=(1,)))
        method.attach(torch.optim.SGD(model.parameters(), lr=0.1), shown)
        return method

    def selected(variant: str) -> tuple[float, list[int]]:
        """Return the seconds, and the filters in the order in which they went."""
        method, order = prepared(variant), []
        drop = method.drop_groups
        method.drop_groups = lambda dead: (order.extend(dead.tolist()), drop(dead))
        start = time.perf_counter()
        method.after_epoch(0.1, 1)
        return time.perf_counter() - start, order

    def by_passes() -> tuple[float, list[int]]:
        """Return the seconds of a pass, and the filters that go first."""
        method = prepared("exact")
        groups = {layer.name: method._groups.units[layer.module].tolist() for layer in method._taken}
        start = time.perf_counter()
        first = full_passes(model, method, SELECTION_ROUNDS)
        return (time.perf_counter() - start) / run, [groups[name][channel] for name, channel in first]

    filters = sum(len(norm.weight) for norm in taking_part(prepared("exact")).values())
    run = sum(filters - number for number in range(SELECTION_ROUNDS))
    spent, exact = selected("exact")
    passes = sum(filters - number for number in range(len(exact)))
    turns, lazy = [by_passes()], []
    for _ in range(SELECTION_TURNS):
        lazy.append(selected("lazy"))
        turns.append(by_passes())
    around = [passes * (before + after) / 2 for (before, _), (after, _) in pairwise(turns)]
    return {
        "filters": filters, "gone": len(exact), "images": SELECTION_IMAGES, "passes": passes,
        "passes_run": run * len(turns), "first_is_exact": all(first == exact[: len(first)] for _, first in turns),
        "seconds": {
            "full passes": float(np.median(around)), "exact": spent,
            "lazy": float(np.median([seconds for seconds, _ in lazy])),
        },
        "faster": {
            "exact": [passes * turns[0][0] / spent],
            "lazy": [whole / seconds for whole, (seconds, _) in zip(around, lazy, strict=True)],
        },
        "same": {
            "exact": len(exact),
            "lazy": min(sum(a == b for a, b in zip(order, exact, strict=True)) for _, order in lazy),
        },
    }  # fmt: skip


# The page


def verdicts(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return each bar, what was measured, and whether it is met."""
    rows = []
    for row in found.get("methods", ()):
        own, step = row["updates"], row["step"]
        shown = (
            f"updates {own['median']:.2%} ({own['low']:.2%} to {own['high']:.2%}); "
            f"step {step['median'] - 1:+.1%} ({step['low'] - 1:+.1%} to {step['high'] - 1:+.1%})"
        )
        met = own["high"] <= row["bar"] and step["low"] - 1 <= row["bar"]
        what = f"{row['network']}, {row['method']}: at most {row['bar']:.0%} of {row['plain_step_ms']:.0f} ms"
        rows.append((what, shown, met))
    if "loop" in found:
        loop = found["loop"]
        name, best = min(loop["longer"].items(), key=lambda pair: pair[1]["median"])
        others = ", ".join(f"{name} {ms:.1f} ms" for name, ms in loop["step_ms"].items())
        share = f"{best['median']:.3f} times ours ({best['low']:.3f} to {best['high']:.3f})"
        rows.append((f"resnet20: at least as fast as {name}", f"{others} a step; {share}", best["median"] >= 1))
    if "selection" in found:
        selection = found["selection"]
        seconds, gone, whole = selection["seconds"], selection["gone"], selection["seconds"]["full passes"]
        passes = f"{selection['passes']:,} full passes take {whole:.0f} s ({selection['passes_run']:,} were run)"
        for variant, bar in (("exact", 1.0), ("lazy", FASTER)):
            same, faster = selection["same"][variant], selection["faster"][variant]
            middle = float(np.median(faster))
            times = f"{middle:.0f} times ({min(faster):.0f} to {max(faster):.0f} in {len(faster)} runs)"
            shown = f"{passes}, this {seconds[variant]:.1f} s: {times}; the same filter in {same} of {gone} rounds"
            what = f"backward-selection, {variant}: {bar:.0f} times as fast as full passes, the same filters"
            met = middle >= bar and same == gone and selection["first_is_exact"]
            rows.append((what, shown, met))
    return rows


def markdown(found: dict[str, Any]) -> str:
    """Return the page."""
    facts = found["environment"]
    command = " ".join(["python", *facts["argv"]])
    machine = f"{found['threads']} threads, load {facts['load_1min']:.1f}"
    return bars.page("What training costs", command, facts, machine, verdicts(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("methods", "loop", "selection")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS), help="for the methods")
    parser.add_argument("--turns", type=float, default=1.0, help="factor of the number of turns")
    parser.add_argument("--data-dir", type=Path, help="folder of CIFAR-10; without it images are noise")
    parser.add_argument("--out", type=Path, help="write the figures to OUT.md and OUT.json as well")
    options = parser.parse_args()
    environment = capture()
    environment["argv"] = ["benchmarks/train_cost.py", *(["--parts", *options.parts] if options.parts != parts else [])]
    found: dict[str, Any] = {"environment": environment, "threads": torch.get_num_threads()}

    def turns(usual: int) -> int:
        return max(2, round(usual * options.turns))

    if "methods" in options.parts:
        found["methods"] = []
        for name in options.networks:
            print(f"methods on {name}", file=sys.stderr)
            found["methods"] += methods_on(name, turns(NETWORKS[name]), STEPS[name])
    if "loop" in options.parts:
        print("the loop", file=sys.stderr)
        count = LOOP_STEPS * LOOP_BATCH
        images, labels = noise(count)
        if options.data_dir:
            cifar = load_dataset("cifar10", options.data_dir)
            images, labels = cifar.train_images[:count], cifar.train_labels[:count]
        found["loop"] = loops(images, labels, turns(LOOP_TURNS))
    if "selection" in options.parts:
        print("backward selection", file=sys.stderr)
        found["selection"] = selections()
    bars.finish(markdown(found), found, verdicts(found), options.out)


if __name__ == "__main__":
    main()
