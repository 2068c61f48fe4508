"""The definitions have as many parameters as other packages' models, built on the meta device."""

import importlib

import pytest
import torch
import transformers

from tilewright import models

# The counts that torchvision publishes; timm's models of the same architectures have the same.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v3_large": 5_483_032,
    "vit_b16": 86_567_656,
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_vision_models(name):
    assert models.get(name).parameters == PUBLISHED[name] == count(models.get(name).build())


def test_bert():
    with torch.device("meta"):
        reference = transformers.BertModel(transformers.BertConfig())
    assert models.get("bert_base").parameters == count(reference)


def test_vit_of_transformers():
    with torch.device("meta"):
        reference = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
    assert models.get("vit_b16").parameters == count(reference)


def test_gpt2():
    with torch.device("meta"):
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        tiny = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=2, n_head=4)
        )
    assert models.get("gpt2").parameters == count(reference)
    assert models.get("gpt2_tiny").parameters == count(tiny)


@pytest.mark.parametrize("name", ["llama_tiny", "llama_1b", "bytelm"])
def test_llama(name):
    from tilewright.models import bytelm, decoder

    config = bytelm.CONFIG if name == "bytelm" else decoder.VARIANTS[name]
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                tie_word_embeddings=config.tied,
            )
        )
        ours = decoder.Decoder(config)
    assert models.get(name).parameters == count(reference) == count(ours)


def test_unet():
    """Summed level by level; 7.76 million is also what the variant's authors report."""

    def double(inputs: int, outputs: int) -> int:
        return 9 * outputs * (inputs + outputs) + 4 * outputs

    down = double(3, 32) + double(32, 64) + double(64, 128) + double(128, 256) + double(256, 512)
    up = sum(4 * 2 * c * c + c + double(2 * c, c) for c in (256, 128, 64, 32))
    assert models.get("unet").parameters == down + up + 32 + 1


def test_families_know_their_variants():
    for name in models.names():
        family = importlib.import_module(f"tilewright.models.{models.get(name).family}")
        assert hasattr(family, "build") and hasattr(family, "example")
