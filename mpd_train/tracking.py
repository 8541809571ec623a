"""Trackers that get the metrics beside metrics.jsonl: tensorboard, wandb, trackio."""

import importlib
from pathlib import Path
from typing import Any

from mpd_data.errors import ConfigError

_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PROJECT = "mpd"


def load_trackers(names: list[str]) -> dict[str, Any]:
    """The trackers' modules by name; ConfigError for one that is not installed."""
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--report-to {name} needs {error.name}: pip install"
                " 'mixed-policy-distillation[trackers]'"
            ) from error
    return modules


class Trackers:
    """Runs named like the run's folder, in the project "mpd".

    After a resume tensorboard drops the steps that are done again (purge_step); with wandb and
    trackio a resumed training is a further run of the same name. wandb has been run offline,
    trackio not at all.
    """

    def __init__(
        self, modules: dict[str, Any], out: Path, config: dict[str, Any], done: int
    ) -> None:
        self._writer: Any = None
        self._runs = [module for name, module in modules.items() if name != "tensorboard"]
        if "tensorboard" in modules:
            folder = str(out / "tensorboard")
            self._writer = modules["tensorboard"].SummaryWriter(folder, purge_step=done + 1)
        for run in self._runs:
            run.init(project=_PROJECT, name=out.resolve().name, config=config)

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values = {name: value for name, value in record.items() if name != "step"}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, record["step"])
        for run in self._runs:
            run.log(values, step=record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for run in self._runs:
            run.finish()
