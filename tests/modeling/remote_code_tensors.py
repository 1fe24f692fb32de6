"""What two runs of one model are compared by; imports nothing of the library."""

import torch
from torch import nn


def aligned(model: nn.Module) -> nn.Module:
    """The model with every tensor in memory of its own: a matrix product's last bit may hang on where its factors lie,
    and those of a file that was just read lie anywhere."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def tensors(output) -> list[torch.Tensor]:
    """Every tensor of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple | list) else ()
    return [tensor for value in values for tensor in tensors(value)]
