"""From the arguments of a generation call to requests: one signature for every public method.

Knows tokenizers and transformers' GenerationConfig; knows nothing of decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch

from .errors import EagleError
from .request import Request, Stopping
from .sampling import SamplingParams

# fields of a GenerationConfig that mean the same here
SAME = (
    "max_new_tokens max_length min_new_tokens do_sample temperature top_k top_p min_p repetition_penalty "
    "no_repeat_ngram_size bad_words_ids suppress_tokens eos_token_id stop_strings"
).split()
# fields that change the text and that we do not honour, with the value that means "off"
REFUSED = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None, "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0, "sequence_bias": None, "min_length": 0, "max_time": None, "dola_layers": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None, "watermarking_config": None, "renormalize_logits": False,
    "encoder_no_repeat_ngram_size": 0, "remove_invalid_values": False, "token_healing": False,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a request may ask for. temperature 0 is greedy; top_k 0, top_p 0 or 1 and min_p 0 are off.

    do_sample=True alone samples at temperature 1. seed: an int; in a batch row i uses seed + i.
    """

    max_new_tokens: int = 512
    max_length: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    do_sample: bool | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    logits_processor: Any = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise EagleError(f"{name} must be a number, not {value!r}")
        for name in ("top_k", "min_new_tokens", "no_repeat_ngram_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and value >= 0):
                raise EagleError(f"{name} must be a whole number >= 0 (0 is off), not {value!r}")

    def over(self, generation_config=None, **options) -> Options:
        """These options under those of a GenerationConfig, and both under the arguments of a call.
        Unknown names are errors."""
        known = {f.name for f in fields(self)}
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
        return replace(self, **merged)

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
        self, prompt: list[int], seed: int, eos: frozenset[int], tokenizer, device
    ) -> Request:
        """eos: the model's own end tokens, for when none are named. tokenizer(): called for stop strings.
        device: of the logits that processors will see."""
        if self.eos_token_id is not None:
            eos = end_tokens(self.eos_token_id)
        stop = stopper(self.stop_strings, tokenizer) if self.stop_strings else None
        return Request(
            prompt, self.sampling, seed, Stopping(self.max_new_tokens, eos, stop, self.max_length),
            self._processor(len(prompt), eos, device), self.logprobs,
        )  # fmt: skip

    def _processor(self, prompt_length: int, eos: frozenset[int], device):
        """transformers' own processors for what is asked, in its order; None where nothing is."""
        from transformers.generation import logits_process as hf

        found = hf.LogitsProcessorList()
        if self.repetition_penalty not in (None, 1.0):
            found.append(checked(hf.RepetitionPenaltyLogitsProcessor, self.repetition_penalty))
        if self.no_repeat_ngram_size:
            found.append(checked(hf.NoRepeatNGramLogitsProcessor, self.no_repeat_ngram_size))
        if self.bad_words_ids:
            found.append(checked(hf.NoBadWordsLogitsProcessor, self.bad_words_ids, sorted(eos)))
        if self.min_new_tokens:
            if self.min_new_tokens > self.max_new_tokens:
                raise EagleError(
                    f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}"
                )
            if eos:
                least = (prompt_length, self.min_new_tokens, sorted(eos))
                found.append(checked(hf.MinNewTokensLengthLogitsProcessor, *least, device=device))
        if self.suppress_tokens:
            make = hf.SuppressTokensLogitsProcessor
            found.append(checked(make, self.suppress_tokens, device=device))
        given = self.logits_processor
        if given is not None:
            given = given if isinstance(given, (list, tuple)) else [given]
            if bad := [p for p in given if not callable(p)]:
                raise EagleError(
                    f"logits_processor holds {bad[0]!r}; give callables (input_ids, scores) -> scores"
                )
            found.extend(given)
        return found or None


