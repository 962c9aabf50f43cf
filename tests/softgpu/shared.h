/* Shared memory: its bytes, who wrote and read them when, copies in flight, and what accesses of banks cost. */
#pragma once
#include "state.h"

/* ---------------------------------------------------------------- shared memory */
static u8 *shared_memory;
static u32 shared_size; /* bytes */
static u8 *state_of;
static u32 *touch, *last_write, *last_reads;
static u8 *async_reads; /* per granule, infl per 16 bytes */
static u32 granule, generation;
static u32 clocks[32][32], fences[32];
enum { S_NONE = 0, S_OK = 1, S_CP = 2, S_TMA = 3, S_MBAR = 4 };

static inline void gtouch(u32 g) {
  if (touch[g] != generation) {
    touch[g] = generation;
    last_write[g] = 0;
    memset(last_reads + (u64)g * NW, 0, 4 * NW);
  }
}
static inline u32 soff(u64 addr, u32 W, int t) {
  if (addr % W) fail(E_ALIGN, t, addr, "shared address is no multiple of %u", W);
  if (addr < SBASE || addr + W > (u64)SBASE + shared_size)
    fail(E_SHARED, t, addr, "shared access of %u bytes at offset %lld of %u allocated", W, (long long)(addr - SBASE),
         shared_size);
  return (u32)(addr - SBASE);
}
static const char *state_name(int s) {
  return s == S_NONE  ? "never written"
         : s == S_CP  ? "with a cp.async in flight"
         : s == S_TMA ? "with a TMA load in flight"
                      : "of an mbarrier";
}
static void race(const char *what, int w, int lane, u32 off, u32 other_w, u32 other_l) {
  soft(E_RACE, w * 32 + (lane & 31), SBASE + off,
       "shared-memory race: %s by warp %d%s, not ordered with that of warp %u lane %d%s, at offset %u", what, w,
       lane == ALL ? " (all lanes)" : "", other_w, other_l >= WAITED ? -1 : (int)other_l,
       other_w == ASY ? " (TMA)" : "", off);
}
static inline void sh_read(u32 off, u32 W, int w, int lane) {
  if (!chk) return;
  for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++) {
    if (state_of[g] != S_OK)
      soft(state_of[g] == S_NONE ? E_UNINIT : E_INFLIGHT, w * 32 + (lane & 31), SBASE + off,
           "read of shared bytes %s, at offset %u", state_name(state_of[g]), g << granule);
    gtouch(g);
    u32 x = last_write[g], me = clocks[w][w];
    if (x) {
      u32 ww = (x >> 6) & 31, wl = x & 63, c = x >> 11;
      if (ww == (u32)w) {
        if ((wl != (u32)lane) && c >= me) race("read", w, lane, g << granule, ww, wl);
      } else if (c > clocks[w][ww]) race("read", w, lane, g << granule, ww, wl);
    }
    u32 *r = last_reads + (u64)g * NW + w, l = lane;
    if ((*r >> 6) == me && (*r & 63) != (u32)lane) l = ALL;
    *r = me << 6 | l;
  }
}
static inline void sh_write(u32 off, u32 W, int w, int lane, const u8 *data, int state) {
  if (!chk) return;
  for (u32 c = off >> 4; c <= (off + W - 1) >> 4; c++)
    if (async_reads[c])
      soft(E_OVERWRITE, w * 32 + (lane & 31), SBASE + off,
           "write to shared bytes that a wgmma or bulk store in flight reads, at offset %u", off);
  u32 me = w < NW ? clocks[w][w] : 1;
  for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++) {
    if (state_of[g] > S_OK)
      fail(E_INFLIGHT, w * 32 + (lane & 31), SBASE + off, "write to shared bytes %s, at offset %u",
           state_name(state_of[g]), g << granule);
    gtouch(g);
    u32 x = last_write[g];
    if (x) {
      u32 ww = (x >> 6) & 31, wl = x & 63, c = x >> 11;
      int bad = 0;
      if (ww == (u32)w) bad = (wl != (u32)lane) && c >= me;
      else bad = c > clocks[w][ww];
      if (bad) {
        u32 a = g << granule, b = a + (1u << granule);
        if (a < off) a = off;
        if (b > off + W) b = off + W;
        if (!data || memcmp(shared_memory + a, data + (a - off), b - a)) race("write", w, lane, g << granule, ww, wl);
      }
    }
    const u32 *r = last_reads + (u64)g * NW;
    for (int q = 0; q < NW; q++)
      if (r[q]) {
        u32 c = r[q] >> 6, l = r[q] & 63;
        if (l == WAITED && q >> 2 == w >> 2) continue; /* the wait ends the wgmma for all of the warpgroup */
        if (q == w) {
          if (l != (u32)lane && c >= me) race("write after read", w, lane, g << granule, q, l);
        } else if (c > clocks[w][q]) race("write after read", w, lane, g << granule, q, l);
      }
    last_write[g] = me << 11 | (u32)w << 6 | (u32)lane;
    state_of[g] = state;
  }
}
/* A read by the async proxy (wgmma, bulk store) for warps [w, w + n): ordered, written, and fenced. */
static inline void sh_async_read(u32 off, u32 W, int w, int n) {
  if (!chk) return;
  for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++) {
    if (state_of[g] != S_OK)
      soft(state_of[g] == S_NONE ? E_UNINIT : E_INFLIGHT, w * 32, SBASE + off,
           "read by the async proxy of shared bytes %s, at offset %u", state_name(state_of[g]), g << granule);
    u32 x = last_write[g];
    if (touch[g] == generation && x) {
      u32 ww = (x >> 6) & 31, c = x >> 11;
      for (int q = w; q < w + n; q++)
        if (ww != (u32)q && c > clocks[q][ww]) race("read by the async proxy", q, ALL, g << granule, ww, x & 63);
    }
  }
}
static u32 *generic_write;
static u32 *written_at; /* per granule: generic writer + 1 and its fence count; global event number of the write */
static u32 event, last_fence[32];
static inline void proxy_note(u32 off, u32 W, int w) {
  if (!chk) return;
  for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++) {
    generic_write[g] = (u32)(w + 1) << 24 | (fences[w] & 0xffffff);
    written_at[g] = event;
  }
}
static inline void proxy_check(u32 off, u32 W, int w) {
  if (!chk) return;
  for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++)
    if (generic_write[g]) {
      int ww = (generic_write[g] >> 24) - 1;
      u32 count = generic_write[g] & 0xffffff;
      int ok = (fences[ww] & 0xffffff) != count; /* the writer fenced since */
      ok |= last_fence[w] > written_at[g];       /* the reader fenced after a barrier since */
      if (!ok)
        soft(E_PROXY, w * 32, SBASE + off,
             "the async proxy reads shared bytes that warp %d wrote without a fence.proxy.async since, at offset %u",
             ww, g << granule);
    }
}
static inline void proxy_clean(u32 off, u32 W) {
  if (chk)
    for (u32 g = off >> granule; g <= (off + W - 1) >> granule; g++) generic_write[g] = 0;
}

