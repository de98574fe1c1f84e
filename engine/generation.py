"""Answering prompts with a base and its adapters, side by side in one batch, word by word.

All columns share one prompt and one key-value cache; each batch row goes through its own adapter or mix of adapters
(`engine.stacked`), and each has its own random generator with the same seed, so a column's answer does not depend on
which others stand beside it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError, PromptError
from engine.rows import Row, check_attached, mix_of

if TYPE_CHECKING:
    from engine.model import PeftModel

# So many answers stand side by side; each is a row of the cache.
MOST_COLUMNS = 8
_UNFINISHED = "\ufffd"
# Among so many of the likeliest tokens lies top_p of the probability nearly always, and nothing else has to be sorted.
_LIKELIEST = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: from the likeliest tokens that make up this share of the probability.
        top_k: from so many of the likeliest; 0 for no limit.
        repetition_penalty: above 1 makes tokens that were used already less likely.
        seed: of each column's random generator.
        beams: of an encoder-decoder model's search at temperature 0; other models answer word by word, without.
        steps: of a picture: how often noise is taken away.
        guidance: of a picture: how much the words count.
    """

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 4
    steps: int = 20
    guidance: float = 7.5

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", 1 <= self.max_new_tokens <= 8192, "1 to 8192"),
            ("temperature", 0 <= self.temperature <= 5, "0 to 5"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 5, "0.1 to 5"),
            ("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63"),
            ("beams", 1 <= self.beams <= 32, "1 to 32"),
            ("steps", 1 <= self.steps <= 1000, "1 to 1000"),
            ("guidance", 0 <= self.guidance <= 100, "0 to 100"),
        )
        found = [f"{name} is {getattr(self, name)}; needed: {need}" for name, good, need in rules if not good]
        if found:
            raise ConfigError("These sampling settings cannot be used:\n" + "\n".join(f"- {item}" for item in found))


@dataclass(frozen=True)
class Piece:
    """New text of one column, or its picture.

    `reason`, with `done`: `stop` (the model ended) or `length` (the limit was reached).
    """

    index: int
    text: str
    done: bool = False
    reason: str = ""
    picture: Any = None


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Token ids (1, T) of a conversation with the assistant's turn opened."""
    from engine.tasks.sequences import render

    if not messages or not any(str(message.get("content", "")).strip() for message in messages):
        raise PromptError("The prompt is empty.", "Write what the model should answer.")
    text = render(tokenizer, messages, answer_next=True)
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids


@torch.no_grad()
def decode(model: nn.Module, tokenizer: Any, ids: Tensor, who: Sequence[Row], sampling: Sampling) -> Iterator[Piece]:
    """Generate for each column of `who`; an empty `who` is one column with the model as it is switched.

    All columns are one batch with one cache. A column ends at its own end token and has a generator of its own, so that
    it says what it would say alone. Adapters with virtual tokens and modules trained in full take part.

    Args:
        ids: the prompt, (1, T).
        who: an adapter's name, a mix (name -> weight) or None (the base) for each column; at most MOST_COLUMNS.

    Raises:
        ConfigError: there are too many columns, or an adapter is not attached or cannot be mixed so.
        PromptError: the prompt leaves no room in the model's context.
        EngineError: the base takes no positions and columns have unequal numbers of virtual tokens; ask one at a time.
    """
    from engine.models.loading import context_length

    _check_columns(model, who)
    columns = max(len(who), 1)
    virtual: Any = getattr(model, "virtual_tokens", None)
    before = virtual(list(who) or None) if virtual else 0
    limit = _room(ids, context_length(model.config), sampling.max_new_tokens, before)
    device = next(model.parameters()).device
    # An adapter that is attached and switched on must not answer for the base.
    extra = {"adapter_names": list(who)} if who and hasattr(model, "switchboard") else {}
    # Only where it changes something: switching the mode forgets what layers keep from call to call.
    was_training = model.training
    if was_training:
        model.eval()
    try:
        step = ids.to(device).expand(columns, -1)
        seen = step
        chosen: list[list[int]] = [[] for _ in range(columns)]
        told = [""] * columns
        open_columns = set(range(columns))
        randoms = [torch.Generator().manual_seed(sampling.seed) for _ in range(columns)]
        ends, cache = end_tokens(model, tokenizer), None
        for count in range(1, limit + 1):
            out = model(input_ids=step, past_key_values=cache, use_cache=True, **_last_only(model), **extra)
            cache = out.past_key_values
            tokens = [
                pick(out.logits[i, -1], seen[i], sampling, randoms[i]) if i in open_columns else 0
                for i in range(columns)
            ]
            for i in sorted(open_columns):
                ended = tokens[i] in ends
                if not ended:
                    chosen[i].append(tokens[i])
                done = ended or count == limit
                text = tokenizer.decode(chosen[i], skip_special_tokens=True)
                if done or not text.endswith(_UNFINISHED):
                    new, told[i] = text[len(told[i]) :], text
                    if new or done:
                        yield Piece(i, new, done, ("stop" if ended else "length") if done else "")
                if done:
                    open_columns.discard(i)
            if not open_columns:
                break
            step = torch.tensor(tokens, device=device)[:, None]
            seen = torch.cat([seen, step], dim=1)
    finally:
        if was_training:
            model.train()


