"""Published heads as the projects that publish them write them: names, shapes and config fields,
spelt out by hand.

The geometry is that of the tiny Llama of engine_helpers: hidden 32, 4 heads of 8 (2 for keys and
values), vocabulary 128, MLP 48, 4 layers; a draft vocabulary of 48 or of 128. Nothing here comes
from the package's own writer."""

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

H, V, D = 32, 128, 48
ENTERING = [1, 2, 3]
IDS = "eagle_aux_hidden_state_layer_ids"

LISTED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
LLAMA, FLAT, CONFIGS = (LISTED[part] for part in ("llama", "flat", "configs"))
EAGLE3, EAGLE1 = (
    {name: tuple(shape) for name, shape in LISTED["tensors"][method].items()}
    for method in ("eagle3", "eagle1")
)
LAYERS_0 = {name.replace("midlayer.", "layers.0."): shape for name, shape in EAGLE3.items()}
MAPS = {"d2t": (D,), "t2d": (V,)}
# format -> tensors of a reduced vocabulary, of a full one
TENSORS = {
    "eagle": (EAGLE3 | MAPS, EAGLE3 | {"lm_head.weight": (V, H)}),
    "sglang": (EAGLE3 | MAPS, EAGLE3 | {"lm_head.weight": (V, H), "d2t": (V,), "t2d": (V,)}),
    "vllm": (LAYERS_0 | MAPS, LAYERS_0 | {"lm_head.weight": (V, H)}),
    "modelopt": (LAYERS_0 | {"d2t": (D,)}, LAYERS_0 | {"lm_head.weight": (V, H)}),
}


def without(config, *keys):
    return {k: v for k, v in config.items() if k not in keys}


# speculators before the norms and the ids of other layers: rope_theta flat, no target_hidden_size
OLDER_VLLM = without(
    CONFIGS["vllm"], "norm_before_fc", "fc_norm", "norm_output", "target_hidden_size"
)
OLDER_VLLM["transformer_layer_config"] = without(
    CONFIGS["vllm"]["transformer_layer_config"], "rope_parameters"
)
FLAT_VLLM = FLAT | {"architectures": ["Eagle3LlamaForCausalLM"], IDS: ENTERING}
# SafeAILab's own files name neither layers nor head_dim
BIN = without(FLAT, "head_dim") | {"architectures": ["LlamaForCausalLM"]}
EMBEDDED = EAGLE3 | MAPS | {"embed_tokens.weight": (V, H)}
UNBIASED = without(LLAMA, "head_dim") | {"bias": False}
PUBLISHED = {  # case -> (tensors, config, how it is stored)
    "eagle": (TENSORS["eagle"][0], CONFIGS["eagle"], "safetensors"),
    "eagle-bin": (TENSORS["eagle"][0], BIN, "bin"),
    "eagle-embedding": (EMBEDDED, CONFIGS["eagle"], "safetensors"),
    "eagle1-bin": (EAGLE1, without(LLAMA, "head_dim"), "bin"),
    "eagle1-without-bias": (without(EAGLE1, "fc.bias"), UNBIASED, "safetensors"),
    "sglang": (TENSORS["sglang"][0], CONFIGS["sglang"], "safetensors"),
    "sglang-full": (TENSORS["sglang"][1], CONFIGS["sglang"] | {"draft_vocab_size": V}, "bin"),
    "vllm": (TENSORS["vllm"][0], CONFIGS["vllm"], "safetensors"),
    "vllm-older": (TENSORS["vllm"][0], OLDER_VLLM, "safetensors"),
    "vllm-flat": (TENSORS["vllm"][0], FLAT_VLLM, "safetensors"),
    "modelopt": (TENSORS["modelopt"][0], CONFIGS["modelopt"], "safetensors"),
}


def fill(shapes, seed=0, dtype=torch.float32):
    """Random tensors of these shapes; maps that choose D of V tokens, or leave all in place."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        if key in ("d2t", "t2d"):
            continue
        noise = torch.randn(shape, generator=random) * (0.3 if len(shape) > 1 else 0.1)
        tensors[key] = (noise if len(shape) > 1 or key.endswith("bias") else 1 + noise).to(dtype)
    if "d2t" in shapes:
        size = shapes["d2t"][0]
        ids = torch.randperm(V, generator=random)[:size].sort().values
        tensors["d2t"] = ids - torch.arange(size)
        if "t2d" in shapes:
            tensors["t2d"] = torch.isin(torch.arange(V), ids)
    return tensors


def publish(folder, tensors, config, kind="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def published(folder, case, seed=0):
    shapes, config, kind = PUBLISHED[case]
    return publish(folder, fill(shapes, seed), config, kind)