static int bank_waves(const u32 *a, u32 m, u32 W, int *ideal) {
  int total = 0, best = 0, group = W <= 4 ? 32 : W == 8 ? 16 : 8;
  for (int g = 0; g < 32; g += group) {
    u32 sub = group == 32 ? m : (m >> g) & ((1u << group) - 1);
    if (!sub) continue;
    u8 n[32];
    u32 words[32][32];
    memset(n, 0, 32);
    int most = 0, distinct = 0;
    for (int l = 0; l < group; l++)
      if (sub >> l & 1)
        for (u32 b = 0; b < (W < 4 ? 4 : W); b += 4) {
          u32 word = (a[g + l] + b) >> 2, k = word & 31;
          int i;
          for (i = 0; i < n[k]; i++)
            if (words[k][i] == word) break;
          if (i == n[k]) {
            words[k][n[k]++] = word;
            distinct++;
            if (n[k] > most) most = n[k];
          }
        }
    total += most;
    best += (distinct + 31) / 32;
  }
  *ideal += best;
  return total;
}

/* ---------------------------------------------------------------- cp.async */
typedef struct {
  u32 dst, group;
  u8 n, lane;
  u8 data[16];
} Cp;
static Cp *copies[MAXW];
static u32 ncopies[MAXW], copiescap[MAXW], committed[MAXW];
static void cp_complete(int w, u32 below) {
  u32 k = 0;
  for (u32 i = 0; i < ncopies[w]; i++) {
    Cp *c = &copies[w][i];
    if (c->group >= below) {
      if (k != i) copies[w][k] = *c;
      k++;
      continue;
    }
    memcpy(shared_memory + c->dst, c->data, c->n);
    if (chk) {
      u32 me = clocks[w][w];
      for (u32 g = c->dst >> granule; g <= (c->dst + c->n - 1) >> granule; g++) {
        gtouch(g);
        state_of[g] = S_OK;
        last_write[g] = me << 11 | (u32)w << 6 | c->lane;
      }
      proxy_note(c->dst, c->n, w);
    }
  }
  ncopies[w] = k;
}

