"""EAGLE-1 heads are trained: teacher-forced features with noise, smooth L1 on features, and the
tokens' loss."""

import json

import pytest
import torch
import torch.nn.functional as F
from head_helpers import config, losses_of, require_same_tensors, rows_of, tiny_head, trained
from safetensors.torch import load_file

from configs.schema import HeadTrainConfig, LossConfig
from eagle.checkpoint import load_head, save_head
from eagle.errors import EagleError
from eagle.heads.head import FINAL, HeadConfig, make_head
from eagle.target import Target
from kernels.draft_loss import position_loss
from train.head.setup import output_rows
from train.head.teacher import feature_noise, objective_of, with_noise
from train.head.ttt import UnrolledHead, plan_unroll
from train.main import run
from train.prepare.features import write_features

H, V = 32, 60
ONE = {"method": "eagle1", "draft_vocab_size": None}


class Known:
    """A teacher of given final states and LM head."""

    def __init__(self, hidden, output):
        self.hidden, self.logits = hidden, hidden @ output.T

    def __call__(self, start, stop):
        return self.logits[start:stop], self.logits[start:stop].argmax(-1)


@pytest.mark.parametrize("parts", [(0.5, 2.0), (0.0, 1.0), (None, None)])
def test_loss_is_smooth_l1_on_features_and_the_loss_on_tokens(parts):
    torch.manual_seed(0)
    steps, T = 2, 9
    head = tiny_head(method="eagle1", draft=V)
    output = torch.randn(V, H)
    cfg = LossConfig(feature_weight=parts[0], token_weight=parts[1])
    module = UnrolledHead(head, steps, 0.8, cfg, amp=False, output=output)
    mask = torch.zeros(1, T, dtype=torch.bool)
    mask[0, 3:8] = True
    plan = plan_unroll(mask, steps)
    states, embeds = 2 * torch.randn(T, H), torch.randn(T, H)
    teacher = Known(states[plan.sources], output)
    total, sums = module(states, embeds, plan, teacher, plan.counts)

    expected = 0.0
    on_feature, on_token = (1.0, 0.1) if parts[0] is None else parts
    for i, hidden in enumerate(module.unroll(states, embeds, plan)):
        for u, token in enumerate(range(3, 8)):
            t = token - 2 - i
            if t < 0:
                continue
            predicted = hidden[((plan.positions == t) & (plan.chain_rows == 0)).nonzero().item()]
            apart = F.smooth_l1_loss(predicted, states[t + 1 + i])
            loss, _ = position_loss(teacher.logits[u], predicted @ output.T, objective_of(cfg))
            one = on_feature * apart + on_token * loss
            expected = expected + 0.8**i * one / plan.counts[i]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    reported = (sums[0, :, 0] * torch.tensor([1.0, 0.8]) / plan.counts).sum()
    torch.testing.assert_close(reported, total.detach(), rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected, list(head.parameters()))
    found = torch.autograd.grad(total, list(head.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not any(p is output for p in module.parameters())


def test_noise_is_uniform_and_scaled_by_length():
    torch.manual_seed(0)
    mask = torch.arange(64) < torch.tensor([64, 32])[:, None]
    features = torch.zeros(96, 100)
    noise = with_noise(features, mask, 0.1)
    for row, length in zip(noise.split([64, 32]), (64, 32), strict=True):
        limit = 0.1 * 512 / length
        assert limit * 0.98 < row.abs().max() <= limit
        assert row.std() == pytest.approx(limit / 3**0.5, rel=0.03) and abs(row.mean()) < 0.06
    assert with_noise(features, mask, 0.0) is features
    plain = HeadTrainConfig.model_validate({})
    assert feature_noise(plain, "eagle1") == 0.1 and feature_noise(plain, "eagle3") == 0.0


RUN = dict(max_steps=40, save_every=20, lr=3e-3, ttt_steps=2, model=ONE)
RUN |= dict(loss={"token_weight": 1.0}, eval={"num_prompts": 3})


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """40 steps with noise, a checkpoint in the middle."""
    return trained(base, data, tmp_path_factory.mktemp("runs") / "eagle1", **RUN)


def test_an_eagle1_run_learns(whole, base):
    losses = losses_of(whole)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    overlaps = [row["overlap_by_depth"][0] for row in rows_of(whole)]
    assert sum(overlaps[-5:]) > sum(overlaps[:5])
    target = Target.from_pretrained(base, dtype="float32")
    head, provenance = load_head(whole / "head", target)
    assert head.config.method == "eagle1" and head.config.feature_layers == (FINAL,)
    assert provenance["training"]["step"] == 40
    keys = load_file(whole / "head/model.safetensors").keys()
    assert "lm_head.weight" not in keys and "layers.0.self_attn.q_proj.weight" in keys
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tau_after"] >= 1.0


def test_a_resumed_eagle1_run_is_the_same_run(whole, base, data, tmp_path):
    """The noise goes on where it was."""
    resumed = {**RUN, "resume": str(whole / "checkpoints/step-20")}
    again = trained(base, data, tmp_path / "again", **resumed)
    assert losses_of(again) == losses_of(whole)[20:]
    require_same_tensors(whole / "head/model.safetensors", again / "head/model.safetensors")


def test_zero_stages_train_alike(base, data, tmp_path):
    more = {"max_steps": 3, "feature_noise": 0.0, "model": ONE}
    runs = (trained(base, data, tmp_path / f"zero{n}", zero=n, **more) for n in (0, 3))
    first, last = map(losses_of, runs)
    assert first == pytest.approx(last, rel=1e-4) and first[-1] > 0


def test_an_embedding_of_its_own_is_used_and_not_trained(base, data, tmp_path):
    target = Target.from_pretrained(base, dtype="float32")
    torch.manual_seed(0)
    own = dict(hidden_size=24, own_embedding=True, draft_vocab_size=128)
    start = make_head(HeadConfig.for_target(target.config, **own))
    start.set_draft_vocab(torch.arange(128))
    save_head(start, tmp_path / "start")
    how = dict(max_steps=2, optimizer="muon", save_every=1)
    how["model"] = {"init_head": str(tmp_path / "start")}
    head, _ = load_head(trained(base, data, tmp_path / "run", **how) / "head", target)
    assert torch.equal(head.embed_tokens.weight, start.embed_tokens.weight)
    assert not torch.equal(head.fc.weight, start.fc.weight)
    trained(base, data, tmp_path / "run", resume="auto", **how)


def test_what_does_not_fit_eagle1_is_refused(base, data, tmp_path, whole):
    model = {"init_head": str(whole / "head")}
    cfg = config(base, data, tmp_path / "run", model=model | {"draft_vocab_size": None})
    with pytest.raises(EagleError, match="model.method=eagle3 contradicts .* has eagle1; set that"):
        run(cfg, quiet=True)
    cfg = config(base, data, tmp_path, model=model)
    with pytest.raises(EagleError, match="leave this step out"):
        write_features(cfg, tmp_path / "features", "again")


def test_the_lm_head_is_one_matrix(llama, monkeypatch):
    hidden = torch.randn(3, 32)
    with monkeypatch.context() as patch:
        patch.setattr(llama.head_logits, "scale", 0.25)
        torch.testing.assert_close(hidden @ output_rows(llama).T, llama.head_logits(hidden))
    with monkeypatch.context() as patch:
        patch.setattr(llama.head_logits, "cap", 30.0)
        with pytest.raises(EagleError, match="not one plain matrix"):
            output_rows(llama)
    bias = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setitem(llama.model.get_output_embeddings()._parameters, "bias", bias)
    with pytest.raises(EagleError, match="not one plain matrix"):
        output_rows(llama)
