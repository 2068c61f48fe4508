"""Decoder language models: every family against transformers on small random checkpoints, and bad checkpoints."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import tilewright
from tilewright.compiler.driver import Compilation
from tilewright.compiler.frontends.decoder import load_decoder, open_checkpoint, open_module
from tilewright.compiler.frontends.decoder_families import FAMILIES, Fields
from tilewright.compiler.frontends.decoder_samples import step_inputs
from tilewright.compiler.options import CompileOptions, Task
from tilewright.compiler.sources import load_source, open_source
from tilewright.models import registry
from tilewright.models.decoder import Config, Decoder
from tilewright.models.rotary import LinearScaling, Llama3Scaling
from tilewright.passes.graph.cache_ops import BLOCK, CACHE_APPEND
from tilewright.passes.graph.query import calls
from tilewright.passes.graph.regions import body, is_region
from tilewright.passes.verify import STORED, own_tolerance, tolerances_of
from tilewright.runtime.errors import ArtifactError, SourceError, UsageError

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("small_programs")

CONTEXT = 128
SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    vocab_size=100, max_position_embeddings=CONTEXT, initializer_range=0.15, rms_norm_eps=1e-5, pad_token_id=None,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
CHECKPOINTS = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0), attention_bias=True, mlp_bias=True),
    ),
    "mistral": ("Mistral", dict(sliding_window=8, head_dim=32)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=True)),
}

COMPILED = ("llama3", "mistral", "qwen2", "qwen3")  # every family once, and everything in which they differ


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder by name, and transformers' model of it."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name):
        if name not in made:
            family, changes = CHECKPOINTS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            with torch.no_grad():  # norms and biases that are not the identity
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.0
            model.save_pretrained(root / name, max_shard_size="60KB" if name == "qwen2" else "1GB")
            Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(root / name / "tokenizer.json"))
            made[name] = root / name, model
        return made[name]

    return get


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the Llama checkpoint to damage: its folder, and what changes its configuration or its tensors."""
    folder = Path(shutil.copytree(checkpoint("llama2")[0], tmp_path / "damaged"))

    def configure(**changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    def rewrite(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return folder, configure, rewrite


class Eager:
    """The step of a module with its own caches, filled with NaN: what no token has written must not be seen."""

    def __init__(self, module, blocks):
        self.module, config = module, module.config
        shapes = (config.head_size, BLOCK), (BLOCK, config.head_size)
        self.caches = [
            [torch.full((blocks, config.kv_heads, *shape), torch.nan) for _ in module.layers] for shape in shapes
        ]

    @torch.no_grad()
    def __call__(self, *integers):
        result = self.module.step(*integers, *self.caches)
        self.caches = [result["keys"], result["values"]]
        return result["logits"]


class Texts:
    """Sequences over one pool of blocks, stepped by hand; the blocks of a sequence are scattered."""

    def __init__(self, make, sequences):
        blocks = sequences * (CONTEXT // BLOCK)
        self.run, self.seen = make(blocks), [0] * sequences
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).view(sequences, -1).int()

    def step(self, new):
        """Tokens by sequence; the logits behind the last token of each, in order."""
        sequences = list(new)
        lengths = torch.tensor([0, *(len(new[s]) for s in sequences)])
        positions = torch.cat([torch.arange(self.seen[s], self.seen[s] + len(new[s])) for s in sequences])
        for s in sequences:
            self.seen[s] += len(new[s])
        starts, contexts = lengths.cumsum(0), torch.tensor([self.seen[s] for s in sequences])
        tokens = torch.cat([torch.as_tensor(new[s]) for s in sequences])
        integers = [item.int() for item in (tokens, positions, starts, contexts)]
        return self.run(*integers, self.table[sequences], (starts[1:] - 1).int())


def prompts(*lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(100, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def check_steps(make, reference):
    """Logits of two sequences, prompts in chunks and together, against transformers'."""
    first, second = prompts(53, 40)
    wanted, wanted_second = reference(first[None]).logits[0], reference(second[None]).logits[0]
    texts = Texts(make, 2)
    texts.step({1: second[:7]})
    both = texts.step({1: second[7:], 0: first[:20]})
    for found, expected in (
        (both[0], wanted_second[-1]),
        (both[1], wanted[19]),
        (texts.step({0: first[20:]})[0], wanted[-1]),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def check_greedy(make, reference, count=64):
    """Tokens of a prompt alone and whole, and in chunks beside another sequence, against transformers'."""
    prompt, other = prompts(21, 12)
    (wanted,) = reference.generate(prompt[None], max_new_tokens=count, do_sample=False)
    alone, together = Texts(make, 1), Texts(make, 2)
    logits, beside = alone.step({0: prompt}), together.step({0: prompt[:9], 1: other})
    beside = torch.cat((together.step({0: prompt[9:]}), beside[1:]))
    found, found_beside = [], []
    for _ in range(count):
        found.append(int(logits[0].argmax()))
        found_beside.append(int(beside[0].argmax()))
        logits = alone.step({0: found[-1:]})
        beside = together.step({0: found_beside[-1:], 1: [int(beside[1].argmax())]})
    assert found == wanted[len(prompt) :].tolist() == found_beside


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_those_of_transformers(checkpoint, name):
    folder, reference = checkpoint(name)
    module, _ = load_decoder(folder)
    first, _ = prompts(53, 40)
    (wanted,) = reference(first[None]).logits
    torch.testing.assert_close(module(first[None])[0], wanted, rtol=1e-4, atol=1e-4)
    check_steps(partial(Eager, module), reference)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in COMPILED])
def test_greedy_tokens_are_those_of_transformers(checkpoint, name):
    folder, reference = checkpoint(name)
    check_greedy(partial(Eager, load_decoder(folder)[0]), reference)


class Compiled:
    """The step of an artifact, with the caches of a session."""

    def __init__(self, model, blocks):
        self.entry = model.session({"blocks": blocks}).entry("step")

    def __call__(self, *integers):
        return torch.from_numpy(self.entry(*(item.numpy() for item in integers))["logits"].copy())


@pytest.mark.parametrize("name", COMPILED)
def test_artifacts_give_what_transformers_gives(checkpoint, name, tmp_path):
    folder, reference = checkpoint(name)
    done = tilewright.compile(folder, output=tmp_path / "m.tw", task=tilewright.Task(chunk=64, sequences=4))
    assert len(done.errors) == 3, "verified at the sample's, the smallest and larger sizes"
    with tilewright.load(tmp_path / "m.tw", threads=1) as model:
        manifest = model.artifact.manifest
        assert manifest.info["generation"]["max_sequences"] == 4 and manifest.info["generation"]["entry"] == "step"
        assert "tokenizer.json" in [record.path for record in manifest.files]
        own, original = (path / "tokenizer.json" for path in (tmp_path / "m.tw", checkpoint(name)[0]))
        assert own.read_bytes() == original.read_bytes()
        check_steps(partial(Compiled, model), reference)
        check_greedy(partial(Compiled, model), reference)


def test_configurations_of_older_releases():
    """``rope_theta`` and ``rope_scaling`` instead of ``rope_parameters``, windows without ``layer_types``."""
    old = dict(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096,
    )  # fmt: skip

    def config(name, **changes):
        return FAMILIES[name].config(Fields({**old, **changes}, Path("config.json")))

    assert config("LlamaForCausalLM") == Config(100, 64, 4, 4, 2, 96, 4096, theta=1e6, eps=1e-6)
    assert config("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": 2}).scaling == LinearScaling(2.0)
    llama3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1, high_freq_factor=4)
    scaled = config("LlamaForCausalLM", rope_scaling={**llama3, "original_max_position_embeddings": 8192})
    assert scaled.scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert config("MistralForCausalLM").windows == (4096,) * 4
    assert config("MistralForCausalLM", sliding_window=None).windows == (0,) * 4
    windowed = dict(use_sliding_window=True, sliding_window=512, max_window_layers=3)
    assert config("Qwen2ForCausalLM", **windowed).windows == (0, 0, 0, 512)
    assert config("Qwen2ForCausalLM", **{**windowed, "use_sliding_window": False}).windows == (0,) * 4
    assert config("Qwen3ForCausalLM").head_size == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["FalconForCausalLM"]}, r"'FalconForCausalLM'.*supported are LlamaForCausalLM, MistralFor"),
        ({"hidden_act": "gelu"}, "the activation hidden_act is 'gelu'; supported is 'silu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type is 'yarn'; supported",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None; it must be a positive number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only whole heads"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a positive integer"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key and value heads"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
        ({"bos_token_id": 100, "eos_token_id": 7}, "the special token 100 is not among the 100 tokens"),
    ],
)
def test_unsupported_configurations(damaged, changes, message):
    folder, configure, _ = damaged
    (folder / "generation_config.json").unlink()
    configure(**changes)
    with pytest.raises(SourceError, match=message):
        load_decoder(folder)


