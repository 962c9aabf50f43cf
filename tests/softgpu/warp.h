/* Instructions among the lanes of a warp. */
#pragma once
#include "state.h"

/* ---------------------------------------------------------------- warp-wide */
static void op_shfl(const Ins *I, const u32 *M) {
  /* i0: mode 0 up 1 down 2 bfly 3 idx; i1: has predicate; A: d, a, b, c, mask, pred */
  static u32 tmp[32 * MAXW];
  u32 *d = REG(u32, 0);
  const u32 *a = REG(u32, 1), *b = REG(u32, 2), *c = REG(u32, 3), *mk = REG(u32, 4);
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) {
          int t = w * 32 + l;
          u32 mask = mk[t];
          if ((mask & lanes(w)) & ~M[w])
            fail(E_DIVERGE, t, 0, "shfl.sync: lanes of the mask %08x are elsewhere (here %08x)", mask, M[w]);
          u32 bv = b[t] & 31, cv = c[t] & 31, seg = c[t] >> 8 & 31, maxl = (l & seg) | (cv & ~seg), minl = l & seg;
          int j = l, p = 0;
          switch (I->i0) {
            case 0:
              j = l - (int)bv;
              p = j >= (int)maxl;
              break;
            case 1:
              j = l + bv;
              p = j <= (int)maxl;
              break;
            case 2:
              j = l ^ bv;
              p = j <= (int)maxl;
              break;
            default: j = minl | (bv & ~seg); p = j <= (int)maxl;
          }
          if (!p) j = l;
          if (!(M[w] >> j & 1)) fail(E_DIVERGE, t, 0, "shfl.sync reads lane %d, which does not take part", j);
          tmp[t] = a[w * 32 + j];
          if (I->i1) REG(u8, 5)[t] = p;
        }
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) d[w * 32 + l] = tmp[w * 32 + l];
    }
}
static void op_movmatrix(const Ins *I, const u32 *M) { /* the transpose of 8 x 8 halves; A: d, a */
  whole(M, "movmatrix");
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      const u32 *a = REG(u32, 1) + w * 32;
      u32 *d = REG(u32, 0) + w * 32, tmp[32];
      for (int l = 0; l < 32; l++) { /* row l / 4 of the result, columns 2 (l % 4) and one more */
        int row = l >> 2, shift = 16 * (row & 1);
        u32 low = a[8 * (l & 3) + row / 2] >> shift & 0xffff, high = a[8 * (l & 3) + 4 + row / 2] >> shift & 0xffff;
        tmp[l] = low | high << 16;
      }
      memcpy(d, tmp, sizeof tmp);
    }
}
static void op_vote(const Ins *I, const u32 *M) { /* i0: 0 all 1 any 2 uni 3 ballot; i1: negate; A: d, p, mask */
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      u32 p = predmask(REG(u8, 1), w);
      if (I->i1) p = ~p;
      p &= M[w];
      u32 r = I->i0 == 0 ? p == M[w] : I->i0 == 1 ? p != 0 : I->i0 == 2 ? (p == 0 || p == M[w]) : p;
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) {
          if (I->i0 == 3) REG(u32, 0)[w * 32 + l] = r;
          else REG(u8, 0)[w * 32 + l] = r;
        }
    }
}
static void op_redux(const Ins *I, const u32 *M) { /* i0: 0 add 1 min 2 max 3 and 4 or 5 xor; i1 signed */
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      u32 r = 0;
      int first = 1;
      const u32 *a = REG(u32, 1);
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) {
          u32 v = a[w * 32 + l];
          if (first) {
            r = v;
            first = 0;
            continue;
          }
          switch (I->i0) {
            case 0: r += v; break;
            case 1: r = I->i1 ? ((i32)v < (i32)r ? v : r) : (v < r ? v : r); break;
            case 2: r = I->i1 ? ((i32)v > (i32)r ? v : r) : (v > r ? v : r); break;
            case 3: r &= v; break;
            case 4: r |= v; break;
            default: r ^= v;
          }
        }
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) REG(u32, 0)[w * 32 + l] = r;
    }
}
