"""Completions of problems: drawn from a model in batches over slots, each kept as soon as it is
there; and files of them, ours and upstream's."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from configs.fim_tokens import find_fim_tokens
from eagle.errors import EagleError
from eagle.files import atomic_write_text, weights_hash
from eagle.meter import Meter
from records.prompts import chat_prompt, fim_prompt, text_prompt
from records.sources import read_records

from . import journal
from .problem import Problem, ProblemSet, cut, fenced, reason, some

TOO_LONG = "prompt_too_long"
# a call of the engine has at most so many completions a slot: its cache is as wide as its longest
# prompt needs (sorted, they are of similar length), and refilling slots is idle only at its end
CHUNK = 32


class Sampling(BaseModel):
    """engine: "eagle" drafts, "vanilla" does not. chat: through the chat template."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    engine: Literal["auto", "eagle", "vanilla"] = "auto"
    temperature: float = Field(0.2, ge=0)
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = Field(512, ge=1)
    seed: int = 0
    tree: str | None = None
    compile: str = "auto"
    chat: bool = False


@dataclass
class Sample:
    """One completion. finish_reason: the engine's, or TOO_LONG; None where a file does not tell.
    cycles: verifications. chat: the answer of a chat, with the program in a fenced block."""

    task_id: str
    sample: int
    output: str
    seed: int | None = None
    new_tokens: int | None = None
    cycles: int | None = None
    finish_reason: str | None = None
    key: str | None = None
    chat: bool | None = None

    @property
    def name(self) -> tuple[str, int]:
        return self.task_id, self.sample


@dataclass
class Generations:
    """settings: of our journals; sessions: what was timed."""

    samples: list[Sample]
    settings: dict | None = None
    sessions: Sequence[dict] = ()

    def by_task(self) -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {}
        for sample in sorted(self.samples, key=lambda s: s.sample):
            found.setdefault(sample.task_id, []).append(sample)
        return found

    def speed(self) -> dict:
        """new_tokens, cycles and tau of all completions; seconds and the two rates of the sessions
        that ran to their end, None where none did."""
        made = [s for s in self.samples if s.cycles]
        cycles = sum(s.cycles for s in made)
        names = ("samples", "new_tokens", "seconds")
        timed = {name: sum(session[name] for session in self.sessions) for name in names}
        seconds = timed["seconds"]
        return {
            "samples": len(self.samples),
            "new_tokens": sum(s.new_tokens or 0 for s in self.samples),
            "cycles": cycles,
            "tau": round(sum(s.new_tokens - 1 for s in made) / cycles, 3) if cycles else None,
            "seconds": round(seconds, 3),
            "timed_samples": timed["samples"],
            "tokens_per_second": round(timed["new_tokens"] / seconds, 2) if seconds else None,
            "samples_per_second": round(timed["samples"] / seconds, 3) if seconds else None,
        }


class Generator:
    """A model with the settings of a run, and the journal of its completions,
    `generations-FINGERPRINT.jsonl`: of what a completion depends on, but for prompt and seed."""

    def __init__(self, model, sampling: Sampling, output: str | Path) -> None:
        drafts = sampling.engine == "eagle"
        if drafts and model.drafter is None:
            raise EagleError("no draft head: give --head PATH, or --engine vanilla")
        self.model, self.sampling, target = model, sampling, model.target
        weights = ("fingerprint", "quantization", "adapter")
        own = {
            **{name: target.identity[name] for name in weights},
            "head": weights_hash(model.head.state_dict()) if drafts and model.head else None,
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": target.device.type,
            **sampling.model_dump(),
            "tree": (sampling.tree or str(model.tree)) if drafts else None,
        }
        self.fingerprint = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        self.settings = {"model": target.name, **own}  # wherever its files lie
        self.path = Path(output) / f"generations-{self.fingerprint[:12]}.jsonl"

    def wanted(self, problems: Sequence[Problem], n_samples: int) -> list[tuple[dict, Sample]]:
        """(request, completion that is still to be made) of a run, the longest prompts first."""
        found, chat, tokenizer = [], self.sampling.chat, self.model.tokenizer
        for problem in problems:
            ends = None
            if chat:  # what ends a completion of code may well stand in an answer
                question = [{"role": "user", "content": problem.question}]
                ids, stops = chat_prompt(tokenizer, question), None
            elif problem.suffix is not None:
                ids, stops = fim_prompt(tokenizer, problem.prompt, problem.suffix), None
                ends = self.model.eos_token_ids | set(find_fim_tokens(tokenizer)[:4])
            else:
                ids, stops = text_prompt(tokenizer, problem.prompt), problem.stops or None
            for number in range(n_samples):
                seed = sample_seed(self.sampling.seed, problem.task_id, number)
                text = json.dumps([self.fingerprint, ids, list(problem.stops), seed])
                key = hashlib.sha256(text.encode()).hexdigest()
                name = problem.task_id, number
                sample = Sample(*name, "", seed, 0, 0, TOO_LONG, key, chat or None)
                request = {"input_ids": ids, "seed": seed, "stop_strings": stops}
                found.append((request | ({"eos_token_id": ends} if ends else {}), sample))
        return sorted(found, key=lambda one: -len(one[0]["input_ids"]))

    def run(
        self,
        problems: Sequence[Problem],
        n_samples: int,
        slots: int,
        take: Callable[[Sample], None] = lambda sample: None,
    ) -> Generations:
        """The completions of the journal, and the others, made and added; `take` is handed each."""
        wanted, failed = self.wanted(problems, n_samples), []
        with journal.Journal(self.path) as kept:
            if not kept.records:
                kept.append({"settings": self.settings})
            there = from_records(kept.records, self.path)
            known = {sample.key: sample for sample in there.samples}
            samples = [known[one.key] for _, one in wanted if one.key in known]
            missing = [one for one in wanted if one[1].key not in known]
            for sample in samples:
                take(sample)
            started = time.perf_counter()
            with Meter("generated", len(wanted), done=len(samples)) as meter:
                for sample, error in self.generate(missing, slots):
                    if error is not None:
                        failed.append(f"{sample.task_id}/{sample.sample}: {error}")
                        continue
                    kept.append({k: v for k, v in asdict(sample).items() if v is not None})
                    samples.append(sample)
                    take(sample)
                    meter.add(1, sample.new_tokens)
            if missing and not failed:
                session = {"samples": len(missing), "new_tokens": meter.amount}
                session |= {"seconds": time.perf_counter() - started, "slots": slots}
                kept.append({"session": session})
                there.sessions.append(session)
        if failed:
            raise EagleError(
                f"{len(failed)} of {len(missing)} completions could not be made "
                f"({some(failed, 1)}); the others are kept in {self.path}: repair the cause and "
                "run the same command again"
            )
        return Generations(samples, self.settings, there.sessions)

    def generate(
        self, wanted: Sequence[tuple[dict, Sample]], slots: int
    ) -> Iterator[tuple[Sample, EagleError | None]]:
        """As they are finished; for a prompt that does not fit the model, an empty one."""
        options = self.sampling.model_dump(exclude={"engine", "chat", "seed"})
        options["draft"] = self.sampling.engine == "eagle"
        limit = self.model.target.max_positions
        fitting = [one for one in wanted if len(one[0]["input_ids"]) < limit]
        for _, sample in wanted[: len(wanted) - len(fitting)]:  # the longest
            yield sample, None
        for start in range(0, len(fitting), CHUNK * slots):
            part = fitting[start : start + CHUNK * slots]
            requests = [request for request, _ in part]
            done = self.model.generate_many(requests, slots=slots, as_completed=True, **options)
            for place, row in done:
                sample = part[place][1]
                if row.error is None:
                    decode = self.model.tokenizer.decode
                    sample.output = decode(row.tokens, skip_special_tokens=True)
                    sample.new_tokens, sample.cycles = len(row.tokens), row.cycles
                    sample.finish_reason = row.finish_reason
                yield sample, row.error


