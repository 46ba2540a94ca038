/* Before every translated module; see ptx.c. Registers are unsigned integers of their width; get_T reads one as a
   value of PTX's type T, and set_T makes the bits of a value. Half floats are computed with as float. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
typedef unsigned __int128 u128;
typedef __int128 s128;

#define F static inline __attribute__((always_inline, unused))
F float get_f32(uint32_t x) { float y; memcpy(&y, &x, 4); return y; }
F uint32_t set_f32(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
F double get_f64(uint64_t x) { double y; memcpy(&y, &x, 8); return y; }
F uint64_t set_f64(double x) { uint64_t y; memcpy(&y, &x, 8); return y; }
F float get_f16(uint16_t x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
F uint16_t set_f16(float x) { _Float16 z = (_Float16)x; uint16_t y; memcpy(&y, &z, 2); return y; }
F float get_bf16(uint16_t x) { return get_f32((uint32_t)x << 16); }
F uint16_t set_bf16(float x) {
  uint32_t y = set_f32(x);
  return x != x ? 0x7fff : (uint16_t)((y + 0x7fff + (y >> 16 & 1)) >> 16);
}
/* clang-format off */
#define INTEGER(bits)                                            \
  F uint##bits##_t get_u##bits(uint64_t x) { return (uint##bits##_t)x; } \
  F uint##bits##_t get_b##bits(uint64_t x) { return (uint##bits##_t)x; } \
  F int##bits##_t get_s##bits(uint64_t x) { return (int##bits##_t)x; }   \
  F uint64_t set_u##bits(uint##bits##_t x) { return x; }         \
  F uint64_t set_b##bits(uint##bits##_t x) { return x; }         \
  F uint64_t set_s##bits(int##bits##_t x) { return (uint64_t)(int64_t)x; }
INTEGER(8) INTEGER(16) INTEGER(32) INTEGER(64)
F uint8_t get_pred(uint64_t x) { return x != 0; }
F uint8_t set_pred(uint64_t x) { return x != 0; }

/* Floats of 8 bits: e4m3 without infinities (3 bits of mantissa), e5m2 (2). */
F float get_f8(uint32_t x, int mantissa) {
  int bias = mantissa == 3 ? 7 : 15;
  uint32_t exponent = x >> mantissa & (127u >> mantissa), part = x & ((1u << mantissa) - 1);
  float value;
  if (mantissa == 3 ? (x & 127) == 127 : exponent == 31 && part) value = NAN;
  else if (mantissa == 2 && exponent == 31) value = INFINITY;
  else if (!exponent) value = ldexpf((float)part, 1 - bias - mantissa);
  else value = ldexpf((float)(part + (1u << mantissa)), (int)exponent - bias - mantissa);
  return x & 128 ? -value : value;
}
/* To the nearest, and what is too large to the largest. */
F uint32_t set_f8(float x, int mantissa) {
  uint32_t sign = set_f32(x) >> 24 & 128, largest = mantissa == 3 ? 0x7e : 0x7b;
  int bias = mantissa == 3 ? 7 : 15, exponent;
  if (x != x) return 0x7f;
  x = fabsf(x);
  if (x == 0) return sign;
  frexpf(x, &exponent); /* x = 0.1... * 2^exponent */
  exponent--;
  if (exponent < 1 - bias) exponent = 1 - bias;
  float steps = nearbyintf(ldexpf(x, mantissa - exponent));
  uint32_t code = (uint32_t)fminf(steps, 1e6f) + ((uint32_t)(exponent + bias - 1) << mantissa);
  return sign | (isinf(x) || code > largest ? largest : code);
}

