"""Are two engines' outputs the same, and where not, is the first difference a matter of rounding?

Knows tokens and the target's logits; knows nothing of how fast they came.

V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inference.bench.cases import PLAIN, STOCK
from inference.bench.measure import Run

if TYPE_CHECKING:
    from eagle.target import Target


@dataclass
class Judge:
    """Judges first divergences of one batch size under one sampling setting.

    targets: the target as each mode of compiling runs it. nodes: tree sizes whose passes may have
    written the cache. Replays are kept, as many pairs of engines part after the same tokens.
    """

    targets: dict[str, Target]
    options: dict  # temperature, top_p, top_k, seed
    rows: int = 1
    nodes: tuple[int, ...] = (2,)
    replays: dict = field(default_factory=dict)

    @property
    def dtype(self):
        return next(iter(self.targets.values())).dtype

    def compare(
        self,
        prompts: list[list[int]],
        ours: list[list[int]],
        theirs: list[list[int]],
        modes: set[str],
    ) -> dict[str, int]:
        """How many rows differ, and how many of them first differ at a near tie, or really do.

        modes: how the two were compiled. In float32 every difference is real. In bf16 and fp16
        passes of different widths round differently, and so do compiled passes.
        """
        import torch

        exact = self.dtype == torch.float32
        counts = {"rows": 0, "near_ties": 0, "real": 0}
        for number, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
            if a == b:
                continue
            counts["rows"] += 1
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            seed = self.options["seed"] + number % self.rows
            near = (
                not exact
                and place is not None
                and self.near_tie(prompt, a[:place], a[place], b[place], seed, modes)
            )
            counts["near_ties" if near else "real"] += 1
        return counts

    def near_tie(
        self,
        prompt: list[int],
        common: list[int],
        ours: int,
        theirs: int,
        seed: int,
        modes: set[str],
    ) -> bool:
        """Replay prompt + common tokens without speculation: is the gap between the two next tokens
        rounding?

        Replayed is every way in which one of the two may have come about: in each of the modes, the
          prefix
        whole, and its new tokens one by one, in chunks of as many as a tree has nodes, and of half
          as many.
        The noise is the largest difference of any score among the replays, at least one unit in the
          last
        place of the dtype at the top score. A near tie: the two tokens' gap is inside the noise,
          and no other
        token is better than both by more than it. Scores are logits, or when sampling what the
          choice is
        made from: processed logits plus the position's noise.
        """
        import torch

        from kernels.choose import gumbel_noise, process_logits

        temperature = self.options["temperature"]
        scores = torch.cat([self.scores(prompt, common, mode) for mode in sorted(modes)])
        ulp = scores.abs().max().item() * torch.finfo(self.dtype).eps
        noise = max((scores.amax(0) - scores.amin(0)).max().item(), ulp)
        if temperature > 0.0:
            noise /= temperature
            position = torch.tensor([[len(prompt) + len(common)]], device=scores.device)
            seeds = torch.tensor([seed], device=scores.device)
            cuts = {name: self.options[name] for name in ("top_k", "top_p")}
            scores = (
                process_logits(scores, temperature, **cuts)
                + gumbel_noise(seeds, position, scores.shape[1])[0]
            )
        if {ours, theirs} <= set(scores.argmax(-1).tolist()):
            return True
        # what top-k and top-p cut off in one replay may stay in another
        base = scores.clamp_min(-1e9)[0]
        gap = abs(base[ours] - base[theirs]).item()
        behind = (base.max() - torch.maximum(base[ours], base[theirs])).item()
        return gap <= noise and behind <= noise

    def scores(self, prompt: list[int], common: list[int], mode: str):
        """Logits [replays, V] after prompt + common, in batches of `rows` equal rows."""
        import torch

        key = (tuple(prompt), tuple(common), mode)
        if key not in self.replays:
            prefix = prompt + common
            start = len(prompt) if common else len(prompt) - 1
            ways = [(len(prefix), 1)]
            if start > 0:
                chunks = {1, *self.nodes, *((n + 1) // 2 for n in self.nodes)}
                ways += [(start, chunk) for chunk in sorted(chunks)]
            found = [replay(self.targets[mode], prefix, *way, self.rows) for way in ways]
            self.replays[key] = torch.stack(found)
        return self.replays[key]


def replay(target, prefix: list[int], start: int, chunk: int, rows: int):
    """Logits [V] float32 after `prefix`: its first `start` tokens in one pass, the rest `chunk` at
    a time.
    """
    import torch

    device = target.device
    ids = torch.tensor([prefix] * rows, device=device)
    cache = target.new_cache(rows, len(prefix))
    lengths = torch.full((rows,), start, device=device)
    out, _ = target.prefill(ids[:, :start], lengths, [start] * rows, cache, features=False)
    for place in range(start, len(prefix), chunk):
        piece = ids[:, place : place + chunk]
        n = piece.shape[1]
        depth = torch.arange(n, device=device).expand(rows, n)
        mask = torch.ones(n, n, dtype=torch.bool, device=device).tril().expand(rows, n, n)
        out, _ = target.verify_tree(piece, depth, mask, cache, features=False)
        cache.advance(torch.full((rows,), n, device=device), [n] * rows)
    return out[0, -1].float()


def judge_group(model, prompts, found: list[Run], options: dict) -> list[dict]:
    """For each run of a group, `identical` and `divergences` (by plain engine) of its JSON; None
    where there is nothing to compare, or where acceptance was forced and the output is not the
    target's."""
    import torch

    from eagle.tree import TreeShape

    first = found[0].case
    greedy = first.temperature == 0.0
    nodes = {
        TreeShape.parse(r.case.tree).num_nodes for r in found if r.case.tree not in (None, "auto")
    }
    default = {model.drafter.shape.num_nodes} if model.drafter else {2}
    judge = Judge(
        {mode: model._compile(mode, None) for mode in {run.case.mode for run in found}},
        {**options, "temperature": first.temperature},
        first.batch_size,
        tuple(sorted(nodes or default)),
    )
    plain = [r for r in found if r.case.engine in PLAIN and (greedy or r.case.engine not in STOCK)]
    verdicts = []
    for run in found:
        verdict: dict = {"identical": None, "divergences": None}
        if plain and run.case.speculative and run.case.forced_acceptance is None:
            counts = {}
            for other in plain:
                if other.case.stock or other.case.capacity == run.case.capacity:
                    modes = {run.case.mode, other.case.mode}
                    counts[other.case.engine] = judge.compare(
                        prompts, run.outputs, other.outputs, modes
                    )
            # in half precision compiled and eager passes are two models: between them divergences
            # are counted, and the verdict is of engines that share their passes
            exact = model.target.dtype == torch.float32
            same = {r.case.engine for r in plain if exact or r.case.mode == run.case.mode}
            verdict["identical"] = not any(c["real"] for name, c in counts.items() if name in same)
            verdict["divergences"] = counts
        verdicts.append(verdict)
    return verdicts


def overall(rows: list[dict]) -> tuple[dict[str, bool], dict[str, dict]]:
    """By batch size: are all engines' outputs identical; and divergences in sum and by engine."""
    identical: dict[str, bool] = {}
    divergences: dict[str, dict] = {}
    for row in rows:
        if row["identical"] is None:
            continue
        size = str(row["batch_size"])
        identical[size] = identical.get(size, True) and row["identical"]
        total = divergences.setdefault(size, {"rows": 0, "near_ties": 0, "real": 0, "engines": {}})
        mine = {
            name: sum(counts[name] for counts in row["divergences"].values())
            for name in ("rows", "near_ties", "real")
        }
        total["engines"][row["engine"]] = mine
        for name, value in mine.items():
            total[name] += value
    return identical, divergences
