"""The checkpoint as files of llama.cpp: in float16 written with the ``gguf`` package, the rest by its own quantizer."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from .llm_checkpoint import WEIGHTS
from .llm_units import Dimensions

F16 = "F16"

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def path_of(folder: Path, format: str) -> Path:
    """Where the file of a format lies."""
    return folder / f"model.{format}.gguf"


def name_of(parameter: str) -> str:
    """A parameter's name in the file."""
    if parameter in OUTER:
        return OUTER[parameter]
    layer, _, rest = parameter.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A projection whose rotated pairs are neighbours, as llama.cpp has them, not halves of the head."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_float16(dimensions: Dimensions, folder: Path) -> None:
    """Write the checkpoint in the folder as a float16 file; norms are float32. There is no tokenizer in it."""
    partial = path_of(folder, F16).with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_vocab_size(dimensions.vocabulary)
    writer.add_context_length(dimensions.context)
    writer.add_embedding_length(dimensions.width)
    writer.add_block_count(dimensions.layers)
    writer.add_feed_forward_length(dimensions.hidden)
    writer.add_head_count(dimensions.heads)
    writer.add_head_count_kv(dimensions.kv_heads)
    writer.add_rope_dimension_count(dimensions.head_size)
    writer.add_rope_freq_base(dimensions.theta)
    writer.add_layer_norm_rms_eps(dimensions.eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        for parameter in weights.keys():  # noqa: SIM118 - it is no mapping
            weight = weights.get_tensor(parameter)
            if "q_proj" in parameter:
                weight = interleaved(weight, dimensions.heads)
            elif "k_proj" in parameter:
                weight = interleaved(weight, dimensions.kv_heads)
            dtype = torch.float32 if weight.ndim == 1 else torch.float16
            writer.add_tensor(name_of(parameter), np.ascontiguousarray(weight.to(dtype).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path_of(folder, F16))


def quantize(folder: Path, format: str, threads: int) -> None:
    """Write the float16 file's weights in another format, as ``llama-quantize`` does by default.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format}")
    partial = path_of(folder, format).with_suffix(".partial")
    code = llama_cpp.llama_model_quantize(os.fsencode(path_of(folder, F16)), os.fsencode(partial), params)
    if code:
        raise RuntimeError(f"llama.cpp could not write weights as {format} (code {code})")
    os.replace(partial, path_of(folder, format))


def weight_bytes(path: Path) -> int:
    """Bytes of the weights that every step reads whole: all but the table of embeddings."""
    reader = gguf.GGUFReader(path)
    return sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name != "token_embd.weight")
