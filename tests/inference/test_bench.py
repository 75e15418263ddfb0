"""The benchmark: its JSON, its equality verdict, and how it refuses."""

import json

import pytest
import torch
from engine_helpers import (
    ScriptedDrafter,
    head_model,
    make_head,
    make_model,
    make_prompts,
    make_target,
    plain,
)

from eagle.decode import Row
from eagle.model import EaModel
from eagle.target import Target
from inference.bench import (
    Run,
    bench,
    compare,
    looping_share,
    measure,
    near_tie,
    parse_sizes,
    replay,
)

FIELDS = {
    "device",
    "dtype",
    "versions",
    "model",
    "tree",
    "runs",
    "speedup",
    "efficiency",
    "identical",
}
RUN = {
    "engine",
    "batch_size",
    "new_tokens",
    "seconds",
    "tokens_per_second",
    "tau",
    "acceptance_by_depth",
    "cycle_ms",
    "draft_ms",
    "verify_ms",
    "commit_ms",
}


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
    out = tmp_path / "deep" / "bench.json"
    result = command(
        "inference.bench",
        *base,
        "--dtype",
        "float32",
        "--prompts",
        prompt_file,
        "--batch_sizes",
        "1,2",
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
    )
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == last
    assert FIELDS <= last.keys() and last["dtype"] == "float32" and last["tree"] == "8,4,2"
    assert {"python", "torch", "transformers"} <= last["versions"].keys()
    runs = {(r["engine"], r["batch_size"]): r for r in last["runs"]}
    assert runs.keys() == {(e, s) for e in ("hf", "vanilla", "eagle") for s in (1, 2)}
    for (engine, _), run in runs.items():
        assert RUN <= run.keys()
        assert run["new_tokens"] == runs["hf", 1]["new_tokens"] and run["seconds"] > 0
        assert run["tokens_per_second"] == pytest.approx(
            run["new_tokens"] / run["seconds"], rel=0.01
        )
        if engine == "hf":
            assert run["tau"] is None and run["cycle_ms"] is None
        else:
            parts = run["draft_ms"] + run["verify_ms"] + run["commit_ms"]
            assert run["cycle_ms"] == pytest.approx(parts, abs=0.01)
    assert runs["vanilla", 1]["tau"] == 1.0 and runs["eagle", 1]["tau"] >= 1.0
    assert last["identical"] == {"1": True, "2": True}
    for other in ("hf", "vanilla"):
        for size in (1, 2):
            ratio = (
                runs["eagle", size]["tokens_per_second"] / runs[other, size]["tokens_per_second"]
            )
            assert last["speedup"][f"vs_{other}"][str(size)] == pytest.approx(ratio, rel=0.01)
    for size, value in last["efficiency"].items():
        assert value == pytest.approx(
            last["speedup"]["vs_vanilla"][size] / runs["eagle", int(size)]["tau"], rel=0.01
        )


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
        "vanilla,eagle",
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
    assert (
        last["identical"] == {"1": True}
        and last["speedup"]["vs_hf"] == {}
        and last["temperature"] == 0.8
    )


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


def test_engines_stop_and_count_alike():
    """With an end token in the texts the three engines count the same tokens, the end token included."""
    target = make_target("llama")
    prompts = make_prompts((5, 8, 3))
    eos = plain(target, prompts, max_new_tokens=12)[1][6]
    target.model.generation_config.eos_token_id = eos
    options = dict(max_new_tokens=12, temperature=0.0, top_p=0.0, top_k=0, seed=0)
    result = measure(
        head_model(target), prompts, [1, 3], ["hf", "vanilla", "eagle"], options, 1, True
    )
    assert len({r["new_tokens"] for r in result["runs"]}) == 1
    assert result["runs"][0]["new_tokens"] < 36 and result["identical"] == {"1": True, "3": True}


@pytest.mark.parametrize(
    "tokens, loops",
    [
        ([7] * 24, True),
        ([7] * 23, False),
        (list(range(50)), False),
        (list(range(30)) + [1, 2, 3] * 8, True),
        (list(range(30)) + [1, 2, 3] * 7, False),
        (list(range(24)) * 3, True),
        (list(range(25)) * 4, False),
        (list(range(20)) * 2, False),
        ([5] * 40 + list(range(10)), False),
        ([], False),
    ],
)
def test_looping(tokens, loops):
    assert looping_share([tokens]) == float(loops)


def test_looping_share_is_a_share():
    assert (
        looping_share([[1] * 30, list(range(30)), [2] * 30, []]) == 0.5 and looping_share([]) == 0.0
    )


def test_sizes():
    assert (
        parse_sizes("1,4") == [1, 4] and parse_sizes("(1, 4)") == [1, 4] and parse_sizes("3") == [3]
    )


@pytest.fixture(scope="module")
def half():
    """A bf16 model whose rows 10 and 11 of the output matrix are equal: a perfect tie."""
    model = make_model(make_target("llama").config, seed=1).to(torch.bfloat16)
    weight = model.get_output_embeddings().weight.data
    weight[11] = weight[10]
    return Target(model, name="half")


def logits_after(target, prefix):
    with target.stock() as model, torch.no_grad():
        return model(input_ids=torch.tensor([prefix])).logits[0, -1].float()


