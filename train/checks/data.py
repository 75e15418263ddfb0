"""The data as this tokenizer renders it: bad rows, masks, end tokens, draft vocabulary.

Looks at the first records of each source; knows nothing of how rows are rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from configs.schema import DataConfig, HeadTrainConfig, MixtureSource
from eagle.errors import EagleError
from records import load_dataset_for
from records.shipped import SHIPPED_FORMATS, shipped
from records.sources import read_records, resolve
from train.checks.findings import Finding, failed, note, ok, problem, warning
from train.checks.model import Subject
from train.head.vocab import choose_draft_vocab, coverage, special_ids

RECORDS, CHARACTERS = 2000, 4_000_000  # of each source that are looked at


@dataclass
class Sample:
    """One source's leading records as rows. share: of the source's bytes that were read."""

    name: str
    format: str
    rows: object  # TokenizedData
    share: float
    names: dict[str, str]  # the copies' paths -> the files they were taken from

    def where(self, text: str) -> str:
        for copy, original in self.names.items():
            text = text.replace(copy, original)
        return text


def formats(cfg: DataConfig) -> set[str]:
    if cfg.format != "mixed":
        return {cfg.format}
    return {source.format for source in cfg.mixture} if cfg.mixture else set(SHIPPED_FORMATS)


@contextmanager
def samples(cfg: DataConfig, tokenizer) -> Iterator[tuple[list[Sample], list[Finding]]]:
    """What can be rendered of each source, and a problem for each that cannot."""
    if cfg.format == "mixed":
        listed = cfg.mixture or [MixtureSource(format=name) for name in SHIPPED_FORMATS]
    else:
        listed = [MixtureSource(format=cfg.format, path=cfg.path)]
    found, findings = [], []
    with TemporaryDirectory(prefix="eagle-doctor-") as scratch:
        for number, source in enumerate(listed):
            try:
                found.append(_sample(cfg, source, tokenizer, Path(scratch) / str(number)))
            except Exception as error:  # of one source; the others still count
                told = failed("data", error)
                findings.append(problem("data", f"{source.format}: {told.text}", told.remedy))
        yield found, findings


def _sample(cfg: DataConfig, source: MixtureSource, tokenizer, folder: Path) -> Sample:
    if source.paths is None:
        file = shipped(source.format, "train")
        if file is None:
            raise EagleError(
                f"no {source.format} data set is shipped; give data.path (--data FILE)"
            )
        files = [file]
    else:
        files = resolve(source.paths)
    folder.mkdir()
    names, read = {}, 0
    for number, file in enumerate(files):
        copy = folder / f"{number}-{file.stem}.jsonl"
        read += _copy_records(file, copy, len(files))
        names[str(copy)] = str(file)
    wanted = cfg.model_copy(
        update={
            "format": source.format,
            "path": list(names),
            "eval_path": None,
            "mixture": None,
            "max_bad_fraction": 1.0,
            "heldout_fraction": 0.0,
            "cache_dir": str(folder / "cache"),
        }
    )
    try:
        rows = load_dataset_for(wanted, tokenizer)
    except EagleError as error:
        text = str(error)
        for copy, original in names.items():
            text = text.replace(copy, original)
        raise EagleError(text) from error
    whole = sum(file.stat().st_size for file in files)
    return Sample(
        source.name or source.format, source.format, rows, min(read / max(whole, 1), 1.0), names
    )


def _copy_records(file: Path, copy: Path, shares: int) -> int:
    """Write the first records of `file` as JSONL, a line each, and return how many of its bytes
    that was.

    Line numbers stay the file's own: what is not JSON is copied as it stands.
    """
    lines: list[bytes] = []
    read = 0
    for record in read_records(file):
        if len(lines) >= max(RECORDS // shares, 1) or read >= CHARACTERS // shares:
            break
        lines += [b""] * (record.line - 1 - len(lines))
        broken = record.error is not None and record.error.startswith("not UTF-8")
        lines.append(b"\xff" if broken else record.raw.encode("utf-8", "surrogatepass"))
        read += len(lines[-1])
    else:
        read = file.stat().st_size  # all of it, whatever its encoding
    copy.write_bytes(b"".join(line + b"\n" for line in lines))
    return read


def check(sample: Sample, subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """Findings about one source."""
    stats, name = sample.rows.stats, sample.name
    seen = "all" if sample.share == 1 else "the first"
    share = stats["supervised_tokens"] / stats["tokens"]
    yield from _bad(sample, cfg)
    if stats["truncated"] > 0.1 * stats["rows"]:
        yield warning(
            "data",
            f"{name}: {stats['truncated']} of {stats['rows']} rows are cut at data.max_length="
            f"{cfg.data.max_length}, and what lies beyond is not learnt",
            "raise data.max_length, or shorten what precedes the answers",
        )
    text = (
        f"{name}: {seen} {stats['records']} records give {stats['rows']} rows, {stats['tokens']} tokens, "
        f"{share:.1%} supervised"
    )
    expected = stats["supervised_tokens"] / max(sample.share, 1e-9)
    if expected < cfg.data.min_supervised_tokens:
        yield problem(
            "data",
            f"{text}: {stats['supervised_tokens']} supervised tokens are too few",
            "add data, or see with train.inspect what is masked",
        )
    elif share < 0.02:
        yield warning(
            "data",
            text,
            "most of the work is spent on context: shorten it, or check the mask with train.inspect",
        )
    elif share > 0.95 and sample.format in ("chat", "instruction", "fim"):
        yield warning(
            "data", text, "almost all is supervised: check with train.inspect that prompts are not"
        )
    else:
        yield ok("data", text)
    if sample.format in ("chat", "instruction", "fim"):
        yield from _stops(sample, subject)


def _bad(sample: Sample, cfg: HeadTrainConfig) -> Iterator[Finding]:
    bad, records = sample.rows.bad_rows, sample.rows.stats["records"]
    too_many = len(bad) > cfg.data.max_bad_fraction * records
    for reason, count in Counter(row.reason for row in bad).most_common():
        first = next(row for row in bad if row.reason == reason)
        yield (problem if too_many else warning)(
            "data",
            f"{sample.name}: {count} of {records} records are unusable: {reason} (first: "
            f"{sample.where(first.where)}: {first.message})",
            first.remedy,
        )


def _stops(sample: Sample, subject: Subject) -> Iterator[Finding]:
    """Does the token that ends a row's answer stop the model?"""
    tokenizer, name = subject.tokenizer, sample.name
    ends: Counter[int] = Counter()
    [cut] = sample.rows.sources[0].columns("truncated")
    for index in np.flatnonzero(~cut.astype(bool)):
        row = sample.rows[int(index)]
        ends[row["input_ids"][max(np.flatnonzero(row["loss_mask"]))]] += 1
    total = ends.total()
    if not total:
        return
    stopping = sum(count for token, count in ends.items() if token in subject.eos)
    if stopping >= 0.95 * total:
        yield ok(
            "stop tokens",
            f"{name}: {stopping / total:.0%} of the answers end with a token that stops the model",
        )
        return
    others = Counter({token: n for token, n in ends.items() if token not in subject.eos})
    token, count = others.most_common(1)[0]
    text = repr(tokenizer.decode([token]))
    if token in tokenizer.added_tokens_decoder:
        yield warning(
            "stop tokens",
            f"{name}: {count} of {total} answers end with {text} ({token}), which does not stop the "
            "model",
            f"add {token} to eos_token_id in generation_config.json",
        )
    else:
        yield warning(
            "stop tokens",
            f"{name}: {total - stopping} of {total} answers end without an end token (often "
            f"{text}): the head never learns to propose one",
            "let the chat template end each answer with the model's end token, or set the tokenizer's "
            "eos_token",
        )


