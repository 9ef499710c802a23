"""Fused heads: the last linear layer and its loss in one function that never holds all logits.

What each keeps is written down from its source as an autograd function over fake tensors, since the kernels themselves
run on CUDA only (Triton). A loop over rows is run once, with ``recorder.one_pass`` saying how the rows are cut.

Assumed: every position has a label, as in a batch of full sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import Function

from launchkit.errors import MissingExtraError
from launchkit.trace.recorder import Tile, launch, one_pass
from launchkit.units import divide_up

# Source: trl 1.16, ``trl/kernels/chunked_logprob.py`` (``TOKEN_CHUNK_SIZE``) and ``trl/trainer/utils.py``
# (``_CHUNKED_LOGPROB_CHUNK_SIZE``). The buffer of a tile has this width whatever the vocabulary's.
_TRL_TILE_ROWS = 4096
VOCABULARY_TILE = 32768


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype


class ChunkedLogProb(Function):
    """Log-probability, entropy and top-1 flag of each row, over tiles of 4,096 rows and 32,768 vocabulary entries.

    Source: trl 1.16 ``ChunkedLogProbFunction``. On CUDA a Triton kernel folds each tile; on CPU torch operators do,
    TRL's own, which hold fp32 copies of it. Omits: a tile's rows in the compute dtype outlive their pass by a moment.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        on_cuda: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.on_cuda = _compute_dtype(hidden), on_cuda
        statistics = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(7)]
        with one_pass(_trl_tile(hidden)) as tile:
            buffer = hidden.new_empty((tile.rows, VOCABULARY_TILE), dtype=ctx.dtype)
            rows = hidden[: tile.rows].to(ctx.dtype)
        for start, part in _vocabulary_parts(weight):
            narrow = part.to(ctx.dtype)
            with one_pass(tile):
                logits = buffer[:, : len(part)]
                torch.mm(rows, narrow.t(), out=logits)
                del narrow
                if bias is not None:
                    logits.add_(bias[0].to(ctx.dtype))
                if on_cuda:
                    launch("fold", num_bytes=len(hidden) * len(part) * logits.element_size())
                else:
                    few = [targets[: tile.rows], *(s[: tile.rows] for s in statistics)]
                    _trl_kernels()._forward_tile(
                        logits, logits.stride(0), *few, start, len(part), 1.0, 1.0, 1.0,
                        HAS_SOFTCAP=False, HAS_ENTROPY=True, HAS_LOG_SUM_SQ_PROBS=False, HAS_MEAN_LOGITS=False,
                        HAS_IS_TOP1=True, BLOCK_SIZE=0,
                    )  # fmt: skip
        log_z = statistics[0] + torch.log(statistics[1])
        log_probs = statistics[6] - log_z
        entropy = log_z - statistics[2] / statistics[1]
        is_top1 = (statistics[6] >= statistics[0]) & (statistics[6] > statistics[5])
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy)
        ctx.mark_non_differentiable(is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        fp32 = {"dtype": torch.float32}
        grad_hidden = torch.zeros(hidden.shape, **fp32) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, **fp32) if needs_weight else None
        grad_bias = torch.zeros(bias.shape, **fp32) if needs_bias else None
        with one_pass(_trl_tile(hidden)) as tile:
            buffer = hidden.new_empty((tile.rows, VOCABULARY_TILE), dtype=ctx.dtype)
            rows = hidden[: tile.rows].to(ctx.dtype)
        grad_log_probs = gradients[0].float().contiguous() if gradients[0] is not None else log_z
        for start, part in _vocabulary_parts(weight):
            narrow = part.to(ctx.dtype)
            with one_pass(tile):
                logits = buffer[:, : len(part)]
                torch.mm(rows, narrow.t(), out=logits)
                if ctx.on_cuda:
                    launch("fold_backward", num_bytes=2 * len(hidden) * len(part) * logits.element_size())
                else:
                    few = [t[: tile.rows] for t in (targets, log_z, entropy, grad_log_probs, log_z)]
                    _trl_kernels()._backward_tile(
                        logits, logits.stride(0), *few, start, len(part), 1.0, 1.0, 1.0,
                        HAS_SOFTCAP=False, HAS_LOGPROB_GRAD=True, HAS_ENTROPY_GRAD=False, BLOCK_SIZE=0,
                    )  # fmt: skip
            if grad_hidden is not None:
                _accumulate(grad_hidden[: tile.rows], logits, narrow, tile=tile, on_cuda=ctx.on_cuda)
            if grad_weight is not None:
                _accumulate(grad_weight[start : start + len(part)], logits.t(), rows, tile=tile, on_cuda=ctx.on_cuda)
            if grad_bias is not None:
                grad_bias[start : start + len(part)] += logits.sum(dim=0, dtype=torch.float32)
        if grad_weight is not None and grad_weight.dtype == weight.dtype:
            # As far as the log goes it is born when it is complete: only then is it added to what other batches left.
            del grad_weight
            grad_weight = torch.empty(weight.shape, **fp32)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _trl_tile(hidden: torch.Tensor) -> Tile:
    return Tile(len(hidden), most=_TRL_TILE_ROWS)


def _vocabulary_parts(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(weight), VOCABULARY_TILE):
        yield start, weight[start : start + VOCABULARY_TILE]


