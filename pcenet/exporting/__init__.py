"""Networks on their way out: the evaluation form, and files that run without this package (ONNX, torch.export)."""
