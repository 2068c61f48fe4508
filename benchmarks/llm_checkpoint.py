"""The checkpoint that all systems start from: random weights in bfloat16, in the layout of Hugging Face's Llama.

What eager float32 PyTorch (transformers) makes of its first tokens is the reference for every system.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .llm_units import CHECK_PROMPT, Dimensions, tokens

WEIGHTS, REFERENCE = "model.safetensors", "reference.npy"


def config(dimensions: Dimensions) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": dimensions.vocabulary,
        "hidden_size": dimensions.width,
        "num_hidden_layers": dimensions.layers,
        "num_attention_heads": dimensions.heads,
        "num_key_value_heads": dimensions.kv_heads,
        "head_dim": dimensions.head_size,
        "intermediate_size": dimensions.hidden,
        "max_position_embeddings": dimensions.context,
        "rope_theta": dimensions.theta,
        "rms_norm_eps": dimensions.eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(dimensions: Dimensions) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter's name and shape; those with one axis are norms."""
    width, inner = dimensions.width, dimensions.heads * dimensions.head_size
    kv_inner = dimensions.kv_heads * dimensions.head_size
    yield "model.embed_tokens.weight", (dimensions.vocabulary, width)
    for layer in range(dimensions.layers):
        within = f"model.layers.{layer}."
        yield within + "input_layernorm.weight", (width,)
        yield within + "self_attn.q_proj.weight", (inner, width)
        yield within + "self_attn.k_proj.weight", (kv_inner, width)
        yield within + "self_attn.v_proj.weight", (kv_inner, width)
        yield within + "self_attn.o_proj.weight", (width, inner)
        yield within + "post_attention_layernorm.weight", (width,)
        yield within + "mlp.gate_proj.weight", (dimensions.hidden, width)
        yield within + "mlp.up_proj.weight", (dimensions.hidden, width)
        yield within + "mlp.down_proj.weight", (width, dimensions.hidden)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (dimensions.vocabulary, width)


def write_checkpoint(dimensions: Dimensions, folder: Path, seed: int = 0) -> None:
    """Write config.json and the weights, normal, spread so that layers keep the size of values."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(dimensions):
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            tensors[name] = drawn.normal_(0.0, shape[1] ** -0.5, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(dimensions), indent=1) + "\n")


def write_reference(dimensions: Dimensions, folder: Path) -> None:
    """Write the logits [vocabulary] behind the first tokens of :func:`tokens`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.from_numpy(tokens(dimensions, CHECK_PROMPT)).long()
    with torch.no_grad():
        np.save(folder / REFERENCE, model(given[None]).logits[0, -1].numpy())
