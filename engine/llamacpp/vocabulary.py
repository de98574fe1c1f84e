"""A tokenizer in llama.cpp's terms: its tokens and their kinds, merges or scores, and how texts are cut before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from engine.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"
"""What stands for a space in SentencePiece's tokens."""
_WRITTEN = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_UNCUT = {"type": "Metaspace", "replacement": _SPACE, "split": False}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for GGUF.

    Attributes:
        model: `gpt2` (byte-level BPE, by merges) or `llama` (SentencePiece's BPE, by scores).
        pre: llama.cpp's name of the rule that cuts texts into words.
        tokens: the text of each id.
        kinds: its kind.
        merges: pairs, the first to be merged first; of `gpt2`.
        scores: of each id, the highest merged first; of `llama`.
        special: `bos`, `eos`, `unk`, `pad` -> id, for those that there are.
        adds: `bos`, `eos` -> whether encoding a text adds it.
        space_prefix: whether a text begins with a space that was not written.
        template: the chat template, "" without one.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: Mapping[str, int] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    space_prefix: bool = False
    template: str = ""

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add it to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for name, number in self.special.items():
            add[name](number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.space_prefix)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    Args:
        tokenizer: one of the fast kind, with a BPE.
        size: rows of the embedding; ids without a token are filled up.

    Raises:
        ConfigError: a kind of tokenizer, or a rule that cuts texts, that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"The tokenizer is a {type(tokenizer).__name__}; needed: one with a tokenizer.json.")
    layout: dict[str, Any] = json.loads(backend.to_str())
    model = layout["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"The tokenizer is of the kind {model.get('type')}; needed: BPE.", "Save the merged model.")
    ids: dict[str, int] = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise ConfigError(
            f"The tokenizer has the token {max(ids.values())}, and the model's embedding {size} rows.",
            "Resize the embedding, or take the tokenizer that belongs to the model.",
        )
    added = {entry["id"]: entry for entry in layout["added_tokens"]}
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for text, number in ids.items():
        entry = added.get(number)
        tokens[number] = text
        kinds[number] = NORMAL if entry is None else CONTROL if entry["special"] else USER
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    probe = tokenizer("a")["input_ids"]
    known: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "special": {name: number for name, number in named.items() if number is not None},
        "adds": {
            "bos": named["bos"] is not None and probe[0] == named["bos"],
            "eos": named["eos"] is not None and probe[-1] == named["eos"],
        },
        "template": _template(tokenizer.chat_template),
    }
    if model.get("byte_fallback"):
        return _sentencepiece(layout, pairs, known)
    return Vocabulary("gpt2", _words(layout), merges=[" ".join(pair) for pair in pairs], **known)


def _template(template: Any) -> str:
    """The chat template; of several by name the usual one."""
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def _words(layout: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE cuts texts into words.

    Raises:
        ConfigError: none of those that are known here, or one that llama.cpp merges in another way.
    """
    parts = layout["pre_tokenizer"] or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    rules = [rule for rule in map(_rule, parts) if rule]
    found = {("digits", "words"): "smollm", ("words",): "gpt-2", ("llama3", "bytes"): "llama-bpe"}.get(tuple(rules))
    # Only Llama 3's words are looked up whole before they are merged.
    whole = bool(layout["model"].get("ignore_merges"))
    if found is None or layout["normalizer"] is not None or whole != (found == "llama-bpe"):
        shown = " and ".join(f"{part.get('type')}{_shown(part)}" for part in parts)
        more = f", normalizer {layout['normalizer'].get('type')}" if layout["normalizer"] else ""
        raise ConfigError(
            f"The tokenizer cuts texts by {shown}{more}, for which llama.cpp's name is not known here; needed: the rule"
            " of GPT-2, SmolLM or Llama 3.",
            "Save the merged model, and convert it with llama.cpp's own script.",
        )
    return found


def _rule(part: Mapping[str, Any]) -> str:
    """One step of cutting: `digits` (each alone), `words` (GPT-2's), `llama3`, `bytes` (no cut), "?" for any other."""
    kind = part.get("type")
    if kind == "Digits":
        return "digits" if part.get("individual_digits") else "?"
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "words" if part.get("use_regex", True) else "bytes"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"].get("Regex")
        return {r"\d": "digits", r"\p{N}": "digits", _LLAMA3: "llama3"}.get(pattern, "?")
    return "?"


def _shown(part: Mapping[str, Any]) -> str:
    pattern = part.get("pattern")
    return f" {str(next(iter(pattern.values())))[:60]!r}" if isinstance(pattern, Mapping) and pattern else ""


def _sentencepiece(layout: Mapping[str, Any], pairs: list[tuple[str, ...]], known: dict[str, Any]) -> Vocabulary:
    """A BPE that SentencePiece trained: llama.cpp merges by a score of each token, here the place of its first merge.

    Raises:
        ConfigError: spaces are written in another way, or some ways to make a token are no merges, so that scores would
            merge differently.
    """
    prefix = _prefixed(layout)
    first: dict[str, int] = {}
    for place, (left, right) in enumerate(pairs):
        first.setdefault(left + right, place)
    made, ids = set(pairs), set(known["tokens"])
    for token in first:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids and (left, right) not in made:
                raise ConfigError(
                    f"The tokenizer never makes {token!r} of {left!r} and {right!r}, as llama.cpp would.",
                    "Save the merged model, and convert it with llama.cpp's own script.",
                )
    kinds, unk = list(known["kinds"]), known["special"].get("unk")
    for number, token in enumerate(known["tokens"]):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[number] = BYTE
    if unk is not None:
        kinds[unk] = UNKNOWN
    last = float(-len(pairs) - 1)
    scores = [float(-first[token]) if token in first else last for token in known["tokens"]]
    return Vocabulary("llama", "default", scores=scores, space_prefix=prefix, **{**known, "kinds": kinds})


def _prefixed(layout: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, where spaces are written as Llama 2 does."""
    steps = layout["normalizer"] or {}
    steps = steps["normalizers"] if steps.get("type") == "Sequence" else [steps] if steps else []
    words = layout["pre_tokenizer"]
    prepended = [step for step in steps if step.get("type") == "Prepend" and step.get("prepend") == _SPACE]
    others = [{key: step.get(key) for key in _WRITTEN} for step in steps if step not in prepended]
    if words is None and others == [_WRITTEN]:
        return bool(prepended)
    cut = words is not None and {key: words.get(key) for key in _UNCUT} == _UNCUT
    if cut and not steps:
        return bool(words["prepend_scheme"] != "never")
    raise ConfigError(
        "The tokenizer writes spaces in a way that llama.cpp does not have; needed: Llama 2's.",
        "Save the merged model, and convert it with llama.cpp's own script.",
    )
