/* Instructions that access memory. */
#pragma once
#include "global.h"
#include "shared.h"

/* ---------------------------------------------------------------- memory instructions */
static void op_ldst(const Ins *I, const u32 *M, int space, int store) {
  /* i0: element bytes, i1: elements, i2: register width, i3: sign-extend, i4: cache (1 bypass L1); A: address, offset,
   * registers */
  const int eb = I->i0, nv = I->i1, rw = I->i2;
  const u32 W = eb * nv;
  const i64 off = A(1);
  Cnt *c = L->cnt + pc;
  for (int w = 0; w < NW; w++) {
    u32 m = M[w];
    if (!m) continue;
    u64 ga[32];
    u32 sa[32];
    u8 buf[32];
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) {
        int t = w * 32 + l;
        u64 a = space ? (u32)(((u32 *)(R + A(0)))[t] + off) : ((u64 *)(R + A(0)))[t] + off;
        u8 *p;
        if (space == 0) {
          if (a % W) fail(E_ALIGN, t, a, "global address is no multiple of %u", W);
          Range *r = grange(a, W, t, store ? "store" : "load");
          if (store) g_write(r, a, W, t);
          else g_read(r, a, W, t);
          ga[l] = a;
          p = (u8 *)a;
        } else {
          u32 o = soff(a, W, t);
          sa[l] = o;
          p = shared_memory + o;
        }
        if (store) {
          for (int v = 0; v < nv; v++) {
            u64 x = reg_get(A(2 + v), rw, t);
            memcpy(buf + v * eb, &x, eb);
          }
          if (space) {
            sh_write(sa[l], W, w, l, buf, S_OK);
            proxy_note(sa[l], W, w);
          }
          memcpy(p, buf, W);
        } else {
          if (space) sh_read(sa[l], W, w, l);
          for (int v = 0; v < nv; v++) {
            u64 x = 0;
            memcpy(&x, p + v * eb, eb);
            if (I->i3 && eb < 8 && (x >> (8 * eb - 1) & 1)) x |= ~0ull << (8 * eb);
            reg_set(A(2 + v), rw, t, x);
          }
        }
      }
    c->req++;
    c->bytes += (u64)popc(m) * W;
    if (space == 0) {
      u64 list[128];
      int n = sectors_of(ga, m, W, list);
      c->sectors += n;
      c->miss += store || I->i4 ? n : l1_access(list, n, 1);
    } else {
      int ideal = 0;
      c->wf += bank_waves(sa, m, W, &ideal);
      c->wf_ideal += ideal;
    }
  }
}
static void op_ldparam(const Ins *I, const u32 *M) {
  const int eb = I->i0, nv = I->i1, rw = I->i2;
  for (int v = 0; v < nv; v++) {
    if (A(0) + (v + 1) * eb > L->parambytes) fail(E_GLOBAL, 0, A(0), "parameter past the end");
    u64 x = 0;
    memcpy(&x, L->params + A(0) + v * eb, eb);
    if (I->i3 && eb < 8 && (x >> (8 * eb - 1) & 1)) x |= ~0ull << (8 * eb);
    for (int w = 0; w < NW; w++)
      if (M[w])
        for (int l = 0; l < 32; l++)
          if (M[w] >> l & 1) reg_set(A(1 + v), rw, w * 32 + l, x);
  }
}
static void op_cpasync(const Ins *I, const u32 *M) {
  /* i0: cp-size, i1: bypass L1, i2: has src-size; A: dst, dst offset, src, src offset, src-size or ignore */
  const u32 W = I->i0;
  Cnt *c = L->cnt + pc;
  for (int w = 0; w < NW; w++) {
    u32 m = M[w];
    if (!m) continue;
    u64 ga[32];
    u32 sa[32], gm = 0;
    u32 gw = 0;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) {
        int t = w * 32 + l;
        u32 o = soff(((u32 *)(R + A(0)))[t] + A(1), W, t), n = W;
        sa[l] = o;
        if (I->i2 == 1) n = ((u32 *)(R + A(4)))[t];
        if (I->i2 == 2 && ((u8 *)(R + A(4)))[t]) n = 0;
        if (n > W) fail(E_GLOBAL, t, 0, "cp.async: src-size %u of %u", n, W);
        GROW(copies[w], ncopies[w], copiescap[w]);
        Cp *q = &copies[w][ncopies[w]++];
        q->dst = o;
        q->n = W;
        q->lane = l;
        q->group = ~0u;
        memset(q->data, 0, 16);
        u64 a = ((u64 *)(R + A(2)))[t] + A(3);
        if (n) {
          if (a % W) fail(E_ALIGN, t, a, "cp.async: global address is no multiple of %u", W);
          g_read(grange(a, n, t, "cp.async"), a, n, t);
          memcpy(q->data, (u8 *)a, n);
          ga[l] = a;
          gm |= 1u << l;
          gw = n;
        }
        if (chk) { /* the bytes are anyone's from here to the wait */
          sh_write(o, W, w, l, 0, S_CP);
          memset(shared_memory + o, 0xff, W);
        }
      }
    c->req++;
    c->bytes += (u64)popc(gm) * (gw ? gw : W);
    c->touched += (u64)popc(m) * W;
    u64 list[128];
    int n = gm ? sectors_of(ga, gm, gw, list) : 0;
    c->sectors += n;
    c->miss += I->i1 ? n : l1_access(list, n, 1);
    int ideal = 0;
    c->wf += bank_waves(sa, m, W, &ideal);
    c->wf_ideal += ideal;
  }
}

