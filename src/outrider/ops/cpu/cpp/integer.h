// Dot products of rounded rows with weights of 8 and 4 bits: exact in integers, scaled once per output
// (8 bits) or per group of inputs (4 bits).
//
// Three ways that agree to the bit for 8 bits: VNNI, AVX2, and plain C++.

#pragma once

#include "inputs.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

typedef __m512i Sums;  // 16 partial sums
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Sums add_products(Sums sums, __m512i unsigned_bytes, const int8_t* signed_bytes) {
    return _mm512_dpbusd_epi32(sums, unsigned_bytes, _mm512_loadu_si512(signed_bytes));
}
inline void total4(const Sums v[4], int32_t totals[4]) {
    Sums ab = _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x44),
                               _mm512_shuffle_i32x4(v[0], v[1], 0xee));
    Sums cd = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2], v[3], 0x44),
                               _mm512_shuffle_i32x4(v[2], v[3], 0xee));
    Sums quads = _mm512_add_epi32(_mm512_shuffle_i32x4(ab, cd, 0x88),
                                  _mm512_shuffle_i32x4(ab, cd, 0xdd));
    quads = _mm512_add_epi32(quads, _mm512_shuffle_epi32(quads, _MM_PERM_BADC));
    quads = _mm512_add_epi32(quads, _mm512_shuffle_epi32(quads, _MM_PERM_CDAB));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(totals),
                     _mm512_castsi512_si128(_mm512_permutexvar_epi32(firsts, quads)));
}

// The weights of 64 inputs as bytes w + 128.
inline __m512i biased(const int8_t* w, int left) {
    __m512i bytes = left >= BLOCK ? _mm512_loadu_si512(w)
                                  : _mm512_maskz_loadu_epi8((1ull << left) - 1, w);
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
}

template <int M, int PLANES>
KERNEL void integer_dots(const int8_t* const w[4], const Inputs& in, int row, int inputs,
                         long ahead, int64_t out[][4]) {
    Sums high[M][4], low[M][4];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) high[m][j] = low[m][j] = no_sums();
    const int8_t* planes = in.high + static_cast<long>(row) * in.width;
    const int8_t* fine = in.low + static_cast<long>(row) * in.width;
    for (int i = 0; i < inputs; i += BLOCK) {
        __m512i weights[4];
        for (int j = 0; j < 4; j++) {
            weights[j] = biased(w[j] + i, inputs - i);
            prefetch(w[0] + ahead + 4 * i + 64 * j);
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < 4; j++) {
                high[m][j] = add_products(high[m][j], weights[j], planes + m * in.width + i);
                if (PLANES == 2)
                    low[m][j] = add_products(low[m][j], weights[j], fine + m * in.width + i);
            }
    }
    for (int m = 0; m < M; m++) {
        int32_t tops[4], rests[4];
        total4(high[m], tops);
        if (PLANES == 2) total4(low[m], rests);
        int64_t bias = 128 * in.total[row + m];  // for weights that were raised by 128
        for (int j = 0; j < 4; j++)
            out[m][j] = (PLANES == 2 ? 128 * int64_t{tops[j]} + rests[j] : int64_t{tops[j]}) - bias;
    }
}

// out[m][j] = sum over groups of scale * (sum of (nibble - 8) * x), before the row's own scale.
template <int M, int PLANES>
KERNEL void nibble_dots(const uint8_t* const w[4], const float* const scales[4], const Inputs& in,
                        int row, long ahead, float out[][4]) {
    Vec sums[M][4] = {};
    const int steps = in.width / BLOCK;
    const int8_t* planes = in.high + static_cast<long>(row) * in.width;
    const int8_t* fine = in.low + static_cast<long>(row) * in.width;
    const int32_t* offsets = in.offsets + static_cast<long>(row) * steps * 16;
    const __m256i low_bits = _mm256_set1_epi8(15);
    for (int s = 0; s < steps; s++) {
        for (int j = 0; j < 4; j++) {
            __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[j] + s * 32));
            __m256i first = _mm256_and_si256(pairs, low_bits);
            __m256i second = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low_bits);
            __m512i weights = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            __m512 scale = _mm512_insertf32x8(_mm512_set1_ps(scales[j][2 * s]),
                                              _mm256_set1_ps(scales[j][2 * s + 1]), 1);
            if (s % 2 == 0) prefetch(w[0] + ahead + 128 * s + 64 * j);
            for (int m = 0; m < M; m++) {
                __m512i t = add_products(no_sums(), weights, planes + m * in.width + s * BLOCK);
                if (PLANES == 2) {
                    t = _mm512_slli_epi32(t, 7);
                    t = add_products(t, weights, fine + m * in.width + s * BLOCK);
                }
                t = _mm512_add_epi32(t, _mm512_loadu_si512(offsets + (m * steps + s) * 16));
                sums[m][j] = multiply_add((Vec)_mm512_cvtepi32_ps(t), (Vec)scale, sums[m][j]);
            }
        }
    }
    for (int m = 0; m < M; m++) sum4(sums[m], out[m]);
}

