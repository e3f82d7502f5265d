"""Whether hypergradients still tell λ anything, seen while a run goes on."""

from __future__ import annotations

import logging
from typing import Any

_log = logging.getLogger(__name__)

_ZERO_LOSS = 1e-3  # of the training loss before the first step
_VANISHED = 1e-2  # of the largest hypergradient
_IN_A_ROW = 3  # outer steps: a batch that happens to be easy is not a net that has memorised


class Watch:
    """Counts measurements without a signal, and says when memorised training data leave none.

    Attributes:
        faint: Measurements in a row with more noise than signal, whichever weights there were.
    """

    def __init__(self) -> None:
        """Have seen nothing."""
        self.faint = 0
        self._largest, self._gone, self._said = 0.0, 0, False

    def begin_anew(self) -> None:
        """Forget what other weights have shown, and not what is known of λ."""
        self._gone = 0
        self._largest = 0.0

    def measured(self, signal: float | None) -> None:
        """Note a signal over its noise; None where it could not be told."""
        if signal is not None:
            self.faint = self.faint + 1 if signal < 1.0 else 0

    def stepped(
        self, train_loss: float, first_loss: float | None, length: float, alpha: float | None
    ) -> bool:
        """Note an outer step, and say once if there is no signal left.

        Args:
            train_loss: Of the outer step.
            first_loss: That of the present weights before their first step, where it is known.
            length: The norm of the hypergradient.
            alpha: Of a Neumann series. Where it is 1/λ_max, it grows as the curvature vanishes with
                the loss, and what is left of the hypergradient, mostly noise, with it.

        Returns:
            Whether the weights have memorised the training data, and λ gets no signal from them.
        """
        length /= alpha or 1.0
        self._largest = max(self._largest, length)
        memorised = first_loss is not None and abs(train_loss) <= _ZERO_LOSS * abs(first_loss)
        silent = self.faint > 0 or length <= _VANISHED * self._largest
        self._gone = self._gone + 1 if memorised and silent else 0
        if self._gone == _IN_A_ROW and not self._said:
            self._said = True
            _log.warning(
                "λ gets no signal: the training loss is %.2g, which was %.2g before the first "
                "step, and the hypergradient has vanished with it. Weights that have memorised "
                "the training data do not depend on λ: let them begin anew by reinit_every=5 or "
                "reinit_below=0.1, or take fewer inner steps, a weight decay or a smaller model",
                train_loss,
                first_loss,
            )
        return self._gone > 0

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen."""
        return {
            "faint": self.faint,
            "largest": self._largest,
            "gone": self._gone,
            "said": self._said,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state; that of before anything was watched is None."""
        state = state or {}
        self.faint, self._largest = state.get("faint", 0), state.get("largest", 0.0)
        self._gone, self._said = state.get("gone", 0), state.get("said", False)
