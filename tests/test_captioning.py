"""Captions of pictures: options, rows and loss, the toy, a run of the command line, answers, and B5's count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration

from engine import LoraConfig
from engine.blending import attach_blend
from engine.captioning import Captioner, caption
from engine.combinations import Blend
from engine.data import load
from engine.errors import CheckpointError, ConfigError, DataError, ModelError, PromptError
from engine.generation import Sampling
from engine.inspection import count
from engine.model import PeftModel, get_peft_model
from engine.models.captioners import load_captioner
from engine.models.catalogue import BUILTIN
from engine.paths import REPOSITORY
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.tasks.captioning import IGNORED, STYLES, TASK, Captioning
from engine.train.job import JobSpec, TrainingSpec
from studio import presets
from studio.jobs import Jobs

FOLDER = REPOSITORY / "engine" / "models" / "builtin" / "tiny-blip"
SAMPLE = REPOSITORY / "examples" / "emoji_grounds.zip"
JOB = REPOSITORY / "examples" / "captions_tiny.yaml"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(*load_captioner("tiny-blip", precision="fp32"))


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    return load(SAMPLE).examples


def quiet(phase: str, fraction: float | None, message: str) -> None:
    pass


def test_it_is_small_and_names_what_it_sees(loaded: Loaded, examples: list[dict[str, Any]]) -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 1024 * 1024
    assert {path.suffix for path in files} == {".md", ".json", ".safetensors"}
    assert loaded.model.num_parameters() == BUILTIN["tiny-blip"].parameters  # type: ignore[operator]
    said = [TASK.sample(loaded.model, loaded, example["image"]) for example in examples[:40]]
    named = [example["text"].partition(" on a")[0] for example in examples[:40]]
    # It may put the ground first, which the sample's captions never do.
    right = [a.endswith(b) for a, b in zip(said, named, strict=True)]
    assert sum(right) >= 26, list(zip(said, named, strict=True))


def engine(*arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "engine", *arguments, "--json"]
    answer = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def exact(job: Path, out: Path) -> dict[str, float]:
    """Who -> share of held-out captions that come out word for word."""
    engine("train", str(job), "--out", str(out))
    found = engine("eval", str(job), "--adapter", str(out / "adapter"))
    return {event["who"]: event["value"] for event in found if event.get("metric") == "exact_match"}


def test_an_adapter_says_more_than_the_base_and_one_that_does_not_learn_fails(tmp_path: Path) -> None:
    found = exact(JOB, tmp_path / "run")
    assert found["base"] < 0.05 and found["adapter"] > found["base"] + 0.25, found
    picture = tmp_path / "apple.png"
    Image.new("RGB", (80, 80), (52, 103, 205)).save(picture)
    said = engine(
        "generate", "--model", "tiny-blip", "--adapter", str(tmp_path / "run" / "adapter"), "--image", str(picture)
    )
    assert [row["who"] for row in said] == ["base", "adapter"] and "background" in said[1]["text"]
    plain = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    plain["training"] |= {"learning_rate": 1e-12, "max_steps": 2}
    still = tmp_path / "still.yaml"
    still.write_text(yaml.safe_dump(plain), encoding="utf-8")
    assert exact(still, tmp_path / "still")["adapter"] < 0.05


def test_rows_are_what_blip_reads(loaded: Loaded, examples: list[dict[str, Any]]) -> None:
    task = Captioning(style="detailed")
    encoded = task.encode(examples[:6], loaded, TrainingSpec(), quiet)
    row = encoded.rows[0]
    tokenizer, config = loaded.processor.tokenizer, loaded.model.config
    assert row.ids[0] == config.text_config.bos_token_id and row.ids[-1] == config.text_config.sep_token_id
    assert tokenizer.decode(row.ids[: row.given], skip_special_tokens=True) == STYLES["detailed"]
    assert tokenizer.decode(row.ids[row.given : -1]) == examples[0]["text"]
    batch = task.collator(loaded)(encoded.rows)
    wanted = loaded.processor.image_processor(
        [Image.open(_member(example["image"])).convert("RGB") for example in examples[:6]], return_tensors="pt"
    )["pixel_values"]
    # The bytes that are kept round once more than the processor does.
    assert (batch["pixel_values"] - wanted).abs().max() <= 1 / 127
    assert (batch["labels"][0, : row.given] == IGNORED).all() and batch["labels"][0, row.given] == row.ids[row.given]


def _member(reference: str) -> Any:
    import io
    import zipfile

    archive, _, name = reference.partition("!")
    with zipfile.ZipFile(archive) as opened:
        return io.BytesIO(opened.read(name))


def test_the_loss_is_the_models_own(loaded: Loaded, examples: list[dict[str, Any]]) -> None:
    rows = TASK.encode(examples[:8], loaded, TrainingSpec(), quiet).rows
    batch = TASK.collator(loaded)(rows)
    with torch.no_grad():
        ours = TASK.loss(loaded.model, batch)
        theirs = loaded.model(**batch).loss
    assert ours.count == TASK.targets(batch)
    assert float(ours.total) / ours.count == pytest.approx(float(theirs), rel=1e-5)


def test_captions_that_are_too_long_are_cut_and_empty_ones_left_out(
    loaded: Loaded, examples: list[dict[str, Any]]
) -> None:
    rows = [{**examples[0], "text": "red " * 90}, {**examples[1], "text": " "}]
    encoded = TASK.encode(rows, loaded, TrainingSpec(max_length=16), quiet)
    assert len(encoded.rows) == 1 and len(encoded.rows[0].ids) == 16
    assert "longer than 16" in encoded.notes[0] and "1 pictures were left out" in encoded.notes[1]
    with pytest.raises(DataError, match="has a caption"):
        TASK.encode(rows[1:], loaded, TrainingSpec(), quiet)


def test_only_the_decoder_gets_an_adapter_and_the_encoder_rests(examples: list[dict[str, Any]]) -> None:
    model, _ = load_captioner("tiny-blip", precision="fp32")
    peft_model = get_peft_model(model, LoraConfig(r=2))
    names = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert names and all("text_decoder" in name for name in names)
    spec = JobSpec.from_dict(
        {"task": "captioning", "model": "tiny-blip", "data": {"path": str(SAMPLE)}, "full": True, "adapter": {}}
    )
    full = TASK.load(spec, torch.device("cpu"), quiet)
    trained = {name.split(".")[0] for name, p in full.model.named_parameters() if p.requires_grad}
    assert trained == {"text_decoder"}


def test_the_real_ones_count() -> None:
    """B5 on the exact shape of Salesforce/blip-image-captioning-large, on the meta device."""
    config = BlipConfig(
        vision_config={
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
            "image_size": 384, "patch_size": 16,
        },
        text_config={"vocab_size": 30524, "encoder_hidden_size": 1024},
    )  # fmt: skip
    recipes = presets.tasks()["captioning"].presets
    for preset in (recipes[name] for name in ("quick-look", "plain", "detailed", "artistic")):
        with torch.device("meta"):
            model = BlipForConditionalGeneration(config)
        fields = {key: value for key, value in preset.adapter.items() if key != "method"}
        trained, total = get_peft_model(model, LoraConfig(**fields)).get_nb_trainable_parameters()
        # Two attentions in each of 12 layers: 4 x 16 x 1,536, of which one value reads the encoder's 1,024.
        assert trained == 12 * (3 * 16 * 1536 + 16 * (1024 + 768)) == 1_228_800
        assert total == trained + 446_290_492  # the head tied to the embeddings
    assert count("tiny-blip", {"method": "lora", "r": 16}, "captioning")["targets"] == {"query": 8, "value": 8}


def test_answers_of_a_base_and_adapters(tmp_path: Path, loaded: Loaded, examples: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    for name, style in (("one", "plain"), ("two", "artistic")):
        model = get_peft_model(load_captioner("tiny-blip", precision="fp32")[0], LoraConfig(r=2))
        with torch.no_grad():
            for parameter in model.adapter_parameters("default").values():
                parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / name)
        Captioning(style=style).save(tmp_path / name)
    captioner, sampling = Captioner("tiny-blip", "fp32"), Sampling(max_new_tokens=12, temperature=0, beams=2)
    where = examples[0]["image"]
    base = caption(loaded.model, loaded.processor, _pixels(loaded, where), "", sampling)[0]
    assert [piece.text for piece in captioner.stream([{"image": where}], [None], sampling)] == [base]
    captioner.attach("one", tmp_path / "one")
    captioner.attach("two", tmp_path / "two")
    texts = [piece.text for piece in captioner.stream([{"image": where}], [None, "one", "two"], sampling)]
    alone = PeftModel.from_pretrained(load_captioner("tiny-blip", precision="fp32")[0], tmp_path / "two")
    assert texts[0] == base and texts[1] != base
    assert texts[2] == caption(alone, loaded.processor, _pixels(loaded, where), STYLES["artistic"], sampling)[0]
    rows = [{"two": 1.0, "one": 0.0}, {"one": 0.6, "two": 0.6}, "both"]
    attach_blend(captioner, Blend({"one": 0.6, "two": 0.6}, "cat"), "both")
    mixed = [piece.text for piece in captioner.stream([{"image": where}], rows, sampling)]
    assert mixed[0] == texts[2] and mixed[1] == mixed[2] and mixed[1] not in texts
    for name in ("one", "two", "both"):
        captioner.detach(name)
    assert [piece.text for piece in captioner.stream([{"image": where}], [None], sampling)] == [base]
    with pytest.raises(PromptError, match="no picture"):
        next(captioner.stream([{"content": "hello"}], [None], sampling))
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        next(captioner.stream([{"image": where}], ["one"], sampling))


def _pixels(loaded: Loaded, where: str) -> torch.Tensor:
    made: torch.Tensor = loaded.processor.image_processor(
        Image.open(_member(where)).convert("RGB"), return_tensors="pt"
    )["pixel_values"]
    return made


def test_a_caption_ends_where_the_decoders_positions_do(
    loaded: Loaded, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An end token that never comes.
    monkeypatch.setattr(loaded.model.config.text_config, "sep_token_id", 1)
    endless = Sampling(max_new_tokens=500, temperature=0, beams=1)
    text, _ = caption(loaded.model, loaded.processor, _pixels(loaded, examples[0]["image"]), "a", endless)
    assert text


def test_options_styles_and_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="style is 'loud'"):
        get_task("captioning", {"style": "loud"})
    with pytest.raises(ConfigError, match="beams is 0"):
        get_task("captioning", {"beams": 0})
    with pytest.raises(ModelError, match="is no BLIP"):
        load_captioner("tiny-llama")
    Captioning(style="artistic").save(tmp_path)
    assert TASK.restored(tmp_path).prefix == STYLES["artistic"]
    (tmp_path / "caption.json").write_text('{"style": "loud"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        TASK.restored(tmp_path)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns(tmp_path: Path, quantization: str, capsys: pytest.CaptureFixture[str]) -> None:
    from engine.__main__ import main

    plain = yaml.safe_load(JOB.read_text(encoding="utf-8"))
    losses = {}
    for rate in (0.005, 1e-12):
        plain |= {"quantization": quantization, "data": {**plain["data"], "path": str(SAMPLE)}}
        plain["training"] |= {"learning_rate": rate, "max_steps": 15, "eval_every": 100}
        job = tmp_path / f"{rate}.yaml"
        job.write_text(yaml.safe_dump(plain), encoding="utf-8")
        assert main(["train", str(job), "--out", str(tmp_path / str(rate)), "--json"]) == 0
        last = [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]
        losses[rate] = last["first_eval_loss"] - last["eval_loss"]
    assert losses[0.005] > 0.5 and abs(losses[1e-12]) < 0.01, losses


def test_the_studio_takes_no_paths_to_pictures_from_a_request(tmp_path: Path) -> None:
    spec = JobSpec.from_dict(
        {
            "task": "captioning",
            "model": "tiny-blip",
            "data": {"path": str(SAMPLE)},
            "training": {"sample_prompts": ["/etc/secret.png"]},
            "adapter": {"method": "lora"},
        }
    )
    jobs = Jobs.__new__(Jobs)
    jobs.home = tmp_path
    with pytest.raises(ConfigError, match="takes no sample_prompts"):
        jobs.submit(spec)