#elif defined(__AVX2__)

// 16 values of a rounded row, both planes joined.
template <int PLANES>
inline __m256i joined(const int8_t* high, const int8_t* low) {
    const __m256i most = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
    if (PLANES == 1) return most;
    const __m256i rest = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
    return _mm256_add_epi16(_mm256_slli_epi16(most, 7), rest);
}

inline int64_t total(__m256i sums) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
    int64_t total = 0;
    for (int32_t lane : lanes) total += lane;
    return total;
}

// 16 weights as 16-bit integers; zeros behind the last of `left`.
inline __m256i widened(const int8_t* w, int left) {
    alignas(16) int8_t some[16] = {};
    if (left < 16) memcpy(some, w, left);
    const int8_t* from = left < 16 ? some : w;
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <int M, int PLANES>
KERNEL void integer_dots(const int8_t* const w[4], const Inputs& in, int row, int inputs,
                         long ahead, int64_t out[][4]) {
    constexpr int CHUNK = 8192;  // inputs whose 22-bit products add up in 8 lanes of 32 bits
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) out[m][j] = 0;
    for (int from = 0; from < inputs; from += CHUNK) {
        const int stop = inputs < from + CHUNK ? inputs : from + CHUNK;
        __m256i sums[M][4];
        for (int m = 0; m < M; m++)
            for (int j = 0; j < 4; j++) sums[m][j] = _mm256_setzero_si256();
        for (int i = from; i < stop; i += 16) {
            __m256i values[M];
            for (int m = 0; m < M; m++) {
                const long at = static_cast<long>(row + m) * in.width + i;
                values[m] = joined<PLANES>(in.high + at, in.low + at);
            }
            if (i % 64 == 0)
                for (int j = 0; j < 4; j++) prefetch(w[0] + ahead + 4 * i + 64 * j);
            for (int j = 0; j < 4; j++) {
                const __m256i weights = widened(w[j] + i, stop - i);
                for (int m = 0; m < M; m++)
                    sums[m][j] = _mm256_add_epi32(sums[m][j], _mm256_madd_epi16(weights, values[m]));
            }
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < 4; j++) out[m][j] += total(sums[m][j]);
    }
}

template <int M, int PLANES>
KERNEL void nibble_dots(const uint8_t* const w[4], const float* const scales[4], const Inputs& in,
                        int row, long ahead, float out[][4]) {
    Vec sums[M][4] = {};
    const int steps = in.width / BLOCK;
    const __m256i low_bits = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(8);
    for (int s = 0; s < steps; s++) {
        for (int half = 0; half < 2; half++) {
            __m256i values[M][2];
            for (int m = 0; m < M; m++)
                for (int part = 0; part < 2; part++) {
                    const long at = static_cast<long>(row + m) * in.width + s * BLOCK + half * GROUP + part * 16;
                    values[m][part] = joined<PLANES>(in.high + at, in.low + at);
                }
            for (int j = 0; j < 4; j++) {
                const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[j] + s * 32));
                if (s % 2 == 0 && half == 0) prefetch(w[0] + ahead + 128 * s + 64 * j);
                const __m256i nibbles = _mm256_and_si256(half ? _mm256_srli_epi16(pairs, 4) : pairs, low_bits);
                const __m256i codes = _mm256_sub_epi8(nibbles, middle);
                const __m256i first = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(codes));
                const __m256i second = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(codes, 1));
                const Vec scale = broadcast(scales[j][2 * s + half]);
                for (int m = 0; m < M; m++) {
                    const __m256i group = _mm256_add_epi32(_mm256_madd_epi16(first, values[m][0]),
                                                           _mm256_madd_epi16(second, values[m][1]));
                    sums[m][j] = multiply_add((Vec)_mm256_cvtepi32_ps(group), scale, sums[m][j]);
                }
            }
        }
    }
    for (int m = 0; m < M; m++) sum4(sums[m], out[m]);
}

