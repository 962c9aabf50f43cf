"""Triton on sm_90: a pipelined load is refilled while a wgmma in flight still reads it. See triton_overwrite.md.

python docs/triton_overwrite.py      # without a GPU: what is compiled; on one of sm_90: the numbers, too
"""

import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

M, N, K = 64, 64, 64


@triton.jit
def kernel(a_ptr, b_ptr, c_ptr, s_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr):
    """c = sum of a[i] @ b[i]; s = sum of b[i]."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    total = tl.zeros((K, N), tl.float32)
    for i in tl.range(steps, num_stages=STAGES):
        a = tl.load(a_ptr + i * M * K + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + i * K * N + k[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)  # a wgmma that is left in flight reads b in shared memory
        total += b  # so does something else: b gets a buffer fewer than a, and is refilled as early
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)
    tl.store(s_ptr + k[:, None] * N + n[None, :], total)


def run(device, stages, steps=8):
    """(c, s) and what they should be."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(steps, 64, 64, generator=generator).bfloat16().to(device) for _ in range(2))
    c, s = torch.empty(M, N, device=device), torch.empty(K, N, device=device)
    kernel[(1,)](a, b, c, s, steps, M, N, K, stages)
    return (c, s), (torch.einsum("imk,ikn->mn", a.float(), b.float()), b.float().sum(0))


def compiled(stages):
    """The kernel for sm_90, wherever this runs."""
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "s_ptr": "*fp32"}
    constants = {"M": M, "N": N, "K": K, "STAGES": stages}
    signature = pointers | {"steps": "i32"} | dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32))


def main():
    print(f"Triton {triton.__version__}")
    for stages in (2, 3, 4):
        code = compiled(stages).asm["ttgir"]
        buffers = re.findall(r"local_alloc\s*:\s*\(\) -> !ttg\.memdesc<(\d+)x64x64xbf16", code)
        in_flight = re.findall(r"warp_group_dot_wait .*pendings = (\d+)", code)
        print(f"num_stages={stages}: buffers of a and b: {buffers}; wgmma left in flight by each wait: {in_flight}")
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
            found, expected = run("cuda", stages)
            print(
                "  largest errors of c and s:",
                *((x - y).abs().max().item() for x, y in zip(found, expected, strict=True)),
            )


if __name__ == "__main__":
    main()
