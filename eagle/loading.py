"""Where models, heads, adapters and tokenizers are found, and a target's weights from there.

An identity is {"id": folder or hub id (with "@REVISION", if one was given), "fingerprint": of the
base's weights as the checkpoint has them, "dtype", "quantization": one of QUANTIZATIONS, "adapter":
None or a hash of the adapter's weights}: what decides the features a head learns from.
"""

from __future__ import annotations

import logging
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import EagleError
from .files import read_json, read_tensors, require_numbers, same_bits, standing
from .files import weights_hash as weights_hash
from .fingerprint import PEFT_MODEL, is_earlier, of_an_adapter
from .fingerprint import target_fingerprint as target_fingerprint
from .linears import Int8Linear, load_kernels, to_int8

EMBEDDED = Path(__file__).parent / "embedded"
QUANTIZATIONS = ("none", "nf4", "int8", "int8_cpu")
# of an adapter folder: peft's two files, and what it belongs to
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "eagle.json"
# what is taken from a hub: never the weights twice, nor those of other programs
TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
TENSORS, PICKLED = ("model*.safetensors", WEIGHTS), ("pytorch_model*.bin",)
NEEDS = {
    "model": "config.json and weights",
    "head": "config.json and model.safetensors",
    "adapter": f"{CONFIG} and {WEIGHTS}",
}
HUB_OPTIONS = ("cache_dir", "token", "local_files_only", "force_download")