/* ---------------------------------------------------------------- mbarriers and TMA */
typedef struct {
  u32 addr;
  i32 count, pending;
  i64 tx;
  u32 phase;
  u32 v[32], done[32];
} Mbar;
static Mbar mbars[64];
static int nmbars;
typedef struct {
  u32 mbar, dst, bytes, clock;
  u8 *data;
  const TMap *map;
} Tma;
static Tma *loads;
static int nloads, loadscap;
static u32 tclock;
typedef struct {
  u32 src, bytes;
  const TMap *map;
  i32 c[5];
  int w;
  u32 group;
} Bulk;
static Bulk *stores;
static int nstores, storescap;
static u32 stores_committed[MAXW];
static Mbar *mbar_at(u64 addr, int t) {
  u32 off = soff(addr, 8, t);
  for (int i = 0; i < nmbars; i++)
    if (mbars[i].addr == off) return &mbars[i];
  fail(E_MBAR, t, addr, "no mbarrier was initialised at offset %u", off);
  return 0;
}
static void mbar_check(Mbar *b) {
  if (b->pending == 0 && b->tx == 0) {
    b->phase++;
    b->pending = b->count;
    memcpy(b->done, b->v, sizeof b->v);
  }
}
static inline u32 swz(u32 a, int mode) {
  return mode == 1 ? a ^ ((a >> 3) & 0x10) : mode == 2 ? a ^ ((a >> 3) & 0x30) : mode == 3 ? a ^ ((a >> 3) & 0x70) : a;
}
/* absolute shared address of byte `i` of a box lying at `dst`: swizzles work on address bits */
static inline u32 box_at(u32 dst, u32 i, int mode) { return swz(SBASE + dst + i, mode) - SBASE; }
static void tma_deliver(Mbar *b) {
  int k = 0;
  for (int i = 0; i < nloads; i++) {
    Tma *q = &loads[i];
    if (q->mbar != b->addr) {
      if (k != i) loads[k] = *q;
      k++;
      continue;
    }
    for (u32 j = 0; j < q->bytes; j += 16) {
      u32 n = q->bytes - j < 16 ? q->bytes - j : 16, at = box_at(q->dst, j, q->map->swizzle);
      memcpy(shared_memory + at, q->data + j, n);
      if (chk)
        for (u32 g = at >> granule; g <= (at + n - 1) >> granule; g++) {
          gtouch(g);
          state_of[g] = S_OK;
          last_write[g] = q->clock << 11 | ASY << 6 | ALL;
          generic_write[g] = 0;
        }
    }
    b->tx -= q->bytes;
    if (b->v[ASY] < q->clock) b->v[ASY] = q->clock;
    free(q->data);
  }
  nloads = k;
  mbar_check(b);
}
