"""Adapters with their base model in one call, and small helpers of PEFT's API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from engine.adapters import ADAPTERS
from engine.adapters.base import AdapterConfig
from engine.adapters.lora import LoraConfig
from engine.checkpoint import adapter_state, read_config, write_weights
from engine.errors import CheckpointError, ConfigError
from engine.model import PeftModel


class PeftConfig:
    """Reads an adapter's config without knowing its method first."""

    @staticmethod
    def from_pretrained(model_id: str | Path) -> AdapterConfig:
        """The config in a folder or at a hub id, as the class of its method."""
        return read_config(model_id)


def get_peft_config(config: Mapping[str, Any]) -> AdapterConfig:
    """A config from plain data with `peft_type`, as `adapter_config.json` holds it."""
    kind = config.get("peft_type")
    for spec in ADAPTERS.values():
        if spec.config.PEFT_TYPE.value == kind:
            return spec.config.from_dict(config)
    known = ", ".join(dict.fromkeys(spec.config.PEFT_TYPE.value for spec in ADAPTERS.values()))
    raise ConfigError(f"peft_type is {kind!r}; needed: the name of a method that is registered here: {known}.")


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, as `save_pretrained` writes them."""
    return adapter_state(model, adapter_name)


def set_peft_model_state_dict(model: PeftModel, state: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Copy tensors under PEFT's keys into an attached adapter."""
    write_weights(model, adapter_name, state)


class AutoPeftModel:
    """Loads the base that an adapter's config names, and the adapter on it."""

    loader: ClassVar[str] = "AutoModel"

    @classmethod
    def from_pretrained(
        cls, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False, **kwargs: Any
    ) -> PeftModel:
        """
        Args:
            model_id: the adapter's folder or hub id.
            adapter_name: its name on the model.
            is_trainable: False freezes it.
            kwargs: for the base's `from_pretrained` (dtype, quantization_config, ...).

        Raises:
            CheckpointError: the adapter's config does not name its base.
        """
        import transformers

        from engine.models import resolve

        config = read_config(model_id)
        if not config.base_model_name_or_path:
            raise CheckpointError(
                f"The adapter in {model_id} does not name its base model.",
                "Load the base yourself and use PeftModel.from_pretrained(base, folder).",
            )
        place = resolve(config.base_model_name_or_path)
        loader = getattr(transformers, cls.loader)
        base = loader.from_pretrained(place, use_safetensors=True, trust_remote_code=False, **kwargs)
        return PeftModel.from_pretrained(base, model_id, adapter_name, is_trainable)


class AutoPeftModelForCausalLM(AutoPeftModel):
    loader = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    loader = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    loader = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    loader = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    loader = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    loader = "AutoModel"


class AutoPeftModelForVision2Seq(AutoPeftModel):
    """Pictures (and text) to text: BLIP and its like. transformers 5 calls this class image-text-to-text."""

    loader = "AutoModelForImageTextToText"


_OPTIMAL = {
    "classification": (8, 16, 0.1),
    "generation": (16, 32, 0.05),
    "translation": (32, 64, 0.1),
    "summarization": (16, 32, 0.1),
}


def get_optimal_config(task_type: str, model_size: float) -> LoraConfig:
    """A LoRA config that suits a task; above 10e9 parameters r and alpha double.

    Args:
        task_type: classification, generation, translation or summarization.
        model_size: the base's parameters.
    """
    if task_type not in _OPTIMAL:
        raise ConfigError(f"task_type is {task_type!r}; needed: one of {', '.join(_OPTIMAL)}.")
    r, alpha, dropout = _OPTIMAL[task_type]
    factor = 2 if model_size > 10e9 else 1
    return LoraConfig(r=factor * r, lora_alpha=factor * alpha, lora_dropout=dropout)
