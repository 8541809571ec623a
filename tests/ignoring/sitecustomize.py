"""Makes this process ignore the option that MPD_IGNORED names, as "mpd-train --alpha".

Python imports it at its start where this folder is on PYTHONPATH; ../ignore_option.py puts it
there. A setting stays at its default in the command's model of settings, however that is made
(command line, TOML, test); a command's other parameters are parsed as if they had not been given.
What has no default gets a value that nobody asked for.
"""

import os
from pathlib import Path

import click
from pydantic import BaseModel

_SETTINGS = {
    "InitConfig": "mpd-gen init",
    "RolloutsConfig": "mpd-gen rollouts",
    "RewriteConfig": "mpd-gen rewrite",
    "TrainConfig": "mpd-train",
}
_PROGRAMS = {
    ("mpd_data", "cli.py"): "mpd-gen",
    ("mpd_train", "cli.py"): "mpd-train",
    ("mpd_train", "export_cli.py"): "mpd-export",
    ("mpd_rounds", "cli.py"): "mpd-rounds",
    ("report", "cli.py"): "mpd-report",
}


def _ignored():
    """(command, option)"""
    command, _, option = os.environ.get("MPD_IGNORED", "").rpartition(" ")
    return command, option


def _another(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_another, value))
    return type(value)(os.environ["MPD_IGNORED_FOLDER"])


def _default(model, name):
    info = type(model).model_fields[name]
    if info.is_required():
        return _another(getattr(model, name))
    return info.get_default(call_default_factory=True)


_init = BaseModel.__init__


def _made(self, /, **values):
    _init(self, **values)
    command, option = _ignored()
    if _SETTINGS.get(type(self).__name__) != command:
        return
    name = option.removeprefix("--").replace("-", "_")
    for field, value in list(self):
        if field == name:
            self.__dict__[field] = _default(self, name)
        elif isinstance(value, BaseModel) and name in type(value).model_fields:
            self.__dict__[field] = value.model_copy(update={name: _default(value, name)})


# Pydantic looks for this: models are then still made without a call of __init__ inside others.
_made.__pydantic_base_init__ = True
BaseModel.__init__ = _made

_invoke = click.Command.invoke


def _invoked(self, context):
    root = context.find_root()
    program = _PROGRAMS.get(Path(root.command.callback.__code__.co_filename).parts[-2:], "")
    names = [] if context is root else [context.info_name]
    command, option = _ignored()
    if command == " ".join([program, *names]):
        for parameter in self.params:
            if option in (*parameter.opts, parameter.name.upper()):
                _forget(parameter, context)
    return _invoke(self, context)


def _forget(parameter, context):
    given = context.params[parameter.name]
    if not parameter.required:
        fresh = click.Command("fresh", params=[parameter]).make_context("fresh", [])
        context.params[parameter.name] = fresh.params[parameter.name]
    elif isinstance(parameter.type, click.Choice):
        context.params[parameter.name] = next(iter(parameter.type.choices))
    else:
        context.params[parameter.name] = _another(given)


click.Command.invoke = _invoked
