"""Distillation: a network learns to answer like another one, its teacher. Labels play no part."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .from_onnx import OnnxModule

FEATURE_WEIGHT = 10.0
"""What the mean relative error of the features counts beside the divergence of the answers."""


class Distillation:
    """Mean divergence of the network's softened answers from its teacher's, and the error of its last features.

        T^2 * KL(softmax(teacher / T) || softmax(network / T)) + w * |f - f_teacher|^2 / |f_teacher - mean|^2

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. Both see the same crops and flips
    (Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", 2022). The features are the last
    map that both graphs have under one name and in one shape, as a network has it in common with the one that it was
    slimmed from; with few images it says more than a few logits do (Wang et al., "Compressing Models with Few Samples:
    Mimicking then Replacing", 2022). Without such a map the second term is left out.

    Args:
        teacher: takes the same inputs and gives logits of the same shape; on the device of the images.
        network: what will be trained.
        temperature: T.
        example: a small batch of inputs, on the teacher's device.

    Attributes:
        feature: name of the map that is compared; empty when there is none.
    """

    def __init__(self, teacher: OnnxModule, network: nn.Module, temperature: float, example: torch.Tensor) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.network, self.temperature = network, temperature
        self.feature = ""
        if isinstance(network, OnnxModule):
            self.feature = last_common_map(teacher, network, example)
            for graph in (teacher, network):
                graph.observe({self.feature} - {""})

    def __call__(self, inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(inputs) / self.temperature, 1)
        given = F.log_softmax(logits / self.temperature, 1)
        loss = self.temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        if self.feature:
            found, aim = (graph.observed.pop(self.feature) for graph in (self.network, self.teacher))
            loss = loss + FEATURE_WEIGHT * F.mse_loss(found, aim) / aim.var()
        return loss


@torch.no_grad()
def last_common_map(teacher: OnnxModule, network: OnnxModule, example: torch.Tensor) -> str:
    """Return the name of the last map (N, C, ...) that both compute in the same shape, or an empty string.

    Args:
        teacher: run once, in evaluation mode, as is ``network``; their modes are left as they were.
        network: the other one.
        example: a small batch of inputs.
    """
    shapes = []
    for graph in (teacher, network):
        mode = graph.training
        graph.eval().observe(graph.made)
        graph(example.to(next(graph.parameters()).device))
        shapes.append({name: value.shape for name, value in graph.observed.items()})
        graph.train(mode).observe(())
    common = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
    maps = [name for name in common if _is_map(shapes[0][name])]
    return maps[-1] if maps else ""


def _is_map(shape: torch.Size) -> bool:
    """Whether a shape has space in it: more than one position beside batch and channels."""
    return len(shape) > 2 and shape[2:].numel() > 1
