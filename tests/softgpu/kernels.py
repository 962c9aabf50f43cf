"""Triton kernels that the tests of the software GPU run."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton 3.6 puts no fence.proxy.async between a cp.async and a wgmma that reads what it brought, as PTX asks for.
UNFENCED = ("proxy fence",) if triton.__version__.startswith("3.6.") else ()


@triton.jit
def add_kernel(x, y, z, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def copy_kernel(x, z, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + i, tl.load(x + i))


@triton.jit
def same_kernel(x, z, B: tl.constexpr):
    """All programs write to the same place."""
    i = tl.arange(0, B)
    tl.store(z + i, tl.load(x + i) + tl.program_id(0))


@triton.jit
def rows_kernel(x, z, stride_x, stride_z, rows, B: tl.constexpr, WIDE: tl.constexpr):
    """Copies rows of B elements. WIDE: offsets are 64-bit."""
    row = tl.program_id(0)
    row = row.to(tl.int64) if WIDE else row
    i = tl.arange(0, B)
    tl.store(z + row * stride_z + i, tl.load(x + row * stride_x + i))


@triton.jit
def softmax_kernel(x, z, stride, n, B: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, B)
    v = tl.load(x + row * stride + i, mask=i < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(z + row * stride + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def sum_kernel(x, z, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(z + tl.arange(0, M if AXIS == 1 else N), tl.sum(v, AXIS))


@triton.jit
def matmul_kernel(a, b, c, M, N, K, sam, sak, sbk, sbn, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK):
        x_mask, y_mask = (m < M)[:, None] & (k + i < K)[None, :], (n < N)[None, :] & (k + i < K)[:, None]
        x = tl.load(a + m[:, None] * sam + (k + i)[None, :] * sak, mask=x_mask, other=0.0)
        y = tl.load(b + n[None, :] * sbn + (k + i)[:, None] * sbk, mask=y_mask, other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * scm + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def descriptor_kernel(a, b, c, M, N, K, programs, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, programs):
        m, n = tile // tl.cdiv(N, BN) * BM, tile % tl.cdiv(N, BN) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, K, BK):
            acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
        c.store([m, n], acc.to(c.dtype))


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def error(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


def matmul(dtype, m=100, n=72, k=96, bm=64, bn=64, bk=32, warps=4, stages=3, ta=False, tb=False):
    """The error of a product by matmul_kernel, its operands transposed or not."""
    a = torch.randn(k, m).to(dtype).t() if ta else torch.randn(m, k).to(dtype)
    b = torch.randn(n, k).to(dtype).t() if tb else torch.randn(k, n).to(dtype)
    c = nan(m, n, dtype=dtype)
    matmul_kernel[(triton.cdiv(m, bm), triton.cdiv(n, bn))](
        a, b, c, m, n, k, *a.stride(), *b.stride(), c.stride(0), BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages
    )
    return error(c, a.double() @ b.double())


def descriptor_matmul(dtype, m, n, k, bm, bn, bk, programs):
    """The error of a product by descriptor_kernel."""
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), nan(m, n, dtype=dtype)
    described = (TensorDescriptor.from_tensor(t, box) for t, box in ((a, [bm, bk]), (b, [bk, bn]), (c, [bm, bn])))
    programs = min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn))
    descriptor_kernel[(programs,)](*described, m, n, k, programs, BM=bm, BN=bn, BK=bk, num_stages=3)
    return error(c, a.double() @ b.double())
