"""Small models of transformers, as the pipeline sees them: what is found in each, and that the numbers stay."""

import pytest
import torch
import transformers
from torch import nn

from tilewright.passes.canonicalize import Canonicalize
from tilewright.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tilewright.passes.eliminate_dead_code import EliminateDeadCode
from tilewright.passes.fold_constants import FoldConstants
from tilewright.passes.fuse_projections import FuseProjections
from tilewright.passes.manager import PassManager
from tilewright.passes.recognise_attention import RecogniseAttention
from tilewright.passes.recognise_gelu import RecogniseGelu
from tilewright.passes.recognise_layer_norm import RecogniseLayerNorm
from tilewright.passes.recognise_rms_norm import RecogniseRmsNorm
from tilewright.passes.recognise_rotary import RecogniseRotary

SIZES = dict(
    vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=64, max_position_embeddings=40,
    num_hidden_layers=1,
)  # fmt: skip
GPT2 = dict(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=1)


class Model(nn.Module):
    """A transformer with caches off; ``forward(input_ids[, attention_mask])`` gives its first output."""

    def __init__(self, kind, config, attention, dtype):
        super().__init__()
        torch.manual_seed(0)
        config._attn_implementation = attention
        config.use_cache = False
        self.model = kind(config).to(dtype)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:  # norm weights of one and biases of zero would be folded away
                parameter.data.add_(0.1 * torch.randn_like(parameter))

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def passes():
    return [
        FoldConstants(outline=False), Canonicalize(), EliminateCommonSubexpressions(), EliminateDeadCode(),
        RecogniseRmsNorm(), RecogniseLayerNorm(), RecogniseGelu(), RecogniseRotary(), RecogniseAttention(),
        FuseProjections(),
    ]  # fmt: skip


MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig, SIZES),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, dict(SIZES, num_key_value_heads=2)),
    "neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, dict(SIZES, rotary_pct=0.5)),
    "gptj": (transformers.GPTJForCausalLM, transformers.GPTJConfig, dict(GPT2, rotary_dim=4)),
    "gemma": (
        transformers.GemmaForCausalLM, transformers.GemmaConfig, dict(SIZES, num_key_value_heads=1, head_dim=8),
    ),
}  # fmt: skip
CASES = [
    # model, attention, dtype, with a padding mask; (norms, gelus, rotations, projections joined), mask, causal, grouped
    ("bert", "eager", torch.float32, True, (0, 0, 0, 3), True, False, False),
    ("bert", "sdpa", torch.float32, False, (0, 0, 0, 3), False, False, False),
    ("gpt2", "eager", torch.float32, False, (0, 1, 0, 0), False, True, False),
    ("llama", "eager", torch.bfloat16, False, (3, 0, 2, 5), False, True, True),
    ("llama", "sdpa", torch.float32, False, (3, 0, 2, 5), False, True, True),
    ("neox", "eager", torch.float32, True, (0, 0, 2, 0), True, False, False),
    ("gptj", "eager", torch.float32, True, (0, 1, 2, 4), True, False, False),
    ("gemma", "eager", torch.bfloat16, True, (3, 0, 2, 5), True, False, True),
]


@pytest.mark.parametrize(("name", "attention", "dtype", "padded", "counts", "masked", "causal", "grouped"), CASES)
def test_everything_is_found(
    name, attention, dtype, padded, counts, masked, causal, grouped, exported, cloned, assert_same_outputs
):
    kind, config, options = MODELS[name]
    batch, seq = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("seq", min=1, max=32)
    ids, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    args = (ids, mask) if padded else (ids,)
    model = Model(kind, config(**options), attention, dtype)
    program = exported(model, *args, dynamic_shapes=tuple({0: batch, 1: seq} for _ in args))
    before = cloned(program)
    found = {record.name: len(record.report.changes) for record in PassManager(passes()).run(program)}
    got = (
        found["recognise_rms_norm"] + found["recognise_layer_norm"], found["recognise_gelu"], found["recognise_rotary"],
        found["fuse_projections"],
    )  # fmt: skip
    assert got == counts
    nodes = [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert len(nodes) == 1 and not any("softmax" in str(node.target) for node in program.graph.nodes)
    for node in nodes:
        assert (node.args[3] is not None, bool(node.args[5:] and node.args[5])) == (masked, causal)
        assert node.kwargs.get("enable_gqa", False) == grouped
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-6
    assert_same_outputs(before, program, tolerance=tolerance)
    assert_same_outputs(before, program, tuple(torch.ones(1, 3, dtype=torch.int64) for _ in args), tolerance=tolerance)
    again = PassManager([one for one in passes() if one.name.startswith(("recognise", "fuse"))]).run(program)
    assert [record.name for record in again if record.report.changed] == []
