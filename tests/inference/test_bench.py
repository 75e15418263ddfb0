"""The benchmark as a command: its JSON, its files, its equality verdict, and how it refuses."""

import json

import pytest
from engine_helpers import head_model, make_head, make_prompts

from eagle.model import EaModel
from inference import near_tie
from inference.bench.cases import ENGINES, Sweep
from inference.bench.engines import (
    FLAGS,
    bench,
    command_line,
    measure,
    parse_engines,
    parse_numbers,
    parse_trees,
)

# what others read
FIELDS = set(
    "device threads dtype versions environment model tree num_prompts repeats max_new_tokens temperature runs "
    "speedup efficiency efficiency_best identical divergences warm_up_s notes explain command".split()
)
RUN = set(
    "engine batch_size tree context_length capacity temperature forced_acceptance new_tokens seconds "
    "tokens_per_second tau acceptance_by_depth cycle_ms draft_ms verify_ms commit_ms prefill_ms peak_memory_mb "
    "looping vs_hf vs_hf_ci95 vs_best_vanilla vs_best_vanilla_ci95 identical divergences".split()
)
SPEEDUP = {"vs_hf", "vs_vanilla", "vs_vanilla_compiled", "best_vs_hf", "best_vs_best_vanilla"}
OPTIONS = dict(max_new_tokens=8, top_p=0.0, top_k=0, seed=0)


@pytest.fixture
def base(model_folder, head_folder):
    return ["--base", model_folder, "--head", head_folder, "--device", "cpu"]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": 80 + i, "category": "x", "turns": [f"def f{i}():" * (i + 1), "And?"]}
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_json_of_a_whole_run(command, base, prompt_file, tmp_path):
    out, page, plots = tmp_path / "deep" / "bench.json", tmp_path / "bench.md", tmp_path / "plots"
    result = command(
        "inference.bench",
        *base,
        "--dtype",
        "float32",
        "--prompts",
        prompt_file,
        "--batch_sizes",
        "1,2",
        "--engines",
        "eagle,hf,vanilla,hf_prompt_lookup",
        "--tree",
        "8,4,2",
        "--max_new_tokens",
        10,
        "--num_prompts",
        3,
        "--repeats",
        2,
        "--json",
        out,
        "--report",
        page,
        "--plots",
        plots,
    )
    assert result.returncode == 0, result.stderr
    assert "batches," in result.stderr and "s left" in result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == last
    assert FIELDS <= last.keys() and last["dtype"] == "float32" and last["tree"] == "8,4,2"
    runs = {(r["engine"], r["batch_size"]): r for r in last["runs"]}
    assert runs.keys() == {(e, s) for e in ("hf", "vanilla", "eagle") for s in (1, 2)} | {
        ("hf_prompt_lookup", 1)
    }
    assert "hf_prompt_lookup" in last["notes"][0]
    for (engine, size), run in runs.items():
        assert RUN <= run.keys()
        assert run["new_tokens"] == runs["hf", 1]["new_tokens"] and run["seconds"] > 0
        assert run["tokens_per_second"] == pytest.approx(
            run["new_tokens"] / run["seconds"], rel=0.01
        )
        assert run["tree"] == ("8,4,2" if engine == "eagle" else None)
        assert sum(run["batch_tokens"]) == run["new_tokens"]
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
        for size in (1, 2):
            ours, theirs = runs["eagle", size], runs[other, size]
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            assert last["speedup"][name][str(size)] == pytest.approx(ratio, rel=0.01)
    for size, value in last["efficiency"].items():
        expected = last["speedup"]["vs_vanilla"][size] / runs["eagle", int(size)]["tau"]
        assert value == pytest.approx(expected, rel=0.01)
        assert value == last["efficiency_best"][size]  # the only one of each kind is the best one
    low, high = runs["eagle", 1]["vs_hf_ci95"]
    assert low <= runs["eagle", 1]["vs_hf"] <= high
    # what was typed, and nothing about whose machine it is
    assert "--batch_sizes 1,2" in last["command"] and "question.jsonl" in last["command"]
    assert str(tmp_path) not in result.stdout and "--json" not in last["command"]
    assert last["command"] in page.read_text() and "| eagle |" in page.read_text()
    assert str(tmp_path) not in page.read_text()
    assert {p.stem for p in plots.iterdir()} == {
        "acceptance_by_depth",
        "cycle_breakdown",
        "speedup_by_batch",
    }
    assert not list(tmp_path.rglob("*.part"))


