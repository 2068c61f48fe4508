"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import Node, operator


@operator("MatMul")
def matmul(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product with broadcast batch axes."""
    return torch.matmul(a, b)


@operator("Gemm", since=7)
def gemm(node: Node, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    """Alpha a b + beta c, with either factor transposed."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.t() if node.get("transA", 0) else a
    transposed = bool(node.get("transB", 0))
    if alpha == 1 and a.is_floating_point():
        whole = c is None or (beta == 1 and c.dim() == 1 and c.shape[0] == b.shape[0 if transposed else 1])
        if transposed and whole:
            return F.linear(a, b, c)
        if whole and c is not None:
            return torch.addmm(c, a, b.t() if transposed else b)
    product = torch.matmul(a, b.t() if transposed else b)
    product = product if alpha == 1 else product * _number(alpha, product)
    return product if c is None or beta == 0 else product + (c if beta == 1 else c * _number(beta, c))


def _number(factor: float, like: torch.Tensor) -> float | int:
    return factor if like.is_floating_point() else int(factor)


@operator("Einsum", since=12)
def einsum(node: Node, *values: torch.Tensor) -> torch.Tensor:
    """Sum of products by index letters."""
    return torch.einsum(node.get("equation").replace(" ", ""), *values)


@operator("FusedMatMul", domain="com.microsoft")
def fused_matmul(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Alpha a b, with the last two axes of either factor swapped."""
    if node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise ValueError("transBatchA and transBatchB are not supported")
    a = a.transpose(-1, -2) if node.get("transA", 0) else a
    b = b.transpose(-1, -2) if node.get("transB", 0) else b
    product, alpha = torch.matmul(a, b), node.get("alpha", 1.0)
    return product if alpha == 1 else product * alpha
