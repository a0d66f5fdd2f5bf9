// Products of int8 codes by what the processor has: a lane of sums takes the products of `GROUP` codes at once.  All of
// them are exact, so sums are the same integers on every processor.
//
// VNNI multiplies unsigned bytes by signed ones: a weight's code is taken with 128 added, which is its sign bit turned
// over, and 128 times the sum of a row's codes is taken off again.  (vpmaddubsw would not do: it saturates.)
#pragma once
#include "vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define MSCONV_VNNI 1  // codes.h and int8.cc have their own way for it
#else

namespace {

#if defined(__AVXVNNI__) && !defined(__AVX512F__)

constexpr int64_t GROUP = 4;
constexpr int32_t ADDED = 128;  // to each weight's code
typedef __m256i Sums;
typedef __m256i Operand;

INLINE Operand codes_at(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE Operand weights_at(const int8_t* p) { return _mm256_xor_si256(codes_at(p), _mm256_set1_epi8(-128)); }
INLINE Operand repeated(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
INLINE void add_products(Sums& s, Operand weights, Operand codes) {
  s = _mm256_dpbusd_avx_epi32(s, weights, codes);
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

constexpr int64_t GROUP = 4;
constexpr int32_t ADDED = 0;
typedef int32x4_t Sums;
typedef int8x16_t Operand;

INLINE Operand codes_at(const int8_t* p) { return vld1q_s8(p); }
INLINE Operand weights_at(const int8_t* p) { return vld1q_s8(p); }
INLINE Operand repeated(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
INLINE void add_products(Sums& s, Operand weights, Operand codes) { s = vdotq_s32(s, weights, codes); }

#elif defined(__aarch64__)

constexpr int64_t GROUP = 2;
constexpr int32_t ADDED = 0;
typedef int32x4_t Sums;
typedef int8x8_t Operand;

INLINE Operand codes_at(const int8_t* p) { return vld1_s8(p); }
INLINE Operand weights_at(const int8_t* p) { return vld1_s8(p); }
INLINE Operand repeated(const int8_t* p) {
  int16_t two;
  memcpy(&two, p, 2);
  return vreinterpret_s8_s16(vdup_n_s16(two));
}
INLINE void add_products(Sums& s, Operand weights, Operand codes) {
  s = vpadalq_s16(s, vmull_s8(weights, codes));
}

#elif defined(__x86_64__)  // two codes as 16 bits each: their products fill a lane

constexpr int64_t GROUP = 2;
constexpr int32_t ADDED = 0;
#if defined(__AVX512BW__)
typedef __m512i Sums;
typedef __m512i Operand;
INLINE Operand codes_at(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE Operand all_lanes(int32_t two) { return _mm512_set1_epi32(two); }
INLINE void add_products(Sums& s, Operand weights, Operand codes) {
  s = _mm512_add_epi32(s, _mm512_madd_epi16(weights, codes));
}
#elif defined(__AVX2__)
typedef __m256i Sums;
typedef __m256i Operand;
INLINE Operand codes_at(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE Operand all_lanes(int32_t two) { return _mm256_set1_epi32(two); }
INLINE void add_products(Sums& s, Operand weights, Operand codes) {
  s = _mm256_add_epi32(s, _mm256_madd_epi16(weights, codes));
}
#else
typedef __m128i Sums;
typedef __m128i Operand;
INLINE Operand codes_at(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
INLINE Operand all_lanes(int32_t two) { return _mm_set1_epi32(two); }
INLINE void add_products(Sums& s, Operand weights, Operand codes) {
  s = _mm_add_epi32(s, _mm_madd_epi16(weights, codes));
}
#endif
INLINE Operand weights_at(const int8_t* p) { return codes_at(p); }
INLINE Operand repeated(const int8_t* p) { return all_lanes(int32_t(uint16_t(p[0])) | int32_t(uint32_t(p[1]) << 16)); }

#else  // a processor without a way of its own

constexpr int64_t GROUP = 1;
constexpr int32_t ADDED = 0;
typedef vi32 Sums;
typedef vi32 Operand;

INLINE Operand codes_at(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const vi8*>(p), vi32); }
INLINE Operand weights_at(const int8_t* p) { return codes_at(p); }
INLINE Operand repeated(const int8_t* p) { return vi32{} + int32_t(*p); }
INLINE void add_products(Sums& s, Operand weights, Operand codes) { s += weights * codes; }

#endif

constexpr int64_t SUMS = sizeof(Sums) / 4;  // lanes
constexpr int64_t AT_ONCE = SUMS * GROUP;   // codes of an operand

INLINE int32_t total(Sums s) {
  int32_t lanes[SUMS], all = 0;
  memcpy(lanes, &s, sizeof(s));
  for (int i = 0; i < SUMS; i++) all = int32_t(uint32_t(all) + uint32_t(lanes[i]));
  return all;
}

}  // namespace
#endif