def test_sampled_and_fewer_engines(in_process, base, prompt_file):
    code, out, err = in_process(
        bench,
        *base,
        "--dtype",
        "float32",
        "--prompts",
        prompt_file,
        "--temperature",
        "0.8",
        "--engines",
        "hf,vanilla,eagle",
        "--max_new_tokens",
        8,
        "--num_prompts",
        2,
        "--repeats",
        1,
        "--quiet",
    )
    assert code == 0 and err == ""
    last = json.loads(out)
    assert last["identical"] == {"1": True} and last["temperature"] == 0.8
    # stock generate draws other random numbers
    assert last["runs"][-1]["divergences"].keys() == {"vanilla"}


def test_plain_engines_need_no_head(in_process, model_folder, prompt_file):
    code, out, _ = in_process(
        bench,
        "--base",
        model_folder,
        "--device",
        "cpu",
        "--prompts",
        prompt_file,
        "--engines",
        "hf,vanilla",
        "--max_new_tokens",
        4,
        "--repeats",
        1,
        "--quiet",
    )
    last = json.loads(out)
    assert code == 0 and last["identical"] == {} and last["tree"] is None


def test_a_sweep_keeps_the_headline_about_its_first_combination(llama):
    sweep = Sweep(
        ["hf", "vanilla", "eagle"], [2], ["8,4,2", "4,2,1"], [12, 7], [64, 96], [0.0, 0.8]
    )
    model = head_model(llama, "8,4,2")
    result = measure(model, make_prompts((5, 9, 3)), sweep, OPTIONS, 1, True)
    settings = {
        (r["engine"], r["tree"], r["context_length"], r["capacity"], r["temperature"])
        for r in result["runs"]
    }
    own = {(context, temperature) for context in (12, 7) for temperature in (0.0, 0.8)}
    assert settings == {
        *(("hf", None, c, None, t) for c, t in own),
        *(("vanilla", None, c, slots, t) for c, t in own for slots in (64, 96)),
        *(
            ("eagle", tree, c, slots, t)
            for c, t in own
            for slots in (64, 96)
            for tree in ("8,4,2", "4,2,1")
        ),
    }
    assert len(settings) == len(result["runs"])
    assert all(r["identical"] for r in result["runs"] if r["engine"] == "eagle")
    (first,) = [
        r
        for r in result["runs"]
        if (r["engine"], r["tree"], r["context_length"], r["capacity"], r["temperature"])
        == ("eagle", "8,4,2", 12, 64, 0.0)
    ]
    assert result["tree"] == "8,4,2" and result["temperature"] == 0.0
    assert result["speedup"]["vs_hf"] == {"2": first["vs_hf"]}
    assert result["speedup"]["vs_vanilla"] == {"2": first["vs_best_vanilla"]}
    assert result["divergences"]["2"]["engines"].keys() == {"eagle"}


def test_forced_acceptance_accepts_and_is_not_judged(llama):
    sweep = Sweep(["hf", "vanilla", "eagle"], [1], ["5,4,1"], forced_acceptance=3)  # a chain
    result = measure(
        head_model(llama, "5,4,1"),
        make_prompts((5, 9)),
        sweep,
        {**OPTIONS, "max_new_tokens": 17},
        1,
        True,
    )
    hf, vanilla, eagle = result["runs"]
    assert eagle["tau"] == 4.0 and eagle["acceptance_by_depth"][:4] == [1.0, 1.0, 1.0, 0.0]
    assert eagle["forced_acceptance"] == 3 and vanilla["forced_acceptance"] is None
    assert result["identical"] == {} and eagle["identical"] is None and eagle["vs_hf"] is not None


