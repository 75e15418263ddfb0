"""The numbers of an ablation and their table. Knows results as `examples.ablation` writes them, and
no models.

A result has "arm", "group", "seed" and "measured": tokens gained and verifications (cycles) of each
held-out generation.
"""

from __future__ import annotations

import numpy as np

KINDS = ("code", "fim", "instruction", "chat")
TEMPERATURES = (0.0, 0.8)
BASELINE = "soft_ce"


def tau_of(measured: list[dict], temperature: float, kind: str | None = None) -> float:
    """Tokens gained a verification, summed over prompts (of a kind) first."""
    chosen = [m for m in measured if m["temperature"] == temperature and kind in (None, m["kind"])]
    cycles = sum(m["cycles"] for m in chosen)
    return sum(m["gained"] for m in chosen) / cycles if cycles else 0.0


def summarise(results: list[dict]) -> list[dict]:
    """One entry an arm: tau by temperature and kind, means and sample deviations over seeds, and
    the difference to the baseline with a 95% interval from a paired bootstrap over prompts."""
    by_arm: dict[str, list[dict]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], []).append(result)
    entries = []
    for name, runs in by_arm.items():
        entry = {
            "arm": name,
            "group": runs[0]["group"],
            "answers": runs[0]["answers"],
            "seeds": len(runs),
            "train_seconds": sum(r["train_seconds"] for r in runs) / len(runs),
        }
        for temperature in TEMPERATURES:
            taus = [
                [tau_of(r["measured"], temperature, kind) for kind in (None, *KINDS)] for r in runs
            ]
            mean = np.mean(taus, axis=0)
            spread = np.std([t[0] for t in taus], ddof=1) if len(runs) > 1 else None
            values = {"tau": mean[0], "spread": spread, **dict(zip(KINDS, mean[1:], strict=True))}
            if BASELINE in by_arm and name != BASELINE:
                difference = paired(runs, by_arm[BASELINE], temperature)
                values |= dict(zip(("difference", "low", "high"), difference, strict=True))
            entry[f"temperature {temperature:g}"] = {
                k: None if v is None else round(float(v), 4) for k, v in values.items()
            }
        entries.append(entry)
    return entries


def paired(runs: list[dict], baseline: list[dict], temperature: float, draws: int = 4000):
    """Difference in tau, and the 2.5% and 97.5% points of it when prompts are drawn again, each
    with what both arms did on it, all seeds together."""

    def table_of(results: list[dict]) -> np.ndarray:  # [prompts, 2]
        return sum(
            np.array(
                [
                    [m["gained"], m["cycles"]]
                    for m in r["measured"]
                    if m["temperature"] == temperature
                ]
            )
            for r in results
        )

    ours, theirs = table_of(runs), table_of(baseline)
    drawn = np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))

    def tau(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / np.maximum(sums[..., 1], 1)

    differences = tau(ours[drawn].sum(1)) - tau(theirs[drawn].sum(1))
    found = tau(ours.sum(0)) - tau(theirs.sum(0))
    return float(found), *(float(p) for p in np.percentile(differences, [2.5, 97.5]))


def table(summary: dict) -> str:
    """Markdown, with the commands and numbers that it rests on."""
    asked, where = summary["asked"], summary["environment"]
    lines = [
        "# Ablation: losses, answers and data",
        "",
        f"Target {summary['target']} ({summary['fingerprint'][:12]}); {summary['steps']} steps of "
        f"{summary['recipe']['batch_size']} rows, {summary['seeds']} seed(s), the same for all arms; acceptance "
        f"length measured by the engine, tree {summary['tree']}, on {asked['prompts']} held-out prompts of each "
        f"kind, {asked['new_tokens']} new tokens. {where['date']}, torch {where['torch']}, {where['device']}, "
        f"{where['threads']} threads. Raw numbers: ablation.json.",
        "",
    ]
    for temperature in TEMPERATURES:
        key = f"temperature {temperature:g}"
        lines += [
            f"## Temperature {temperature:g}",
            "",
            f"| group | arm | τ | {' | '.join(KINDS)} | against {BASELINE} (95% over prompts) |",
            "|---|---|---|" + "---|" * (len(KINDS) + 1),
        ]
        for entry in summary["arms"]:
            values = entry[key]
            spread = "" if values["spread"] is None else f" ± {values['spread']:.3f}"
            kinds = " | ".join(f"{values[kind]:.3f}" for kind in KINDS)
            against = ""
            if "difference" in values:
                against = (
                    f"{values['difference']:+.3f} ({values['low']:+.3f} … {values['high']:+.3f})"
                )
            lines.append(
                f"| {entry['group']} | {entry['arm']} | {values['tau']:.3f}{spread} | {kinds} | {against} |"
            )
        clear = [
            f"{e['arm']} {e[key]['difference']:+.3f}"
            for e in summary["arms"]
            if "low" in e[key] and (e[key]["low"] > 0 or e[key]["high"] < 0)
        ]
        lines += [
            "",
            f"Beyond chance in the choice of prompts: {', '.join(clear) or 'nothing'}.",
            "",
        ]
    lines.append(
        "The interval is over prompts only; what another seed of the head changes shows in ± with --seeds above 1."
    )
    return "\n".join(lines) + "\n"
