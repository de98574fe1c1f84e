"""Cross-entropy of the positions that have a target, without a table of logits.

    loss_i = log sum_j exp(z_ij) - z_i,target,   z_i = W h_i + b,   d loss_i / d h_i = W^T (softmax(z_i) - onehot)

The loss of a token depends on its own hidden state alone, so its gradient is known as soon as its logits are: a chunk
of tokens goes through the output layer, leaves its losses and gradients, (tokens, d), and its logits are dropped. Plain
autograd holds them, (tokens, vocabulary), three times over.

The model is called as always; in place of its output layer stands one that takes the hidden states. That is done only
where the output layer's result is the model's logits as it is, which the model itself is asked once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine import kernels

_ROOM = 1 << 25  # bytes of a chunk's logits, 32 MiB
_LEAST = 64  # tokens in a chunk, so that the weight is read for enough of them
_WINDOW = 1 << 21  # bytes of float32 that a processor's caches hold on to


class TokenLosses(torch.autograd.Function):
    """(tokens,) float32 from hidden states (tokens, d) and a frozen output layer."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        learns = ctx.needs_input_grad[0]
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        gradient = torch.empty_like(hidden) if learns else None
        # The same room for every chunk: a heap that is asked anew each time finds no hole that is just large enough.
        size = min(max(_LEAST, _ROOM // (weight.shape[0] * weight.element_size())), hidden.shape[0])
        room = hidden.new_empty(size, weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            rows = hidden[part]
            logits = room[: rows.shape[0]]
            if bias is None:
                torch.mm(rows, weight.t(), out=logits)
            else:
                torch.addmm(bias, rows, weight.t(), out=logits)
            _to_gradient(logits, targets[part].unsqueeze(1), losses[part])
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad.unsqueeze(1).to(gradient.dtype), None, None, None


def _to_gradient(logits: Tensor, wanted: Tensor, losses: Tensor) -> None:
    """Writes the losses, (tokens,), and their gradients over the logits, (tokens, vocabulary), in place.

    It goes window by window in float32, so that a processor reads from its caches what it has just written.
    """
    size = max(1, _WINDOW // (4 * logits.shape[1])) if logits.device.type == "cpu" else logits.shape[0]
    windows = list(zip(logits.split(size), wanted.split(size), losses.split(size), strict=True))
    if type(logits).__name__ == "FakeTensor":
        # Shapes without numbers, engine.memory's: one window takes what each of them takes.
        del windows[1:]
    for rows, columns, into in windows:
        wide = rows.float()
        own, top = wide.gather(1, columns), wide.amax(1, keepdim=True)
        shares = torch.softmax(wide, 1)
        # The largest share is exp(top - log sum exp), and never so small that its logarithm would suffer.
        into.copy_((top - shares.amax(1, keepdim=True).log() - own).squeeze(1))
        rows.copy_(shares.scatter_add_(1, columns, torch.full_like(own, -1)))


def token_losses(model: nn.Module, run: Callable[[], Any], pick: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    """The cross-entropy of each target, (targets,), float32.

    Args:
        model: what `run` calls, with whatever is wrapped around it.
        run: calls the model and returns its output.
        pick: from (rows, positions, any) what belongs to the targets, (targets, any).
        targets: token ids.
    """
    head = output_layer(model)
    if head is None:
        return F.cross_entropy(pick(run().logits).float(), targets, reduction="none")
    found: list[Tensor] = []

    def instead(hidden: Tensor) -> Tensor:
        found.append(TokenLosses.apply(pick(hidden), head.weight, head.bias, targets))
        return hidden[..., :1]

    with _standing_in(head, instead):
        run()
    return found[-1]


@contextlib.contextmanager
def _standing_in(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]


_verdicts: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The frozen linear layer whose result is the model's logits; None where the plain formula has to serve."""
    if not kernels.enabled():
        return None
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    base: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    find: Any = getattr(base, "get_output_embeddings", None)
    head: Any = find() if find else None
    # A weight with placements is a part of one, of several processes.
    if type(head) is not nn.Linear or hasattr(head.weight, "placements") or "forward" in head.__dict__:
        return None
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return None
    if head._forward_hooks or head._forward_pre_hooks or torch.is_autocast_enabled(head.weight.device.type):
        return None
    if head not in _verdicts:
        _verdicts[head] = _gives_logits(base, head)
    return head if _verdicts[head] else None


@torch.no_grad()
def _gives_logits(base: Any, head: nn.Linear) -> bool:
    """Whether the model hands the layer's result on as its logits: no cap, no scale, no other layer."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, out: Tensor) -> None:
        seen.append(out)

    ids = torch.tensor([[0, 1]], device=head.weight.device)
    inputs = {"input_ids": ids}
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    was_training = base.training
    hook = head.register_forward_hook(note)
    base.eval()
    try:
        logits = base(**inputs, use_cache=False).logits
    except Exception:
        # A model that takes other inputs: whatever it does with its logits, the plain formula is right.
        return False
    finally:
        hook.remove()
        base.train(was_training)
    if len(seen) != 1:
        return False
    if logits is seen[0] or type(logits).__name__ == "FakeTensor":
        return logits is seen[0]
    return logits.shape == seen[0].shape and torch.equal(logits.float(), seen[0].float())
