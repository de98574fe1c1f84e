"""Prefix Tuning (Li and Liang, 2021, https://arxiv.org/abs/2101.00190), and P-Tuning v2 (Liu et al., 2021,
https://arxiv.org/abs/2110.07602), which is the same for every kind of model and with a trained head.

    y_l = attention(Q, [PK_l; K], [PV_l; V]),   PK_l, PV_l: (n, d), learned, at each layer l before the text's own

Without projection the table (n, 2 L d) is trained; with `prefix_projection` it is W2 tanh(W1 e) of n learned vectors e,
kept beside the file in `prompt_encoder.safetensors`, so that training can go on. d is heads * head width, of the keys'
heads where the model has fewer of them (grouped-query attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import PROMPT, AdapterSpec, PeftType
from engine.adapters.virtual import PromptLearningConfig, VirtualTokens, text_config
from engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix Tuning's settings, by PEFT's names.

    Attributes:
        prefix_projection: make the prefixes by a small network while training.
        encoder_hidden_size: its width; None for token_dim.
        init_weights: None for random values, `zero` for keys and values of zero.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.PREFIX_TUNING

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    def faults(self) -> list[str]:
        found = super().faults()
        if not isinstance(self.prefix_projection, bool):
            found.append(f"prefix_projection is {self.prefix_projection!r}; needed: True or False")
        size = self.encoder_hidden_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            found.append(f"encoder_hidden_size is {size!r}; needed: a whole number from 1")
        if self.init_weights not in (None, "zero"):
            found.append(f"init_weights is {self.init_weights!r}; needed: zero or None")
        heads, width = self.num_attention_heads, self.token_dim
        if heads and width and width % heads:
            found.append(f"token_dim is {width}; needed: a multiple of the {heads} attention heads")
        return found

    def fitted(self, model: Any) -> PrefixTuningConfig:
        """As for every prompt method; the heads are those of the keys, and the width is theirs together.

        Raises:
            ConfigError: given heads, width or layers are not the model's.
        """
        text = text_config(model)
        own = PromptLearningConfig(task_type=self.task_type).fitted(model)
        assert own.num_attention_heads is not None and own.token_dim is not None
        # T5's heads need not add up to its width.
        each = (
            getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or own.token_dim // own.num_attention_heads
        )
        heads = getattr(text, "num_key_value_heads", None) or own.num_attention_heads
        layers = own.num_layers
        if getattr(text, "is_encoder_decoder", False):
            layers = getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None) or layers
        asked = (self.num_attention_heads, self.token_dim, self.num_layers)
        needed = (heads, heads * each, layers)
        if any(a is not None and a != b for a, b in zip(asked, needed, strict=True)):
            raise ConfigError(
                f"The prefix is for {asked[0]} heads, a width of {asked[1]} and {asked[2]} layers; "
                f"{type(model).__name__} has {needed[0]}, {needed[1]} and {needed[2]}.",
                "Leave num_attention_heads, token_dim and num_layers out, or load the base that it was made for.",
            )
        return self.replace(  # type: ignore[return-value]
            num_attention_heads=heads,
            token_dim=heads * each,
            num_layers=layers,
            num_transformer_submodules=self.num_transformer_submodules or own.num_transformer_submodules,
            encoder_hidden_size=self.encoder_hidden_size or heads * each,
        )


class PrefixEncoder(nn.Module):
    """e and the projection over it; the names are PEFT's."""

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        width, hidden, layers = config.token_dim, config.encoder_hidden_size, config.num_layers
        assert width is not None and hidden is not None and layers is not None
        self.embedding = nn.Embedding(config.num_virtual_tokens, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, layers * 2 * width))
        if config.init_weights == "zero":
            nn.init.zeros_(self.transform[-1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.transform[-1].bias)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        made: Tensor = self.transform(self.embedding.weight)
        return made


class PrefixTokens(VirtualTokens):
    """Keys and values of all layers, (n, 2 L d)."""

    before_input: ClassVar[bool] = False

    @staticmethod
    def table_shape(config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim

    def make_encoder(self) -> nn.Module | None:
        return PrefixEncoder(self.config) if self.config.prefix_projection else None

    def start(self, embedding: nn.Module) -> Tensor | None:
        if self.config.init_weights != "zero":
            return None
        assert isinstance(embedding.weight, Tensor)
        return torch.zeros(self.shape, device=embedding.weight.device)

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer, (heads, n, head width).

        With two submodules PEFT counts four tensors a layer, of which the last two are dropped, and begins anew when
        it is through: layer l reads the numbers 4 l and 4 l + 1 modulo 2 L. Its files mean that.
        """
        config, n = self.config, self.count
        heads, slots = config.num_attention_heads, 2 * config.num_layers
        table = self().view(n, slots, heads, config.token_dim // heads).permute(1, 2, 0, 3)
        step = 2 * config.num_transformer_submodules
        return [(table[step * layer % slots], table[(step * layer + 1) % slots]) for layer in range(config.num_layers)]


SPEC = AdapterSpec(
    name="prefix_tuning",
    title="Prefix Tuning (P-Tuning v2)",
    paper="https://arxiv.org/abs/2101.00190",
    config=PrefixTuningConfig,
    build=None,
    layers=(PROMPT,),
    mergeable=False,
    mixable=False,
    identity_at_start=False,
    prompt=PrefixTokens,
)
