"""Damage files as disks, editors, other tools and people do: for test_fuzz.py.

`damage` takes the `draw` of a hypothesis strategy, so that a failing case is made small. What holds
structure (JSON, TOML, Parquet) is mostly damaged in its structure: bytes that are flipped at random
would only ever test the parsers.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import tomllib

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

# Python's parsers recurse: 100,000 levels end every one of them.
_DEEP = "\x02deep\x02"
_DEPTH = 100_000
_TEXT = (
    "", " ", "0", "-1", "nan", "None", "a\0b", "\x1b[31m", "\ufeff", "é" * 300, "x" * 70_000,
    "../..", "/", ".", "{{problem}}", "{{x}}", "(?P<a", "\U0001f600",
    "hf://a/b?split=train", "2026-11-01",
)  # fmt: skip
_HALF = "\ud800"  # half a character, which JSON can hold
_NUMBERS = (
    0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 2**31, -(2**31), 2**63,
    2**64, 10**400,
)  # fmt: skip
odd = st.sampled_from(
    [None, True, False, *_NUMBERS, *_TEXT, _HALF, _DEEP, [], {}, [None], [[]], [{}], {"": None}]
)


def damage(draw, path, other=None):
    """Damage the file `path`; `other` is one that may be put in its place. Return what was done."""
    by_suffix = {".json": _json, ".jsonl": _jsonl, ".toml": _toml, ".parquet": _parquet}
    structure = by_suffix.get(path.suffix)
    kinds = [_bytes, _place] + ([structure] * 4 if structure else [_bytes])
    try:
        change = draw(st.sampled_from(kinds))
        return f"{path.name}: {change(draw, path, other)}"
    except (ValueError, KeyError, pa.ArrowException):
        # It was damaged before, and has no structure any more.
        return f"{path.name}: {_bytes(draw, path, other)}"


# -- any file ---------------------------------------------------------------------------------


def _place(draw, path, other):
    """Damage the file's place in its folder, not its content."""
    kind = draw(st.sampled_from(["missing", "folder", "loop", "nowhere", "other", "unreadable"]))
    if kind == "other" and (other in (None, path) or not other.is_file()):
        kind = "missing"
    if kind == "unreadable":
        if os.geteuid():
            path.chmod(0)
            return kind
        kind = "folder"  # root reads everything
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "other":
        shutil.copy(other, path)
    return kind


def _bytes(draw, path, _):
    if not path.is_file():
        path.unlink(missing_ok=True) if path.is_symlink() else shutil.rmtree(path, True)
        path.write_bytes(b"")
        return "empty"
    content = path.read_bytes()
    kind = draw(st.sampled_from(_BYTE_KINDS))
    at = draw(st.integers(0, len(content)))
    if kind == "flip":
        for place in [at, *draw(st.lists(st.integers(0, len(content)), max_size=3))]:
            flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in content[place : place + 1])
            content = content[:place] + flipped + content[place + 1 :]
    elif kind == "end":  # where Parquet has its footer
        at = draw(st.integers(0, min(len(content), 600)))
        at = len(content) - at
        content = content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
    elif kind == "truncate":
        content = content[:at]
    elif kind == "insert":
        content = content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    elif kind == "cut":
        content = content[:at] + content[at + draw(st.integers(1, 200)) :]
    elif kind == "repeat":
        content = content[:at] + content[max(0, at - draw(st.integers(1, 400))) :]
    elif kind == "long line":
        content = content[:at] + b"a" * 300_000 + content[at:]
    elif kind == "control":
        content = content[:at] + bytes(range(32)) + content[at:]
    elif kind == "zeros":  # what a crash leaves of a file that was not synced
        content = bytes(len(content))
    elif kind == "utf-16":
        content = content.decode("utf-8", "replace").encode("utf-16")
    elif kind == "bom":
        content = b"\xef\xbb\xbf" + content
    elif kind == "empty":
        content = b""
    path.write_bytes(content)
    return f"{kind} at {at}"


_BYTE_KINDS = (
    "flip", "end", "truncate", "insert", "cut", "repeat", "long line", "control", "zeros", "utf-16",
    "bom", "empty",
)  # fmt: skip


# -- JSON and TOML ----------------------------------------------------------------------------


