"""From the arguments of a generation call to requests: one signature for every public method.

Knows tokenizers and transformers' GenerationConfig; knows nothing of decoding.

B rows, T columns of the prompt as given, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from torch import nn

from .errors import EagleError
from .request import Request, Stopping
from .sampling import SamplingParams

# fields of a GenerationConfig that mean the same here
SAME = (
    "max_new_tokens max_length min_new_tokens min_length do_sample temperature top_k top_p min_p repetition_penalty "
    "no_repeat_ngram_size bad_words_ids suppress_tokens eos_token_id stop_strings"
).split()
# fields that change the text and that we do not honour, with the value that means "off"
REFUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "max_time": None,
    "dola_layers": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "encoder_no_repeat_ngram_size": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "prompt_lookup_num_tokens": None,
}
# processors of transformers that keep state between calls: each row of a batch has one of its own
STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "WhisperNoSpeechDetection",
)
DEFAULT_NEW = 20  # what transformers generates where a config says nothing of lengths
SMALLEST = (
    1e-30  # as a float32, far below every probability: as top_p it keeps the likeliest token alone
)


def plain(value: Any) -> Any:
    """A number, or a list of them, of numpy or torch as Python has it."""
    if isinstance(value, (np.generic, np.ndarray)) or isinstance(value, torch.Tensor):
        return value.tolist()
    return value


def number(value: Any) -> float | None:
    value = plain(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ValueError(f"must be a number, not {value!r}")
    return None if value is None else float(value)


def whole(least: int, off: str = "") -> Callable[[Any], int | None]:
    def check(value: Any) -> int | None:
        value = plain(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # upstream's top_k=0.0
        good = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (good and least <= value < 2**63):
            raise ValueError(f"must be a whole number of at least {least}{off}, not {value!r}")
        return value

    return check


def flag(value: Any) -> bool | None:
    value = plain(value)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"must be True or False, not {value!r}")
    return value


def texts(value: Any) -> list[str] | None:
    found = [value] if isinstance(value, str) else value
    if found is None or isinstance(found, (list, tuple)) and not found:
        return None
    if not isinstance(found, (list, tuple)) or not all(isinstance(s, str) and s for s in found):
        raise ValueError(f"must be a string or strings that are not empty, not {value!r}")
    return list(found)


def end_tokens(ids: Any) -> frozenset[int] | None:
    """Negative ids, and an empty list, mean none."""
    ids = plain(ids)
    found = [ids] if isinstance(ids, Integral) else ids
    whole = isinstance(found, (list, tuple, set, frozenset)) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in found
    )
    if found is not None and not whole:
        raise ValueError(f"must be a token id or a list of them, not {ids!r}")
    return None if found is None else frozenset(int(i) for i in found if i >= 0)


def processors(given: Any) -> list | None:
    found = [given] if callable(given) else given
    if found is not None and not isinstance(found, (list, tuple)):
        raise ValueError(f"is {given!r}; give callables (input_ids, scores) -> scores")
    if bad := [p for p in found or [] if not callable(p)]:
        raise ValueError(f"holds {bad[0]!r}; give callables (input_ids, scores) -> scores")
    return list(found) if found else None


def stop_criteria(given: Any) -> list | None:
    from transformers import StopStringCriteria

    if foreign := [type(c).__name__ for c in given or [] if not isinstance(c, StopStringCriteria)]:
        raise ValueError(
            f"holds {', '.join(foreign)}; StopStringCriteria is taken, and stop_strings, eos_token_id, max_new_tokens"
        )
    return list(given) if given else None


Number = Annotated[Any, BeforeValidator(number)]
Limit = Annotated[Any, BeforeValidator(whole(1))]
Count = Annotated[Any, BeforeValidator(whole(0, " (0 is off)"))]
Flag = Annotated[Any, BeforeValidator(flag)]


class Options(BaseModel):
    """What a request may ask for. temperature 0 is greedy; top_k 0, top_p 0 or 1 and min_p 0 are
    off.

    do_sample=True alone samples at temperature 1. seed: an int; in a batch row i uses seed + i.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    eos_token_id: Annotated[Any, BeforeValidator(end_tokens)] = None
    stop_strings: Annotated[Any, BeforeValidator(texts)] = None
    logits_processor: Annotated[Any, BeforeValidator(processors)] = None
    stopping_criteria: Annotated[Any, BeforeValidator(stop_criteria)] = None
    logprobs: Flag = False

    def over(self, generation_config=None, **options) -> Options:
        """These options under those of a GenerationConfig, and both under the arguments of a call.
        Unknown names are errors."""
        known = set(Options.model_fields)
        if unknown := sorted(set(options) - known):
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
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise EagleError(f"{first['loc'][0]} {reason}") from error

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
        self,
        prompt: Prompt,
        seed: int,
        eos: frozenset[int],
        criteria: Callable,
        device,
        place: int = 0,
        rows: int = 1,
    ) -> Request:
        """eos: the model's own end tokens, for when none are named. criteria(strings):
        transformers' StopStringCriteria for them. device: of the logits that processors will see.
        place, rows: of a batch, where processors are shown one."""
        if self.eos_token_id is not None:
            eos = self.eos_token_id
        tests = list(self.stopping_criteria or [])
        if self.stop_strings:
            tests.append(criteria(tuple(self.stop_strings)))
        stop = stopper(tests, prompt.given) if tests else None
        max_length = self.max_length
        if max_length is not None:  # of the row as given; positions that are padding do not count
            max_length -= len(prompt.given) - len(prompt.ids)
        stopping = Stopping(self.max_new_tokens, eos, stop, max_length)
        processor = self._processor(len(prompt.given), eos, device, place, rows)
        return Request(
            prompt.ids, self.sampling, seed, stopping, processor, self.logprobs, prompt.given
        )

    def _processor(self, length: int, eos: frozenset[int], device, place: int, rows: int):
        """transformers' own processors for what is asked, in its order, then those given; None
        where nothing is.
        """
        from transformers.generation import logits_process as hf

        steps = []

        def own(make, *args, **options):
            steps.append((checked(make, *args, **options), 0, 1))

        if self.repetition_penalty not in (None, 1.0):
            own(hf.RepetitionPenaltyLogitsProcessor, self.repetition_penalty)
        if self.no_repeat_ngram_size:
            own(hf.NoRepeatNGramLogitsProcessor, self.no_repeat_ngram_size)
        if self.bad_words_ids:
            own(hf.NoBadWordsLogitsProcessor, plain(self.bad_words_ids), sorted(eos))
        if self.min_length and eos and not self.min_new_tokens:
            own(hf.MinLengthLogitsProcessor, self.min_length, sorted(eos), device=device)
        if self.min_new_tokens:
            if self.min_new_tokens > self.max_new_tokens:
                raise EagleError(
                    f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
                )
            if eos:
                least = (length, self.min_new_tokens, sorted(eos))
                own(hf.MinNewTokensLengthLogitsProcessor, *least, device=device)
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
    """transformers' processors as plain decoding calls them: once a token, in the order of the
    text, with a batch in which this row has its place. The others of that batch are copies of it.
    steps: (processor, place, rows)."""

    steps: list[tuple[Callable, int, int]]

    def __call__(self, context: list[int], logits: torch.Tensor) -> torch.Tensor:
        """context: the row's tokens, padding as given included; logits [V] -> [V] float32."""
        scores = logits.float()[None]
        ids = torch.tensor([context], dtype=torch.int64, device=logits.device)
        for processor, place, rows in self.steps:
            out = processor(ids.repeat(rows, 1), scores.repeat(rows, 1))
            if not isinstance(out, torch.Tensor) or out.shape != (rows, logits.shape[0]):
                shape = list(out.shape) if isinstance(out, torch.Tensor) else out
                raise ValueError(f"it returned {shape}, not scores {[rows, logits.shape[0]]}")
            scores = out[place : place + 1].float()
        return scores[0]


