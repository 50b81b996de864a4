// Vectors of floats in the widest registers of the machine this is compiled for.
//
// Every function works lane by lane or adds in one fixed tree, so that a value never depends on
// where in a vector, or beside what, it stands.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Inner loops stay functions of their own: inlined into larger ones, their sums leave the registers.
#define KERNEL __attribute__((noinline)) static

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecUint __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));
typedef int8_t VecByte __attribute__((vector_size(LANES)));

// A float32 whose low 16 bits are zero, kept in 16.
struct BFloat16 {
    uint16_t bits;
};

inline Vec broadcast(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
    VecHalf h;
    memcpy(&h, p, sizeof h);
    VecUint wide = __builtin_convertvector(h, VecUint) << 16;
    Vec v;
    memcpy(&v, &wide, sizeof v);
    return v;
#endif
}

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
    __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b));
#elif defined(__AVX2__)
    __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
#else
    VecByte b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, VecInt), Vec);
#endif
}

// The first n values, zeros behind them.
template <class T>
inline Vec load_some(const T* p, int n) {
    T some[LANES] = {};
    memcpy(some, p, n * sizeof(T));
    return load(some);
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline void store_some(float* p, Vec v, int n) { memcpy(p, &v, n * sizeof(float)); }

// a * b + c, rounded once where the machine can. The compiler is told to join nothing by itself
// (-ffp-contract=off), so that every instance of a template rounds alike.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline Vec where(VecInt condition, Vec yes, Vec no) { return condition ? yes : no; }

inline Vec maximum(Vec a, Vec b) { return where(a > b, a, b); }

// Lane i with lane i + half, then quarter and so on: always the same tree.
inline float sum(Vec v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float max_lane(Vec v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    float top = lanes[0];
    for (int i = 1; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// sums[j] = sum(v[j]) for four vectors, by the same tree as `sum`, four at a time.
inline void sum4(const Vec v[4], float sums[4]) {
#if defined(__AVX512F__)
    // After each step a lane holds what lanes i and i + half of its vector made together.
    __m512 ab_low = _mm512_shuffle_f32x4((__m512)v[0], (__m512)v[1], 0x44);
    __m512 ab_high = _mm512_shuffle_f32x4((__m512)v[0], (__m512)v[1], 0xee);
    __m512 cd_low = _mm512_shuffle_f32x4((__m512)v[2], (__m512)v[3], 0x44);
    __m512 cd_high = _mm512_shuffle_f32x4((__m512)v[2], (__m512)v[3], 0xee);
    __m512 ab = _mm512_add_ps(ab_low, ab_high);  // a0..7 b0..7
    __m512 cd = _mm512_add_ps(cd_low, cd_high);
    __m512 low = _mm512_shuffle_f32x4(ab, cd, 0x88);  // a0..3 b0..3 c0..3 d0..3
    __m512 high = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    __m512 quads = _mm512_add_ps(low, high);
    quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0x4e));
    quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0xb1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, quads)));
#elif defined(__AVX__)
    __m256 ab = _mm256_add_ps(
        _mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x20),
        _mm256_permute2f128_ps((__m256)v[0], (__m256)v[1], 0x31));
    __m256 cd = _mm256_add_ps(
        _mm256_permute2f128_ps((__m256)v[2], (__m256)v[3], 0x20),
        _mm256_permute2f128_ps((__m256)v[2], (__m256)v[3], 0x31));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0x4e));
    cd = _mm256_add_ps(cd, _mm256_permute_ps(cd, 0x4e));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0xb1));
    cd = _mm256_add_ps(cd, _mm256_permute_ps(cd, 0xb1));
    alignas(32) float lanes[16];
    _mm256_store_ps(lanes, ab);
    _mm256_store_ps(lanes + 8, cd);
    for (int j = 0; j < 4; j++) sums[j] = lanes[4 * j];
#else
    for (int j = 0; j < 4; j++) sums[j] = sum(v[j]);
#endif
}

// e^x to 1 or 2 units in the last place, 0 below -87; Cody-Waite reduction, polynomial of degree 6.
inline Vec exponential(Vec x) {
    const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec bounded = where(x > 88.0f, broadcast(88.0f), x);
    Vec floor = where(bounded < -87.0f, broadcast(-87.0f), bounded);
    Vec n = multiply_add(floor, broadcast(1.44269504f), magic);
    VecInt exponent;
    memcpy(&exponent, &n, sizeof n);
    n -= magic;
    Vec r = multiply_add(n, broadcast(-0.693145752f), floor);
    r = multiply_add(n, broadcast(-1.42860677e-6f), r);
    Vec p = broadcast(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = multiply_add(p, r, broadcast(c));
    VecInt bits = (exponent - 0x4b400000 + 127) << 23;
    Vec scale;
    memcpy(&scale, &bits, sizeof bits);
    return where(bounded < -87.0f, Vec{}, p * scale);
}

inline Vec hyperbolic_tangent(Vec x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

inline Vec absolute(Vec x) { return where(x < 0.0f, -x, x); }
