"""Whole generations whose attention, commits and choices are the Triton kernels'."""

from engine_helpers import head_model, make_prompts, make_target, plain

import kernels.triton_choose
import kernels.triton_commit_kv
import kernels.triton_tree_attention


def test_rows_that_finish_one_after_the_other(monkeypatch):
    """The remaining rows, greedy and sampled ones, still go through the kernel, out of order in their
    cache."""
    calls = {"rows": 0, "all": 0}
    for module, name in (
        (kernels.triton_tree_attention, "tree_attention_triton"),
        (kernels.triton_choose, "choose_triton"),
        (kernels.triton_commit_kv, "commit_kv_triton"),
    ):
        calls[name], function = 0, getattr(module, name)

        def counted(*args, name=name, function=function, **options):
            calls[name] += 1
            if "rows" in options:
                calls["all" if options["rows"] is None else "rows"] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)
    target = make_target("llama")
    model = head_model(target, "6,2,2", draft_vocab=128)
    prompts = make_prompts((5, 9, 3))
    budgets, temperatures = (3, 1, 2), (0.9, 0.0, 0.0)
    rows = model.generate_many(
        [
            {"input_ids": p, "max_new_tokens": n, "temperature": t}
            for p, n, t in zip(prompts, budgets, temperatures, strict=True)
        ],
        slots=2,
        seed=3,
    )
    monkeypatch.setenv("EAGLE_TRITON", "0")
    options = {"max_new_tokens": 3, "seed": 3}
    expected = {t: plain(target, prompts, temperature=t, **options) for t in temperatures}
    expected = [expected[t][row][: budgets[row]] for row, t in enumerate(temperatures)]
    assert [r.tokens for r in rows] == expected
    assert all(calls.values())