class Pretends(EaModel):
    """Knows every option of the engines and decodes eagerly, whatever is asked: compiling takes
    minutes.
    """

    def prepare(self, compile=None, draft=True):
        return {"target": 1.234, "head": 0.5} if draft else {"target": 1.234}

    def _compile(self, mode, drafter):
        return super()._compile("off", drafter)

    def generate(self, prompts, tree=None, **options):
        return super().generate(prompts, tree=None if tree == "auto" else tree, **options)

    def explain(self):
        return "a chain is best"


def test_all_engines(llama):
    model = Pretends(llama, make_head(llama), "8,4,2")
    result = measure(model, make_prompts((5, 9)), Sweep(ENGINES), OPTIONS, 1, True)
    assert [run["engine"] for run in result["runs"]] == list(ENGINES)
    trees = {run["engine"]: run["tree"] for run in result["runs"]}
    assert trees == {
        **dict.fromkeys(ENGINES),
        "eagle": "8,4,2",
        "eagle_compiled": "8,4,2",
        "eagle_auto": "auto",
    }
    both = {"target": 1.23, "head": 0.5}
    assert result["warm_up_s"] == {
        **{engine: {} for engine in ENGINES},
        "vanilla_compiled": {"target": 1.23},
        "eagle_compiled": both,
        "eagle_auto": both,
    }
    assert result["explain"] == {"1": "a chain is best"}
    assert all(result["speedup"][name].keys() == {"1"} for name in SPEEDUP)
    for run in result["runs"]:
        if run["engine"].startswith("eagle"):
            assert run["divergences"].keys() == {"hf", "vanilla", "vanilla_compiled"}
            assert run["identical"] is True
    assert result["identical"] == {"1": True}
    drafting = ("eagle", "eagle_compiled", "eagle_auto")
    assert tuple(result["divergences"]["1"]["engines"]) == drafting


@pytest.mark.parametrize("wrong", ["eagle", "eagle_compiled", "hf", "vanilla"])
def test_every_speculative_engine_is_judged_against_every_plain_one(llama, monkeypatch, wrong):
    """One wrong token of one engine is found, named, and makes the verdict false."""
    real = near_tie.judge_group

    def with_an_error(model, prompts, found, options):
        (run,) = [run for run in found if run.case.engine == wrong]
        run.outputs[1][3] = (run.outputs[1][3] + 1) % 128
        return real(model, prompts, found, options)

    monkeypatch.setattr(near_tie, "judge_group", with_an_error)
    sweep = Sweep(["hf", "vanilla", "eagle", "eagle_compiled"], [1], ["8,4,2"])
    model = Pretends(llama, make_head(llama), "8,4,2")
    result = measure(model, make_prompts((5, 9)), sweep, OPTIONS, 1, True)
    assert result["identical"] == {"1": False}
    for run in result["runs"][2:]:
        differs = {
            other: int(wrong in (run["engine"], other)) for other in ("hf", "vanilla")
        }  # by engine, by baseline
        assert run["divergences"] == {
            other: {"rows": n, "near_ties": 0, "real": n} for other, n in differs.items()
        }
        assert run["identical"] is not any(differs.values())
    both = {"rows": 2, "near_ties": 0, "real": 2}
    assert {k: result["divergences"]["1"][k] for k in both} == both
    assert set(result["divergences"]["1"]["engines"]) == {"eagle", "eagle_compiled"}


def test_pairs_of_one_capacity_are_compared_with_the_noise_of_both_modes(llama, monkeypatch):
    asked = []

    def spy(judge, prompts, ours, theirs, modes):
        asked.append(modes)
        return {"rows": 0, "near_ties": 0, "real": 0}

    monkeypatch.setattr(near_tie.Judge, "compare", spy)
    engines = ["hf", "vanilla_compiled", "eagle", "eagle_compiled"]
    sweep = Sweep(engines, [1], ["8,4,2"], capacities=[64, 96])
    measure(Pretends(llama, make_head(llama), "8,4,2"), make_prompts((5,)), sweep, OPTIONS, 1, True)
    # by hf and by vanilla_compiled of the same capacity: eagle twice, then eagle_compiled twice
    assert asked == [{"off"}, {"off", "max"}] * 2 + [{"off", "max"}, {"max"}] * 2