def end_tokens(ids: int | Sequence[int]) -> frozenset[int]:
    """Negative ids, and an empty list, mean none."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [ids] if isinstance(ids, int) else ids
    if not isinstance(ids, (list, tuple, set, frozenset)) or any(
        not isinstance(i, int) for i in ids
    ):
        raise EagleError(f"eos_token_id must be a token id or a list of them, not {ids!r}")
    return frozenset(i for i in ids if i >= 0)


def checked(make, *args, **options):
    try:
        return make(*args, **options)
    except (ValueError, TypeError) as error:
        raise EagleError(str(error)) from error


def read_config(config) -> dict:
    """The options that a transformers GenerationConfig asks for; what we do not honour is refused."""
    if not hasattr(config, "max_new_tokens"):
        raise EagleError(
            f"generation_config must be a transformers GenerationConfig, not {config!r}"
        )
    refuse(config, REFUSED)
    values = {name: getattr(config, name, None) for name in SAME}
    values = {k: v for k, v in values.items() if v is not None}
    # what transformers puts in for what a config leaves open
    values = {"do_sample": False, "temperature": 1.0, "top_k": 50, **values}
    if "max_new_tokens" in values:  # transformers: the length in new tokens wins
        values.pop("max_length", None)
    elif "max_length" in values:
        values["max_new_tokens"] = values["max_length"]
    return values


def refuse(config, names: Iterable[str]) -> None:
    for name in names:
        off = REFUSED[name]
        value = getattr(config, name, off)
        if value not in (off, None, False):
            raise EagleError(
                f"generation_config asks for {name}={value!r}, which lossless decoding of one sequence does not "
                f"honour; leave it at {off!r}, or pass a logits_processor that does it"
            )


def stopper(strings: str | Sequence[str], tokenizer):
    """How many new tokens to keep: up to the one that completes a stop string, as transformers does."""
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not all(isinstance(s, str) and s for s in strings):
        raise EagleError(f"stop_strings must be strings that are not empty, not {strings!r}")
    tokenizer, longest = tokenizer(), max(len(s.encode()) for s in strings)
    checked = 0

    def stop(tokens: list[int]) -> int | None:
        nonlocal checked
        for end in range(checked + 1, len(tokens) + 1):
            # a token is at least a byte of text or nothing at all: look back far enough and no further
            text = tokenizer.decode(tokens[max(0, end - longest - 8) : end])
            if any(s in text for s in strings):
                return end
        checked = len(tokens)
        return None

    return stop


def read_prompts(input_ids, attention_mask) -> list[list[int]]:
    """[B, T] with a mask, or a list of lists, or one list -> token lists without padding."""
    if input_ids is None or isinstance(input_ids, int):
        raise EagleError(
            f"input_ids must be token ids [B, T] or a list of lists, not {input_ids!r}"
        )
    if isinstance(input_ids, torch.Tensor):
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise EagleError(
                f"input_ids must be whole numbers [B, T], not {input_ids.dtype} {list(input_ids.shape)}"
            )
        if attention_mask is None:
            prompts = input_ids.tolist()
        else:
            mask = torch.as_tensor(attention_mask).to(input_ids.device).bool()
            mask = mask[None] if mask.ndim == 1 else mask
            if mask.shape != input_ids.shape:
                raise EagleError(
                    f"attention_mask {list(mask.shape)} does not fit input_ids {list(input_ids.shape)}"
                )
            # with a False put in front, one run of tokens begins once
            begins = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
            if (begins.sum(1) > 1).any():
                raise EagleError(
                    "attention_mask has holes; padding may stand before or after a row's tokens only"
                )
            prompts = [row[keep].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    else:
        if attention_mask is not None:
            raise EagleError(
                "attention_mask goes with a tensor of input_ids; lists carry no padding"
            )
        prompts = list(input_ids)
        if prompts and all(isinstance(p, int) for p in prompts):
            prompts = [prompts]
        prompts = [p.tolist() if isinstance(p, torch.Tensor) else p for p in prompts]
        for p in prompts:
            if not isinstance(p, (list, tuple)) or any(not isinstance(t, int) for t in p):
                raise EagleError(
                    "a batch must hold lists of token ids only; tokenize every prompt first"
                )
    if not prompts:
        raise EagleError("the batch is empty; give at least one prompt")
    return [list(p) for p in prompts]


def check_prompt(row: int, prompt: list[int], vocab_size: int) -> None:
    if not prompt:
        raise EagleError(f"prompt {row} is empty; give at least one token")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise EagleError(
            f"prompt {row} has token ids outside 0 … {vocab_size - 1}; use the target's tokenizer"
        )
