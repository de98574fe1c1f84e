"""Prompt Tuning (Lester et al., 2021, https://arxiv.org/abs/2104.08691).

    y = f([P; E(x)]),   P: (n, d), learned embeddings before those of the text; nothing else learns

P starts at random, from a text's embeddings, or from those of random words; the latter two learn far better.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import PROMPT, AdapterSpec, PeftType
from engine.adapters.virtual import PromptLearningConfig, VirtualTokens
from engine.errors import ConfigError


class PromptTuningInit(enum.StrEnum):
    """Where the virtual tokens start, by PEFT's names."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt Tuning's settings, by PEFT's names.

    Attributes:
        prompt_tuning_init: RANDOM (N(0, 1)), TEXT (the embeddings of a text) or SAMPLE_VOCAB (of random tokens).
        prompt_tuning_init_text: the text; it is repeated or cut to n tokens.
        tokenizer_name_or_path: the tokenizer that reads it; None for the base's own.
        tokenizer_kwargs: for the tokenizer's `from_pretrained`; a tokenizer's own code is never run.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.PROMPT_TUNING

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def faults(self) -> list[str]:
        found = super().faults()
        known = [item.value for item in PromptTuningInit]
        if self.prompt_tuning_init not in known:
            found.append(f"prompt_tuning_init is {self.prompt_tuning_init!r}; needed: one of {', '.join(known)}")
            return found
        object.__setattr__(self, "prompt_tuning_init", PromptTuningInit(self.prompt_tuning_init))
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            if not (self.prompt_tuning_init_text or "").strip():
                found.append("prompt_tuning_init_text is empty; needed with TEXT: the text to start from")
        elif self.tokenizer_kwargs:
            found.append("tokenizer_kwargs are given, which only prompt_tuning_init='TEXT' uses; leave them out")
        return found

    def fitted(self, model: Any) -> PromptTuningConfig:
        """As for every prompt method, and the base's own tokenizer by name: PEFT needs it in the file."""
        config = super().fitted(model)
        assert isinstance(config, PromptTuningConfig)
        if config.prompt_tuning_init is not PromptTuningInit.TEXT or config.tokenizer_name_or_path:
            return config
        name = config.base_model_name_or_path or getattr(model, "name_or_path", None)
        if not name:
            raise ConfigError(
                "prompt_tuning_init is TEXT, and neither a tokenizer nor the base's name is known.",
                "Set tokenizer_name_or_path.",
            )
        return config.replace(tokenizer_name_or_path=name)  # type: ignore[return-value]


class PromptTokens(VirtualTokens):
    """P, (n, d)."""

    def start(self, embedding: nn.Module) -> Tensor | None:
        config = self.config
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        if config.prompt_tuning_init is PromptTuningInit.RANDOM or weight.is_meta:
            return None
        if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, weight.shape[0], (config.rows,))
        else:
            ids = torch.tensor(_token_ids(config, weight.shape[0]))
        with torch.no_grad():
            found: Tensor = embedding(ids.to(weight.device))
        return found.detach()


def _token_ids(config: PromptTuningConfig, vocabulary: int) -> list[int]:
    """The text's tokens, repeated or cut to as many as the table has.

    Raises:
        ConfigError: the tokenizer cannot be had, finds nothing in the text, or belongs to a larger vocabulary.
    """
    ids = list(_tokenizer(config)(config.prompt_tuning_init_text)["input_ids"])
    if not ids:
        raise ConfigError(
            f"The tokenizer {config.tokenizer_name_or_path!r} finds no token in the text "
            f"{config.prompt_tuning_init_text!r}.",
            "Give another prompt_tuning_init_text, or use SAMPLE_VOCAB.",
        )
    if max(ids) >= vocabulary:
        raise ConfigError(
            f"The tokenizer {config.tokenizer_name_or_path!r} gives the token {max(ids)}, and the base knows "
            f"{vocabulary} tokens.",
            "Set tokenizer_name_or_path to the base's own tokenizer.",
        )
    return (ids * math.ceil(config.rows / len(ids)))[: config.rows]


def _tokenizer(config: PromptTuningConfig) -> Any:
    from transformers import AutoTokenizer

    from engine.models import BUILTIN, resolve

    name = str(config.tokenizer_name_or_path)
    more = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    place = resolve(name) if name in BUILTIN and not Path(name).is_dir() else name
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **more)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"The tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0] if str(error) else error!r}",
            "Set tokenizer_name_or_path to a local folder or a hub id, or use SAMPLE_VOCAB, which needs none.",
        ) from error


SPEC = AdapterSpec(
    name="prompt_tuning",
    title="Prompt Tuning",
    paper="https://arxiv.org/abs/2104.08691",
    config=PromptTuningConfig,
    build=None,
    layers=(PROMPT,),
    mergeable=False,
    mixable=False,
    identity_at_start=False,
    prompt=PromptTokens,
)
