"""Running the model over problems: batches over slots, each completion kept as soon as it is there.

Knows the engine and the journal; knows nothing of judging.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eagle.errors import EagleError
from records.prompts import chat_prompt, text_prompt

from .generations import (
    TOO_LONG,
    Generations,
    Sample,
    Sampling,
    from_records,
    sample_key,
    sample_seed,
    to_record,
)
from .journal import Journal
from .problems import Problem, some

# a call of the engine has at most so many completions a slot: its cache is as wide as its longest
# prompt needs (sorted, they are of similar length), and refilling slots is idle only at its end
CHUNK = 32


@dataclass(frozen=True)
class Wanted:
    """A completion to be made."""

    problem: Problem
    sample: int
    seed: int
    ids: list[int]
    key: str


class Generator:
    """A model with the settings of a run, and the journal of its completions,
    `generations-FINGERPRINT.jsonl`.
    """

    def __init__(self, model, sampling: Sampling, output: str | Path) -> None:
        if sampling.engine not in ("eagle", "vanilla"):
            raise EagleError(f"unknown engine {sampling.engine!r}; use eagle or vanilla")
        if sampling.engine == "eagle" and model.drafter is None:
            raise EagleError("no draft head: give --head PATH, or --engine vanilla")
        self.model, self.sampling = model, sampling
        self.settings = describe(model, sampling)
        own = {k: v for k, v in self.settings.items() if k != "model"}  # wherever its files lie
        self.fingerprint = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        self.path = Path(output) / f"generations-{self.fingerprint[:12]}.jsonl"

    def wanted(self, problems: Sequence[Problem], n_samples: int) -> list[Wanted]:
        """Every completion of a run, the longest prompts first."""
        found = []
        for problem in problems:
            ids = self.prompt(problem)
            for sample in range(n_samples):
                seed = sample_seed(self.sampling.seed, problem.task_id, sample)
                key = sample_key(self.fingerprint, ids, problem.stops, seed)
                found.append(Wanted(problem, sample, seed, ids, key))
        return sorted(found, key=lambda w: -len(w.ids))

    def prompt(self, problem: Problem) -> list[int]:
        tokenizer = self.model.tokenizer
        if self.sampling.chat:
            return chat_prompt(tokenizer, [{"role": "user", "content": problem.question}])
        return text_prompt(tokenizer, problem.prompt)

    def run(
        self,
        wanted: Sequence[Wanted],
        slots: int,
        take: Callable[[Sample], None] = lambda sample: None,
        say: Callable[[int, bool], None] = lambda tokens, fresh: None,
    ) -> Generations:
        """The completions of `wanted`: those in the journal as they are, the others made and added
        to it. `take` is handed each one; `say` is told how many tokens were made, and whether they
        were made now."""
        with Journal(self.path) as kept:
            if not kept.records:
                kept.append({"settings": self.settings})
            there = from_records(kept.records, str(self.path))
            known = {sample.key: sample for sample in there.samples}
            samples, missing, seconds, tokens = [], [], 0.0, 0
            for one in wanted:
                if one.key in known:
                    samples.append(known[one.key])
                    take(known[one.key])
                    say(0, False)
                else:
                    missing.append(one)
            failed = []
            started = time.perf_counter()
            for one, sample in self.generate(missing, slots):
                if isinstance(sample, EagleError):
                    failed.append(f"{one.problem.task_id}/{one.sample}: {sample}")
                    continue
                kept.append(to_record(sample))
                samples.append(sample)
                tokens += sample.new_tokens
                seconds = time.perf_counter() - started
                take(sample)
                say(sample.new_tokens, True)
            if missing and not failed:
                session = {
                    "samples": len(missing),
                    "new_tokens": tokens,
                    "seconds": seconds,
                    "slots": slots,
                }
                kept.append({"session": session})
                there.sessions.append(session)
        if failed:
            raise EagleError(
                f"{len(failed)} of {len(missing)} completions could not be made ({some(failed, 1)}); the others are "
                f"kept in {self.path}: repair the cause and run the same command again"
            )
        return Generations(samples, self.settings, there.sessions)

    def generate(
        self, wanted: Sequence[Wanted], slots: int
    ) -> Iterator[tuple[Wanted, Sample | EagleError]]:
        """As they are finished. A prompt that does not fit the model is an empty completion that
        says so.
        """
        limit = self.model.target.max_positions
        fitting = []
        for one in wanted:
            if len(one.ids) < limit:
                fitting.append(one)
            else:
                yield (
                    one,
                    Sample(one.problem.task_id, one.sample, "", one.seed, 0, 0, TOO_LONG, one.key),
                )
        for start in range(0, len(fitting), CHUNK * slots):
            yield from self.chunk(fitting[start : start + CHUNK * slots], slots)

    def chunk(self, wanted: Sequence[Wanted], slots: int) -> Iterator:
        s = self.sampling
        requests = [
            # what ends a completion of code may well stand in an answer of a chat
            {
                "input_ids": w.ids,
                "seed": w.seed,
                "stop_strings": (not s.chat and w.problem.stops) or None,
            }
            for w in wanted
        ]
        done = self.model.generate_many(
            requests,
            slots=slots,
            as_completed=True,
            draft=s.engine == "eagle",
            tree=s.tree,
            compile=s.compile,
            max_new_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
        )
        for place, row in done:
            one = wanted[place]
            if row.error is not None:
                yield one, row.error
                continue
            text = self.model.tokenizer.decode(row.tokens, skip_special_tokens=True)
            yield (
                one,
                Sample(
                    one.problem.task_id,
                    one.sample,
                    text,
                    one.seed,
                    len(row.tokens),
                    row.cycles,
                    row.finish_reason,
                    one.key,
                    s.chat or None,
                ),
            )


def describe(model, sampling: Sampling) -> dict:
    """Model, head, adapter and sampling, weights by their fingerprints: what a completion depends
    on, apart from its prompt and seed."""
    from eagle.loading import weights_hash

    target, settings = model.target, asdict(sampling)
    drafts = sampling.engine == "eagle"
    settings["tree"] = (sampling.tree or str(model.tree)) if drafts else None
    weights = {name: target.identity[name] for name in ("fingerprint", "quantization", "adapter")}
    return {
        "model": target.name,
        **weights,
        "head": weights_hash(model.head.state_dict()) if drafts and model.head else None,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        **settings,
    }
