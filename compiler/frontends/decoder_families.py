"""Families of decoder language models: from ``config.json`` and its tensors' names to ``models/decoder.py``.

A family is a line in :data:`FAMILIES`: the fields of our configuration in which it differs from what all have in
common (:func:`_common`), and the names of its tensors where they are not :data:`NAMES`. What a configuration asks for
and our decoder does not do is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models.decoder import Config
from ...models.rotary import LinearScaling, Llama3Scaling, Scaling
from ...runtime.errors import SourceError

NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens",
    "layers.*.input_norm": "model.layers.*.input_layernorm",
    "layers.*.attention.q_proj": "model.layers.*.self_attn.q_proj",
    "layers.*.attention.k_proj": "model.layers.*.self_attn.k_proj",
    "layers.*.attention.v_proj": "model.layers.*.self_attn.v_proj",
    "layers.*.attention.o_proj": "model.layers.*.self_attn.o_proj",
    "layers.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
    "layers.*.post_norm": "model.layers.*.post_attention_layernorm",
    "layers.*.mlp.gate_proj": "model.layers.*.mlp.gate_proj",
    "layers.*.mlp.up_proj": "model.layers.*.mlp.up_proj",
    "layers.*.mlp.down_proj": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""Our module → theirs; ``*`` stands for the number of a layer."""


class Fields:
    """The fields of a ``config.json``, with errors that name the field and the file."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path

    def number(self, name: str, default: int | None = None) -> int:
        """A positive integer; ``default`` where the field is missing or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise SourceError(f"{self.path}: {name} is {value!r}; it must be a positive integer")
        return value

    def real(self, name: str, default: float) -> float:
        """A positive number."""
        return positive(self.values.get(name, default), name, self.path)

    def flag(self, name: str) -> bool:
        """A boolean; False where the field is missing or null."""
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise SourceError(f"{self.path}: {name} is {value!r}; it must be true or false")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        return str(self.values.get(name) or default)


def positive(value: Any, name: str, path: Path) -> float:
    """A field's value as a positive number.

    Raises:
        SourceError: it is none.
    """
    if type(value) not in (int, float) or not value > 0:
        raise SourceError(f"{path}: {name} is {value!r}; it must be a positive number")
    return float(value)


@dataclass(frozen=True)
class Family:
    """What is particular to the models of one class of transformers.

    Attributes:
        choices: from the fields of ``config.json`` to arguments of ``models.decoder.Config``.
        names: our modules' names → theirs, as :data:`NAMES`.
    """

    choices: Callable[[Fields], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)

    def config(self, fields: Fields) -> Config:
        """The configuration of our decoder.

        Raises:
            SourceError: a field that is missing, malformed or asks for what our decoder does not do; it is named.
        """
        try:
            return Config(**{**_common(fields), **self.choices(fields)})
        except ValueError as error:
            raise SourceError(f"{fields.path}: {error}") from error

    def tensor(self, ours: str) -> str:
        """Their name of one of our parameters, such as ``layers.3.mlp.up_proj.weight``."""
        module, _, kind = ours.rpartition(".")
        parts = module.split(".")
        number = parts[1] if parts[0] == "layers" else ""
        pattern = ".".join(["layers", "*", *parts[2:]]) if number else module
        return f"{self.names[pattern].replace('*', number)}.{kind}"


def _all_layers(fields: Fields) -> tuple[int, ...]:
    """The windows of Mistral: one size for every layer, or none where it is null."""
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return ()
    return (fields.number("sliding_window", 4096),) * fields.number("num_hidden_layers")


def _some_layers(fields: Fields) -> tuple[int, ...]:
    """The windows of Qwen: those that ``layer_types`` names, or the layers from ``max_window_layers`` on."""
    layers = fields.number("num_hidden_layers")
    if not fields.flag("use_sliding_window") or fields.values.get("sliding_window", 4096) is None:
        return ()
    window, kinds = fields.number("sliding_window", 4096), fields.values.get("layer_types")
    if kinds is None:
        first = fields.values.get("max_window_layers", 28)
        kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
    sizes = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if kind not in sizes:
            raise SourceError(f"{fields.path}: layer_types names {kind!r}; supported are {' and '.join(sizes)}")
    return tuple(sizes[kind] for kind in kinds)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        lambda c: {
            "qkv_bias": c.flag("attention_bias"),
            "out_bias": c.flag("attention_bias"),
            "mlp_bias": c.flag("mlp_bias"),
        }
    ),
    "MistralForCausalLM": Family(lambda c: {"windows": _all_layers(c)}),
    "Qwen2ForCausalLM": Family(lambda c: {"qkv_bias": True, "windows": _some_layers(c)}),
    "Qwen3ForCausalLM": Family(
        lambda c: {
            "head_size": c.number("head_dim", 128),
            "qk_norm": True,
            "qkv_bias": c.flag("attention_bias"),
            "out_bias": c.flag("attention_bias"),
            "windows": _some_layers(c),
        }
    ),
}
"""Class of transformers → family."""


def _common(fields: Fields) -> dict[str, Any]:
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise SourceError(f"{fields.path}: the activation hidden_act is {activation!r}; supported is 'silu'")
    heads = fields.number("num_attention_heads")
    theta, scaling = _rotary(fields)
    return {
        "vocabulary": fields.number("vocab_size"),
        "width": fields.number("hidden_size"),
        "layers": fields.number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.number("num_key_value_heads", heads),
        "hidden": fields.number("intermediate_size"),
        "context": fields.number("max_position_embeddings", 2048),
        "head_size": fields.number("head_dim", fields.number("hidden_size") // heads),
        "theta": theta,
        "scaling": scaling,
        "eps": fields.real("rms_norm_eps", 1e-6),
        "tied": fields.flag("tie_word_embeddings"),
    }


def _rotary(fields: Fields) -> tuple[float, Scaling | None]:
    """Base and scaling of the rotary frequencies, from ``rope_parameters`` or the older ``rope_scaling``."""
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    given = fields.values.get(name) or {}
    if not isinstance(given, dict):
        raise SourceError(f"{fields.path}: {name} is {given!r}; it must be an object")
    kind = given.get("rope_type", given.get("type", "default"))

    def value(key: str) -> float:
        return positive(given.get(key), f"{name}.{key}", fields.path)

    part = given.get("partial_rotary_factor", fields.values.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise SourceError(f"{fields.path}: partial_rotary_factor is {part!r}; only whole heads (1.0) rotate here")
    theta = positive(given.get("rope_theta", fields.values.get("rope_theta", 10000.0)), "rope_theta", fields.path)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(value("factor"))
    if kind == "llama3":
        low, high = value("low_freq_factor"), value("high_freq_factor")
        if high <= low:
            raise SourceError(f"{fields.path}: {name}.high_freq_factor must be greater than low_freq_factor")
        return theta, Llama3Scaling(value("factor"), low, high, int(value("original_max_position_embeddings")))
    raise SourceError(
        f"{fields.path}: the rotary scaling {name}.rope_type is {kind!r}; supported are default, linear and llama3"
    )
