"""Every Pallas kernel through the real compilers of the chips it is for, none of which is here.

    pip install -e ".[test,compilers]" && pytest -m compiled tests/compiled

A kernel is a line in CASES; `compile_for.py` knows the operands of each operation. Shapes are those
of Wan 14B at 720p, in bfloat16 where nothing else is told.
"""

import itertools

import pytest

pytestmark = pytest.mark.compiled

BLOCKS = ((64, 64), (128, 64), (128, 128))
# The matrix instruction that a GPU's kernels owe their speed to, tiles of float32 being too small.
DUE = {"h200": "wgmma", "a100": "mma"}


def case(
    implementation,
    operation,
    head_dim,
    *,
    dtype="bfloat16",
    tail=False,
    override=None,
    note="",
    **options,
):
    """One compilation; `override` plants keywords in calls, see `compile_for`."""
    sizes = "".join(f"-{name}{size}" for name, size in options.items())
    name = f"{implementation}-{operation}-H{head_dim}{sizes}" + "-tail" * tail + note
    return dict(
        name=name + f"-{dtype}" * (dtype != "bfloat16"),
        implementation=implementation,
        operation=operation,
        dtype=dtype,
        head_dim=head_dim,
        tail=tail,
        options=options,
        override=override or {},
    )


def attention(implementation, blocks, head_dim, tail, **kw):
    block_q, block_kv = blocks
    kw |= dict(tail=tail, block_q=block_q, block_kv=block_kv)
    return case(implementation, "block_sparse_attention", head_dim, **kw)


def attentions(implementation, head_sizes=(64, 128), tails=(False, True)):
    variants = itertools.product(BLOCKS, head_sizes, tails)
    return [attention(implementation, *variant) for variant in variants]


TRITON = [
    *attentions("triton"),
    attention("triton", (64, 64), 256, True, dtype="float32"),
    case("triton", "block_statistics", 128, block_kv=64, group=32),
    case("triton", "block_statistics", 64, block_kv=128, group=32),
    case("triton", "block_covariance_norm", 128, block_kv=64, group=32),
    case("triton", "block_mass", 128, block_q=64, block_kv=64, top=177),
    case("triton", "block_mass", 128, block_q=128, block_kv=128, top=89),
]
# A case takes libtpu longer than ptxas: fewer of them.
CASES = {
    "h200": [*TRITON, *attentions("mosaic_gpu")],
    "a100": TRITON,
    "tpu-v4": [attention("mosaic_tpu", (128, 128), 128, True)],  # gathers: no head fits its VMEM
    "tpu-v5e": [
        *attentions("mosaic_tpu", head_sizes=[128], tails=[True]),
        attention("mosaic_tpu", (128, 128), 64, False),
    ],
    "tpu-v6e": [
        *attentions("mosaic_tpu", head_sizes=[128]),
        attention("mosaic_tpu", (128, 128), 64, True),
        case("splash", "dense_attention", 128),
    ],
}
WARPS = {"jax.experimental.pallas.triton.CompilerParams": {"num_warps": 2}}
# Idle warpgroups take registers from the working ones.
WARPGROUPS = {"jax.experimental.pallas.mosaic_gpu.kernel": {"num_threads": 5}}
VMEM = {"jax.experimental.pallas.tpu.CompilerParams": {"vmem_limit_bytes": 8 << 20}}


def planted(implementation, blocks, tail=False, override=None):
    return attention(implementation, blocks, 128, tail, override=override, note="-planted")


PLANTED = [
    ("h200", planted("triton", (128, 64), override=WARPS), "spills"),
    ("h200", planted("triton", (16, 64)), "no wgmma"),  # too few rows for a warpgroup
    ("h200", planted("mosaic_gpu", (64, 64), True, WARPGROUPS), "serialized"),
    ("tpu-v6e", planted("mosaic_tpu", (128, 128), override=VMEM), "memory space vmem"),
]


def table():
    for chip, cases in CASES.items():
        for case in cases:
            yield pytest.param(chip, case, id=f"{chip}-{case['name']}")


def faults(chip, case, report):
    """What is wrong with a compiled case."""
    if report["error"]:
        return [report["error"]]
    if chip not in DUE:
        return [] if "tpu_custom_call" in report["calls"] else ["no kernel"]
    told = [x for kernel in report["kernels"].values() for x in kernel["serialised"]]
    for name, kernel in report["kernels"].items():
        if any(kernel["spills"]):
            told.append(f"{name} spills, bytes stored and loaded: {kernel['spills']}")
    due = "mma" if case["dtype"] == "float32" else DUE[chip]
    if not any(kernel[due] for kernel in report["kernels"].values()):
        told.append(f"no {due}")
    if due == "wgmma" and any(kernel["mma"] for kernel in report["kernels"].values()):
        told.append("products by single warps")
    return told


@pytest.mark.parametrize(("chip", "case"), list(table()))
def test_compiles_without_fault(compiled, chip, case):
    report = compiled(chip, case)
    print(report)
    assert faults(chip, case, report) == []


@pytest.mark.parametrize(
    ("chip", "case", "fault"), PLANTED, ids=[f"{chip}-{case['name']}" for chip, case, _ in PLANTED]
)
def test_finds_planted_fault(compiled, chip, case, fault):
    told = faults(chip, case, compiled(chip, case))
    assert any(fault in x for x in told), told