def test_weights_that_do_not_fit(damaged):
    folder, configure, rewrite = damaged
    name = "model.layers.1.mlp.up_proj.weight"

    def fails(change, message):
        rewrite(change)
        with pytest.raises(ArtifactError, match=re.escape(message)):
            load_decoder(folder)

    fails(lambda t: t.update({name: t[name][1:].clone()}), f"{name!r} has shape [95, 64]")
    fails(lambda t: t.pop(name), f"lack the tensor {name!r}, expected with shape [96, 64]; they hold 20 others")
    fails(lambda t: t.update({name: torch.ones(96, 64).half()}), f"{name!r} is of type torch.float16, the embedding of")
    bias = name.replace("weight", "bias")
    fails(
        lambda t: t.update({name: torch.ones(96, 64), bias: torch.ones(96)}),
        f"hold the tensor {bias!r} of shape [96], for which",
    )
    rewrite(lambda t: (t.pop(bias), t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))
    load_decoder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="has no weights"):
        load_decoder(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory mappings")
@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_weights_stay_where_the_files_are_mapped(checkpoint, name):
    folder, _ = checkpoint(name)
    module, special = load_decoder(folder)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for parameter in module.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped)
    assert (module.head.weight is module.embedding.weight) == (name == "llama3")
    assert special == {"bos": 1, "eos": []} and len(mapped) >= (5 if name == "qwen2" else 1)


