"""From verdicts to a report: JSON, a Markdown page, and upstream's metrics file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from eagle.errors import EagleError
from eagle.files import atomic_write_text
from inference.bench.report import grid, show

from .executing import HARNESS, Verdict
from .generations import TOO_LONG, Generations
from .judge import VERDICTS
from .problem import Problem, ProblemSet, some
from .rows import reason
from .scores import by_problem, estimate

CAUSES = (*(status for status in VERDICTS if status != HARNESS), TOO_LONG, HARNESS)
LEVELS = ("EASY", "MEDIUM", "MEDIUM_HARD", "HARD", "VERY_HARD")
METRICS = TypeAdapter(dict[str, float | dict[str, dict[str, float]]])
Verdicts = Mapping[tuple[str, int], Verdict]


@dataclass(frozen=True)
class Checked:
    """What verify-dataset found. excluded: {"task_id", "reason"}; unverified: ids without a
    reference solution."""

    fingerprint: str
    verified: list[str]
    excluded: list[dict]
    unverified: list[str]
    isolation: str

    def keeps(self, problems: ProblemSet) -> list[Problem]:
        """The problems that are not excluded. Raises EagleError when all are."""
        excluded = {row["task_id"]: row["reason"] for row in self.excluded}
        kept = [p for p in problems.problems if p.task_id not in excluded]
        if not kept:
            first, why = next(iter(excluded.items()))
            raise EagleError(
                f"all {len(excluded)} problems are excluded: none passes with its own solution, "
                f"first {first}: {why}"
            )
        return kept


def assemble(
    problems: ProblemSet,
    found: Generations,
    verdicts: Verdicts,
    ks: Sequence[int],
    checked: Checked | None = None,
    max_harness_errors: float = 0.01,
    published: dict | None = None,
) -> dict:
    """The whole report of one run. published: an upstream metrics file's."""
    kept = checked.keeps(problems) if checked else problems.problems
    report = {
        "data": {
            "name": problems.name,
            "fingerprint": problems.fingerprint,
            "problems": len(problems.problems),
            "policies": dict(Counter(p.policy for p in problems.problems)),
            "special_judge": sum(p.special_judge for p in problems.problems),
            "malformed": problems.bad,
            "verified": len(checked.verified) if checked else None,
            "excluded": checked.excluded if checked else None,
            "unverified": checked.unverified if checked else None,
        },
        "generation": found.settings,
        "speed": found.speed(),
        "isolation": sorted({v.isolation for v in verdicts.values() if v.isolation}),
        **score(kept, found, verdicts, ks, max_harness_errors),
    }
    if published:
        report["against"] = against(report, published)
    return report


def score(
    problems: Sequence[Problem],
    found: Generations,
    verdicts: Verdicts,
    ks: Sequence[int],
    max_harness_errors: float,
) -> dict:
    """A harness error is nobody's program: it is left out of n. When more than max_harness_errors
    of the programs ended in one, "refused" says so and there are no scores. Raises EagleError when
    a problem has too few programs."""
    by_task, causes = found.by_task(), Counter()
    counts: dict[str, tuple[int, int]] = {}
    for problem in problems:
        ended = [verdicts[s.name].status for s in by_task.get(problem.task_id, [])]
        causes.update(ended)
        counts[problem.task_id] = len(ended) - ended.count(HARNESS), ended.count("accepted")
    programs, failed = sum(causes.values()), causes[HARNESS]
    share = failed / programs if programs else 0.0
    judged = [n for n, _ in counts.values()]
    refused, names = None, ("pass_at_k", "splits", "detail")
    scores = dict.fromkeys(names)
    if share > max_harness_errors:
        refused = (
            f"{failed} of {programs} programs ended in a harness error, more than "
            f"{max_harness_errors:.1%}: there is no score; repair what kept them from running and "
            "execute again"
        )
    else:
        detail = {f"pass@{k}": by_problem(counts, k) for k in ks}

        def of(group: Sequence[Problem]) -> dict:
            return {k: estimate([d[p.task_id] for p in group]) for k, d in detail.items()}

        parts = {
            part: {name: of(group) for name, group in groups.items()}
            for part, groups in splits(problems).items()
        }
        scores = dict(zip(names, (of(problems), parts, detail), strict=True))
    return {
        "scored_problems": len(problems),
        "programs": programs,
        "programs_a_problem": [min(judged), max(judged)],
        "solved_problems": sum(c > 0 for _, c in counts.values()),
        "causes": {name: causes[name] for name in CAUSES if causes[name]},
        "harness_errors": {
            "programs": failed,
            "share": round(share, 5),
            "limit": max_harness_errors,
        },
        "refused": refused,
        **scores,
    }


def splits(problems: Sequence[Problem]) -> dict[str, dict[str, list[Problem]]]:
    """By difficulty, by skill (a problem of several counts in each), and by how the answer is
    judged."""
    there = {p.difficulty for p in problems} - {None}
    ranked = [level for level in LEVELS if level in there] + sorted(there - set(LEVELS))
    skills = sorted({skill for p in problems for skill in p.skills})
    special = [p for p in problems if p.special_judge]
    found = {
        "difficulty": {d: [p for p in problems if p.difficulty == d] for d in ranked},
        "skill": {s: [p for p in problems if s in p.skills] for s in skills},
    }
    if special:
        plain = [p for p in problems if not p.special_judge]
        groups = {"one right answer": plain, "several right answers": special}
        found["judging"] = {name: members for name, members in groups.items() if members}
    return {name: groups for name, groups in found.items() if groups}