def sample_seed(seed: int, task_id: str, sample: int) -> int:
    """0 … 2^63 - 1, of nothing else: neither order, batch nor the other problems change it."""
    digest = hashlib.sha256(f"{seed}/{task_id}/{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def from_records(records: list[dict], where: Path) -> Generations:
    """The lines of one of our journals."""
    found = Generations([], None, [])
    for record in records:
        if "settings" in record:
            found.settings = record["settings"]
        elif "session" in record:
            found.sessions.append(record["session"])
        elif {"task_id", "sample", "output"} <= record.keys() <= set(Sample.__dataclass_fields__):
            found.samples.append(Sample(**record))
        else:
            raise EagleError(f"{where} holds {some(list(record))}: no journal of completions")
    return found


class Upstream(TypedDict):
    task_id: int | str
    output: list[str]


def read_generations(path: str | Path, problems: ProblemSet) -> Generations:
    """A journal of ours (.jsonl), or upstream's [{"task_id", "prompt", "output": [...]}] (.json).
    Completions of unknown problems, duplicates and bad rows are EagleErrors."""
    path = Path(path)
    if path.suffix == ".jsonl":
        found = from_records(journal.read(path), path)
    else:
        try:
            rows = [record.value for record in read_records(path)]
            rows = TypeAdapter(list[Upstream]).validate_python(rows)
        except ValidationError as error:
            raise EagleError(
                f'{path} must hold a list of {{"task_id", "output": [text, …]}} ({reason(error)})'
            ) from error
        found = Generations(
            [Sample(str(r["task_id"]), i, text) for r in rows for i, text in enumerate(r["output"])]
        )
    if not found.samples:
        raise EagleError(f"{path} holds no completions; run the generate stage first")
    if unknown := sorted({s.task_id for s in found.samples} - problems.by_id.keys()):
        raise EagleError(
            f"{path} has completions of {len(unknown)} tasks that {problems.name} does not have: "
            f"{some(unknown)}; give the data they were generated from, unfiltered"
        )
    counts = Counter(sample.name for sample in found.samples)
    if twice := [f"completion {n} of task {task}" for (task, n), c in counts.items() if c > 1]:
        raise EagleError(
            f"{path} has {some(twice)} twice; put a task's completions into one list, each with "
            "its own number"
        )
    return found


def write_upstream(path: str | Path, problems: Sequence[Problem], found: Generations) -> None:
    """Of the problems that have completions; a number as id stays a number."""
    by_task = found.by_task()
    rows = [
        {
            "task_id": int(p.task_id) if p.task_id.isdigit() else p.task_id,
            "prompt": p.prompt,
            "output": [
                fenced(s.output) if s.chat else cut(s.output, p.stops) for s in by_task[p.task_id]
            ],
        }
        for p in problems
        if p.task_id in by_task
    ]
    atomic_write_text(path, json.dumps(rows, indent=1) + "\n")
