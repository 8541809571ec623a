"""The data card: what the distillation shards of a run are, for whoever gets them without it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.inspect.contamination import check_contamination
from mpd_data.inspect.stats import collect, scan
from mpd_data.store.round import RoundDir
from mpd_rounds.report.document import Block, Code, Paragraph, Section, Table
from mpd_rounds.report.queries import Funnel
from mpd_rounds.report.run import Run, shard_metadata, stage_info

NOT_DECLARED = "not declared"
_MATCHES = 10  # of prompts found twice, at most so many are listed
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_LICENSE = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def data_card(run: Run, funnels: dict[int, Funnel], prefix: str, level: int) -> Section:
    """Of a run with rounds. `prefix` is put before the anchor, `level` is the heading's."""
    distilled = {n: folder for n, folder in run.rounds.items() if funnels[n].statuses}
    blocks: list[Block]
    if not distilled:
        blocks = [Paragraph("No rewrites are there yet, so there is no data to describe.")]
        return Section(f"{prefix}data-card", "Data card", blocks, level)
    metadata = {n: shard_metadata(folder, "distill") for n, folder in distilled.items()}
    kept = sum(funnels[n].kept for n in distilled)
    rows = sum(sum(funnels[n].statuses.values()) for n in distilled)
    k = metadata[max(metadata)]["num_logprobs"]
    blocks = [
        Paragraph(
            f"{rows:,} rewrites from {len(distilled)} round{'s' * (len(distilled) > 1)}, {kept:,}"
            f" of them kept. A row is {_made(metadata)}; a kept one carries the {k} largest"
            " log-probabilities of each token, by the model that scored it. Rejected rows stay in"
            " the data, with the reason in the column status."
        ),
        _counts(distilled, funnels),
        _sources(run, distilled),
        _licenses(run, metadata),
        _models(metadata),
        _templates(metadata),
        _filters(metadata),
        *_content(distilled),
        *contamination(run),
        Paragraph("To load it, with Polars:"),
        Code(_loading(run.path), "python"),
    ]
    return Section(f"{prefix}data-card", "Data card", blocks, level)


# The names of a shard's models in its metadata -> what they did.
_PARTS = {"student": "sampled by", "teacher": "rewritten and scored by"}


def _asks(metadata: dict[int, dict[str, Any]]) -> bool:
    return any(of["template"]["name"] != "draft" for of in metadata.values())


def _made(metadata: dict[int, dict[str, Any]]) -> str:
    if not _asks(metadata):
        return "a model's solution as it was sampled, scored by a teacher"
    return "a model's solution, rewritten more concisely"


def _loading(path: Path) -> str:
    pattern = str(path / "data" / "round*" / "distill" / "*.parquet")
    return (
        f"import polars as pl\nkept = pl.scan_parquet({pattern!r})"
        '.filter(pl.col("status") == "ok").collect()'
    )


def _counts(distilled: dict[int, Path], funnels: dict[int, Funnel]) -> Table:
    rows = []
    for number, folder in distilled.items():
        frame = scan([folder], "distill")
        assert frame is not None
        tokens = collect(
            frame.filter(pl.col("status") == "ok").select(
                pl.col("num_rewritten_tokens").cast(pl.Int64).sum()
            )
        ).item()
        size = sum(f.stat().st_size for f in RoundDir(folder).shard_paths("distill"))
        of = funnels[number]
        cells = (of.prompts, of.rollouts, sum(of.statuses.values()), of.kept, tokens)
        rows.append([f"round {number}", *(f"{n:,}" for n in cells), f"{size / 1e6:,.1f}"])
    head = ["", "prompts", "rollouts", "rewrites", "kept", "kept tokens", "MB"]
    return Table("Counts", head, rows)


