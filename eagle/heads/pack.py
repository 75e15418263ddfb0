"""A folder that can be pushed to a model hub as it is: head, config, card with what was measured,
generate script.

The card's numbers are copied from a bench file; without one it says that nothing was measured."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import EagleError
from ..files import write_json
from . import remote_generate
from .describe import require_bench_of
from .head import DraftHead
from .write import export_head

# of the card's table: title -> field of a run in the bench file
COLUMNS = {name: name.replace(" ", "_") for name in ("engine", "batch size", "temperature", "tree")}
COLUMNS |= {"τ": "tau", "tokens/s": "tokens_per_second", "vs stock `generate`": "vs_hf"}
COLUMNS |= {"vs best plain": "vs_best_vanilla", "identical": "identical"}


def pack_head(
    head: DraftHead,
    path: str | Path,
    *,
    to: str,
    license: str,
    base_model: str,
    provenance: dict,
    verifier: dict | None = None,
    bench: dict | None = None,
) -> Path:
    """license: an SPDX id as hubs have it (apache-2.0, mit, other). base_model: hub id of the
    target. bench: what inference.bench --json wrote of this head."""
    plain = {"license": license, "base_model": base_model}
    for name, value in plain.items():
        if not value or any(c in value for c in "\n:#'\"{}[]"):
            raise EagleError(f"{name} {value!r} cannot stand in a model card; give a plain name")
    runs = None if bench is None else require_bench_of(bench, provenance)

    def add(folder: Path) -> None:
        card = model_card(head, to, license, base_model, provenance, bench, runs)
        (folder / "README.md").write_text(card, encoding="utf-8")
        scripts = folder / "custom_generate"
        scripts.mkdir()
        shutil.copyfile(remote_generate.__file__, scripts / "generate.py")
        if bench is not None:
            write_json(folder / "bench.json", bench)

    return export_head(head, path, to, provenance, verifier, add)


def model_card(
    head: DraftHead,
    to: str,
    license: str,
    base_model: str,
    provenance: dict,
    bench: dict | None,
    runs: list[dict] | None,
) -> str:
    config, target = head.config, provenance.get("target") or {}
    data = provenance.get("data") or {}
    facts = [
        ("method", config.method),
        ("format", to),
        ("target", base_model),
        ("weights of the target (fingerprint)", target.get("fingerprint", "not recorded")),
        ("adapter", target.get("adapter") or provenance.get("adapter") or "none recorded"),
        (
            "quantization",
            target.get("quantization") or provenance.get("quantization") or "none recorded",
        ),
        ("feature layers (states that enter layer)", list(config.feature_layers)),
        ("draft vocabulary", f"{config.draft_vocab_size} of {config.vocab_size}"),
        ("training data", ", ".join(data.get("files") or []) or "not recorded"),
        ("answers", data.get("answers", "not recorded")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""---
license: {license}
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags:
- speculative-decoding
- {config.method.replace("eagle", "eagle-")}
- custom_generate
---

# Draft head for {base_model}

A draft head for lossless speculative decoding: the target makes every decision, the head decides
how fast it comes.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{base_model}")
inputs = AutoTokenizer.from_pretrained("{base_model}")("def add(a, b):", return_tensors="pt")
# FOLDER: this folder, or its id on the hub; needs `pip install eagle-heads`
ids = model.generate(**inputs, max_new_tokens=64, custom_generate=FOLDER, trust_remote_code=True)
```

## Measured

{measured(bench, runs)}
"""


def measured(bench: dict | None, runs: list[dict] | None) -> str:
    """Acceptance length and speed as the bench file has them."""
    if bench is None or runs is None:
        return "Nothing was measured when this folder was made."
    torch = (bench.get("versions") or {}).get("torch")
    where = f"{bench.get('device', 'unknown device')}, {bench.get('dtype')}, torch {torch}"
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for run in runs:
        cells = ("" if run.get(key) is None else str(run[key]) for key in COLUMNS.values())
        rows.append("| " + " | ".join(cells) + " |")
    asked = f"{bench.get('num_prompts')} prompts, {bench.get('max_new_tokens')} new tokens"
    return (
        f"On {where}; {asked}, medians of {bench.get('repeats')} repeats (`bench.json`; "
        f"`{bench.get('command', 'python -m inference.bench')}`). τ: tokens gained per "
        "verification.\n\n" + "\n".join(rows)
    )
