"""The Triton kernels compile for an H100, and fit it, without one: ptxas needs no GPU."""

import importlib.util
import os

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs triton, compiling",
    ),
]

FLOATS = {"scale", "softcap", "gamma", "smoothing", "least"}
WORDS = {"bits", "part_token"}
SINGLES = set(
    "part_acc part_best part_total part_value part_top temperatures top_ps log_min_ps importance "
    "loss_out overlap_out".split()
)
LONGS = {"lengths", "rows", "positions", "path", "counts", "seeds", "top_ks", "choices", "best_out"}


def compiled(kernel, dtype, constants, **options):
    """The kernel for sm_90, as a launch with 16-divisible pointers and strides specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        for names, pointer in ((WORDS, "*i32"), (SINGLES, "*fp32"), (LONGS, "*i64")):
            if name in names:
                return pointer
        if name in ("q", "k_cache", "v_cache", "buffer", "logits", "teacher", "sinks", "out"):
            return "*" + dtype
        return "i64" if name in ("k_b", "v_b", "stride_l", "stride_s", "stride_b") else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    even = {"k_h", "k_c", "v_h", "v_c", "k_b", "v_b", "q_b", "q_h", "q_n", "stride_c"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in even and name not in constants)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


ATTENTION = dict(G=4, D=128, WINDOW=False, SOFTCAP=False, ROWS=False, PRECISION="tf32")
ATTENTION |= dict(SPLIT=256, SPLITS=16, BLOCK_R=64, BLOCK_N=1, BLOCK_K=64, BLOCK_D=128)
CHANGES = [
    {},
    dict(WINDOW=True, BLOCK_N=64),
    dict(SOFTCAP=True),
    dict(N=1, G=1, W=1, M=1, BLOCK_R=16),
    dict(D=256, BLOCK_D=256, BLOCK_K=32),
    dict(ROWS=True, D=80),
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_attention(change):
    from kernels.triton_tree_attention import _attend_split

    constants = ATTENTION | change
    warps = 4 if constants["BLOCK_D"] <= 128 else 8
    kernel = compiled(_attend_split, "bf16", constants, num_warps=warps, num_stages=2)
    # two programs share a multiprocessor's 227 KiB
    assert kernel.metadata.shared <= 113 * 1024
    # the loop over the prefix loads ahead: keys and values, two stages of each
    assert kernel.asm["ttgir"].count("ttg.async_copy_global_to_local") == 4
    assert ("wgmma" in kernel.asm["ptx"]) == (constants["BLOCK_R"] == 64)


def test_merge():
    from kernels.triton_tree_attention import _merge

    constants = {k: v for k, v in ATTENTION.items() if k in _merge.arg_names}
    kernel = compiled(_merge, "bf16", constants | dict(SINKS=True, BLOCK_R=8))
    assert "ld.global" in kernel.asm["ptx"] and "st.global" in kernel.asm["ptx"]


@pytest.mark.parametrize("block", [1, 8, 64])
def test_commit(block):
    from kernels.triton_commit_kv import _move

    kernel = compiled(_move, "bf16", dict(BLOCK_K=block, BLOCK_D=64))
    ptx = kernel.asm["ptx"]
    # no store may come before the barrier, and no load after it
    before, after = ptx[: ptx.rindex("bar.sync")], ptx[ptx.rindex("bar.sync") :]
    assert "st.global" in after and "st.global" not in before and "ld.global" not in after


@pytest.mark.parametrize("sample", [False, True])
def test_choose(sample):
    from kernels.triton_choose import _scan, _settle

    noise = compiled(_scan, "bf16", dict(SAMPLE=sample, BLOCK=1024)).asm["ptx"]
    # an approximate logarithm is coarse just below 1, where the largest noise comes from
    assert "lg2.approx" not in noise and ("div.rn.f32" in noise) == sample
    compiled(_settle, "bf16", dict(CUT=sample, CHUNKS=16, BLOCK=4096), num_warps=16)


@pytest.mark.parametrize("loss", ["soft_ce", "kl", "reverse_kl", "overlap", "total_variation"])
def test_draft_loss(loss):
    from kernels.triton_draft_loss import _row

    constants = dict(LOSS=loss, FOCAL=True, INNER="target_prob", GRAD=True, BLOCK=4096)
    assert "st.global" in compiled(_row, "bf16", constants, num_warps=8).asm["ptx"]
