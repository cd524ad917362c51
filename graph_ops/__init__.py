"""Graph work on ONNX models: read, analyse, score, plan, cut, fold, count, check.

Imports numpy, onnx and onnx_graphsurgeon only; never torch, onnxruntime or click, and never prints.
"""