def _check_columns(model: nn.Module, who: Sequence[Row]) -> None:
    from engine.attaching import check_row

    if len(who) > MOST_COLUMNS:
        raise ConfigError(
            f"{len(who)} columns were asked for; needed: at most {MOST_COLUMNS}.", "Answer them in several turns."
        )
    board: Any = getattr(model, "switchboard", None)
    for row in who:
        if board is not None:
            check_row(model, row)  # type: ignore[arg-type]
        elif row not in (None, "__base__"):
            raise ConfigError(
                f"{row!r} cannot answer: the model carries no adapters.",
                "Attach them with PeftModel.from_pretrained or load_adapter first.",
            )


def _room(ids: Tensor, context: int | None, wanted: int, virtual: int = 0) -> int:
    if context is None:
        return wanted
    room = context - ids.shape[1] - virtual
    if room < 1:
        taken = f", of which an adapter's virtual tokens take {virtual}" if virtual else ""
        raise PromptError(
            f"The prompt is {ids.shape[1]} tokens long; the model's context holds {context}{taken}.",
            "Shorten the prompt.",
        )
    return min(wanted, room)


def _last_only(model: nn.Module) -> dict[str, int]:
    from engine.tasks.sequences import takes

    return {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}


def end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the model's own list and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, list | tuple) else {ends}
    return {token for token in {*found, tokenizer.eos_token_id} if token is not None}


