"""Captions of pictures: the decoder's words for one picture, and a base with adapters side by side."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.data.images import open_picture
from engine.errors import PromptError
from engine.rows import Row, check_attached, mix_of

if TYPE_CHECKING:
    from engine.generation import Piece, Sampling
    from engine.model import PeftModel


@torch.no_grad()
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
    tokenizer = processor.tokenizer
    weight = next(p for p in model.parameters() if p.is_floating_point())
    # BLIP puts its own start token over the first, and takes the end token off.
    start = tokenizer(prefix, return_tensors="pt")["input_ids"].to(weight.device)
    how: dict[str, Any] = {"do_sample": False, "num_beams": sampling.beams}
    if sampling.temperature:
        how = {"do_sample": True, "num_beams": 1, "temperature": float(sampling.temperature)}
        how |= {"top_p": float(sampling.top_p), "top_k": sampling.top_k}
    if who != "" and hasattr(model, "switchboard"):
        how["adapter_names"] = [who]
    find: Any = getattr(model, "get_base_model", None)
    base: Any = find() if find else model
    room = base.config.text_config.max_position_embeddings - start.shape[1]
    before = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
            torch.manual_seed(sampling.seed)
            out = model.generate(  # type: ignore[operator]
                pixel_values=pixels.to(weight.device, weight.dtype),
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=min(sampling.max_new_tokens, room),
                repetition_penalty=sampling.repetition_penalty,
                **how,
            )[0]
    finally:
        model.train(before)
    new = out[start.shape[1] - 1 :]
    return tokenizer.decode(new, skip_special_tokens=True).strip(), tokenizer.sep_token_id in new.tolist()


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
        for number, row in enumerate(who):
            # The base goes on from the same words as the first adapter.
            folder = folders[number] or first
            prefix = TASK.restored(folder).prefix if folder else ""
            text, ended = caption(self.model, self.processor, pixels, prefix, sampling, row)
            yield Piece(number, text, True, "stop" if ended else "length")
