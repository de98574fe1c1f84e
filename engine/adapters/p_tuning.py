"""P-Tuning (Liu et al., 2021, https://arxiv.org/abs/2103.10385).

    y = f([h; E(x)]), where a small network makes the n embeddings h from n learned vectors e:
    MLP:  h = W3 relu(W2 relu(W1 e))                 LSTM: h = W2 relu(W1 biLSTM(e))      (biases not written)

The file holds h alone, as PEFT reads it. The network lies beside it in `prompt_encoder.safetensors`, so that training
can go on; PEFT takes no notice of that file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from engine.adapters.base import PROMPT, AdapterSpec, PeftType
from engine.adapters.virtual import PromptLearningConfig, VirtualTokens


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network that makes the virtual tokens, by PEFT's names."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-Tuning's settings, by PEFT's names.

    Attributes:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: width of the network; None for the model's own.
        encoder_num_layers: layers of the LSTM; the MLP always has three linear layers.
        encoder_dropout: between the LSTM's layers, in training.
    """

    PEFT_TYPE: ClassVar[PeftType] = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def faults(self) -> list[str]:
        found = super().faults()
        known = [item.value for item in PromptEncoderReparameterizationType]
        kind = self.encoder_reparameterization_type
        if kind in known:
            object.__setattr__(self, "encoder_reparameterization_type", PromptEncoderReparameterizationType(kind))
        else:
            found.append(f"encoder_reparameterization_type is {kind!r}; needed: one of {', '.join(known)}")
        for label in ("encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, label)
            if value is None and label == "encoder_hidden_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                found.append(f"{label} is {value!r}; needed: a whole number from 1")
        share = self.encoder_dropout
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            found.append(f"encoder_dropout is {share!r}; needed: 0 up to, but not including, 1")
        return found

    def fitted(self, model: object) -> PromptEncoderConfig:
        config = super().fitted(model)
        assert isinstance(config, PromptEncoderConfig)
        if config.encoder_hidden_size is None:
            config = config.replace(encoder_hidden_size=config.token_dim)  # type: ignore[assignment]
        return config


class PromptEncoder(nn.Module):
    """e and the network over it; the names are PEFT's."""

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        assert width is not None and hidden is not None
        self.embedding = nn.Embedding(config.rows, width)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type is PromptEncoderReparameterizationType.LSTM:
            layers = config.encoder_num_layers
            # With a single layer there is no place between layers, and torch warns.
            dropout = config.encoder_dropout if layers > 1 else 0.0
            self.lstm_head = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))
        else:
            parts = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
            self.mlp_head = nn.Sequential(*parts, nn.Linear(hidden, width))

    def forward(self) -> Tensor:
        e = self.embedding.weight
        if self.lstm_head is not None:
            e = self.lstm_head(e[None])[0][0]
        made: Tensor = self.mlp_head(e)
        return made


class EncodedTokens(VirtualTokens):
    """h, (n, d)."""

    def make_encoder(self) -> nn.Module:
        return PromptEncoder(self.config)


SPEC = AdapterSpec(
    name="p_tuning",
    title="P-Tuning",
    paper="https://arxiv.org/abs/2103.10385",
    config=PromptEncoderConfig,
    build=None,
    layers=(PROMPT,),
    mergeable=False,
    mixable=False,
    identity_at_start=False,
    prompt=EncodedTokens,
)
