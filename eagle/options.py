"""From the arguments of a generation call to requests: one signature for every public method.

B rows, T columns of the prompt as given, V vocabulary."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
)
from torch import nn

from .errors import EagleError
from .prompts import Prompt, plain
from .request import Request, Stopping
from .sampling import SamplingParams

# fields that change the text and that we do not honour, with the value that means "off"
REFUSED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(
        "penalty_alpha top_h sequence_bias max_time dola_layers forced_bos_token_id "
        "forced_eos_token_id begin_suppress_tokens exponential_decay_length_penalty "
        "watermarking_config prompt_lookup_num_tokens renormalize_logits remove_invalid_values "
        "token_healing".split()
    ),
}
# processors of transformers that keep state between calls: each row of a batch has one of its own
STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperNoSpeechDetection",
)
DEFAULT_NEW = 20  # what transformers generates where a config says nothing of lengths
# as a float32, far below every probability: as top_p it keeps the likeliest token alone
SMALLEST = 1e-30


def whole(value: Any) -> Any:
    value = plain(value)  # upstream's top_k=0.0
    return int(value) if isinstance(value, float) and value.is_integer() else value


def listed(value: Any) -> Any:
    """One, or several; an empty list is none."""
    value = plain(value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value] or None
    return [value] if isinstance(value, str) or callable(value) else value


def end_tokens(ids: Any) -> Any:
    """Negative ids, and an empty list, mean none."""
    ids = plain(ids)
    several = isinstance(ids, (list, tuple, set, frozenset))
    return [plain(i) for i in ids] if several else [ids] if isinstance(ids, Integral) else ids


def stop_criteria(given: Any) -> list | None:
    from transformers import StopStringCriteria

    if foreign := [type(c).__name__ for c in given or [] if not isinstance(c, StopStringCriteria)]:
        raise ValueError(
            f"holds {', '.join(foreign)}; StopStringCriteria is taken, and stop_strings, "
            "eos_token_id, max_new_tokens"
        )
    return list(given) if given else None


Number = Annotated[float | None, BeforeValidator(plain)]
Limit = Annotated[Annotated[int, Field(ge=1, lt=2**63)] | None, BeforeValidator(whole)]
Count = Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(whole)]
Flag = Annotated[bool | None, BeforeValidator(plain)]
Ends = Annotated[
    frozenset[StrictInt] | None,
    Field(strict=False),
    BeforeValidator(end_tokens),
    AfterValidator(lambda ids: ids and frozenset(i for i in ids if i >= 0)),
]


class Options(BaseModel):
    """What a request may ask for. temperature 0 is greedy; top_k 0, top_p 0 or 1 and min_p 0 are
    off. do_sample=True alone samples at temperature 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_new_tokens: Limit = 512
    max_length: Limit = None
    min_new_tokens: Count = None
    min_length: Count = None
    temperature: Number = None
    top_p: Number = None
    top_k: Count = None
    min_p: Number = None
    do_sample: Flag = None
    repetition_penalty: Number = None
    no_repeat_ngram_size: Count = None
    bad_words_ids: Any = None
    suppress_tokens: Any = None
    eos_token_id: Ends = None
    stop_strings: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(listed)
    ] = None
    logits_processor: Annotated[list[Callable] | None, BeforeValidator(listed)] = None
    stopping_criteria: Annotated[Any, BeforeValidator(stop_criteria)] = None
    logprobs: Flag = False

    def over(self, generation_config=None, **options) -> Options:
        """These options under those of a GenerationConfig, and both under the arguments of a call.
        Unknown names are errors."""
        known = Options.model_fields.keys()
        if unknown := sorted(options.keys() - known):
            raise EagleError(
                f"unknown option {', '.join(unknown)}; use some of {', '.join(sorted(known))}"
            )
        options = {k: v for k, v in options.items() if v is not None}
        values = {} if generation_config is None else read_config(generation_config)
        if "max_new_tokens" in options:
            values.pop("max_length", None)  # as in transformers, new tokens win
        merged = {**values, **options}
        if "temperature" in options and "do_sample" not in options:
            merged["do_sample"] = None  # the temperature says it, whatever was said further out
        try:
            return Options(**{**dict(self), **merged})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            said = re.sub("^(Input|String) should", "must", first["msg"])
            said = said.removeprefix("Value error, ")
            wrong = f"{first['loc'][0]} {said}, not {str(first['input'])[:60]!r}"
            raise EagleError(wrong) from error

    @property
    def sampling(self) -> SamplingParams:
        temperature = self.temperature
        if self.do_sample is False:
            temperature = 0.0
        elif self.do_sample and temperature is None:
            temperature = 1.0
        elif self.do_sample and temperature == 0.0:
            raise EagleError("do_sample=True conflicts with temperature 0; give a temperature > 0")
        temperature = temperature or 0.0
        return SamplingParams(temperature, self.top_k or 0, self.top_p or 0.0, self.min_p or 0.0)

    def request(
        self, prompt: Prompt, seed: int, eos: frozenset[int], tokenizer, device, place=0, rows=1
    ) -> Request:
        """eos: the model's own end tokens, for when none are named. tokenizer(): asked for where
        there are stop strings. device: of the logits that processors will see. place, rows: of a
        batch, where processors are shown one."""
        if self.eos_token_id is not None:
            eos = self.eos_token_id
        tests = list(self.stopping_criteria or [])
        if self.stop_strings:
            tests.append(string_criteria(tokenizer(), tuple(self.stop_strings)))
        stop = stopper(tests, prompt.given) if tests else None
        ids, given, max_length = prompt.ids, prompt.given, self.max_length
        if max_length is not None:  # of the row as given; positions that are padding do not count
            max_length -= len(given) - len(ids)
        stopping = Stopping(self.max_new_tokens, eos, stop, max_length)
        processor = self._processor(len(given), eos, device, place, rows)
        return Request(ids, self.sampling, seed, stopping, processor, self.logprobs, given)

    def _processor(self, length: int, eos: frozenset[int], device, place: int, rows: int):
        """transformers' own processors for what is asked, in its order, then those given; None
        where nothing is."""
        from transformers.generation import logits_process as hf

        steps = []

        def own(make, *args, **options):
            try:
                steps.append((make(*args, **options), 0, 1))
            except (ValueError, TypeError) as error:
                raise EagleError(str(error)) from error

        if self.repetition_penalty not in (None, 1.0):
            own(hf.RepetitionPenaltyLogitsProcessor, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            own(hf.NoRepeatNGramLogitsProcessor, self.no_repeat_ngram_size)
        if self.bad_words_ids:
            own(hf.NoBadWordsLogitsProcessor, plain(self.bad_words_ids), sorted(eos))
        least, most = self.min_new_tokens, self.max_new_tokens
        if least and least > most:
            raise EagleError(f"min_new_tokens {least} is above max_new_tokens {most}")
        if least and eos:
            how = length, least, sorted(eos)
            own(hf.MinNewTokensLengthLogitsProcessor, *how, device=device)
        elif self.min_length and eos:
            own(hf.MinLengthLogitsProcessor, self.min_length, sorted(eos), device=device)
        if self.suppress_tokens:
            own(hf.SuppressTokensLogitsProcessor, plain(self.suppress_tokens), device=device)
        for given in self.logits_processor or []:
            if isinstance(given, hf.PrefixConstrainedLogitsProcessor):
                # it asks for the row's number alone: no batch need be made up for that
                allowed = given._prefix_allowed_tokens_fn
                own(hf.PrefixConstrainedLogitsProcessor, lambda _, ids, f=allowed: f(place, ids), 1)
            elif rows > 1 and type(given).__name__ in STATEFUL:
                models = {id(v): v for v in vars(given).values() if isinstance(v, nn.Module)}
                steps.append((copy.deepcopy(given, models), place, rows))
            else:  # of its own attributes each row has its own, of what they hold there is one
                steps.append((copy.copy(given) if rows > 1 else given, place, rows))
        return Processor(steps) if steps else None


@dataclass(frozen=True)
class Processor:
    """transformers' processors as plain decoding calls them: once a token, in order of the text,
    with a batch of copies of this row. steps: (processor, place, rows)."""

    steps: list[tuple[Callable, int, int]]

    def __call__(self, context: list[int], logits: torch.Tensor) -> torch.Tensor:
        """context: the row's tokens, padding as given included; logits [V] -> [V] float32."""
        scores = logits.float()[None]
        ids = torch.tensor([context], dtype=torch.int64, device=logits.device)
        for processor, place, rows in self.steps:
            out = processor(ids.repeat(rows, 1), scores.repeat(rows, 1))
            shape = list(getattr(out, "shape", ()))
            if shape != [rows, logits.shape[0]]:
                raise ValueError(f"it returned {shape}, not scores {[rows, logits.shape[0]]}")
            scores = out[place : place + 1].float()
        return scores[0]


def read_config(config) -> dict:
    """The options that a GenerationConfig asks for; what we do not honour is refused."""
    if not hasattr(config, "max_new_tokens"):
        raise EagleError(f"generation_config must be a GenerationConfig, not {config!r}")
    refuse(config, REFUSED)
    same = Options.model_fields.keys() - {"logits_processor", "stopping_criteria", "logprobs"}
    values = {name: getattr(config, name, None) for name in same}
    values = {k: v for k, v in values.items() if v is not None}
    # what transformers puts in for what a config leaves open
    values = {"do_sample": False, "temperature": 1.0, "top_k": 50, **values}
    values["top_p"] = top_p_of(config)
    if "max_new_tokens" in values:  # transformers: the length in new tokens wins
        values.pop("max_length", None)
    elif "max_length" in values:
        values["max_new_tokens"] = values["max_length"]
    else:
        values["max_new_tokens"] = DEFAULT_NEW
    return values


def top_p_of(config) -> float | None:
    """0 keeps the likeliest token alone there; here it is off."""
    return SMALLEST if config.top_p == 0.0 else config.top_p


def refuse(config, names: Iterable[str]) -> None:
    for name in names:
        off = REFUSED[name]
        value = getattr(config, name, off)
        if value not in (off, None, False):
            raise EagleError(
                f"generation_config asks for {name}={value!r}, which is not honoured here; leave "
                f"it at {off!r}, or pass a logits_processor that does it"
            )


@functools.lru_cache(64)
def string_criteria(tokenizer, strings: tuple[str, ...]):
    """transformers' own, which looks at the whole vocabulary when it is made."""
    from transformers import StopStringCriteria

    try:
        return StopStringCriteria(tokenizer, list(strings))
    except Exception as error:  # of whatever tokenizer it is
        said = f"{type(error).__name__}: {error}"
        raise EagleError(f"stop_strings {list(strings)} with this tokenizer: {said}") from error


def stopper(criteria: list, given: list[int]) -> Callable[[list[int]], int | None]:
    """How many new tokens to keep: up to the one that completes a stop string, which may begin in
    the prompt."""
    reach = max(c.maximum_token_len for c in criteria)
    before, checked = given[-reach:], 0

    def stop(tokens: list[int]) -> int | None:
        nonlocal checked
        context = torch.tensor([before + tokens])
        for end in range(checked + 1, len(tokens) + 1):
            ids = context[:, : len(before) + end]
            if any(c(ids[:, -reach:], None).item() for c in criteria):
                return end
        checked = len(tokens)
        return None

    return stop
