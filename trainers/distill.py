"""Distillation: a network learns to answer like another one, its teacher. Labels play no part."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .from_onnx import OnnxModule

LAST_WEIGHT, OTHER_WEIGHT = 10.0, 3.0
"""What the relative errors of the last map and of the others count beside the divergence of the answers."""


class Distillation:
    """Mean divergence of the network's softened answers from its teacher's, and the errors of its features.

        T^2 * KL(softmax(teacher / T) || softmax(network / T))
        + sum over the maps of w * |f - f_teacher|^2 / |f_teacher - mean|^2

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. Both see the same crops,
    flips and patches (Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", 2022). The
    features are maps that both graphs have under one name and in one shape, as a network has them in common with the
    one that it was slimmed from, the last of each shape; with few images they say more than a few logits do (Wang et
    al., "Compressing Models with Few Samples: Mimicking then Replacing", 2022). Without such maps the second term is
    left out.

    Args:
        teacher: takes the same inputs and gives logits of the same shape; on the device of the images.
        network: what will be trained.
        temperature: T.
        example: a small batch of inputs, on the teacher's device.
        bf16: run the teacher in mixed precision.

    Attributes:
        features: weights of the maps that are compared, by name.
    """

    def __init__(
        self,
        teacher: OnnxModule,
        network: nn.Module,
        temperature: float,
        example: torch.Tensor,
        *,
        bf16: bool = False,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.network, self.temperature, self.bf16 = network, temperature, bf16
        self.features: dict[str, float] = {}
        if isinstance(network, OnnxModule):
            names = common_maps(teacher, network, example)
            self.features = dict.fromkeys(names, OTHER_WEIGHT) | dict.fromkeys(names[-1:], LAST_WEIGHT)
            for graph in (teacher, network):
                graph.observe(names)

    def __call__(self, inputs: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            answers = self.teacher(inputs).float()
        wanted = F.log_softmax(answers / self.temperature, 1)
        given = F.log_softmax(logits / self.temperature, 1)
        loss = self.temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        for name, weight in self.features.items():
            found, aim = (graph.observed.pop(name).float() for graph in (self.network, self.teacher))
            loss = loss + weight * F.mse_loss(found, aim) / aim.var().clamp_min(1e-12)
        return loss


@torch.no_grad()
def common_maps(teacher: OnnxModule, network: OnnxModule, example: torch.Tensor) -> list[str]:
    """Return the names of maps (N, C, ...) that both compute in the same shape: the last of each shape, in order.

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
    last = {shapes[0][name]: name for name in common if _is_map(shapes[0][name])}
    return [name for name in common if last.get(shapes[0][name]) == name]


def _is_map(shape: torch.Size) -> bool:
    """Whether a shape has space in it: more than one position beside batch and channels."""
    return len(shape) > 2 and shape[2:].numel() > 1
