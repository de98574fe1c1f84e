"""Stable Diffusion's text encoders learn beside the UNet: runs, files of every format, and what others read of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from engine import LoraConfig, PeftModel, get_peft_model
from engine.__main__ import main
from engine.errors import CheckpointError, ConfigError
from engine.formats import load_adapter_file, write_kohya
from engine.generation import Sampling
from engine.inspection import count
from engine.models.pipelines import load_pipeline
from engine.painting import Painter, paint
from engine.tasks.base import Loaded
from engine.tasks.text_to_image import TextToImage
from engine.text_encoders import Painting
from engine.train.events import Recorder
from engine.train.job import JobSpec, TrainingSpec
from engine.train.worker import run
from tests import diffusion

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
FEW = Sampling(steps=3, guidance=3)
ASKED = [{"content": "a red square"}]
COMPONENTS = {False: ["text_encoder"], True: ["text_encoder", "text_encoder_2"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        name = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (16, 16), name).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a {name} square")
    return folder


def job(base: Path, pictures: Path, **more: Any) -> dict[str, Any]:
    training = {"max_steps": 12, "batch_size": 4, "learning_rate": 0.02, "eval_every": 100, "precision": "fp32"}
    return {
        "task": "text_to_image",
        "model": str(base),
        "data": {"path": str(pictures), "eval_split": 0.25},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": TARGETS},
        "options": {"train_text_encoder": True},
        **more,
        "training": {**training, **more.get("training", {})},
    }


class Never:
    def poll(self) -> str | None:
        return None


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def trained(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(xl, base, the run's folder, its events)."""
    folder = tmp_path_factory.mktemp("run")
    base = diffusion.save_pipeline(folder / "sd", xl=request.param)
    recorder = Recorder()
    assert run(JobSpec.from_dict(job(base, pictures)), folder / "run", recorder, Never()) == "done"
    return request.param, base, folder / "run", recorder


def drawn(painter: Painter, name: str | None) -> Any:
    return np.asarray(next(iter(painter.stream(ASKED, [name], FEW))).picture).astype(int)


def test_both_learn_and_are_counted(trained: Any) -> None:
    xl, base, out, recorder = trained
    done = recorder.of("done")[0]
    assert done["first_eval_loss"] - done["eval_loss"] > 0.01
    pipeline = load_pipeline(str(base), precision="fp32")
    unet, _ = get_peft_model(pipeline.unet, LoraConfig(r=4, target_modules=TARGETS)).get_nb_trainable_parameters()
    # Two layers of four 32 x 32 matrices each.
    assert recorder.of("start")[0]["trainable"] == unet + len(COMPONENTS[xl]) * 2 * 4 * 4 * (32 + 32)
    for name in COMPONENTS[xl]:
        tensors = load_file(out / "adapter" / name / "adapter_model.safetensors")
        used = [key for key in tensors if "lora_B" in key and float(tensors[key].abs().max()) > 0]
        # SDXL reads the last but one layer of an encoder, and of the second also its pooled last.
        assert len(used) == (4 if xl and name == "text_encoder" else 8)
        config = json.loads((out / "adapter" / name / "adapter_config.json").read_text())
        assert config["r"] == 4 and set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_the_cost_before_the_start_is_that_of_the_run(trained: Any, pictures: Path) -> None:
    xl, base, out, recorder = trained
    spec, start = job(base, pictures), recorder.of("start")[0]
    told = count(str(base), spec["adapter"], "text_to_image", spec["options"])
    assert (told["trainable"], told["parameters"]) == (start["trainable"], start["parameters"])
    assert told["base"] == start["parameters"] - start["trainable"]
    files = [load_file(path) for path in (out / "adapter").rglob("adapter_model.safetensors")]
    assert len(files) == 1 + len(COMPONENTS[xl])
    assert told["adapter_bytes"] == sum(tensor.nbytes for file in files for tensor in file.values())
    assert told["targets"]["q_proj"] == 2 * len(COMPONENTS[xl])
    alone = count(str(base), spec["adapter"], "text_to_image")
    assert alone["trainable"] < told["trainable"] and "q_proj" not in alone["targets"]
    with pytest.raises(ConfigError, match="cannot be trained with ia3"):
        count(str(base), {"method": "ia3"}, "text_to_image", spec["options"])


