"""Prompts in every form that people give: tensors with padding, lists, what a tokenizer returns.

B rows, T columns of the prompt as given, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .errors import EagleError

EMPTY = "the batch is empty; give at least one prompt"


def plain(value: Any) -> Any:
    """A number, or a list of them, of numpy or torch as Python has it."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens that count. given: the row as the caller gave it, with its padding."""

    ids: list[int]
    given: list[int]


@dataclass(frozen=True)
class Prompts:
    """A row each: a Prompt, or why it is none. tensor [B, T]: what was given, where it was one."""

    rows: list[Prompt | EagleError]
    tensor: torch.Tensor | None = None


def read_prompts(input_ids, attention_mask=None, pad: int | None = None, **beside) -> Prompts:
    """[B, T] or [T] of torch or numpy, padding marked by a mask, else by the token `pad`; a list
    of lists, or one list; or what a tokenizer returns, with its further outputs `beside`."""
    if isinstance(input_ids, Mapping):
        inside = {**input_ids, **beside}
        if "input_ids" not in inside:
            raise EagleError("what was given has no input_ids; pass what the tokenizer returns")
        mask = inside.pop("attention_mask", None)
        mask = mask if attention_mask is None else attention_mask
        return read_prompts(inside.pop("input_ids"), mask, pad, **inside)
    for name, value in beside.items():
        if name != "token_type_ids" or torch.as_tensor(value).any():
            raise EagleError(f"{name} is not used here; pass input_ids and attention_mask")
    if isinstance(input_ids, np.ndarray) and input_ids.dtype != object:
        input_ids = torch.from_numpy(input_ids)
    if isinstance(input_ids, torch.Tensor):
        return read_tensor(input_ids, attention_mask, pad)
    if isinstance(input_ids, str) or not isinstance(input_ids, Iterable):
        said = f"input_ids must be token ids [B, T] or a list of lists, not {input_ids!r}"
        raise EagleError(f"{said}; tokenize text first")
    prompts = [plain(p) for p in input_ids]
    masks = None if attention_mask is None else [plain(m) for m in attention_mask]
    if prompts and all(is_id(p) for p in prompts):
        prompts = [prompts]
        masks = [masks] if masks and not isinstance(masks[0], list) else masks
    if not prompts:
        raise EagleError(EMPTY)
    rows = [read_list(p) for p in prompts]
    if masks is None or any(isinstance(row, EagleError) for row in rows):
        return Prompts(rows)
    lengths = [len(row.ids) for row in rows]
    if not all(isinstance(m, list) for m in masks) or [len(m) for m in masks] != lengths:
        raise EagleError("attention_mask does not fit input_ids; give one number a token")
    if len(set(lengths)) == 1:  # a tokenizer's lists
        return read_tensor(torch.tensor(prompts), torch.tensor(masks), pad)
    if not all(all(m) for m in masks):
        said = "attention_mask marks padding in lists of different lengths"
        raise EagleError(f"{said}; pad them to one length")
    return Prompts(rows)


def split_options(input_ids, attention_mask, pad: int | None, beside: dict) -> tuple[Prompts, list]:
    """Prompts, and the options that each brings along. One that cannot be read is an error."""
    if isinstance(input_ids, Iterator):
        input_ids = list(input_ids)
    several = isinstance(input_ids, (list, tuple))
    if not several or not any(isinstance(p, Mapping) for p in input_ids):
        prompts = read_prompts(input_ids, attention_mask, pad, **beside)
        return prompts, [{} for _ in prompts.rows]
    if attention_mask is not None:
        raise EagleError("attention_mask goes with a tensor; requests carry no padding")
    own = [dict(r) if isinstance(r, Mapping) else {"input_ids": r} for r in input_ids]
    missing = EagleError('a request given as a dict needs "input_ids", a list of token ids')
    rows = [read_list(plain(o.pop("input_ids"))) if "input_ids" in o else missing for o in own]
    return Prompts(rows), own


def read_list(prompt) -> Prompt | EagleError:
    if not isinstance(prompt, (list, tuple)) or not all(is_id(t) for t in prompt):
        said = f"a prompt must be a list of token ids, not {str(prompt)[:60]!r}"
        return EagleError(f"{said}; tokenize every prompt first")
    ids = [int(t) for t in prompt]
    return Prompt(ids, ids)


def is_id(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_tensor(ids: torch.Tensor, attention_mask, pad: int | None) -> Prompts:
    """[B, T] or [T] -> the tokens of each row without its padding."""
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise EagleError(f"input_ids must be whole numbers [B, T], not {ids.dtype} {[*ids.shape]}")
    if not len(ids):
        raise EagleError(EMPTY)
    if attention_mask is None:  # as stock `generate` does
        attention_mask = torch.ones_like(ids) if pad is None else ids.ne(pad)
    mask = torch.as_tensor(attention_mask).to(ids.device).bool()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise EagleError(f"attention_mask {[*mask.shape]} does not fit input_ids {[*ids.shape]}")
    # with a False put in front, one run of tokens begins once
    begins = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    if (begins.sum(1) > 1).any():
        raise EagleError(
            "attention_mask has holes, or the padding token stands between others; it may stand "
            "before or after a row's tokens only: pass an attention_mask"
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
