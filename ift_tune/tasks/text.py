"""A text as character numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        characters: Positions in `alphabet`, shape (N,), int64.
        alphabet: The characters that occur, sorted.
    """

    characters: Tensor
    alphabet: str

    @classmethod
    def of(cls, text: str) -> Text:
        """Number the characters of a text."""
        alphabet = "".join(sorted(set(text)))
        places = {character: i for i, character in enumerate(alphabet)}
        return cls(torch.tensor([places[character] for character in text]), alphabet)