def test_plain_diffusers_draws_the_same_with_it(trained: Any) -> None:
    xl, base, out, _ = trained
    painter = Painter(str(base), "fp32")
    painter.attach("one", out / "adapter")
    plain, ours = drawn(painter, None), drawn(painter, "one")
    assert set(painter.models) == {"unet", *COMPONENTS[xl]} and np.abs(plain - ours).max() > 8
    with painter.models["text_encoder"].disable_adapter():
        alone = np.asarray(paint(painter.pipeline, "a red square", steps=3, guidance=3)[0]).astype(int)
    assert np.abs(alone - ours).max() > 2, "the text encoder's part must be seen"
    kind: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    theirs = kind.from_pretrained(base)
    theirs.load_lora_weights(out / "adapter")
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = theirs("a red square", num_inference_steps=3, guidance_scale=3, generator=generator).images[0]
    assert np.abs(np.asarray(made).astype(int) - ours).max() <= 1

    kohya = write_kohya(painter.models, out / "kohya.safetensors", "one")
    again = Painter(str(base), "fp32")
    again.attach("file", kohya)
    assert np.abs(drawn(again, "file") - ours).max() <= 1
    again.attach("diffusers", out / "adapter" / "pytorch_lora_weights.safetensors")
    assert np.abs(drawn(again, "diffusers") - ours).max() <= 1 and np.abs(drawn(again, None) - plain).max() == 0
    painter.detach("one")
    assert not painter.models and np.abs(drawn(painter, None) - plain).max() == 0


