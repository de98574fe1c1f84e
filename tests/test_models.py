"""Base models: the catalogue, what is refused and why, loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError, ModelError, UnsafeFileError
from engine.models import catalogue, fetch, folders, hub
from engine.paths import REPOSITORY
from tests.small_llama import build


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return build(tmp_path / "small")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A studio home of its own, and no way to the real hub."""
    monkeypatch.setenv("STUDIO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


# -- the catalogue ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalogue.BUILTIN)
def test_catalogue_counts_are_the_models_own(name: str) -> None:
    from engine.models.loading import meta_model

    record = catalogue.describe(name)
    assert sum(weight.numel() for weight in meta_model(name).parameters()) == record.parameters
    if record.bundled:
        on_disk = sum(file.stat().st_size for file in fetch.ensure(name).rglob("*") if file.is_file())
        assert on_disk == pytest.approx(record.size, rel=0.05)


def test_catalogue_default_and_toy() -> None:
    assert not catalogue.BUILTIN[catalogue.DEFAULT].toy
    assert catalogue.BUILTIN[catalogue.TOY].toy and catalogue.BUILTIN[catalogue.TOY].bundled


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ModelError, match="tiny-llama"):
        fetch.resolve("tiny-lama")


def test_listing_and_fetching_import_no_torch() -> None:
    code = (
        "import sys, engine.models, engine.models.fetch, engine.models.sources, engine.models.loading\n"
        "engine.models.resolve('tiny-llama')\n"
        "print([name for name in ('torch', 'transformers', 'gradio', 'huggingface_hub') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert answer.stdout.strip() == "[]", answer.stderr


# -- names and folders that are refused ------------------------------------------------------------------------------


ESCAPES = ["../models/x", "owner/../../etc", "/tmp/../etc", "a\\..\\b", "owner/na\x00me", "a\nb"]
NO_IDS = ["owner/name/more", "owner/", "/name/", "owner/na me", "-x/y", "owner/a--b", "owner/x.git"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_escape_are_refused(name: str) -> None:
    with pytest.raises(UnsafeFileError, match="control character"):
        fetch.resolve(name)


@pytest.mark.parametrize("name", NO_IDS)
def test_names_that_are_no_hub_id_are_refused_without_asking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "run", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError):
        fetch.resolve(name)


@pytest.mark.parametrize("name", ["", "   ", "x" * 2000])
def test_empty_and_endless_names(name: str) -> None:
    with pytest.raises(ModelError, match="empty or too long"):
        fetch.resolve(name)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        fetch.resolve(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_only(small: Path, pickle: str) -> None:
    (small / folders.WEIGHTS).rename(small / pickle)
    with pytest.raises(UnsafeFileError, match="safetensors only") as caught:
        fetch.resolve(str(small))
    assert pickle in caught.value.message and "save_pretrained" in caught.value.hint


def test_pickle_beside_safetensors_is_not_touched(small: Path) -> None:
    (small / "pytorch_model.bin").write_bytes(b"\x80\x04would run code")
    from engine.models.loading import load_causal_lm

    load_causal_lm(str(small))


def test_folder_without_config(small: Path) -> None:
    (small / folders.CONFIG).unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        fetch.resolve(str(small))


def test_adapter_folder_is_called_an_adapter(small: Path) -> None:
    (small / folders.CONFIG).rename(small / "adapter_config.json")
    with pytest.raises(ModelError, match="an adapter, not a base"):
        fetch.resolve(str(small))


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_broken_config(small: Path, text: str) -> None:
    (small / folders.CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"config\.json"):
        fetch.resolve(str(small))


def test_weights_cut_off(small: Path) -> None:
    with (small / folders.WEIGHTS).open("r+b") as file:
        file.truncate((small / folders.WEIGHTS).stat().st_size - 10)
    with pytest.raises(ModelError, match=r"damaged.*announces"):
        fetch.resolve(str(small))


def test_lfs_pointer_instead_of_weights(small: Path) -> None:
    (small / folders.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ModelError, match="LFS pointer"):
        fetch.resolve(str(small))


def test_index_that_leads_out_of_the_folder(small: Path) -> None:
    outside = small.parent / "outside.safetensors"
    (small / folders.WEIGHTS).rename(outside)
    (small / folders.INDEX).write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(UnsafeFileError, match="same folder"):
        fetch.resolve(str(small))


def test_missing_shard(small: Path) -> None:
    (small / folders.WEIGHTS).unlink()
    (small / folders.INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        fetch.resolve(str(small))


# -- loading ---------------------------------------------------------------------------------------------------------


def test_loads_what_was_saved(small: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from engine.models.loading import context_length, load_causal_lm, meta_model, uses_default_template

    model, tokenizer = load_causal_lm(str(small), precision="fp32", device="cpu")
    tokens = torch.tensor([[2, 3, 2]])
    expected = LlamaForCausalLM.from_pretrained(small).eval()(tokens).logits
    assert torch.equal(model(tokens).logits, expected)
    assert not model.training and context_length(model.config) == 64
    assert tokenizer.pad_token == "<end>" and model.config.pad_token_id == model.generation_config.pad_token_id == 1
    assert model.get_input_embeddings().num_embeddings == 16
    assert uses_default_template(tokenizer)
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert told == "user:\nhello\n\nassistant:\n"
    assert {p.device.type for p in meta_model(str(small)).parameters()} == {"meta"}


def test_precision_is_what_was_asked(small: Path) -> None:
    import torch

    from engine.models.loading import load_causal_lm

    assert load_causal_lm(str(small), precision="bf16", device="cpu")[0].dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="fp8"):
        load_causal_lm(str(small), precision="fp8")


@pytest.mark.parametrize(
    ("vendor", "flags", "likes"),
    [
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_auto_precision(vendor: str, flags: str, likes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from engine.models import loading

    source = tmp_path / "cpuinfo"
    source.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    assert loading.cpu_likes_bf16(source) is likes
    assert loading.cpu_likes_bf16(tmp_path / "absent") is False
    monkeypatch.setattr(loading, "cpu_likes_bf16", lambda: likes)
    assert loading.auto_precision("cpu") == ("bf16" if likes else "fp32")
    assert loading.dtype_of("auto", "cpu") is (torch.bfloat16 if likes else torch.float32)
    assert loading.auto_precision("meta") == "fp32"


def test_missing_weights_are_an_error_not_random_numbers(small: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engine.models.loading import load_causal_lm

    weights = load_file(small / folders.WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, small / folders.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights.*up_proj"):
        load_causal_lm(str(small))


def test_shapes_that_do_not_fit_the_config(small: Path) -> None:
    from engine.models.loading import load_causal_lm

    config = json.loads((small / folders.CONFIG).read_text())
    (small / folders.CONFIG).write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(str(small))


def test_no_tokenizer(small: Path) -> None:
    from engine.models.loading import load_causal_lm

    for path in small.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer of"):
        load_causal_lm(str(small))


def test_own_code_is_refused_but_a_known_type_with_auto_map_loads(small: Path) -> None:
    from engine.models.loading import load_causal_lm

    (small / "evil.py").write_text(f"open({str(small / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((small / folders.CONFIG).read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (small / folders.CONFIG).write_text(json.dumps(config))
    load_causal_lm(str(small))
    (small / folders.CONFIG).write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(UnsafeFileError, match="never runs a model's own code"):
        load_causal_lm(str(small))
    assert not (small / "ran").exists()


def test_sharded_weights_load(small: Path) -> None:
    from transformers import LlamaForCausalLM

    from engine.models.loading import load_causal_lm

    model = LlamaForCausalLM.from_pretrained(small)
    (small / folders.WEIGHTS).unlink()
    model.save_pretrained(small, max_shard_size="8KB")
    assert not (small / folders.WEIGHTS).exists() and (small / folders.INDEX).exists()
    loaded, _ = load_causal_lm(str(small), precision="fp32")
    assert all(a.equal(b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_bundled_toy_loads_and_ends_its_answers() -> None:
    from engine.models.loading import load_causal_lm, uses_default_template

    model, tokenizer = load_causal_lm("tiny-llama")
    assert not uses_default_template(tokenizer)
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**turn, max_new_tokens=60, do_sample=False)[0, turn["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id and len(tokenizer.decode(answer, skip_special_tokens=True)) > 3


def test_a_built_in_model_answers_to_its_name_on_the_hub() -> None:
    """An adapter carries the hub's name, so that PEFT finds its base, and here it means the built-in model."""
    from engine.models.catalogue import canonical, portable
    from engine.models.loading import load_config

    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert portable("smollm2-135m-instruct") == hub_id
    assert canonical(hub_id) == "smollm2-135m-instruct"
    assert portable("tiny-llama") == canonical("tiny-llama") == "tiny-llama"
    assert portable("owner/other") == canonical("owner/other") == "owner/other"
    assert load_config(hub_id).hidden_size == 576
