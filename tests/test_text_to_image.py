"""Pictures from words: rows, buckets, losses, DreamBooth, runs of the command line, and what plain diffusers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from engine import LoraConfig
from engine.__main__ import main
from engine.errors import ConfigError, DataError, ModelError, PromptError, UnsafeFileError
from engine.formats import write_kohya
from engine.generation import Sampling
from engine.model import PeftModel, get_peft_model
from engine.models import folders
from engine.models.hub import choose_files
from engine.models.pipelines import load_pipeline, unet_of
from engine.painting import Painter, paint
from engine.tasks import get_task
from engine.tasks.base import Loaded
from engine.tasks.text_to_image import LOOKS, TASK, TextToImage, bucket, cropped
from engine.train.events import Recorder
from engine.train.job import JobSpec, TrainingSpec
from engine.train.worker import run
from studio import presets
from tests import diffusion

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220)}
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
SD15 = {"cross_attention_dim": 768}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusion.save_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of three colours, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {name} square")
    return folder


def quiet(phase: str, fraction: float | None, message: str) -> None:
    pass


class Never:
    def poll(self) -> str | None:
        return None


def job(base: Path, pictures: Path, **more: Any) -> dict[str, Any]:
    training = {"max_steps": 40, "batch_size": 8, "learning_rate": 0.02, "eval_every": 100, **more.pop("training", {})}
    return {
        "task": "text_to_image",
        "model": str(base),
        "data": {"path": str(pictures), "eval_split": 0.25},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": TARGETS},
        "training": training,
        **more,
    }


def trained(spec: dict[str, Any], out: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The events of a run from the command line."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.json"
    path.write_text(json.dumps(spec))
    assert main(["train", str(path), "--out", str(out / "run"), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def fall(events: list[dict[str, Any]]) -> float:
    return float(events[-1]["first_eval_loss"] - events[-1]["eval_loss"])


def encoded(task: TextToImage, pipeline: Any, *examples: tuple[Path, str]) -> tuple[Loaded, list[Any]]:
    loaded = Loaded(pipeline.unet, pipeline)
    rows = [{"image": str(path), "text": text} for path, text in examples]
    return loaded, task.encode(rows, loaded, TrainingSpec(), quiet).rows


def array(picture: Image.Image) -> Any:
    return np.asarray(picture).astype(int)


def test_an_adapter_learns_and_plain_diffusers_draws_the_same_with_it(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = job(base, pictures, training={"sample_prompts": ["a red square"], "eval_every": 20})
    events = trained(spec, tmp_path, capsys)
    assert fall(events) > 0.1, events[-1]
    still = trained(job(base, pictures, training={"learning_rate": 1e-12}), tmp_path / "still", capsys)
    assert abs(fall(still)) < 0.001
    samples = [event for event in events if event["type"] == "sample"]
    assert [event["step"] for event in samples] == [0, 20, 40] and all(
        Path(event["file"]).is_file() for event in samples
    )
    assert np.abs(array(Image.open(samples[0]["file"])) - array(Image.open(samples[-1]["file"]))).max() > 8

    folder = tmp_path / "run" / "adapter"
    painter, few = Painter(str(base), "fp32"), Sampling(steps=4, guidance=3)
    painter.attach("one", folder)
    plain, ours = (piece.picture for piece in painter.stream([{"content": "a red square"}], [None, "one"], few))
    assert np.abs(array(plain) - array(ours)).max() > 8, "the adapter must be seen"
    theirs = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    theirs.load_lora_weights(folder)
    theirs.scheduler = _solver(theirs)
    theirs.set_progress_bar_config(disable=True)
    made = theirs("a red square", num_inference_steps=4, guidance_scale=3, generator=torch.Generator().manual_seed(0))
    assert np.abs(array(made.images[0]) - array(ours)).max() <= 1

    kohya = write_kohya({"unet": painter.model}, tmp_path / "kohya.safetensors", "one")
    again = Painter(str(base), "fp32")
    again.attach("file", kohya)
    third = next(iter(again.stream([{"content": "a red square"}], ["file"], few))).picture
    assert np.abs(array(third) - array(ours)).max() <= 1
    painter.detach("one")
    alone = next(iter(painter.stream([{"content": "a red square"}], [None], few))).picture
    assert np.abs(array(alone) - array(plain)).max() == 0
    with pytest.raises(ConfigError, match="no adapter 'one'"):
        next(painter.stream([{"content": "a"}], ["one"], Sampling()))
    with pytest.raises(PromptError):
        next(painter.stream([{"content": " "}], [None], Sampling()))


def _solver(pipe: Any) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def test_scores_rows_and_a_contact_sheet(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = job(base, pictures, options={"steps": 2})
    trained(spec, tmp_path, capsys)
    arguments = [
        "--adapter",
        str(tmp_path / "run" / "adapter"),
        "--rows",
        "2",
        "--out",
        str(tmp_path / "seen"),
        "--json",
    ]
    assert main(["eval", str(tmp_path / "job.json"), *arguments]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = {event["who"]: event["value"] for event in events if event["type"] == "score"}
    assert scores["adapter"] < scores["base"] - 0.1
    rows = [event for event in events if event["type"] == "row"]
    assert len(rows) == 2 and all(Image.open(row[who]).size == (16, 16) for row in rows for who in ("base", "adapter"))
    assert Image.open(events[-1]["file"]).width == 4 * 168 + 8
    out = tmp_path / "drawn"
    drawing = ["generate", "--model", str(base), "--prompt", "a red square"]
    assert main([*drawing, "--steps", "2", "--out", str(out), "--json"]) == 0
    assert Image.open(out / "base.png").size == (16, 16)
    assert main(drawing) == 1
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantised_unet_learns(
    base: Path, pictures: Path, tmp_path: Path, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import bnb

    packed = load_pipeline(str(base), quantization=quantization, precision="fp32").unet
    assert sum(1 for _ in bnb.packed_layers(packed)) >= 8
    events = trained(job(base, pictures, quantization=quantization), tmp_path, capsys)
    assert fall(events) > 0.1


def test_full_fine_tuning_writes_a_pipeline(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = job(base, pictures, full=True, training={"learning_rate": 0.003})
    spec["adapter"] = {}
    events = trained(spec, tmp_path, capsys)
    assert fall(events) > 0.1
    folder = tmp_path / "run" / "model"
    made = StableDiffusionPipeline.from_pretrained(folder)
    own = load_pipeline(str(folder), precision="fp32").unet.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in made.unet.state_dict().items())
    still = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(own[name], value) for name, value in still.items())


def test_xl_has_two_encoders_and_sizes(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = diffusion.save_pipeline(tmp_path / "xl", xl=True)
    events = trained(job(base, pictures, options={"word_dropout": 0.2}), tmp_path, capsys)
    assert fall(events) > 0.05
    pipeline = load_pipeline(str(base), precision="fp32")
    rows = TASK.encode(
        [{"image": str(pictures / "00.png"), "text": "a"}], Loaded(pipeline.unet, pipeline), TrainingSpec(), quiet
    ).rows
    assert rows[0].sizes is not None and rows[0].sizes.tolist() == [16, 16, 0, 0, 16, 16]
    theirs = StableDiffusionXLPipeline.from_pretrained(base)
    words, _, pooled, _ = theirs.encode_prompt("a red square", do_classifier_free_guidance=False)
    own, own_pooled = pipeline.embed(["a red square"])
    assert torch.allclose(own, words, atol=1e-6) and torch.allclose(own_pooled, pooled, atol=1e-6)  # type: ignore[arg-type]


def test_a_picture_in_bf16_is_that_in_fp32_to_rounding(base: Path) -> None:
    half, full = (paint(load_pipeline(str(base), precision=p), "a red square", steps=2)[0] for p in ("bf16", "fp32"))
    assert np.abs(array(half) - array(full)).mean() < 4


def test_text_is_embedded_as_diffusers_does(base: Path) -> None:
    pipeline = load_pipeline(str(base), precision="fp32")
    theirs = StableDiffusionPipeline.from_pretrained(base)
    words, _ = theirs.encode_prompt("a red square", "cpu", 1, False)
    assert torch.allclose(pipeline.embed(["a red square"])[0], words, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_by_its_formula(pictures: Path, tmp_path: Path, kind: str, offset: float) -> None:
    base = diffusion.save_pipeline(tmp_path / kind, prediction_type=kind)
    pipeline = load_pipeline(str(base), precision="fp32")
    task, loaded = TextToImage(snr_gamma=5.0, noise_offset=offset), Loaded(pipeline.unet, pipeline)
    rows = task.encode(
        [{"image": str(pictures / f"0{n}.png"), "text": "a b"} for n in range(3)], loaded, TrainingSpec(), quiet
    ).rows
    batch = task.collator(loaded)(rows)
    pipeline.unet.train()
    torch.manual_seed(7)
    found = task.loss(pipeline.unet, batch)
    torch.manual_seed(7)
    noise, when = torch.randn(3, 4, 8, 8), torch.randint(0, 1000, (3,))
    if offset:
        # One number for each row and channel, N(0, 1), which all of its places share.
        noise = noise + offset * torch.randn(3, 4)[:, :, None, None].expand(3, 4, 8, 8)
    kept = pipeline.scheduler.alphas_cumprod[when].view(-1, 1, 1, 1)
    clean = batch["latents.0"]
    guess = pipeline.unet(kept.sqrt() * clean + (1 - kept).sqrt() * noise, when, batch["words.0"]).sample
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
    snr = (kept / (1 - kept)).flatten()
    weight = {
        "epsilon": snr.clamp(max=5) / snr,
        "sample": snr.clamp(max=5),
        "v_prediction": snr.clamp(max=5) / (snr + 1),
    }[kind]
    expected = ((guess - wanted).square().mean(dim=(1, 2, 3)) * weight).sum()
    assert float(found.total) == pytest.approx(float(expected), rel=1e-4) and found.count == 3


def test_an_evaluation_is_the_same_each_time_and_at_every_noise_level(base: Path, pictures: Path) -> None:
    pipeline = load_pipeline(str(base), precision="fp32")
    loaded = Loaded(pipeline.unet, pipeline)
    rows = TASK.encode(
        [{"image": str(pictures / f"0{n}.png"), "text": "a"} for n in range(4)], loaded, TrainingSpec(), quiet
    ).rows
    collate = TASK.collator(loaded)
    with torch.no_grad():
        once = TASK.loss(pipeline.unet, collate(rows))
        torch.manual_seed(99)
        again = TASK.loss(pipeline.unet, collate(rows))
        parts = [TASK.loss(pipeline.unet, collate([row])) for row in rows]
    assert float(once.total) == float(again.total) and once.count == 4 * LOOKS
    assert sum(float(part.total) for part in parts) == pytest.approx(float(once.total), rel=1e-4)
    seen = [int(TASK._noise(rows[0].latents[None], torch.tensor([3]), 1000, look)[1]) for look in range(LOOKS)]
    assert [when // 250 for when in seen] == [0, 1, 2, 3]


def test_rows_of_different_shapes_in_one_batch(base: Path, tmp_path: Path) -> None:
    for name, size in (("wide", (64, 32)), ("tall", (20, 60)), ("square", (30, 30))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    pipeline = load_pipeline(str(base), precision="fp32")
    loaded = Loaded(pipeline.unet, pipeline)
    examples = [{"image": str(tmp_path / f"{name}.png"), "text": name} for name in ("wide", "tall", "square")]
    rows = TASK.encode(examples, loaded, TrainingSpec(), quiet).rows
    shapes = [tuple(row.latents.shape[1:]) for row in rows]
    assert shapes[0][1] > shapes[0][0] and shapes[1][0] > shapes[1][1] and shapes[2] == (8, 8)
    batch = TASK.collator(loaded)(rows)
    with torch.no_grad():
        assert TASK.loss(pipeline.unet, batch).count == 3 * LOOKS and TASK.targets(batch) == 3
    squares = TextToImage(buckets=False, resolution=24).encode(examples, loaded, TrainingSpec(), quiet).rows
    assert {tuple(row.latents.shape[1:]) for row in squares} == {(12, 12)}
    with pytest.raises(DataError, match="multiples of 4"):
        TextToImage(resolution=3).encode(examples, loaded, TrainingSpec(), quiet)


def test_buckets_and_the_middle() -> None:
    assert bucket((512, 512), 512, 64) == (512, 512)
    assert bucket((1920, 1080), 512, 64) == (640, 384)
    assert bucket((1080, 1920), 512, 64) == (384, 640)
    for size in ((1, 9999), (9999, 1), (300, 200)):
        width, height = bucket(size, 512, 64)
        assert width % 64 == height % 64 == 0 and width * height <= 512**2 and max(width, height) <= 1024
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste((0, 0, 255), (10, 0, 30, 20))
    middle, corner = cropped(picture, (20, 20))
    assert middle.size == (20, 20) and corner == (0, 10) and middle.getcolors() == [(400, (0, 0, 255))]


def test_dreambooth_draws_the_class_once_and_weighs_it(base: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "thing"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), "orange").save(pictures / f"{number}.png")
    options = {
        "instance_prompt": "a sks cup", "class_prompt": "a cup", "class_pictures": 3, "prior_weight": 0.5, "steps": 2,
    }  # fmt: skip
    spec = job(base, pictures, options=options, training={"max_steps": 2, "precision": "fp32"})
    spec["data"]["eval_split"] = 0.0
    recorder = Recorder()
    run(JobSpec.from_dict(spec), tmp_path / "run", recorder, Never())
    assert recorder.of("start")[0]["train_rows"] == 7
    drawn = sorted((tmp_path / "run" / "cache" / "class").iterdir())
    assert len(drawn) == 3
    pipeline = load_pipeline(str(base), precision="fp32")
    task, loaded = TextToImage(**options), Loaded(pipeline.unet, pipeline, tmp_path / "run" / "cache")
    by_base = paint(pipeline, "a cup", steps=2, seed=1)[0]
    assert np.abs(array(Image.open(drawn[1])) - array(by_base)).max() == 0
    before = [path.stat().st_mtime_ns for path in drawn]
    rows = task.extra(loaded, quiet)
    assert [path.stat().st_mtime_ns for path in drawn] == before and [row.weight for row in rows] == [0.5] * 3
    with pytest.raises(DataError, match="instance_prompt"):
        TASK.encode([{"image": str(pictures / "0.png"), "text": ""}], loaded, TrainingSpec(), quiet)


def test_the_real_ones_count() -> None:
    """B3 on the exact shape of Stable Diffusion 1.5's UNet, with every preset."""
    for name, preset in presets.tasks()["text_to_image"].presets.items():
        fields = {key: value for key, value in preset.adapter.items() if key != "method"}
        trained, total = get_peft_model(unet_of(SD15), LoraConfig(**fields)).get_nb_trainable_parameters()
        assert trained * 4 == preset.adapter["r"] * 797_184, name
        if preset.adapter["r"] == 4:
            assert (trained, total) == (797_184, 860_318_148)


