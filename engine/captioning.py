"""Captions of pictures: the decoder's words for one picture, and a base with adapters side by side."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.columns import batches, resting, settings
from engine.data.images import open_picture
from engine.errors import PromptError
from engine.rows import Row, check_attached, mix_of

if TYPE_CHECKING:
    from engine.generation import Piece, Sampling
    from engine.model import PeftModel


def caption(
    model: nn.Module, processor: Any, pixels: Tensor, prefix: str, sampling: Sampling, who: Row = ""
) -> tuple[str, bool]:
    """The caption of one picture without `prefix`, and whether the model ended it.

    Args:
        pixels: (1, 3, height, width), as the processor makes them.
        prefix: the words that the decoder is given to go on from.
        sampling: at temperature 0 the best of `sampling.beams` beams; otherwise drawn.
        who: the adapter or mix that answers, None for the base; left out, the model answers as it is switched.
    """
    return captions(model, processor, pixels, [prefix], sampling, None if who == "" else [who])[0]


@torch.no_grad()
def captions(
    model: nn.Module,
    processor: Any,
    pixels: Tensor,
    prefixes: Sequence[str],
    sampling: Sampling,
    who: Sequence[Row] | None,
) -> list[tuple[str, bool]]:
    """Captions of one picture, each without its prefix, and of each whether the model ended it.

    Those that go on from equally many words are one batch. The picture is looked at once where no adapter of the
    captions changes how the model sees.

    Args:
        pixels, sampling: as `caption`.
        prefixes: the words that each goes on from.
        who: for each the adapter or mix that answers, None for the base; None: the model as it is switched.
    """
    starts = [processor.tokenizer(prefix, return_tensors="pt")["input_ids"] for prefix in prefixes]
    found: dict[int, tuple[str, bool]] = {}
    with resting(model):
        decoder = _Decoder(model, processor.tokenizer, pixels, sampling)
        # The decoder counts positions from the first word of the batch, so that padding before it would shift them.
        for numbers in batches([start.shape[1] for start in starts]):
            rows = None if who is None else [who[number] for number in numbers]
            told = decoder.told(torch.cat([starts[number] for number in numbers]), rows)
            found |= dict(zip(numbers, told, strict=True))
    return [found[number] for number in range(len(prefixes))]


class _Decoder:
    """BLIP's decoder before one picture, which is looked at when somebody needs it, and kept."""

    def __init__(self, model: nn.Module, tokenizer: Any, pixels: Tensor, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        find: Any = getattr(model, "get_base_model", None)
        self.base: Any = find() if find else model
        weight = next(p for p in model.parameters() if p.is_floating_point())
        self.pixels = pixels.to(weight.device, weight.dtype)
        self._plain: Tensor | None = None

    def told(self, start: Tensor, who: Sequence[Row] | None) -> list[tuple[str, bool]]:
        """Captions that go on from `start` (rows, words), which has an end token behind the words."""
        config, rows, words = self.base.config.text_config, *start.shape
        start = start.to(self.pixels.device)
        # BLIP begins with a token of its own, and goes on where the end token stood.
        start[:, 0] = config.bos_token_id
        with self._rows(who):
            seen = self._seen(who, rows)
            out = self.base.text_decoder.generate(
                input_ids=start[:, :-1],
                attention_mask=torch.ones_like(start[:, :-1]),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
                eos_token_id=config.sep_token_id,
                pad_token_id=config.pad_token_id,
                max_new_tokens=min(self.sampling.max_new_tokens, config.max_position_embeddings - words),
                **settings(self.sampling, rows),
            )
        new = [row[words - 1 :] for row in out]
        decode, end = self.tokenizer.decode, self.tokenizer.sep_token_id
        return [(decode(row, skip_special_tokens=True).strip(), end in row.tolist()) for row in new]

    def _rows(self, who: Sequence[Row] | None) -> AbstractContextManager[None]:
        from engine.model import PeftModel

        return self.model.answering(who) if who is not None and isinstance(self.model, PeftModel) else nullcontext()

    def _seen(self, who: Sequence[Row] | None, rows: int) -> Tensor:
        """What the image encoder says of the picture, (rows, patches, width)."""
        from engine.model import PeftModel

        look, model = self._look, self.model
        if who is None or not isinstance(model, PeftModel):
            return look(1).expand(rows, -1, -1)
        names = {name for row in who for name, _ in mix_of(row)}
        seeing = [layer for place, layer in model.wrappers() if f"{place}.".startswith("vision_model.")]
        if any(layer.holds(name) for layer in seeing for name in names):
            return look(rows)
        if self._plain is None:
            with model.disable_adapter():
                self._plain = look(1)
        return self._plain.expand(rows, -1, -1)

    def _look(self, rows: int) -> Tensor:
        found: Tensor = self.base.vision_model(pixel_values=self.pixels.expand(rows, -1, -1, -1))[0]
        return found


class Captioner:
    """A captioning base in memory, and adapters on it.

    Args:
        base: built-in name, local folder or hub id.
        precision: auto, fp32 or bf16.
        on_progress: told what happens while the base is fetched and loaded.
    """

    def __init__(self, base: str, precision: str = "auto", on_progress: Any = None) -> None:
        from engine.models.captioners import load_captioner

        self.model: nn.Module
        self.model, self.processor = load_captioner(base, precision=precision, on_progress=on_progress)
        self._attached: dict[str, Path] = {}

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._attached)

    def attach(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a name.

        Raises:
            EngineError: it cannot be used on this base.
        """
        from engine.model import PeftModel

        self.detach(name)
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, name)
        self._attached[name] = Path(folder)

    def detach(self, name: str) -> None:
        """Take an adapter off; a name that is not attached is no error."""
        if self._attached.pop(name, None) is None:
            return
        model: Any = self.model
        if self._attached:
            model.delete_adapter(name)
        else:
            self.model = model.unload()

    @property
    def parts(self) -> dict[str, PeftModel]:
        """The model with its adapters, if it has any."""
        from engine.model import PeftModel

        return {"model": self.model} if isinstance(self.model, PeftModel) else {}

    def _pixels(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        where = messages[-1].get("image", "") if messages else ""
        if not where:
            raise PromptError("There is no picture.", "Choose the picture that should be described.")
        found: Tensor = self.processor.image_processor(open_picture(where), return_tensors="pt")["pixel_values"]
        return found

    def as_switched(
        self, messages: Sequence[Mapping[str, str]], names: Sequence[str], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One finished piece, from the model as it is switched now, which goes on from the first adapter's words.

        Raises:
            PromptError, PictureError: as `stream`.
        """
        from engine.generation import Piece
        from engine.tasks.captioning import TASK

        prefix = TASK.restored(self._attached[names[0]]).prefix if names else ""
        text, ended = caption(self.model, self.processor, self._pixels(messages), prefix, sampling)
        yield Piece(0, text, True, "stop" if ended else "length")

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[Row], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One finished piece for each column; the last message's `image` is the picture's path or reference.

        A column is an adapter's name, a mix (name -> weight), which goes on from its first adapter's words, or None for
        the base.

        Raises:
            PromptError: there is no picture.
            PictureError: it cannot be opened.
            ConfigError: a name in `who` is not attached.
        """
        from engine.generation import Piece
        from engine.tasks.captioning import TASK

        pixels = self._pixels(messages)
        check_attached(who, self._attached)
        folders = [next((self._attached[name] for name, _ in mix_of(row)), None) for row in who]
        first = next((folder for folder in folders if folder is not None), None)
        # The base goes on from the same words as the first adapter.
        prefixes = [TASK.restored(own).prefix if (own := folder or first) else "" for folder in folders]
        told = captions(self.model, self.processor, pixels, prefixes, sampling, who)
        for number, (text, ended) in enumerate(told):
            yield Piece(number, text, True, "stop" if ended else "length")
