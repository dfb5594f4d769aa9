"""Token records made by hand."""

import numpy as np

from megatron_fipo.display.token_file import TokenRecords


def make_records(pieces: tuple[str, ...] | None = ("3+", "4", "=7", "no", "!")) -> TokenRecords:
    """Two samples, sequences 0 and 8: of three tokens in update 1, of two dropped ones in update 3."""
    return TokenRecords(
        sequences=np.array([0, 8], dtype=np.int32),
        updates=np.array([1, 3], dtype=np.int32),
        advantages=np.array([0.75, -1.5], dtype=np.float32),
        starts=np.array([0, 3, 5], dtype=np.int64),
        token_ids=np.array([11, 12, 13, 14, 15], dtype=np.int32),
        places=np.array([0, 1, 2, 0, 1], dtype=np.int32),
        kept=np.array([True, True, True, False, False]),
        old_log_probs=np.array([-0.1, -0.2, -0.3, -2.5, -2.0], dtype=np.float32),
        log_ratio=np.array([0.0, 0.25, -0.5, 1.5, -0.125], dtype=np.float32),
        future_kl=np.array([-0.25, -0.125, -0.5, 1.25, -0.125], dtype=np.float32),
        influence_weights=np.array([0.8, 0.9, 1.0, 1.2, 1.0], dtype=np.float32),
        entropy=np.array([0.5, 0.4, 0.3, 0.2, 0.1], dtype=np.float32),
        pieces=None if pieces is None else list(pieces),
    )
