"""Every preset on the exact shapes of models that people fine-tune, counted against formulas over their layers.

The models are built on the meta device from the values of their published configs, which stand here; no weights are
needed. Totals are the numbers of parameters that their pages on the hub give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from engine import get_peft_model
from engine.adapters import ADAPTERS
from engine.models.pipelines import unet_of
from studio import presets

Shapes = dict[str, list[tuple[int, int]]]
"""Last part of a layer's name -> (inputs, outputs) of every layer called so."""


@dataclass(frozen=True)
class Real:
    """A model, what is said of its layers here, and the task whose presets it gets.

    Attributes:
        build: makes it, on the meta device.
        total: all its parameters; 0 where no published number is known.
        shapes: of the layers that the presets name.
        lora: what methods adapt where no targets are named; `ia3` the same for IA3.
        forward: the last feed-forward layers, whose input IA3 scales.
        text: (width, width of keys, layers of a prefix) for methods of virtual tokens; None: they do not serve it.
        head: parameters of a classifier's head, which is trained in full.
    """

    build: Callable[[], nn.Module]
    total: int
    task: str
    task_type: str | None
    shapes: Shapes
    lora: tuple[str, ...]
    ia3: tuple[str, ...]
    forward: str | tuple[str, ...]
    text: tuple[int, int, int] | None = None
    head: int = 0


def made(kind: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**values))
            return model

    return build


