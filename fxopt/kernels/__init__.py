"""Fused operators: `torch.ops.fxopt.*`, registered on import, each with a reference in plain torch."""