/* Directed rounding, by way of double. */
F float down_f32(double x) { float y = (float)x; return (double)y > x ? nextafterf(y, -INFINITY) : y; }
F float up_f32(double x) { float y = (float)x; return (double)y < x ? nextafterf(y, INFINITY) : y; }
F float zero_f32(double x) { return x < 0 ? up_f32(x) : down_f32(x); }
F double saturate(double x) { return x > 0 ? x < 1 ? x : 1 : 0; }
F double min_nan(double a, double b) { return a != a ? a : b != b ? b : fmin(a, b); }
F double max_nan(double a, double b) { return a != a ? a : b != b ? b : fmax(a, b); }
#define CLAMP(T, low, high, limit)                                          \
  F T to_##T(double x) { return x != x ? 0 : x <= (low) ? (T)(low) : x >= limit ? (high) : (T)x; }
CLAMP(int8_t, -128., INT8_MAX, 127.) CLAMP(uint8_t, 0., UINT8_MAX, 255.)
CLAMP(int16_t, -32768., INT16_MAX, 32767.) CLAMP(uint16_t, 0., UINT16_MAX, 65535.)
CLAMP(int32_t, -2147483648., INT32_MAX, 2147483647.) CLAMP(uint32_t, 0., UINT32_MAX, 4294967295.)
CLAMP(int64_t, -9223372036854775808., INT64_MAX, 9223372036854775808.)
CLAMP(uint64_t, 0., UINT64_MAX, 18446744073709551616.)

F uint64_t shift_left(uint64_t x, uint32_t by, unsigned bits) { return by >= bits ? 0 : x << by; }
F uint64_t shift_right(uint64_t x, uint32_t by, unsigned bits) { return by >= bits ? 0 : x >> by; }
F int64_t shift_signed(int64_t x, uint32_t by, unsigned bits) { return x >> (by >= bits ? bits - 1 : by); }
F uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t select = selector >> 4 * i & 15, byte = both >> 8 * (select & 7) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
F uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
F uint64_t reverse(uint64_t x, unsigned bits) {
  uint64_t result = 0;
  for (unsigned i = 0; i < bits; i++) result |= (x >> i & 1) << (bits - 1 - i);
  return result;
}
F uint64_t field(uint64_t x, uint32_t at, uint32_t length, int is_signed, unsigned bits) {
  at &= 255, length &= 255;
  uint64_t sign = 0;
  if (is_signed && length) {
    unsigned top = at + length - 1;
    sign = x >> (top >= bits ? bits - 1 : top) & 1;
  }
  uint64_t result = 0;
  for (unsigned i = 0; i < bits; i++)
    result |= (i < length && at + i < bits ? x >> (at + i) & 1 : sign) << i;
  return result;
}
F uint64_t insert(uint64_t part, uint64_t into, uint32_t at, uint32_t length, unsigned bits) {
  at &= 255, length &= 255;
  for (unsigned i = 0; i < length && at + i < bits; i++)
    into = (into & ~(1ull << (at + i))) | (part >> i & 1) << (at + i);
  return into;
}
F uint64_t nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
/* Where a global or generic address is. */
F char *global(const struct env *e, uint64_t a) { return (char *)(a - e->arena < e->arena_size ? a + e->shadow : a); }
#define LOAD(T, at) ({ T load_; memcpy(&load_, (at), sizeof load_); load_; })
#define STORE(T, at, x) do { T store_ = (T)(x); memcpy((at), &store_, sizeof store_); } while (0)
/* The lane that shfl reads from; -1 if that is out of bounds. */
F int shuffle_lane(int mode, uint32_t lane, uint32_t b, uint32_t c) {
  int maximum = (int)((lane & (c >> 8 & 31)) | (c & 31 & ~(c >> 8 & 31))), minimum = (int)(lane & (c >> 8 & 31)), j;
  b &= 31;
  switch (mode) {
    case 'u': j = (int)lane - (int)b; return j >= maximum ? j : -1;
    case 'd': j = (int)lane + (int)b; return j <= maximum ? j : -1;
    case 'b': j = (int)(lane ^ b); return j <= maximum ? j : -1;
    default: j = (int)((unsigned)minimum | (b & ~(c >> 8 & 31))); return j <= maximum ? j : -1;
  }
}