def vocabulary(found: list[Sample], subject: Subject, cfg: HeadTrainConfig) -> Iterator[Finding]:
    """How much of the answers the draft vocabulary holds: chosen on one half of the rows, measured
    on the other."""
    V = subject.vocab_size
    D = subject.head_config(cfg).draft_vocab_size
    halves = [np.zeros(V, dtype=np.int64), np.zeros(V, dtype=np.int64)]
    for sample in found:
        for index in range(len(sample.rows)):
            row = sample.rows[index]
            ids = np.asarray(row["input_ids"])[np.asarray(row["loss_mask"]) == 1]
            halves[index % 2] += np.bincount(ids[ids < V], minlength=V)
    counts = halves[0] + halves[1]
    if subject.head is not None:
        ids, remedy = subject.head.draft_token_ids().numpy(), "train a head on data like this"
        share = coverage(counts, ids)["coverage"]
        text = f"the head's {len(ids)} of {V} tokens hold {share:.1%} of the answers' tokens"
    else:
        always = special_ids(subject.tokenizer, V)
        if len(always) > D:
            yield problem(
                "draft vocabulary",
                f"model.draft_vocab_size={D} cannot hold the {len(always)} special tokens",
                "raise it",
            )
            return
        ids, remedy = (
            choose_draft_vocab(halves[0], always, D)[0].numpy(),
            "raise model.draft_vocab_size",
        )
        share = coverage(halves[1] if halves[1].any() else counts, ids)["coverage"]
        text = f"{D} of {V} tokens, chosen on half of the rows, hold {share:.1%} of the others' answers"
    if share < 0.5:
        yield problem("draft vocabulary", text, remedy)
    elif share < 0.95:
        few = " (few rows were looked at: more data may show more)" if counts.sum() < 20 * D else ""
        yield (note if few else warning)("draft vocabulary", text + few, remedy)
    else:
        yield ok("draft vocabulary", text)


def held_out_files(cfg: DataConfig) -> Iterator[Finding]:
    """Held-out files that were named are there."""
    given = [cfg.eval_paths] if cfg.format != "mixed" else [s.eval_paths for s in cfg.mixture or []]
    for paths in filter(None, given):
        yield ok("data", f"held-out rows come from {', '.join(map(str, resolve(paths)))}")
