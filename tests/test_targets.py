"""Which modules are adapted where none are named, on the architectures that people use.

Built from their config classes on the meta device, two layers each.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch import nn

from engine import LoraConfig, get_peft_model
from engine.adapters import ADAPTERS
from engine.layers import AdapterLayer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    )

PLAIN = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**PLAIN, "vocab_size": 64, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
VISION = {**PLAIN, "image_size": 32}

# model type -> (model class, config class, config, LoRA's modules per model, IA3's modules by ending, with how often)
Q_V = {"q_proj": 2, "v_proj": 2}
LLAMA_IA3 = {"k_proj": 2, "v_proj": 2, "down_proj": 2}
FC2_IA3 = {"k_proj": 2, "v_proj": 2, "fc2": 2}
FUSED = {"query_key_value": 2}
FUSED_IA3 = {"query_key_value": 2, "dense_4h_to_h": 2}
BERT = {"query": 2, "value": 2}
# `output.dense` also ends the name of the attention's own output layer, here as in PEFT.
BERT_IA3 = {"key": 2, "value": 2, "dense": 4}
GPT2, GPT2_IA3 = {"c_attn": 2}, {"c_attn": 2, "c_proj": 2}
ENCODER_DECODER, ENCODER_DECODER_IA3 = {"q": 6, "v": 6}, {"k": 6, "v": 6, "wo": 4}
Row = tuple[str, str, dict[str, Any], dict[str, int], dict[str, int]]
MODELS: dict[str, Row] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, Q_V, LLAMA_IA3),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, Q_V, LLAMA_IA3),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 2},
        Q_V,
        {"k_proj": 2, "v_proj": 2},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 2}, Q_V, LLAMA_IA3),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, Q_V, LLAMA_IA3),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, Q_V, LLAMA_IA3),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED, Q_V, LLAMA_IA3),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, Q_V, LLAMA_IA3),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**TEXT, "num_key_value_heads": 4}, Q_V, LLAMA_IA3),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT, Q_V, FC2_IA3),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT, {"qkv_proj": 2}, {"qkv_proj": 2, "down_proj": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, GPT2, GPT2_IA3),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, GPT2, GPT2_IA3),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, FUSED, FUSED_IA3),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "attention_types": [[["global"], 2]]},
        Q_V,
        {"k_proj": 2, "v_proj": 2, "c_proj": 2},
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, Q_V, {"k_proj": 2, "v_proj": 2, "fc_out": 2}),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**GPT, "rotary_dim": 4},
        {"qkv_proj": 2},
        {"qkv_proj": 2, "fc_out": 2},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 128, "word_embed_proj_dim": 64}, Q_V, FC2_IA3),
    "bloom": ("BloomForCausalLM", "BloomConfig", {**TEXT, "n_layer": 2, "n_head": 4}, FUSED, FUSED_IA3),
    "falcon": ("FalconForCausalLM", "FalconConfig", TEXT, FUSED, FUSED_IA3),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 64},
        {"Wqkv": 2},
        {"Wqkv": 2, "down_proj": 2},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ENCODER_DECODER, ENCODER_DECODER_IA3),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5, ENCODER_DECODER, ENCODER_DECODER_IA3),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**BART, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 64},
        {"q_proj": 6, "v_proj": 6},
        {"k_proj": 6, "v_proj": 6, "fc2": 4},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, BERT, BERT_IA3),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, BERT, BERT_IA3),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", TEXT, BERT, BERT_IA3),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT, BERT, BERT_IA3),
    "layoutlm": ("LayoutLMForTokenClassification", "LayoutLMConfig", TEXT, BERT, BERT_IA3),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "vocab_size": 64},
        {"q_lin": 2, "v_lin": 2},
        {"k_lin": 2, "v_lin": 2, "lin2": 2},
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        "DebertaConfig",
        TEXT,
        {"in_proj": 2},
        {"in_proj": 2, "dense": 4},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT,
        {"query_proj": 2, "value_proj": 2},
        {"key_proj": 2, "value_proj": 2, "dense": 4},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, Q_V, FC2_IA3),
    "clip_text_model": ("CLIPTextModel", "CLIPTextConfig", TEXT, Q_V, FC2_IA3),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", VISION, Q_V, FC2_IA3),
    "blip": (
        "BlipForConditionalGeneration",
        "BlipConfig",
        {"text_config": {**TEXT, "encoder_hidden_size": 64}, "vision_config": VISION},
        # The text decoder alone, attention to the picture included.
        {"query": 4, "value": 4},
        {"key": 4, "value": 4, "dense": 6},
    ),
}
# Settings for methods whose defaults are too large for models this small.
FITTING: dict[str, dict[str, Any]] = {"mora": {"r": 2}}
# Where PEFT's table says something else, and why.
_KEYS = "the paper scales keys and values; PEFT's line has queries in the place of one of them"
DIFFERENT = {
    ("lora", "phi"): "PEFT adds the feed-forward layers for this one architecture",
    ("ia3", "mt5"): "PEFT scales the output of wi_1, the paper the input of the last layer, as PEFT does for T5",
    **{("ia3", kind): _KEYS for kind in ("opt", "gptj", "gpt_neo", "bart", "phi", "gemma", "gemma2", "gemma3_text")},
    **{("ia3", kind): _KEYS for kind in ("qwen2", "qwen3")},
}


def build(kind: str) -> nn.Module:
    name, config, values, _, _ = MODELS[kind]
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**values))


def sd_unet() -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


def endings(model: Any) -> Counter[str]:
    layers = [layer for layer in model._layers["default"] if isinstance(layer, AdapterLayer)]
    return Counter(layer.module_name.rsplit(".", 1)[-1] for layer in layers)


def targeted() -> list[str]:
    """The methods that sit on modules; prompts do not."""
    return [
        name for name in ADAPTERS if "target_modules" in {f.name for f in dataclasses.fields(ADAPTERS[name].config)}
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_default_targets(kind: str) -> None:
    for name in targeted():
        model = get_peft_model(build(kind), ADAPTERS[name].config(**FITTING.get(name, {})))
        rules = ADAPTERS[name].config.TARGET_RULES
        if not rules:
            assert endings(model) == MODELS[kind][3], name
        elif name == "ia3":
            assert endings(model) == MODELS[kind][4], name
        assert endings(model), name


@pytest.mark.parametrize(
    ("method", "table"),
    [
        ("lora", TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        ("ia3", TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
    ],
)
def test_defaults_are_those_of_peft_or_the_difference_is_known(method: str, table: dict[str, Any]) -> None:
    both = [kind for kind in MODELS if kind in table]
    assert len(both) > 15
    config = ADAPTERS[method].config
    for kind in both:
        ours = endings(get_peft_model(build(kind), config()))
        theirs = endings(get_peft_model(build(kind), config(target_modules=table[kind])))
        assert (ours == theirs) != ((method, kind) in DIFFERENT), (kind, ours, theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_leaves_the_output_embedding_alone(kind: str) -> None:
    base = build(kind)
    linear = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    heads = [name for name in linear if name.rsplit(".", 1)[-1] in ("lm_head", "decoder", "embed_out")]
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2))
    found = {layer.module_name for layer in model._layers["default"]}
    assert found == set(linear) - set(heads)
    assert endings(model).keys() >= MODELS[kind][3].keys()


@pytest.mark.parametrize(("task", "heads"), [("SEQ_CLS", {"classifier"}), ("TOKEN_CLS", {"classifier"}), (None, set())])
def test_heads_of_classifiers_are_trained_in_full_instead(task: str | None, heads: set[str]) -> None:
    model = get_peft_model(build("bert"), LoraConfig(target_modules="all-linear", task_type=task))
    saved = {layer.module_name for layer in model._layers["default"] if not isinstance(layer, AdapterLayer)}
    assert saved == heads and ("classifier" in endings(model)) == (task is None)


def test_stable_diffusion_unet() -> None:
    """SD 1.5's UNet: the recipe's counts, and every method's defaults."""
    recipe = LoraConfig(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    model = get_peft_model(sd_unet(), recipe)
    assert model.get_nb_trainable_parameters() == (797_184, 860_318_148)
    assert model.get_base_model().config.cross_attention_dim == 768
    for name in targeted():
        found = endings(get_peft_model(sd_unet(), ADAPTERS[name].config()))
        if not ADAPTERS[name].config.TARGET_RULES:
            assert found == {"to_q": 32, "to_v": 32}
        elif name == "ia3":
            assert found == {"to_k": 32, "to_v": 32, "2": 16}
    everything = get_peft_model(sd_unet(), LoraConfig(target_modules="all-linear"))
    assert len(everything._layers["default"]) == 184