def flan_t5(d: int, ff: int, heads: int, layers: int, total: int) -> Real:
    """As many layers in the encoder as in the decoder, whose layers have a second attention.

    The pages count the head too, which transformers ties to the embedding.
    """
    inner = heads * 64
    shapes = {name: [(d, inner)] * (3 * layers) for name in ("q", "k", "v")} | {"o": [(inner, d)] * (3 * layers)}
    shapes |= {"wi_0": [(d, ff)] * (2 * layers), "wi_1": [(d, ff)] * (2 * layers), "wo": [(ff, d)] * (2 * layers)}
    build = made(
        "T5ForConditionalGeneration", "T5Config", d_model=d, d_ff=ff, d_kv=64, num_heads=heads, num_layers=layers,
        num_decoder_layers=layers, vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    lora, ia3 = ("q", "v"), ("k", "v", "wo")
    return Real(build, total - 32128 * d, "seq2seq", "SEQ_2_SEQ_LM", shapes, lora, ia3, "wo", (d, inner, layers))


def llama(kind: str, d: int, ff: int, layers: int, grouped: int, total: int) -> Real:
    """Heads of 128; keys and values have `grouped` of them."""
    kv = 128 * grouped
    shapes = {"q_proj": [(d, d)], "o_proj": [(d, d)], "k_proj": [(d, kv)], "v_proj": [(d, kv)], "gate_proj": [(d, ff)]}
    shapes |= {"up_proj": [(d, ff)], "down_proj": [(ff, d)]}
    build = made(
        f"{kind}ForCausalLM", f"{kind}Config", hidden_size=d, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=d // 128, num_key_value_heads=grouped, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    every = {name: each * layers for name, each in shapes.items()}
    lora, ia3 = ("q_proj", "v_proj"), ("k_proj", "v_proj", "down_proj")
    return Real(build, total, "causal_lm", "CAUSAL_LM", every, lora, ia3, "down_proj", (d, kv, layers))


def unet(config: dict[str, Any], total: int, words: int, blocks: dict[int, int]) -> Real:
    """`blocks`: width -> transformer blocks of it. Each has attention to itself and to the words, and a GEGLU."""
    shapes: Shapes = {name: [] for name in ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")}
    for d, count in blocks.items():
        shapes["to_q"] += [(d, d), (d, d)] * count
        shapes["to_out.0"] += [(d, d), (d, d)] * count
        shapes["to_k"] += [(d, d), (words, d)] * count
        shapes["to_v"] += [(d, d), (words, d)] * count
        shapes["ff.net.2"] += [(4 * d, d)] * count
    lora, ia3 = ("to_q", "to_v"), ("to_k", "to_v", "ff.net.2")
    return Real(lambda: unet_of(config), total, "text_to_image", None, shapes, lora, ia3, "ff.net.2")


SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
BLIP_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 30524, "encoder_hidden_size": 1024, "max_position_embeddings": 512,
}  # fmt: skip
BLIP_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 16,
}  # fmt: skip
# The text decoder alone; attention to the picture reads 1024 values.
SEEN = [(768, 768), (1024, 768)] * 12
BLIP: Shapes = {
    "query": [(768, 768)] * 24, "key": SEEN, "value": SEEN,
    "output.dense": [(768, 768)] * 24 + [(3072, 768)] * 12,
}  # fmt: skip
BERT: Shapes = {
    **{name: [(768, 768)] * 12 for name in ("query", "key", "value")},
    "output.dense": [(768, 768)] * 12 + [(3072, 768)] * 12,
}
MODELS: dict[str, Real] = {
    "google/flan-t5-base": flan_t5(768, 2048, 12, 12, 247_577_856),
    "google/flan-t5-large": flan_t5(1024, 2816, 16, 24, 783_150_080),
    "google/flan-t5-xl": flan_t5(2048, 5120, 32, 24, 2_849_757_184),
    "meta-llama/Llama-2-7b-hf": llama("Llama", 4096, 11008, 32, 32, 6_738_415_616),
    "mistralai/Mistral-7B-v0.1": llama("Mistral", 4096, 14336, 32, 8, 7_241_732_096),
    "bert-base-uncased": Real(
        made("BertForSequenceClassification", "BertConfig", vocab_size=30522, hidden_size=768, intermediate_size=3072,
             num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512, num_labels=2),
        109_482_240 + 768 * 2 + 2, "classification", "SEQ_CLS", BERT, ("query", "value"),
        ("key", "value", "output.dense"), "output.dense", (768, 768, 12), 768 * 2 + 2,
    ),
    "Salesforce/blip-image-captioning-large": Real(
        made("BlipForConditionalGeneration", "BlipConfig", text_config=BLIP_TEXT, vision_config=BLIP_VISION),
        0, "captioning", None, BLIP, ("query", "value"), ("key", "value", "output.dense"), ("output.dense", "fc2"),
    ),
    "stable-diffusion-v1-5": unet({"cross_attention_dim": 768}, 859_520_964, 768, {320: 5, 640: 5, 1280: 6}),
    "stable-diffusion-xl-base-1.0": unet(SDXL, 2_567_463_684, 2048, {640: 10, 1280: 60}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    """Built once; every adapter is taken off again."""
    return {}


def base_of(bases: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in bases:
        bases[name] = MODELS[name].build()
    return bases[name]


def trainable(base: nn.Module, method: str, real: Real, fields: dict[str, Any]) -> int:
    """What the engine counts; the base is given back as it was."""
    config = ADAPTERS[method].config(**{"task_type": real.task_type, **fields})
    needs = [parameter.requires_grad for parameter in base.parameters()]
    model = get_peft_model(base, config)
    found, total = model.get_nb_trainable_parameters()
    model.unload()
    for parameter, need in zip(base.parameters(), needs, strict=True):
        parameter.requires_grad_(need)
    if method == "lora" and not real.head:
        assert total - found == sum(parameter.numel() for parameter in base.parameters())
    return found


# --- formulas ------------------------------------------------------------------------------------------------------


def halves(size: int, limit: int) -> tuple[int, int]:
    """LoKr's factors of a width: `limit` and the rest where it divides, else the divisor next below the root."""
    if limit > 0 and size % limit == 0:
        return limit, size // limit
    top = math.isqrt(size) if limit < 0 else min(limit, math.isqrt(size))
    small = max(number for number in range(1, top + 1) if size % number == 0)
    return small, size // small


def lokr(a: int, b: int, f: dict[str, Any]) -> int:
    (out_1, out_2), (in_1, in_2) = halves(b, f["decompose_factor"]), halves(a, f["decompose_factor"])
    r = f["r"]
    return out_1 * in_1 + (out_2 * in_2 if r >= max(out_2, in_2) / 2 else r * (out_2 + in_2))


def mora(a: int, b: int, f: dict[str, Any]) -> int:
    side = math.floor(math.sqrt((a + b) * f["r"]) + 0.5)
    return int(side - (side % 2 if f["mora_type"] == 6 else 0)) ** 2


# (inputs, outputs, the adapter's fields) -> parameters at one layer.
EACH: dict[str, Callable[[int, int, dict[str, Any]], int]] = {
    "lora": lambda a, b, f: f["r"] * (a + b),
    "delta_lora": lambda a, b, f: f["r"] * (a + b),
    "dora": lambda a, b, f: f["r"] * (a + b) + b,
    "lorafa": lambda a, b, f: f["r"] * b,
    "adalora": lambda a, b, f: f["init_r"] * (a + b + 1),
    "qalora": lambda a, b, f: f["r"] * (a // 32 + b),
    "vera": lambda a, b, f: f["r"] + b,
    "loha": lambda a, b, f: 2 * f["r"] * (a + b),
    "lokr": lokr,
    "mora": mora,
}


def at_layers(method: str, real: Real, base: nn.Module, fields: dict[str, Any]) -> int:
    usual = real.ia3 if method == "ia3" else real.lora
    if method == "adalora" and real.task == "seq2seq":
        # Its authors adapt every matrix of encoder-decoder models.
        usual = tuple(real.shapes)
    asked = fields.get("target_modules") or usual
    if asked == "all-linear":
        # By walking the base: every linear layer but the output embedding and a classifier's head.
        heads = ("lm_head", "cls.predictions.decoder", "classifier")
        layers = [
            (name, module.in_features, module.out_features)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith(heads)
        ]
    else:
        layers = [(name, a, b) for name in asked for a, b in real.shapes[name]]
    if method == "ia3":
        return sum(a if name.endswith(real.forward) else b for name, a, b in layers)
    return sum(EACH[method](a, b, fields) for _, a, b in layers)


def at_input(method: str, real: Real, f: dict[str, Any]) -> int:
    """Virtual tokens; PEFT's tables for encoder-decoder models hold them twice."""
    assert real.text is not None
    (d, kv, layers), n = real.text, f["num_virtual_tokens"]
    rows = n * (2 if real.task_type == "SEQ_2_SEQ_LM" else 1)
    h = f.get("encoder_hidden_size", 0)
    if method == "prompt_tuning":
        return rows * d
    if method == "prefix_tuning" and not f.get("prefix_projection"):
        return int(n * layers * 2 * kv)
    if method == "prefix_tuning":
        return int(n * kv + (kv + 1) * h + (h + 1) * layers * 2 * kv)
    if f.get("encoder_reparameterization_type") == "LSTM":
        # Two layers, both directions: four gates with two biases each.
        lstm = 2 * (4 * h * (d + h + 2)) + 2 * (4 * h * (2 * h + h + 2))
        return int(rows * d + lstm + (2 * h + 1) * 2 * h + (2 * h + 1) * d)
    return int(rows * d + (d + 1) * h + (h + 1) * h + (h + 1) * d)


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_are_the_models(name: str, bases: dict[str, nn.Module]) -> None:
    real, base = MODELS[name], base_of(bases, name)
    if real.total:
        assert sum(p.numel() for p in base.parameters()) == real.total
    for ending, shapes in real.shapes.items():
        found = [
            (module.in_features, module.out_features)
            for module_name, module in base.named_modules()
            if isinstance(module, nn.Linear) and module_name.endswith("." + ending)
        ]
        assert sorted(found) == sorted(shapes), ending


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_of_the_task(name: str, bases: dict[str, nn.Module]) -> None:
    real, base = MODELS[name], base_of(bases, name)
    recipes = presets.tasks()[real.task].presets
    assert len(recipes) >= 2
    for preset in recipes.values():
        fields = {key: value for key, value in preset.adapter.items() if key != "method"}
        expected = at_layers(str(preset.adapter["method"]), real, base, fields) + real.head
        assert trainable(base, str(preset.adapter["method"]), real, fields) == expected, preset.name


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_with_its_presets(name: str, method: str, bases: dict[str, nn.Module]) -> None:
    real, base = MODELS[name], base_of(bases, name)
    if ADAPTERS[method].prompt and real.text is None:
        return
    for which in ("conservative", "aggressive"):
        fields = dict(presets.methods()[method].presets[which])
        prompts = ADAPTERS[method].prompt is not None
        expected = at_input(method, real, fields) if prompts else at_layers(method, real, base, fields)
        assert trainable(base, method, real, fields) == expected + real.head, which


def test_counts_as_they_are_known() -> None:
    """The recipes' numbers written out, so that a formula that errs as the code does is seen."""
    sd, xl = MODELS["stable-diffusion-v1-5"].shapes, MODELS["stable-diffusion-xl-base-1.0"].shapes
    names = ("to_k", "to_q", "to_v", "to_out.0")
    assert sum(4 * (a + b) for name in names for a, b in sd[name]) == 797_184
    assert sum(4 * (a + b) for name in names for a, b in xl[name]) == 5_806_080
    seven = MODELS["meta-llama/Llama-2-7b-hf"].shapes
    assert sum(64 * (a + b) for shapes in seven.values() for a, b in shapes) == 159_907_840
    large = MODELS["google/flan-t5-large"].shapes
    assert sum(16 * (a + b) for name in ("q", "v") for a, b in large[name]) == 4_718_592
