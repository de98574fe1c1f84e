"""Pictures from words: one picture of a pipeline, and a base with adapters side by side from the same noise."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, PromptError
from engine.models.pipelines import Pipeline, load_pipeline
from engine.rows import check_attached, mix_of
from engine.text_encoders import encoder_folders

if TYPE_CHECKING:
    from PIL import Image

    from engine.generation import Piece, Sampling
    from engine.model import PeftModel
    from engine.rows import Row

STEPS = 20
GUIDANCE = 7.5


def paint(
    pipeline: Pipeline,
    prompt: str,
    *,
    negative: str = "",
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    count: int = 1,
) -> list[Image.Image]:
    """Pictures of a prompt, by DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) with classifier-free guidance.

    Args:
        pipeline: its UNet and text encoders as they are switched now.
        steps: how often the UNet looks; 20 are usually enough.
        guidance: how much the words count; 1 is not at all more than without them.
        seed: of the noise, drawn on the CPU, so that it is the same everywhere.
        count: so many, each from noise of its own.

    Raises:
        PromptError: the prompt is empty.
    """
    import torch
    from diffusers import DPMSolverMultistepScheduler

    if not prompt.strip():
        raise PromptError("The prompt is empty.", "Write what the picture should show.")
    made = pipeline.diffusers()
    made.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    parts = (pipeline.unet, *pipeline.encoders)
    before = [part.training for part in parts]
    for part in parts:
        part.eval()
    try:
        with torch.no_grad():
            latents = made(
                prompt,
                negative_prompt=negative or None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                num_images_per_prompt=count,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images
            # The VAE stays in float32 whatever the UNet is in, and the pipelines hand it latents of the UNet's type.
            config = pipeline.vae.config
            shift = getattr(config, "shift_factor", None) or 0.0
            pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / config.scaling_factor + shift).sample
            found: list[Image.Image] = made.image_processor.postprocess(pixels, output_type="pil")
            return found
    finally:
        for part, was in zip(parts, before, strict=True):
            part.train(was)


class Painter:
    """A pipeline in memory, and adapters on its UNet and, where they have a part for them, its text encoders.

    Args:
        base: built-in name, local folder or hub id.
        precision: auto, fp32 or bf16.
        on_progress: told what happens while the base is fetched and loaded.
    """

    def __init__(self, base: str, precision: str = "auto", on_progress: Any = None) -> None:
        self.pipeline = load_pipeline(base, precision=precision, on_progress=on_progress)
        self.models: dict[str, PeftModel] = {}
        self._attached: dict[str, Path] = {}

    @property
    def model(self) -> PeftModel | None:
        """The UNet with its adapters, if it has any."""
        return self.models.get("unet")

    @property
    def parts(self) -> dict[str, PeftModel]:
        """Component -> model with adapters, for those that have any."""
        return self.models

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._attached)

    def attach(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a name: a folder in PEFT's format (the text encoders' in folders of their names there),
        or a kohya or diffusers file.

        Raises:
            EngineError: it cannot be used on this base; nothing of it is attached.
        """
        self.detach(name)
        try:
            if Path(folder).is_file():
                from engine.formats import load_adapter_file

                bases = {"unet": self.pipeline.unet, **self.pipeline.named_encoders}
                self.models |= load_adapter_file({**bases, **self.models}, folder, name)
            else:
                self._load("unet", self.pipeline.unet, folder, name)
                for part, place in encoder_folders(Path(folder), self.pipeline).items():
                    self._load(part, self.pipeline.named_encoders[part], place, name)
        except EngineError:
            self._take_off(name)
            raise
        self._attached[name] = Path(folder)

    def _load(self, part: str, base: Any, folder: str | Path, name: str) -> None:
        from engine.model import PeftModel

        if part in self.models:
            self.models[part].load_adapter(folder, name)
        else:
            self.models[part] = PeftModel.from_pretrained(base, folder, name)

    def detach(self, name: str) -> None:
        """Take an adapter off; a name that is not attached is no error."""
        if self._attached.pop(name, None) is not None:
            self._take_off(name)

    def _take_off(self, name: str) -> None:
        for part, model in list(self.models.items()):
            if set(model.peft_config) == {name}:
                model.unload()
                del self.models[part]
            elif name in model.peft_config:
                model.delete_adapter(name)

    @contextmanager
    def _switched(self, row: Row) -> Iterator[None]:
        """An adapter or a mix on every part that it has something for, and nothing on the others."""
        weights = dict(mix_of(row))
        with ExitStack() as stack:
            for model in self.models.values():
                here = {name: weight for name, weight in weights.items() if name in model.peft_config}
                if here:
                    model.set_adapter_weights(here)
                else:
                    stack.enter_context(model.disable_adapter())
            yield

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[Row], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One picture for each column, all from the noise of `sampling.seed`.

        A column is an adapter's name, a mix (name -> weight), or None for the base.

        Raises:
            PromptError: the prompt is empty.
            ConfigError: a name in `who` is not attached.
        """
        from engine.generation import Piece

        prompt = str(messages[-1].get("content", "")) if messages else ""
        check_attached(who, self._attached)
        for number, row in enumerate(who):
            with self._switched(row):
                made = paint(
                    self.pipeline, prompt, seed=sampling.seed, steps=sampling.steps, guidance=sampling.guidance
                )
            yield Piece(number, "", True, "stop", made[0])

    def as_switched(
        self, messages: Sequence[Mapping[str, str]], names: Sequence[str], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One picture, from the pipeline as it is switched now.

        Raises:
            PromptError: the prompt is empty.
        """
        from engine.generation import Piece

        prompt = str(messages[-1].get("content", "")) if messages else ""
        made = paint(self.pipeline, prompt, seed=sampling.seed, steps=sampling.steps, guidance=sampling.guidance)
        yield Piece(0, "", True, "stop", made[0])
