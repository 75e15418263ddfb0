"""The target model: any stock causal LM of transformers, seen through one forward call.

B rows, N queries, T tokens, F features (3 x hidden), V vocabulary."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention import NAME, TreeContext
from .cache import StaticKVCache
from .errors import EagleError
from .heads.head_config import FINAL, default_feature_layers
from .linears import Exact, load_kernels
from .loading import compiled_folder, identity_of, load_model
from .support import probe, relay_context, supported_parts

CHUNK = 256
# one a model, whatever holds the model: passes take turns
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_PROBING = threading.RLock()  # it registers an attention function of its own meanwhile


class OutputLayer(nn.Module):
    """Final hidden [..., H] -> logits [..., V], with a family's scale or soft cap."""

    def __init__(self, model: nn.Module, config) -> None:
        super().__init__()
        self.projection = model.get_output_embeddings()
        scaling = getattr(config, "logits_scaling", None) or 1.0
        # Granite divides by it, HyperCLOVA X multiplies
        scaling = scaling if config.model_type == "hyperclovax" else 1 / scaling
        self.scale = scaling * (getattr(config, "logit_scale", None) or 1.0)  # Cohere's
        self.cap = getattr(config, "final_logit_softcapping", None)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, cap={self.cap}"

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.projection(hidden) * self.scale
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


