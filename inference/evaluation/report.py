"""From counts and verdicts to a report: JSON, a Markdown page, and upstream's metrics file.

Knows results; knows nothing of how programs were made or run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eagle.errors import EagleError
from inference.bench.report import grid
from inference.evaluation.judge import VERDICTS
from inference.generate import write_text

from .generations import TOO_LONG, Generations
from .problems import Problem, ProblemSet, some
from .scores import estimate

HARNESS = "harness_error"
CAUSES = (*(status for status in VERDICTS if status != HARNESS), TOO_LONG, HARNESS)


@dataclass(frozen=True)
class Checked:
    """What verify-dataset found. excluded: {"task_id", "reason"}; unverified: ids without a
    reference solution.
    """

    fingerprint: str
    verified: list[str]
    excluded: list[dict]
    unverified: list[str]
    isolation: str

    @property
    def excluded_ids(self) -> set[str]:
        return {row["task_id"] for row in self.excluded}


def score(
    problems: ProblemSet,
    statuses: Mapping[tuple[str, int], str],
    generations: Generations,
    ks: Sequence[int],
    checked: Checked | None = None,
    max_harness_errors: float = 0.01,
) -> dict:
    """The scores of a run. statuses: {(task, sample): status} of every program.

    A harness error is nobody's program: it is left out of n. When more than max_harness_errors of
    the programs ended in one, "refused" says so and there are no scores. Raises EagleError when a
    problem has too few programs.
    """
    excluded = checked.excluded_ids if checked else set()
    scored = [p for p in problems.problems if p.task_id not in excluded]
    if not scored:
        raise EagleError(
            f"all {len(problems.problems)} problems are excluded, as none passes with its own solution; see verify-dataset"
        )
    by_task = generations.by_task()
    causes: Counter[str] = Counter()
    counts: dict[str, tuple[int, int]] = {}
    for problem in scored:
        found = [statuses[problem.task_id, s.sample] for s in by_task.get(problem.task_id, [])]
        causes.update(found)
        judged = [status for status in found if status != HARNESS]
        counts[problem.task_id] = len(judged), judged.count("accepted")
    programs = sum(causes.values())
    share = causes[HARNESS] / programs if programs else 0.0
    result = {
        "scored_problems": len(scored),
        "programs": programs,
        "programs_a_problem": [
            min(n for n, _ in counts.values()),
            max(n for n, _ in counts.values()),
        ],
        "solved_problems": sum(c > 0 for _, c in counts.values()),
        "causes": {name: causes[name] for name in CAUSES if causes[name]},
        "harness_errors": {
            "programs": causes[HARNESS],
            "share": round(share, 5),
            "limit": max_harness_errors,
        },
        "refused": None,
        "pass_at_k": None,
        "splits": None,
        "detail": None,
    }
    if share > max_harness_errors:
        result["refused"] = (
            f"{causes[HARNESS]} of {programs} programs ended in a harness error, more than {max_harness_errors:.1%}: "
            "there is no score; repair what kept them from running and execute again"
        )
        return result
    whole = {f"pass@{k}": estimate(counts, k) for k in ks}
    result["pass_at_k"] = {name: found.to_json() for name, found in whole.items()}
    result["detail"] = {name: found.detail for name, found in whole.items()}
    result["splits"] = {
        part: {
            name: {f"pass@{k}": estimate(pick(counts, members), k).to_json() for k in ks}
            for name, members in groups.items()
        }
        for part, groups in splits(scored).items()
    }
    return result


def pick(counts: Mapping[str, tuple[int, int]], members: Sequence[Problem]) -> dict:
    return {p.task_id: counts[p.task_id] for p in members}


def splits(problems: Sequence[Problem]) -> dict[str, dict[str, list[Problem]]]:
    """By difficulty, by skill (a problem of several counts in each), and by how the answer is
    judged.
    """
    order = ("EASY", "MEDIUM", "MEDIUM_HARD", "HARD", "VERY_HARD")
    difficulties = {p.difficulty for p in problems} - {None}
    ranked = [d for d in order if d in difficulties] + sorted(difficulties - set(order))
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


def dataset_facts(problems: ProblemSet, checked: Checked | None) -> dict:
    return {
        "name": problems.name,
        "fingerprint": problems.fingerprint,
        "problems": len(problems.problems),
        "policies": dict(Counter(p.policy for p in problems.problems)),
        "special_judge": sum(p.special_judge for p in problems.problems),
        "malformed": problems.bad,
        "verified": len(checked.verified) if checked else None,
        "excluded": checked.excluded if checked else None,
        "unverified": checked.unverified if checked else None,
    }


def write_report(folder: Path, report: dict, name: str = "report") -> None:
    shown = {k: v for k, v in report.items() if k != "detail"}
    write_text(folder / f"{name}.json", json.dumps(shown, indent=2) + "\n")
    write_text(folder / f"{name}.md", markdown(report))


def write_metrics(path: Path, result: dict) -> None:
    """Upstream's file: {"pass@k": score, …, "detail": {"pass@k": {id: score}}}."""
    values = {name: found["value"] for name, found in result["pass_at_k"].items()}
    write_text(path, json.dumps({**values, "detail": result["detail"]}, indent=1) + "\n")


