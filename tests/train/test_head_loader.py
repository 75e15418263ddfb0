"""Which rows a step holds, how they are cut, and that reading ahead changes nothing."""

import itertools

import pytest
import torch
from head_helpers import losses_of, require_same_tensors, rows_of, trained

from configs.schema import DataConfig, TrainConfig
from records import load_dataset_for
from train.head.loader import Steps, cut_step, read_ahead, row_order


def test_an_epoch_is_a_permutation():
    epochs = row_order(11, 3, 0, 22)
    assert sorted(row for _, row in epochs[:11]) == list(range(11))
    assert [row for _, row in epochs[:11]] != [row for _, row in epochs[11:]]
    assert row_order(11, 3, 7, 9) == epochs[7:16] and row_order(11, 4, 0, 22) != epochs


LENGTHS = [24, 64, 8, 8, 40, 16, 64, 56, 8, 32, 8, 48]


@pytest.mark.parametrize("world, accum", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("limit", [None, 64, 100, 128, 10_000])
def test_every_cut_holds_each_row_once(world, accum, limit):
    parts = cut_step(LENGTHS, world, batch_size=3, max_tokens=limit)
    assert sorted(itertools.chain(*parts)) == list(range(12))
    assert len(parts) % world == 0 and all(parts)
    widths = [max(LENGTHS[n] for n in part) for part in parts]
    assert widths == sorted(widths, reverse=True)  # what needs most memory comes first
    if limit is None:
        assert [len(part) for part in parts] == [3] * 4
    else:
        assert all(w * len(p) <= limit for w, p in zip(widths, parts, strict=True))


@pytest.fixture
def rows(tmp_path, base, data):
    from records import load_tokenizer

    cfg = DataConfig(path=str(data), max_length=96, cache_dir=str(data.parent / "cache"))
    return load_dataset_for(cfg, load_tokenizer(str(base)))


def steps_of(rows, rank=0, world=1, **more):
    cfg = TrainConfig(**{"batch_size": 3, "grad_accum": 2, "seed": 5, **more})
    return Steps(rows, cfg, 0, rank, world)


def contents(batches):
    """What a model would be given, row by row."""
    return [
        (b.input_ids[n][b.attention_mask[n]].tolist(), b.loss_mask[n].sum().item(), place)
        for b in batches
        for n, place in enumerate(b.places)
    ]


def test_a_step_has_the_same_rows_however_it_is_split(rows):
    def at(start, ranks, **more):
        found = [contents(steps_of(rows, r, ranks, **more)[start]) for r in range(ranks)]
        return sorted(itertools.chain(*found), key=lambda row: row[2])

    expected = at(70, 1, batch_size=3, grad_accum=4)  # over the end of an epoch
    assert len({epoch for _, _, (epoch, _) in expected}) == 2
    assert at(70, 2, batch_size=3, grad_accum=2) == expected
    assert at(70, 1, batch_size=1, grad_accum=12, max_tokens_per_batch=96) == expected
    assert at(70, 2, batch_size=2, grad_accum=3, max_tokens_per_batch=200) == expected


def test_reading_ahead_gives_the_same_steps(rows):
    steps, state = steps_of(rows), torch.get_rng_state()
    ahead = read_ahead(steps_of(rows), 66, torch.device("cpu"))
    for start in range(66, 66 + 5 * steps.rows, steps.rows):
        assert contents(next(ahead)) == contents(steps[start])
    assert torch.equal(state, torch.get_rng_state())  # else a resumed run would differ


def test_a_run_with_a_token_budget_learns_the_same(base, data, tmp_path):
    more = {"batch_size": 8, "lr": 1e-4, "save_every": 2, "save_total_limit": 9}
    plain = trained(base, data, tmp_path / "plain", **more)
    more |= {"max_tokens_per_batch": 130}
    budget = trained(base, data, tmp_path / "budget", **more)
    assert losses_of(plain) == pytest.approx(losses_of(budget), rel=1e-5)
    norms = [[r["grad_norm"] for r in rows_of(x)] for x in (plain, budget)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    more["resume"] = str(budget / "checkpoints/step-2")
    again = trained(base, data, tmp_path / "again", **more)
    require_same_tensors(budget / "head/model.safetensors", again / "head/model.safetensors")