class Target:
    """Wraps a loaded model; `forward` runs a tree or a prompt over a `StaticKVCache`. The model
    stays the caller's: after a pass with our hooks and attention, in eval mode, it is left as it
    was found. Passes over one model take turns, whatever thread or Target they come from."""

    def __init__(
        self,
        model: nn.Module,
        name: str = "",
        feature_layers: tuple[int, ...] | None = None,
        identity: dict | None = None,
        exact: bool | str = "auto",
    ) -> None:
        if exact not in (True, False, "auto"):
            raise EagleError(f"exact={exact!r}; use 'auto', True or False")
        self.model, self._wish = model, exact
        self.no_kernels = load_kernels(compiled_folder()) if self.device.type == "cpu" else None
        self.name = name or getattr(model, "name_or_path", "") or "model"
        self.config, self.backbone, self.layers = supported_parts(model)
        accepted = inspect.signature(model.forward).parameters
        self.cache_argument = "cache" if "cache" in accepted else "past_key_values"  # before 5.21
        self.compiled = None  # compiled passes, while a mode that has them is in use
        self.set_feature_layers(feature_layers or default_feature_layers(len(self.layers)))
        self._attention: dict[str, list] = {}
        self.refresh()
        with self.lock, _PROBING:
            probe(self)
        self.require_exact()
        self._identity = identity
        self.head_logits = OutputLayer(model, self.config)

    def refresh(self) -> Target:
        """Look again at what the model is made of: an adapter may have come since."""
        self._modules = list(self.model.modules())
        configs = [m.config for m in self._modules if isinstance(m, PreTrainedModel)]
        configs += [getattr(c, name, None) for c in configs for name in c.sub_configs]
        self._configs = list({id(c): c for c in configs if c is not None}.values())
        self.exact_linears = Exact(self._modules if self._wish else [])
        return self

    def require_exact(self) -> None:
        if self._wish is True and self.inexact:
            raise EagleError(f"exact=True: {self.inexact}; use exact='auto'")

    @property
    def lock(self) -> threading.RLock:
        """Held while a pass runs."""
        return _LOCKS.setdefault(self.model, threading.RLock())

    @property
    def identity(self) -> dict:
        """What a head belongs to; see `eagle.loading`."""
        with self.lock:  # reading 4-bit weights may undo how a pass has packed them
            self._identity = self._identity or identity_of(self.model, self.name)
        return self._identity

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, feature_layers=None, exact="auto", **options
    ) -> Target:
        """Load a model folder or hub id; exact as of `EaModel.from_pretrained`, options as of
        `eagle.loading.load_model`."""
        model, identity = load_model(path, **options)
        model.eval().requires_grad_(False)
        return cls(model, identity["id"], feature_layers, identity, exact)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def max_positions(self) -> int:
        limit = getattr(self.config, "max_position_embeddings", None) or 2**31
        rope = getattr(self.config, "rope_parameters", None) or {}
        for values in (rope, *(v for v in rope.values() if isinstance(v, dict))):
            if values.get("rope_type") == "longrope":
                # past this length longrope turns every key another way: what is cached would be
                # wrong, and one long row, or a draft that looks ahead, would change the others
                limit = min(limit, values.get("original_max_position_embeddings") or limit)
        return limit

    @property
    def embed(self) -> nn.Module:
        """The input embedding that the head shares: ids [...] -> [..., H]."""
        return self.model.get_input_embeddings()

    def set_feature_layers(self, layers: tuple[int, ...]) -> None:
        """Three entering-layer ids, 0 … L; L is the last layer's output before the final norm. Or
        (FINAL,): what enters the output embedding, as EAGLE-1 reads it."""
        L, layers = len(self.layers), tuple(layers)
        three = len(layers) == 3 and all(0 <= i <= L for i in layers)
        if not three and layers != (FINAL,):
            raise EagleError(f"feature layers {layers} must be three ids in 0 … {L}")
        self.feature_layers = layers

    @contextmanager
    def _lent(self, attention: str) -> Iterator[None]:
        """The model in eval mode and with this attention, for this thread alone."""
        with self.lock:
            training = [m for m in self._modules if m.training]
            found = [c._attn_implementation_internal for c in self._configs]
            try:
                for module in training:
                    module.training = False
                if attention not in self._attention:
                    self.model.set_attn_implementation(attention)
                    kinds = [c._attn_implementation_internal for c in self._configs]
                    self._attention[attention] = kinds
                for config, kind in zip(self._configs, self._attention[attention], strict=True):
                    config._attn_implementation_internal = kind
                yield
            finally:
                for module in training:
                    module.training = True
                for config, kind in zip(self._configs, found, strict=True):
                    config._attn_implementation_internal = kind

    @contextmanager
    def _tapped(self, states: dict[int, torch.Tensor] | None, keep=None) -> Iterator[None]:
        """Hooks for one pass: put the states that enter the feature layers into `states`, and
        project only the tokens `keep` [b] to the vocabulary, [1, T, H] -> [1, b, H]."""

        def entering(layer):
            def save(module, args, kwargs):
                states[layer] = args[0] if args else kwargs["hidden_states"]

            return save

        def leaving(module, args, output):
            states[L] = output[0] if isinstance(output, tuple) else output

        def project(module, args):
            if states is not None:
                states[FINAL] = args[0]
            return None if keep is None else (args[0][:, keep],)

        L = len(self.layers)
        wanted = set() if states is None else set(self.feature_layers) - {FINAL}
        with ExitStack() as hooks:
            for i in wanted - {L}:
                hook = self.layers[i].register_forward_pre_hook(entering(i), with_kwargs=True)
                hooks.callback(hook.remove)
            if L in wanted:
                hooks.callback(self.layers[L - 1].register_forward_hook(leaving).remove)
            output = self.model.get_output_embeddings()
            hooks.callback(output.register_forward_pre_hook(project).remove)
            for hook in relay_context(self.config, self.layers):
                hooks.callback(hook.remove)
            yield

    def _features(self, states: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.cat([states[i] for i in self.feature_layers], dim=-1)

    def new_cache(self, rows: int, capacity: int) -> StaticKVCache:
        size = len(self.layers), rows, self.kv_heads, capacity, self.head_dim
        return StaticKVCache(*size, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, context: TreeContext, keep=None, features: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass over packed tokens: ids [1, T] -> logits [1, T, V] and features [1, T, F]. keep
        [b]: logits of these tokens only, [1, b, V]."""
        positions = context.pack(context.positions)
        if self.compiled is None or context.mask is None:
            return self.run(context, ids, positions, keep, features)
        logits, found = self.compiled(context, ids, positions)
        return logits if keep is None else logits[:, keep], found if features else None

    def run(self, context, ids, positions, keep=None, features=True):
        """The stock model's forward with our context; also what is exported to be compiled."""
        states = {} if features else None
        with self._lent(NAME), self._tapped(states, keep), self.exact_linears.lent():
            out = self.model(
                input_ids=ids,
                # four dimensions tell transformers that the mask is ready: no mask is built a pass
                attention_mask=positions[:, None, None, :],
                position_ids=positions,
                use_cache=True,
                tree=context,
                **{self.cache_argument: context.cache},
            )
        return out.logits, self._features(states) if features else None

    def prefill(
        self, ids, lengths, host_lengths: list[int], cache: StaticKVCache, features: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids [b, T] right-padded, lengths [b], the cache's rows empty -> logits [b, 1, V] of each
        row's last token, features [b, T, F]. Padding is not run. Compiled passes, which project
        every token to the vocabulary, take the prompts in pieces of CHUNK tokens."""
        b, T = ids.shape
        width = T if self.compiled is None else max(CHUNK // b, 1)
        found, last = [], None
        for start in range(0, T, width):
            piece = ids[:, start : start + width]
            N = piece.shape[1]
            counts = (lengths - start).clamp(0, N)
            host_counts = [min(max(n - start, 0), N) for n in host_lengths]
            positions = torch.arange(start, start + N, device=ids.device).expand(b, N)
            mask = None
            if self.compiled is not None:  # which attend to the cache
                mask = torch.ones(N, N, dtype=torch.bool, device=ids.device).tril().expand(b, N, N)
            context = TreeContext(cache, positions, mask, positions, host_counts)
            keep = counts.cumsum(0) - 1  # the last of each row among the packed tokens
            logits, states = self.forward(context.pack(piece), context, keep, features)
            logits = logits.transpose(0, 1)
            here = (lengths > start)[:, None, None]
            last = logits if last is None else torch.where(here, logits, last)
            if features:
                found.append(context.unpack(states))
            cache.advance(counts, host_counts)
        return last, torch.cat(found, 1) if features else None

    def verify_tree(
        self, tokens, depth, mask, cache: StaticKVCache, features: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens, depth [b, N], mask [b, N, N] -> logits [b, N, V] and features [b, N, F]; nothing
        is committed."""
        # a draft past the model's limit can never be kept, and must not ask for a position that
        # does not exist
        positions = (cache.lengths[:, None] + depth).clamp_max(self.max_positions - 1)
        context = TreeContext(cache, positions, mask, positions)
        logits, found = self.forward(context.pack(tokens), context, features=features)
        return context.unpack(logits), context.unpack(found) if features else None

    @torch.no_grad()
    def hidden_and_features(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For training, with the stock attention: ids [B, T], attention_mask [B, T] (1 on real
        tokens) -> final hidden [B, T, H] (after the norm) and features [B, T, F]."""
        states: dict[int, torch.Tensor] = {}
        with self.stock(), self._tapped(states):
            out = self.backbone(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        states[FINAL] = out.last_hidden_state
        return out.last_hidden_state, self._features(states)

    @contextmanager
    def stock(self) -> Iterator[nn.Module]:
        """The model as transformers runs it, in eval mode."""
        capped = getattr(self.config, "attn_logit_softcapping", None)
        with self._lent("eager" if capped or not self.model._supports_sdpa else "sdpa"):
            yield self.model


def padded(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """What `prefill` takes: ids [b, T] right-padded, lengths [b], and these on the host."""
    counts = [len(prompt) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(counts), dtype=torch.int64)
    for line, prompt in zip(ids, prompts, strict=True):
        line[: len(prompt)] = torch.tensor(prompt)
    return ids.to(device), torch.tensor(counts, device=device), counts