def checked(make, *args, **options):
    try:
        return make(*args, **options)
    except (ValueError, TypeError) as error:
        raise EagleError(str(error)) from error


def read_config(config) -> dict:
    """The options that a transformers GenerationConfig asks for; what we do not honour is
    refused.
    """
    if not hasattr(config, "max_new_tokens"):
        raise EagleError(
            f"generation_config must be a transformers GenerationConfig, not {config!r}"
        )
    refuse(config, REFUSED)
    values = {name: getattr(config, name, None) for name in SAME}
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
                f"generation_config asks for {name}={value!r}, which lossless decoding of one sequence does not "
                f"honour; leave it at {off!r}, or pass a logits_processor that does it"
            )


def stopper(criteria: list, given: list[int]) -> Callable[[list[int]], int | None]:
    """How many new tokens to keep: up to the one that completes a stop string, which may begin in
    the prompt. criteria: transformers' StopStringCriteria."""
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


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens that count. given: the row as the caller gave it, with its padding."""

    ids: list[int]
    given: list[int]


@dataclass(frozen=True)
class Prompts:
    """A row each: a Prompt, or why it is none. tensor [B, T]: what was given, where it was a
    tensor.
    """

    rows: list[Prompt | EagleError]
    tensor: torch.Tensor | None = None


def read_prompts(input_ids, attention_mask=None, pad: int | None = None, **beside) -> Prompts:
    """[B, T] or [T] of torch or numpy with padding marked by a mask, or by the token `pad` where
    there is no mask; a list of lists, or one list; or what a tokenizer returns. beside: its further
    outputs."""
    if isinstance(input_ids, Mapping):
        inside = dict(input_ids)
        if "input_ids" not in inside:
            raise EagleError(
                "there are no input_ids in what was given; pass what the tokenizer returns"
            )
        if attention_mask is None:
            attention_mask = inside.pop("attention_mask", None)
        return read_prompts(inside.pop("input_ids"), attention_mask, pad, **inside, **beside)
    for name, value in beside.items():
        if name != "token_type_ids" or torch.as_tensor(value).any():
            raise EagleError(f"{name} is not used here; pass input_ids and attention_mask")
    if isinstance(input_ids, np.ndarray) and input_ids.dtype != object:
        input_ids = torch.from_numpy(input_ids)
    if isinstance(input_ids, torch.Tensor):
        return read_tensor(input_ids, attention_mask, pad)
    if isinstance(input_ids, str) or not isinstance(input_ids, Iterable):
        raise EagleError(
            f"input_ids must be token ids [B, T] or a list of lists, not {input_ids!r}; tokenize text first"
        )
    prompts = [plain(p) for p in input_ids]
    if prompts and all(is_id(p) for p in prompts):
        prompts = [prompts]
        attention_mask = None if attention_mask is None else [plain(m) for m in attention_mask]
        if attention_mask and not isinstance(attention_mask[0], list):
            attention_mask = [attention_mask]
    if not prompts:
        raise EagleError("the batch is empty; give at least one prompt")
    if attention_mask is not None:  # a tokenizer's lists
        masks = [plain(m) for m in attention_mask]
        if [len(m) for m in masks] != [len(p) for p in prompts]:
            raise EagleError("attention_mask does not fit input_ids; give one number a token")
        if not all(all(m) for m in masks):
            if len({len(p) for p in prompts}) > 1:
                raise EagleError(
                    "attention_mask marks padding in lists of different lengths; pad them to one length, or leave "
                    "padding and mask out"
                )
            return read_tensor(torch.tensor(prompts), torch.tensor(masks), pad)
    return Prompts([read_list(p) for p in prompts])


def read_list(prompt) -> Prompt | EagleError:
    if not isinstance(prompt, (list, tuple)) or not all(is_id(t) for t in prompt):
        return EagleError(
            f"a prompt must be a list of token ids, not {str(prompt)[:60]!r}; tokenize every prompt first"
        )
    ids = [int(t) for t in prompt]
    return Prompt(ids, ids)


def is_id(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_tensor(ids: torch.Tensor, attention_mask, pad: int | None) -> Prompts:
    """[B, T] or [T] -> the tokens of each row without its padding."""
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise EagleError(
            f"input_ids must be whole numbers [B, T], not {ids.dtype} {list(ids.shape)}"
        )
    if not len(ids):
        raise EagleError("the batch is empty; give at least one prompt")
    if attention_mask is None and pad is not None:  # as stock `generate` does
        attention_mask = ids.ne(pad)
    if attention_mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    else:
        mask = torch.as_tensor(attention_mask).to(ids.device).bool()
        mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise EagleError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}"
        )
    # with a False put in front, one run of tokens begins once
    begins = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    if (begins.sum(1) > 1).any():
        raise EagleError(
            "attention_mask has holes, or the padding token stands between others; padding may stand before or after "
            "a row's tokens only: pass an attention_mask that says which they are"
        )
    rows = [Prompt(row[keep].tolist(), row.tolist()) for row, keep in zip(ids, mask, strict=True)]
    return Prompts(rows, ids)


def check_prompt(row: int, prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise EagleError(f"prompt {row} is empty; give at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise EagleError(
            f"prompt {row} has token ids outside 0 … {vocab_size - 1}; use the target's tokenizer"
        )