static void op_ldmatrix(const Ins *I, const u32 *M, int store) {
  /* i0: matrices, i1: trans; A: address, offset, registers */
  const int n = I->i0, trans = I->i1;
  Cnt *c = L->cnt + pc;
  whole(M, store ? "stmatrix" : "ldmatrix");
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      u32 sa[32];
      u16 mat[4][8][8];
      for (int l = 0; l < 8 * n; l++) {
        int t = w * 32 + l;
        sa[l] = soff(((u32 *)(R + A(0)))[t] + A(1), 16, t);
        if (!store) {
          sh_read(sa[l], 16, w, ALL);
          memcpy(mat[l / 8][l % 8], shared_memory + sa[l], 16);
        }
      }
      for (int k = 0; k < n; k++)
        for (int l = 0; l < 32; l++) {
          u32 *r = (u32 *)(R + A(2 + k)) + w * 32 + l;
          u16 *x = trans ? &mat[k][(l & 3) * 2][l >> 2] : &mat[k][l >> 2][(l & 3) * 2], *y = trans ? x + 8 : x + 1;
          if (store) {
            *x = *r & 0xffff;
            *y = *r >> 16;
          } else *r = (u32)*x | (u32)*y << 16;
        }
      if (store)
        for (int l = 0; l < 8 * n; l++) {
          sh_write(sa[l], 16, w, ALL, (u8 *)mat[l / 8][l % 8], S_OK);
          proxy_note(sa[l], 16, w);
          memcpy(shared_memory + sa[l], mat[l / 8][l % 8], 16);
        }
      int ideal = 0;
      c->req++;
      c->bytes += 128 * n;
      c->wf += bank_waves(sa, n == 4 ? ~0u : (1u << 8 * n) - 1, 16, &ideal);
      c->wf_ideal += ideal;
    }
}

