"""What the readers of a JSON object rely on, checked before they do: a disk, an editor or another
tool may have changed what a command wrote."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mpd_data.common.errors import DataError


class Record(BaseModel):
    """What the readers of a JSON object rely on. It may hold more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


def require(model: type[Record], value: Any, source: str, remedy: str) -> None:
    """Raise DataError unless `value`, parsed JSON, is what `model` says. The message begins with
    `source`, says where the value differs, and ends with `remedy`."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, found = ".".join(map(str, first["loc"])), f"{first['input']!r:.80}"
        where = f"{place}: " if place else ""
        # Users do not know our classes.
        wanted = re.sub(r" or instance of \w+", "", first["msg"])
        raise DataError(f"{source}: {where}{wanted}, found {found}. {remedy}") from error
