"""The benchmark as a command: its JSON, its files, its equality verdict, and how it refuses."""

import json

import pytest
from engine_helpers import head_model, make_head, make_prompts

from eagle.model import EaModel
from inference.bench import compare
from inference.bench.cases import ENGINES, Sweep
from inference.bench.engines import bench, measure
from inference.bench.record import command_line

# what others read
FIELDS = set(
    "device threads dtype versions environment model tree num_prompts repeats max_new_tokens "
    "temperature runs speedup efficiency efficiency_best identical divergences warm_up_s notes "
    "explain command".split()
)
RUN = set(
    "engine batch_size tree context_length capacity temperature forced_acceptance new_tokens "
    "seconds tokens_per_second tau acceptance_by_depth cycle_ms draft_ms verify_ms commit_ms "
    "prefill_ms peak_memory_mb looping vs_hf vs_hf_ci95 vs_best_vanilla vs_best_vanilla_ci95 "
    "identical divergences".split()
)
SPEEDUP = {"vs_hf", "vs_vanilla", "vs_vanilla_compiled", "best_vs_hf", "best_vs_best_vanilla"}
OPTIONS = dict(max_new_tokens=8, top_p=0.0, top_k=0, seed=0)


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "question.jsonl"
    rows = [{"question_id": i, "turns": [f"def f{i}():" * (i + 1), "And?"]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_of_a_whole_run(command, base, prompt_file, tmp_path):
    out, page = tmp_path / "deep" / "bench.json", tmp_path / "bench.md"
    flags = (
        "--batch_sizes 1,2 --engines eagle,hf,vanilla,hf_prompt_lookup --tree 8,4,2"
        " --max_new_tokens 10 --num_prompts 3 --repeats 2"
    ).split()
    files = ["--prompts", prompt_file, "--json", out, "--report", page]
    result = command("inference.bench", *base, *flags, *files)
    assert result.returncode == 0, result.stderr
    assert "batches," in result.stderr and "s left" in result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == last
    assert FIELDS <= last.keys() and last["dtype"] == "float32" and last["tree"] == "8,4,2"
    runs = {(r["engine"], r["batch_size"]): r for r in last["runs"]}
    both = {(engine, size) for engine in ("hf", "vanilla", "eagle") for size in (1, 2)}
    assert runs.keys() == both | {("hf_prompt_lookup", 1)}
    assert "hf_prompt_lookup" in last["notes"][0]
    for (engine, size), run in runs.items():
        assert RUN <= run.keys()
        assert run["new_tokens"] == runs["hf", 1]["new_tokens"] == sum(run["batch_tokens"])
        rate = run["new_tokens"] / run["seconds"]
        assert run["tokens_per_second"] == pytest.approx(rate, rel=0.01)
        assert run["tree"] == ("8,4,2" if engine == "eagle" else None)
        assert [len(s) for s in run["batch_seconds"]] == [2] * (3 if size == 1 else 2)
        if engine.startswith("hf"):
            assert run["tau"] is None and run["cycle_ms"] is None
        else:
            parts = run["draft_ms"] + run["verify_ms"] + run["commit_ms"]
            assert run["cycle_ms"] == pytest.approx(parts, abs=0.01) and run["prefill_ms"] > 0
    assert runs["vanilla", 1]["tau"] == 1.0 and runs["eagle", 1]["tau"] >= 1.0
    assert last["identical"] == {"1": True, "2": True} and last["divergences"]["2"]["rows"] == 0
    assert runs["eagle", 2]["divergences"].keys() == {"hf", "vanilla"}
    assert runs["eagle", 2]["identical"] is True and runs["vanilla", 2]["identical"] is None
    assert last["speedup"].keys() == SPEEDUP
    for name, other in (("vs_hf", "hf"), ("vs_vanilla", "vanilla"), ("best_vs_hf", "hf")):
        ratio = runs["eagle", 2]["tokens_per_second"] / runs[other, 2]["tokens_per_second"]
        assert last["speedup"][name]["2"] == pytest.approx(ratio, rel=0.01)
    low, high = runs["eagle", 1]["vs_hf_ci95"]
    assert low <= runs["eagle", 1]["vs_hf"] <= high
    # what was typed, and nothing about whose machine it is
    assert "--batch_sizes 1,2" in last["command"] and "question.jsonl" in last["command"]
    assert str(tmp_path) not in result.stdout + page.read_text() and "--json" not in last["command"]
    assert last["command"] in page.read_text() and "| eagle |" in page.read_text()


def test_fewer_engines(in_process, base, prompt_file):
    flags = "--max_new_tokens 8 --num_prompts 2 --repeats 1 --prompts".split()
    flags += [prompt_file, "--engines"]
    code, out, _ = in_process(bench, *base, *flags, "hf,vanilla,eagle", "--temperature", "0.8")
    last = json.loads(out.splitlines()[-1])
    assert code == 0 and last["identical"] == {"1": True} and last["temperature"] == 0.8
    # stock generate draws other random numbers
    assert last["runs"][-1]["divergences"].keys() == {"vanilla"}
    # plain engines need no head
    code, out, _ = in_process(bench, *base[:2], "--device", "cpu", *flags, "hf,vanilla")
    last = json.loads(out.splitlines()[-1])
    assert code == 0 and last["identical"] == {} and last["tree"] is None


def test_a_sweep_keeps_the_headline_about_its_first_combination(llama):
    engines, trees = ["hf", "vanilla", "eagle"], ["8,4,2", "4,2,1"]
    sweep = Sweep(engines, [2], trees, [12, 7], [64, 96])
    result = measure(head_model(llama, "8,4,2"), make_prompts((5, 9, 3)), sweep, OPTIONS, 1)
    names = ("engine", "tree", "context_length", "capacity")
    runs = {tuple(run[name] for name in names): run for run in result["runs"]}
    ours = [(context, slots) for context in (12, 7) for slots in (64, 96)]
    assert len(runs) == len(result["runs"]) and runs.keys() == {
        *(("hf", None, context, None) for context in (12, 7)),
        *(("vanilla", None, *rest) for rest in ours),
        *(("eagle", tree, *rest) for rest in ours for tree in trees),
    }
    assert all(r["identical"] for r in result["runs"] if r["engine"] == "eagle")
    first = runs["eagle", "8,4,2", 12, 64]
    assert result["tree"] == "8,4,2" and result["temperature"] == 0.0
    assert result["speedup"]["vs_hf"] == {"2": first["vs_hf"]}
    assert result["speedup"]["vs_vanilla"] == {"2": first["vs_best_vanilla"]}
    assert result["divergences"]["2"]["engines"].keys() == {"eagle"}


def test_forced_acceptance_accepts_and_is_not_judged(llama):
    sweep = Sweep(["hf", "vanilla", "eagle"], [1], ["5,4,1"], forced_acceptance=3)  # a chain
    options = {**OPTIONS, "max_new_tokens": 17}
    result = measure(head_model(llama, "5,4,1"), make_prompts((5, 9)), sweep, options, 1)
    _, vanilla, eagle = result["runs"]
    assert eagle["tau"] == 4.0 and eagle["acceptance_by_depth"][:4] == [1.0, 1.0, 1.0, 0.0]
    assert eagle["forced_acceptance"] == 3 and vanilla["forced_acceptance"] is None
    assert result["identical"] == {} and eagle["identical"] is None and eagle["vs_hf"] is not None


class Pretends(EaModel):
    """Knows every option of the engines and decodes eagerly: compiling takes minutes."""

    def prepare(self, compile=None, draft=True):
        parts = {"target": 1.234, "head": 0.5} if draft else {"target": 1.234}
        return parts if compile == "max" else {}

    def generate(self, prompts, tree=None, compile=None, **options):
        return super().generate(prompts, tree=None if tree == "auto" else tree, **options)

    def explain(self):
        return "a chain is best"


def test_all_engines(llama):
    model = Pretends(llama, make_head(llama), "8,4,2")
    result = measure(model, make_prompts((5, 9)), Sweep(ENGINES), OPTIONS, 1)
    assert [run["engine"] for run in result["runs"]] == list(ENGINES)
    trees = {run["engine"]: run["tree"] for run in result["runs"] if run["tree"]}
    assert trees == {"eagle": "8,4,2", "eagle_compiled": "8,4,2", "eagle_auto": "auto"}
    warm = {name: parts for name, parts in result["warm_up_s"].items() if parts}
    assert list(warm) == ["vanilla_compiled", "eagle_compiled", "eagle_auto"]
    assert warm["eagle_auto"] == {"target": 1.23, "head": 0.5}
    assert result["explain"] == {"1": "a chain is best"}
    assert all(result["speedup"][name].keys() == {"1"} for name in SPEEDUP)
    for run in result["runs"][4:]:
        assert run["divergences"].keys() == {"hf", "vanilla", "vanilla_compiled"}
        assert run["identical"] is True
    assert result["identical"] == {"1": True}
    assert list(result["divergences"]["1"]["engines"]) == list(trees)


@pytest.mark.parametrize("wrong", ["eagle_compiled", "hf"])
def test_every_speculative_engine_is_judged_against_every_plain_one(llama, monkeypatch, wrong):
    """One wrong token of one engine is found, named, and makes the verdict false."""
    real = compare.judge_group

    def with_an_error(model, prompts, found, options):
        (run,) = [run for run in found if run.case.engine == wrong]
        run.outputs[1][3] = (run.outputs[1][3] + 1) % 128
        return real(model, prompts, found, options)

    monkeypatch.setattr(compare, "judge_group", with_an_error)
    sweep = Sweep(["hf", "vanilla", "eagle", "eagle_compiled"], [1], ["8,4,2"])
    model = Pretends(llama, make_head(llama), "8,4,2")
    result = measure(model, make_prompts((5, 9)), sweep, OPTIONS, 1)
    assert result["identical"] == {"1": False}
    for run in result["runs"][2:]:
        differs = {other: int(wrong in (run["engine"], other)) for other in ("hf", "vanilla")}
        assert run["divergences"] == {
            other: {"rows": n, "near_ties": 0, "real": n} for other, n in differs.items()
        }
        assert run["identical"] is not any(differs.values())
    both = {"rows": 2, "near_ties": 0, "real": 2}
    assert {k: result["divergences"]["1"][k] for k in both} == both


def test_the_command_is_what_to_type_and_tells_no_private_path(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    asked = dict(trees="8,4,2;16,4,4", base="/home/someone/model", prompts="data/p.jsonl")
    asked |= dict(head="../x/head", temperature=0.8, json="out.json", adapter="org/name")
    assert command_line("", bench, asked) == (
        "OMP_NUM_THREADS=2 python -m inference.bench --base model --head head --adapter org/name "
        "--prompts data/p.jsonl --trees '8,4,2;16,4,4' --temperature 0.8"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert command_line("slots", bench, {}) == "python -m inference.bench slots"