#else

template <int M, int PLANES>
KERNEL void integer_dots(const int8_t* const w[4], const Inputs& in, int row, int inputs,
                         long ahead, int64_t out[][4]) {
    constexpr int CHUNK = 4096;
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) out[m][j] = 0;
    int16_t x[CHUNK];
    for (int from = 0; from < inputs; from += CHUNK) {
        int count = inputs - from < CHUNK ? inputs - from : CHUNK;
        for (int m = 0; m < M; m++) {
            const int8_t* high = in.high + static_cast<long>(row + m) * in.width + from;
            const int8_t* low = in.low + static_cast<long>(row + m) * in.width + from;
            for (int i = 0; i < count; i++)
                x[i] = static_cast<int16_t>(PLANES == 2 ? 128 * high[i] + low[i] : high[i]);
            for (int j = 0; j < 4; j++) {
                int64_t total = 0;
                for (int at = 0; at < count; at += 1024) {
                    int32_t part = 0;  // 1024 * 127 * 8191 < 2^31
                    int stop = at + 1024 < count ? at + 1024 : count;
                    const int8_t* weights = w[j] + from;
                    for (int i = at; i < stop; i++) part += int32_t{weights[i]} * x[i];
                    total += part;
                }
                out[m][j] += total;
            }
        }
    }
    (void)ahead;
}

template <int M, int PLANES>
KERNEL void nibble_dots(const uint8_t* const w[4], const float* const scales[4], const Inputs& in,
                        int row, long ahead, float out[][4]) {
    const int steps = in.width / BLOCK;
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) {
            float total = 0;
            for (int s = 0; s < steps; s++) {
                long at = static_cast<long>(row + m) * in.width + s * BLOCK;
                for (int half = 0; half < 2; half++) {
                    int32_t group = 0;
                    for (int i = 0; i < GROUP; i++) {
                        int nibble = half ? w[j][s * 32 + i] >> 4 : w[j][s * 32 + i] & 15;
                        long place = at + half * GROUP + i;
                        int x = PLANES == 2 ? 128 * in.high[place] + in.low[place] : in.high[place];
                        group += (nibble - 8) * x;
                    }
                    total += static_cast<float>(group) * scales[j][2 * s + half];
                }
            }
            out[m][j] = total;
        }
    (void)ahead;
}

#endif

template <int M, int PLANES>
inline void rounded_dots(const Linear& layer, const int o[4], const Inputs& in, int row,
                         long ahead, float out[][4]) {
    if (layer.kind == INT8) {
        const int8_t* w[4];
        for (int j = 0; j < 4; j++)
            w[j] = static_cast<const int8_t*>(layer.weight) + static_cast<long>(o[j]) * layer.inputs;
        int64_t totals[M][4];
        integer_dots<M, PLANES>(w, in, row, layer.inputs, ahead, totals);
        for (int m = 0; m < M; m++)
            for (int j = 0; j < 4; j++)
                out[m][j] = static_cast<float>(totals[m][j]) *
                            (in.scale[row + m] * layer.scales[o[j]]);
        return;
    }
    const uint8_t* w[4];
    const float* scales[4];
    for (int j = 0; j < 4; j++) {
        w[j] = static_cast<const uint8_t*>(layer.weight) + static_cast<long>(o[j]) * in.width / 2;
        scales[j] = layer.scales + static_cast<long>(o[j]) * in.width / GROUP;
    }
    nibble_dots<M, PLANES>(w, scales, in, row, ahead / 2, out);
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) out[m][j] *= in.scale[row + m];
}

template <int M, int PLANES>
inline void rounded_dots_of(int rows, const Linear& layer, const int o[4], const Inputs& in,
                            int row, long ahead, float out[][4]) {
    if constexpr (M > 1) {
        if (rows < M) return rounded_dots_of<M - 1, PLANES>(rows, layer, o, in, row, ahead, out);
    }
    rounded_dots<M, PLANES>(layer, o, in, row, ahead, out);
}
