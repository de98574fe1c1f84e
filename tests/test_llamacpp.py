"""GGUF: a merged model and a LoRA alone, read back by other code than wrote them, against the model in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from small_adapters import lora, write
from small_llama import build
from torch import Tensor

from engine import IA3Config, LoraConfig, exporting, llamacpp
from engine.__main__ import main
from engine.errors import CheckpointError, ConfigError, TargetError
from engine.llamacpp import ConverterError
from engine.llamacpp.adapter import write_adapter
from engine.llamacpp.files import Names
from engine.llamacpp.model import write_model
from engine.llamacpp.vocabulary import CONTROL, NORMAL, UNUSED, vocabulary
from engine.models.loading import load_causal_lm, load_config, load_tokenizer
from engine.paths import REPOSITORY

TEXT = "What colour is grass? 12 apples and a pear."
# How far rounded weights move the logits of the toy, whose largest is about 15.
TOLERANCE = {"f32": 1e-4, "f16": 0.02, "bf16": 0.2, "q8_0": 0.6}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of every kind of projection, with ranks and scales of its own at some layers."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = lora(target_modules=targets, rank_pattern={"k_proj": 6}, alpha_pattern={"up_proj": 3}, use_rslora=True)
    return write(tmp_path_factory.mktemp("adapter") / "parrot", config)


@pytest.fixture(scope="module")
def merged(adapter: Path) -> Any:
    """The toy in float32 with the adapter in its weights, and its tokenizer."""
    from engine import PeftModel

    model, tokenizer = load_causal_lm("tiny-llama", precision="fp32")
    whole: Any = PeftModel.from_pretrained(model, adapter, "one")
    return whole.merge_and_unload(adapter_names=["one"]).eval(), tokenizer


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors as they lie in the file) by llama.cpp's own reader."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {it.name: it for it in reader.tensors}


def values(tensor: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def loaded(path: Path) -> Any:
    """The model of a file, by transformers' reader."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("precision", llamacpp.PRECISIONS)
def test_a_merged_model_answers_from_its_file_as_in_memory(merged: Any, tmp_path: Path, precision: str) -> None:
    model, tokenizer = merged
    shares: list[float] = []
    path = write_model(model, tokenizer, tmp_path / "model.gguf", precision, "Parrot", shares.append)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    there, here = logits(loaded(path), ids), logits(model, ids)
    plain = logits(load_causal_lm("tiny-llama", precision="fp32")[0], ids)
    assert (there - here).abs().max() < TOLERANCE[precision]
    # The adapter is in the file: without it the logits are elsewhere.
    assert (there - plain).abs().max() > 3 * TOLERANCE[precision]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert [place.name for place in tmp_path.iterdir()] == ["model.gguf"]
    kinds = {it.tensor_type.name for it in read(path)[1].values()}
    assert kinds == {"F32", precision.upper()}


def test_the_metadata_says_the_shape_and_the_tokenizer(merged: Any, tmp_path: Path) -> None:
    model, tokenizer = merged
    meta, tensors = read(write_model(model, tokenizer, tmp_path / "model.gguf", "q8_0", "Parrot"))
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Parrot",
        "general.file_type": 7,
        "llama.block_count": 4,
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 2048,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: meta.get(key) for key in wanted} == wanted
    assert meta["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert meta["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(2048))
    assert meta["tokenizer.ggml.token_type"][:7] == [CONTROL] * 6 + [NORMAL]
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    assert meta["tokenizer.ggml.merges"][:50] == [" ".join(pair) for pair in layout["model"]["merges"][:50]]
    # The embedding is the output matrix too; llama.cpp takes it where there is no other.
    assert "token_embd.weight" in tensors and "output.weight" not in tensors and len(tensors) == 38


