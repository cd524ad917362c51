"""A small encoder-decoder and a task for it that needs no download: garments on coloured backgrounds.

Each picture has one or two garments of Fashion-MNIST in a random colour, at random places of a smooth random background
of about the same brightness. Every pixel is to be told which garment it belongs to, or that it is background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_onnx.graph_ops.preprocessing import Preprocessing
from prune_onnx.graph_ops.progress import Progress
from prune_onnx.pipeline.data import open_samples
from prune_onnx.trainers.export import export_onnx

SIDE = 48
GARMENTS = 10
BACKGROUND = GARMENTS
RECIPE = Preprocessing((0.5,) * 3, (0.25,) * 3, size=(SIDE, SIDE))
VISIBLE = 40
"""Pixels of a garment that are darker than this are background."""
WIDTHS = (16, 32, 64)
BATCH = 25
RATE = 3e-3


def pictures(data_dir: Path, split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures, uint8 (N, 3, SIDE, SIDE), and the class of each pixel, int64 (N, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    found = open_samples(dataset="fashion-mnist", data_dir=data_dir, split=split, limit=2 * count, seed=seed)
    garments, kinds = found.images[:, 0], found.labels
    height, width = garments.shape[1:]
    images = _backgrounds(rng, count)
    classes = np.full((count, SIDE, SIDE), BACKGROUND)
    for n in range(count):
        for i in range(2 * n, 2 * n + rng.integers(1, 3)):
            top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
            place = np.s_[top : top + height, left : left + width]
            seen = garments[i] > VISIBLE
            colour = rng.uniform(0.4, 1, (3, 1, 1))
            part = images[n][:, *place]
            images[n][:, *place] = np.where(seen, garments[i] * colour, part)
            classes[n][place] = np.where(seen, kinds[i], classes[n][place])
    noise = rng.normal(0, 8, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8), classes


def _backgrounds(rng: np.random.Generator, count: int) -> np.ndarray:
    """Smooth random colours, float (N, 3, SIDE, SIDE)."""
    coarse = torch.from_numpy(rng.uniform(0, 200, (count, 3, 5, 5)))
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True).numpy()


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, BatchNorm, ReLU, twice."""
    layers: list[nn.Module] = []
    for i in range(2):
        conv = nn.Conv2d(outputs if i else inputs, outputs, 3, 1 if i else stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class EncoderDecoder(nn.Module):
    """Two scales down and up again; a transposed convolution, a nearest-neighbour resize, and skips that are joined."""

    def __init__(self) -> None:
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.fine, self.middle, self.coarse = block(3, fine), block(fine, middle, 2), block(middle, coarse, 2)
        self.up = nn.ConvTranspose2d(coarse, middle, 2, 2)
        self.merge_middle = block(2 * middle, middle)
        self.resize = nn.Upsample(scale_factor=2)
        self.merge_fine = block(middle + fine, fine)
        self.classes = nn.Conv2d(fine, GARMENTS + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        middle = self.middle(fine)
        up = F.relu(self.up(self.coarse(middle)))
        merged = self.merge_middle(torch.cat([up, middle], 1))
        return self.classes(self.merge_fine(torch.cat([self.resize(merged), fine], 1)))


def train(data_dir: Path, out: Path, images: int, epochs: int, progress: Progress) -> None:
    """Train the network and write its file."""
    torch.manual_seed(0)
    network = EncoderDecoder()
    x, y = pictures(data_dir, "train", images, seed=0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (RECIPE.mean, RECIPE.std))
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    steps = epochs * (images // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(images)[: images // BATCH * BATCH]
        total = 0.0
        for chosen in order.split(BATCH):
            batch = (torch.from_numpy(x[chosen]).float() / 255 - mean) / std
            loss = F.cross_entropy(network(batch), torch.from_numpy(y[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        progress.note(f"epoch {epoch + 1}/{epochs}: loss {total / len(order):.4f}")
    export_onnx(network, (3, SIDE, SIDE), out, RECIPE, {})