def pick(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from one row of logits, (vocabulary,).

    The draw is made on the CPU, so that a seed gives the same words on every device of the same precision.
    """
    scores = logits.float().cpu()
    if sampling.repetition_penalty != 1.0:
        used = torch.unique(seen.cpu())
        values = scores[used]
        penalty = sampling.repetition_penalty
        scores[used] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores = scores / sampling.temperature
    probabilities, order = _likeliest(scores, sampling)
    below = probabilities.cumsum(-1)
    # A token stays while the likelier ones before it make up less than top_p; the first always stays.
    last = int((below - probabilities < sampling.top_p).sum()) - 1
    # One number for each token, however many tokens it could be.
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * below[last]
    return int(order[min(int(torch.searchsorted(below, drawn, right=True)), last)])


def _likeliest(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(probabilities, tokens) from the likeliest down, as far as top_k and top_p can reach."""
    if sampling.top_k:
        found, order = scores.topk(min(sampling.top_k, len(scores)))
        return found.double().softmax(-1), order
    whole = scores.double().logsumexp(-1)
    found, order = scores.topk(min(_LIKELIEST, len(scores)))
    probabilities = (found.double() - whole).exp()
    if len(found) < len(scores) and float(probabilities.sum()) < sampling.top_p:
        found, order = scores.sort(descending=True)
        probabilities = (found.double() - whole).exp()
    return probabilities, order


class Answerer:
    """A base model in memory, and adapters on it.

    Args:
        base: built-in name, local folder or hub id.
        precision: auto, fp32 or bf16.
        on_progress: told what happens while the base is fetched and loaded.
    """

    def __init__(self, base: str, precision: str = "auto", on_progress: Any = None) -> None:
        from engine.models.encoder_decoder import load_seq2seq_lm
        from engine.models.fetch import resolve
        from engine.models.loading import load_causal_lm, load_config

        self.base = base
        # Its weights are needed anyway, and what is wrong with them counts for more than a config.
        resolve(base, on_progress)
        self.rewrites = bool(getattr(load_config(base, on_progress), "is_encoder_decoder", False))
        load = load_seq2seq_lm if self.rewrites else load_causal_lm
        self.model: nn.Module
        self.model, self.tokenizer = load(base, precision=precision, on_progress=on_progress)
        self._attached: dict[str, Path] = {}

    @property
    def attached(self) -> tuple[str, ...]:
        return tuple(self._attached)

    def attach(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a name; the same folder again costs nothing.

        Raises:
            CheckpointError, TargetError, UnsafeFileError: it cannot be used on this base.
        """
        from engine.model import PeftModel

        folder = Path(folder)
        if self._attached.get(name) == folder:
            return
        self.detach(name)
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, name)
        self._attached[name] = folder

    def detach(self, name: str) -> None:
        """Take an adapter off; a name that is not attached is no error."""
        from engine.model import PeftModel

        if self._attached.pop(name, None) is None:
            return
        assert isinstance(self.model, PeftModel)
        if self._attached:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()

    @property
    def parts(self) -> dict[str, PeftModel]:
        """The model with its adapters, if it has any."""
        from engine.model import PeftModel

        return {"model": self.model} if isinstance(self.model, PeftModel) else {}

    def as_switched(
        self, messages: Sequence[Mapping[str, str]], names: Sequence[str], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """One column, from the model as it is switched now; words before the prompt are those of the first of `names`.

        Raises:
            PromptError: as `stream`.
        """
        if self.rewrites:
            from engine.seq2seq import write

            prompt = str(messages[-1].get("content", "")) if messages else ""
            text, ended = write(self.model, self.tokenizer, self._asked(prompt, names, None), sampling)
            yield Piece(0, text, True, "stop" if ended else "length")
            return
        yield from decode(self.model, self.tokenizer, encode_prompt(self.tokenizer, messages), (), sampling)

    def _asked(self, prompt: str, who: Sequence[Row], own: Row) -> str:
        """The prompt with the words that the adapter was trained with; the base gets those of the first adapter."""
        from engine.tasks.seq2seq import TASK

        adapter = next((name for row in (own, *who) for name, _ in mix_of(row)), None)
        if adapter is None or not prompt.strip():
            return prompt
        task = TASK.restored(self._attached[adapter])
        before = task.asked("")
        return prompt if before and prompt.startswith(before) else task.asked(prompt)

    def stream(
        self, messages: Sequence[Mapping[str, str]], who: Sequence[Row], sampling: Sampling
    ) -> Generator[Piece, None, None]:
        """The answers of the base (None), of attached adapters and of mixes (name -> weight) to one conversation.

        Raises:
            PromptError: the prompt is empty or does not fit into the context.
            ConfigError: a name in `who` is not attached, or cannot be mixed so; see `decode`.
        """
        check_attached(who, self._attached)
        if self.rewrites:
            from engine.seq2seq import answers

            # Such a model knows no turns: it reads one text.
            prompt = str(messages[-1].get("content", "")) if messages else ""
            yield from answers(
                self.model, self.tokenizer, [self._asked(prompt, who, row) for row in who], who, sampling
            )
            return
        ids = encode_prompt(self.tokenizer, messages)
        yield from decode(self.model, self.tokenizer, ids, who, sampling)
