"""Adapter Studio's engine: parameter-efficient fine-tuning, implemented from the papers.

The public names follow PEFT's, so `from peft import LoraConfig, get_peft_model` becomes `from engine import ...`. Names
are imported on first use: `import engine` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "AdaLoraConfig": "engine.adapters.adalora",
    "AdapterConfig": "engine.adapters.base",
    "AutoPeftModel": "engine.auto",
    "AutoPeftModelForCausalLM": "engine.auto",
    "AutoPeftModelForFeatureExtraction": "engine.auto",
    "AutoPeftModelForQuestionAnswering": "engine.auto",
    "AutoPeftModelForSeq2SeqLM": "engine.auto",
    "AutoPeftModelForSequenceClassification": "engine.auto",
    "AutoPeftModelForTokenClassification": "engine.auto",
    "DeltaLoraConfig": "engine.adapters.delta_lora",
    "AutoPeftModelForVision2Seq": "engine.auto",
    "AdapterTrainer": "engine.trainer",
    "AdapterTrainerMixin": "engine.trainer",
    "DoRAConfig": "engine.adapters.dora",
    "PeftMixedModel": "engine.model",
    "get_layer_status": "engine.compat",
    "get_model_status": "engine.compat",
    "inject_adapter_in_model": "engine.compat",
    "load_peft_weights": "engine.compat",
    "prepare_model_for_kbit_training": "engine.compat",
    "IA3Config": "engine.adapters.ia3",
    "JobSpec": "engine.train.job",
    "LoHaConfig": "engine.adapters.loha",
    "LoKrConfig": "engine.adapters.lokr",
    "LoraConfig": "engine.adapters.lora",
    "LoRAFAConfig": "engine.adapters.lorafa",
    "MoRAConfig": "engine.adapters.mora",
    "PeftConfig": "engine.auto",
    "PeftModel": "engine.model",
    "PeftModelForCausalLM": "engine.model",
    "PeftModelForFeatureExtraction": "engine.model",
    "PeftModelForQuestionAnswering": "engine.model",
    "PeftModelForSeq2SeqLM": "engine.model",
    "PeftModelForSequenceClassification": "engine.model",
    "PeftModelForTokenClassification": "engine.model",
    "PeftType": "engine.adapters.base",
    "QALoRAConfig": "engine.adapters.qalora",
    "QuantizedLinear": "engine.quantized",
    "PrefixTuningConfig": "engine.adapters.prefix_tuning",
    "PromptEncoderConfig": "engine.adapters.p_tuning",
    "PromptEncoderReparameterizationType": "engine.adapters.p_tuning",
    "PromptLearningConfig": "engine.adapters.virtual",
    "PromptTuningConfig": "engine.adapters.prompt_tuning",
    "PromptTuningInit": "engine.adapters.prompt_tuning",
    "TaskType": "engine.adapters.base",
    "VeraConfig": "engine.adapters.vera",
    "create_lorafa_optimizer": "engine.train.optim",
    "create_loraplus_optimizer": "engine.train.optim",
    "expand_lora_rank": "engine.resize",
    "get_optimal_config": "engine.auto",
    "get_peft_config": "engine.auto",
    "get_peft_model": "engine.model",
    "get_peft_model_state_dict": "engine.auto",
    "reduce_lora_rank": "engine.resize",
    "prepare_training": "engine.hooks",
    "save_as_lora": "engine.checkpoint",
    "quantize_linears": "engine.quantized",
    "load_adapter_file": "engine.formats",
    "read_diffusers": "engine.formats",
    "read_kohya": "engine.formats",
    "set_peft_model_state_dict": "engine.auto",
    "write_diffusers": "engine.formats",
    "write_kohya": "engine.formats",
}

__all__ = sorted(_NAMES)

if TYPE_CHECKING:
    from engine.adapters.adalora import AdaLoraConfig as AdaLoraConfig
    from engine.adapters.base import AdapterConfig as AdapterConfig
    from engine.adapters.base import PeftType as PeftType
    from engine.adapters.base import TaskType as TaskType
    from engine.adapters.delta_lora import DeltaLoraConfig as DeltaLoraConfig
    from engine.adapters.dora import DoRAConfig as DoRAConfig
    from engine.adapters.ia3 import IA3Config as IA3Config
    from engine.adapters.loha import LoHaConfig as LoHaConfig
    from engine.adapters.lokr import LoKrConfig as LoKrConfig
    from engine.adapters.lora import LoraConfig as LoraConfig
    from engine.adapters.lorafa import LoRAFAConfig as LoRAFAConfig
    from engine.adapters.mora import MoRAConfig as MoRAConfig
    from engine.adapters.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from engine.adapters.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from engine.adapters.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from engine.adapters.qalora import QALoRAConfig as QALoRAConfig
    from engine.adapters.vera import VeraConfig as VeraConfig
    from engine.model import PeftModel as PeftModel
    from engine.model import get_peft_model as get_peft_model
    from engine.train.job import JobSpec as JobSpec


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
