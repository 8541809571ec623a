"""Make command-line options from a pydantic model, so that each setting is stated once.

Nested models are flattened: `sampling.temperature` becomes `--temperature`.
"""

import glob
import json
import re
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from mpd_data.common.command import Option
from mpd_data.common.errors import ConfigError, did_you_mean, nearest, suggestion

Model = TypeVar("Model", bound=BaseModel)
_ABBREVIATIONS = {"lr": "learning_rate"}


def _fields(model: type[BaseModel]) -> Iterator[tuple[str | None, str, Any, Any, str | None]]:
    """Yield (section, name, annotation, default, help) of each option. The default is
    PydanticUndefined for a required one."""
    for name, info in model.model_fields.items():
        nested, fields = info.annotation, {name: info}
        section: str | None = None
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            section, fields = name, nested.model_fields
        for inner, field in fields.items():
            default = field.get_default(call_default_factory=True)
            yield section, inner, field.annotation, default, field.description


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(annotation: Any) -> Any:
    """Return X of `X | None`, else the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _bare(annotation: Any) -> Any:
    """Return X of `Annotated[X, ...]`, else the annotation itself."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _json_object(_: click.Context, option: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param=option) from error
    if not isinstance(parsed, dict):
        raise click.BadParameter("expected a JSON object", param=option)
    return parsed