def test_an_adapter_of_the_unet_alone_stands_beside_one_of_both(trained: Any, tmp_path: Path) -> None:
    """The encoder's part of one must not act while the other is on."""
    _, base, out, _ = trained
    model = get_peft_model(load_pipeline(str(base), precision="fp32").unet, LoraConfig(r=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "unet")
    single, both = Painter(str(base), "fp32"), Painter(str(base), "fp32")
    single.attach("unet", tmp_path / "unet")
    both.attach("both", out / "adapter")
    both.attach("unet", tmp_path / "unet")
    assert np.abs(drawn(both, "unet") - drawn(single, "unet")).max() == 0
    both.detach("both")
    assert set(both.models) == {"unet"} and np.abs(drawn(both, "unet") - drawn(single, "unet")).max() == 0


def test_peft_opens_each_part(trained: Any) -> None:
    xl, base, out, _ = trained
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
    ours = load_pipeline(str(base), precision="fp32")
    models = load_adapter_file({"unet": ours.unet, **ours.named_encoders}, out / "adapter")
    assert set(models) == {"unet", *COMPONENTS[xl]}
    theirs = load_pipeline(str(base), precision="fp32")
    for name in COMPONENTS[xl]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Keys that are missing or too many are warnings there.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.PeftModel.from_pretrained(theirs.named_encoders[name], out / "adapter" / name)
        assert torch.allclose(diffusion.answer(wrapped), diffusion.answer(models[name]), atol=1e-5)


def test_the_encoders_part_is_no_second_adapter_of_the_unet(trained: Any, tmp_path: Path) -> None:
    _, base, out, _ = trained
    unet = load_pipeline(str(base), precision="fp32").unet
    model = PeftModel.from_pretrained_all(unet, out / "adapter")
    assert list(model.peft_config) == ["default"]
    shutil.copytree(out / "adapter", tmp_path / "all")
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained_all(load_pipeline(str(base), precision="fp32").unet, tmp_path / "all")
    assert set(again.peft_config) == {"default", "second"}
    model.delete_adapter("default")
    assert model.load_adapters(out / "adapter") == ["default"]
    # On a model without encoders beside it, the name is as good as any.
    plain = get_peft_model(diffusion.encoder(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.add_adapter("text_encoder", LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "plain")
    assert set(PeftModel.from_pretrained_all(diffusion.encoder(), tmp_path / "plain").peft_config) == {
        "default", "text_encoder",
    }  # fmt: skip


def test_files_that_say_too_much_or_too_little(trained: Any, pictures: Path, tmp_path: Path) -> None:
    _, base, out, _ = trained
    with pytest.raises(CheckpointError, match="also adapts text_encoder"):
        load_adapter_file({"unet": load_pipeline(str(base)).unet}, out / "adapter")
    spec = job(base, pictures)
    with pytest.raises(ConfigError, match="cannot be trained with ia3"):
        run(JobSpec.from_dict({**spec, "adapter": {"method": "ia3"}}), tmp_path / "a", Recorder(), Never())
    with pytest.raises(ConfigError, match="UNet alone"):
        run(JobSpec.from_dict({**spec, "adapter": {}, "full": True}), tmp_path / "b", Recorder(), Never())
    with pytest.raises(ConfigError, match="train_text_encoder is 'yes'"):
        TextToImage(train_text_encoder="yes")  # type: ignore[arg-type]


def test_scores_know_the_encoder(
    trained: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, out, recorder = trained
    (tmp_path / "job.json").write_text(json.dumps(job(base, pictures)))
    assert main(["eval", str(tmp_path / "job.json"), "--adapter", str(out / "adapter"), "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = {event["who"]: event["value"] for event in events if event["type"] == "score"}
    done = recorder.of("done")[0]
    assert scores["base"] == pytest.approx(done["first_eval_loss"], abs=1e-4)
    assert scores["adapter"] == pytest.approx(done["eval_loss"], abs=1e-4)


class PauseAt:
    def __init__(self, polls: int) -> None:
        self.left = polls

    def poll(self) -> str | None:
        self.left -= 1
        return "pause" if self.left == 0 else None


def test_pausing_is_exact(pictures: Path, tmp_path: Path) -> None:
    base = diffusion.save_pipeline(tmp_path / "sd")
    spec = job(base, pictures, training={"max_steps": 6, "checkpoint_every": 100}, data={"path": str(pictures),
               "eval_split": 0.0})  # fmt: skip
    spec["adapter"]["lora_dropout"] = 0.1
    whole, parted = Recorder(), Recorder()
    run(JobSpec.from_dict(spec), tmp_path / "whole", whole, Never())
    assert run(JobSpec.from_dict(spec), tmp_path / "parted", parted, PauseAt(4)) == "paused"
    run(JobSpec.from_dict(spec), tmp_path / "parted", parted, Never(), resume=True)
    assert [event["loss"] for event in parted.of("step")] == [event["loss"] for event in whole.of("step")]
    for name in ("adapter_model.safetensors", "text_encoder/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / which / "adapter" / name) for which in ("whole", "parted"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_words_are_read_with_gradients_and_cached_without(pictures: Path, tmp_path: Path) -> None:
    """At the start both ways give the same loss; only one of them reaches the encoder."""
    base = diffusion.save_pipeline(tmp_path / "xl", xl=True)
    rows = [{"image": str(pictures / f"0{n}.png"), "text": "a b"} for n in range(3)]

    def loss(option: bool) -> tuple[float, list[nn.Parameter]]:
        pipeline = load_pipeline(str(base), precision="fp32")
        task = TextToImage(train_text_encoder=option, word_dropout=0.5)
        unet = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=TARGETS))
        model = task.together(Loaded(unet, pipeline), unet)
        assert isinstance(model, Painting) == option
        loaded = Loaded(model, pipeline)
        batch = task.collator(loaded)(task.encode(rows, loaded, TrainingSpec(), _quiet).rows)
        assert batch["words.0"].is_floating_point() != option
        torch.manual_seed(3)
        found = task.loss(model.train(), batch)
        found.total.backward()
        return float(found.total.detach()), [p for e in pipeline.encoders for p in e.parameters() if p.grad is not None]

    (cached, none), (read, some) = loss(False), loss(True)
    assert read == pytest.approx(cached, rel=1e-5) and not none and len(some) > 8


def _quiet(phase: str, fraction: float | None, message: str) -> None:
    pass


def test_samples_while_it_trains_are_drawn_without_dropout(pictures: Path, tmp_path: Path) -> None:
    base = diffusion.save_pipeline(tmp_path / "sd")
    pipeline = load_pipeline(str(base), precision="bf16")
    task = TextToImage(train_text_encoder=True, steps=2)
    unet = get_peft_model(pipeline.unet, LoraConfig(r=2, lora_dropout=0.5, target_modules=TARGETS))
    model = task.together(Loaded(unet, pipeline), unet)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    sample: Callable[[], Any] = lambda: np.asarray(task.sample(model, Loaded(model, pipeline), "a b"))  # noqa: E731
    still = sample()
    model.train()
    assert np.array_equal(sample(), still) and all(part.training for part in (pipeline.unet, *pipeline.encoders))
