/* The machine: runs a lowered program (lowering.py), one CTA at a time, 32 lanes of a warp at a time.
 *
 * A register is an array over the threads of a CTA; an operand is the byte offset of such an array in the register
 * file; immediates are registers filled once. Plain arithmetic is in functions that arithmetic.py generates (alu.h). */
#include "matrix.h"
#include "memory.h"
#include "warp.h"

/* ---------------------------------------------------------------- barriers */
static i32 arrived[16], expected[16];
static void join_all(const u8 *in) {
  u32 j[32] = {0};
  for (int w = 0; w < NW; w++)
    if (in[w])
      for (int q = 0; q < 32; q++)
        if (clocks[w][q] > j[q]) j[q] = clocks[w][q];
  for (int w = 0; w < NW; w++)
    if (in[w]) {
      memcpy(clocks[w], j, sizeof j);
      clocks[w][w]++;
      if (clocks[w][w] >= 1u << 20) fail(E_LIMIT, 0, 0, "too many barriers");
    }
}
static int barrier(const Ins *I, const u32 *M,
                   int pcnext) { /* i0: id, i1: threads or 0, i2: 1 arrive only, i3: aligned; 1 if the group goes on */
  int id = I->i0, want = I->i1 ? I->i1 : T;
  if (I->i3) whole(M, "bar.sync");
  int here = 0;
  for (int w = 0; w < NW; w++) here += popc(M[w]);
  if (arrived[id] && expected[id] != want)
    fail(E_BARRIER, 0, 0, "barrier %d: %d threads are expected here, %d elsewhere", id, want, expected[id]);
  expected[id] = want;
  arrived[id] += here;
  L->cnt[pc].req++;
  if (arrived[id] > want) fail(E_BARRIER, 0, 0, "barrier %d: more threads than the %d expected", id, want);
  u8 in[MAXW] = {0};
  for (int w = 0; w < NW; w++) in[w] = M[w] != 0;
  if (arrived[id] == want) {
    event++;
    for (int t = 0; t < T; t++)
      if (thread_state[t] == 1 + id) {
        thread_state[t] = RUN;
        in[t >> 5] = 1;
      }
    join_all(in);
    arrived[id] = 0;
    if (want == T) generation++;
    return 1;
  }
  for (int w = 0; w < NW; w++)
    for (int l = 0; l < 32; l++)
      if (M[w] >> l & 1) {
        thread_pc[w * 32 + l] = pcnext;
        thread_state[w * 32 + l] = 1 + id;
      }
  return 0;
}

/* ---------------------------------------------------------------- the loop */

static int rank_of(int t) { return L->prog[thread_pc[t]].rank; }
static int min_other(void) { /* least rank of runnable threads outside the group */
  int best = 0x7fffffff;
  for (int w = 0; w < NW; w++) {
    u32 rest = lanes(w) & ~active[w];
    while (rest) {
      int l = __builtin_ctz(rest);
      rest &= rest - 1;
      int t = w * 32 + l;
      if (thread_state[t] == RUN && rank_of(t) < best) best = rank_of(t);
    }
  }
  return best;
}
static void park(int at) {
  for (int w = 0; w < NW; w++) {
    u32 m = active[w];
    while (m) {
      int l = __builtin_ctz(m);
      m &= m - 1;
      thread_pc[w * 32 + l] = at;
    }
  }
}