def _places(value):
    """Yield (container, key) of everything in nested lists and objects."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list) and value[key]:
            yield from _places(value[key])


def edit(draw, value):
    """Return `value`, of JSON types, with one change in it, and what was changed."""
    value = copy.deepcopy(value)
    places = list(_places(value)) if isinstance(value, dict | list) else []
    new = draw(odd)
    if not places or draw(st.integers(0, 19)) == 0:
        return new, f"all is {_shown(new)}"
    # The outer ones count more than the many inside.
    shallow = [place for place in places if place[0] is value]
    container, key = draw(st.sampled_from(draw(st.sampled_from([shallow, places]))))
    kind = draw(st.sampled_from(["replace"] * 4 + ["delete", "rename", "add", "text", "wrap"]))
    old = container[key]
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[draw(st.sampled_from([f"{key}s", key.upper(), "", f" {key}", "é"]))] = (
            container.pop(key)
        )
    elif kind == "add":
        container.update({"new": new}) if isinstance(container, dict) else container.append(new)
    elif kind == "text":
        container[key] = str(old)
    elif kind == "wrap":
        container[key] = [old]
    else:
        container[key] = new
    return value, f"{kind} {key!r}: {_shown(new)}"


def _shown(value):
    return repr(value)[:40]


def _dumped(value):
    text = json.dumps(value, ensure_ascii=True)
    return text.replace(json.dumps(_DEEP), _NESTED)


_NESTED = "[" * _DEPTH + "]" * _DEPTH


def _json(draw, path, _):
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and value and draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from(sorted(value)))
        twice = f"{json.dumps(key)}: {_dumped(draw(odd))}, {json.dumps(key)}:"
        path.write_text(json.dumps(value).replace(f"{json.dumps(key)}:", twice, 1))
        return f"{key!r} twice"
    value, done = edit(draw, value)
    path.write_text(_dumped(value) + "\n", encoding="utf-8")
    return done


def _jsonl(draw, path, _):
    lines = path.read_text(encoding="utf-8").splitlines()
    at = draw(st.integers(0, len(lines) - 1)) if lines else 0
    kind = draw(st.sampled_from(["edit"] * 4 + ["twice", "gone", "moved", "unended", "blank"]))
    if kind == "edit":
        value, kind = edit(draw, json.loads(lines[at]))
        lines[at] = _dumped(value)
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "gone":
        del lines[at]
    elif kind == "moved":
        lines.append(lines.pop(at))
    elif kind == "blank":
        lines.insert(at, "")
    end = "" if kind == "unended" else "\n"
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return f"line {at + 1}: {kind}"


def _toml(draw, path, _):
    value, done = edit(draw, tomllib.loads(path.read_text(encoding="utf-8")))
    path.write_text(toml(value), encoding="utf-8")
    return done


def toml(value):
    """Return a document with these settings, as far as TOML can hold them."""
    if not isinstance(value, dict):
        return _in_toml(value)
    return "".join(f"{json.dumps(key)} = {_in_toml(item)}\n" for key, item in value.items())


def _in_toml(value):
    if value == _DEEP:
        return _NESTED
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_in_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value == "2026-11-01":
        return value  # a date is a type of TOML
    return '"null"' if value is None else json.dumps(value)


# -- Parquet ----------------------------------------------------------------------------------


def _parquet(draw, path, _):
    """Write the table again: a whole Parquet file that is not what the contract says."""
    table = pq.read_table(path, partitioning=None)
    kind = draw(st.sampled_from(list(_TABLES)))
    settings = {}
    if kind == "groups":
        with pq.ParquetWriter(path, table.schema) as writer:
            for size in draw(st.lists(st.sampled_from([0, 1, len(table)]), min_size=1, max_size=4)):
                writer.write_table(table[:size])
        return kind
    if kind == "written otherwise":
        settings = {"compression": "none", "use_dictionary": True, "version": "1.0"}
    result = _TABLES[kind](draw, table)
    pq.write_table(result, path, **settings)
    return kind


def _any_column(draw, table):
    return draw(st.integers(0, table.num_columns - 1))


def _cell(draw, table):
    index = _any_column(draw, table)
    column = table.column(index)
    values, fits = column.to_pylist(), _CELLS[_family(column.type)]
    for at in draw(st.lists(st.integers(0, max(len(values) - 1, 0)), min_size=1, max_size=2)):
        if values:
            values[at] = draw(st.sampled_from(fits))
    field = table.schema.field(index).with_nullable(True)
    if draw(st.booleans()) and None not in values:
        field = table.schema.field(index)
    return table.set_column(index, field, pa.array(values, column.type, from_pandas=False))


def _family(type_):
    checks = {"list": pa.types.is_list, "text": pa.types.is_string, "int": pa.types.is_integer}
    checks |= {"float": pa.types.is_floating, "bool": pa.types.is_boolean}
    return next((name for name, is_one in checks.items() if is_one(type_)), "other")


_CELLS = {
    "list": [None, [], [0], [-1], [1] * 5000],
    "text": [None, "", "\0", "0" * 32, "f" * 32, "ok", "stop", "x" * 70_000, "[]", '{"a":1}', "{"],
    "int": [None, 0, -1, 1, 2**31 - 1, -(2**31)],
    "float": [None, 0.0, -1.0, 65504.0, math.nan, math.inf, -math.inf],
    "bool": [None, True, False],
    "other": [None],
}


def _retyped(draw, table):
    index = _any_column(draw, table)
    name, column = table.schema.field(index).name, table.column(index)
    kinds = ["dictionary", "null", "text", "large", "int64", "double", "bytes"]
    kind = draw(st.sampled_from(kinds))
    if kind == "dictionary" and not pa.types.is_list(column.type):
        new = column.dictionary_encode()
    elif kind == "text":
        new = pa.chunked_array([pa.array([str(x) for x in column.to_pylist()], pa.string())])
    elif kind in ("large", "int64", "double", "bytes"):
        types = {"int64": pa.int64(), "double": pa.float64(), "bytes": pa.binary()}
        target = types.get(kind, pa.large_string())
        if pa.types.is_list(column.type):
            target = pa.large_list(column.type.value_type) if kind == "large" else pa.list_(target)
        try:
            new = column.cast(target)
        except pa.ArrowException:
            new = pa.nulls(len(column), target)
    else:
        new = pa.nulls(len(column), pa.null())
    return table.set_column(index, name, new)


def _all_null(draw, table):
    index = _any_column(draw, table)
    field = table.schema.field(index).with_nullable(True)
    return table.set_column(index, field, pa.nulls(len(table), field.type))


def _renamed(draw, table):
    names = table.column_names
    index = _any_column(draw, table)
    names[index] = draw(st.sampled_from([names[index].upper(), "", "new", names[0]]))
    return table.rename_columns(names)


def _twice(draw, table):
    index = _any_column(draw, table)
    return table.append_column(table.schema.field(index), table.column(index))


def _some_rows(draw, table):
    some = st.lists(st.integers(0, max(len(table) - 1, 0)), max_size=2 * len(table))
    return table.take(draw(some)) if len(table) else table


def _metadata(draw, table):
    raw = (table.schema.metadata or {}).get(b"mpd", b"{}")
    value, _ = edit(draw, json.loads(raw))
    return table.replace_schema_metadata({"mpd": _dumped(value)})


_TABLES = {
    "cell": _cell,
    "cells": _cell,
    "type": _retyped,
    "nulls": _all_null,
    "name": _renamed,
    "twice": _twice,
    "gone": lambda draw, table: table.remove_column(_any_column(draw, table)),
    "other order": lambda draw, table: table.select(draw(st.permutations(table.column_names))),
    "rows": _some_rows,
    "no rows": lambda draw, table: table[:0],
    "metadata": _metadata,
    "no metadata": lambda draw, table: table.replace_schema_metadata(None),
    "another table": lambda draw, table: pa.table({"problem": ["a"], "row_id": [1]}),
    "no columns": lambda draw, table: table.select([]),
    "groups": None,
    "written otherwise": lambda draw, table: table,
}


# -- a round ----------------------------------------------------------------------------------


def reindex(folder, stage):
    """Make the manifest agree with the shards again, as far as they can be read."""
    lines = []
    for path in sorted((folder / stage).glob("part-*.parquet")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        line = {"name": path.name, "rows": 3, "tokens": 9, "bytes": len(content)}
        line |= {"sha256": hashlib.sha256(content).hexdigest(), "row_groups": [3]}
        try:
            footer = pq.ParquetFile(path).metadata
            line["rows"] = footer.num_rows
            line["row_groups"] = [
                footer.row_group(i).num_rows for i in range(footer.num_row_groups)
            ]
        except (pa.ArrowException, OSError):
            pass
        lines.append(json.dumps(line) + "\n")
    (folder / f"{stage}.manifest.jsonl").write_text("".join(lines))


def damage_round(draw, folder):
    """Damage a file of a round, or the set of its shards. Return what was done, and the names of
    the files that were touched."""
    stage = draw(st.sampled_from(["rollouts", "distill"]))
    shards = sorted((folder / stage).glob("part-*.parquet"))
    manifest = folder / f"{stage}.manifest.jsonl"
    what = draw(st.sampled_from(["run", "run", "manifest", "manifest", "shard", "shard", "set"]))
    if what == "run":
        return damage(draw, folder / "run.json", manifest), ["run.json"]
    if what == "manifest":
        return damage(draw, manifest, shards[0]), [manifest.name]
    shard = draw(st.sampled_from(shards))
    if what == "shard":
        others = [file for file in sorted(folder.glob("*/part-*.parquet")) if file != shard]
        other = draw(st.sampled_from([*others, manifest]))
        done = damage(draw, shard, other)
    else:
        kind = draw(st.sampled_from(["copied", "moved", "stranger", "odd number", "link"]))
        done = f"{shard.name}: {kind}"
        if kind == "copied":
            shutil.copy(shard, shard.with_name("part-00007.parquet"))
        elif kind == "moved":
            shard.rename(shard.with_name("part-00007.parquet"))
        elif kind == "stranger":
            shutil.copy(manifest, shard.with_name(draw(st.sampled_from([".x.tmp", "notes.txt"]))))
        elif kind == "odd number":
            shard.rename(shard.with_name("part-last.parquet"))
        else:
            shutil.copy(shard, folder / "elsewhere.parquet")
            shard.unlink()
            shard.symlink_to("../elsewhere.parquet")
    if draw(st.booleans()):
        reindex(folder, stage)
        done += ", reindexed"
    return f"{stage}: {done}", [shard.name, "part-00007.parquet", "part-last.parquet", stage]
