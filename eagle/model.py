"""`EaModel`: the public face. A target, a head, and the decode loop behind upstream's method names.

B rows, T prompt tokens.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .compile import CompiledHead, CompiledTarget, compiled_folder
from .costs import CostTable
from .decode import Timings, decode
from .draft import Drafter, HeadDrafter
from .errors import EagleError
from .head import DraftHead
from .loading import EMBEDDED, load_tokenizer
from .options import Options, check_prompt, read_prompts, refuse
from .plan import WIDEST, Experience, Plan
from .request import Request, Row
from .sampling import row_seeds
from .target import Target
from .tree import TreeShape
from .verify import force, verify

EMBEDDED_HEAD = EMBEDDED / "heads" / "eagle3"
EMBEDDED_TREE = "16,4,4"
MODES = ("auto", "off", "max")
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
        head: DraftHead | None = None,
        tree: TreeShape | str = DEFAULT_TREE,
        tokenizer=None,
        drafter: Drafter | None = None,
        compile: str = "auto",
    ) -> None:
        self.target, self.head, self._tokenizer = target, head, tokenizer
        self.compile, self.tree = compile, tree if tree == "auto" else TreeShape.parse(tree)
        self.plan: Plan | None = None  # of the last call with tree="auto"
        self._costs: dict[str, CostTable] = {}
        self._experience: dict[tuple, Experience] = {}
        self._compiled: dict[str, tuple] = {}
        self.drafter = drafter
        if head is not None:
            target.set_feature_layers(head.config.feature_layers)
            head.eval().requires_grad_(False)
            shape = WIDEST if tree == "auto" else TreeShape.parse(tree)
            self.drafter = drafter or HeadDrafter(head, target.embed, shape, target.head_logits)

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
        compile: str = "auto",
        tree: TreeShape | str | None = None,
        quantization: str = "none",
        **hf_kwargs,
    ) -> EaModel:
        """Load a target and its head, each a folder or a hub id (ORG/NAME, ORG/NAME@REVISION; revision=: the
        target's); without paths, the embedded model and its head.

        total_token, depth, top_k: the draft tree, upstream's meaning (total_token counts the root). They
        default to 60, 7, 10, and to 16, 4, 4 for the embedded model, where the smaller tree is faster.
        use_eagle3: False is for EAGLE-1 heads (and so EAGLE-2's); None is whichever the files hold.
        dtype "auto" is the checkpoint's (float32 where a CPU would emulate bf16). adapter_path: a LoRA folder;
        quantization: "none", "nf4" or "int8" (bitsandbytes). Further arguments go to transformers'
        `from_pretrained`.

        A base model without ea_model_path generates plainly. Raises EagleError when the files cannot be
        read, or the head does not fit the target.
        """
        default = TreeShape.parse(EMBEDDED_TREE) if base_model_path is None else TreeShape()
        shape = TreeShape(
            default.total_token if total_token in (None, -1) else total_token,
            default.depth if depth is None else depth,
            default.top_k if top_k is None else top_k,
        )
        target = Target.from_pretrained(
            base_model_path, dtype=dtype, device=device, adapter_path=adapter_path,
            quantization=quantization, **hf_kwargs
        )  # fmt: skip
        if ea_model_path is None and base_model_path is None and EMBEDDED_HEAD.exists():
            ea_model_path = EMBEDDED_HEAD
        head = None
        if ea_model_path is not None:
            from .checkpoint import load_head

            head, _ = load_head(ea_model_path, target, dtype=target.dtype, device=target.device)
            is_eagle3 = head.config.method == "eagle3"
            if use_eagle3 not in (None, is_eagle3):
                raise EagleError(
                    f"{ea_model_path} is an {'EAGLE-3' if is_eagle3 else 'EAGLE-1'} head; leave use_eagle3 unset, "
                    f"or set it to {is_eagle3}"
                )
        return cls(target, head, tree or shape, compile=compile)

    @property
    def tokenizer(self):
        """The target's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            # name_or_path: the folder that the weights came from, of one revision
            self._tokenizer = load_tokenizer(self.target.model.name_or_path or self.target.name)
        return self._tokenizer

    def eagenerate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
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
        an int (row i uses seed + i) or one a row. max_new_tokens is 512, temperature 0 (greedy) by default.
        Further options: min_p, min_new_tokens, repetition_penalty, no_repeat_ngram_size, bad_words_ids,
        suppress_tokens, generation_config (a transformers GenerationConfig; arguments win over it); tree,
        compile, draft, capacity for this call. With `log=True`: (ids, new tokens, cycles), summed over
        rows. `generate` takes the same arguments and returns statistics and log-probabilities too.
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
        start = self._start(input_ids, attention_mask, **kwargs)
        for _ in start.steps:
            raise_errors(start.rows)
            yield pad_rows(start.rows, start.pad, self.target.device)

    def naive_generate(self, input_ids, attention_mask=None, **kwargs) -> Iterator[torch.Tensor]:
        """`ea_generate` without drafting."""
        return self.ea_generate(input_ids, attention_mask, draft=False, **kwargs)

    def generate(
        self, input_ids, attention_mask=None, *, timings: Timings | None = None, **kwargs
    ) -> Generation:
        """As `eagenerate`, returning a `Generation` with per-row statistics. draft=False decodes plainly;
        logprobs=True keeps `row.logprobs`, the target's own log-probability of each new token."""
        timings = timings or Timings()
        start = self._start(input_ids, attention_mask, timings=timings, **kwargs)
        collections.deque(start.steps, maxlen=0)  # run to the end
        raise_errors(start.rows)
        sequences = pad_rows(start.rows, start.pad, self.target.device)
        return Generation(start.rows, sequences, timings)

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
        known = ("MaxLengthCriteria", "EosTokenCriteria")
        foreign = [
            type(c).__name__ for c in stopping_criteria or [] if type(c).__name__ not in known
        ]
        if foreign:
            raise EagleError(
                f"custom_generate does not take {', '.join(foreign)}; use eagenerate(stop_strings=...)"
            )
        # no processor of that call, or one that would have to come after the warpers
        refuse(
            g, ("num_beams", "guidance_scale", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
        )
        # the warpers are ours to apply; every other processor that transformers prepared is kept
        warpers = (
            "TemperatureLogitsWarper",
            "TopKLogitsWarper",
            "TopPLogitsWarper",
            "MinPLogitsWarper",
        )
        processors = [p for p in logits_processor or [] if type(p).__name__ not in warpers]
        sampling = {}
        if g.do_sample:
            sampling = {
                "temperature": 1.0 if g.temperature is None else g.temperature, "top_k": g.top_k,
                "top_p": g.top_p, "min_p": g.min_p,
            }  # fmt: skip
        return self.eagenerate(
            input_ids, kwargs.get("attention_mask"), max_new_tokens=g.max_length - input_ids.shape[1],
            eos_token_id=-1 if g.eos_token_id is None else g.eos_token_id, pad_token_id=g.pad_token_id,
            logits_processor=processors or None, **sampling,
        )  # fmt: skip

    def stream(self, input_ids, attention_mask=None, **kwargs) -> Iterator[Span]:
        """Yields spans of new tokens as they are accepted, of all rows. `span.row.cancel()` gives a row up;
        closing the iterator gives all up. Takes what `generate_many` takes."""
        start = self._start(input_ids, attention_mask, lenient=True, **kwargs)
        index = {id(row): i for i, row in enumerate(start.rows)}
        shown = [0] * len(start.rows)
        told = [False] * len(start.rows)
        for rows in start.steps:
            for row in rows:
                i = index[id(row)]
                if len(row.tokens) > shown[i] or row.done and not told[i]:
                    tokens, shown[i], told[i] = row.tokens[shown[i] :], len(row.tokens), row.done
                    yield Span(i, tokens, row)
            for row in rows:  # cancelled just now: this is the last that is seen of it
                i = index[id(row)]
                if row.done and not told[i]:
                    told[i] = True
                    yield Span(i, [], row)

    def generate_many(
        self, prompts, *, slots: int = 8, as_completed: bool = False, **options
    ) -> list[Row] | Iterator[tuple[int, Row]]:
        """Any number of requests over `slots` rows: a finished row's slot is refilled at once.

        prompts: lists of token ids, or dicts {"input_ids": [...], "temperature": 0.7, ...} with options of
        their own (those of `eagenerate`); other options hold for all. seed: an int (request i uses seed + i),
        or one a request. capacity: tokens that a slot holds, prompt and new ones; by default what the
        largest request needs.

        Returns the finished rows in the order of the prompts, or with as_completed=True an iterator of
        (index, row). A request that cannot be served has `row.error` set, and the others are not touched by it.
        """
        done = (
            (span.index, span.row)
            for span in self.stream(prompts, slots=slots, **options)
            if span.row.done
        )
        if as_completed:
            return done
        finished = dict(done)
        return [finished[i] for i in sorted(finished)]

    def _start(
        self,
        input_ids,
        attention_mask=None,
        *,
        seed: int | Sequence[int] | None = None,
        generation_config=None,
        pad_token_id: int | None = None,
        streamer=None,
        slots: int | None = None,
        capacity: int | None = None,
        draft: bool = True,
        tree: TreeShape | str | None = None,
        compile: str | None = None,
        forced_acceptance: int | None = None,
        timings: Timings | None = None,
        synchronise: bool = False,
        on_cache=None,
        lenient: bool = False,
        **options,
    ) -> Start:
        """lenient: a request that cannot be served gets its error and the others go on; else it is raised."""
        common = Options().over(generation_config, **options)
        given, own = split_options(input_ids)
        prompts = read_prompts(given, attention_mask)
        seeds = row_seeds(seed, len(prompts))
        for name, value in (("slots", slots), ("capacity", capacity)):
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise EagleError(f"{name} must be a whole number of at least 1, not {value!r}")
        if streamer is not None and len(prompts) != 1:
            raise EagleError("a streamer shows one row; give it a batch of one")
        vocab_size, device = self.target.vocab_size, self.target.device
        eos = self.eos_token_ids
        if lenient:  # a mistake that all requests would share is the caller's
            common.request([0], 0, eos, lambda: self.tokenizer, device)
        rows = []
        for i, prompt in enumerate(prompts):
            row = Row(Request(prompt), 0)
            try:
                check_prompt(i, prompt, vocab_size)
                mine = dict(own[i])
                row_seed = mine.pop("seed", None)
                row_seed = seeds[i] if row_seed is None else row_seeds([row_seed], 1)[0]
                row.request = common.over(**mine).request(
                    prompt, row_seed, eos, lambda: self.tokenizer, device
                )
                row.budget = row.request.stopping.budget(len(prompt), self.target.max_positions)
                if capacity is not None and lenient and len(prompt) + row.budget > capacity:
                    raise EagleError(
                        f"request {i} needs {len(prompt) + row.budget} tokens and a slot holds {capacity}; "
                        "raise capacity, or lower max_new_tokens"
                    )
            except EagleError as error:
                if not lenient:
                    raise
                row.error, row.finish_reason = error, "error"
            rows.append(row)
        live = [row for row in rows if not row.done]
        drafter = self._drafter(tree) if draft else None
        target = self._compile(compile, drafter)
        automatic = (self.tree if tree is None else tree) == "auto" and forced_acceptance is None
        plan = None
        if automatic and isinstance(drafter, HeadDrafter) and live:
            longest = max(len(row.prompt) + row.budget // 2 for row in live)
            plan = self._plan(target, drafter, compile, longest, live[0].request.sampling.greedy)
        steps = decode(
            target, live, slots=slots, capacity=capacity, drafter=drafter, plan=plan,
            timings=timings, synchronise=synchronise, on_cache=on_cache,
            verify=verify if forced_acceptance is None else functools.partial(force, forced_acceptance),
        )  # fmt: skip
        if len(live) < len(rows):
            steps = itertools.chain([rows], steps if live else [])
        pads = (
            pad_token_id, getattr(generation_config, "pad_token_id", None), self.target.config.pad_token_id
        )  # fmt: skip
        pad = next((p for p in pads if isinstance(p, int)), None)
        if pad is None:
            pad = min(eos) if eos else 0
        return Start(rows, show(steps, rows[0], streamer) if streamer else steps, pad)

    def _drafter(self, tree: TreeShape | str | None) -> Drafter | None:
        """A drafter of its own for each call, so that interleaved calls do not share a cache."""
        if self.head is not None and self.target.feature_layers != self.head.config.feature_layers:
            self.target.set_feature_layers(self.head.config.feature_layers)
        drafter, tree = copy.copy(self.drafter), self.tree if tree is None else tree
        if isinstance(drafter, HeadDrafter):
            drafter.reshape(WIDEST if tree == "auto" else TreeShape.parse(tree))
        return drafter

    def _plan(self, target, drafter, mode: str | None, context: int, greedy: bool) -> Plan:
        """A plan for one call; what was learnt is kept from call to call."""
        mode = self.compile if mode is None else mode
        table = self._costs.get(mode)
        if table is None:
            table = self._costs[mode] = CostTable(target, drafter, mode, compiled_folder())
        # greedy choices and samples accept differently, and a long context costs more
        kind = mode, greedy, context.bit_length()
        experience = self._experience.setdefault(kind, Experience())
        self.plan = Plan(lambda rows: table(rows, context), experience)
        return self.plan

    def explain(self) -> str:
        """Why tree="auto" drafted as it did in the last call: costs, rates, break-even."""
        if self.plan is None:
            return 'no call with tree="auto" has drafted yet'
        return self.plan.explain()

    def prepare(self, compile: str | None = None, draft: bool = True) -> dict[str, float]:
        """Compile, or load from the disk, what `compile` needs; returns the seconds spent on each part, and
        nothing for what was ready. Generation calls it when needed.

        "off": eager. "max": on a CPU, AOTInductor packages kept on disk. "auto": off on a CPU.
        """
        mode = self.compile if compile is None else compile
        if mode not in MODES:
            raise EagleError(f"unknown compile {mode!r}; use {', '.join(MODES)}")
        seconds: dict[str, float] = {}
        if mode != "max" or self.target.device.type != "cpu":
            return seconds
        # features are part of a package: another head's layers are another package
        wanted = {"target": (CompiledTarget, self.target, self.target.feature_layers)}
        if draft and isinstance(self.drafter, HeadDrafter):
            wanted["head"] = (CompiledHead, self.drafter, self.head)
        for name, (make, subject, version) in wanted.items():
            if self._compiled.get(name, (None,))[0] is not version:
                self._compiled[name] = version, make(subject, seconds)
        return seconds

    def _compile(self, mode: str | None, drafter: Drafter | None) -> Target:
        """The target of one call; it and the drafter run compiled passes where the mode has them."""
        self.prepare(mode, drafter is not None)
        target = copy.copy(self.target)
        if (self.compile if mode is None else mode) == "max" and target.device.type == "cpu":
            target.compiled = self._compiled["target"][1]
            if isinstance(drafter, HeadDrafter):
                drafter.compiled = self._compiled["head"][1]
        return target

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens."""
        generation = getattr(self.target.model, "generation_config", None)
        eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = self.target.config.eos_token_id
        if eos_token_id is None:
            return frozenset()
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        return frozenset(i for i in ids if i >= 0)


@dataclass
class Span:
    """tokens: what the row at `index` gained since its last span; empty when it ended without any."""

    index: int
    tokens: list[int]
    row: Row


@dataclass
class Start:
    """A generation about to run: `steps` yields after each cycle, `rows` grow meanwhile."""

    rows: list[Row]
    steps: Iterator
    pad: int


def split_options(input_ids) -> tuple[object, list[dict]]:
    """Prompts, and the options that each brings along."""
    if isinstance(input_ids, Iterator):
        input_ids = list(input_ids)
    if isinstance(input_ids, (list, tuple)) and any(isinstance(p, dict) for p in input_ids):
        wrapped = [p if isinstance(p, dict) else {"input_ids": p} for p in input_ids]
        if any("input_ids" not in p or isinstance(p["input_ids"], int) for p in wrapped):
            raise EagleError('a request given as a dict needs "input_ids", a list of token ids')
        own = [{k: v for k, v in p.items() if k != "input_ids"} for p in wrapped]
        return [p["input_ids"] for p in wrapped], own
    return input_ids, collections.defaultdict(dict)


def raise_errors(rows: list[Row]) -> None:
    for row in rows:
        if row.error is not None:
            raise row.error


def pad_rows(rows: list[Row], pad: int, device: torch.device) -> torch.Tensor:
    width = max(len(r.prompt) + len(r.tokens) for r in rows)
    out = torch.full((len(rows), width), pad, dtype=torch.int64)
    for line, row in zip(out, rows, strict=True):
        ids = row.prompt + row.tokens
        line[: len(ids)] = torch.tensor(ids)
    return out.to(device)


def show(steps: Iterator, row: Row, streamer) -> Iterator:
    """Hand new tokens to a transformers streamer as they are accepted."""
    streamer.put(torch.tensor([row.prompt]))
    shown = 0
    for step in steps:
        for token in row.tokens[shown:]:
            streamer.put(torch.tensor([token]))
        shown = len(row.tokens)
        yield step
    streamer.end()