/* ---------------------------------------------------------------- TMA */
static const TMap *tmap_of(u64 addr, int t) {
  u64 rec[2], at = addr - PARAM_BASE;
  if (addr < PARAM_BASE || at + 128 > (u64)L->parambytes) fail(E_TMA, t, addr, "tensor map is no kernel parameter");
  if (at % 64) fail(E_TMA, t, addr, "tensor map is not aligned");
  memcpy(rec, L->params + at, 16);
  if (rec[0] != 0x50414d545f475321ull || rec[1] >= (u64)L->ntmaps) fail(E_TMA, t, addr, "no tensor map there");
  return &L->tmaps[rec[1]];
}
static void op_tma(const Ins *I, const u32 *M, int store) {
  /* load: A: dst, off, map, mbar, off, coords..; store: A: src, off, map, coords..; i0: rank */
  Cnt *c = L->cnt + pc;
  int rank = I->i0, first = store ? 3 : 5;
  for (int w = 0; w < NW; w++)
    if (M[w])
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) {
          int t = w * 32 + l;
          const TMap *m = tmap_of(((u64 *)(R + A(2)))[t], t);
          if (m->rank != rank) fail(E_TMA, t, 0, "tensor map of rank %d, instruction of rank %d", m->rank, rank);
          u32 a = ((u32 *)(R + A(0)))[t] + A(1), off = soff(a, 16, t), bytes = m->elem;
          i32 co[5] = {0};
          if (a % 128) fail(E_TMA, t, a, "shared address of a TMA box is no multiple of 128");
          if (m->swizzle && a % (m->swizzle == 3 ? 1024 : m->swizzle == 2 ? 512 : 256))
            fail(E_TMA, t, a, "shared address of a box with swizzle %d is no multiple of its pattern", m->swizzle);
          for (int i = 0; i < rank; i++) {
            bytes *= m->box[i];
            co[i] = ((i32 *)(R + A(first + i)))[t];
          }
          if (off + bytes > shared_size)
            fail(E_SHARED, t, a, "TMA box of %u bytes past the end of shared memory", bytes);
          u32 inner = m->box[0] * m->elem;
          c->req++;
          c->bytes += bytes;
          if (store) {
            for (u32 j = 0; j < bytes; j += 16) {
              u32 at = box_at(off, j, m->swizzle), n = bytes - j < 16 ? bytes - j : 16;
              sh_async_read(at, n, w, 1);
              proxy_check(at, n, w);
              if (chk) async_reads[at >> 4]++;
            }
            GROW(stores, nstores, storescap);
            Bulk *b = &stores[nstores++];
            b->src = off;
            b->bytes = bytes;
            b->map = m;
            memcpy(b->c, co, sizeof co);
            b->w = w;
            b->group = ~0u;
            continue;
          }
          Mbar *mb = mbar_at(((u32 *)(R + A(3)))[t] + A(4), t);
          GROW(loads, nloads, loadscap);
          Tma *q = &loads[nloads++];
          q->mbar = mb->addr;
          q->dst = off;
          q->bytes = bytes;
          q->map = m;
          q->clock = ++tclock;
          q->data = malloc(bytes);
          u32 rows = bytes / inner;
          for (u32 r = 0; r < rows; r++) {
            u32 x = r;
            i64 in = 1;
            u64 g = m->base;
            for (int i = 1; i < rank; i++) {
              i64 p = (i64)co[i] + x % m->box[i];
              x /= m->box[i];
              if (p < 0 || p >= (i64)m->dim[i]) in = 0;
              g += p * m->stride[i];
            }
            u8 *d = q->data + (u64)r * inner;
            i64 lo = co[0] < 0 ? -(i64)co[0] : 0, hi = (i64)m->dim[0] - co[0];
            if (hi > m->box[0]) hi = m->box[0];
            if (!in || hi <= lo) { lo = hi = 0; }
            if (m->fill)
              for (u32 e = 0; e < inner; e += 2) {
                d[e] = 0xff;
                d[e + 1] = 0x7f;
              }
            else memset(d, 0, inner);
            if (hi > lo) {
              u64 s = g + (co[0] + lo) * m->elem;
              u32 n = (hi - lo) * m->elem;
              Range *rg = grange(s, n, t, "TMA load");
              g_read(rg, s, n, t);
              memcpy(d + lo * m->elem, (u8 *)s, n);
              int sec = (int)(((s + n - 1) >> 5) - (s >> 5) + 1);
              c->sectors += sec;
              c->miss += sec;
              c->touched += n;
            }
          }
          if (chk)
            for (u32 j = 0; j < bytes; j += 16) {
              u32 at = box_at(off, j, m->swizzle), n = bytes - j < 16 ? bytes - j : 16;
              sh_write(at, n, w, l, 0, S_TMA);
              proxy_clean(at, n);
              memset(shared_memory + at, 0xff, n);
            }
        }
}
static void bulk_complete(int w, u32 below, int read_only) {
  int k = 0;
  for (int i = 0; i < nstores; i++) {
    Bulk *b = &stores[i];
    if (b->w != w || b->group >= below) {
      if (k != i) stores[k] = *b;
      k++;
      continue;
    }
    const TMap *m = b->map;
    u32 inner = m->box[0] * m->elem;
    u8 *row = malloc(inner);
    for (u32 r = 0; r < b->bytes / inner; r++) {
      u32 x = r;
      int in = 1;
      u64 g = m->base;
      for (int i2 = 1; i2 < m->rank; i2++) {
        i64 p = (i64)b->c[i2] + x % m->box[i2];
        x /= m->box[i2];
        if (p < 0 || p >= (i64)m->dim[i2]) in = 0;
        g += p * m->stride[i2];
      }
      for (u32 j = 0; j < inner; j += 16)
        memcpy(row + j, shared_memory + box_at(b->src, r * inner + j, m->swizzle), inner - j < 16 ? inner - j : 16);
      i64 lo = b->c[0] < 0 ? -(i64)b->c[0] : 0, hi = (i64)m->dim[0] - b->c[0];
      if (hi > m->box[0]) hi = m->box[0];
      if (!in || hi <= lo) continue;
      u64 d = g + (b->c[0] + lo) * m->elem;
      u32 n = (hi - lo) * m->elem;
      Range *rg = grange(d, n, w * 32, "TMA store");
      g_write(rg, d, n, w * 32);
      memcpy((u8 *)d, row + lo * m->elem, n);
    }
    free(row);
    if (chk)
      for (u32 j = 0; j < b->bytes; j += 16) {
        u32 at = box_at(b->src, j, m->swizzle);
        async_reads[at >> 4]--;
      }
  }
  nstores = k;
  (void)read_only;
}