static void run_group(void) {
  u32 gm[MAXW];
  int nwarps = 0, other;
  u64 steps = 0;
  full = nact == T;
  for (int w = 0; w < NW; w++) nwarps += active[w] != 0;
  other = full ? 0x7fffffff : min_other();
  for (;;) {
    const Ins *I = &L->prog[pc];
    if (!full && (I->flags & F_LEADER) && I->rank >= other) {
      park(pc);
      return;
    }
    const u32 *M = active;
    L->cnt[pc].issues += nwarps;
    if (I->guard >= 0) {
      const u8 *p = R + I->guard;
      for (int w = 0; w < NW; w++) gm[w] = active[w] ? active[w] & (I->gneg ? ~predmask(p, w) : predmask(p, w)) : 0;
      M = gm;
    }
    if (naccumulating | nfeeding) check_regs(I);
    if (I->flags & F_WGREG) {
      u8 b = 0;
      for (int w = 0; w < NW; w++)
        if (M[w]) b |= 1 << (w >> 2);
      for (int i = 0; i < I->nd; i++) unfenced[RI(pool[I->chk + i])] |= b;
    }
    if (I->op >= FIRST_ALU) L->alu[I->op - FIRST_ALU](R, pool + I->arg, M, NW);
    else switch (I->op) {
        case OP_NOP: break;
        case OP_LDG: op_ldst(I, M, 0, 0); break;
        case OP_STG: op_ldst(I, M, 0, 1); break;
        case OP_LDS: op_ldst(I, M, 1, 0); break;
        case OP_STS: op_ldst(I, M, 1, 1); break;
        case OP_LDPARAM: op_ldparam(I, M); break;
        case OP_PARAMADDR:
          for (int w = 0; w < NW; w++)
            for (int l = 0; l < 32; l++)
              if (M[w] >> l & 1) reg_set(A(0), I->i0, w * 32 + l, PARAM_BASE + A(1));
          break;
        case OP_CPASYNC: op_cpasync(I, M); break;
        case OP_CPCOMMIT:
          whole(active, "cp.async.commit_group");
          for (int w = 0; w < NW; w++)
            if (active[w]) {
              for (u32 i = 0; i < ncopies[w]; i++)
                if (copies[w][i].group == ~0u) copies[w][i].group = committed[w];
              committed[w]++;
            }
          break;
        case OP_CPWAIT:
          whole(active, "cp.async.wait_group");
          for (int w = 0; w < NW; w++)
            if (active[w]) cp_complete(w, committed[w] > (u32)I->i0 ? committed[w] - I->i0 : 0);
          break;
        case OP_CPWAITALL:
          for (int w = 0; w < NW; w++)
            if (active[w]) {
              for (u32 i = 0; i < ncopies[w]; i++) copies[w][i].group = 0;
              cp_complete(w, 1);
              committed[w] = committed[w] ? committed[w] : 1;
            }
          break;
        case OP_LDMATRIX: op_ldmatrix(I, M, 0); break;
        case OP_STMATRIX: op_ldmatrix(I, M, 1); break;
        case OP_MOVMATRIX: op_movmatrix(I, M); break;
        case OP_MMA: op_mma(I, M); break;
        case OP_WGMMA: op_wgmma(I, M); break;
        case OP_WGFENCE:
          whole(active, "wgmma.fence");
          {
            u8 b = 0;
            for (int w = 0; w < NW; w++)
              if (active[w]) b |= 1 << (w >> 2);
            for (i64 i = 0; i < RI(L->regbytes) + 1; i++) unfenced[i] &= ~b;
          }
          break;
        case OP_WGCOMMIT:
          whole(active, "wgmma.commit_group");
          for (int w = 0; w < NW; w += 4)
            if (active[w]) products_committed[w / 4]++;
          break;
        case OP_WGWAIT:
          whole(active, "wgmma.wait_group");
          for (int w = 0; w < NW; w += 4)
            if (active[w]) wg_wait(w / 4, I->i0);
          break;
        case OP_TMALOAD: op_tma(I, M, 0); break;
        case OP_TMASTORE: op_tma(I, M, 1); break;
        case OP_BULKCOMMIT:
          for (int w = 0; w < NW; w++)
            if (M[w]) {
              for (int i = 0; i < nstores; i++)
                if (stores[i].w == w && stores[i].group == ~0u) stores[i].group = stores_committed[w];
              stores_committed[w]++;
            }
          break;
        case OP_BULKWAIT:
          for (int w = 0; w < NW; w++)
            if (M[w]) bulk_complete(w, stores_committed[w] > (u32)I->i0 ? stores_committed[w] - I->i0 : 0, I->i1);
          break;
        case OP_SHFL: op_shfl(I, M); break;
        case OP_VOTE: op_vote(I, M); break;
        case OP_REDUX: op_redux(I, M); break;
        case OP_ATOM: op_atom(I, M); break;
        case OP_ACTIVEMASK: {
          u32 *d = REG(u32, 0);
          WLOOP({ d[t] = m; }) break;
        }
        case OP_ELECT: {
          u8 *p = REG(u8, 0);
          for (int w = 0; w < NW; w++)
            if (M[w]) {
              int e = __builtin_ctz(M[w]);
              for (int l = 0; l < 32; l++)
                if (M[w] >> l & 1) {
                  p[w * 32 + l] = l == e;
                  if (A(1) >= 0) REG(u32, 1)[w * 32 + l] = e;
                }
            }
          break;
        }
        case OP_MBINIT:
          for (int w = 0; w < NW; w++)
            for (int l = 0; l < 32; l++)
              if (M[w] >> l & 1) {
                int t = w * 32 + l;
                u32 off = soff(((u32 *)(R + A(0)))[t] + A(1), 8, t);
                Mbar *b = 0;
                for (int i = 0; i < nmbars; i++)
                  if (mbars[i].addr == off) b = &mbars[i];
                if (b) fail(E_MBAR, t, off, "mbarrier initialised twice");
                if (nmbars == 64) fail(E_LIMIT, t, 0, "too many mbarriers");
                b = &mbars[nmbars++];
                memset(b, 0, sizeof *b);
                b->addr = off;
                b->count = b->pending = ((u32 *)(R + A(2)))[t];
                sh_write(off, 8, w, l, 0, S_MBAR);
                memcpy(b->v, clocks[w], sizeof b->v);
              }
          break;
        case OP_MBINVAL:
          for (int w = 0; w < NW; w++)
            for (int l = 0; l < 32; l++)
              if (M[w] >> l & 1) {
                int t = w * 32 + l;
                Mbar *b = mbar_at(((u32 *)(R + A(0)))[t] + A(1), t);
                for (int i = 0; i < nloads; i++)
                  if (loads[i].mbar == b->addr)
                    fail(E_MBAR, t, b->addr, "mbarrier invalidated with TMA loads in flight");
                if (chk)
                  for (u32 g = b->addr >> granule; g <= (b->addr + 7) >> granule; g++) state_of[g] = S_NONE;
                *b = mbars[--nmbars];
              }
          break;
        case OP_MBEXPECT:
        case OP_MBARRIVE:
          for (int w = 0; w < NW; w++)
            for (int l = 0; l < 32; l++)
              if (M[w] >> l & 1) {
                int t = w * 32 + l;
                Mbar *b = mbar_at(((u32 *)(R + A(0)))[t] + A(1), t);
                for (int q = 0; q < 32; q++)
                  if (clocks[w][q] > b->v[q]) b->v[q] = clocks[w][q];
                if (I->op == OP_MBEXPECT) b->tx += ((u32 *)(R + A(2)))[t];
                if (I->i0) {
                  int n = I->op == OP_MBARRIVE && A(2) >= 0 ? (int)((u32 *)(R + A(2)))[t] : 1;
                  b->pending -= n;
                  if (b->pending < 0) fail(E_MBAR, t, b->addr, "more arrivals than the mbarrier's count");
                }
                mbar_check(b);
                clocks[w][w]++;
              }
          break;
        case OP_MBWAIT: {
          int stuck = 0;
          for (int w = 0; w < NW; w++)
            for (int l = 0; l < 32; l++)
              if (M[w] >> l & 1) {
                int t = w * 32 + l;
                Mbar *b = mbar_at(((u32 *)(R + A(1)))[t] + A(2), t);
                u32 par = ((u32 *)(R + A(3)))[t] & 1;
                int done = (b->phase & 1) != par;
                if (!done) {
                  tma_deliver(b);
                  done = (b->phase & 1) != par;
                }
                REG(u8, 0)[t] = done;
                stuck |= !done;
                if (done)
                  for (int q = 0; q < 32; q++)
                    if (b->done[q] > clocks[w][q]) clocks[w][q] = b->done[q];
              }
          if (stuck) {
            park(pc + 1);
            for (int w = 0; w < NW; w++)
              for (int l = 0; l < 32; l++)
                if (M[w] >> l & 1 && !REG(u8, 0)[w * 32 + l]) thread_state[w * 32 + l] = YIELD;
            return;
          }
          break;
        }
        case OP_FENCEPROXY:
          for (int w = 0; w < NW; w++)
            if (M[w]) {
              fences[w]++;
              last_fence[w] = event;
            }
          break;
        case OP_WARPSYNC:
          for (int w = 0; w < NW; w++)
            if (M[w]) {
              const u32 *mk = REG(u32, 0);
              u32 want = mk[w * 32 + __builtin_ctz(M[w])] & lanes(w);
              if (want & ~M[w]) fail(E_BARRIER, w * 32, 0, "bar.warp.sync: lanes %08x are elsewhere", want & ~M[w]);
              clocks[w][w]++;
            }
          break;
        case OP_BAR:
          if (!barrier(I, M, pc + 1)) return;
          if (!full) other = min_other();
          break;
        case OP_RET: {
          int left = 0;
          for (int w = 0; w < NW; w++) {
            u32 m = M[w];
            left |= (active[w] & ~m) != 0;
            while (m) {
              int l = __builtin_ctz(m);
              m &= m - 1;
              thread_state[w * 32 + l] = DONE;
            }
          }
          if (left) {
            for (int w = 0; w < NW; w++) active[w] &= ~M[w];
            park(pc + 1);
          }
          return;
        }
        case OP_BRA: {
          if (++steps > MOST_BRANCHES) fail(E_LIMIT, 0, 0, "too many branches: a loop that does not end?");
          int taken = 0, fell = 0;
          for (int w = 0; w < NW; w++)
            if (active[w]) {
              taken |= M[w] != 0;
              fell |= (active[w] & ~M[w]) != 0;
            }
          if (taken && fell) {
            for (int w = 0; w < NW; w++) {
              u32 m = active[w];
              while (m) {
                int l = __builtin_ctz(m);
                m &= m - 1;
                thread_pc[w * 32 + l] = M[w] >> l & 1 ? I->target : pc + 1;
              }
            }
            return;
          }
          if (taken) {
            pc = I->target;
            continue;
          }
          break;
        }
        default: fail(E_UNIMPL, 0, 0, "not implemented");
      }
    pc++;
  }
}

