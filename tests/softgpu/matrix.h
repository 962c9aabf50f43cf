/* Matrix products: mma.sync, wgmma, and the registers and shared memory that a wgmma in flight holds. */
#pragma once
#include "shared.h"

/* ---------------------------------------------------------------- registers in flight */
static u8 *accumulates, *feeds_a, *unfenced;
static int naccumulating; /* per register: warpgroups with it as an accumulator, as A, changed since the fence */
typedef struct {
  i64 off;
  u32 val[128];
  int group, wg, live;
} Sum; /* a pending accumulator register */
static Sum *sums;
static int nsums, sumscap;
typedef struct {
  u32 chunk;
  i32 group, wg;
} Read;
static Read *reads;
static int nreads, readscap;
typedef struct {
  i64 off;
  int group, wg;
} Feeding;
static Feeding *feeding;
static int nfeeding, feedingcap;
static u32 products_committed[8];
#define RI(off) ((off) >> 5)
static void wg_wait(int wg, u32 n);
static void check_regs(const Ins *I) {
  u8 groups = 0;
  for (int w = 0; w < NW; w++)
    if (active[w]) groups |= 1 << (w >> 2);
  for (int i = 0; i < I->nr; i++) {
    i64 r = RI(pool[I->chk + i]);
    if (accumulates[r] & groups) {
      soft(E_REGISTER, 0, 0, "%s of a register that a wgmma in flight accumulates into, before its wgmma.wait_group",
           i < I->nd ? "write" : "read");
      for (int g = 0; g < 8; g++)
        if (groups >> g & 1) {
          u32 n = products_committed[g];
          products_committed[g] = n + 1;
          wg_wait(g, 0);
          products_committed[g] = n;
        }
    }
    if (i < I->nd && (feeds_a[r] & groups))
      soft(E_REGISTER, 0, 0, "write to a register that a wgmma in flight reads as its A");
  }
}

/* ---------------------------------------------------------------- matrix products */
enum { T_F16 = 0, T_BF16 = 1, T_TF32 = 2 };
static inline f64 half_at(u32 r, int hi, int type) {
  u16 h = hi ? r >> 16 : r & 0xffff;
  return type == T_F16 ? h2f(h) : b2f(h);
}
static inline f64 tf32(u32 r) { return u2f(r & 0xffffe000u); }
static void op_mma(const Ins *I, const u32 *M) {
  /* i0: type, i1: k, i2: accumulate in f16; A: d.., a.., b.., c.. */
  const int type = I->i0, k = I->i1, half = I->i2;
  whole(M, "mma.sync");
  const int nd = half ? 2 : 4, na = type == T_TF32 ? k / 2 : k / 4, nb = na / 2;
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      f64 a[16][16], b[16][8], d[16][8];
#define RG(i, l) (((u32 *)(R + A(i)))[w * 32 + (l)])
      for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = l & 3;
        if (type == T_TF32) {
          for (int i = 0; i < na; i++) a[g + 8 * (i & 1)][q + 4 * (i >> 1)] = tf32(RG(nd + i, l));
          for (int i = 0; i < nb; i++) b[q + 4 * i][g] = tf32(RG(nd + na + i, l));
        } else {
          for (int i = 0; i < na; i++)
            for (int h = 0; h < 2; h++) a[g + 8 * (i & 1)][q * 2 + h + 8 * (i >> 1)] = half_at(RG(nd + i, l), h, type);
          for (int i = 0; i < nb; i++)
            for (int h = 0; h < 2; h++) b[q * 2 + h + 8 * i][g] = half_at(RG(nd + na + i, l), h, type);
        }
        for (int i = 0; i < 4; i++)
          d[g + 8 * (i >> 1)][q * 2 + (i & 1)] =
              half ? half_at(RG(nd + na + nb + i / 2, l), i & 1, T_F16) : u2f(RG(nd + na + nb + i, l));
      }
      for (int m = 0; m < 16; m++) {
        f64 s[8];
        for (int n = 0; n < 8; n++) s[n] = 0;
        for (int x = 0; x < k; x++)
          for (int n = 0; n < 8; n++) s[n] += a[m][x] * b[x][n];
        for (int n = 0; n < 8; n++) d[m][n] += s[n];
      }
      for (int l = 0; l < 32; l++) {
        int g = l >> 2, q = l & 3;
        if (half)
          for (int i = 0; i < 2; i++)
            RG(i, l) = (u32)d2h(d[g + 8 * i][q * 2]) | (u32)d2h(d[g + 8 * i][q * 2 + 1]) << 16;
        else
          for (int i = 0; i < 4; i++) RG(i, l) = f2u((f32)d[g + 8 * (i >> 1)][q * 2 + (i & 1)]);
      }
    }
}
typedef struct {
  u32 start, lbo, sbo;
  int mode;
} Desc;
static Desc desc_of(u64 d) {
  Desc r;
  r.start = (d & 0x3fff) << 4;
  r.lbo = (d >> 16 & 0x3fff) << 4;
  r.sbo = (d >> 32 & 0x3fff) << 4;
  int s = d >> 62;
  r.mode = s == 0 ? 0 : 4 - s;
  /* without a swizzle the base offset means nothing, and Triton leaves bits of the address there */
  if (r.mode && d >> 49 & 7) fail(E_WGMMA, 0, 0, "wgmma descriptor with a base offset");
  return r;
}
/* shared address (unswizzled offset from start) of the 16-byte chunk that has row `mn`, bytes kb of K (K-major), or row
 * k, elements mn.. (MN-major) */