def _sources(run: Run, distilled: dict[int, Path]) -> Table:
    rows = []
    for number, folder in distilled.items():
        rows.append([f"round {number}", *_source(folder)])
    for name, folders in run.evaluations.items():
        rows.append([f"evaluation {name}", *_source(folders[min(folders)])])
    head = ["used by", "files or data sets", "columns", "prompts' hash"]
    note = "The hash is of ids, texts and gold answers of the prompts that were chosen."
    return Table("Sources of the prompts", head, rows, left=4, note=note)


def _source(folder: Path) -> list[str]:
    info = stage_info(folder, "rollouts")
    config = info.get("details", {}).get("config", {})
    names = (config.get(name) for name in ("prompt_column", "answer_column", "id_column"))
    columns = [str(name) for name in (*names, *config.get("metadata_columns", [])) if name]
    return [
        ", ".join(map(str, config.get("prompts", []))) or "not recorded",
        ", ".join(columns),
        str(info.get("identity", {}).get("prompts", "not recorded")),
    ]


def _licenses(run: Run, metadata: dict[int, dict[str, Any]]) -> Table:
    declared = {k: v for k, v in run.settings.get("licenses", {}).items() if v}
    first = metadata[min(metadata)]
    # Whose licence it is: the pipeline says who samples and who rewrites.
    whose = {
        "student": run.settings.get("sampler", "student"),
        "teacher": run.settings.get("rewriter", "teacher"),
    }
    rows = []
    for part, did in _PARTS.items():
        name = str(first[part]["name"])
        if whose[part] in declared:
            rows.append([did, name, declared[whose[part]], "the pipeline's [licenses]"])
        elif (found := license_of(Path(name))) is not None:
            rows.append([did, name, found, "the model's README.md"])
        else:
            rows.append([did, name, NOT_DECLARED, ""])
    prompts = str(declared.get("prompts", NOT_DECLARED))
    by = "the pipeline's [licenses]" if "prompts" in declared else ""
    rows.append(["prompts", "", prompts, by])
    note = (
        "As declared, and not checked. Whether what a model writes may be used to train another is"
        " for its licence to say."
    )
    return Table("Licences", ["", "name", "licence", "declared in"], rows, left=4, note=note)


def license_of(model: Path) -> str | None:
    """The `license` in the front matter of a model folder's README.md (license_name where that
    stands alone); None where there is none."""
    readme = model / "README.md"
    if not readme.is_file():
        return None
    front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    found = _LICENSE.search(front[1]) if front else None
    return found[1].strip("\"'") if found else None


def _models(metadata: dict[int, dict[str, Any]]) -> Table:
    rows = []
    for number, of in metadata.items():
        for part, did in _PARTS.items():
            model = of[part]
            rows.append([f"round {number}", did, str(model["name"]), str(model["version"])])
    note = "A version is the hub's commit, or a hash of config and weights."
    return Table("Models", ["", "part", "name", "version"], rows, left=4, note=note)


def _templates(metadata: dict[int, dict[str, Any]]) -> Table:
    def line(name: str, of: dict[str, Any]) -> str:
        value = of.get(name)
        if name == "template" and isinstance(value, dict):
            return f"{value.get('name')}, version {value.get('version')}, {value.get('hash')}"
        return _shown(value)

    names = {
        "template": "rewrite template",
        "chat_template": "teacher's chat template",
        "tokenizer": "tokenizer",
        "vocab_size": "vocabulary",
        "num_logprobs": "log-probabilities per token (K)",
        "score_context": "score context",
        "score_temperature": "score temperature",
    }
    return _by_round("Templates and scoring", names, metadata, line)


def _filters(metadata: dict[int, dict[str, Any]]) -> Table:
    """What decided what is kept."""

    def line(name: str, of: dict[str, Any]) -> str:
        return _shown(of.get("filters", {}).get(name, of.get(name)))

    names = sorted({name for of in metadata.values() for name in of.get("filters", {})})
    labels = {name: name for name in (*names, "num_candidates", "choose")}
    return _by_round("Filters", labels, metadata, line)


