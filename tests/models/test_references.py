"""Our decoders and encoders compute what transformers' models of the same architecture compute on the same weights."""

import torch
import transformers

from tilewright import models


def renamed(state: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Keys with each rule's first string replaced by its second, in order."""
    result = {}
    for key, value in state.items():
        for old, new in rules:
            key = key.replace(old, new)
        result[key] = value
    return result


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.inference_mode()
def test_llama_tiny():
    spec = models.get("llama_tiny")
    ours = spec.build()
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    rules = [
        ("layers.", "model.layers."),
        ("input_norm", "input_layernorm"),
        ("post_norm", "post_attention_layernorm"),
        ("attention.", "self_attn."),
        ("embedding.", "model.embed_tokens."),
    ]
    state = renamed(ours.state_dict(), rules)
    state["model.norm.weight"] = state.pop("norm.weight")
    state["lm_head.weight"] = state.pop("head.weight")
    reference.load_state_dict(state, strict=True)
    (ids,), _ = spec.example()
    assert relative_error(ours(ids), reference(input_ids=ids, use_cache=False).logits) < 1e-5


@torch.inference_mode()
def test_gpt2_tiny():
    spec = models.get("gpt2_tiny")
    ours = spec.build()
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=2, n_head=4)
    ).eval()
    rules = [
        ("tokens.", "transformer.wte."),
        ("positions.", "transformer.wpe."),
        ("layers.", "transformer.h."),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("attention.qkv", "attn.c_attn"),
        ("attention.out", "attn.c_proj"),
        (".up.", ".mlp.c_fc."),
        (".down.", ".mlp.c_proj."),
    ]
    state = renamed(ours.state_dict(), rules)
    for name in ("weight", "bias"):
        state[f"transformer.ln_f.{name}"] = state.pop(f"norm.{name}")
    state["lm_head.weight"] = state.pop("head.weight")
    for key in state:  # transformers keeps these matrices transposed
        if key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            state[key] = state[key].T
    reference.load_state_dict(state, strict=True)
    (ids,), _ = spec.example()
    assert relative_error(ours(ids), reference(input_ids=ids, use_cache=False).logits) < 1e-5


@torch.inference_mode()
def test_bert_base():
    spec = models.get("bert_base")
    ours = spec.build()
    reference = transformers.BertModel(transformers.BertConfig()).eval()
    rules = [
        ("embeddings.word.", "embeddings.word_embeddings."),
        ("embeddings.position.", "embeddings.position_embeddings."),
        ("embeddings.segment.", "embeddings.token_type_embeddings."),
        ("embeddings.norm.", "embeddings.LayerNorm."),
        ("layers.", "encoder.layer."),
        ("attention_norm", "attention.output.LayerNorm"),
        ("output_norm", "output.LayerNorm"),
        ("attention.out.", "attention.output.dense."),
        ("attention.query", "attention.self.query"),
        ("attention.key", "attention.self.key"),
        ("attention.value", "attention.self.value"),
        (".up.", ".intermediate.dense."),
        (".down.", ".output.dense."),
        ("pooler.", "pooler.dense."),
    ]
    reference.load_state_dict(renamed(ours.state_dict(), rules), strict=True)
    _, kwargs = spec.example()
    expected, got = reference(**kwargs), ours(**kwargs)
    kept = kwargs["attention_mask"].bool()
    assert relative_error(got["last_hidden_state"][kept], expected.last_hidden_state[kept]) < 1e-5
    assert relative_error(got["pooled"], expected.pooler_output) < 1e-5