def read_metrics(path: str | Path) -> dict:
    """Upstream's metrics file -> {"pass@k": {"value", "detail": {id: score}}}."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise EagleError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise EagleError(f"{path} is not JSON ({error}); restore the file") from error
    detail = data.get("detail") if isinstance(data, dict) else None
    names = [name for name in data if name.startswith("pass@")] if isinstance(data, dict) else []
    if not names or not isinstance(detail, dict):
        raise EagleError(f'{path} is no metrics file; it needs "pass@k" and "detail"')
    found = {}
    for name in names:
        scores = detail.get(name) or {}
        if not all(isinstance(v, (int, float)) for v in [data[name], *scores.values()]):
            raise EagleError(f"{path}: {name} must be a number, and its detail numbers by problem")
        found[name] = {"value": data[name], "detail": {str(k): v for k, v in scores.items()}}
    return found


def against(result: dict, published: dict) -> dict:
    """Our scores beside those of a metrics file, and the problems on which they differ."""
    found = {}
    for name, ours in (result["pass_at_k"] or {}).items():
        if name in published:
            theirs, mine = published[name]["detail"], result["detail"][name]
            differ = [t for t in mine if t in theirs and abs(mine[t] - theirs[t]) > 1e-9]
            found[name] = {
                "ours": ours["value"],
                "theirs": published[name]["value"],
                "common_problems": len(mine.keys() & theirs.keys()),
                "differ": differ,
            }
    return found


def percent(entry: dict) -> str:
    text = f"{entry['value']:.2%}"
    return text + (" [{:.2%}, {:.2%}]".format(*entry["ci95"]) if entry["ci95"] else "")


def markdown(report: dict) -> str:
    parts = ["# Evaluation", grid(facts(report))]
    if report["refused"]:
        parts += ["## No score", report["refused"]]
    else:
        parts += [
            "## pass@k",
            grid(score_lines(report)),
            "In brackets: 95% bootstrap interval over problems, where they differ. A problem may have "
            "several skills.",
        ]
    total = report["programs"] or 1
    causes = [["outcome", "programs", "share"]]
    causes += [[name, str(n), f"{n / total:.1%}"] for name, n in report["causes"].items()]
    parts += ["## Outcomes", grid(causes)]
    if report.get("against"):
        lines = [["", "ours", "theirs", "problems in common", "that differ"]]
        for name, row in report["against"].items():
            lines.append(
                [
                    name,
                    f"{row['ours']:.2%}",
                    f"{row['theirs']:.2%}",
                    str(row["common_problems"]),
                    some(row["differ"]) or "none",
                ]
            )
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
    verified, several = data["verified"], str(low) if low == high else f"{low} to {high}"
    lines = [
        ["what", "value"],
        [
            "data",
            f"{data['name']}: {report['scored_problems']} of {data['problems']} problems scored",
        ],
        [
            "reference solutions",
            "not run" if verified is None else f"{verified} problems pass with theirs",
        ],
        ["programs", f"{report['programs']}, {several} a problem"],
        ["isolation", ", ".join(report["isolation"]) or "nothing was run"],
        ["comparison", ", ".join(f"{name}: {n}" for name, n in data["policies"].items())],
    ]
    if data["unverified"]:
        count = len(data["unverified"])
        lines.append(["without reference solution", f"{count}, their tests taken as right"])
    if settings:
        model = f"{settings['model']}, {settings['dtype']}, {settings['engine']}"
        names = ("temperature", "top_p", "top_k", "seed", "max_new_tokens")
        lines.append(["model", model + (f", tree {settings['tree']}" if settings["tree"] else "")])
        lines.append(["sampling", ", ".join(f"{name} {settings[name]}" for name in names)])
    if speed["tokens_per_second"]:
        rate = f"{speed['samples_per_second']:.2f} samples/s, {speed['tokens_per_second']:.0f} tokens/s"
        tau = f", tau {speed['tau']:.2f}" if speed["tau"] and settings.get("tree") else ""
        lines.append(["generation", rate + tau])
    return lines


def score_lines(report: dict) -> list[list[str]]:
    names = list(report["pass_at_k"])
    lines = [["problems", "number", *names]]
    rows = {"all": report["pass_at_k"]}
    for groups in report["splits"].values():
        rows.update(groups)
    for name, entry in rows.items():
        lines.append([name, str(entry[names[0]]["problems"]), *(percent(entry[k]) for k in names)])
    return lines
