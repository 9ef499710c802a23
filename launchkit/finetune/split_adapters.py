"""PEFT's adapters on matrices that transformers has shared out among ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def declare_whole_widths(model: nn.Module) -> None:
    """Tells the adapters of a tensor-parallel model how wide their inputs are in all ranks together, in place.

    PEFT 0.21 makes the A matrix of a layer split by rows with this rank's width as its ``in_features``, which
    transformers 5.23 takes for that of all ranks (``RowwiseParallel.transform_inputs_pre_forward``): the first forward
    pass fails otherwise. Call it on what ``get_peft_model`` returns.
    """
    from peft.tuners.lora import LoraLayer  # an optional dependency

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for matrix in layer.lora_A.values():
                if isinstance(matrix, nn.Linear) and isinstance(matrix.weight, DTensor):
                    matrix.in_features = matrix.weight.shape[1]
