/* Types, numbers, and the macros of which arithmetic.py makes a function for each form of arithmetic. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;
typedef __int128 i128;
typedef unsigned __int128 u128;

static inline f32 u2f(u32 x) {
  f32 f;
  memcpy(&f, &x, 4);
  return f;
}
static inline u32 f2u(f32 f) {
  u32 x;
  memcpy(&x, &f, 4);
  return x;
}
/* fp16: 2^112 moves the exponent from fp16's bias to fp32's, and makes numbers of subnormals */
static inline f32 h2f(u16 h) {
  u32 x = (h & 0x7fffu) << 13, s = (h & 0x8000u) << 16;
  u32 finite = f2u(u2f(x) * 0x1p112f);
  return u2f(s | ((h & 0x7c00) == 0x7c00 ? x | 0x7f800000 : finite));
}
static inline u16 f2h(f32 f) {
  u32 x = f2u(f) & 0x7fffffff, s = f2u(f) >> 16 & 0x8000;
  if (x > 0x7f800000) return 0x7fff;
  if (x >= 0x477ff000) return s | 0x7c00;
  if (x < 0x38800000) return s | (f2u(u2f(x) + 0.5f) - 0x3f000000);
  return s | ((x - 0x38000000 + 0xfff + (x >> 13 & 1)) >> 13);
}
static inline u16 f2h_rz(f32 f) {
  u32 x = f2u(f) & 0x7fffffff, s = f2u(f) >> 16 & 0x8000;
  if (x > 0x7f800000) return 0x7fff;
  if (x == 0x7f800000) return s | 0x7c00;
  if (x >= 0x47800000) return s | 0x7bff;
  if (x < 0x38800000) return s | (u32)(u2f(x) * 0x1p24f);
  return s | ((x - 0x38000000) >> 13);
}
static inline f32 b2f(u16 b) { return u2f((u32)b << 16); }
static inline u16 f2b(f32 f) {
  u32 x = f2u(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}
static inline u16 f2b_rz(f32 f) {
  u32 x = f2u(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return x >> 16;
}
static inline u32 tf32_rna(f32 f) {
  u32 x = f2u(f);
  if ((x & 0x7f800000) == 0x7f800000) return x;
  return (x + 0x1000) & ~0x1fffu;
}
static inline u32 tf32_rn(f32 f) {
  u32 x = f2u(f);
  if ((x & 0x7f800000) == 0x7f800000) return x;
  return (x + 0xfff + ((x >> 13) & 1)) & ~0x1fffu;
}
static inline u16 d2h(f64 d) { /* via float, sticky to avoid double rounding */
  f32 f = (f32)d;
  if ((f64)f != d && !isnan(d)) {
    u32 x = f2u(f);
    if (fabs((f64)f) > fabs(d)) x -= 1;
    x |= 1;
    f = u2f(x);
  }
  return f2h(f);
}
static inline u16 d2b(f64 d) {
  f32 f = (f32)d;
  if ((f64)f != d && !isnan(d)) {
    u32 x = f2u(f);
    if (fabs((f64)f) > fabs(d)) x -= 1;
    x |= 1;
    f = u2f(x);
  }
  return f2b(f);
}
static inline f32 ftz(f32 f) {
  u32 x = f2u(f);
  return (x & 0x7f800000) ? f : u2f(x & 0x80000000);
}
static inline f32 fminx(f32 a, f32 b) {
  if (a != a) return b != b ? u2f(0x7fffffff) : b;
  if (b != b) return a;
  if (a == b) return signbit(a) ? a : b;
  return a < b ? a : b;
}
static inline f32 fmaxx(f32 a, f32 b) {
  if (a != a) return b != b ? u2f(0x7fffffff) : b;
  if (b != b) return a;
  if (a == b) return signbit(a) ? b : a;
  return a > b ? a : b;
}
static inline f32 fminn(f32 a, f32 b) {
  if (a != a || b != b) return u2f(0x7fffffff);
  return fminx(a, b);
}
static inline f32 fmaxn(f32 a, f32 b) {
  if (a != a || b != b) return u2f(0x7fffffff);
  return fmaxx(a, b);
}
static inline f32 canon(f32 a) { return a != a ? u2f(0x7fffffff) : a; }
static inline u64 satcvt(f64 d, f64 lo, f64 hi, int sgn) {
  if (d != d) return 0;
  if (d <= lo) return sgn ? (u64)(i64)lo : 0;
  if (d >= hi) {
    if (hi >= 18446744073709551615.0) return ~0ull;
    if (sgn && hi >= 9223372036854775807.0) return 0x7fffffffffffffffull;
    return (u64)hi;
  }
  return sgn ? (u64)(i64)d : (u64)d;
}
static inline u32 bfeu(u32 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (!l || p > 31) return 0;
  u64 x = (u64)a >> p;
  return l >= 32 ? (u32)x : (u32)(x & ((1ull << l) - 1));
}
static inline u32 bfes(u32 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (!l) return 0;
  u32 s = (a >> (p + l - 1 > 31 ? 31 : p + l - 1)) & 1;
  u32 r = 0;
  for (u32 i = 0; i < 32; i++) r |= (u32)((i < l && p + i <= 31) ? (a >> (p + i)) & 1 : s) << i;
  return r;
}
static inline u64 bfeu64(u64 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (!l || p > 63) return 0;
  u64 x = a >> p;
  return l >= 64 ? x : x & ((1ull << l) - 1);
}
static inline u64 bfes64(u64 a, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  if (!l) return 0;
  u64 s = (a >> (p + l - 1 > 63 ? 63 : p + l - 1)) & 1;
  u64 r = 0;
  for (u32 i = 0; i < 64; i++) r |= (u64)((i < l && p + i <= 63) ? (a >> (p + i)) & 1 : s) << i;
  return r;
}
static inline u32 bfi32(u32 a, u32 b, u32 p, u32 l) {
  p &= 255;
  l &= 255;
  u32 f = b;
  for (u32 i = 0; i < l && p + i < 32; i++) f = (f & ~(1u << (p + i))) | (((a >> i) & 1) << (p + i));
  return f;
}
static inline u32 brev32(u32 a) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
  return r;
}
static inline u32 prmt(u32 a, u32 b, u32 s) {
  u64 x = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 c = (s >> (4 * i)) & 15;
    u32 v = (x >> (8 * (c & 7))) & 255;
    if (c & 8) v = (v & 128) ? 255 : 0;
    r |= v << (8 * i);
  }
  return r;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 t) {
  u32 r = 0;
  if (t & 1) r |= ~a & ~b & ~c;
  if (t & 2) r |= ~a & ~b & c;
  if (t & 4) r |= ~a & b & ~c;
  if (t & 8) r |= ~a & b & c;
  if (t & 16) r |= a & ~b & ~c;
  if (t & 32) r |= a & ~b & c;
  if (t & 64) r |= a & b & ~c;
  if (t & 128) r |= a & b & c;
  return r;
}

