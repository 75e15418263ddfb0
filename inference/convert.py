"""`eagle convert SRC DST --to FORMAT`: a head for another engine; `--probe`: what do its layer ids
mean?

python -m inference.convert HEAD OUT --to vllm --target PATH
python -m inference.convert HEAD --probe --target PATH
python -m inference.convert HEAD OUT --to eagle --pack --license apache-2.0 --bench runs/bench.json
"""

from __future__ import annotations

import os
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
    from eagle.heads import probe as probing
    from eagle.heads.pack import pack_head
    from eagle.heads.read import read_folder
    from eagle.heads.tables import EMBEDDING, table
    from eagle.heads.write import export_head, public_name, recorded
    from eagle.loading import load_tokenizer
    from records.prompts import load_prompts

    if (len(folders), to is None) not in [(2, False), *([(1, True)] if probe else [])]:
        raise EagleError(
            "give SRC DST --to eagle|sglang|vllm|modelopt, or SRC --probe --target PATH to measure "
            "alone"
        )
    destination = None if to is None else Path(folders[1])
    if to is not None:
        table(to)
    published = read_folder(find_folder(folders[0], "head"), from_format)
    if destination and os.path.realpath(published.path) == os.path.realpath(destination):
        raise EagleError(f"{destination} is the source itself; give another folder")
    ids = None
    if layer_ids is not None:
        if not re.fullmatch(r"-?\d+(,-?\d+){2}", layer_ids.replace(" ", "")):
            raise EagleError(f"--layer_ids {layer_ids!r} must be three numbers: 2,8,13")
        ids = [int(i) for i in layer_ids.split(",")]
    loaded = None if target is None else load_target(target)
    if probe:
        if loaded is None:
            raise EagleError("--probe generates: give --target PATH (or --target embedded)")
        texts = load_prompts(prompts, load_tokenizer(loaded.name), num_prompts)
        found = probing.probe(published, loaded, [p.ids for p in texts], max_new_tokens, ids)
        print("\n".join(found.lines()))
        if destination is None:
            return 0
        ids, convention = list(found.numbers), found.best().convention
    layers = published.layers(None, ids, convention)
    # EAGLE-1 files hold a copy of the target's embedding
    embedding = None if loaded is None or published.eagle1 else loaded.embed.weight
    config, state = published.parse(layers, embedding)
    record = published.provenance
    verifier = recorded(record)
    if loaded is not None:
        require_fit(published.path, config, loaded)
        if published.eagle1 and not config.own_embedding:
            config = config.model_copy(update={"own_embedding": True})
            state[EMBEDDING] = loaded.embed.weight.detach().to(state["fc.weight"].dtype)
        architectures = list(loaded.model.config.architectures or [type(loaded.model).__name__])
        verifier = {"name_or_path": public_name(target), "architectures": architectures}
    verifier["name_or_path"] = base_model or verifier["name_or_path"]
    head = build(config, state)
    if pack:
        name = verifier["name_or_path"]
        if license is None or name is None:
            raise EagleError(
                "--pack needs --license (apache-2.0, mit, …) and --base_model, the target's hub id"
            )
        card = {"license": license, "base_model": name, "bench": bench}
        pack_head(head, destination, to=to, provenance=record, verifier=verifier, **card)
    else:
        export_head(head, destination, to, record, verifier)
    read = f"{published.format.name} -> {to}: {destination} ({len(state)} tensors"
    if config.method == "eagle1":
        print(f"{read}, reads back with equal logits)")
        print("not for vLLM: it loads an EAGLE-1 folder and accepts none of its drafts")
        return 0
    print(f"{read}, reads back with equal logits, feature layers entered {list(layers)})")
    if to in ("sglang", "modelopt"):
        print("not for vLLM, which reads these layer ids one off and drafts worse: use --to vllm")
    return 0


def load_target(path: str):
    from transformers.utils import logging

    from eagle.target import Target

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return Target.from_pretrained(path)


if __name__ == "__main__":
    main(convert, name="eagle convert")
