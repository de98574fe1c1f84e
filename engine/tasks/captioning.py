"""Captions of pictures (BLIP, Li et al. 2022, arXiv:2201.12086): the text decoder learns, the image encoder rests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.adapters.base import TaskType
from engine.checkpoint import write_text
from engine.data.images import open_picture
from engine.errors import CheckpointError, ConfigError, DataError
from engine.tasks.base import Batch, Encoded, Loaded, LossSum, Progress, Sequenced, sequenced
from engine.train.job import JobSpec, TrainingSpec

IGNORED = -100
STYLES = {
    "plain": "",
    "detailed": "a detailed picture of",
    "artistic": "an artistic view of",
}
"""Style -> the words that the decoder goes on from."""
STYLE = "caption.json"


@dataclass(frozen=True)
class Shown:
    """One row: the picture's pixels as bytes, (3, height, width), and the words' tokens, start and end included.

    `given` is how many tokens of the words the decoder is given, and does not learn.
    """

    pixels: Tensor
    ids: tuple[int, ...]
    given: int


@dataclass(frozen=True)
class Captioning:
    """The task's record and its options.

    Attributes:
        style: `plain`, `detailed` or `artistic`: the words that the decoder goes on from, in training and in answers.
        beams: beams of a sample's search; 1 is greedy.
        max_new_tokens: most tokens of a sample.
    """

    style: str = "plain"
    beams: int = 5
    max_new_tokens: int = 40

    name: ClassVar[str] = "captioning"
    task_type: ClassVar[TaskType | None] = None
    formats: ClassVar[tuple[str, ...]] = ("images",)
    text_metrics: ClassVar[tuple[str, ...]] = ("perplexity", "exact_match", "chrf", "bleu", "rouge_l")

    def __post_init__(self) -> None:
        found = []
        if self.style not in STYLES:
            found.append(f"style is {self.style!r}; needed: one of {', '.join(STYLES)}")
        for name, value, most in (("beams", self.beams, 32), ("max_new_tokens", self.max_new_tokens, 512)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                found.append(f"{name} is {value!r}; needed: a whole number from 1 to {most}")
        if found:
            raise ConfigError(
                "These options of the task captioning cannot be used:\n" + "\n".join(f"- {fault}" for fault in found)
            )

    @property
    def prefix(self) -> str:
        return STYLES[self.style]

    def load(self, spec: JobSpec, device: torch.device, on_progress: Progress) -> Loaded:
        from engine.models.captioners import load_captioner

        model, processor = load_captioner(
            spec.model,
            quantization=spec.quantization,
            precision=spec.training.precision,
            device=device,
            on_progress=on_progress,
        )
        # Full fine-tuning leaves it as it is too.
        model.vision_model.requires_grad_(False)
        return Loaded(model, processor)

    def encode(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec, on_progress: Progress
    ) -> Encoded:
        """Pictures at the model's size as bytes (0.4 MB each at 384 pixels), captions cut to `max_length` tokens.

        Raises:
            DataError: no row has a picture and a caption.
        """
        config: Any = _base(loaded.model).config
        limit = min(training.max_length, config.text_config.max_position_embeddings)
        tokenizer = loaded.processor.tokenizer
        given = self._given(tokenizer)
        rows: list[Shown] = []
        seen: dict[str, Tensor] = {}
        cut = empty = 0
        for number, example in enumerate(examples):
            if number % 50 == 0:
                on_progress("pictures", number / len(examples), f"Opening picture {number + 1} of {len(examples)}")
            words = str(example["text"]).strip()
            if not words:
                empty += 1
                continue
            where = str(example["image"])
            if where not in seen:
                seen[where] = pixels_of(loaded.processor, where)
            ids = self._whole(words, tokenizer, config)
            cut += len(ids) > limit
            rows.append(Shown(seen[where], _shortened(ids, limit), given))
        if not rows:
            raise DataError(
                f"None of the {len(examples)} pictures has a caption.",
                "Put a .txt of the same name beside each picture, or a metadata.csv with file_name and text.",
            )
        notes = []
        if cut:
            notes.append(f"{cut} of {len(examples)} captions are longer than {limit} tokens and were cut.")
        if empty:
            notes.append(f"{empty} pictures were left out: nothing is said of them.")
        return Encoded(rows, tuple(notes))

    def _given(self, tokenizer: Any) -> int:
        """Tokens that the decoder is given: the start, and the style's words."""
        return len(tokenizer(self.prefix)["input_ids"]) - 1

    def _whole(self, words: str, tokenizer: Any, config: Any) -> tuple[int, ...]:
        """A caption's ids, uncut, with the model's own start and end."""
        body = tokenizer(f"{self.prefix} {words}" if self.prefix else words)["input_ids"][1:-1]
        return (config.text_config.bos_token_id, *body, config.text_config.sep_token_id)

    def shown(
        self, examples: Sequence[Mapping[str, Any]], loaded: Loaded, training: TrainingSpec
    ) -> Iterator[list[Sequenced]]:
        """The captions; the picture before them is read too, and has no tokens of words."""
        config: Any = _base(loaded.model).config
        limit = min(training.max_length, config.text_config.max_position_embeddings)
        tokenizer = loaded.processor.tokenizer
        given = self._given(tokenizer)
        for example in examples:
            ids = self._whole(str(example["text"]).strip(), tokenizer, config)
            learned = [number >= max(1, given) for number in range(len(ids))]
            yield [sequenced(ids, learned, _shortened(ids, limit), limit, tokenizer, "caption")]

    def length(self, row: Shown) -> int:
        """What a row costs, so that captions of like length can stand in one batch."""
        return len(row.ids)

    def collator(self, loaded: Loaded) -> Callable[[list[Shown]], Batch]:
        prepare = loaded.processor.image_processor
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (prepare.image_mean, prepare.image_std))
        scale, pad = prepare.rescale_factor, loaded.processor.tokenizer.pad_token_id
        dtype = next(p for p in loaded.model.parameters() if p.is_floating_point()).dtype

        def collate(rows: list[Shown]) -> Batch:
            pixels = (torch.stack([row.pixels for row in rows]) * scale - mean) / std
            learned = [(IGNORED,) * row.given + row.ids[row.given :] for row in rows]
            return {
                "pixel_values": pixels.to(dtype),
                "input_ids": _block([row.ids for row in rows], pad),
                "attention_mask": _block([(1,) * len(row.ids) for row in rows], 0),
                "labels": _block(learned, IGNORED),
            }

        return collate

    def targets(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Cross-entropy summed over the captions' tokens, in float32; the given words do not count."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"][:, 1:]
        kept = labels != IGNORED
        logits = model(**inputs).logits[:, -batch["labels"].shape[1] : -1]
        return LossSum(F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"), int(kept.sum()))

    def prompts(self, held: Sequence[Mapping[str, Any]]) -> list[str]:
        """The pictures to describe at each evaluation, where the job names none: the first that are held back."""
        return list(dict.fromkeys(str(example["image"]) for example in held))[:4]

    def reference(self, example: Mapping[str, Any]) -> tuple[str, str] | None:
        """The picture and its caption, for metrics of texts."""
        return str(example["image"]), str(example["text"])

    def save(self, folder: Path) -> None:
        """Write the style beside an adapter, so that answers go on from the same words later."""
        write_text(folder / STYLE, json.dumps({"style": self.style}))

    def restored(self, folder: Path) -> Captioning:
        """The task with the style that an adapter was trained with; plain where its folder says none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not (folder / STYLE).is_file():
            return Captioning()
        try:
            return Captioning(style=json.loads((folder / STYLE).read_text(encoding="utf-8"))["style"])
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{folder / STYLE} cannot be read: {error}.", "Take it away.") from error

    def sample(self, model: nn.Module, loaded: Loaded, prompt: str) -> str:
        """The best beam's caption of the picture at `prompt`, without the words it was given."""
        from engine.captioning import caption
        from engine.generation import Sampling

        pixels = loaded.processor.image_processor(open_picture(prompt), return_tensors="pt")["pixel_values"]
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0, beams=self.beams)
        return caption(model, loaded.processor, pixels, self.prefix, sampling)[0]


TASK = Captioning()


def pixels_of(processor: Any, where: str) -> Tensor:
    """A picture at the model's size, as bytes (3, height, width); the model's own scaling comes with the batch."""
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    made: Tensor = processor.image_processor(open_picture(where), **raw)["pixel_values"][0]
    return made.round().clamp(0, 255).to(torch.uint8)


def _shortened(ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
    return ids if len(ids) <= limit else (*ids[: limit - 1], ids[-1])


def _base(model: nn.Module) -> Any:
    find: Any = getattr(model, "get_base_model", None)
    return find() if find else model


def _block(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