static void op_atom(const Ins *I, const u32 *M) {
  /* i0: op 0 add 1 exch 2 cas 3 min 4 max 5 and 6 or 7 xor; i1: type 0 u32 1 s32 2 u64 3 f32 4 s64; i2: shared; A: d or
   * -1, address, offset, b, c */
  int W = I->i1 == 2 || I->i1 == 4 ? 8 : 4;
  Cnt *c = L->cnt + pc;
  for (int w = 0; w < NW; w++)
    if (M[w]) {
      c->req++;
      for (int l = 0; l < 32; l++)
        if (M[w] >> l & 1) {
          int t = w * 32 + l;
          u64 a = (I->i2 ? ((u32 *)(R + A(1)))[t] : ((u64 *)(R + A(1)))[t]) + A(2);
          u8 *p;
          if (I->i2) p = shared_memory + soff(a, W, t);
          else {
            if (a % W) fail(E_ALIGN, t, a, "atomic at no multiple of %d", W);
            Range *r = grange(a, W, t, "atomic");
            u64 lo = r->lo & ~31ull;
            setbit(r->rsec, (a - lo) >> 5);
            setbit(r->wsec, (a - lo) >> 5);
            p = (u8 *)a;
          }
          u64 old = 0, b = reg_get(A(3), W, t), n = 0;
          memcpy(&old, p, W);
          c->bytes += W;
          switch (I->i0) {
            case 0:
              if (I->i1 == 3) n = f2u(u2f(old) + u2f(b));
              else n = old + b;
              break;
            case 1: n = b; break;
            case 2: n = old == b ? reg_get(A(4), W, t) : old; break;
            case 3:
              n = I->i1 == 1   ? ((i32)b < (i32)old ? b : old)
                  : I->i1 == 4 ? ((i64)b < (i64)old ? b : old)
                               : (b < old ? b : old);
              break;
            case 4:
              n = I->i1 == 1   ? ((i32)b > (i32)old ? b : old)
                  : I->i1 == 4 ? ((i64)b > (i64)old ? b : old)
                               : (b > old ? b : old);
              break;
            case 5: n = old & b; break;
            case 6: n = old | b; break;
            default: n = old ^ b;
          }
          memcpy(p, &n, W);
          if (A(0) >= 0) reg_set(A(0), W, t, old);
          if (I->i2 && chk) {
            u32 o = a - SBASE;
            for (u32 g = o >> granule; g <= (o + W - 1) >> granule; g++) state_of[g] = S_OK;
          }
        }
    }
}