def _expanded(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Any:
    """Replace patterns (`data/round*`) by the paths that match them, in order."""
    paths: list[Any] = []
    for value in map(str, values):
        # A dataset's URL has a `?` too, and a folder may be called round[1].
        if "://" in value or not glob.has_magic(value) or Path(value).exists():
            paths.append(value)
        elif matches := sorted(glob.glob(value, recursive=True)):  # noqa: PTH207  # also absolute
            paths += matches
        else:
            raise click.BadParameter(f"no file or folder matches {value!r}.", param=option)
    return type(values)(map(type(values[0]), paths)) if values else values


class _Choice(click.Choice[str]):
    """A choice that suggests the value nearest to a misspelt one."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Return the choice as it is: only the names of options ignore `_` and `-`."""
        return str(choice)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the choice. Raise click.BadParameter with a suggestion."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), self.choices)
            if "," in str(value) and param is not None:
                several = " ".join(part.strip() for part in str(value).split(","))
                hint = f" Separate several values by spaces: {param.opts[0]} {several}"
            raise click.BadParameter(f"{error.message}{hint}", ctx, param) from None


def config_options(
    model: type[BaseModel],
    also: dict[str, str] | None = None,
    common: Collection[str] = (),
    paths: Collection[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command one option per field of `model`.

    `also` adds a second spelling. Required options and those in `common` come first in the help,
    the others in one section per nested model, titled by its `heading`. Patterns in the values of
    `paths` are expanded.
    """

    names = [name for _, name, *_ in _fields(model)]
    if len(set(names)) < len(names):
        raise TypeError(f"{model.__name__}: two settings share an option's name")

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for section, name, annotation, default, help_ in reversed(list(_fields(model))):
            plain = _plain(annotation)
            flags = [_flag(name), name]
            if also and name in also:
                flags.insert(1, also[name])
            settings: dict[str, Any] = {"cls": Option, "help": help_}
            if default is PydanticUndefined:
                settings["required"] = True
            else:
                settings |= {"default": default, "show_default": default not in (None, {}, [])}
                if name not in common:
                    owner = model if section is None else model.model_fields[section].annotation
                    settings["section"] = getattr(owner, "heading", None)
            if plain is bool:
                flags[0] += f"/{_flag(f'no_{name}')}" if default else ""
                settings["is_flag"] = True
            elif get_origin(plain) is Literal:
                settings["type"] = _Choice(get_args(plain))
            elif get_origin(plain) is list:
                item = _bare(get_args(plain)[0])
                if get_origin(item) is Literal:
                    item = _Choice(get_args(item))
                settings["type"] = click.Path(path_type=Path) if item is Path else item
                settings |= {"multiple": True, "callback": _expanded if name in paths else None}
            elif get_origin(plain) is dict:
                settings |= {"callback": _json_object, "metavar": "JSON", "default": None}
            else:
                settings["type"] = click.Path(path_type=Path) if plain is Path else plain
            command = click.option(*flags, **settings)(command)
        return command

    return decorate


def build(model: type[Model], options: dict[str, Any]) -> Model:
    """Return the model from a command's parsed options. Raise click.UsageError for bad values."""
    values: dict[str, Any] = {}
    names = set()
    for section, name, *_ in _fields(model):
        names.add(name)
        if options[name] is not None:
            target = values if section is None else values.setdefault(section, {})
            target[name] = options[name]
    try:
        return model(**values)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            # A check of several settings together names them itself.
            place = [_flag(str(part)) for part in e["loc"] if part in names]
            lines.append(": ".join([*place[-1:], e["msg"].removeprefix("Value error, ")]))
        raise click.UsageError("; ".join(lines)) from error


def parse(model: type[Model], values: dict[str, Any], source: str, section: str = "") -> Model:
    """Return the model with the settings of a TOML file or of one `section` of it.

    Raise ConfigError, which names `source`, the dotted path of each bad setting, and for an
    unknown one the setting that was most likely meant.
    """
    prefix = f"{section}." if section else ""
    try:
        return model(**values)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            place = (prefix + ".".join(map(str, e["loc"]))).rstrip(".")
            hint = ""
            if e["type"] == "missing":
                line = f"{place}: required"
            elif e["type"] == "extra_forbidden":
                line = f"{place}: unknown setting"
                meant = _meant(model, e["loc"])
                hint = suggestion(meant and prefix + meant)
            else:
                # Checks of a whole file have no place.
                line = ": ".join(
                    [*([place] if place else []), e["msg"].removeprefix("Value error, ")]
                )
                # Messages of our own checks say already what was found.
                if e["type"] != "value_error":
                    is_nested = isinstance(e["input"], dict | list)
                    value = type(e["input"]).__name__ if is_nested else repr(e["input"])
                    line += f", found {value}"
                if e["type"] == "literal_error":
                    # The message spells the values that exist, each in quotes.
                    hint = did_you_mean(str(e["input"]), re.findall("'([^']*)'", e["msg"]))
            lines.append(f"{line}.{hint}" if hint else line)
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _meant(model: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """Return the dotted path of the setting that was most likely meant by the unknown one at
    `location`: one of the same name in another section, or of a similar name."""
    numbers = [part for part in location if isinstance(part, int)]
    *parents, unknown = ("*" if isinstance(part, int) else part for part in location)
    paths = [path for path in _paths(model) if path.count("*") <= len(numbers)]
    names = {path: path.rpartition(".")[2] for path in paths}
    siblings = [path for path in paths if path == ".".join([*parents, names[path]])]
    unknown = _ABBREVIATIONS.get(unknown, unknown)
    chosen = [path for path in paths if unknown == names[path]]
    for group in (siblings, paths):
        near = nearest(unknown, [names[path] for path in group])
        chosen += [path for path in group if names[path] == near]
    if not chosen:
        return None
    path = chosen[0]
    for number in numbers:
        path = path.replace("*", str(number), 1)
    return path


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of each setting and section; `*` is a place in a list."""
    for name, info in model.model_fields.items():
        yield prefix + name
        inner, below = _plain(info.annotation), f"{prefix}{name}."
        if get_origin(inner) is list:
            inner, below = get_args(inner)[0], f"{below}*."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _paths(inner, below)


def arguments(config: BaseModel) -> list[str]:
    """Return the command line that gives `config`: every setting that is not at its default."""
    result: list[str] = []
    for section, name, annotation, default, _ in _fields(type(config)):
        value = getattr(config if section is None else getattr(config, section), name)
        if value == default or value is None:
            continue
        flag = _flag(name)
        if _plain(annotation) is bool:
            result.append(flag if value else _flag(f"no_{name}"))
            continue
        for item in value if isinstance(value, list) else [value]:
            result += [flag, json.dumps(item) if isinstance(item, dict) else str(item)]
    return result
