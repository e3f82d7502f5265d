"""Padding rows of embeddings: PyTorch gives them no gradient, whatever the loss makes of them."""

from __future__ import annotations

from torch import Tensor, nn

from ift_tune.implicit.vectors import Tensors


def without_padding(model: nn.Module, weights: Tensors, direction: Tensors) -> list[Tensor]:
    """Return a direction of the weights that leaves padding rows where they are.

    The row `padding_idx` of an embedding is a constant of the training: its gradient is 0 by
    definition, so that no derivative along it can be held against a difference of the loss.

    Args:
        model: Whose weights they are.
        weights: The tensors that the direction is of.
        direction: Not modified.

    Example:
        >>> import torch
        >>> from ift_tune.problem.padding import without_padding
        >>> model = torch.nn.Embedding(3, 2, padding_idx=0)
        >>> without_padding(model, [model.weight], [torch.ones(3, 2)])
        [tensor([[0., 0.],
                [1., 1.],
                [1., 1.]])]
    """
    rows = {
        id(module.weight): module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
    }
    found = list(direction)
    for place, weight in enumerate(weights):
        if (row := rows.get(id(weight))) is not None:
            found[place] = found[place].clone()
            found[place][row] = 0.0
    return found