def test_what_the_manifest_says(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("qwen3")[0], tmp_path / "qwen3"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = open_checkpoint(folder, Task(context=100, chunk=64, sequences=8), lambda dtype: torch.bfloat16)
    assert loaded.info["generation"] == {
        "entry": "step", "context": 100, "block": 32, "vocabulary": 100, "max_tokens": 64, "max_sequences": 8,
        "layers": 2, "kv_heads": 2, "head_size": 32, "cache_dtype": "bfloat16", "bos": 1, "eos": [7, 9],
        "tokenizer": "tokenizer.json",
    }  # fmt: skip
    assert loaded.files == {"tokenizer.json": folder / "tokenizer.json"}
    with pytest.raises(UsageError, match="a context of 129 positions is too long: the model has 128"):
        open_checkpoint(folder, Task(context=129), lambda dtype: dtype)


@pytest.mark.parametrize(("precision", "limit"), [("auto", STORED), ("fp32", STORED), ("bf16", 4e-2)])
def test_a_cache_in_bfloat16_is_no_reason_for_the_tolerance_of_bfloat16(checkpoint, precision, limit):
    compilation = Compilation(CompileOptions(task=Task("generate", cache="bf16", context=100), precision=precision))
    (captured,) = compilation.capture(checkpoint("qwen3")[0])
    assert tolerances_of(captured, compilation.precision["cpu"])[0] == limit
    (lowered,) = compilation.rewrite([captured])[0]["cpu"]
    kernels = [node for node in lowered.graph.nodes if is_region(node, "kernel")]
    appends = [node for node in kernels if list(calls(body(node).graph, (CACHE_APPEND,)))]
    assert len(appends) == 4 and {own_tolerance(node, compilation.precision["cpu"]) for node in appends} == {limit}


def test_tokenizers_are_read_before_anything_is_compiled(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("llama2")[0], tmp_path / "llama"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="llama/tokenizer.json: is no tokenizer that can be read"):
        open_checkpoint(folder, Task(), lambda dtype: dtype)
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="llama has no tokenizer.json: the artifact will take and give token ids only"):
        loaded = open_checkpoint(folder, Task(), lambda dtype: dtype)
    assert loaded.info["generation"]["tokenizer"] is None and not loaded.files