def test_an_adapters_file_holds_what_merging_changes(adapter: Path, merged: Any, tmp_path: Path) -> None:
    """alpha / r B A of the file, in llama.cpp's order of rows, is the difference of the two models' files."""
    model, tokenizer = merged
    base, _ = load_causal_lm("tiny-llama", precision="fp32")
    _, before = read(write_model(base, tokenizer, tmp_path / "before.gguf", "f32"))
    _, after = read(write_model(model, tokenizer, tmp_path / "after.gguf", "f32"))
    meta, tensors = read(write_adapter(adapter, load_config("tiny-llama"), tmp_path / "lora.gguf", "Parrot"))
    assert (meta["general.type"], meta["adapter.type"], meta["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    assert meta["general.architecture"] == "llama" and len(tensors) == 2 * 7 * 4
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    changed = {name for name in after if np.abs(values(after[name]) - values(before[name])).max() > 1e-6}
    assert names == changed
    for name in names:
        a, b = values(tensors[f"{name}.lora_a"]), values(tensors[f"{name}.lora_b"])
        change = meta["adapter.lora.alpha"] / a.shape[0] * b @ a
        np.testing.assert_allclose(change, values(after[name]) - values(before[name]), atol=2e-6)


def test_rotated_rows_are_paired_as_llama_cpp_pairs_them() -> None:
    """Turning (x_2i, x_2i+1) of the new order gives what turning (x_i, x_i + width/2) of the old one gives."""
    config: Any = load_config("tiny-llama")
    width, heads = 32, 4
    x = torch.randn(heads * width, 1, dtype=torch.float64)
    angle = torch.rand(width // 2, 1, dtype=torch.float64)
    low, high = x.view(heads, 2, width // 2, 1).unbind(1)
    turned = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], 1)
    rows = Names(config).rows("model.layers.0.self_attn.k_proj", x).view(heads, width // 2, 2)
    even, odd = rows.unbind(2)
    ours = torch.stack([even * angle.T.cos() - odd * angle.T.sin(), odd * angle.T.cos() + even * angle.T.sin()], 2)
    again = Names(config).rows("model.layers.0.self_attn.k_proj", turned.reshape(-1, 1)).view_as(ours)
    torch.testing.assert_close(ours, again)
    assert Names(config).rows("model.layers.0.self_attn.v_proj", x) is x


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def test_biases_an_output_of_its_own_and_long_positions_are_written(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    model = llama(attention_bias=True, mlp_bias=True, rope_parameters=rope, tie_word_embeddings=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    meta, tensors = read(write_model(model, load_tokenizer("tiny-llama"), tmp_path / "model.gguf", "f32"))
    assert meta["llama.rope.freq_base"] == 5e5
    own = model.state_dict()
    np.testing.assert_allclose(values(tensors["output.weight"]), own["lm_head.weight"])
    np.testing.assert_allclose(values(tensors["blk.1.ffn_up.bias"]), own["model.layers.1.mlp.up_proj.bias"])
    bias = own["model.layers.1.self_attn.q_proj.bias"].view(4, 2, 8).transpose(1, 2).flatten()
    np.testing.assert_allclose(values(tensors["blk.1.attn_q.bias"]), bias)
    # Llama 3.1's rule, written out.
    factors = []
    for place in range(8):
        length = 2 * math.pi * 5e5 ** (place / 8)
        share = min(max((64 / length - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        factors.append(1 / ((1 - share) / 8.0 + share))
    np.testing.assert_allclose(values(tensors["rope_freqs.weight"]), factors, rtol=1e-5)
    assert min(factors) == 1.0 and max(factors) == 8.0

    linear = llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    meta, tensors = read(write_model(linear, load_tokenizer("tiny-llama"), tmp_path / "linear.gguf"))
    assert (meta["llama.rope.scaling.type"], meta["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert "rope_freqs.weight" not in tensors


def test_rows_that_do_not_divide_into_blocks_are_written_in_f16(tmp_path: Path) -> None:
    model = llama(hidden_size=48, intermediate_size=64, num_attention_heads=3, num_key_value_heads=3)
    _, tensors = read(write_model(model, load_tokenizer("tiny-llama"), tmp_path / "model.gguf", "q8_0"))
    kinds = {name: tensors[name].tensor_type.name for name in tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def cut_by(pre: str, **model: Any) -> Any:
    """The toy's tokenizer with another rule that cuts texts."""
    from tokenizers import Tokenizer

    tokenizer: Any = load_tokenizer("tiny-llama")
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    layout["pre_tokenizer"] = json.loads(pre)
    layout["model"].update(model)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(layout))
    return tokenizer


BYTES = '{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": %s}'
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_the_rule_that_cuts_texts_has_llama_cpps_name() -> None:
    assert vocabulary(cut_by(BYTES % "true"), 2048).pre == "gpt-2"
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    three = json.dumps({"type": "Sequence", "pretokenizers": [split, json.loads(BYTES % "false")]})
    assert vocabulary(cut_by(three, ignore_merges=True), 2048).pre == "llama-bpe"
    digits = '{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, %s]}'
    assert vocabulary(cut_by(digits % (BYTES % "true")), 2050).pre == "smollm"
    # Llama 3's rule over a vocabulary that is merged step by step is none of llama.cpp's.
    for pre, more in ((three, {}), (digits % (BYTES % "false"), {}), (BYTES % "true", {"ignore_merges": True})):
        with pytest.raises(ConfigError, match="cuts texts by"):
            vocabulary(cut_by(pre, **more), 2048)


def test_ids_without_a_token_are_filled_up_and_too_many_tokens_are_refused() -> None:
    tokenizer = load_tokenizer("tiny-llama")
    found = vocabulary(tokenizer, 2050)
    assert found.tokens[2048:] == ["[PAD2048]", "[PAD2049]"] and found.kinds[2048:] == [UNUSED] * 2
    with pytest.raises(ConfigError, match="2047, and the model's embedding 2000 rows"):
        vocabulary(tokenizer, 2000)


def sentencepiece(prepend: bool = True) -> Any:
    """A tokenizer as Llama 2's: a BPE over characters, bytes for what is unknown, every way to a token a merge."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["\u2581a", "an", "\u2581an", "nd", "\u2581and", "ap", "pl", "le", "ple", "\u2581ap", "\u2581apple"]
    singles = sorted(set("".join(pieces)) | set("bcdefghi"))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + place for place, piece in enumerate([*pieces, *singles])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    fast = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    before = [normalizers.Prepend("\u2581")] if prepend else []
    fast.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_sentencepiece_vocabulary_is_scored_in_the_order_of_its_merges() -> None:
    tokenizer = sentencepiece()
    found = vocabulary(tokenizer, 300)
    assert (found.model, found.pre, found.space_prefix, found.merges) == ("llama", "default", True, [])
    ids = tokenizer.get_vocab()
    ordered = [found.scores[ids[piece]] for piece in ("\u2581a", "an", "\u2581an", "nd", "\u2581and")]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) == 5
    assert found.kinds[:4] == [2, CONTROL, CONTROL, 6] and found.kinds[259] == NORMAL
    assert not vocabulary(sentencepiece(prepend=False), 300).space_prefix
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    del layout["model"]["merges"][2]
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(layout))
    with pytest.raises(ConfigError, match=r"as llama\.cpp would"):
        vocabulary(tokenizer, 300)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_families_and_other_heads_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

    tokenizer = load_tokenizer("tiny-llama")
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, n_positions=8))
    with pytest.raises(ConfigError, match=r"family 'gpt2'.*Supported: llama") as caught:
        write_model(other, tokenizer, tmp_path / "x.gguf")
    assert caught.value.code == "config"
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification; needed: LlamaForCausalLM"):
        write_model(LlamaForSequenceClassification(llama().config), tokenizer, tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match=r"hidden_act is 'gelu'.*\n.*'yarn'"):
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
        write_model(llama(hidden_act="gelu", rope_parameters=yarn), tokenizer, tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="WordLevel; needed: BPE"):
        write_model(*load_causal_lm(str(build(tmp_path / "words")), precision="fp32"), tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="The precision is 'q4_0'; needed: one of f16"):
        write_model(llama(), tokenizer, tmp_path / "x.gguf", "q4_0")
    with pytest.raises(CheckpointError, match=r"does not end in \.gguf"):
        write_model(llama(), tokenizer, tmp_path / "x.bin")
    assert not list(tmp_path.glob("x.*")) and not list(tmp_path.glob(".x*"))


def test_numbers_that_the_precision_cannot_hold_leave_the_former_file(tmp_path: Path) -> None:
    model, tokenizer, path = llama(), load_tokenizer("tiny-llama"), tmp_path / "model.gguf"
    path.write_text("former")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"blk\.1\.ffn_up\.weight holds 1e\+05, and float16 ends at 65504"):
        write_model(model, tokenizer, path, "f16")
    assert [place.name for place in tmp_path.iterdir()] == ["model.gguf"] and path.read_text() == "former"
    write_model(model, tokenizer, path, "bf16")
    assert values(read(path)[1]["blk.1.ffn_up.weight"])[0, 0] == pytest.approx(1e5, rel=0.01)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ConfigError, match=r"output_norm\.weight holds numbers that are not finite"):
        write_model(model, tokenizer, path, "f32")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(use_dora=True), "dora adapter, and llama.cpp has LoRA alone"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3 adapter"),
        (lora(bias="lora_only"), "trains biases"),
        (lora(modules_to_save=["norm"]), "trains norm in full"),
        (lora(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.*linear layers' A and B alone"),
    ],
)
def test_adapters_that_llama_cpp_has_no_place_for_are_refused(tmp_path: Path, config: Any, words: str) -> None:
    folder = write(tmp_path / "adapter", config)
    with pytest.raises(ConfigError, match=f"(?s){words}.*Merge it into its base"):
        write_adapter(folder, load_config("tiny-llama"), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_an_adapter_of_another_family_or_of_a_shared_head_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", lora())
    with pytest.raises(ConfigError, match="family 't5'"):
        write_adapter(folder, load_config("tiny-t5"), tmp_path / "x.gguf")
    head = write(tmp_path / "head", lora(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="lm_head, which is the embedding of this base"):
        write_adapter(head, load_config("tiny-llama"), tmp_path / "x.gguf")
    with pytest.raises(TargetError, match="shared by"):
        exporting.export("tiny-llama", head, "gguf", tmp_path / "x.gguf")


def test_pissa_leaves_as_the_plain_lora_that_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", lora(init_lora_weights="pissa"))
    _, tensors = read(write_adapter(folder, load_config("tiny-llama"), tmp_path / "x.gguf"))
    assert tuple(tensors["blk.0.attn_q.weight.lora_a"].data.shape) == (8, 256)


def test_without_the_converter_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llamacpp.installed()
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_package")
    with pytest.raises(ConverterError, match=r"not installed.*pip install gguf"):
        exporting.write_gguf_adapter("tiny-llama", tmp_path, tmp_path / "x.gguf", "")
    asked = ["export", "--model", "tiny-llama", "--form", "gguf", "--out", str(tmp_path / "x.gguf"), "--json"]
    assert main(asked) == 1
    event = json.loads(capsys.readouterr().out)
    assert event["code"] == "converter" and event["hint"] == f"Install it: {llamacpp.INSTALL}"
    assert llamacpp.INSTALL.removeprefix("pip install ") in (REPOSITORY / "requirements.txt").read_text().split()


def test_what_is_known_of_a_base_is_read_where_it_lies(tmp_path: Path) -> None:
    assert llamacpp.base_config("tiny-llama")["model_type"] == "llama"
    assert llamacpp.base_config("HuggingFaceTB/SmolLM2-135M-Instruct")["model_type"] == "llama"
    assert llamacpp.base_config("tiny-t5")["model_type"] == "t5"
    assert llamacpp.base_config(str(build(tmp_path / "own")))["model_type"] == "llama"
    assert llamacpp.base_config("nobody/nothing-at-all") == {} == llamacpp.base_config("../x")


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_each_form(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["export", "--model", "tiny-llama", "--adapter", str(adapter)]
    assert main([*asked, "--form", "merged", "--out", str(tmp_path / "merged")]) == 0
    assert main([*asked, "--form", "gguf", "--precision", "f32", "--out", str(tmp_path / "m.gguf"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines[-1] == {
        "type": "done",
        "path": str(tmp_path / "m.gguf"),
        "bytes": (tmp_path / "m.gguf").stat().st_size,
    }
    assert {"type": "status", "message": "Writing the file", "fraction": 1.0} in lines
    assert main([*asked, "--form", "gguf-adapter", "--out", str(tmp_path / "a.gguf")]) == 0
    # A model that is a folder already, as full fine-tuning leaves it, needs no adapter.
    again = ["export", "--model", str(tmp_path / "merged"), "--form", "gguf", "--precision", "f32"]
    assert main([*again, "--out", str(tmp_path / "again.gguf")]) == 0
    (_, one), (_, two) = read(tmp_path / "m.gguf"), read(tmp_path / "again.gguf")
    assert read(tmp_path / "m.gguf")[0]["general.name"] == "parrot"
    for name in one:
        # The folder's weights were rounded to the precision that the base is opened in.
        np.testing.assert_allclose(values(one[name]), values(two[name]), rtol=2**-7, atol=1e-6)
    assert main([*asked, "--form", "kohya", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert main(["export", "--model", "tiny-llama", "--form", "merged", "--out", str(tmp_path / "y")]) == 1
    assert "The form merged is an adapter's" in capsys.readouterr().err


def test_pictures_of_words_become_no_gguf(tmp_path: Path) -> None:
    folder = write(tmp_path / "style", LoraConfig(r=2, target_modules=["to_q"]), "tiny-sd")
    with pytest.raises(ConfigError, match="models that write texts"):
        exporting.export("tiny-sd", folder, "gguf", tmp_path / "x.gguf")
    place = exporting.export("tiny-sd", folder, "kohya", tmp_path / "x.safetensors")
    assert place.stat().st_size > 1000
