"""Load a base model and its tokenizer. torch and transformers are imported when a function is called.

Never code from a model's folder (`trust_remote_code` is always off), never pickles (`use_safetensors` always on).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import Filter, LogRecord
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, ModelError, UnsafeFileError
from engine.models import folders
from engine.models.catalogue import BUILTIN, canonical
from engine.models.fetch import resolve, resolve_config
from engine.models.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
"""For tokenizers without one: each message as its role, a colon, its text and an empty line; an answer ends with the
tokenizer's end token, or the model would never learn to stop. Training teaches the model to follow it."""

_PRECISIONS = ("auto", "fp32", "bf16")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
# What a load lacked is said by our own errors, in words.
_NOISE = ("Failed to load CPU gemm_4bit_forward", "LOAD REPORT")


def load_causal_lm(
    name: str,
    *,
    precision: str = "auto",
    quantization: str = "none",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer with a pad token and a chat template.

    Args:
        name: a built-in name, a local folder or a hub id.
        precision: `fp32`, `bf16`, or `auto` (see `auto_precision`).
        quantization: `none`, or `nf4`, `fp4`, `int8`: the linear layers' weights in bitsandbytes' codes. `precision` is
            then the type of all else, and of the products.
        device: where the weights go; `default_device()` when left out.
        on_progress: told what happens while the model is fetched and loaded.

    Raises:
        ModelError: it cannot be found, fetched or loaded, or weights are missing in its files.
        UnsafeFileError: its weights are pickles, or it needs code of its own.
        ConfigError: an unknown precision or quantization.
    """
    model, tokenizer, missing = open_model(
        name,
        "AutoModelForCausalLM",
        precision=precision,
        quantization=quantization,
        device=device,
        on_progress=on_progress,
    )
    check_whole(
        name, missing, "It is damaged, or it is not a causal language model; fetch it again or choose another one."
    )
    return model, tokenizer


def open_model(
    name: str,
    auto: str,
    *,
    precision: str = "auto",
    quantization: str = "none",
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
    configure: Callable[[Any], Mapping[str, Any]] | None = None,
    keep: Sequence[str] = (),
    refuse: Callable[[str, Exception], ModelError] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model of any head in evaluation mode, its tokenizer with a pad token, and the names of weights it lacked.

    Args:
        name, precision, quantization, device, on_progress: as `load_causal_lm`.
        auto: the name of transformers' class that loads it.
        configure: gets the model's config before the weights are read, to change or to refuse it; gives what
            `from_pretrained` takes more.
        keep: modules that are not quantised.
        refuse: the error for a model that this class cannot load.

    Raises:
        ModelError, UnsafeFileError, ConfigError: as `load_causal_lm`, but for missing weights.
    """
    import torch
    import transformers

    from engine import bnb

    place = torch.device(device if device is not None else default_device())
    dtype = dtype_of(precision, place)
    folder = resolve(name, on_progress)
    config = _config(folder, name)
    more = configure(config) if configure else {}
    tokenizer = _tokenizer(folder, name)
    if on_progress:
        on_progress("loading", None, f"Loading {name}")
    loader = getattr(transformers, auto)
    with quiet():
        try:
            loaded: Any = loader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **quantized_loading(quantization, dtype, place, config, loader, keep),
                **more,
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise (refuse or _unloadable)(name, error) from error
    model, report = loaded
    # An adapter's config takes its base's name from here; a path of this machine would mean nothing elsewhere.
    model.name_or_path = model.config.name_or_path = str(folder) if Path(name).expanduser().is_dir() else name
    (bnb.steady(model) if quantization != "none" else model.to(place)).eval()
    _align_pad(model, tokenizer)
    return model, tokenizer, sorted(report["missing_keys"])


def check_whole(name: str, missing: Sequence[str], hint: str) -> None:
    """Refuses a model whose files lack weights, which would be random ones.

    Raises:
        ModelError: with the first of them, and the hint.
    """
    if missing:
        raise ModelError(f"The files of {name} lack {len(missing)} weights, among them {', '.join(missing[:3])}.", hint)


def quantized_loading(
    quantization: str,
    dtype: torch.dtype,
    place: torch.device,
    config: PreTrainedConfig,
    loader: Any,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """What `from_pretrained` takes more for a base in codes; nothing for `none`.

    `loader` is the auto class that loads the model, `keep` names modules that stay in full precision, such as a head
    that is trained.

    Raises:
        ConfigError: an unknown quantization, or one that this device cannot do.
        ModelError: bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    from engine import bnb

    if place.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"quantization is {quantization!r}, which bitsandbytes cannot do on {place.type}.",
            "Leave it out, or load the base on the CPU.",
        )
    skip = None
    if quantization in ("nf4", "fp4"):
        skip = _skipped(quantization, place, config, loader)
    if keep:
        skip = [*(skip or ()), *keep]
    return {"quantization_config": bnb.config(quantization, dtype, skip), "device_map": {"": place}}


def _skipped(quantization: str, place: torch.device, config: PreTrainedConfig, loader: Any) -> list[str] | None:
    """The layers to leave alone in 4 bits, those that transformers leaves alone among them; None for those alone."""
    import torch

    with quiet(), torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False)
    own, others = kept_whole(model, quantization, place)
    return [*others, *own] if others else None


def kept_whole(model: nn.Module, quantization: str, place: torch.device) -> tuple[list[str], list[str]]:
    """Names of the layers that a quantised load leaves in full precision: transformers' own choice, and ours.

    `model` may be on the meta device.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    from engine import bnb

    ours = {*bnb.unfit(model, quantization, place), *bnb.grouped_values(model)} if quantization != "int8" else set()
    return list(get_keys_to_not_convert(model)), sorted(ours)


def load_tokenizer(name: str, on_progress: Progress | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_causal_lm` gives, without the weights in memory.

    Raises:
        ModelError, UnsafeFileError: as `load_causal_lm`.
    """
    return _tokenizer(resolve(name, on_progress), name)


def load_config(name: str, on_progress: Progress | None = None) -> PreTrainedConfig:
    """The model's configuration; weights are not fetched.

    Raises:
        ModelError, UnsafeFileError: as `load_causal_lm`.
    """
    return _config(resolve_config(name, on_progress), name)


AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "captioning": "AutoModelForImageTextToText",
}
"""Task -> transformers' class that builds its model."""


def meta_model(
    name: str,
    on_progress: Progress | None = None,
    task: str | None = None,
    configure: Callable[[Any], Any] | None = None,
) -> PreTrainedModel:
    """The model on torch's meta device: every shape, no weights, next to no memory. For counting.

    `task` says with which head (of `text_to_image` it is the UNet); by default the first that a built-in model is meant
    for, else `causal_lm`. `configure` gets the model's config before it is built, to change it.

    Raises:
        ModelError, UnsafeFileError: as `load_causal_lm`.
    """
    import torch
    import transformers

    first = BUILTIN[canonical(name)].tasks[0] if canonical(name) in BUILTIN else None
    if (task or first) == "text_to_image":
        from engine.models.pipelines import meta_unet

        return meta_unet(name, on_progress)
    config = load_config(name, on_progress)
    kind = task or first or "causal_lm"
    if configure:
        configure(config)
    try:
        with quiet(), torch.device("meta"):
            build: Any = getattr(transformers, AUTO_CLASSES[kind]).from_config
            model: PreTrainedModel = build(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise _unloadable(name, error) from error
    return model


def uses_default_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model brought no chat template, so that ours stands in."""
    return bool(tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE)


def default_device() -> str:
    """`cuda` where there is one, then Apple's `mps`, else `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def auto_precision(device: str | torch.device) -> str:
    """`bf16` where the hardware computes faster in it: CUDA that supports it and CPUs as `cpu_likes_bf16` says.

    Other hardware emulates bf16 or has it at half rate: slower than fp32 and less exact.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        supported = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = kind == "cpu" and cpu_likes_bf16()
    return "bf16" if supported else "fp32"


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """`fp32`, `bf16` or `auto` as torch's type.

    Raises:
        ConfigError: another word.
    """
    import torch

    if precision not in _PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; needed: one of {', '.join(_PRECISIONS)}")
    chosen = auto_precision(device) if precision == "auto" else precision
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def cpu_likes_bf16(source: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones: amx_bf16, or AMD's avx512_bf16.

    Intel's avx512_bf16 alone does not count: a training step takes about 1.6 times as long in it (docs/threads.md).
    A fixed rule rather than a measurement at the start, so that a resumed run computes as it began.
    """
    vendor, flags = _processor(source)
    return "amx_bf16" in flags or (vendor == "AuthenticAMD" and "avx512_bf16" in flags)


def context_length(config: Any) -> int | None:
    """The most tokens that the model was made for; None when its configuration sets no limit."""
    inner = getattr(config, "text_config", None) or config
    for name in _LENGTHS:
        value = getattr(inner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _processor(source: Path) -> tuple[str, frozenset[str]]:
    """Vendor and feature flags of the first processor, as Linux names them; empty where that cannot be read."""
    try:
        text = source.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return "", frozenset()
    pairs = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return pairs.get("vendor_id", ""), frozenset(pairs.get("flags", "").split())


def _config(folder: Path, name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    raw = folders.read_json(folder / folders.CONFIG)
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "auto_map" in raw:
            raise UnsafeFileError(
                f"{name} (model type {raw.get('model_type')!r}) needs Python code that comes with the model; this "
                "program never runs a model's own code.",
                "Choose a model whose type transformers knows.",
            ) from error
        raise _unloadable(name, error) from error


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ModelError(
                f"The tokenizer of {name} cannot be loaded: {first_line(error)}.",
                "The folder must also hold the tokenizer (tokenizer.json, tokenizer_config.json); copy it there.",
            ) from error
    if tokenizer.pad_token is None:
        # Any token will do, padding is masked; a new one would need a larger embedding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def _align_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the tokenizer's pad token, which `generate` otherwise warns about at each call.

    Raises:
        ModelError: the tokenizer knows more tokens than the model has embeddings.
    """
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:
        raise ModelError(
            f"The tokenizer's pad token has number {tokenizer.pad_token_id}; the model has {rows} embeddings.",
            "Tokenizer and model do not belong together; use the tokenizer that came with the model.",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _unloadable(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot be loaded as a causal language model: {first_line(error)}.",
        "Choose a causal language model that this version of transformers knows.",
    )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")[:300]


class _KnownNoise(Filter):
    def filter(self, record: LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _NOISE)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would land in a run's log, and known harmless notices."""
    from transformers.utils import logging

    from engine import bnb

    bnb.silence()
    spoken: Any = logging
    logger, known, bars = spoken.get_logger("transformers"), _KnownNoise(), spoken.is_progress_bar_enabled()
    handlers = list(logger.handlers)
    spoken.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(known)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(known)
        if bars:
            spoken.enable_progress_bar()