static void run_cta(void) {
  for (int t = 0; t < T; t++) {
    thread_pc[t] = 0;
    thread_state[t] = RUN;
  }
  for (;;) {
    int best = 0x7fffffff, alive = 0, waiting = 0, yielding = 0;
    for (int t = 0; t < T; t++) {
      u8 s = thread_state[t];
      if (s == DONE) continue;
      alive++;
      if (s == RUN) {
        if (rank_of(t) < best) best = rank_of(t), pc = thread_pc[t];
      } else if (s == YIELD) yielding++;
      else waiting++;
    }
    if (!alive) return;
    if (best == 0x7fffffff) {
      if (yielding) {
        /* did anything change since they looked? let them look again, once */
        static u64 stamp;
        u64 now = 0;
        for (int i = 0; i < nmbars; i++) now = now * 31 + mbars[i].phase * 7 + mbars[i].pending + (u64)mbars[i].tx;
        now = now * 31 + nloads;
        now = now * 31 + event + 1;
        if (now != stamp) {
          stamp = now;
          for (int t = 0; t < T; t++)
            if (thread_state[t] == YIELD) thread_state[t] = RUN;
          continue;
        }
        int t0 = 0;
        while (thread_state[t0] != YIELD) t0++;
        pc = thread_pc[t0] - 1;
        fail(E_MBAR, t0, 0, "deadlock: %d threads wait for an mbarrier that nothing completes, %d at a barrier",
             yielding, waiting);
      }
      int t0 = 0;
      while (thread_state[t0] == DONE) t0++;
      int id = thread_state[t0] - 1;
      pc = thread_pc[t0] - 1;
      fail(E_BARRIER, t0, 0, "barrier %d is not reached by all threads: %d of %d wait there, %d have ended", id,
           arrived[id], expected[id], T - alive);
    }
    memset(active, 0, sizeof active);
    nact = 0;
    for (int t = 0; t < T; t++)
      if (thread_state[t] == RUN && thread_pc[t] == pc) {
        active[t >> 5] |= 1u << (t & 31);
        nact++;
      }
    run_group();
  }
}

