"""A Hugging Face checkpoint folder: ``config.json`` and safetensors, by the class that ``architectures`` names.

transformers builds the class on the meta device and assigns the tensors of the memory-mapped files, so no weight is
initialised or copied. Attention is PyTorch's; its mask comes from :func:`broadcast_mask`, which exports as a few
broadcasting comparisons.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.errors import ArtifactError, SourceError
from . import Loaded
from .decoder_families import FAMILIES
from .sentence import SentenceEncoder, Stages, read_stages
from .weights import check_weight_files, weight_files

_BATCH, _SEQUENCE = 2, 11  # example sizes; different from each other and unlikely to equal a model's own sizes
_LONGEST = 2048  # tokens, where the configuration names no limit


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint."""
    return (folder / "config.json").is_file() or (folder / "modules.json").is_file()


def load_checkpoint(folder: Path) -> Loaded:
    """Load a checkpoint with made-up sample inputs and its default dynamic shapes.

    A sentence-transformers folder gives an encoder whose output is the pooled (and normalised) sentence vector.

    Raises:
        SourceError: the configuration cannot be read or names nothing that transformers knows.
        ArtifactError: weight files that are missing, damaged or do not fit the configuration.
    """
    stages = read_stages(folder)
    place = stages.transformer if stages else folder
    model = load_model(place)
    kwargs, shapes = _samples(model, folder, stages)
    module: nn.Module = SentenceEncoder(model, stages) if stages else model
    alike = tuple(kwargs) if "input_ids" in kwargs else ()
    return Loaded(module.eval(), (), kwargs, shapes, alike=alike, mapped=tuple(weight_files(place)))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``, which names at least one class.

    Raises:
        SourceError: there is none, it cannot be read or names no class, or the checkpoint is quantized already.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no config.json; a checkpoint folder needs config.json and model.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("architectures"):
        raise SourceError(f'{path} names no model class: add "architectures": ["BertModel"] (or whichever it is)')
    if config.get("quantization_config"):
        raise SourceError(f"{path}: the checkpoint is quantized already; start from the original weights")
    return config


def load_model(folder: Path) -> nn.Module:
    """The model of a checkpoint folder, in evaluation mode, its weights memory-mapped.

    Raises:
        SourceError: as :func:`load_checkpoint`.
        ArtifactError: as :func:`load_checkpoint`.
    """
    described = read_config(folder)
    import transformers

    cls = _model_class(transformers, described, folder)
    found = check_weight_files(folder)
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise SourceError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from error
        if getattr(config, "is_encoder_decoder", False):
            raise SourceError(
                f"{folder} is an encoder-decoder model, which needs several entry points; load it in Python and pass "
                f"the module with entries="
            )
        for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
            if hasattr(part, "use_cache"):
                part.use_cache = False
        model, info = _from_pretrained(cls, folder, config)
    _check_loaded(model, info, folder, found)
    return model.eval()


def broadcast_mask(
    batch_size: Any,
    q_length: Any,
    kv_length: Any,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> torch.Tensor | None:
    """The attention mask of a model, boolean, broadcastable to (batch, 1, query, key); True where a key is seen.

    transformers' own way indexes the padding mask by position, which exports as a gather and an expanded copy. Here
    padding is ``mask[:, None, None, :]`` and the pattern (causal, windowed) a comparison of positions.
    """
    from transformers import masking_utils

    pattern_of: Any = mask_function or masking_utils.causal_mask_function
    simple = not use_vmap and isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset == 0
    if not simple:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=pattern_of,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **rest,
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        if padding.shape[1] != kv_length:
            padding = padding[:, :kv_length]
        padding = padding.to(torch.bool)[:, None, None, :]
    if pattern_of is masking_utils.bidirectional_mask_function:
        return padding
    if pattern_of is masking_utils.causal_mask_function and padding is None and q_length == kv_length:
        return None  # the attention call itself is causal then
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
    query = torch.arange(q_length, device=device)[None, None, :, None]
    key = torch.arange(kv_length, device=device)[None, None, None, :]
    pattern = pattern_of(batch, head, query, key)
    return pattern if padding is None else pattern & padding


def _model_class(transformers: Any, config: dict[str, Any], folder: Path) -> Any:
    name = str(config["architectures"][0])
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        close = difflib.get_close_matches(
            name, [entry for entry in dir(transformers) if entry[0].isupper()], n=1, cutoff=0.85
        )
        hint = f"; did you mean {close[0]}?" if close else ""
        if config.get("auto_map"):
            hint = "; it is defined by code inside the folder, which is not run: load it in Python and pass the module"
        families = f" (text is generated by {', '.join(FAMILIES)})" if name.endswith("ForCausalLM") else ""
        raise SourceError(
            f"{folder / 'config.json'} names the class {name!r}, which transformers {transformers.__version__} "
            f"does not have{hint}{families}"
        )
    return cls


def _from_pretrained(cls: Any, folder: Path, config: Any) -> tuple[Any, dict[str, Any]]:
    def load(attention: str) -> Any:
        return cls.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below, with their names
            output_loading_info=True,
        )

    try:
        if not getattr(cls, "_supports_sdpa", False):
            return load("eager")
        return load(_attention())
    except Exception as error:
        raise SourceError(f"{folder} cannot be loaded as {cls.__name__}: {_first_line(error)}") from error