static inline u32 chunk_k(Desc d, int mn, int kc) { /* kc: 16-byte chunk along K */
  if (d.mode == 0) return d.start + (mn & 7) * 16 + (mn >> 3) * d.sbo + kc * d.lbo;
  return d.start + (mn & 7) * (16u << d.mode) + (mn >> 3) * d.sbo + kc * 16;
}
static inline u32 chunk_mn(Desc d, int c, int k) { /* c: 16-byte chunk along MN */
  if (d.mode == 0) return d.start + c * d.sbo + (k & 7) * 16 + (k >> 3) * d.lbo;
  int per = 1 << d.mode;
  return d.start + (c % per) * 16 + (c / per) * d.lbo + (k & 7) * (16u * per) + (k >> 3) * d.sbo;
}
static void smem_operand(Desc d, int trans, int rows, int k, int type, f64 *dst, int rs, int ks, int wg, int group,
                         int mark) {
  /* dst[row * rs + k * ks], if there is one; mark: check that the bytes may be read, and that nobody writes them until
   * the wait */
  int eb = type == T_TF32 ? 4 : 2, per = 16 / eb;
  int outer = trans ? k : rows, inner = (trans ? rows : k) / per;
  for (int o = 0; o < outer; o++)
    for (int c = 0; c < inner; c++) {
      u32 a = swz(trans ? chunk_mn(d, c, o) : chunk_k(d, o, c), d.mode);
      u32 off = soff(a, 16, wg * 128);
      if (chk && mark) {
        sh_async_read(off, 16, wg * 4, 4);
        proxy_check(off, 16, wg * 4);
        if (async_reads[off >> 4] == 255) fail(E_LIMIT, 0, 0, "too many reads in flight");
        async_reads[off >> 4]++;
        GROW(reads, nreads, readscap);
        reads[nreads].chunk = off >> 4;
        reads[nreads].group = group;
        reads[nreads++].wg = wg;
      }
      if (dst)
        for (int e = 0; e < per; e++) {
          f64 v;
          if (type == T_TF32) {
            u32 x;
            memcpy(&x, shared_memory + off + 4 * e, 4);
            v = tf32(x);
          } else {
            u16 x;
            memcpy(&x, shared_memory + off + 2 * e, 2);
            v = type == T_F16 ? h2f(x) : b2f(x);
          }
          if (trans) dst[(c * per + e) * rs + o * ks] = v;
          else dst[o * rs + (c * per + e) * ks] = v;
        }
    }
}
/* A wgmma that was issued: run at once, or, with L->late, at its wait, which PTX allows as well. */
typedef struct {
  const Ins *I;
  int wg, group, scale;
  f64 sab;
  Desc a, b;
  f64 ra[64 * 16];
} Wg;
static Wg *issued;
static int nissued, issuedcap;
static void wg_execute(const Wg *q) {
  const Ins *I = q->I;
  const int type = I->i0, N = I->i1, half = I->i4, nd = half ? N / 4 : N / 2, k = type == T_TF32 ? 8 : 16, ra = I->i2,
            wg = q->wg, scale = q->scale;
  static f64 a[64 * 16], b[16 * 256], acc[64][256];
  if (ra) memcpy(a, q->ra, sizeof a);
  else smem_operand(q->a, I->i3 & 1, 64, k, type, a, 16, 1, wg, 0, 0);
  smem_operand(q->b, I->i3 >> 1 & 1, N, k, type, b, 1, N, wg, 0, 0);
  Sum *ps[128];
  for (int i = 0; i < nd; i++) {
    ps[i] = 0;
    for (int j = 0; j < nsums; j++)
      if (sums[j].off == A(i) && sums[j].wg == wg) ps[i] = &sums[j];
  }
  for (int i = 0; i < nd; i++)
    for (int x = 0; x < 128; x++) {
      int row = (x >> 5) * 16 + (x & 31) / 4;
      if (half) {
        int col = 8 * (i >> 1) + (x & 3) * 2;
        row += 8 * (i & 1);
        for (int h = 0; h < 2; h++) acc[row][col + h] = scale ? half_at(ps[i]->val[x], h, T_F16) : 0;
      } else {
        int col = 8 * (i >> 2) + (x & 3) * 2 + (i & 1);
        row += 8 * (i >> 1 & 1);
        acc[row][col] = scale ? u2f(ps[i]->val[x]) : 0;
      }
    }
  for (int m = 0; m < 64; m++) {
    f64 s[256];
    for (int n = 0; n < N; n++) s[n] = 0;
    for (int x = 0; x < k; x++) {
      f64 v = a[m * 16 + x] * q->sab;
      for (int n = 0; n < N; n++) s[n] += v * b[x * N + n];
    }
    for (int n = 0; n < N; n++) acc[m][n] += s[n];
  }
  for (int i = 0; i < nd; i++)
    for (int x = 0; x < 128; x++) {
      int row = (x >> 5) * 16 + (x & 31) / 4;
      if (half) {
        int col = 8 * (i >> 1) + (x & 3) * 2;
        row += 8 * (i & 1);
        ps[i]->val[x] = (u32)d2h(acc[row][col]) | (u32)d2h(acc[row][col + 1]) << 16;
      } else {
        int col = 8 * (i >> 2) + (x & 3) * 2 + (i & 1);
        row += 8 * (i >> 1 & 1);
        ps[i]->val[x] = f2u((f32)acc[row][col]);
      }
    }
}
static void op_wgmma(const Ins *I, const u32 *M) {
  /* i0: type, i1: n, i2: 1 if A is in registers, i3: tnspA | tnspB << 1, i4: f16 accumulators;
   * A: d.., a (4 or 1), b, scale-d (pred), imm-scale-a, imm-scale-b */
  const int type = I->i0, N = I->i1, half = I->i4, nd = half ? N / 4 : N / 2, k = type == T_TF32 ? 8 : 16, ra = I->i2;
  whole(M, "wgmma");
  if (T % 128) fail(E_DIVERGE, 0, 0, "wgmma with %d threads", T);
  for (int wg = 0; wg < T / 128; wg++) {
    int some = 0, all = 1;
    for (int w = wg * 4; w < wg * 4 + 4; w++) {
      some |= M[w] != 0;
      all &= M[w] != 0;
    }
    if (!some) continue;
    if (!all) fail(E_DIVERGE, wg * 128, 0, "wgmma by a part of a warpgroup");
    Wg *q;
    if (L->late) {
      GROW(issued, nissued, issuedcap);
      q = &issued[nissued++];
    } else {
      static Wg now;
      q = &now;
    }
    f64 *a = q->ra;
    q->I = I;
    q->wg = wg;
    q->group = products_committed[wg];
    int group = products_committed[wg], bit = 1 << wg, ia = nd, ib = nd + (ra ? 4 : 1), base = wg * 128;
    for (int i = 0; i < nd; i++)
      if (unfenced[RI(A(i))] & bit)
        soft(E_WGMMA, base, 0, "wgmma accumulates into a register that was written after the last wgmma.fence");
    if (ra) {
      for (int i = 0; i < 4; i++) {
        i64 r = A(ia + i);
        if (accumulates[RI(r)] & bit) fail(E_REGISTER, base, 0, "wgmma reads A from a register in flight");
        if (unfenced[RI(r)] & bit)
          soft(E_WGMMA, base, 0, "wgmma reads A from a register that was written after the last wgmma.fence");
        for (int x = 0; x < 128; x++) {
          u32 v = ((u32 *)(R + r))[base + x];
          int row = (x >> 5) * 16 + (x & 31) / 4 + 8 * (i & 1), q = x & 3;
          if (type == T_TF32) a[row * 16 + q + 4 * (i >> 1)] = tf32(v);
          else
            for (int h = 0; h < 2; h++) a[row * 16 + q * 2 + h + 8 * (i >> 1)] = half_at(v, h, type);
        }
        GROW(feeding, nfeeding, feedingcap);
        feeding[nfeeding].off = r;
        feeding[nfeeding].group = group;
        feeding[nfeeding++].wg = wg;
        feeds_a[RI(r)] |= bit;
      }
    } else {
      const u64 *dr = (u64 *)(R + A(ia)) + base;
      for (int x = 1; x < 128; x++)
        if (dr[x] != dr[0]) fail(E_WGMMA, base + x, 0, "wgmma descriptor of A differs within the warpgroup");
      q->a = desc_of(dr[0]);
      smem_operand(q->a, I->i3 & 1, 64, k, type, 0, 16, 1, wg, group, 1);
    }
    const u64 *dr = (u64 *)(R + A(ib)) + base;
    for (int x = 1; x < 128; x++)
      if (dr[x] != dr[0]) fail(E_WGMMA, base + x, 0, "wgmma descriptor of B differs within the warpgroup");
    q->b = desc_of(dr[0]);
    smem_operand(q->b, I->i3 >> 1 & 1, N, k, type, 0, 1, N, wg, group, 1);
    q->scale = ((u8 *)(R + A(ib + 1)))[base] != 0;
    q->sab = (f64)A(ib + 2) * (f64)A(ib + 3);
    for (int i = 0; i < nd; i++) {
      i64 r = A(i);
      Sum *p = 0;
      if (accumulates[RI(r)] & bit)
        for (int j = 0; j < nsums; j++)
          if (sums[j].off == r && sums[j].wg == wg) {
            p = &sums[j];
            break;
          }
      if (!p) {
        GROW(sums, nsums, sumscap);
        p = &sums[nsums++];
        p->off = r;
        p->wg = wg;
        memcpy(p->val, (u32 *)(R + r) + base, 512);
        accumulates[RI(r)] |= bit;
        naccumulating++;
      }
      p->group = group;
      for (int x = 0; x < 128; x++) ((u32 *)(R + r))[base + x] = 0x7fffdead;
    }
    if (!L->late) wg_execute(q);
  }
}
static void wg_wait(int wg, u32 n) {
  u32 below = products_committed[wg] > n ? products_committed[wg] - n : 0;
  int k = 0;
  u8 bit = 1 << wg;
  for (int j = 0; j < nissued; j++)
    if (issued[j].wg == wg && (u32)issued[j].group < below) wg_execute(&issued[j]);
    else {
      if (k != j) issued[k] = issued[j];
      k++;
    }
  nissued = k;
  k = 0;
  for (int j = 0; j < nsums; j++) {
    Sum *p = &sums[j];
    if (p->wg == wg && (u32)p->group < below) {
      memcpy((u32 *)(R + p->off) + wg * 128, p->val, 512);
      accumulates[RI(p->off)] &= ~bit;
      naccumulating--;
    } else {
      if (k != j) sums[k] = *p;
      k++;
    }
  }
  nsums = k;
  k = 0;
  for (int j = 0; j < nreads; j++) {
    Read *p = &reads[j];
    if (p->wg == wg && (u32)p->group < below) {
      async_reads[p->chunk]--;
      if (chk)
        for (u32 g = p->chunk << 4 >> granule; g <= ((p->chunk << 4) + 15) >> granule; g++) {
          gtouch(g);
          for (int w = wg * 4; w < wg * 4 + 4; w++) last_reads[(u64)g * NW + w] = clocks[w][w] << 6 | WAITED;
        }
    } else {
      if (k != j) reads[k] = *p;
      k++;
    }
  }
  nreads = k;
  k = 0;
  for (int j = 0; j < nfeeding; j++)
    if (feeding[j].wg == wg && (u32)feeding[j].group < below) feeds_a[RI(feeding[j].off)] &= ~bit;
    else {
      if (k != j) feeding[k] = feeding[j];
      k++;
    }
  nfeeding = k;
}
