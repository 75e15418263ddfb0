"""`EaModel`: the public face. A target, a head, and the decode loop behind upstream's method names.

B rows, T prompt tokens."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import torch

from . import stock_generate
from .checkpoint import load_head
from .compile import CompiledHead, compile_target
from .costs import CostTable
from .decode import Timings, decode
from .draft import Drafter, HeadDrafter
from .errors import EagleError
from .generation import Generation, Span, Start, raise_errors, show
from .generation import acceptance_by_depth as acceptance_by_depth
from .heads.head import DraftHead
from .loading import EMBEDDED, compiled_folder, load_tokenizer
from .options import Options
from .plan import WIDEST, Experience, Plan
from .prompts import Prompt, check_prompt, split_options
from .request import Request, Row
from .sampling import row_seeds
from .support import same_bits, why_inexact
from .target import Target
from .tree import TreeShape
from .verify import force, verify

EMBEDDED_HEAD = EMBEDDED / "heads" / "eagle3"
MODES = ("auto", "off", "max")


def default_tree(target: Target) -> TreeShape:
    """Upstream's; for the embedded model a smaller one, which is faster there."""
    return TreeShape(16, 4, 4) if target.name == "embedded" else TreeShape()


class EaModel(torch.nn.Module):
    """A target with its draft head. Generation is lossless: the head changes the speed, never a
    token."""

    # compiled, measured and learnt, here and on this device: no part of copies and pickles
    MADE = ("plan", "_costs", "_experience", "_compiled")

    def __init__(
        self,
        target: Target,
        head: DraftHead | None = None,
        tree: TreeShape | str | None = None,
        tokenizer=None,
        drafter: Drafter | None = None,
        compile: str = "auto",
    ) -> None:
        super().__init__()
        # a view of its own: another head over the same target may read other layers
        self.target, self.head, self._tokenizer = copy.copy(target), head, tokenizer
        self.base_model = target.model  # upstream's name
        tree = default_tree(target) if tree is None else tree
        self.compile, self.tree = compile, tree if tree == "auto" else TreeShape.parse(tree)
        self.drafter = drafter
        self._forget()
        if head is not None:
            self.target.set_feature_layers(head.config.feature_layers)
            shape = WIDEST if tree == "auto" else self.tree
            self.drafter = drafter or HeadDrafter(head, target.embed, shape, target.head_logits)

    def _forget(self) -> None:
        self.plan: Plan | None = None  # of the last call with tree="auto"
        self._costs: dict[str, CostTable] = {}
        self._experience: dict[tuple, Experience] = {}
        self._compiled: dict[str, tuple] = {}

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in self.MADE}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

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
        exact: bool | str = "auto",
        **hf_kwargs,
    ) -> EaModel:
        """Load a target and its head, each a folder or a hub id (ORG/NAME, ORG/NAME@REVISION;
        revision=: the target's); without paths, the embedded model and its head. A base model
        without ea_model_path generates plainly.

        total_token, depth, top_k: the draft tree, upstream's meaning (total_token counts the root;
        -1 alone is tree="auto"), 60, 7, 10 by default, and 16, 4, 4 for the embedded model. tree:
        the three in one, "60,7,10", or "auto"; not both. use_eagle3: False is for EAGLE-1 heads
        (and so EAGLE-2's); None is whichever the files hold. dtype "auto" is the checkpoint's
        (float32 where a CPU would emulate bf16). adapter_path: a LoRA folder; quantization: "none",
        "nf4" or "int8" (bitsandbytes), "int8_cpu" (`kernels.linear`, weights and rows); upstream's
        `load_in_4bit` and `load_in_8bit` are the first two.
        exact: a token's bits depend on nothing that is run beside it, so that drafts change no
        token in 16 bits either: "auto" where that can be (`Generation.exact` says whether it was),
        True or refuse, False torch's own linear layers in eager passes. Further arguments go to
        transformers' `from_pretrained`.

        Raises EagleError when the files cannot be read, or the head does not fit the target."""
        if hf_kwargs.pop("threshold", 1.0) != 1.0:
            raise EagleError("threshold is not used here; leave it out, or use tree='auto'")
        hf_kwargs.pop("Type", None)  # upstream's, and told by the files
        for older, name in (("load_in_8bit", "int8"), ("load_in_4bit", "nf4")):
            if hf_kwargs.pop(older, False):
                quantization = name
        given = {"total_token": total_token, "depth": depth, "top_k": top_k}
        given = {k: v for k, v in given.items() if v is not None}
        if tree is not None and given:
            raise EagleError(f"tree={str(tree)!r} and {', '.join(given)} say two things; give one")
        if given == {"total_token": -1}:
            tree, given = "auto", {}
        target = Target.from_pretrained(
            base_model_path,
            quantization=quantization,
            dtype=hf_kwargs.pop("torch_dtype", dtype),
            device=device,
            adapter_path=adapter_path,
            exact=exact,
            **hf_kwargs,
        )
        if given:
            tree = replace(default_tree(target), **{k: v for k, v in given.items() if v != -1})
        if ea_model_path is None and target.name == "embedded" and EMBEDDED_HEAD.exists():
            ea_model_path = EMBEDDED_HEAD
        head = None
        if ea_model_path is not None:
            head, _ = load_head(ea_model_path, target, dtype=target.dtype, device=target.device)
            head.eval().requires_grad_(False)
            is_eagle3 = head.config.method == "eagle3"
            if use_eagle3 not in (None, is_eagle3):
                said = f"{ea_model_path} is an {'EAGLE-3' if is_eagle3 else 'EAGLE-1'} head"
                raise EagleError(f"{said}; leave use_eagle3 unset, or set it to {is_eagle3}")
        return cls(target, head, tree, compile=compile)

    # as people handle models
    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

    @property
    def config(self):
        """The target's."""
        return self.base_model.config

    def get_tokenizer(self):
        return self.tokenizer

    def train(self, mode: bool = True) -> EaModel:
        if mode:
            raise EagleError("an EaModel only generates; train a head with python -m train.main")
        return self

    def _apply(self, *args, **kwargs) -> EaModel:
        """Behind `to`, `cuda`, `half` and their like."""
        if getattr(self.base_model, "is_quantized", False):
            raise EagleError("a quantized target stays as it was loaded; load it with device=")
        super()._apply(*args, **kwargs)
        self.target._identity = None
        self._forget()
        return self

    @property
    def tokenizer(self):
        """The target's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            # name_or_path: the folder that the weights came from, of one revision
            self._tokenizer = load_tokenizer(self.base_model.name_or_path or self.target.name)
        return self._tokenizer

    def eagenerate(self, input_ids, attention_mask=None, *, log: bool = False, **options):
        """Prompts and new tokens, [B, L] int64; an end token is kept once.

        input_ids: a tensor or array [B, T] (or [T]) with padding on either side marked by
        attention_mask, or by the pad token where there is no mask; or a list of lists; or what a
        tokenizer returns. Of a tensor the result is [B, T + new] as of stock `generate`: the input
        as given, and from column T on the answers, right-padded. Of lists it is prompt and answer
        of each row, right-padded. With `log=True`: (ids, new tokens, cycles), summed over rows.

        options: those of `Options` (max_new_tokens 512 and temperature 0 by default; max_length
        counts the row as given), and seed, an int (row i uses seed + i) or one a row; streamer;
        generation_config, of transformers, over which arguments win; is_llama3, upstream's: end at
        <|eot_id|> too; and for this call tree, compile, draft, capacity. A logits_processor is
        called as stock `generate` calls it, once a token and in order."""
        result = self.generate(input_ids, attention_mask, **options)
        if log:
            return result.sequences, result.new_tokens, result.cycles
        return result.sequences

    def naivegenerate(self, input_ids, attention_mask=None, **kwargs):
        """`eagenerate` without drafting: the same engine, one token a pass."""
        return self.eagenerate(input_ids, attention_mask, draft=False, **kwargs)

    def ea_generate(self, input_ids, attention_mask=None, **kwargs) -> Iterator[torch.Tensor]:
        """Yields what `eagenerate` would return of the tokens so far, [B, L], each time tokens are
        accepted."""
        start = self._start(input_ids, attention_mask, **kwargs)
        for _ in start.steps:
            raise_errors(start.rows)
            yield start.sequences()

    def naive_generate(self, input_ids, attention_mask=None, **kwargs) -> Iterator[torch.Tensor]:
        """`ea_generate` without drafting."""
        return self.ea_generate(input_ids, attention_mask, draft=False, **kwargs)

    def generate(
        self, input_ids, attention_mask=None, *, timings: Timings | None = None, **kwargs
    ) -> Generation:
        """As `eagenerate`, returning a `Generation` with per-row statistics. draft=False decodes
        plainly; logprobs=True keeps `row.logprobs`, the target's own log-probability of each new
        token."""
        timings = timings or Timings()
        start = self._start(input_ids, attention_mask, timings=timings, **kwargs)
        collections.deque(start.steps, maxlen=0)  # run to the end
        raise_errors(start.rows)
        return Generation(start.rows, start.sequences(), timings, start.exact)

    def custom_generate(self, model, input_ids, generation_config=None, **kwargs) -> torch.Tensor:
        """For stock `model.generate(ids, custom_generate=ea_model.custom_generate, ...)`, where
        `model` is `ea_model.base_model`: the length, sampling, end tokens, processors and streamer
        of that call are kept; what cannot be is refused."""
        if model is not self.base_model:
            raise EagleError("custom_generate belongs to another model: ea_model.base_model")
        asked = stock_generate.arguments(model, input_ids, generation_config, kwargs)
        ids = self.eagenerate(input_ids, **asked)
        if not generation_config.return_dict_in_generate:
            return ids
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=ids)

    def stream(self, input_ids, attention_mask=None, **kwargs) -> Iterator[Span]:
        """Yields spans of new tokens as they are accepted, of all rows. `span.row.cancel()` gives a
        row up; closing the iterator gives all up. Takes what `generate_many` takes."""
        start = self._start(input_ids, attention_mask, lenient=True, **kwargs)
        index = {id(row): i for i, row in enumerate(start.rows)}
        shown, told = [0] * len(start.rows), [False] * len(start.rows)
        for rows in start.steps:
            for row in (*rows, *rows):  # one that is cancelled meanwhile is not seen again
                i = index[id(row)]
                if len(row.tokens) > shown[i] or row.done and not told[i]:
                    tokens, shown[i], told[i] = row.tokens[shown[i] :], len(row.tokens), row.done
                    yield Span(i, tokens, row)

    def generate_many(
        self, prompts, *, slots: int = 8, as_completed: bool = False, **options
    ) -> list[Row] | Iterator[tuple[int, Row]]:
        """Any number of requests over `slots` rows: a finished row's slot is refilled at once.

        prompts: lists of token ids, or dicts {"input_ids": [...], "temperature": 0.7, ...} with
        options of their own (those of `eagenerate`); other options hold for all. seed: an int
        (request i uses seed + i), or one a request. capacity: tokens that a slot holds, prompt and
        new ones; by default what the largest request needs.

        Returns the finished rows in the order of the prompts, or with as_completed=True an iterator
        of (index, row). A request that cannot be served has `row.error` set, and the others are not
        touched by it."""
        spans = self.stream(prompts, slots=slots, **options)
        done = ((span.index, span.row) for span in spans if span.row.done)
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
        prompt_shown: bool = False,
        slots: int | None = None,
        capacity: int | None = None,
        draft: bool = True,
        tree: TreeShape | str | None = None,
        compile: str | None = None,
        forced_acceptance: int | None = None,
        lenient: bool = False,
        token_type_ids=None,
        is_llama3: bool = False,
        timings: Timings | None = None,
        synchronise: bool = False,
        on_cache=None,
        **options,
    ) -> Start:
        """lenient: a request that cannot be served gets its error and the others go on; else it is
        raised. prompt_shown: the streamer has had it."""
        for name, value in (("slots", slots), ("capacity", capacity)):
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise EagleError(f"{name} must be a whole number of at least 1, not {value!r}")
        common, eos = Options().over(generation_config, **options), self.eos_token_ids
        if is_llama3:
            turn_end = self.tokenizer.get_vocab().get("<|eot_id|>")
            if turn_end is None:
                raise EagleError("is_llama3: this tokenizer has no <|eot_id|>; leave it out")
            ends = eos if common.eos_token_id is None else common.eos_token_id
            common = common.over(eos_token_id=ends | {turn_end})
        pad = self._pad_token(pad_token_id, generation_config)
        marks = pad if pad not in (common.eos_token_id or eos) else None  # padding, without a mask
        beside = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        given, own = split_options(input_ids, attention_mask, marks, beside)
        seeds = row_seeds(seed, len(own))
        if streamer is not None and len(own) != 1:
            raise EagleError("a streamer shows one row; give it a batch of one")
        if lenient:  # a mistake that all requests would share is the caller's
            self._request(common, Prompt([0], [0]), 0)
        rows = []
        for i, (prompt, mine) in enumerate(zip(given.rows, own, strict=True)):
            # processors of the call see a batch, as in stock `generate`; a request's own do not
            batch = (i, 1 if slots or lenient else len(own))
            try:
                rows.append(self._row(i, prompt, mine, common, seeds[i], batch))
                needed = len(prompt.ids) + rows[-1].budget
                if lenient and needed > (capacity or needed):
                    said = f"request {i} needs {needed} tokens and a slot holds {capacity}"
                    raise EagleError(f"{said}; raise capacity, or lower max_new_tokens")
            except Exception as error:
                if not lenient:
                    raise
                if not isinstance(error, EagleError):
                    error = EagleError(f"request {i}: {type(error).__name__}: {error}")
                ids = [] if isinstance(prompt, EagleError) else prompt.ids
                rows[i:] = [Row(Request(ids), 0, finish_reason="error", error=error)]
        live = [row for row in rows if not row.done]
        mode, tree = compile or self.compile, self.tree if tree is None else tree
        target, drafter = self._engine(mode, tree, draft)
        plan, judge = None, verify
        if forced_acceptance is not None:
            judge = functools.partial(force, forced_acceptance)
        elif tree == "auto" and isinstance(drafter, HeadDrafter) and live:
            plan = self._plan(target, drafter, mode, live)
        watching = {"timings": timings, "synchronise": synchronise, "on_cache": on_cache}
        how = {"drafter": drafter, "plan": plan, "verify": judge, **watching}
        steps = decode(target, live, slots=slots, capacity=capacity, **how)
        if len(live) < len(rows):
            steps = itertools.chain([rows], steps if live else [])
        if streamer is not None:
            steps = show(steps, rows[0], given.rows[0].given, streamer, prompt_shown)
        pad = pad if pad is not None else min(eos, default=0)
        return Start(rows, steps, pad, given.tensor, self.target.device, target.inexact is None)

    def _row(
        self, i: int, prompt: Prompt | EagleError, mine: dict, common: Options, seed: int, batch
    ) -> Row:
        """Request i of a call: `mine` are its own options, over `common` ones."""
        if isinstance(prompt, EagleError):
            raise prompt
        check_prompt(i, prompt.ids, self.target.vocab_size)
        own_seed = mine.pop("seed", None)
        seed = seed if own_seed is None else row_seeds([own_seed], 1)[0]
        batch = (0, 1) if "logits_processor" in mine else batch
        request = self._request(common.over(**mine), prompt, seed, *batch)
        return Row(request, request.stopping.budget(len(prompt.ids), self.target.max_positions))

    def _request(self, options: Options, prompt: Prompt, seed: int, *batch: int) -> Request:
        eos, device = self.eos_token_ids, self.target.device
        return options.request(prompt, seed, eos, lambda: self.tokenizer, device, *batch)

    def _pad_token(self, asked: int | None, config) -> int | None:
        """As in stock `generate`: what is asked for, else what the configurations say."""
        model = getattr(self.base_model, "generation_config", None)
        said = [getattr(c, "pad_token_id", None) for c in (config, model, self.target.config)]
        return next((int(p) for p in (asked, *said) if isinstance(p, Integral)), None)

    def _engine(self, mode: str, tree: TreeShape | str, draft: bool):
        """The target and the drafter of one call, which share no cache with another's; they run
        compiled passes where the mode has them."""
        drafter = copy.copy(self.drafter) if draft else None
        if isinstance(drafter, HeadDrafter):
            drafter.reshape(WIDEST if tree == "auto" else TreeShape.parse(tree))
        self.prepare(mode, drafter is not None)
        target = copy.copy(self.target).refresh()
        if mode == "max" and target.device.type == "cpu":
            target.compiled = self._compiled["target"][1]
            target.inexact = self._compiled["inexact"][1]
            if isinstance(drafter, HeadDrafter):
                drafter.compiled = self._compiled["head"][1]
        return target, drafter

    def _plan(self, target, drafter, mode: str, rows: list[Row]) -> Plan:
        """A plan for one call; what was learnt is kept from call to call."""
        context = max(len(row.prompt) + row.budget // 2 for row in rows)
        if mode not in self._costs:
            self._costs[mode] = CostTable(target, drafter, mode, compiled_folder())
        # greedy choices and samples accept differently
        kind = mode, rows[0].request.sampling.greedy
        experience = self._experience.setdefault(kind, Experience())
        table = self._costs[mode]
        self.plan = Plan(lambda rows: table(rows, context), experience)
        return self.plan

    def explain(self) -> str:
        """Why tree="auto" drafted as it did in the last call: costs, rates, break-even."""
        return self.plan.explain() if self.plan else 'no call with tree="auto" has drafted yet'

    def prepare(self, compile: str | None = None, draft: bool = True) -> dict[str, float]:
        """Compile, or load from the disk, what `compile` needs, as generation does; returns the
        seconds spent on each part, and nothing for what was ready. "off": eager. "max": on a CPU,
        AOTInductor packages kept on disk. "auto": off on a CPU."""
        mode = compile or self.compile
        if mode not in MODES:
            raise EagleError(f"unknown compile {mode!r}; use {', '.join(MODES)}")
        seconds: dict[str, float] = {}
        if mode != "max" or self.target.device.type != "cpu":
            return seconds
        # features are part of a package: another head's layers are another package
        wanted = {"target": (compile_target, self.target, self.target.feature_layers)}
        if draft and isinstance(self.drafter, HeadDrafter):
            wanted["head"] = (CompiledHead, self.drafter, self.head)
        with self.target.lock:  # another thread may be about to compile the same
            for name, (make, subject, version) in wanted.items():
                if self._compiled.get(name, (None,))[0] is not version:
                    self._compiled[name] = version, make(subject, seconds)
                    if name == "target":
                        view = copy.copy(subject)
                        view.compiled = self._compiled[name][1]
                        view.inexact = why_inexact(view, same_bits(view))
                        self._compiled["inexact"] = version, view.inexact
                        view.require_exact()
        return seconds

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens."""
        found = getattr(getattr(self.base_model, "generation_config", None), "eos_token_id", None)
        found = self.target.config.eos_token_id if found is None else found
        ids = [] if found is None else [found] if isinstance(found, int) else found
        return frozenset(i for i in ids if i >= 0)


def engine_for(model: torch.nn.Module, head: str, tree: str | None = None) -> EaModel:
    """The engine that runs a loaded transformers model with the head in this folder, made once a
    model."""
    engines = model.__dict__.setdefault("_eagle_engines", {})
    if (head, tree) not in engines:
        target = Target(model)
        loaded, _ = load_head(head, target, dtype=target.dtype, device=target.device)
        engines[head, tree] = EaModel(target, loaded, tree)
    return engines[head, tree]
