"""Token ids of shards, before they reach a model: on a GPU a wrong one ends the process."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mpd_data.common.errors import DataError


def require_ids(ids: npt.NDArray[np.integer], vocab_size: int, group: Any, row: int) -> None:
    """Raise DataError, which names the `row` of the row group, for ids that are not those of
    `vocab_size` tokens."""
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise DataError(
            f"{group.path}, row {row} of row group {group.index}: token ids from {ids.min()} to"
            f" {ids.max()}, expected 0 to {vocab_size - 1}. Check the round with `mpd-gen"
            " validate`."
        )