@pytest.mark.filterwarnings("error")
def test_another_language_model_is_told_to_be_compiled_for_its_forward(tmp_path):
    transformers.GemmaForCausalLM(transformers.GemmaConfig(**SMALL, head_dim=16)).save_pretrained(tmp_path)
    load_source(tmp_path, Task("forward"), lambda dtype: dtype)
    with pytest.raises(UserWarning, match="'GemmaForCausalLM', which is compiled to the logits .* LlamaForCausalLM"):
        load_source(tmp_path, Task("auto"), lambda dtype: dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(
        SourceError, match="'NobodyForCausalLM', which transformers .* does not have .*text is generated by LlamaFor"
    ):
        load_source(tmp_path, Task("auto"), lambda dtype: dtype)


def test_tasks(checkpoint):
    folder, _ = checkpoint("mistral")

    def load(source, name):
        return load_source(source, Task(name), lambda dtype: dtype)

    assert list(load(folder, "auto").entries) == ["step"] == list(load(str(folder), "generate").entries)
    assert not load(folder, "forward").entries and not load("bytelm", "auto").entries
    byte = load("bytelm", "generate").info["generation"]
    assert (byte["tokenizer"], byte["context"], byte["vocabulary"]) == ("bytes", 256, 256)
    assert load("llama_tiny", "generate").info["generation"]["tokenizer"] is None
    with pytest.raises(UsageError, match="limits of generation, and bytelm is compiled for its forward"):
        load_source("bytelm", Task(context=64), lambda dtype: dtype)
    with pytest.raises(UsageError, match="of generation have inputs and shapes of their own"):
        open_source(load(folder, "auto"), shapes={"tokens": "t:1..4"})
    with pytest.raises(UsageError, match="mlp is a MLP, which cannot be compiled to generate text"):
        load("mlp", "generate")


@pytest.mark.parametrize("seed", range(3))
def test_samples_are_legal(seed):
    """No block belongs to two sequences, and every sequence's positions go on from its past and fit its blocks."""
    draw = torch.Generator().manual_seed(seed)
    config = Config(vocabulary=50, width=8, layers=1, heads=2, kv_heads=1, hidden=8, context=70)
    for _ in range(100):
        low_high = {"tokens": 40, "sequences": 9, "width": 3, "rows": 6, "blocks": 12}
        sizes = {name: int(torch.randint(1, high + 1, (), generator=draw)) for name, high in low_high.items()}
        made = step_inputs(config, 70, sizes, seed)
        starts, contexts, table = made["starts"], made["contexts"], made["table"]
        assert all(tensor.dtype == torch.int32 for tensor in made.values())
        assert starts[0] == 0 and starts[-1] <= sizes["tokens"] and len(starts) == sizes["sequences"] + 1
        used = []
        for s in range(sizes["sequences"]):
            positions = made["positions"][starts[s] : starts[s + 1]]
            assert positions.tolist() == list(range(contexts[s] - len(positions), contexts[s])), sizes
            assert contexts[s] <= 70
            used += table[s, : -(-int(contexts[s]) // BLOCK)].tolist()
        assert len(set(used)) == len(used) and max(used, default=0) < sizes["blocks"], sizes
        assert made["rows"].shape == (sizes["rows"],) and int(made["rows"].max()) < sizes["tokens"]
    assert Decoder(config).step  # the sizes are those of its inputs


def test_a_module_of_another_class():
    with pytest.raises(UsageError, match="can be a models.decoder.Decoder and checkpoint folders of LlamaForCausalLM"):
        open_module(registry.get("mlp").build(), "net.py:build", Task(), lambda dtype: dtype)
