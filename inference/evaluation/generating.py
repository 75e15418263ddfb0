"""Running the model over problems: batches over slots, each completion kept as soon as it is
there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from eagle.errors import EagleError
from eagle.files import weights_hash
from eagle.meter import Meter
from records.prompts import chat_prompt, text_prompt

from .generations import TOO_LONG, Generations, Sample, Sampling, from_records, sample_seed
from .journal import Journal
from .problem import Problem, some

# a call of the engine has at most so many completions a slot: its cache is as wide as its longest
# prompt needs (sorted, they are of similar length), and refilling slots is idle only at its end
CHUNK = 32


class Generator:
    """A model with the settings of a run, and the journal of its completions,
    `generations-FINGERPRINT.jsonl`."""

    def __init__(self, model, sampling: Sampling, output: str | Path) -> None:
        if sampling.engine == "eagle" and model.drafter is None:
            raise EagleError("no draft head: give --head PATH, or --engine vanilla")
        self.model, self.sampling = model, sampling
        self.settings = describe(model, sampling)
        own = {k: v for k, v in self.settings.items() if k != "model"}  # wherever its files lie
        self.fingerprint = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        self.path = Path(output) / f"generations-{self.fingerprint[:12]}.jsonl"

    def wanted(self, problems: Sequence[Problem], n_samples: int) -> list[tuple[dict, Sample]]:
        """(request, completion that is still to be made) of a run, the longest prompts first."""
        found, chat = [], self.sampling.chat
        for problem in problems:
            ids = self.prompt(problem)
            # what ends a completion of code may well stand in an answer of a chat
            stops = None if chat else problem.stops or None
            for number in range(n_samples):
                seed = sample_seed(self.sampling.seed, problem.task_id, number)
                text = json.dumps([self.fingerprint, ids, list(problem.stops), seed])
                key = hashlib.sha256(text.encode()).hexdigest()
                name = problem.task_id, number
                sample = Sample(*name, "", seed, 0, 0, TOO_LONG, key, chat or None)
                found.append(({"input_ids": ids, "seed": seed, "stop_strings": stops}, sample))
        return sorted(found, key=lambda one: -len(one[0]["input_ids"]))

    def prompt(self, problem: Problem) -> list[int]:
        tokenizer = self.model.tokenizer
        if self.sampling.chat:
            return chat_prompt(tokenizer, [{"role": "user", "content": problem.question}])
        return text_prompt(tokenizer, problem.prompt)

    def run(
        self,
        problems: Sequence[Problem],
        n_samples: int,
        slots: int,
        take: Callable[[Sample], None] = lambda sample: None,
    ) -> Generations:
        """The completions that the journal has, as they are, and the others, made and added to it;
        `take` is handed each one."""
        wanted, failed = self.wanted(problems, n_samples), []
        with Journal(self.path) as kept:
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
                    kept.append(sample.record())
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
        """As they are finished. A prompt that does not fit the model is an empty completion that
        says so."""
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


def describe(model, sampling: Sampling) -> dict:
    """Model, head, adapter and sampling, weights by their fingerprints: what a completion depends
    on, apart from its prompt and seed."""
    target, settings = model.target, sampling.model_dump()
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
