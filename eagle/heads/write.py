"""A head -> a folder in any format, written only when the folder reads back as the same head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import EagleError
from ..files import atomic_dir, read_tensors, require_equal, same_bits, write_json
from ..loading import EMBEDDED, split_revision
from .configs import write_config
from .head import DraftHead, build, causal
from .read import read_folder
from .tables import require_expressible, table, to_theirs

TOKENS = 5  # of the pass that compares logits


def save_folder(
    path: str | Path,
    state: dict[str, torch.Tensor],
    config: dict,
    feature_layers: Sequence[int],
    provenance: dict | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """A head's folder with these tensors and this config.json, whole or not at all. check: looks at
    the folder before it gets its name, and may add to it. feature_layers: entering-layer ids."""
    path = Path(path)
    # copies, since two names may share memory, which safetensors does not write
    state = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
    with atomic_dir(path) as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)
        layers = {"feature_layers": list(feature_layers), "convention": "entering"}
        write_json(folder / "eagle.json", {**layers, **(provenance or {}), **layers})
        require_equal(read_tensors(folder / "model.safetensors"), state, path)
        if check is not None:
            check(folder)
    return path


def export_head(
    head: DraftHead,
    path: str | Path,
    to: str,
    provenance: dict | None = None,
    verifier: dict | None = None,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write `head` for another engine, atomically, in its own dtypes. verifier: {"name_or_path",
    "architectures"} of the target, which speculators' config names. add: puts further files into
    the folder.

    Raises EagleError where the format's engine would run another head than this one."""
    fmt, config = table(to), head.config
    require_expressible(config, fmt)
    verifier = verifier or recorded(provenance)
    if fmt.name == "vllm" and not verifier["name_or_path"]:
        raise EagleError(
            "speculators' config names the head's target, and speculators reads it: give --target "
            "or --base_model"
        )
    expected = draft_outputs(head)
    written = write_config(fmt, config, head.fc.weight.dtype, verifier)

    def check(folder: Path) -> None:
        published = read_folder(folder)
        again = build(*published.parse(published.layers()))
        if again.config != config:
            raise EagleError(
                f"the {to} folder reads back as another head ({again.config} for {config}); "
                "nothing is written"
            )
        state = again.state_dict()
        different = [k for k, v in head.state_dict().items() if not same_bits(v, state[k])]
        if different or not torch.equal(draft_outputs(again), expected):
            raise EagleError(
                f"the {to} folder gives other logits ({', '.join(different) or 'equal weights'}); "
                "nothing is written"
            )
        if add is not None:
            add(folder)

    state = to_theirs(config, head.state_dict(), fmt)
    return save_folder(path, state, written, config.feature_layers, provenance, check)


def recorded(provenance: dict | None) -> dict:
    """A verifier, as far as the head's record names it."""
    name = ((provenance or {}).get("target") or {}).get("id")
    return {"name_or_path": name and public_name(name), "architectures": []}


def public_name(target: str) -> str:
    """What other programs call a target: a folder, or a hub id without our "@REVISION"."""
    return str(EMBEDDED) if target == "embedded" else split_revision(target)[0]


@torch.no_grad()
def draft_outputs(head: DraftHead) -> torch.Tensor:
    """Logits over the draft vocabulary [1, T, D] (EAGLE-1: hidden states [1, T, H]) for a fixed
    input, in float32 on the CPU."""
    c, head = head.config, copy.deepcopy(head).cpu().float().eval()
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, TOKENS, c.feature_size, generator=random)
    embeds = torch.randn(1, TOKENS, c.hidden_size, generator=random)
    if c.own_embedding:
        embeds = head.embed_tokens(torch.randint(c.vocab_size, (1, TOKENS), generator=random))
    out = head(head.fuse(features), embeds, torch.arange(TOKENS)[None], causal)
    return head.logits(out) if head.has_output else out
