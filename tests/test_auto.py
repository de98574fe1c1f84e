"""An adapter with its base in one call, for the kinds of model that `tests/test_api.py` does not load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertForTokenClassification, BlipConfig, BlipForConditionalGeneration

from engine import (
    AutoPeftModelForTokenClassification,
    AutoPeftModelForVision2Seq,
    LoraConfig,
    PeftModelForTokenClassification,
    get_peft_model,
)
from tests import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_pictures_to_text(tmp_path: Path) -> None:
    """BLIP: the text decoder alone is adapted, the picture's encoder stays frozen."""
    torch.manual_seed(1)
    text = {**SIZES, "vocab_size": 64, "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"sep_token_id": 2, "pad_token_id": 0, "hidden_dropout_prob": 0.0}
    config = BlipConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 16})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    base = BlipForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    model = tiny.shake(get_peft_model(base, LoraConfig(r=4)))
    assert all(name.startswith("text_decoder.") for name in model.adapter_parameters())
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForVision2Seq.from_pretrained(tmp_path / "adapter")
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    values = {"pixel_values": picture, "input_ids": tiny.ids(1)}
    with torch.no_grad():
        assert torch.equal(again(**values).logits, model(**values).logits)
        with model.disable_adapter():
            assert not torch.equal(again(**values).logits, model(**values).logits)
    made = again.generate(pixel_values=picture, max_new_tokens=4, num_beams=5)
    assert torch.equal(made, model.generate(pixel_values=picture, max_new_tokens=4, num_beams=5))


def test_token_classification(tmp_path: Path) -> None:
    config = tiny.bert().config
    BertForTokenClassification(config).save_pretrained(tmp_path / "base")
    base = BertForTokenClassification.from_pretrained(tmp_path / "base").eval()
    model = tiny.shake(get_peft_model(base, LoraConfig(task_type="TOKEN_CLS")))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter")
    assert type(again) is PeftModelForTokenClassification
    assert torch.equal(again(tiny.ids()).logits, model(tiny.ids()).logits)
