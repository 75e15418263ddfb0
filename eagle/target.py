"""The target model: any stock causal LM of transformers, seen through one forward call.

Knows modules, hidden states and caches; knows nothing of drafting or text.

B rows, N queries, T tokens, F features (3 x hidden), V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .attention import NAME, TreeContext
from .cache import StaticKVCache
from .errors import EagleError
from .head import default_feature_layers

EMBEDDED = Path(__file__).parent / "embedded"


def resolve_device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise EagleError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    names = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16,
             "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16}  # fmt: skip
    if dtype not in names:
        raise EagleError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return names[dtype]


def fast_bf16(device: torch.device) -> bool:
    """Does the device multiply bf16 natively? x86 CPUs without AVX512-BF16 or AMX emulate it, slowly."""
    if device.type != "cpu":
        return True
    probes = [
        getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    probes = [probe for probe in probes if probe is not None]
    return (
        not probes
        or platform.machine() not in ("x86_64", "AMD64")
        or any(probe() for probe in probes)
    )


class Target:
    """Wraps a loaded model; `forward` runs a tree or a prompt over a `StaticKVCache`."""

    def __init__(
        self, model: nn.Module, name: str = "", feature_layers: tuple[int, ...] | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name or getattr(model, "name_or_path", "") or "model"
        self.config = model.config.get_text_config()
        self.backbone = model.get_decoder()
        self.layers = getattr(self.backbone, "layers", None)
        refuse_unsupported(model, self.config, self.layers)
        self.feature_layers = tuple(feature_layers or default_feature_layers(len(self.layers)))
        self._captured: dict[int, torch.Tensor] = {}
        self._capture = False
        self._keep: torch.Tensor | None = None
        self._hooks: list = []
        self.set_feature_layers(self.feature_layers)
        model.get_output_embeddings().register_forward_pre_hook(self._gather_kept)
        model.set_attn_implementation(NAME)
        self.kv_heads, self.head_dim = self._probe()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        adapter_path: str | None = None,
        feature_layers: tuple[int, ...] | None = None,
        **hf_kwargs,
    ) -> Target:
        """Load a model folder or hub id; no path means the embedded model.

        dtype "auto" is the checkpoint's, but float32 for a bf16 one on a CPU that would emulate bf16.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        device = resolve_device(device)
        source = EMBEDDED if path is None else path
        if path is None and not (EMBEDDED / "model.safetensors").exists():
            raise EagleError(
                "this installation has no embedded model; reinstall it, or give a model path"
            )
        if not hf_kwargs.get("device_map"):
            hf_kwargs.pop("device_map", None)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=resolve_dtype(dtype), **hf_kwargs
            )
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise EagleError(
                f"cannot load the target model {str(source)!r}: {reason} "
                "(give a folder with config.json and weights, or a hub id that can be reached)"
            ) from error
        if adapter_path is not None:
            try:
                model.load_adapter(adapter_path)
            except ImportError as error:
                raise EagleError(
                    "adapters need peft: pip install 'eagle-heads[finetune]'"
                ) from error
            except (OSError, ValueError) as error:
                raise EagleError(f"cannot load the adapter {adapter_path!r}: {error}") from error
        if "device_map" not in hf_kwargs and not getattr(model, "is_quantized", False):
            slow = dtype == "auto" and model.dtype == torch.bfloat16 and not fast_bf16(device)
            model = model.to(device=device, dtype=torch.float32 if slow else None)
        return cls(
            model, name="embedded" if path is None else str(path), feature_layers=feature_layers
        )

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
                # past this length longrope turns every key another way: what is cached would be wrong, and
                # one long row, or a draft that looks ahead, would change the others
                limit = min(limit, values.get("original_max_position_embeddings") or limit)
        return limit

    @property
    def embed(self) -> nn.Module:
        """The input embedding that the head shares: ids [...] -> [..., H]."""
        return self.model.get_input_embeddings()

    def set_feature_layers(self, layers: tuple[int, ...]) -> None:
        """Entering-layer ids, 0 … L; L is the last layer's output before the final norm."""
        L = len(self.layers)
        if len(layers) != 3 or any(not 0 <= i <= L for i in layers):
            raise EagleError(f"feature layers {layers} must be three ids in 0 … {L}")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.feature_layers = tuple(layers)
        for i in set(layers):
            if i < L:
                hook = self.layers[i].register_forward_pre_hook(self._saver(i), with_kwargs=True)
            else:
                hook = self.layers[L - 1].register_forward_hook(self._last_saver(i))
            self._hooks.append(hook)

    def _saver(self, layer: int):
        def save(module, args, kwargs):
            if self._capture:
                self._captured[layer] = args[0] if args else kwargs["hidden_states"]

        return save

    def _last_saver(self, layer: int):
        def save(module, args, output):
            if self._capture:
                self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return save

    def _gather_kept(self, module, args):
        """Project only the kept query of each row to the vocabulary: [B, N, H] -> [B, 1, H]."""
        if self._keep is None:
            return None
        hidden = args[0]
        index = self._keep[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (hidden.gather(1, index),)

    def _features(self) -> torch.Tensor:
        return torch.cat([self._captured[i] for i in self.feature_layers], dim=-1)

    def new_cache(self, rows: int, capacity: int) -> StaticKVCache:
        return StaticKVCache(
            len(self.layers), rows, self.kv_heads, capacity, self.head_dim, self.dtype, self.device
        )

    @torch.inference_mode()
    def forward(
        self,
        ids: torch.Tensor,
        context: TreeContext,
        cache: StaticKVCache,
        keep: torch.Tensor | None = None,
        features: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids [B, N] -> logits [B, N, V] and features [B, N, F]. keep [B]: logits of one query a row only,
        [B, 1, V]."""
        self._keep, self._capture = keep, features
        try:
            out = self.model(
                input_ids=ids,
                # four dimensions tell transformers that the mask is ready: no mask is built a pass
                attention_mask=context.positions[:, None, None, :],
                position_ids=context.positions,
                past_key_values=cache,
                use_cache=True,
                tree=context,
            )
            return out.logits, self._features() if features else None
        finally:
            self._keep, self._capture = None, False
            self._captured.clear()

    def prefill(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        host_lengths: list[int],
        cache: StaticKVCache,
        features: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids [B, T] right-padded, lengths [B] -> logits [B, 1, V] of each row's last token, features [B, T, F].

        Padding comes after a row's tokens, so no token of the row sees it.
        """
        B, T = ids.shape
        live = cache.open(T)
        positions = torch.arange(T, device=ids.device).expand(B, T)
        context = TreeContext(cache.lengths, positions, live)
        out = self.forward(ids, context, cache, keep=lengths - 1, features=features)
        cache.advance(lengths, host_lengths)
        return out

    def verify_tree(
        self,
        tokens: torch.Tensor,
        depth: torch.Tensor,
        mask: torch.Tensor,
        cache: StaticKVCache,
        features: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens, depth [B, N], mask [B, N, N] -> logits [B, N, V] and features; nothing is committed."""
        live = cache.open(tokens.shape[1])
        # a draft past the model's limit can never be kept, and must not ask for a position that does not exist
        positions = (cache.lengths[:, None] + depth).clamp_max(self.max_positions - 1)
        ends = cache.row_ends(tokens.shape[1])
        context = TreeContext(cache.lengths, positions, live, ends, mask, positions)
        return self.forward(tokens, context, cache, features=features)

    @torch.no_grad()
    def hidden_and_features(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For training: ids [B, T] -> final hidden [B, T, H] (after the norm) and features [B, T, F].

        attention_mask [B, T]: 1 on real tokens. The stock attention is used.
        """
        self._capture = True
        try:
            with self.stock():
                out = self.backbone(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            return out.last_hidden_state, self._features()
        finally:
            self._capture = False
            self._captured.clear()

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden [..., H] -> logits [..., V], with the scale or soft cap that some families apply."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits * (getattr(self.config, "logit_scale", None) or 1.0)  # Cohere
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1.0)  # Granite
        cap = getattr(self.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @contextmanager
    def stock(self) -> Iterator[nn.Module]:
        """The model as transformers runs it, for `generate` baselines and for training."""
        eager = (
            getattr(self.config, "attn_logit_softcapping", None) or not self.model._supports_sdpa
        )
        kind = "eager" if eager else "sdpa"
        self.model.set_attn_implementation(kind)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(NAME)

    @torch.inference_mode()
    def _probe(self) -> tuple[int, int]:
        """Run six tokens through our attention and cache, as a prompt and as a tree, and through stock ones:
        same logits, or refuse.

        This finds models whose layers drop the context, see the future, or keep state of their own.
        Returns (kv_heads, head_dim).
        """
        found: list[tuple[int, int, int]] = []

        class Recorder(StaticKVCache):
            def __init__(self):
                pass

            def update(self, key_states, value_states, layer_idx, *args, **kwargs):
                found.append((key_states.shape[1], key_states.shape[3], value_states.shape[3]))
                return key_states, value_states

            def get_seq_length(self, layer_idx=0):
                return 0

            get_query_offset = get_seq_length

        ids = torch.arange(6, device=self.device)[None] % self.vocab_size
        positions = torch.arange(6, device=self.device)[None]
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        context = TreeContext(zero, positions, 6)
        recorder = Recorder()
        recorder.layers = []
        kind = getattr(self.config, "model_type", "?")
        refused = (TypeError, AttributeError, LookupError, RuntimeError, ValueError)
        try:
            logits, _ = self.forward(ids, context, recorder, features=False)
        except refused as error:
            raise EagleError(
                f"models of type {kind!r} do not take our attention: {error}"
            ) from error
        if context.layers_seen != len(self.layers) or len(found) != len(self.layers):
            raise EagleError(
                f"models of type {kind!r} are not supported: only {context.layers_seen} of {len(self.layers)} "
                "layers go through transformers' attention interface and cache"
            )
        if len(set(found)) != 1 or found[0][1] != found[0][2]:
            raise EagleError(
                f"models of type {kind!r} are not supported: their key and value shapes differ {set(found)}"
            )
        self.kv_heads, self.head_dim, _ = found[0]
        try:
            # the last three tokens once more, as a chain of tree nodes behind a prefix, with a branch between
            cache = self.new_cache(1, 7)
            self.prefill(ids[:, :3], zero + 3, [3], cache, features=False)
            tokens, depth = (
                ids[:, [3, 0, 4, 5]],
                zero + torch.tensor([[0, 1, 1, 2]], device=self.device),
            )
            mask = torch.tensor(
                [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], device=self.device
            )
            tree_logits, _ = self.verify_tree(
                tokens, depth, mask[None].bool(), cache, features=False
            )
            logits = torch.cat([logits, tree_logits[:, [0, 2, 3]]], dim=1)
            with self.stock() as model:
                expected = model(input_ids=ids, use_cache=False).logits.float()
            expected = torch.cat([expected, expected[:, 3:]], dim=1)
        except refused as error:
            raise EagleError(
                f"models of type {kind!r} do not take our attention: {error}"
            ) from error
        tolerance = {torch.float32: 1e-3, torch.float16: 5e-2}.get(self.dtype, 2e-1)
        error = (logits.float() - expected).abs().max().item() / max(expected.std().item(), 1e-6)
        if not error < tolerance:
            raise EagleError(
                f"models of type {kind!r} are not supported: logits through our attention differ from "
                f"transformers' by {error:.3g} standard deviations"
            )
        return self.kv_heads, self.head_dim


RECURRENT = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "ssm")


def refuse_unsupported(model: nn.Module, config, layers) -> None:
    """Models that cannot roll back by index are refused, with the reason."""
    kind = getattr(config, "model_type", type(model).__name__)
    types = {str(t) for t in getattr(config, "layer_types", None) or []}
    recurrent = sorted(t for t in types if any(r in t for r in RECURRENT))
    if getattr(model, "_is_stateful", False) or recurrent:
        raise EagleError(
            f"models of type {kind!r} keep a recurrent state{' (' + ', '.join(recurrent) + ')' if recurrent else ''} "
            "that cannot be rolled back to an accepted token; use a model of attention layers only"
        )
    if "chunked_attention" in types:
        raise EagleError(f"models of type {kind!r} use chunked attention, which is not supported")
    if layers is None or model.get_output_embeddings() is None:
        raise EagleError(
            f"models of type {kind!r} are not supported: their decoder shows no list of `layers` and an output "
            "embedding; use a decoder-only causal language model such as Llama, Qwen, Mistral or Gemma"
        )
