"""Pictures from words: one picture of a pipeline, and a base with adapters side by side from the same noise."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, PromptError
from engine.models.pipelines import Pipeline, load_pipeline

if TYPE_CHECKING:
    from PIL import Image

    from engine.generation import Piece, Sampling

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
        pipeline: its UNet as it is switched now.
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
    before = pipeline.unet.training
    pipeline.unet.eval()
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
            # The VAE is in float32, whatever the UNet computes in.
            pixels = pipeline.vae.decode(latents.float() / pipeline.vae.config.scaling_factor).sample
            found: list[Image.Image] = made.image_processor.postprocess(pixels)
            return found
    finally:
        pipeline.unet.train(before)


class Painter:
    """A pipeline in memory, and adapters on its UNet.

    Args:
        base: built-in name, local folder or hub id.
        precision: auto, fp32 or bf16.
        on_progress: told what happens while the base is fetched and loaded.
    """

    def __init__(self, base: str, precision: str = "auto", on_progress: Any = None) -> None:
        self.pipeline = load_pipeline(base, precision=precision, on_progress=on_progress)
        self.model: Any = None
        self._attached: dict[str, Path] = {}

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._attached)

    def attach(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a name: a folder in PEFT's format, or a kohya or diffusers file for the UNet.

        Raises:
            EngineError: it cannot be used on this base.
        """
        from engine.model import PeftModel

        self.detach(name)
        if Path(folder).is_file():
            from engine.formats import load_adapter_file

            self.model = load_adapter_file({"unet": self.model or self.pipeline.unet}, folder, name)["unet"]
        elif self.model is None:
            self.model = PeftModel.from_pretrained(self.pipeline.unet, folder, name)
        else:
            self.model.load_adapter(folder, name)
        self._attached[name] = Path(folder)

    def detach(self, name: str) -> None:
        """Take an adapter off; a name that is not attached is no error."""
        if self._attached.pop(name, None) is None:
            return
        if self._attached:
            self.model.delete_adapter(name)
        else:
            self.model.unload()
            self.model = None

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[str | None], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One picture for each column, all from the noise of `sampling.seed`.

        Raises:
            PromptError: the prompt is empty.
            ConfigError: a name in `who` is not attached.
        """
        from engine.generation import Piece

        prompt = str(messages[-1].get("content", "")) if messages else ""
        for name in who:
            if name is not None and name not in self._attached:
                raise ConfigError(
                    f"There is no adapter {name!r} here.", f"Attached: {', '.join(self._attached) or 'none'}."
                )
        for number, name in enumerate(who):
            if name is not None:
                self.model.set_adapter(name, inference_mode=True)
            with self.model.disable_adapter() if name is None and self.model is not None else nullcontext():
                made = paint(
                    self.pipeline, prompt, seed=sampling.seed, steps=sampling.steps, guidance=sampling.guidance
                )
            yield Piece(number, "", True, "stop", made[0])