def cache_folder() -> Path:
    """Where compiled passes, measured costs and tokenised data are kept."""
    if os.environ.get("EAGLE_CACHE"):
        return Path(os.environ["EAGLE_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle-heads"


def compiled_folder() -> Path:
    return cache_folder() / "compiled"


def find_folder(
    name: str | Path | None,
    what: str = "model",
    *,
    weights: bool = True,
    revision: str | None = None,
    files: tuple[str, ...] = (),
    **hub,
) -> Path:
    """The folder of a model, a head or an adapter (`what`): None and "embedded" are the embedded
    model, an existing folder is itself, and everything else is a hub id, ORG/NAME or
    ORG/NAME@REVISION: its snapshot in the hub's cache, downloaded where it is not there. weights:
    whether they are wanted; files: further ones."""
    if what == "model" and name in (None, "embedded"):
        return EMBEDDED
    folder = standing(Path(name).expanduser())
    if folder.is_dir():
        return _no_adapter(folder, what)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    said, give = f"no {what} folder {str(name)!r}", f"give a folder with {NEEDS[what]}"
    hub_id, at = split_revision(str(name))
    options = {"revision": at or revision, **hub}
    try:
        wanted = [*TEXTS, *(TENSORS if weights else ()), *files]
        found = Path(snapshot_download(hub_id, allow_patterns=wanted, **options))
        if weights and not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(hub_id, allow_patterns=list(PICKLED), **options))
    except HFValidationError as error:
        raise EagleError(f"{said}; {give}, or a hub id ORG/NAME") from error
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        said += f", and the hub does not give it ({reason.splitlines()[0].split('. ')[0][:200]})"
        elsewhere = f"hf download {hub_id} --local-dir FOLDER"
        raise EagleError(
            f"{said}; {give}, or make one where the hub can be reached: {elsewhere}"
        ) from error
    return _no_adapter(found, what)


def _no_adapter(folder: Path, what: str) -> Path:
    """`folder`; refuses one that holds an adapter where a model is wanted: of it transformers load
    the base and the adapter, or the base alone, as it happens."""
    inside = folder if (folder / "config.json").exists() else standing(folder / "adapter")
    for place in (folder, inside) if what == "model" else ():
        if (place / CONFIG).is_file():
            base = read_json(place / CONFIG).get("base_model_name_or_path") or "BASE"
            raise EagleError(
                f"{str(folder)!r} holds an adapter, not a model: use --adapter {folder} with --base "
                f"{base} (in Python adapter_path and base_model_path)"
            )
    return folder


def split_revision(name: str) -> tuple[str, str | None]:
    """ORG/NAME@REVISION -> ORG/NAME, REVISION; a folder is a name."""
    if "@" not in name or Path(name).expanduser().exists():
        return name, None
    return tuple(name.split("@", 1))


def load_tokenizer(name: str | Path | None = None) -> Any:
    """The tokenizer of a model, named as for `find_folder`."""
    from transformers import AutoTokenizer

    folder = find_folder(name, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        said = f"cannot load a tokenizer from {str(folder)!r}: {reason}"
        raise EagleError(f"{said} (give a folder with tokenizer.json)") from error


def load_model(
    path: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str = "none",
    adapter_path: str | Path | None = None,
    **hf_kwargs,
) -> tuple[nn.Module, dict]:
    """A causal LM and its identity; the path is as of `find_folder`.

    dtype "auto" is the checkpoint's, but float32 for a bf16 one on a CPU that would emulate bf16.
    quantization: "nf4" (double quantization, Dettmers et al. 2023, arXiv:2305.14314) or "int8", of
    the linear layers except the LM head, computing in the dtype, both by bitsandbytes; "int8_cpu" of
    all linear layers by `kernels.linear`. adapter_path: a LoRA folder, or a run of
    train.finetune."""
    device, dtype = resolve_device(device), resolve_dtype(dtype)
    embedded = path in (None, "embedded")
    if embedded and not (EMBEDDED / "model.safetensors").exists():
        raise EagleError("this installation has no embedded model; give a model path")
    if quantization not in QUANTIZATIONS:
        raise EagleError(f"unknown quantization {quantization!r}; use {', '.join(QUANTIZATIONS)}")
    quantize = quantization in ("nf4", "int8")
    if quantization == "int8_cpu":
        _require_int8(device, adapter_path)
    if quantization != "none" and "quantization_config" in hf_kwargs:
        raise EagleError("give quantization or quantization_config, not both")
    revision = hf_kwargs.pop("revision", None)
    name = "embedded" if embedded else str(path) if revision is None else f"{path}@{revision}"
    hub = {k: hf_kwargs.pop(k) for k in HUB_OPTIONS if k in hf_kwargs}
    files = (hf_kwargs["gguf_file"],) if "gguf_file" in hf_kwargs else ()
    source = find_folder(path, revision=revision, weights=not files, files=files, **hub)
    device_map = hf_kwargs.pop("device_map", None)
    placed = {"device_map": device_map} if device_map else {}
    # what loses values on the way is read as it is first, for the identity of its weights
    lossy = quantize or dtype == torch.float16
    where = {} if lossy else placed
    model = read_model(source, "auto" if lossy else dtype, {**hf_kwargs, **where})
    stored_quantized = getattr(model, "is_quantized", False)
    slow = dtype == "auto" and model.dtype == torch.bfloat16 and not fast_bf16(device)
    identity = identity_of(model, name)
    if quantization != "none" and stored_quantized:
        raise EagleError(f"{name} is stored quantized; leave quantization={quantization!r} out")
    if quantize:
        if dtype == "auto":
            dtype = torch.float32 if slow else model.dtype
        del model
        placed = placed or {"device_map": {"": device}}
        config = {"quantization_config": quantization_config(quantization, dtype)}
        model = read_model(source, dtype, {**hf_kwargs, **placed, **config})
        _restrain_repacking(model, dtype)
    elif lossy:
        model = read_model(source, dtype, {**hf_kwargs, **placed})
    if not placed and not stored_quantized:
        model = model.to(device=device, dtype=torch.float32 if slow else None)
    if quantization == "int8_cpu":
        to_int8(model)
    if quantization != "none":
        identity["quantization"] = quantization
    identity["dtype"] = str(model.dtype).split(".")[-1]
    if adapter_path is not None:
        identity["adapter"] = attach(model, find_adapter(adapter_path), identity)
    return model, identity


def _require_int8(device: torch.device, adapter_path) -> None:
    said = "quantization='int8_cpu'"
    if device.type != "cpu":
        raise EagleError(f"{said} is for CPUs; on {device} use 'int8' or 'nf4'")
    if adapter_path is not None:
        merge = "python -m train.finetune merge --adapter ADAPTER --output MERGED"
        raise EagleError(f"{said} takes no adapter; merge it first: {merge}")
    if reason := load_kernels(compiled_folder()):
        raise EagleError(f"{said} needs the C++ kernels, which do not compile: {reason}")


def read_model(
    source: str | Path, dtype: torch.dtype | str, hf_kwargs: dict, role: str = "target"
) -> nn.Module:
    """transformers' `from_pretrained`; what it cannot load is named by its `role`."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **hf_kwargs)
    except ImportError as error:
        raise EagleError(f"{error}: pip install 'eagle-heads[finetune]'") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        said = f"cannot load the {role} model {str(source)!r}: {reason}"
        raise EagleError(f"{said} (give a folder with {NEEDS['model']})") from error


def quantization_config(quantization: str, compute: torch.dtype, double_quant: bool = True) -> Any:
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    if quantization == "int8":
        # no product of its own for outliers: their columns would depend on a pass's other tokens
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **nf4)


def quiet_bitsandbytes() -> None:
    """While it is imported, it warns of an optional kernel that it does without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _restrain_repacking(model: nn.Module, compute: torch.dtype) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights for a kernel that computes in
    bf16, whatever was asked for, and fails where a layer's width is no multiple of 32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            fits = compute == torch.bfloat16 and module.out_features % 32 == 0
            module.support_avx512bf16_for_cpu &= fits


def find_adapter(path: str | Path) -> Path:
    """The folder of an adapter: itself, or `adapter/` of a run."""
    folder = find_folder(path, "adapter")
    for candidate in (folder, standing(folder / "adapter")):
        if (candidate / CONFIG).exists() and (candidate / WEIGHTS).exists():
            return candidate
    said = f"no adapter in {str(path)!r}: give a folder with {NEEDS['adapter']}"
    raise EagleError(f"{said}, or the run that made it")


def read_record(folder: Path) -> dict:
    """An adapter's `eagle.json`, or {} for one of another program."""
    from .heads.read import RecordFile

    return read_json(folder / RECORD, RecordFile) if (folder / RECORD).exists() else {}


def require_base(folder: Path, record: dict, name: str, found: str) -> None:
    """Refuse an adapter that was trained on other weights than those with fingerprint `found`."""
    base = record.get("base") or {}
    expected = base.get("fingerprint")
    if is_earlier(expected):
        said = (
            f"the adapter {folder} was recorded by an earlier version, as one on {base.get('id')}"
        )
        warnings.warn(f"{said}, which cannot be compared with {name}", stacklevel=4)
    elif expected not in (None, found):
        raise EagleError(
            f"the adapter {folder} was trained on {base.get('id', 'another model')} (weights "
            f"{expected[:12]}), not on {name} (weights {found[:12]}); give that base"
        )


def attach(model: nn.Module, folder: Path, identity: dict) -> str:
    """Load the adapter into the model; returns a hash of its weights. One that was trained on
    another base, or does not have this one's shapes, is refused."""
    require_base(folder, read_record(folder), identity["id"], identity["fingerprint"])
    tensors = read_tensors(folder / WEIGHTS)
    require_numbers(tensors, folder)
    _require_plain_lora(model, folder, tensors)
    misfit = f"the adapter {folder} does not fit {identity['id']}"
    remedy = "give the base it was trained on"
    quiet_bitsandbytes()  # peft imports it
    try:
        model.load_adapter(str(folder))
    except ImportError as error:
        raise EagleError("adapters need peft: pip install 'eagle-heads[finetune]'") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EagleError(f"{misfit}: {reason}; {remedy}") from error
    # what does not match by name is only warned about by transformers, and left random
    held = {n.replace(".default", ""): p.shape for n, p in model.named_parameters() if "lora_" in n}
    lora = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if "lora_" in n}
    strange = sorted(set(held.items()) ^ {(n, t.shape) for n, t in lora.items()})
    if not held or strange:
        first = strange[0][0] if strange else "no LoRA weight"
        said = f"{len(strange)} of its weights and the model's do not match, {first} first"
        raise EagleError(f"{misfit}: {said}; {remedy}")
    model.requires_grad_(False)
    return weights_hash(tensors)


def _require_plain_lora(model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Refuse weights that would not be applied, or so slowly that nobody would decode with them.
    Copies of the base's own weights are none."""
    own = dict(model.named_parameters())
    for name, value in tensors.items():
        if "lora_" in name and "lora_magnitude_vector" not in name:
            continue
        base = own.get(name.removeprefix(PEFT_MODEL).replace(".base_layer.", "."))
        if base is None or not same_bits(value.to(base.dtype), base):
            kind = "is a DoRA" if "lora_magnitude_vector" in name else f"holds {name}"
            raise EagleError(
                f"the adapter {folder} {kind}, and only LoRA matrices are applied here; merge it "
                f"into its base: python -m train.finetune merge --adapter {folder} --output MERGED"
            )


def identity_of(model: nn.Module, name: str) -> dict:
    """Of a model as it is: what was quantized before cannot be told from its checkpoint."""
    config = getattr(model.config, "quantization_config", None) or {}
    values = config if isinstance(config, dict) else config.to_dict()
    kind = str(values.get("quant_method", "other")) if values else "none"
    if any(isinstance(m, Int8Linear) for m in model.modules()):
        kind = "int8_cpu"
    if values.get("load_in_8bit"):
        kind = "int8"
    elif values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4":
        kind = "nf4"
    lora = {  # under the names of an adapter's file
        PEFT_MODEL + n.removeprefix(PEFT_MODEL).replace(".default", ""): p.detach()
        for n, p in model.named_parameters()
        if of_an_adapter(n)
    }
    return {
        "id": name,
        "fingerprint": target_fingerprint(model),
        "dtype": str(model.dtype).split(".")[-1],
        "quantization": kind,
        "adapter": weights_hash(lora) if lora else None,
    }


def decoder_layers(backbone: nn.Module) -> nn.ModuleList | None:
    """The decoder's blocks, under whatever name the family keeps them."""
    found = (getattr(backbone, name, None) for name in ("layers", "h", "blocks"))
    return next((blocks for blocks in found if isinstance(blocks, nn.ModuleList)), None)


def differences(recorded: dict, found: dict) -> list[str]:
    """Why a head that was trained for one target may draft worse for another, in words."""
    said = []
    before, now = recorded.get("fingerprint"), found["fingerprint"]
    if is_earlier(before):
        said.append(
            f"an earlier version recorded its target, {recorded.get('id', 'a model')}, whose "
            f"weights cannot be compared with those of {found['id']}"
        )
    elif before not in (None, now):
        said.append(
            f"it was trained on {recorded.get('id', 'another model')} (weights {before[:12]}), "
            f"this target is {found['id']} (weights {now[:12]})"
        )
    before, now = recorded.get("adapter", found["adapter"]), found["adapter"]
    if before != now:
        before, now = (f"the adapter {x[:12]}" if x else "no adapter" for x in (before, now))
        said.append(f"it was trained with {before}, this target has {now}")
    before, now = recorded.get("quantization") or "none", found["quantization"]
    if before != now:
        said.append(f"it was trained with quantization={before}, this target has {now}")
    return said


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
    full = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if (name := full.get(dtype, dtype)) not in full.values():
        raise EagleError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return getattr(torch, name)


def resolve_compute(dtype: str, device: torch.device) -> str:
    """What training computes in: of "auto", "bf16" on a device that has it and else "fp32"."""
    if dtype != "auto":
        return dtype
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast_bf16(device) and not old else "fp32"


def fast_bf16(device: torch.device) -> bool:
    """Does the device multiply bf16 natively? x86 CPUs without AVX512-BF16 or AMX emulate it,
    slowly, and so does a torch that is held to AVX2."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):
        return False
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    probes = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return not probes or any(probe() for probe in probes)
