"""What Prompt Tuning, P-Tuning and Prefix Tuning share: learned virtual tokens that the model reads before its input.

Where they stand, and how rows, masks and positions follow, is `engine.prompts`; this is the config and the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine.adapters.base import AdapterConfig, TaskType
from engine.errors import CheckpointError, ConfigError

EMBEDDINGS = "prompt_embeddings"
# The names under which configurations of transformers keep these numbers.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")


@dataclass(frozen=True, kw_only=True)
class PromptLearningConfig(AdapterConfig):
    """What the configs of all prompt methods hold, by PEFT's names. None stands for "read it off the model".

    Attributes:
        num_virtual_tokens: n, how many virtual tokens the model reads.
        token_dim: width of one virtual token.
        num_transformer_submodules: 2 for encoder-decoder models by default, as in PEFT, whose files hold a second,
            unused set of tokens then; 1 for all others.
        num_attention_heads, num_layers: the model's.
        modules_to_save: modules that are trained in full and saved with the adapter.
    """

    UNUSED: ClassVar[Mapping[str, Any]] = {"auto_mapping": None}

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def faults(self) -> list[str]:
        found = []
        for label in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            value = getattr(self, label)
            if value is None and label != "num_virtual_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                found.append(f"{label} is {value!r}; needed: a whole number from 1")
        if self.num_transformer_submodules not in (None, 1, 2):
            found.append(f"num_transformer_submodules is {self.num_transformer_submodules!r}; needed: 1, 2 or None")
        return found

    @property
    def rows(self) -> int:
        """Virtual tokens in the file: PEFT's files for encoder-decoder models hold twice the number that is read."""
        return self.num_virtual_tokens * (self.num_transformer_submodules or 1)

    def fitted(self, model: Any) -> PromptLearningConfig:
        """The config with the model's numbers in the fields that are None.

        Args:
            model: a model with a configuration of transformers.

        Raises:
            ConfigError: the model does not tell its layers, width or heads.
        """
        text = text_config(model)
        found = {
            "num_layers": self.num_layers or _number(text, _LAYERS),
            "token_dim": self.token_dim or _number(text, _WIDTH),
            "num_attention_heads": self.num_attention_heads or _number(text, _HEADS),
            "num_transformer_submodules": self.num_transformer_submodules
            or (2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1),
        }
        missing = [label for label, value in found.items() if value is None]
        if missing:
            raise ConfigError(
                f"{type(model).__name__} does not tell {', '.join(missing)}.",
                f"Give them in {type(self).__name__}.",
            )
        return dataclasses.replace(self, **found)  # type: ignore[arg-type]


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text.

    Raises:
        ConfigError: the model has none.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ConfigError(
            f"{type(model).__name__} has no configuration, so it has no place for virtual tokens.",
            "Prompt methods need a language model of transformers; use LoRA for a plain module.",
        )
    find: Any = getattr(config, "get_text_config", None)
    return find() if find else config


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


class VirtualTokens(nn.Module):
    """One adapter's virtual tokens: the tensor itself, or an encoder that makes it while it is trained.

    An encoder (P-Tuning's network, a prefix's projection) exists only where the adapter can be trained on: PEFT's files
    hold its output alone. What is trained then is `encoder`, otherwise `prompt_embeddings`.

    Attributes:
        before_input: whether the tokens stand before the input's embeddings; False for keys and values.
        count: n, how many the model reads.
    """

    before_input: ClassVar[bool] = True

    def __init__(self, embedding: nn.Module, config: Any) -> None:
        super().__init__()
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        self.config = config
        self.count: int = config.num_virtual_tokens
        self.shape = self.table_shape(config)
        self.encoder: nn.Module | None = None
        self.prompt_embeddings: nn.Parameter | None = None
        encoder = None if config.inference_mode else self.make_encoder()
        if encoder is not None:
            self.encoder = encoder.to(weight.device) if not weight.is_meta else encoder.to("meta")
            return
        table = None if config.inference_mode else self.start(embedding)
        if table is None:
            table = torch.randn(self.shape, device=weight.device, dtype=torch.float32)
        self.prompt_embeddings = nn.Parameter(table.float().clone())

    @staticmethod
    def table_shape(config: Any) -> tuple[int, int]:
        """(tokens, width) of the table in the file."""
        return config.rows, config.token_dim

    def make_encoder(self) -> nn.Module | None:
        """The network that makes the table, with fresh weights; None where the table itself is trained."""
        return None

    def start(self, embedding: nn.Module) -> Tensor | None:
        """The first table of a fresh adapter; None for N(0, 1)."""
        return None

    def forward(self) -> Tensor:
        """The table, (tokens, width), as it is trained."""
        if self.encoder is not None:
            made: Tensor = self.encoder()
            return made
        assert self.prompt_embeddings is not None
        return self.prompt_embeddings

    @torch.no_grad()
    def export(self) -> Tensor:
        """The table as the file holds it; the encoder's dropout plays no part in it."""
        if self.encoder is not None and next(self.encoder.parameters()).is_meta:
            return torch.empty(self.shape, device="meta")
        was_training = self.training
        self.eval()
        try:
            table: Tensor = self()
            return table.detach().float()
        finally:
            self.train(was_training)

    def sidecar(self) -> dict[str, Tensor]:
        """The encoder's tensors by their names; empty without one."""
        return {} if self.encoder is None else dict(self.encoder.state_dict())

    @torch.no_grad()
    def restore(self, table: Tensor, encoder: Mapping[str, Tensor]) -> bool:
        """Take over a file's table and, where it belongs to it, the encoder that made it.

        Returns:
            False if the encoder makes another table, and so was left out: the table is what the adapter answers with.

        Raises:
            CheckpointError: the encoder has other tensors than the config says.
        """
        device = next(self.parameters()).device
        made = self.make_encoder() if encoder else self.encoder
        if made is not None and encoder:
            own = made.state_dict()
            wrong = [k for k in own.keys() | encoder.keys() if k not in own or k not in encoder]
            wrong += [k for k in own.keys() & encoder.keys() if own[k].shape != encoder[k].shape]
            if wrong:
                raise CheckpointError(
                    f"The prompt encoder beside the adapter does not fit its config: {', '.join(sorted(wrong)[:3])}.",
                    "Copy both files again, or delete the encoder's file to use the adapter without it.",
                )
            made.load_state_dict(dict(encoder))
        if made is not None:
            self.encoder, self.prompt_embeddings = made.to(device), None
            self.encoder.train(self.training)
            if torch.allclose(self.export().cpu(), table.float().cpu(), rtol=1e-3, atol=1e-4):
                return True
        self.encoder = None
        self.prompt_embeddings = nn.Parameter(table.float().to(device, copy=True))
        return not encoder