def _by_round(
    caption: str, names: dict[str, str], metadata: dict[int, dict[str, Any]], line: Any
) -> Table:
    """A row for each name; one column where all rounds say the same, else one for each."""
    values = {n: [line(name, of) for name in names] for n, of in metadata.items()}
    columns = list(values.values())
    same = all(column == columns[0] for column in columns)
    head = ["", "value"] if same else ["", *(f"round {n}" for n in values)]
    rows = [[label, *cells] for label, *cells in zip(
        names.values(), *(columns[:1] if same else columns), strict=True)]  # fmt: skip
    return Table(caption, head, rows, left=len(head))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _content(distilled: dict[int, Path]) -> Iterator[Block]:
    carried: set[str] = set()
    for folder in distilled.values():
        config = stage_info(folder, "rollouts").get("details", {}).get("config", {})
        carried |= set(map(str, config.get("metadata_columns", [])))
    named = f" ({', '.join(sorted(carried))})" if carried else ""
    yield Paragraph(
        "Personal and unknown content. Nothing was searched for or taken out. The prompts stand in"
        " the rollouts as they came (columns problem and prompt), with the columns that were"
        f" carried through{named} in metadata; whether they hold personal data, or what their"
        " authors agreed to, is not known here. The rest is written by models: a kept rewrite has"
        " passed the filters above, which compare answers and not the steps that lead to them."
    )
    frames = [frame for f in distilled.values() if (frame := scan([f], "distill")) is not None]
    kept = pl.concat(frames).filter(pl.col("status") == "ok")
    graded, right, total = collect(
        kept.select(
            pl.col("is_correct").is_not_null().sum().alias("graded"),
            pl.col("is_correct").sum().alias("right"),
            pl.len().alias("total"),
        )
    ).row(0)
    yield Paragraph(
        f"{graded:,} of the {total:,} kept rewrites have a gold answer to be compared with;"
        f" {right:,} of them end in it."
    )


def contamination(run: Run) -> Iterator[Block]:
    """Training prompts against those of each evaluation set, which has been sampled once."""
    if not run.evaluations:
        yield Paragraph("No evaluation is there to compare the training prompts with.")
        return
    # Sets that sample the same prompts in other ways are one here.
    sets: dict[str, list[str]] = {}
    for name, folders in run.evaluations.items():
        identity = stage_info(folders[min(folders)], "rollouts").get("identity", {})
        sets.setdefault(str(identity.get("prompts", name)), []).append(name)
    rows, worst = [], []
    n = 0
    for names in sets.values():
        name, folders = ", ".join(names), run.evaluations[names[0]]
        evaluation = _prompts([folders[min(folders)]])
        found = check_contamination(_prompts(list(run.rounds.values())), evaluation)
        n = found.n
        cells = (found.num_train, found.num_evaluation, found.exact, found.overlapping)
        rows.append([name, *(f"{count:,}" for count in cells), f"{100 * found.share:.1f}%"])
        worst += [
            [name, match.evaluation_id, match.train_id, match.ngram, f"{100 * match.share:.0f}%"]
            for match in found.matches[:_MATCHES]
        ]
    head = ["set", "training prompts", "evaluation prompts", "the same", f"share a {n}-gram"]
    head.append("of all")
    note = (
        f"The same: equal but for spacing and case. A {n}-gram: {n} words in a row, without"
        " punctuation and case; prompts made from one form of words share some and are not copies."
    )
    yield Table("Evaluation prompts among the training prompts", head, rows, note=note)
    if worst:
        head = ["set", "evaluation prompt", "training prompt", "as in", f"shared {n}-grams"]
        yield Table("The closest pairs", head, worst, left=4)


def _prompts(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(id, text) of each prompt of these rounds, once, as it is met in the shards."""
    seen: set[str] = set()
    for folder in folders:
        for row in RoundDir(folder).rows("rollouts", ["prompt_id", "problem"]):
            if row["prompt_id"] not in seen:
                seen.add(row["prompt_id"])
                yield row["prompt_id"], row["problem"]