int sg_run(Launch *launch) {
  L = launch;
  T = L->threads;
  NW = (T + 31) / 32;
  pool = L->pool;
  granule = L->granule;
  shared_size = L->shared;
  last = 0;
  tailmask = T % 32 ? (1u << T % 32) - 1 : 0xffffffffu;
  if (NW > MAXW) {
    L->err->code = E_LIMIT;
    snprintf(L->err->msg, 512, "more than %d warps", MAXW);
    return 1;
  }
  R = aligned_alloc(64, (L->regbytes + 127) / 64 * 64);
  memset(R, 0, L->regbytes);
  u32 G = (shared_size >> granule) + 32;
  shared_memory = aligned_alloc(1024, (shared_size + 2047) / 1024 * 1024);
  state_of = malloc(G);
  touch = malloc(4 * G);
  last_write = malloc(4 * G);
  generic_write = malloc(4 * G);
  written_at = malloc(4 * G);
  last_reads = malloc(4ull * G * NW);
  async_reads = malloc(shared_size / 16 + 64);
  i64 nreg = RI(L->regbytes) + 2;
  accumulates = calloc(nreg, 1);
  feeds_a = calloc(nreg, 1);
  unfenced = calloc(nreg, 1);
  thread_pc = malloc(4 * T);
  thread_state = malloc(T);
  l1sets = L->l1_bytes / 512;
  l1 = l1sets ? malloc(sizeof(Line) * 4 * l1sets) : 0;
  for (int i = 0; i < L->nconsts; i++) {
    const i64 *c = L->consts + 3 * i;
    for (int t = 0; t < NW * 32; t++) reg_set(c[0], (int)c[1], t, (u64)c[2]);
  }
  int bad = 0;
  event = 1;
  generation = 0;
  memset(touch, 0xff, 4 * G);
  if (setjmp(out)) bad = 1;
  else
    for (i64 n = 0; n < L->nctas; n++) {
      cta = (int)L->ctas[n];
      chk = L->checked[n];
      ctaid[0] = cta % L->grid[0];
      ctaid[1] = cta / L->grid[0] % L->grid[1];
      ctaid[2] = cta / L->grid[0] / L->grid[1];
      const i64 *sp = pool + L->special; /* registers of special values: tid xyz, ntid xyz, ctaid xyz, nctaid xyz,
                                            laneid, warpid; -1 if unused */
      for (int t = 0; t < NW * 32; t++) {
        u32 v[14] = {t,        0,        0,          T,          1,          1,      ctaid[0],
                     ctaid[1], ctaid[2], L->grid[0], L->grid[1], L->grid[2], t & 31, t >> 5};
        for (int i = 0; i < 14; i++)
          if (sp[i] >= 0) ((u32 *)(R + sp[i]))[t] = v[i];
      }
      memset(state_of, 0, G);
      memset(async_reads, 0, shared_size / 16 + 64);
      memset(generic_write, 0, 4 * G);
      generation++;
      event++;
      if (chk) memset(shared_memory, 0xff, shared_size);
      memset(clocks, 0, sizeof clocks);
      for (int w = 0; w < NW; w++) clocks[w][w] = 1;
      memset(fences, 0, sizeof fences);
      memset(last_fence, 0, sizeof last_fence);
      memset(arrived, 0, sizeof arrived);
      for (int w = 0; w < NW; w++) ncopies[w] = committed[w] = stores_committed[w] = 0;
      for (int i = 0; i < 8; i++) products_committed[i] = 0;
      nmbars = nloads = nstores = nissued = nsums = nreads = nfeeding = naccumulating = 0;
      tclock = 0;
      memset(accumulates, 0, nreg);
      memset(feeds_a, 0, nreg);
      memset(unfenced, 0, nreg);
      if (l1sets) memset(l1, 0, sizeof(Line) * 4 * l1sets);
      run_cta();
      for (int w = 0; w < NW; w++) { bulk_complete(w, ~0u, 0); }
      if (nstores) {
        for (int i = 0; i < nstores; i++) stores[i].group = 0;
        for (int w = 0; w < NW; w++) bulk_complete(w, 1, 0);
      }
      if (nloads) fail(E_TMA, 0, 0, "the program ends with %d TMA loads in flight", nloads);
    }
  for (int i = 0; i < nloads; i++) free(loads[i].data);
  nloads = 0;
  free(R);
  free(shared_memory);
  free(state_of);
  free(touch);
  free(last_write);
  free(generic_write);
  free(written_at);
  free(last_reads);
  free(async_reads);
  free(accumulates);
  free(feeds_a);
  free(unfenced);
  free(thread_pc);
  free(thread_state);
  free(l1);
  l1 = 0;
  return bad;
}
