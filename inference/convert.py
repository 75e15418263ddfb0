"""`eagle convert SRC DST --to FORMAT`: a head for another engine; `--probe`: what do its layer ids
mean?

python -m inference.convert HEAD OUT --to vllm --target PATH
python -m inference.convert HEAD --probe --target PATH
python -m inference.convert HEAD OUT --to eagle --pack --license apache-2.0 --bench runs/bench.json
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

from configs.cli import main
from eagle.errors import EagleError


def convert(
    *folders: str,
    to: str | None = None,
    from_format: str | None = None,
    target: str | None = None,
    layer_ids: str | None = None,
    convention: str | None = None,
    probe: bool = False,
    prompts: str | None = None,
    num_prompts: int = 16,
    max_new_tokens: int = 64,
    pack: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    bench: str | None = None,
) -> int:
    """Rewrite the head SRC as the folder DST.

    --to, --from: eagle (SafeAILab), sglang (SpecForge), vllm (speculators) or modelopt; SRC's is
    detected. --target: the model that the head drafts for (a folder, a hub id, or "embedded"):
    checks that the head fits, leaves an embedding out that is the target's, names it in
    speculators' config.

    --layer_ids i,j,k and --convention entering|output|one-based win over what SRC says of its
    feature layers. --probe generates with the head under each convention and says which is accepted
    most; with DST, that one is used.

    --pack makes a folder for a model hub, with a card (--license, --base_model; --bench FILE of
    inference.bench --json for its numbers) and custom_generate/ for stock generate.
    """
    from eagle.checkpoint import build, find_folder, require_fit
    from eagle.heads.read import read_folder
    from eagle.heads.tables import EMBEDDING, table
    from eagle.heads.write import export_head, public_name, recorded, require_apart

    source, destination = _folders(folders, to, probe)
    if to is not None:
        table(to)
    published = read_folder(find_folder(source, "head"), from_format)
    if destination is not None:
        require_apart(published.path, destination)
    ids = _ids(layer_ids)
    loaded = None if target is None else load_target(target)
    if probe:
        ids, convention = _probe(
            published, loaded, ids, prompts, num_prompts, max_new_tokens, destination
        )
    if destination is None:
        return 0
    layers = published.layers(None, ids, convention)
    # EAGLE-1 files hold a copy of the target's embedding
    embedding = None if loaded is None or published.eagle1 else loaded.embed.weight
    config, state = published.parse(layers, embedding)
    if loaded is not None:
        require_fit(published.path, config, loaded)
        if published.eagle1 and not config.own_embedding:
            config = dataclasses.replace(config, own_embedding=True)
            state[EMBEDDING] = loaded.embed.weight.detach().to(state["fc.weight"].dtype)
    head, record = build(config, state), published.provenance
    verifier = recorded(record)
    if loaded is not None:
        architectures = list(loaded.model.config.architectures or [type(loaded.model).__name__])
        verifier = {
            "name_or_path": base_model or public_name(target),
            "architectures": architectures,
        }
    elif base_model is not None:
        verifier["name_or_path"] = base_model
    if pack:
        from eagle.heads.pack import pack_head

        name = base_model or verifier["name_or_path"]
        if license is None or name is None:
            raise EagleError(
                "--pack needs --license (apache-2.0, mit, …) and --base_model, the target's hub id"
            )
        pack_head(
            head,
            destination,
            to=to,
            license=license,
            base_model=name,
            provenance=record,
            verifier=verifier,
            bench=_bench(bench),
        )
    else:
        export_head(head, destination, to, record, verifier)
    told = "" if config.method == "eagle1" else f", feature layers entered {list(layers)}"
    print(
        f"{published.format.name} -> {to}: {destination} ({len(state)} tensors, reads back with equal logits{told})"
    )
    if config.method == "eagle1":
        print("not for vLLM: it loads an EAGLE-1 folder and accepts none of its drafts")
    elif to in ("sglang", "modelopt"):
        print(
            "not for vLLM: it takes these layer ids as its own, one off, and drafts worse; use --to vllm"
        )
    return 0


def _folders(folders: tuple[str, ...], to: str | None, probe: bool) -> tuple[str, Path | None]:
    if len(folders) == 2 and to is not None:
        return folders[0], Path(folders[1])
    if len(folders) == 1 and probe and to is None:
        return folders[0], None
    raise EagleError(
        "give SRC DST --to eagle|sglang|vllm|modelopt, or SRC --probe --target PATH to measure alone"
    )


def _ids(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d+(,-?\d+){2}", text.replace(" ", "")):
        raise EagleError(f"--layer_ids {text!r} must be three numbers: 2,8,13")
    return [int(i) for i in text.split(",")]


def _probe(published, target, ids, prompts, num_prompts, max_new_tokens, destination):
    from eagle.heads.probe import describe, probe
    from eagle.loading import load_tokenizer
    from records.prompts import load_prompts

    if target is None:
        raise EagleError("--probe generates: give --target PATH (or --target embedded)")
    tokenizer = load_tokenizer(target.name)
    loaded = load_prompts(prompts, tokenizer, num_prompts)
    found = probe(published, target, [p.ids for p in loaded], max_new_tokens, ids)
    print("\n".join(describe(found)))
    if destination is None:
        return ids, None
    best = found.require_clear()
    return list(found.numbers), best.convention


def load_target(path: str):
    from transformers.utils import logging

    from eagle.target import Target

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    return Target.from_pretrained(path)


def _bench(path: str | None) -> dict | None:
    from eagle.heads.describe import bench_file

    if path is None:
        return None
    try:
        value = json.loads(bench_file(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise EagleError(
            f"{path} is not JSON ({error}); give what inference.bench --json wrote"
        ) from error
    if not isinstance(value, dict):
        raise EagleError(f"{path} is not a bench file; give what inference.bench --json wrote")
    return value


if __name__ == "__main__":
    # a parameter cannot be called `from`
    arguments = [re.sub(r"^--from(?==|$)", "--from_format", a) for a in sys.argv[1:]]
    main(convert, arguments, name="eagle convert")