def _attention() -> str:
    """The name under which transformers knows PyTorch's attention with our mask; ``sdpa`` on releases before 5."""
    from transformers import masking_utils, modeling_utils

    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        return "sdpa"
    modeling_utils.AttentionInterface.register("tilewright", modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"])
    masking_utils.AttentionMaskInterface.register("tilewright", broadcast_mask)
    return "tilewright"


def _check_loaded(model: nn.Module, info: dict[str, Any], folder: Path, found: dict[str, tuple[int, ...]]) -> None:
    for name, checkpoint, wanted in sorted(info.get("mismatched_keys") or ()):
        raise ArtifactError(
            f"{folder}: the tensor {name!r} has shape {list(checkpoint)} in the weights, but config.json asks for "
            f"{list(wanted)}"
        )
    if info.get("error_msgs"):
        raise ArtifactError(f"{folder}: {str(info['error_msgs'][0]).splitlines()[0]}")
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        state = model.state_dict()
        shape = list(state[missing[0]].shape) if missing[0] in state else "?"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArtifactError(
            f"{folder}: the weights lack {missing[0]!r} (shape {shape}){more} of {type(model).__name__}; they hold "
            f"{len(found)} other tensors"
        )


def _samples(model: Any, folder: Path, stages: Stages | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Sample inputs by name and their default dimensions, from the configuration."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        height, width = _image_size(config, folder)
        channels = int(getattr(config, "num_channels", 3))
        image = torch.randn(_BATCH, channels, height, width, generator=generator)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": image.to(dtype)}, {"pixel_values": f"batch:1..64,{channels},{height},{width}"}
    if "input_ids" not in takes:
        raise SourceError(
            f"{folder}: {type(model).__name__} takes {model.main_input_name!r}, for which no sample is made; load it "
            f"in Python and pass the module with args="
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = _longest(text)
    size = (_BATCH, min(_SEQUENCE, limit))
    kwargs = {"input_ids": torch.randint(0, int(text.vocab_size), size, generator=generator)}
    if "attention_mask" in takes:
        mask = torch.ones(size, dtype=torch.int64)
        mask[-1, max(1, size[1] - 3) :] = 0  # padded at the end, as a batch of sentences is
        kwargs["attention_mask"] = mask
    if "token_type_ids" in takes and int(getattr(text, "type_vocab_size", 0) or 0) > 1:
        types = torch.zeros(size, dtype=torch.int64)
        types[:, size[1] // 2 :] = 1
        kwargs["token_type_ids"] = types
    return kwargs, {name: f"batch:1..64,seq:1..{limit}" for name in kwargs}


def _longest(config: Any) -> int:
    """The longest sequence that the position embeddings have a row for."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa and its kin count positions from behind the padding index.
            shifted = any(part in str(config.model_type) for part in ("roberta", "camembert", "xlm-roberta", "mpnet"))
            return value - int(config.pad_token_id) - 1 if shifted else value
    return _LONGEST


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    size: Any = getattr(config, "image_size", None)
    preprocessor = folder / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        try:
            described = json.loads(preprocessor.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SourceError(f"{preprocessor} is no JSON: {error}") from error
        size = described.get("crop_size") or described.get("size")
        if isinstance(size, dict):
            size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    if size is None:
        size = 224
    if isinstance(size, int):
        size = (size, size)
    return int(size[0]), int(size[1])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings of transformers: what matters is raised as an error."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
