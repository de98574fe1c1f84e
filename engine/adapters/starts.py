"""First values of A and B that are not LoRA's own: PiSSA, OLoRA and orthogonal, for a matrix W of shape (out, in).

- PiSSA (https://arxiv.org/abs/2404.02948): A0 = sqrt(S/s) V^T, B0 = U sqrt(S/s) from W's r largest singular values.
- OLoRA (https://arxiv.org/abs/2406.01775): A0 = R[:r], B0 = Q[:, :r] from W = Q R.
- Orthogonal (https://datta0.github.io/posts/rethink-lora-init): the rows of a random orthogonal matrix are dealt out to
  A and B in turn, so that B A = 0 although neither is zero; r has to be even.

For the first two B0 A0 is not zero: who uses them subtracts s B0 A0.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from engine.errors import TargetError

Pair = tuple[Tensor, Tensor]
_PISSA = re.compile(r"pissa(_niter_(\d+))?")
NAMES = "'olora', 'orthogonal', 'pissa' or 'pissa_niter_N'"


def is_start(how: object) -> bool:
    """Whether `how` names one of these starts."""
    return isinstance(how, str) and (how == "orthogonal" or takes_from_base(how))


def takes_from_base(how: object) -> bool:
    """Whether the start is a part of W, which has to be subtracted."""
    return isinstance(how, str) and (how == "olora" or _PISSA.fullmatch(how) is not None)


def check_start(how: str, weight: Tensor, r: int, module: str) -> None:
    """What can be said against a start from the weight's type and shape alone, so on the meta device too.

    Raises:
        TargetError: W is quantised, or too small for r.
    """
    if how == "orthogonal":
        return
    if not weight.is_floating_point():
        raise TargetError(
            f"init_lora_weights={how!r} factors the base weight, and {module} is quantised.",
            "Set init_lora_weights=True, or load the base in full or half precision.",
        )
    if r > min(weight.shape):
        raise TargetError(
            f"init_lora_weights={how!r} with r={r} needs a matrix with at least that many singular values; {module} is "
            f"{tuple(weight.shape)}.",
            "Lower r, or give this module a smaller one in rank_pattern.",
        )


def start_of(how: str, weight: Tensor, shape: tuple[int, int], r: int, scale: float, module: str) -> Pair:
    """(A, B) in float32.

    Args:
        weight: W as (out, in), or whatever a quantised layer holds.
        shape: (out, in).
        scale: s, by which B A is multiplied.

    Raises:
        TargetError: W is quantised, not finite, or too small for r; or r is odd for `orthogonal`.
    """
    if how == "orthogonal":
        return _orthogonal(*shape, r, module)
    check_start(how, weight, r, module)
    w = weight.detach().float()
    if not torch.isfinite(w).all():
        raise TargetError(f"{module} holds values that are not finite, so it cannot be factored.", "Load it again.")
    if how == "olora":
        q, upper = torch.linalg.qr(w)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    found = _PISSA.fullmatch(how)
    assert found is not None
    if found.group(1) is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        u, s, vt = u[:, :r], s[:r], vt[:r]
    else:
        u, s, v = torch.svd_lowrank(w, q=r, niter=int(found.group(2)))
        vt = v.T
    root = torch.sqrt(s / scale)
    return root[:, None] * vt, u * root


def _orthogonal(n_out: int, n_in: int, r: int, module: str) -> Pair:
    if r % 2:
        raise TargetError(
            f"init_lora_weights='orthogonal' needs an even rank; at {module} it is {r}.",
            "Set r (and rank_pattern) to even numbers.",
        )
    q = torch.linalg.qr(torch.randn(r, r)).Q
    a, b = q[0::2].T @ torch.randn(n_in, r // 2).T, torch.randn(r // 2, n_out).T @ q[1::2]
    return a / 10, b / 10
