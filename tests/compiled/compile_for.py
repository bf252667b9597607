"""Compiles operations for a chip that need not be here, and tells what its compilers made of them.

    python compile_for.py CHIP CASES REPORTS DUMPS

Reads cases from the file CASES, a list in JSON, and writes a line of JSON for each to REPORTS. A
process of its own, with the environment that `conftest.py` gives it: the compilers write into the
folder DUMPS, and JAX starts no device.
"""

import contextlib
import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from pasa_jax.pallas_kernels import BlockIndex, api, num_blocks

TOKENS = 75_600  # Wan 14B, 720p, 81 frames: no multiple of a block
NUM_HEADS = 40
DENSITY = 0.15
GROUP = 32
# Name and numbers of XLA's GpuTargetConfigProto, from NVIDIA's data sheets.
GPUS = {
    "h200": (
        "NVIDIA H200",
        dict(major=9, minor=0),
        dict(
            core_count=132,
            shared_memory_per_block_optin=227 << 10,
            shared_memory_per_core=228 << 10,
            l2_cache_size=50 << 20,
            device_memory_size=141 * 10**9,
            memory_bandwidth=4800 * 10**9,
            clock_rate_ghz=1.98,
        ),
    ),
    "a100": (
        "NVIDIA A100-SXM4-80GB",
        dict(major=8, minor=0),
        dict(
            core_count=108,
            shared_memory_per_block_optin=163 << 10,
            shared_memory_per_core=164 << 10,
            l2_cache_size=40 << 20,
            device_memory_size=80 * 10**9,
            memory_bandwidth=2039 * 10**9,
            clock_rate_ghz=1.41,
        ),
    ),
}
EVERY_GPU = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    threads_per_core_limit=2048,
    fpus_per_core=128,
    registers_per_block_limit=1 << 16,
    registers_per_core_limit=1 << 16,
    shared_memory_per_block=48 << 10,
    block_dim_limit_x=2**31 - 1,
    block_dim_limit_y=2**16 - 1,
    block_dim_limit_z=2**16 - 1,
)
TPUS = {"tpu-v4": "v4:2x2x1", "tpu-v5e": "v5e:2x2", "tpu-v6e": "v6e:2x2"}
# Matrix instructions in PTX: Hopper's warpgroup products, and those of one warp.
PRODUCTS = {"wgmma": r"\bwgmma\.mma_async\b", "mma": r"\bmma\.sync\b"}


def proto_text(fields):
    return " ".join(f"{name}: {value}" for name, value in fields.items())


def topology(chip):
    """A chip as the compilers know it."""
    if chip in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip])
    name, capability, sizes = GPUS[chip]
    capability = f"cuda_compute_capability {{ {proto_text(capability)} }}"
    config = f"""gpu_device_info {{ {proto_text(EVERY_GPU | sizes)} {capability} }}
        platform_name: "CUDA" device_description_str: "{name}"
        runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 }}"""
    return topologies.get_topology_desc(
        platform="cuda", topology_name=chip, topology="1x1x1", target_config=config
    )


def operands(case):
    """What the case's operation takes, as shapes."""
    x = jax.ShapeDtypeStruct((1, TOKENS, NUM_HEADS, case["head_dim"]), case["dtype"])
    if case["operation"] in ("block_statistics", "block_covariance_norm"):
        return {"k": x, "v": x}
    if case["operation"] == "block_mass":
        return {"q": x, "k": x, "lse": jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)}
    if case["operation"] == "dense_attention":
        return {"q": x, "k": x, "v": x}
    rows, columns = (num_blocks(TOKENS, case["options"][k]) for k in ("block_q", "block_kv"))
    count = jax.ShapeDtypeStruct((1, NUM_HEADS, rows), jnp.int32)
    ids = jax.ShapeDtypeStruct((*count.shape, round(DENSITY * columns)), jnp.int32)
    taken = {"q": x, "k": x, "v": x, "blocks": BlockIndex(ids, count)}
    if case["tail"]:
        kw = dict(block_kv=case["options"]["block_kv"], group=GROUP, implementation="xla")
        taken["tail"] = jax.eval_shape(functools.partial(api.block_statistics, **kw), x, x)
    return taken


def named(device, platform):
    """Where kernels ask for the device's name while they are traced and lowered."""
    device = jax.sharding.AbstractDevice(device.device_kind, 1, platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@contextlib.contextmanager
def overridden(settings):
    """Functions, by path, get these keywords whatever their callers give."""
    with contextlib.ExitStack() as stack:
        for path, keywords in settings.items():
            module, name = path.rsplit(".", 1)
            module = importlib.import_module(module)
            forced = with_keywords(getattr(module, name), keywords)
            stack.enter_context(mock.patch.object(module, name, forced))
        yield


def with_keywords(function, keywords):
    return lambda *args, **kw: function(*args, **kw | keywords)


def compile_case(case, chip, device):
    """XLA's program for the chip, as text."""
    function = getattr(api, case["operation"])
    fixed = dict(implementation=case["implementation"], **case["options"])
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = lambda arrays: function(**arrays, **fixed)  # noqa: E731
    run = jax.jit(run, in_shardings=sharding, out_shardings=sharding)
    platform = "tpu" if chip in TPUS else "cuda"
    with named(device, platform), overridden(case["override"]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer JAX prefers Mosaic GPU
        lowered = run.trace(operands(case)).lower(lowering_platforms=(platform,))
    return lowered.compile().as_text()


def assemble(chip, ptx):
    """Registers, spills and matrix products of each kernel in a file of PTX, by ptxas."""
    capability = GPUS[chip][1]["major"]
    arch = f"sm_{capability}0" + ("a" if capability >= 9 else "")
    command = ["ptxas", f"-arch={arch}", "-v", ptx, "-o", ptx.with_suffix(".cubin")]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{ptx.name}: {told.stderr}")
    text, kernels = ptx.read_text(), {}
    for part in told.stderr.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        kernels[part.split("'")[0]] = dict(
            registers=int(re.search(r"Used (\d+) registers", part)[1]),
            spills=[int(x) for x in spills.groups()],
            serialised=[x for x in told.stderr.splitlines() if "serialized" in x],
            **{name: len(re.findall(pattern, text)) for name, pattern in PRODUCTS.items()},
        )
    return kernels


def report(case, chip, device, dumps):
    """What compiling one case told; an error is part of it."""
    start, told = time.monotonic(), dict(name=case["name"], error=None, calls=[], kernels={})
    try:
        text = compile_case(case, chip, device)
        told["calls"] = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
        for ptx in sorted(dumps.glob("*.ptx")):
            told["kernels"] |= assemble(chip, ptx)
    except Exception:
        told["error"] = traceback.format_exc()
    shutil.rmtree(dumps)
    dumps.mkdir()
    return told | {"seconds": round(time.monotonic() - start, 2)}


def main(chip, cases, reports, dumps):
    device = topology(chip).devices[0]
    with open(reports, "w") as file:
        for case in json.loads(Path(cases).read_text()):
            print(json.dumps(report(case, chip, device, Path(dumps))), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
