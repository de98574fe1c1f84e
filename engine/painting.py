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
    from torch import Tensor

    from engine.generation import Piece, Sampling
    from engine.model import PeftModel
    from engine.rows import Row

STEPS = 20
GUIDANCE = 7.5
CPU_SIDE = 32
"""Latents up to this side make a CPU's batch of pictures faster than one after another (docs/compare.md)."""


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

    from engine.columns import resting

    made = _drawer(pipeline, prompt)
    with torch.no_grad(), resting(pipeline.unet, *pipeline.encoders):
        random = torch.Generator().manual_seed(seed)
        latents = _latents(made, [prompt], [negative], steps, guidance, random, count)
        return _developed(pipeline, made, latents)


def _drawer(pipeline: Pipeline, prompt: str) -> Any:
    """diffusers' pipeline of the parts, with the solver."""
    from diffusers import DPMSolverMultistepScheduler

    if not prompt.strip():
        raise PromptError("The prompt is empty.", "Write what the picture should show.")
    made = pipeline.diffusers()
    made.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return made


def _latents(
    made: Any, prompts: list[str], negatives: list[str], steps: int, guidance: float, random: Any, count: int = 1
) -> Tensor:
    """Latents (prompts * count, C, h, w); `random` is a generator, or one for each."""
    found: Tensor = made(
        prompts,
        negative_prompt=negatives if any(negatives) else None,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=count,
        generator=random,
        output_type="latent",
    ).images
    return found


def _developed(pipeline: Pipeline, made: Any, latents: Tensor) -> list[Image.Image]:
    # The VAE stays in float32 whatever the UNet is in, and the pipelines hand it latents of the UNet's type.
    config = pipeline.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / config.scaling_factor + shift).sample
    found: list[Image.Image] = made.image_processor.postprocess(pixels, output_type="pil")
    return found


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
    def _answering(self, who: Sequence[Row]) -> Iterator[None]:
        """Columns as rows of a batch, on each part by what their adapters have for it."""
        with ExitStack() as stack:
            for model in self.models.values():
                here = [{name: w for name, w in mix_of(row) if name in model.peft_config} for row in who]
                stack.enter_context(model.answering(here))
            if self.model is not None:
                board, rows = self.model.switchboard, self.model.switchboard.rows or []

                def guided(unet: Any, inputs: tuple[Any, ...]) -> None:
                    # Guidance puts all columns without the words before all with them.
                    board.rows = rows * (len(inputs[0]) // len(rows))

                stack.callback(self.pipeline.unet.register_forward_pre_hook(guided).remove)
            yield

    def _together(self, who: Sequence[Row], prompt: str, sampling: Sampling) -> list[Image.Image]:
        """The columns' pictures from one batch, each from noise of its own that is the same for all."""
        import torch

        from engine.columns import resting

        made = _drawer(self.pipeline, prompt)
        with torch.no_grad(), resting(self.pipeline.unet, *self.pipeline.encoders):
            random = [torch.Generator().manual_seed(sampling.seed) for _ in who]
            with self._answering(who):
                latents = _latents(
                    made, [prompt] * len(who), [""] * len(who), sampling.steps, sampling.guidance, random
                )
            # One after another: the VAE works on whole pixels, and needs the most memory of all parts.
            return [picture for own in latents.split(1) for picture in _developed(self.pipeline, made, own)]

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[Row], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One picture for each column, all from the noise of `sampling.seed`.

        A column is an adapter's name, a mix (name -> weight), or None for the base. They are one batch where that is
        faster.

        Raises:
            PromptError: the prompt is empty.
            ConfigError: a name in `who` is not attached.
        """
        import torch

        from engine.generation import Piece

        prompt = str(messages[-1].get("content", "")) if messages else ""
        check_attached(who, self._attached)
        waiting, most = list(range(len(who))), self._most()
        while waiting:
            numbers = waiting[:most]
            try:
                made = self._together([who[number] for number in numbers], prompt, sampling)
            except torch.OutOfMemoryError:
                # An accelerator's; what fits for one column need not fit for eight.
                if len(numbers) == 1:
                    raise
                most = len(numbers) // 2
                continue
            for number, picture in zip(numbers, made, strict=True):
                yield Piece(number, "", True, "stop", picture)
            del waiting[: len(numbers)]

    def _most(self) -> int:
        """So many columns are one batch.

        On a CPU large pictures are drawn one after another: a core has its hands full with one, so that a batch is
        hardly faster, but it takes several times the memory, shows nothing before all are drawn, and cannot be stopped.
        """
        from engine.generation import MOST_COLUMNS

        side = self.pipeline.side // self.pipeline.scale
        device = next(self.pipeline.unet.parameters()).device
        return 1 if device.type == "cpu" and side > CPU_SIDE else MOST_COLUMNS

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