def prefix_with_top(target, token):
    """A prefix after which `token` is the likeliest."""
    for seed in range(2000):
        (prefix,) = make_prompts((6,), seed=seed)
        if logits_after(target, prefix).argmax() == token:
            return prefix
    raise AssertionError("no such prefix")


GREEDY = dict(temperature=0.0, top_p=0.0, top_k=0, seed=0)
SAMPLED = dict(temperature=1.0, top_p=0.0, top_k=0, seed=0)


def test_near_ties_are_judged_by_replay(half):
    model = EaModel(half, make_head(half).to(torch.bfloat16), "8,4,2")
    prefix = prefix_with_top(half, 10)
    order = logits_after(half, prefix).argsort(descending=True).tolist()
    # two equal tokens far behind the best
    low = next(
        p
        for p in (make_prompts((6,), seed=s)[0] for s in range(2000))
        if logits_after(half, p)[10] < logits_after(half, p).max() - 3
    )
    with torch.inference_mode():
        assert near_tie(model, prefix, [], 10, 11, GREEDY, 0) and near_tie(
            model, prefix, [], 11, 10, GREEDY, 0
        )
        assert not near_tie(model, prefix, [], 10, order[-1], GREEDY, 0)
        assert not near_tie(model, prefix, [], order[20], 10, GREEDY, 0)
        assert not near_tie(model, low, [], 10, 11, GREEDY, 0)
        # one token of context is enough to judge
        assert near_tie(model, prefix[:1], [], 10, order[-1], GREEDY, 0) in (True, False)
        # with noise the equal logits are no tie any more
        assert not any(near_tie(model, prefix, [], 10, 11, SAMPLED, seed) for seed in range(5))


def test_replay_in_any_chunks_is_the_same_in_fp32(llama):
    prefix = make_prompts((17,))[0]
    whole = replay(llama, prefix, len(prefix), 1, 1)
    for start, chunk, rows in ((3, 1, 1), (5, 4, 2), (1, 16, 3)):
        assert torch.allclose(replay(llama, prefix, start, chunk, rows), whole, atol=1e-4)


def outcome(model, prompts, ours, theirs, options=GREEDY):
    with torch.inference_mode():
        return compare(
            model, prompts, Run("eagle", 1, outputs=ours), [Run("hf", 1, outputs=theirs)], options
        )


def test_verdicts(half, llama):
    model = EaModel(half, make_head(half).to(torch.bfloat16), "8,4,2")
    prefix = prefix_with_top(half, 10)
    worst = int(logits_after(half, prefix).argmin())

    def verdict(rows, near, real):
        return {"identical": real == 0, "rows": rows, "near_ties": near, "real": real}

    assert outcome(model, [prefix], [[10, 5]], [[10, 5]]) == verdict(0, 0, 0)
    assert outcome(model, [prefix], [[10, 5]], [[11, 9]]) == verdict(1, 1, 0)
    assert outcome(model, [prefix], [[10, 5]], [[worst, 5]]) == verdict(1, 0, 1)
    # a missing tail is no tie, nor is another sample
    assert not outcome(model, [prefix], [[10, 5]], [[10]])["identical"]
    assert not outcome(model, [prefix], [[10, 5]], [[11, 5]], SAMPLED)["identical"]
    # in fp32 nothing is forgiven
    assert not outcome(head_model(llama), [prefix], [[10]], [[11]])["identical"]


def test_tau_and_rates_of_a_perfect_drafter(llama):
    prompts = make_prompts((5, 9))
    answers = plain(llama, prompts, max_new_tokens=19)
    result = EaModel(llama, drafter=ScriptedDrafter(answers, True, "16,4,4")).generate(
        prompts, max_new_tokens=19
    )
    run = Run("eagle", 2, new_tokens=38, seconds=2.0, outputs=answers, rows=result.rows, cycles=3)
    row = run.to_json()
    assert (
        row["tau"] == 6.0
        and row["acceptance_by_depth"] == [1.0] * 5
        and row["tokens_per_second"] == 19.0
    )
    assert (
        Run("eagle", 1, 1, 1.0, [[1]], [Row([1], 1)]).to_json()["tau"] == 0.0
    )  # no cycle was needed


BAD = {
    "missing prompts": ["--prompts", "/no/such/file"],
    "engine": ["--engines", "hf,turbo"],
    "no engine": ["--engines", ""],
    "sizes": ["--batch_sizes", "1,x"],
    "size zero": ["--batch_sizes", "0"],
    "repeats": ["--repeats", "0"],
    "num_prompts": ["--num_prompts", "0"],
    "temperature": ["--temperature", "-1"],
    "tree": ["--tree", "a"],
    "unknown flag": ["--batch_size", "1"],
    "json is a folder": ["--json", "/"],
    "too long": [],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(in_process, base, prompt_file, tmp_path, name):
    if name == "too long":
        prompt_file.write_text(json.dumps({"prompt": "word " * 400}) + "\n")
    arguments = [] if name == "missing prompts" else ["--prompts", prompt_file]
    code, out, err = in_process(
        bench, *base, *arguments, "--max_new_tokens", 4, "--repeats", 1, *BAD[name]
    )
    assert code != 0 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert len(err.splitlines()) == 1
