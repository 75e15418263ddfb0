"""`EaModel`: the public face. A target, a head, and the decode loop behind upstream's method names.

B rows, T prompt tokens.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .decode import Row, Stopping, Timings, decode
from .draft import Drafter, HeadDrafter
from .errors import EagleError
from .head import Eagle3Head
from .sampling import SamplingParams, row_seeds
from .target import EMBEDDED, Target
from .tree import TreeShape

EMBEDDED_HEAD = EMBEDDED / "heads" / "eagle3"
EMBEDDED_TREE = "16,4,4"
DEFAULT_TREE = TreeShape()


@dataclass
class Generation:
    """What a call produced. `sequences` [B, L] is prompt + new tokens, right-padded with `pad_id`."""

    rows: list[Row]
    sequences: torch.Tensor
    timings: Timings

    @property
    def new_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def cycles(self) -> int:
        """Verifications, summed over rows."""
        return sum(row.cycles for row in self.rows)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens gained per verification and row, `next_token` included."""
        gained = self.new_tokens - len(self.rows)
        return gained / self.cycles if self.cycles else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Conditional: of the cycles that accepted depth d-1, the share that accepted depth d (d from 1)."""
        return acceptance_by_depth([row.accepted for row in self.rows])


def acceptance_by_depth(histograms: Sequence[list[int]]) -> list[float]:
    """histograms: [a] cycles with a accepted draft tokens -> conditional acceptance rate of depth 1, 2, …"""
    depth = max((len(h) for h in histograms), default=0)
    total = [sum(h[a] for h in histograms if a < len(h)) for a in range(depth)]
    reached = [sum(total[a:]) for a in range(depth)]
    return [reached[a + 1] / reached[a] for a in range(depth - 1) if reached[a]]


class EaModel:
    """A target with its draft head. Generation is lossless: the head changes the speed, never a token."""

    def __init__(
        self,
        target: Target,
        head: Eagle3Head | None = None,
        tree: TreeShape | str = DEFAULT_TREE,
        tokenizer=None,
        drafter: Drafter | None = None,
    ) -> None:
        self.target, self.head, self._tokenizer = target, head, tokenizer
        self.drafter = drafter
        if head is not None:
            target.set_feature_layers(head.config.feature_layers)
            head.eval().requires_grad_(False)
            self.drafter = drafter or HeadDrafter(head, target.embed, TreeShape.parse(tree))

    @classmethod
    def from_pretrained(
        cls,
        base_model_path: str | Path | None = None,
        ea_model_path: str | Path | None = None,
        adapter_path: str | None = None,
        total_token: int | None = None,
        depth: int | None = None,
        top_k: int | None = None,
        use_eagle3: bool | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        **hf_kwargs,
    ) -> EaModel:
        """Load a target and its head; without paths, the embedded model and its head.

        total_token, depth, top_k: the draft tree, upstream's meaning (total_token counts the root). They
        default to 60, 7, 10, and to 16, 4, 4 for the embedded model, where the smaller tree is faster.
        dtype "auto" is the checkpoint's (float32 where a CPU would emulate bf16). Further arguments go to transformers' `from_pretrained`.

        A base model without ea_model_path generates plainly. Raises EagleError when the files cannot be
        read, or the head does not fit the target.
        """
        if use_eagle3 is False:
            raise EagleError(
                "only EAGLE-3 heads are supported; leave use_eagle3 unset, or set it to True"
            )
        default = TreeShape.parse(EMBEDDED_TREE) if base_model_path is None else TreeShape()
        shape = TreeShape(
            default.total_token if total_token in (None, -1) else total_token,
            default.depth if depth is None else depth,
            default.top_k if top_k is None else top_k,
        )
        target = Target.from_pretrained(
            base_model_path, dtype=dtype, device=device, adapter_path=adapter_path, **hf_kwargs
        )
        if ea_model_path is None and base_model_path is None and EMBEDDED_HEAD.exists():
            ea_model_path = EMBEDDED_HEAD
        head = None
        if ea_model_path is not None:
            from .checkpoint import load_head

            head, _ = load_head(ea_model_path, target, dtype=target.dtype, device=target.device)
        return cls(target, head, shape)

    @property
    def tokenizer(self):
        """The target's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.target.name)
        return self._tokenizer

    def eagenerate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        do_sample: bool | None = None,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor=None,
        streamer=None,
        log: bool = False,
        **kwargs,
    ):
        """Prompt and new tokens, [B, L] int64, right-padded; an end token is kept once.

        input_ids: [B, T] with padding on either side marked by attention_mask, or a list of lists. seed:
        an int (row i uses seed + i) or one a row. With `log=True`: (ids, new tokens, cycles), summed over
        rows. `generate` takes the same arguments and returns statistics too.
        """
        result = self.generate(
            input_ids, attention_mask, max_new_tokens=max_new_tokens, max_length=max_length,
            temperature=temperature, top_p=top_p, top_k=top_k, do_sample=do_sample, seed=seed,
            eos_token_id=eos_token_id, stop_strings=stop_strings, logits_processor=logits_processor,
            streamer=streamer, **kwargs,
        )  # fmt: skip
        if log:
            return result.sequences, result.new_tokens, result.cycles
        return result.sequences

    def naivegenerate(self, input_ids, attention_mask=None, **kwargs):
        """`eagenerate` without drafting: the same engine, one token a pass."""
        return self.eagenerate(input_ids, attention_mask, draft=False, **kwargs)

    def ea_generate(self, input_ids, attention_mask=None, **kwargs) -> Iterator[torch.Tensor]:
        """Yields prompt and new tokens so far, [B, L], each time tokens are accepted."""
        steps, pad = self._start(input_ids, attention_mask, **kwargs)
        for rows in steps:
            yield pad_rows(rows, pad, self.target.device)

    def naive_generate(self, input_ids, attention_mask=None, **kwargs) -> Iterator[torch.Tensor]:
        """`ea_generate` without drafting."""
        return self.ea_generate(input_ids, attention_mask, draft=False, **kwargs)

    def generate(
        self, input_ids, attention_mask=None, *, timings: Timings | None = None, **kwargs
    ) -> Generation:
        """As `eagenerate`, returning a `Generation` with per-row statistics. draft=False decodes plainly."""
        timings = timings or Timings()
        steps, pad = self._start(input_ids, attention_mask, timings=timings, **kwargs)
        rows = collections.deque(steps, maxlen=1)[0]  # run to the end
        return Generation(rows, pad_rows(rows, pad, self.target.device), timings)

    def custom_generate(
        self,
        model,
        input_ids,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        **kwargs,
    ) -> torch.Tensor:
        """For stock `model.generate(ids, custom_generate=ea_model.custom_generate, ...)`, where `model` is this
        object's target (`ea_model.target.model`): the length, sampling and end tokens of that call are kept."""
        if model is not self.target.model:
            raise EagleError(
                "custom_generate belongs to another model; call generate on ea_model.target.model"
            )
        g = generation_config
        sampling = {}
        processors = list(logits_processor or [])
        if g.do_sample:
            warpers = (
                "TemperatureLogitsWarper",
                "TopKLogitsWarper",
                "TopPLogitsWarper",
                "MinPLogitsWarper",
            )
            processors = [p for p in processors if type(p).__name__ not in warpers]
            sampling = {
                "temperature": 1.0 if g.temperature is None else g.temperature, "top_k": g.top_k or 0,
                "top_p": g.top_p or 0.0, "min_p": g.min_p or 0.0,
            }  # fmt: skip
        known = ("MaxLengthCriteria", "EosTokenCriteria")
        foreign = [
            type(c).__name__ for c in stopping_criteria or [] if type(c).__name__ not in known
        ]
        if foreign:
            raise EagleError(
                f"custom_generate does not take {', '.join(foreign)}; use eagenerate(stop_strings=...)"
            )
        pad = g.pad_token_id
        return self.eagenerate(
            input_ids, kwargs.get("attention_mask"), max_new_tokens=g.max_length - input_ids.shape[1],
            eos_token_id=-1 if g.eos_token_id is None else g.eos_token_id, pad_token_id=pad,
            logits_processor=type(logits_processor)(processors) if processors else None, **sampling,
        )  # fmt: skip

    def _start(
        self,
        input_ids,
        attention_mask=None,
        *,
        max_new_tokens: int = 512,
        max_length: int | None = None,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: int = 0,
        min_p: float = 0.0,
        do_sample: bool | None = None,
        seed: int | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        logits_processor=None,
        streamer=None,
        draft: bool = True,
        timings: Timings | None = None,
        synchronise: bool = False,
        on_cache=None,
    ) -> tuple[Iterator[list[Row]], int]:
        prompts = read_prompts(input_ids, attention_mask, self.target.vocab_size)
        if do_sample is False:
            temperature = 0.0
        elif do_sample and temperature == 0.0:
            raise EagleError("do_sample=True needs temperature > 0")
        sampling = SamplingParams(temperature, top_k, top_p, min_p)
        eos = self._eos(eos_token_id)
        stopping = Stopping(max_new_tokens, eos, self._stopper(stop_strings), max_length)
        pad = next(
            (p for p in (pad_token_id, self.target.config.pad_token_id) if isinstance(p, int)), None
        )
        if pad is None:
            pad = min(eos) if eos else 0
        if streamer is not None and len(prompts) != 1:
            raise EagleError("a streamer shows one row; give it a batch of one")
        steps = decode(
            self.target, prompts, sampling=sampling, seeds=row_seeds(seed, len(prompts)), stopping=stopping,
            drafter=self._drafter() if draft else None, logits_processor=logits_processor, timings=timings,
            synchronise=synchronise, on_cache=on_cache,
        )  # fmt: skip
        return (stream(steps, streamer) if streamer is not None else steps), pad

    def _drafter(self) -> Drafter | None:
        """A drafter of its own for each call, so that interleaved calls do not share a cache."""
        if self.head is not None and self.target.feature_layers != self.head.config.feature_layers:
            self.target.set_feature_layers(self.head.config.feature_layers)
        return copy.copy(self.drafter)

    def _eos(self, eos_token_id) -> frozenset[int]:
        if eos_token_id is None:
            generation = getattr(self.target.model, "generation_config", None)
            eos_token_id = getattr(generation, "eos_token_id", None)
            if eos_token_id is None:
                eos_token_id = self.target.config.eos_token_id
        if eos_token_id is None:
            return frozenset()
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        return frozenset(i for i in ids if i >= 0)

    def _stopper(self, stop_strings):
        """How many new tokens to keep: up to the one that completes a stop string, as transformers does."""
        if not stop_strings:
            return None
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        tokenizer, longest = self.tokenizer, max(len(s.encode()) for s in strings)
        checked: dict[int, int] = {}

        def stop(tokens: list[int]) -> int | None:
            start = checked.get(id(tokens), 0)
            for end in range(start + 1, len(tokens) + 1):
                # a token is at least a byte of text or nothing at all: look back far enough and no further
                text = tokenizer.decode(tokens[max(0, end - longest - 8) : end])
                if any(s in text for s in strings):
                    return end
            checked[id(tokens)] = len(tokens)
            return None

        return stop


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    source = EMBEDDED if name == "embedded" else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EagleError(f"no tokenizer in {source}: {reason}") from error


def read_prompts(input_ids, attention_mask, vocab_size: int) -> list[list[int]]:
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
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise EagleError(f"prompt {row} is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise EagleError(
                f"prompt {row} has token ids outside 0 … {vocab_size - 1}; use the target's tokenizer"
            )
    return [list(p) for p in prompts]


def pad_rows(rows: list[Row], pad: int, device: torch.device) -> torch.Tensor:
    width = max(len(r.prompt) + len(r.tokens) for r in rows)
    out = torch.full((len(rows), width), pad, dtype=torch.int64)
    for line, row in zip(out, rows, strict=True):
        ids = row.prompt + row.tokens
        line[: len(ids)] = torch.tensor(ids)
    return out.to(device)


def stream(steps: Iterator[list[Row]], streamer) -> Iterator[list[Row]]:
    """Hand new tokens to a transformers streamer as they are accepted."""
    shown = 0
    for rows in steps:
        if shown == 0:
            streamer.put(torch.tensor([rows[0].prompt]))
        for token in rows[0].tokens[shown:]:
            streamer.put(torch.tensor([token]))
        shown = len(rows[0].tokens)
        yield rows
    streamer.end()
