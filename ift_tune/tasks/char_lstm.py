"""A recurrent net that reads a text character by character."""

from __future__ import annotations

from torch import Tensor, nn


class CharLSTM(nn.Module):
    """Embedding, two LSTM layers, linear decoder: what comes after each character.

    Each layer is an `nn.LSTM` of its own, so that dropout can act between them.
    """

    def __init__(self, characters: int, embedding: int, hidden: int) -> None:
        """Take the sizes: of the alphabet, of an embedded character, of each layer's state."""
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.layer1 = nn.LSTM(embedding, hidden, batch_first=True)
        self.layer2 = nn.LSTM(hidden, hidden, batch_first=True)
        self.decoder = nn.Linear(hidden, characters)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, characters, T) of the next characters, for inputs (B, T).

        Every window starts from a state of zeros.
        """
        states, _ = self.layer1(self.embedding(inputs))
        states, _ = self.layer2(states)
        logits: Tensor = self.decoder(states)
        return logits.movedim(-1, 1)
