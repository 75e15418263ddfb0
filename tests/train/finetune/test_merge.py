"""Merging: what is written is the base in full precision with the adapter in it, and says how it
differs.
"""

import json

import pytest
import torch
from finetune_helpers import fingerprint_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs import cli
from configs.errors import ConfigError
from configs.finetune_schema import LoraSection, MergeConfig, PolicyConfig
from eagle.errors import EagleError
from eagle.loading import RECORD
from eagle.target import Target
from records import load_tokenizer
from train.finetune.__main__ import COMMANDS
from train.finetune.assistant import MAKERS
from train.finetune.merge import merge
from train.finetune.policy import build_policy


def config(data, whole, output, **more):
    rows = {"format": "instruction", "path": str(data), "max_length": 96, "heldout_fraction": 0.2}
    rows["cache_dir"] = str(output.parent / "cache")
    values = {"adapter": str(whole), "output": str(output), "rows": 3, "data": rows}
    return MergeConfig.model_validate(values | more)


def test_merged_is_base_plus_adapter(base, data, whole, tmp_path, capsys):
    output = tmp_path / "merged"
    assert merge(config(data, whole, output, dtype="float32")) == 0
    policy = PolicyConfig(base=str(base), adapter=str(whole), quantization="none", dtype="float32")
    adapted = build_policy(policy, LoraSection(), 0).eval()
    stock = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, adapted(ids).logits, atol=1e-4)
        with adapted.disable_adapter():
            assert (stock(ids).logits - adapted(ids).logits).abs().max() > 0.1
    assert Target.from_pretrained(output).vocab_size == stock.config.vocab_size
    record = json.loads((output / RECORD).read_text())
    assert record["kind"] == "merged"
    assert record["base"]["fingerprint"] == fingerprint_of(base)
    report = record["report"]
    assert report["merged_vs_adapted"]["max_abs_logit"] < 1e-3
    assert report["merged_vs_adapted"]["same_top_token"] == 1.0
    # this is what leaving the 4-bit base behind does, and it is not small
    assert report["merged_vs_trained"]["max_abs_logit"] > 0.05
    assert report["merged_vs_trained"]["kl"] > 10 * abs(report["merged_vs_adapted"]["kl"])
    assert report["quantization_of_trained"] == "nf4" and report["rows"] == 3
    assert set(report["heldout_loss"]) == {"trained", "adapted", "merged"}
    shown = capsys.readouterr().out
    assert "rounding of the merge" in shown and "quantized base left behind" in shown
    assert merge(config(data, whole, tmp_path / "rounded", dtype="bfloat16")) == 0
    record = json.loads((tmp_path / "rounded" / RECORD).read_text())
    assert record["dtype"] == "bfloat16"
    assert 1e-3 < record["report"]["merged_vs_adapted"]["max_abs_logit"] < 5


def test_an_adapter_of_tied_ends_gets_an_output_layer_of_its_own(base, data, tmp_path):
    """Merged into the one tensor, the update of either end changed both."""
    tied, folder = tmp_path / "base", tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=True)
    model.save_pretrained(tied)
    load_tokenizer(str(base)).save_pretrained(tied)
    for ends in (["embed_tokens"], ["lm_head"]):
        model = AutoModelForCausalLM.from_pretrained(tied)
        lora = LoraConfig(target_modules=["q_proj", *ends], init_lora_weights=False)
        adapted, merged = get_peft_model(model, lora).eval(), tmp_path / ends[0]
        adapted.save_pretrained(folder)
        assert merge(config(data, folder, merged, base=str(tied))) == 0
        stock, ids = AutoModelForCausalLM.from_pretrained(merged), torch.arange(5, 40)[None]
        assert torch.allclose(stock(ids).logits, adapted(ids).logits, atol=1e-3)
        assert stock.lm_head.weight is not stock.model.embed_tokens.weight
    weights = folder / "adapter_model.safetensors"
    save_file({name: value * 9 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(EagleError, match="rounding to torch.bfloat16 explains at most .* nothing"):
        merge(config(data, folder, tmp_path / "far", base=str(tied), dtype="bfloat16"))
    assert not (tmp_path / "far").exists()


def test_wrong_merges_are_refused(base, other_base, data, whole, tmp_path):
    with pytest.raises(EagleError, match=r"was trained on .* not on .*give that base"):
        merge(config(data, whole, tmp_path / "a", base=str(other_base)))
    with pytest.raises(EagleError, match="is not empty"):
        merge(config(data, whole, base))
    with pytest.raises(EagleError, match="no adapter in"):
        merge(config(data, tmp_path, tmp_path / "b"))
    with pytest.raises(ConfigError, match="--adapter"):
        merge(MergeConfig())
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_commands(tmp_path, capsys):
    """As their `main` runs them, in this process: what is wrong is one line and leaves nothing."""

    def command(name, *arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(COMMANDS[name], list(map(str, arguments)), name=name)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    presets = "presets: dpo, pipeline, qlora, writing_assistant"
    for arguments, named in (
        (("sft", "train.max_step=3"), "max_steps"),
        (("sft", "--base", "no/such/folder"), "no/such/folder"),
        (("dpo", "--data", "nothing.jsonl"), "nothing.jsonl"),
        (("multitask", "--config", "nothing"), presets),
    ):
        code, _, errors = command(*arguments, "--output", tmp_path / "run")
        assert code == 1 and "Traceback" not in errors
        assert len(errors.strip().splitlines()) == 1 and named in errors
        assert not (tmp_path / "run").exists()
    code, shown, _ = command("data", "--output", tmp_path / "out")
    assert code == 0 and "heldout_tasks.jsonl" in shown
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {f"{h}{k}.jsonl" for h in ("", "heldout_") for k in MAKERS}
    samples = [{"text": "a", "score": 1}, {"text": "b", "score": 0}]
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "p", "samples": samples}))
    code, shown, _ = command("pairs", "--data", tmp_path / "s.jsonl", "--output", tmp_path / "p")
    assert code == 0 and "1 pairs of 1 prompts" in shown