def write(folder: Path, report: dict, suffix: str = "") -> None:
    """report{suffix}.json and .md, and upstream's metrics{suffix}.json: {"pass@k": score, …,
    "detail": {"pass@k": {id: score}}}."""
    shown = {k: v for k, v in report.items() if k != "detail"}
    atomic_write_text(folder / f"report{suffix}.json", json.dumps(shown, indent=2) + "\n")
    atomic_write_text(folder / f"report{suffix}.md", markdown(report))
    if report["pass_at_k"]:
        metrics = {name: found["value"] for name, found in report["pass_at_k"].items()}
        metrics["detail"] = report["detail"]
        atomic_write_text(folder / f"metrics{suffix}.json", json.dumps(metrics, indent=1) + "\n")


def read_metrics(path: str | Path) -> dict:
    """Upstream's metrics file."""
    try:
        metrics = METRICS.validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise EagleError(f"{path} is no metrics file: {reason(error)}") from error
    if not isinstance(metrics.get("detail"), dict):
        raise EagleError(f'{path} is no metrics file; it needs "pass@k" and "detail"')
    return metrics


def against(report: dict, published: dict) -> dict:
    """Our scores beside those of a metrics file, and the problems on which they differ."""
    found = {}
    for name, ours in (report["pass_at_k"] or {}).items():
        if name in published:
            theirs, mine = published["detail"].get(name, {}), report["detail"][name]
            differ = [t for t in mine if t in theirs and abs(mine[t] - theirs[t]) > 1e-9]
            found[name] = {
                "ours": ours["value"],
                "theirs": published[name],
                "common_problems": len(mine.keys() & theirs.keys()),
                "differ": differ,
            }
    return found


def markdown(report: dict) -> str:
    parts = ["# Evaluation", grid(facts(report))]
    if report["refused"]:
        parts += ["## No score", report["refused"]]
    else:
        note = (
            "In brackets: 95% bootstrap interval over problems, where they differ. A problem may "
            "have several skills."
        )
        parts += ["## pass@k", grid(score_lines(report)), note]
    total = report["programs"] or 1
    causes = [[name, str(n), f"{n / total:.1%}"] for name, n in report["causes"].items()]
    parts += ["## Outcomes", grid([["outcome", "programs", "share"], *causes])]
    if report.get("against"):
        lines = [["", "ours", "theirs", "problems in common", "that differ"]]
        for name, row in report["against"].items():
            both = f"{row['ours']:.2%}", f"{row['theirs']:.2%}", str(row["common_problems"])
            lines.append([name, *both, some(row["differ"]) or "none"])
        parts += ["## Against the given metrics", grid(lines)]
    out = [[row["task_id"], row["reason"]] for row in report["data"]["excluded"] or []]
    out += [[row["row"], row["reason"]] for row in report["data"]["malformed"]]
    if out:
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in out]
        parts += ["## Excluded", grid([["problem", "why"], *cells])]
    return "\n\n".join(parts) + "\n"


def facts(report: dict) -> list[list[str]]:
    data, speed, settings = report["data"], report["speed"], report["generation"] or {}
    low, high = report["programs_a_problem"]
    verified = show(data["verified"], "d")
    lines = {
        "data": f"{data['name']}: {report['scored_problems']} of {data['problems']} problems "
        "scored",
        "reference solutions": f"{verified} problems pass with theirs" if verified else "not run",
        "without reference solution": f"{len(data['unverified'])}, their tests taken as right"
        if data["unverified"]
        else "",
        "programs": f"{report['programs']}, {low if low == high else f'{low} to {high}'} a problem",
        "isolation": ", ".join(report["isolation"]) or "nothing was run",
        "comparison": ", ".join(f"{name}: {n}" for name, n in data["policies"].items()),
    }
    if settings:
        names = ("temperature", "top_p", "top_k", "seed", "max_new_tokens")
        model = [settings["model"], settings["dtype"], settings["engine"]]
        lines["model"] = ", ".join(model + [f"tree {settings['tree']}"] * bool(settings["tree"]))
        lines["sampling"] = ", ".join(f"{name} {settings[name]}" for name in names)
    if speed["tokens_per_second"]:
        lines["generation"] = (
            f"{speed['samples_per_second']:.2f} samples/s, {speed['tokens_per_second']:.0f} "
            f"tokens/s, tau {show(speed['tau'], '.2f')}"
        )
    return [["what", "value"], *([name, text] for name, text in lines.items() if text)]


def score_lines(report: dict) -> list[list[str]]:
    names = list(report["pass_at_k"])
    rows = {"all": report["pass_at_k"]}
    for groups in report["splits"].values():
        rows |= groups
    lines = [["problems", "number", *names]]
    for name, entry in rows.items():
        lines.append([name, str(entry[names[0]]["problems"]), *(percent(entry[k]) for k in names)])
    return lines


def percent(entry: dict) -> str:
    text = f"{entry['value']:.2%}"
    return text + (" [{:.2%}, {:.2%}]".format(*entry["ci95"]) if entry["ci95"] else "")
