/* What the machine is made of: instructions, the launch, threads, registers; and how faults end or go on. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "alu.h"
#include "ops.h"

#define MOST_BRANCHES 200000000ull /* of one run of threads: then the loop does not end */
#define MAXW 31                    /* warps of a CTA */
#define ASY 31                     /* the async proxy, as a writer */
#define ALL 63                     /* a whole warp, as a lane */
#define WAITED 62                  /* a whole warpgroup that waited for its wgmma, as a lane of each of its warps */

typedef struct {
  i32 op, guard, gneg, target, arg, nargs, chk, nd, nr, flags, i0, i1, i2, i3, i4, line, rank;
} Ins; /* rank: threads elsewhere that are to run before it have a lower one */
enum { F_LEADER = 1, F_WGREG = 2, F_LAST = 4 };

typedef struct {
  u64 issues, req, bytes, sectors, miss, wf, wf_ideal, touched;
} Cnt;
typedef struct {
  u64 lo, hi;
  u32 *wr, *rd;
  u64 *rsec, *wsec;
  const u8 *own;
  u64 name;
} Range; /* own: of each byte, whether an element has it */
typedef struct {
  u64 base;
  i32 rank, elem, swizzle, fill;
  u64 dim[5], stride[5];
  i32 box[5];
  i32 pad;
} TMap;
typedef struct {
  i32 code, pc, thread, cta;
  u64 addr;
  char msg[512];
} Err;
typedef struct {
  Err first;
  u64 count;
} Finding;
typedef void (*Alu)(u8 *, const i64 *, const u32 *, int);
typedef struct {
  const Ins *prog;
  const i64 *pool;
  i32 nins, threads;
  i64 regbytes;
  const i64 *consts;
  i32 nconsts, shared;
  const u8 *params;
  i32 parambytes, granule, global_granule, nranges;
  Range *ranges;
  TMap *tmaps;
  i32 ntmaps;
  i32 grid[3];
  const i64 *ctas;
  const u8 *checked;
  i64 nctas;
  Cnt *cnt;
  Err *err;
  i32 l1_bytes;
  i32 special;
  Alu *alu;
  u32 soft;
  i32 nfindings;
  Finding *findings;
  i32 late;
} Launch;

static Launch *L;
static jmp_buf out;
static u8 *R; /* register file */
static int T, NW;
static u32 active[MAXW]; /* active lanes of the group that runs */
static u32 tailmask;
static int nact, full, pc, chk;
static int cta;
static i32 ctaid[3];
static i32 *thread_pc;
static u8 *thread_state;                   /* per thread: pc, state */
enum { RUN = 0, DONE = 255, YIELD = 254 }; /* else 1 + barrier it waits at */
#define PARAM_BASE 0x40000000ull /* parameters have addresses from here on, of which only tensor maps are read */
#define SBASE 0x400u                       /* shared addresses begin here */

/* ---------------------------------------------------------------- errors */
static void fail(int code, int thread, u64 addr, const char *fmt, ...) {
  Err *e = L->err;
  e->code = code;
  e->pc = pc;
  e->thread = thread;
  e->cta = cta;
  e->addr = addr;
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(e->msg, sizeof e->msg, fmt, ap);
  va_end(ap);
  longjmp(out, 1);
}
/* A fault after which the program can go on; L->soft has a bit for each code that is only noted, once an instruction.
 */
static void soft(int code, int thread, u64 addr, const char *fmt, ...) {
  Err e;
  e.code = code;
  e.pc = pc;
  e.thread = thread;
  e.cta = cta;
  e.addr = addr;
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(e.msg, sizeof e.msg, fmt, ap);
  va_end(ap);
  if (!(L->soft >> code & 1)) {
    *L->err = e;
    longjmp(out, 1);
  }
  for (int i = 0; i < L->nfindings; i++)
    if (L->findings[i].first.pc == pc && L->findings[i].first.code == code) {
      L->findings[i].count++;
      return;
    }
  if (L->nfindings < 64) {
    L->findings[L->nfindings].first = e;
    L->findings[L->nfindings++].count = 1;
  }
}
enum {
  E_UNIMPL = 1,
  E_GLOBAL,
  E_ALIGN,
  E_SHARED,
  E_UNINIT,
  E_RACE,
  E_BARRIER,
  E_INFLIGHT,
  E_GRACE,
  E_MBAR,
  E_PROXY,
  E_WGMMA,
  E_DIVERGE,
  E_LIMIT,
  E_TMA,
  E_REGISTER,
  E_OVERWRITE,
  E_GAP
};

/* ---------------------------------------------------------------- operands */
#define A(i) (pool[I->arg + (i)])
#define REG(type, i) ((type *)(R + A(i)))
static const i64 *pool;
static inline u32 popc(u32 x) { return __builtin_popcount(x); }
/* The lanes whose predicate, a byte of 0 or 1, is set: the product gathers the low bits of 8 bytes in the highest. */
static inline u32 predmask(const u8 *p, int w) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u64 v;
    memcpy(&v, p + 32 * w + 8 * i, 8);
    r |= (u32)(v * 0x0102040810204080ull >> 56) << 8 * i;
  }
  return r;
}
static inline u32 lanes(int w) { return w == NW - 1 ? tailmask : 0xffffffffu; }
static inline u64 reg_get(i64 off, int width, int t) {
  switch (width) {
    case 1: return ((u8 *)(R + off))[t];
    case 2: return ((u16 *)(R + off))[t];
    case 4: return ((u32 *)(R + off))[t];
    default: return ((u64 *)(R + off))[t];
  }
}
static inline void reg_set(i64 off, int width, int t, u64 v) {
  switch (width) {
    case 1: ((u8 *)(R + off))[t] = v; break;
    case 2: ((u16 *)(R + off))[t] = v; break;
    case 4: ((u32 *)(R + off))[t] = v; break;
    default: ((u64 *)(R + off))[t] = v;
  }
}

static void whole(const u32 *M, const char *what) {
  for (int w = 0; w < NW; w++)
    if (M[w] && M[w] != lanes(w)) fail(E_DIVERGE, w * 32, 0, "%s by a part of a warp (lanes %08x)", what, M[w]);
}
#define GROW(p, n, cap)                                                                                                \
  if ((n) == (cap)) {                                                                                                  \
    cap = cap ? 2 * cap : 256;                                                                                         \
    p = realloc(p, (size_t)cap * sizeof *p);                                                                           \
  }
