"""A folder that can be pushed to a model hub as it is: head, config, card with what was measured,
generate script.

The card's numbers are copied from a bench file; without one it says that nothing was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import EagleError
from ..files import write_json
from . import remote_generate
from .describe import describe, facts
from .head import DraftHead
from .read import read_folder
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
    bench: str | None = None,
) -> Path:
    """license: an SPDX id as hubs have it (apache-2.0, mit, other). base_model: hub id of the
    target. bench: the file that inference.bench --json wrote of this head."""
    for name, value in {"license": license, "base_model": base_model}.items():
        if not value or any(c in value for c in "\n:#'\"{}[]"):
            raise EagleError(f"{name} {value!r} cannot stand in a model card; give a plain name")
    figures = None if bench is None else read_bench(bench, provenance)

    def add(folder: Path) -> None:
        said = facts(describe(read_folder(folder)))
        data = provenance.get("data") or {}
        said["training data"] = ", ".join(data.get("files") or []) or "not recorded"
        said["answers"] = data.get("answers", "not recorded")
        del said["head"]  # a folder of this machine
        card = model_card(head.config.method, license, base_model, said, measured(figures))
        (folder / "README.md").write_text(card, encoding="utf-8")
        scripts = folder / "custom_generate"
        scripts.mkdir()
        shutil.copyfile(remote_generate.__file__, scripts / "generate.py")
        if figures is not None:
            write_json(folder / "bench.json", figures)

    return export_head(head, path, to, provenance, verifier, add)


def read_bench(path: str, provenance: dict) -> dict:
    """A bench file; refused where it is of another target, or forced to accept."""
    try:
        bench = json.loads(Path(path).read_text(encoding="utf-8"))
        drafted = drafted_runs(bench)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EagleError(
            f"{path} is no bench file ({error}); give what inference.bench --json wrote"
        ) from error
    target = (provenance.get("target") or {}).get("id")
    if target is not None and bench.get("model") != target:
        raise EagleError(
            f"the bench file is of target {bench.get('model')!r}, the head belongs to {target!r}; "
            "measure this head"
        )
    if not drafted:
        raise EagleError("the bench file has no run of an eagle engine; use --engines hf,eagle")
    if any(r.get("forced_acceptance") is not None for r in drafted):
        raise EagleError("the bench file has forced acceptance; measure without")
    return bench


def drafted_runs(bench: dict) -> list[dict]:
    runs = bench["runs"]
    return [r for r in runs if str(r.get("engine", "")).startswith("eagle") and r.get("tau")]


def model_card(method: str, license: str, base_model: str, said: dict, figures: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in said.items())
    return f"""---
license: {license}
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
tags:
- speculative-decoding
- {method.replace("eagle", "eagle-")}
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

{figures}
"""


def measured(bench: dict | None) -> str:
    """Acceptance length and speed as the bench file has them."""
    if bench is None:
        return "Nothing was measured when this folder was made."
    torch = (bench.get("versions") or {}).get("torch")
    where = f"{bench.get('device', 'unknown device')}, {bench.get('dtype')}, torch {torch}"
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for run in drafted_runs(bench):
        cells = ("" if run.get(key) is None else str(run[key]) for key in COLUMNS.values())
        rows.append("| " + " | ".join(cells) + " |")
    asked = f"{bench.get('num_prompts')} prompts, {bench.get('max_new_tokens')} new tokens"
    return (
        f"On {where}; {asked}, medians of {bench.get('repeats')} repeats (`bench.json`; "
        f"`{bench.get('command', 'python -m inference.bench')}`). τ: tokens gained per "
        "verification.\n\n" + "\n".join(rows)
    )
