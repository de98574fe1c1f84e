"""Pictures from words: Stable Diffusion's UNet learns to take noise away (Rombach et al. 2022, arXiv:2112.10752).

The loss is the mean square between what the UNet predicts and what the scheduler says it should (the noise, or the
velocity of Salimans & Ho 2022, arXiv:2202.00512). Latents and texts are encoded once, before the first step. DreamBooth
(Ruiz et al. 2022, arXiv:2208.12242) is pictures without words, one prompt for all, and pictures of the class that the
base draws itself, so that it does not forget what the class looks like. The text encoders may learn too; then the texts
are read anew in every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.data.images import open_picture
from engine.errors import ConfigError, DataError
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.train.job import JobSpec, TrainingSpec

if TYPE_CHECKING:
    from PIL import Image

    from engine.model import PeftModel
    from engine.models.pipelines import Pipeline

LOOKS = 4
"""So many noise levels are tried on each row of an evaluation."""


@dataclass(frozen=True)
class Painted:
    """One row: a picture's latents (C, h, w), what the UNet reads of its words, and a seed of its own.

    `words` are token ids (encoders, tokens) where the text encoders learn. `pooled` and `sizes` are SDXL's. `weight` is
    what its loss counts.
    """

    latents: Tensor
    words: Tensor
    pooled: Tensor | None
    sizes: Tensor | None
    seed: int
    weight: float = 1.0


@dataclass(frozen=True)
class TextToImage:
    """The task's record and its options.

    Attributes:
        resolution: the side in pixels of a square picture of the size that is trained; 0: what the base was made for.
        buckets: pictures keep their shape, near the area of that square; without, they become squares.
        instance_prompt: what is said of pictures without words (DreamBooth), such as `a photo of sks dog`.
        class_prompt: what the base draws `class_pictures` of before training, such as `a photo of a dog`.
        class_pictures: so many.
        prior_weight: what the loss on these counts.
        word_dropout: share of rows (0 to 1) that are shown without their words, which guidance lives on.
        snr_gamma: min-SNR weighting (Hang et al. 2023, arXiv:2303.09556), 5 is usual; 0: none.
        noise_offset: adds noise that is the same for a whole channel, for very dark and very bright pictures.
        train_text_encoder: the text encoders get an adapter too, of the same method and rank.
        steps: of a sample.
        guidance: of a sample.
    """

    resolution: int = 0
    buckets: bool = True
    instance_prompt: str = ""
    class_prompt: str = ""
    class_pictures: int = 50
    prior_weight: float = 1.0
    word_dropout: float = 0.0
    snr_gamma: float = 0.0
    noise_offset: float = 0.0
    train_text_encoder: bool = False
    steps: int = 20
    guidance: float = 7.5

    name: ClassVar[str] = "text_to_image"
    task_type: ClassVar[TaskType | None] = None
    one_shape: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = ("images", "pictures")
    text_metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Any, Any, float, float], ...] = (
            ("resolution", self.resolution, (int,), 0, 4096),
            ("class_pictures", self.class_pictures, (int,), 1, 10_000),
            ("prior_weight", self.prior_weight, (int, float), 0, 100),
            ("word_dropout", self.word_dropout, (int, float), 0, 1),
            ("snr_gamma", self.snr_gamma, (int, float), 0, 1000),
            ("noise_offset", self.noise_offset, (int, float), 0, 1),
            ("steps", self.steps, (int,), 1, 1000),
            ("guidance", self.guidance, (int, float), 0, 100),
        )
        found = [
            f"{name} is {value!r}; needed: a {'whole ' if kinds == (int,) else ''}number from {low:g} to {high:g}"
            for name, value, kinds, low, high in rules
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high
        ]
        found += [
            f"{name} is {value!r}; needed: text"
            for name, value in (("instance_prompt", self.instance_prompt), ("class_prompt", self.class_prompt))
            if not isinstance(value, str)
        ]
        found += [
            f"{name} is {value!r}; needed: true or false"
            for name, value in (("buckets", self.buckets), ("train_text_encoder", self.train_text_encoder))
            if not isinstance(value, bool)
        ]
        if found:
            raise ConfigError(
                "These options of the task text_to_image cannot be used:\n" + "\n".join(f"- {one}" for one in found)
            )

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        from engine.models.pipelines import load_pipeline

        if spec.full and self.train_text_encoder:
            raise ConfigError(
                "Full fine-tuning trains the UNet alone, and the option train_text_encoder asks for the text encoder.",
                "Turn that option off, or train an adapter.",
            )
        pipeline = load_pipeline(
            spec.model,
            quantization=spec.quantization,
            precision=spec.training.precision,
            device=device,
            on_progress=on_progress,
        )
        return Loaded(pipeline.unet, pipeline)

    @property
    def joins(self) -> bool:
        """Whether the text encoders learn too."""
        return self.train_text_encoder

    def together(self, loaded: Loaded, model: PeftModel, folder: Path | None = None) -> nn.Module:
        """The UNet with its text encoders where these learn too."""
        from engine.text_encoders import with_encoders

        return with_encoders(loaded.processor, model, folder) if self.train_text_encoder else model

    # --- rows ------------------------------------------------------------------------------------------------------

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Latents and texts, computed once.

        Raises:
            DataError: nothing is said of the pictures and there is no `instance_prompt`; the resolution is too small.
        """
        pipeline: Pipeline = loaded.processor
        wanted: list[tuple[Any, str, float]] = []
        left = 0
        for example in examples:
            words = str(example.get("text", "")).strip() or self.instance_prompt.strip()
            left += not words
            if words:
                wanted.append((str(example["image"]), words, 1.0))
        if not wanted:
            raise DataError(
                f"Nothing is said of the {len(examples)} pictures.",
                "Give captions (a .txt of the same name beside each), or the option instance_prompt for all of them.",
            )
        notes = [f"{left} pictures were left out: nothing is said of them."] if left else []
        return Encoded(self._rows(pipeline, wanted, on_progress), tuple(notes))

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        """The words of each picture as its text encoders read them; what is learned is the picture."""
        (first, *_), limit = loaded.processor.tokenizers, min(t.model_max_length for t in loaded.processor.tokenizers)
        for example in examples:
            words = str(example.get("text", "")).strip() or self.instance_prompt.strip()
            ids = first(words, verbose=False)["input_ids"]
            kept = ids if len(ids) <= limit else first(words, truncation=True, max_length=limit)["input_ids"]
            yield [sequenced(ids, (False,) * len(ids), kept, limit, first, "words")]

    def extra(self, loaded: Loaded, on_progress: Progress) -> list[Painted]:
        """DreamBooth's pictures of the class, as the base draws them."""
        words = self.class_prompt.strip()
        if not words:
            return []
        drawn = self._class(loaded, on_progress)
        return self._rows(loaded.processor, [(picture, words, self.prior_weight) for picture in drawn], on_progress)

    def _rows(
        self, pipeline: Pipeline, wanted: Sequence[tuple[Any, str, float]], on_progress: Progress
    ) -> list[Painted]:
        side = self._side(pipeline)
        texts = list(dict.fromkeys([*(words for _, words, _ in wanted), ""]))
        read = self._read(pipeline, texts, on_progress)
        rows = []
        for number, (source, words, weight) in enumerate(wanted):
            if number % 10 == 0:
                on_progress("pictures", number / len(wanted), f"Reading picture {number + 1} of {len(wanted)}")
            picture = open_picture(source) if isinstance(source, str) else source
            size = bucket(picture.size, side, pipeline.step) if self.buckets else (side, side)
            fitted, corner = cropped(picture, size)
            sizes = (*picture.size[::-1], *corner, *size[::-1]) if pipeline.xl else None
            hidden, pooled = read[words]
            rows.append(
                Painted(
                    _latents(pipeline, fitted),
                    hidden,
                    pooled,
                    None if sizes is None else torch.tensor(sizes, dtype=torch.float32),
                    number,
                    weight,
                )
            )
        return rows

    def _read(
        self, pipeline: Pipeline, texts: Sequence[str], on_progress: Progress
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Text -> what a row keeps of it: what the UNet reads, or tokens where the encoders learn."""
        if not self.train_text_encoder:
            return _embedded(pipeline, texts, on_progress)
        return dict(zip(texts, ((ids, None) for ids in pipeline.tokens(list(texts))), strict=True))

    def _side(self, pipeline: Pipeline) -> int:
        side = self.resolution or pipeline.side
        if side < pipeline.step:
            raise DataError(
                f"resolution is {side}; this base takes multiples of {pipeline.step} pixels.",
                f"Leave it 0 for {pipeline.side}.",
            )
        return side // pipeline.step * pipeline.step

    def _class(self, loaded: Loaded, on_progress: Progress) -> list[Image.Image]:
        """Pictures of the class, drawn once and kept in the run's cache."""
        from engine.joined import Joined
        from engine.model import PeftModel
        from engine.painting import paint
        from engine.sheets import write_picture

        folder = (loaded.cache or Path()) / "class"
        if loaded.cache is not None and folder.is_dir():
            return [open_picture(str(path)) for path in sorted(folder.iterdir())]
        found: list[Image.Image] = []
        for number in range(self.class_pictures):
            part = f"picture {number + 1} of {self.class_pictures}"
            on_progress("class", number / self.class_pictures, f"Drawing {part} of {self.class_prompt!r}")
            # An adapter that was just attached changes nothing yet, but some methods' starts do.
            off = loaded.model.disable_adapter() if isinstance(loaded.model, PeftModel | Joined) else nullcontext()
            with off:
                found += paint(
                    loaded.processor, self.class_prompt, steps=self.steps, guidance=self.guidance, seed=number
                )
        if loaded.cache is not None:
            draft = folder.with_name(".class.draft")
            for number, picture in enumerate(found):
                write_picture(picture, draft / f"{number:05}.png")
            draft.rename(folder)
        return found

    def collator(self, loaded: Loaded) -> Callable[[list[Painted]], Batch]:
        pipeline: Pipeline = loaded.processor
        empty, pooled_empty = (pipeline.tokens([""]), None) if self.train_text_encoder else pipeline.embed([""])
        dtype = next(p for p in loaded.model.parameters() if p.is_floating_point()).dtype

        def collate(rows: list[Painted]) -> Batch:
            """Tensors of each group of rows of one shape: `latents.0`, `words.0`, ..., `latents.1`, ..."""
            shapes = list(dict.fromkeys(row.latents.shape for row in rows))
            batch: Batch = {}
            for number, shape in enumerate(shapes):
                group = [row for row in rows if row.latents.shape == shape]
                batch[f"latents.{number}"] = torch.stack([row.latents for row in group]).to(dtype)
                batch[f"words.{number}"] = _as(torch.stack([row.words for row in group]), dtype)
                batch[f"seeds.{number}"] = torch.tensor([row.seed for row in group])
                batch[f"weights.{number}"] = torch.tensor([row.weight for row in group])
                if pipeline.xl:
                    batch[f"sizes.{number}"] = torch.stack([_known(row.sizes) for row in group]).to(dtype)
                if pooled_empty is not None:
                    batch[f"pooled.{number}"] = torch.stack([_known(row.pooled) for row in group]).to(dtype)
                    batch[f"pooled_empty.{number}"] = pooled_empty.to(dtype)
                batch[f"empty.{number}"] = _as(empty, dtype)
            return batch

        return collate

    def targets(self, batch: Batch) -> int:
        return sum(len(value) for key, value in batch.items() if key.startswith("latents."))

    def tokens(self, batch: Batch) -> int:
        """Places of the latents, which the UNet sees as a text model sees tokens."""
        return sum(value[:, 0].numel() for key, value in batch.items() if key.startswith("latents."))

    # --- loss ------------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """The mean square of each row, summed; an evaluation sees every row at the same noise levels each time."""
        total, count = torch.zeros(()), 0
        number = 0
        while f"latents.{number}" in batch:
            group = {key.partition(".")[0]: value for key, value in batch.items() if key.endswith(f".{number}")}
            looks: Sequence[int | None] = [None] if model.training else range(LOOKS)
            for look in looks:
                part = self._group(model, group, look)
                total = total.to(part.device) + part
                count += len(group["latents"])
            number += 1
        return LossSum(total, count)

    def _group(self, model: nn.Module, group: Batch, look: int | None) -> Tensor:
        schedule = _schedule(model)
        clean, words = group["latents"], group["words"]
        noise, when = self._noise(clean, group["seeds"], schedule.config.num_train_timesteps, look)
        pooled = group.get("pooled")
        if look is None and self.word_dropout:
            gone = torch.rand(len(clean)).to(clean.device) < self.word_dropout
            words = torch.where(gone.view(-1, 1, 1), group["empty"], words)
            if pooled is not None:
                pooled = torch.where(gone.view(-1, 1), group["pooled_empty"], pooled)
        noisy = schedule.add_noise(clean, noise, when)
        if self.train_text_encoder:
            guess = model(noisy, when, words, group.get("sizes")).sample
        else:
            more = {} if pooled is None else {"text_embeds": pooled, "time_ids": group["sizes"]}
            guess = model(noisy, when, encoder_hidden_states=words, added_cond_kwargs=more or None).sample
        kind = schedule.config.prediction_type
        wanted = {"epsilon": noise, "sample": clean}.get(kind)
        if wanted is None:
            wanted = schedule.get_velocity(clean, noise, when)
        each = (guess.float() - wanted.float()).square().mean(dim=(1, 2, 3))
        if self.snr_gamma and look is None:
            each = each * _snr_weight(schedule, when, self.snr_gamma, kind)
        total: Tensor = (each * group["weights"]).sum()
        return total

    def _noise(self, clean: Tensor, seeds: Tensor, levels: int, look: int | None) -> tuple[Tensor, Tensor]:
        """Noise and noise levels: drawn in training, by the row's seed in an evaluation."""
        size = clean.shape
        if look is None:
            noise = torch.randn(size)
            when = torch.randint(0, levels, (size[0],))
            if self.noise_offset:
                noise = noise + self.noise_offset * torch.randn(size[0], size[1], 1, 1)
            return noise.to(clean), when.to(clean.device)
        made, times = [], []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(LOOKS * seed + look)
            made.append(torch.randn(size[1:], generator=generator))
            inside = float(torch.rand((), generator=generator))
            times.append(min(levels - 1, int((look + inside) * levels / LOOKS)))
        return torch.stack(made).to(clean), torch.tensor(times, device=clean.device)

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """The words and the picture."""
        words = str(example.get("text", "")).strip() or self.instance_prompt.strip()
        return (words, str(example["image"])) if words else None

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> Image.Image:
        """A picture, always from the same noise."""
        from engine.painting import paint

        return paint(loaded.processor, prompt, steps=self.steps, guidance=self.guidance, seed=0)[0]

    def save_model(self, loaded: Loaded, folder: Path) -> None:
        """The whole pipeline with its trained UNet, as diffusers reads it."""
        loaded.processor.diffusers().save_pretrained(folder)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what diffusers' `load_lora_weights` reads beside an adapter, where that format has a place for it."""
        from engine.formats import write_diffusers
        from engine.joined import parts_of

        # The first part is the UNet, alone or not.
        parts = {start.rstrip(".") or "unet": part for start, part in parts_of(model).items()}
        try:
            write_diffusers(parts, folder / "pytorch_lora_weights.safetensors")
        except ConfigError:
            # Other methods have their own format alone, in adapter_model.safetensors.
            return


TASK = TextToImage()


def bucket(size: tuple[int, int], side: int, step: int) -> tuple[int, int]:
    """(width, height) in multiples of `step`, of about `side` squared pixels, nearest in shape to `size`."""
    shape = math.log(size[0] / size[1])
    # No longer than twice the square's side, where models know no pictures any more.
    found = []
    for width in range(step, 2 * side + 1, step):
        height = min(2 * side, side * side // width // step * step)
        if height >= step and max(width, height) <= 2 * side:
            found.append((width, height))
    return min(found, key=lambda one: (abs(math.log(one[0] / one[1]) - shape), -one[0] * one[1]))


def cropped(picture: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The middle of a picture at this size, and the (top, left) corner that was cut in the scaled picture."""
    from PIL import Image

    grown = max(size[0] / picture.width, size[1] / picture.height)
    scaled = (max(size[0], round(picture.width * grown)), max(size[1], round(picture.height * grown)))
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    whole = picture.resize(scaled, Image.Resampling.LANCZOS) if scaled != picture.size else picture
    return whole.crop((left, top, left + size[0], top + size[1])), (top, left)


@torch.no_grad()
def _latents(pipeline: Pipeline, picture: Image.Image) -> Tensor:
    """The middle of what the VAE makes of a picture, scaled as the UNet expects it."""
    import numpy as np

    device = next(pipeline.vae.parameters()).device
    values = torch.from_numpy(np.asarray(picture).astype("float32") / 127.5 - 1).permute(2, 0, 1)[None]
    found: Tensor = pipeline.vae.encode(values.to(device)).latent_dist.mode()[0].cpu()
    config = pipeline.vae.config
    scaled: Tensor = (found - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
    return scaled


def _embedded(
    pipeline: Pipeline, texts: Sequence[str], on_progress: Progress
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Text -> what the UNet reads of it; each different one once, kept in 16 bits where the encoder has them."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for start in range(0, len(texts), 8):
        on_progress("texts", start / len(texts), f"Reading text {start + 1} of {len(texts)}")
        some = list(texts[start : start + 8])
        hidden, pooled = pipeline.embed(some)
        for number, text in enumerate(some):
            found[text] = hidden[number].cpu(), None if pooled is None else pooled[number].cpu()
    return found


def _schedule(model: nn.Module) -> Any:
    """How noise is added, as the pipeline that the UNet came from says."""
    find: Any = getattr(model, "get_base_model", None)
    base: Any = find() if find else model
    while not hasattr(base, "noise_schedule"):
        base = base.module
    return base.noise_schedule


def _snr_weight(schedule: Any, when: Tensor, gamma: float, kind: str) -> Tensor:
    kept = schedule.alphas_cumprod.to(when.device)[when].float()
    snr = kept / (1 - kept)
    best: Tensor = snr.clamp(max=gamma)
    divisor: Any = {"v_prediction": snr + 1, "sample": 1.0}.get(kind, snr)
    weight: Tensor = best / divisor
    return weight


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """In the model's type; token ids stay whole numbers."""
    return value.to(dtype) if value.is_floating_point() else value


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
