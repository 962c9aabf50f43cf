/* Global memory: the ranges that were passed, who wrote and read them, sectors, and an estimate of L1. */
#pragma once
#include "state.h"

/* ---------------------------------------------------------------- global memory */
static Range *last;
static Range *owned(Range *r, u64 a, u32 W, int t, const char *what) {
  if (r->own) {
    const u8 *gap = memchr(r->own + (a - r->lo), 0, W);
    if (gap)
      soft(E_GAP, t, a, "global %s of %u bytes, some of no element of the views passed: argument %llu, byte %lld", what,
           W, (unsigned long long)r->name, (long long)(gap - r->own));
  }
  return last = r;
}
static Range *grange(u64 a, u32 W, int t, const char *what) {
  Range *r = last;
  if (r && a >= r->lo && a + W <= r->hi) return owned(r, a, W, t, what);
  for (int i = 0; i < L->nranges; i++) {
    r = &L->ranges[i];
    if (a >= r->lo && a + W <= r->hi) return owned(r, a, W, t, what);
  }
  Range *near = 0;
  u64 best = ~0ull;
  for (int i = 0; i < L->nranges; i++) {
    r = &L->ranges[i];
    u64 d = a < r->lo ? r->lo - a : a + W - r->hi;
    if (d < best) best = d, near = r;
  }
  if (near)
    fail(E_GLOBAL, t, a,
         "global %s of %u bytes outside all tensors passed; nearest: argument %llu, %lld bytes from its start, of %llu",
         what, W, (unsigned long long)near->name, (long long)(a - near->lo), (unsigned long long)(near->hi - near->lo));
  fail(E_GLOBAL, t, a, "global %s of %u bytes, but no tensors were passed", what, W);
  return 0;
}
static inline void setbit(u64 *v, u64 i) { v[i >> 6] |= 1ull << (i & 63); }
static inline void g_read(Range *r, u64 a, u32 W, int t) {
  u64 lo = r->lo & ~31ull;
  for (u64 s = (a - lo) >> 5; s <= (a + W - 1 - lo) >> 5; s++) setbit(r->rsec, s);
  if (r->wr) {
    u32 me = cta + 1;
    for (u64 g = (a - lo) >> L->global_granule; g <= (a + W - 1 - lo) >> L->global_granule; g++) {
      if (r->wr[g] && r->wr[g] != me)
        fail(E_GRACE, t, a, "global race: CTA %d reads what CTA %u wrote in the same launch (argument %llu, byte %llu)",
             cta, r->wr[g] - 1, (unsigned long long)r->name, (unsigned long long)(a - r->lo));
      r->rd[g] = r->rd[g] && r->rd[g] != me ? ~0u : me;
    }
  }
}
static inline void g_write(Range *r, u64 a, u32 W, int t) {
  u64 lo = r->lo & ~31ull;
  for (u64 s = (a - lo) >> 5; s <= (a + W - 1 - lo) >> 5; s++) setbit(r->wsec, s);
  if (r->wr) {
    u32 me = cta + 1;
    for (u64 g = (a - lo) >> L->global_granule; g <= (a + W - 1 - lo) >> L->global_granule; g++) {
      if (r->wr[g] && r->wr[g] != me)
        fail(E_GRACE, t, a, "global race: CTAs %u and %d write the same byte (argument %llu, byte %llu)", r->wr[g] - 1,
             cta, (unsigned long long)r->name, (unsigned long long)(a - r->lo));
      if (r->rd[g] && r->rd[g] != me)
        fail(E_GRACE, t, a, "global race: CTA %d writes what another CTA reads (argument %llu, byte %llu)", cta,
             (unsigned long long)r->name, (unsigned long long)(a - r->lo));
      r->wr[g] = me;
    }
  }
}
static int sectors_of(const u64 *a, u32 m, u32 W, u64 *list) {
  int n = 0;
  for (int l = 0; l < 32; l++)
    if (m >> l & 1)
      for (u64 s = a[l] >> 5; s <= (a[l] + W - 1) >> 5; s++) {
        int i;
        for (i = n - 1; i >= 0; i--)
          if (list[i] == s) break;
        if (i < 0) list[n++] = s;
      }
  return n;
}
/* L1: 128-byte lines of 4 sectors, 4 ways, least recently used; one CTA at a time has its share. */
typedef struct {
  u64 tag;
  u32 used;
  u32 valid;
} Line;
static Line *l1;
static int l1sets;
static u32 l1tick;
static int l1_access(const u64 *list, int n, int allocate) {
  int miss = 0;
  if (!l1sets) return n;
  for (int i = 0; i < n; i++) {
    u64 line = list[i] >> 2;
    u32 bit = 1u << (list[i] & 3);
    Line *s = l1 + 4 * ((line ^ (line >> 7)) % l1sets), *v = s;
    int k;
    for (k = 0; k < 4; k++)
      if (s[k].valid && s[k].tag == line) break;
    if (k == 4) {
      miss++;
      if (!allocate) continue;
      for (k = 0; k < 4; k++)
        if (!s[k].valid || s[k].used < v->used) {
          v = &s[k];
          if (!s[k].valid) break;
        }
      v->tag = line;
      v->valid = bit;
      v->used = ++l1tick;
    } else {
      if (!(s[k].valid & bit)) {
        miss++;
        s[k].valid |= bit;
      }
      s[k].used = ++l1tick;
    }
  }
  return miss;
}
