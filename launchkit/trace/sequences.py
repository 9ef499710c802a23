"""A rank's share of each sequence, and the attention that brings shares together: torch's ring, DeepSpeed's Ulysses.

Both run as they are, on the group of ranks that ``trace.parallel`` makes; their buffers and messages are what their own
code asks for. In the ring the first rank is traced, the one that holds most: it takes half of its queries at every
step but the first and puts the halves together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launchkit.errors import MissingExtraError, TraceError
from launchkit.program import CollectiveKind
from launchkit.scenario import TraceKey
from launchkit.trace.recorder import Log

Batch = dict[str, torch.Tensor]

# accelerate's ``cp_comm_strategy`` where none is given: keys and values of all ranks at once, not one rank's at a time.
_RING_METHOD = "allgather"


@contextmanager
def shared_sequences(key: TraceKey, config: PreTrainedConfig, mesh: DeviceMesh | None) -> Iterator[None]:
    """While active, attention is that of a rank which holds a share of each sequence."""
    with ExitStack() as stack:
        if mesh is not None and key.cp > 1:
            from torch.distributed.tensor.experimental import _attention as ring  # lazy: experimental, may move
            from torch.distributed.tensor.experimental import context_parallel

            ring.set_rotate_method(_RING_METHOD)
            tokens = torch.zeros(
                1, key.split.num_pieces
            )  # cut for its length alone, which says that the load is balanced
            stack.enter_context(context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]))
        if mesh is not None and key.sp > 1:
            stack.enter_context(_ulysses(key, config, mesh.get_group()))
        yield


@contextmanager
def _ulysses(key: TraceKey, config: PreTrainedConfig, group: Any) -> Iterator[None]:
    """DeepSpeed's attention in place of the one that is asked for, which it calls on whole sequences and fewer heads.

    Source: DeepSpeed 0.19.8 ``UlyssesSPAttentionHF.register_with_transformers``.
    """
    try:
        from deepspeed.runtime.sequence_parallel import ulysses_sp
        from deepspeed.sequence import layer
    except ImportError:
        raise MissingExtraError(
            "--sp is traced with deepspeed, which is not installed; pip install deepspeed, or use --cp"
        ) from None
    text = config.get_text_config()
    attention = ALL_ATTENTION_FUNCTIONS[str(key.built_attention)]

    def attend(module: Any, query: torch.Tensor, *tensors: Any, **others: Any) -> Any:
        key_states, value_states, _mask, *rest = tensors
        shared = ulysses_sp.UlyssesSPAttentionHF(
            attn=attention,
            batch_size=query.shape[0],
            attn_head_count=text.num_attention_heads,
            attn_head_size=query.shape[-1],
            kv_head_count=text.num_key_value_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=group,
            seq_length_is_variable=True,
        )
        shared.core_attn_implementation = str(key.built_attention)
        return shared(module, query, key_states, value_states, None, *rest, **others)

    with mock.patch.object(ulysses_sp, "dist", dist), mock.patch.object(layer, "dist", dist):
        layer._all_to_all_groups[group.group_name] = group
        ALL_ATTENTION_FUNCTIONS[str(key.built_attention)] = attend
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[str(key.built_attention)]
            layer._all_to_all_groups.pop(group.group_name, None)


def share_of(batch: Batch, key: TraceKey) -> Batch:
    """What of a batch of whole sequences a rank is given, with what the trainer and the engine put beside it.

    The ring's buffers are cut in place, so that each keeps the memory of whole sequences. Source: transformers 5.23
    ``Trainer._prepare_context_parallel_inputs``, torch's ``context_parallel``; DeepSpeed 0.19.8
    ``UlyssesSPDataLoaderAdapter``, transformers' ``deepspeed_sp_compute_loss``.
    """
    if key.cp * key.sp == 1:
        return batch
    num_ranks, tokens = key.cp * key.sp, batch["input_ids"]
    names = ["input_ids", "attention_mask", "position_ids", "shift_labels", *(["labels"] if key.cp > 1 else [])]
    shares = {name: _share(tokens, num_ranks, keeps_whole=key.cp > 1) for name in names}
    return shares if key.cp > 1 else {**shares, "labels": shares["shift_labels"]}


def _share(tokens: torch.Tensor, num_ranks: int, *, keeps_whole: bool) -> torch.Tensor:
    num_rows, length = tokens.shape
    held = torch.zeros(num_rows * (length if keeps_whole else length // num_ranks), dtype=tokens.dtype)
    return held[: num_rows * (length // num_ranks)].view(num_rows, -1)


def check_ring(log: Log, key: TraceKey) -> None:
    """Raises ``TraceError`` where attention did not go round: another kernel was chosen than the ring has."""
    goes_round = any(
        record.kind is CollectiveKind.ALL_GATHER and record.place.stage.startswith("forward.")
        for record in log.collectives
    )
    if key.cp > 1 and not goes_round:
        raise TraceError("this model's attention takes a kernel that torch's ring has not; use --tp, or no --cp")