def test_the_command_is_what_to_type_and_tells_no_private_path(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    asked = dict(
        FLAGS,
        trees="8,4,2;16,4,4",
        base="/home/someone/model",
        prompts="data/p.jsonl",
        head="../x/head",
        temperature=0.8,
        json="out.json",
        quiet=True,
        adapter="org/name",
    )
    assert command_line(asked) == (
        "OMP_NUM_THREADS=2 python -m inference.bench --base model --head head --adapter org/name "
        "--prompts data/p.jsonl --trees '8,4,2;16,4,4' --temperature 0.8"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert command_line(dict(FLAGS)) == "python -m inference.bench"


def test_lists():
    assert parse_numbers("batch_sizes", "1,4") == [1, 4] == parse_numbers("x", "(1, 4)")
    assert parse_numbers("x", "3") == [3] and parse_numbers("x", "2,2,1") == [2, 1]
    assert parse_numbers("temperatures", "0,0.8", float) == [0.0, 0.8]
    assert parse_numbers("x", None) == [] == parse_trees(None)
    assert parse_trees("8,4,2; 16,4,4;8,4,2") == ["8,4,2", "16,4,4"]
    assert parse_engines(None) == list(ENGINES)
    # whoever names a tree does not want one that is chosen for them, unless they say so
    assert parse_engines(None, own_tree=False) == [e for e in ENGINES if e != "eagle_auto"]
    assert parse_engines("eagle_auto,hf", own_tree=False) == ["hf", "eagle_auto"]


BAD = {
    "missing prompts": ["--prompts", "/no/such/file"],
    "engine": ["--engines", "hf,turbo"],
    "no engine": ["--engines", ""],
    "sizes": ["--batch_sizes", "1,x"],
    "size zero": ["--batch_sizes", "0"],
    "repeats": ["--repeats", "0"],
    "num_prompts": ["--num_prompts", "0"],
    "temperature": ["--temperature", "-1"],
    "temperatures": ["--temperatures", "0,-1"],
    "temperature twice": ["--temperature", "0.5", "--temperatures", "0,0.8"],
    "tree": ["--tree", "a"],
    "trees": ["--trees", "8,4,2;a"],
    "tree twice": ["--tree", "8,4,2", "--trees", "8,4,2;16,4,4"],
    "capacities": ["--capacities", "0"],
    "context lengths": ["--context_lengths", "many"],
    "context too long": ["--context_lengths", "16,255"],
    "forced acceptance": ["--forced_acceptance", "-1"],
    "nothing to measure": ["--engines", "hf_prompt_lookup", "--batch_sizes", "2"],
    "auto and forced": ["--engines", "eagle_auto", "--forced_acceptance", "2"],
    "unknown flag": ["--batch_size", "1"],
    "json is a folder": ["--json", "/"],
    "report is a folder": ["--report", "/"],
    "plots is a file": ["--plots", __file__],
    "too long": [],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(in_process, base, prompt_file, tmp_path, name):
    if name == "too long":
        prompt_file.write_text(json.dumps({"prompt": "word " * 400}) + "\n")
    arguments = [] if name == "missing prompts" else ["--prompts", prompt_file]
    code, out, err = in_process(
        bench,
        *base,
        *arguments,
        "--max_new_tokens",
        4,
        "--repeats",
        1,
        "--engines",
        "hf,vanilla,eagle",
        *BAD[name],
        "--quiet",
    )
    assert code != 0 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_without_matplotlib_plots_are_refused_before_the_work(
    in_process, base, monkeypatch, tmp_path
):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    code, out, err = in_process(bench, *base, "--plots", tmp_path / "plots")
    assert code != 0 and out == "" and "eagle-heads[plots]" in err
