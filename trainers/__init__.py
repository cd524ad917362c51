"""PyTorch side: models, data sets, sparse trainers, export to ONNX.

Importing this package, or :mod:`prune_onnx.trainers.data`, does not import torch.
"""