/* A statement for every active thread t: warps at a whole as loops that vectorise. */
#define WLOOP(body)                                                                                                    \
  for (int w = 0; w < NW; w++) {                                                                                       \
    u32 m = M[w];                                                                                                      \
    if (!m) continue;                                                                                                  \
    const int base = w * 32;                                                                                           \
    if (m == 0xffffffffu) {                                                                                            \
      _Pragma("GCC ivdep") for (int j = 0; j < 32; j++) {                                                              \
        const int t = base + j;                                                                                        \
        body                                                                                                           \
      }                                                                                                                \
    } else {                                                                                                           \
      for (int j = 0; j < 32; j++)                                                                                     \
        if (m >> j & 1) {                                                                                              \
          const int t = base + j;                                                                                      \
          body                                                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
  }
#define ALU1(TD, TA, E)                                                                                                \
  {                                                                                                                    \
    TD *D = ((TD *)(R + A[0]));                                                                                        \
    const TA *PA_ = ((TA *)(R + A[1]));                                                                                \
    WLOOP({                                                                                                            \
      TA a = PA_[t];                                                                                                   \
      TD d;                                                                                                            \
      E;                                                                                                               \
      D[t] = d;                                                                                                        \
    })                                                                                                                 \
  }
#define ALU2(TD, TA, TB, E)                                                                                            \
  {                                                                                                                    \
    TD *D = ((TD *)(R + A[0]));                                                                                        \
    const TA *PA_ = ((TA *)(R + A[1]));                                                                                \
    const TB *PB_ = ((TB *)(R + A[2]));                                                                                \
    WLOOP({                                                                                                            \
      TA a = PA_[t];                                                                                                   \
      TB b = PB_[t];                                                                                                   \
      TD d;                                                                                                            \
      E;                                                                                                               \
      D[t] = d;                                                                                                        \
    })                                                                                                                 \
  }
#define ALU3(TD, TA, TB, TC, E)                                                                                        \
  {                                                                                                                    \
    TD *D = ((TD *)(R + A[0]));                                                                                        \
    const TA *PA_ = ((TA *)(R + A[1]));                                                                                \
    const TB *PB_ = ((TB *)(R + A[2]));                                                                                \
    const TC *PC_ = ((TC *)(R + A[3]));                                                                                \
    WLOOP({                                                                                                            \
      TA a = PA_[t];                                                                                                   \
      TB b = PB_[t];                                                                                                   \
      TC c = PC_[t];                                                                                                   \
      TD d;                                                                                                            \
      E;                                                                                                               \
      D[t] = d;                                                                                                        \
    })                                                                                                                 \
  }
#define ALU4(TD, TA, TB, TC, TE, E)                                                                                    \
  {                                                                                                                    \
    TD *D = ((TD *)(R + A[0]));                                                                                        \
    const TA *PA_ = ((TA *)(R + A[1]));                                                                                \
    const TB *PB_ = ((TB *)(R + A[2]));                                                                                \
    const TC *PC_ = ((TC *)(R + A[3]));                                                                                \
    const TE *PE_ = ((TE *)(R + A[4]));                                                                                \
    WLOOP({                                                                                                            \
      TA a = PA_[t];                                                                                                   \
      TB b = PB_[t];                                                                                                   \
      TC c = PC_[t];                                                                                                   \
      TE e = PE_[t];                                                                                                   \
      TD d;                                                                                                            \
      E;                                                                                                               \
      D[t] = d;                                                                                                        \
    })                                                                                                                 \
  }
