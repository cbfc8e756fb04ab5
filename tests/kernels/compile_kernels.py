"""Compile every Triton kernel for a CUDA compute capability (80, 90, ...), and check the binary.

No GPU is needed. Checked are shared memory that fits, wide loads for moved rows, and a barrier that acquires.
"""

from __future__ import annotations

import sys

import triton.language as tl
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vtoken.kernels.triton import attention, cover, gather, pack, select

TYPES = {
    **dict.fromkeys(["x", "q", "k"], "*bf16"), **dict.fromkeys(["index", "into", "partner", "start", "table"], "*i64"),
    **dict.fromkeys(["order", "bounds", "starts", "stops", "places", "arrived"], "*i32"), "mask": "*u8",
    **dict.fromkeys(["scale", "factor"], "fp32"),
    **dict.fromkeys(["weight", "parts", "lse", "inverse", "best", "score", "slots", "quality", "left", "gains", "lift", "covered"], "*fp32"),
}  # fmt: skip
ROWS = dict(MASKED=True, WIDE=False, BLOCK_R=64, BLOCK_D=128)
WINDOW = dict(WIDE=False, BLOCK_Q=64, BLOCK_K=64, BLOCK_D=128)
GREEDY = dict(PROGRAMS=100, BLOCK_N=16, BLOCK_D=256, BLOCK_P=128)
MOVE = dict(UNIT=tl.int64, ALIGN=16, STEP=2, BLOCK_M=8, BLOCK_W=256)
SHAPE = dict(TOKENS=32, CHANNELS=128, WIDTH=820, ROWS=1, COLUMNS=128, BLOCK_M=32, BLOCK_C=128)
READ = dict(SHAPE, LEVELS=3, PER=5, ZERO=True, GATHER=True)
KERNELS = [
    (gather._gather_merge, dict(MERGE=True, WEIGHTED=True, BLOCK_D=4096), {"out": "*bf16"}, "ld.global.v4"),
    (gather._move_rows, dict(MOVE, IN_PLACE=True), {}, "ld.global.v2.b64"),
    (gather._move_rows, dict(MOVE, IN_PLACE=False), {}, "st.global.v2.b64"),
    (gather._order_by_column, dict(BLOCK=64, BLOCK_N=64), {}, "st.global"),
    (attention._rows_lse, dict(ROWS, STORE=True, BLOCK_N=64), {"out": "*fp32"}, "mma"),
    (attention._rows_normalise, dict(BLOCK_S=8, BLOCK_N=1024), {"out": "*fp32"}, "st.global"),
    (attention._rows_reduce, dict(ROWS, BLOCK_N=32, BLOCK_S=8), {"out": "*fp32"}, "mma"),
    (attention._window_lse, WINDOW, {}, "mma"),
    (attention._window_received, WINDOW, {"out": "*fp32"}, "mma"),
    (select._most_similar, dict(WIDE=False, BLOCK_A=64, BLOCK_B=64, BLOCK_D=64), {}, "mma"),
    (select._farthest, GREEDY, {"out": "*i64", "k": "i32"}, "acquire"),
    (select._greedy, dict(GREEDY, BLOCK_T=16), {"out": "*i64", "k": "i32", "factor": "*fp32"}, "acquire"),
    (pack._pack, dict(LEVELS=3, PER=5, BLOCK=1024), {"codes": "*u8", "out": "*u8"}, "st.global"),
    (
        pack._unpack,
        READ,
        {"packed": "*u8", "step": "*fp16", "zero": "*fp16", "out": "*fp16", "centre": "fp32"},
        "ld.global",
    ),
    (cover._cover, GREEDY, {"out": "*i64", "k": "i32", "x": "*fp32"}, "acquire"),
]


def build(kernel, constants: dict, types: dict, target: GPUTarget):
    """Pointers and row strides are multiples of 16, as they are for real models."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "i32") for n in names}
    aligned = {n for n in names if n in ("d", "x_row", "x_batch") or signature[n].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    together = dict(launch_cooperative_grid=True) if "PROGRAMS" in constants else {}
    return compile_kernel(source, target=target, options=together)


def main(capability: int) -> None:
    for kernel, constants, types, expected in KERNELS:
        built = build(kernel, constants, types, GPUTarget("cuda", capability, 32))
        shared = built.metadata.shared
        assert built.asm["cubin"] and expected in built.asm["ptx"], (
            f"{kernel.__name__}: no {expected} in its code"
        )
        assert shared <= 99 * 1024, f"{kernel.__name__} takes {shared} bytes of shared memory"
        print(kernel.__name__, shared, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