def _accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, tile: Tile, on_cuda: bool) -> None:
    """``total += a @ b`` in fp32: CUDA has a kernel for 16-bit factors, elsewhere they are widened first."""
    if on_cuda and a.dtype != total.dtype:
        flops = 2 * a.numel() * b.shape[1] * tile.num_rows // tile.rows
        launch("addmm", flops=flops, num_bytes=2 * total.numel() * total.itemsize)
        return
    wide = [t.float() if tile.rows not in t.shape else _widened(t, tile) for t in (a, b)]
    with one_pass(tile):
        total.addmm_(*wide)


def _widened(tensor: torch.Tensor, tile: Tile) -> torch.Tensor:
    with one_pass(tile):
        return tensor.float()


def _trl_kernels() -> Any:
    try:
        from trl.kernels import chunked_logprob
    except ImportError:
        raise MissingExtraError(
            "TRL's loss on a CPU is traced with trl, which is not installed; pip install 'launchkit-planner[train]'"
        ) from None
    return chunked_logprob


class AllRows(Function):
    """``hidden[mask]`` on CUDA where the mask is true everywhere: the indices, a copy, and the copy's way back."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.shape = hidden.shape
        num_rows = hidden.shape[:-1].numel()
        indices = torch.empty((num_rows, hidden.dim() - 1), dtype=torch.int64)  # aten::nonzero
        out = hidden.new_empty((num_rows, hidden.shape[-1]))
        del indices
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        sorting = torch.empty((4, len(gradient)), dtype=torch.int64)  # index_put_ with accumulate sorts its indices
        out = gradient.new_zeros(ctx.shape)
        del sorting
        return out


class LigerCrossEntropy(Function):
    """Gradients in the forward pass, by chunks of rows so many that their logits take about what the rows do.

    Formula: chunk = power of two at or above rows / ⌈vocabulary / hidden⌉. Source: liger-kernel 0.8.5
    ``ops/fused_linear_cross_entropy.py`` with ``accum_dtype=None``, on compute capability 8.0 or later.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        mask = targets != -100
        cast = weight.dtype != _compute_dtype(hidden)
        tile = Tile(len(hidden), parts=divide_up(*weight.shape))
        logits = _liger_logits(hidden, weight, tile, cast=cast)
        if hidden.requires_grad:
            _liger_gradients(logits, hidden, weight, grad_hidden, grad_weight, tile=tile)
        del logits, mask
        ctx.needs = (hidden.requires_grad, weight.requires_grad)
        ctx.held = [grad_hidden, grad_weight]
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Hands over what the forward pass made. As far as the log goes the weight's gradient is born here, in place of
        the buffer that is it: a strategy finds gradients in the backward pass."""
        grad_hidden, grad_weight = ctx.held
        ctx.held = []
        if grad_weight is None:
            return grad_hidden, None, None
        shape, dtype = grad_weight.shape, grad_weight.dtype
        del grad_weight
        return grad_hidden, torch.empty(shape, dtype=dtype), None


def _liger_logits(hidden: torch.Tensor, weight: torch.Tensor, tile: Tile, *, cast: bool) -> torch.Tensor:
    """One chunk's logits. Where autocast has to cast, each chunk casts the whole weight anew: a view is not cached."""
    narrow = weight.to(_compute_dtype(hidden)) if cast else weight
    with one_pass(tile):
        rows = hidden[: tile.rows]
        return torch.mm(rows.to(narrow.dtype), narrow.t())


def _liger_gradients(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor | None,
    *,
    tile: Tile,
) -> None:
    narrow = weight.to(logits.dtype)
    with one_pass(tile):
        launch("cross_entropy", num_bytes=3 * len(hidden) * len(weight) * logits.element_size())
        rows = hidden[: tile.rows].to(logits.dtype)
        if narrow is weight and grad_hidden.dtype == logits.dtype:
            torch.mm(logits, weight, out=grad_hidden[: tile.rows])
        else:
            grad_hidden[: tile.rows] = torch.mm(logits, narrow)
    del narrow
    if grad_weight is None:
        return
    if logits.dtype == torch.float32:
        with one_pass(tile):
            grad_weight += torch.mm(logits.t(), rows)  # no kernel adds fp32 products in place: a second one of its size
        return
    launch("addmm", flops=2 * hidden.numel() * len(weight), num_bytes=2 * grad_weight.numel() * grad_weight.itemsize)


class CutCrossEntropy(Function):
    """No logits at all: a log-sum-exp per row, and in the backward the two gradients.

    Source: cut-cross-entropy 25.1.1 ``cce.py``, ``cce_lse_forward.py``, ``cce_backward.py`` with its defaults (gradient
    filter on, shift). Omits: locks, a few bytes per 128 rows.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        num_rows, vocab_size = len(hidden), len(weight)
        valid = (targets != -100).to(torch.int64)  # indices of the rows that count
        sums = hidden.new_empty(num_rows, dtype=torch.float32)
        average = hidden.new_empty(vocab_size, dtype=torch.float32)
        launch("cce", flops=2 * hidden.numel() * vocab_size, num_bytes=_bytes(hidden, weight))
        ctx.save_for_backward(hidden, weight, sums, targets, valid, average)
        return (hidden.new_empty(num_rows, dtype=torch.float32) + sums).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, weight, _, _, _, average = ctx.saved_tensors
        order = torch.argsort(average).to(torch.int32)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=hidden.dtype) if ctx.needs_input_grad[1] else None
        num_products = 2 if grad_weight is None else 3  # the logits again, and each gradient
        flops = 2 * hidden.numel() * len(weight) * num_products
        launch("cce_backward", flops=flops, num_bytes=2 * _bytes(hidden, weight))
        del order
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
