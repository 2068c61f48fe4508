"""The meaning of every operator as index functions; importing the package fills the registry."""

from . import indexing, pointwise, pooling, products, reductions, rotary, views

__all__ = ["indexing", "pointwise", "pooling", "products", "reductions", "rotary", "views"]