def test_options_and_folders_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"snr_gamma": -1}, "snr_gamma is -1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"buckets": "yes"}, "buckets is 'yes'"),
        ({"instance_prompt": 3}, "instance_prompt is 3"),
    ):
        with pytest.raises(ConfigError, match=said):
            get_task("text_to_image", options)
    with pytest.raises(ModelError, match="no Stable Diffusion pipeline"):
        load_pipeline("tiny-llama")
    with pytest.raises(ConfigError, match="quantization"):
        load_pipeline(str(base), quantization="int3")
    code = tmp_path / "code"
    shutil.copytree(base, code)
    index = json.loads((code / folders.PIPELINE).read_text())
    (code / folders.PIPELINE).write_text(json.dumps({**index, "unet": ["my_module", "MyUNet"]}))
    with pytest.raises(UnsafeFileError, match="never run"):
        load_pipeline(str(code))
    (code / folders.PIPELINE).write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError, match="FluxPipeline"):
        load_pipeline(str(code))
    (code / folders.PIPELINE).write_text(json.dumps(index))
    weights = code / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsafeFileError, match="unet"):
        load_pipeline(str(code))
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match="no weights for its unet"):
        load_pipeline(str(code))


def test_what_is_fetched_of_a_hub_pipeline() -> None:
    listed = [
        "model_index.json", "v1-5-pruned.ckpt", "v1-5.safetensors", "README.md", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
        "safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json", "unet/code.py",
    ]  # fmt: skip
    assert choose_files(dict.fromkeys(listed, 1), "owner/sd") == sorted([
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
    ])  # fmt: skip


def test_an_adapter_of_another_method_is_kept_in_its_own_format(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = job(base, pictures, training={"max_steps": 3})
    spec["adapter"] = {"method": "loha", "r": 4, "target_modules": TARGETS}
    trained(spec, tmp_path, capsys)
    folder = tmp_path / "run" / "adapter"
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    assert isinstance(PeftModel.from_pretrained(load_pipeline(str(base)).unet, folder), PeftModel)
