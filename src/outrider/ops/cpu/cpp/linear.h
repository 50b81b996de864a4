// y[M, O] = x[M, I] W[O, I]^T for few rows: every output is one dot product, summed over I in an
// order that depends on I alone.
//
// A few rows of W at a time meet a few rows of x in registers. Weights are read where the checkpoint
// has them, row after row; 16-bit and 8-bit ones are widened to float32 on the way, which changes
// nothing in the sums. Integer kinds round each row of x first (see `round_row`), sum exactly and
// scale once (int8) or per group of 32 (int4).

#pragma once

#include <vector>

#include "inputs.h"
#include "tiles.h"

constexpr int ROW_BLOCK = 64;  // rows of x that stay in cache while W streams by
constexpr int FEW_INTEGER_ROWS = 3;  // up to which vectors are as fast as matrix units

// Products that stay in registers: FEW_ROWS of x beside 4 rows of W, or where x has more rows,
// MORE_ROWS of them beside OUTPUTS rows of W.
#if defined(__AVX512F__)
constexpr int FEW_ROWS = 6;
constexpr int MORE_ROWS = 3, OUTPUTS = 8;
#else
constexpr int FEW_ROWS = 3;
constexpr int MORE_ROWS = 2, OUTPUTS = 4;
#endif
constexpr int INPUTS_BLOCK = 512;   // inputs whose x and W stay in the first cache between rows

// Whether the matrix units serve. For bfloat16 that is a matter of the layer alone, for they round
// sums in an order of their own; integers are the same either way.
inline bool uses_tiles(const Linear& layer, int rows) {
    if (!tiles_are_allowed() || layer.outputs < TILE_OUTPUTS) return false;
    return layer.kind == BFLOAT16 || (layer.kind == INT8 && rows > FEW_INTEGER_ROWS);
}

// Memory for some rows in the form that a layer wants.
struct PreparedRows {
    std::vector<int8_t> high, low;
    std::vector<float> scale;
    std::vector<int64_t> total;
    std::vector<int32_t> offsets;
    std::vector<uint32_t> tiles;

    Inputs of(const Linear& layer, Inputs inputs) {
        const size_t rows = inputs.rows;
        inputs.width = padded(layer.inputs, BLOCK);
        const size_t size = rows * inputs.width;
        if (is_integer(layer)) {
            inputs.planes = layer.activation_bits > 8 ? 2 : 1;
            inputs.high = grown(high, size);
            inputs.low = grown(low, size);
            inputs.scale = grown(scale, rows);
            inputs.total = grown(total, rows);
            inputs.offsets = grown(offsets, size / BLOCK * 16);
        }
        if (uses_tiles(layer, inputs.rows))
            inputs.tiles = grown(tiles, is_integer(layer) ? inputs.planes * size / 4 : 3 * size / 2);
        return inputs;
    }

    template <class T>
    static T* grown(std::vector<T>& memory, size_t size) {
        if (memory.size() < size) memory.resize(size);
        return memory.data();
    }
};

inline bool needs_preparation(const Linear& layer, const Inputs& in) {
    return is_integer(layer) || in.tiles;
}

// Brings rows [begin, end) into the form that the layer wants.
inline void prepare_rows(const Linear& layer, const Inputs& in, int begin, int end) {
    if (is_integer(layer)) {
        for (int m = begin; m < end; m++) round_row(in, m, layer.inputs, layer.activation_bits);
        if (in.tiles) arrange_rows(in, begin, end);
    } else if (in.tiles) {
        split_rows(in, layer.inputs, begin, end);
    }
}

// ---- float arithmetic ----

// sums[m][j] += x[m] . w[j] over inputs [begin, end), lane by lane. `next`, where the rows of W behind
// these lie, is fetched meanwhile in one sweep; null if it is there.
template <int M, int J, class W>
KERNEL void accumulate(const W* const* w, const float* x, long stride, int begin, int end,
                       const W* next, Vec (*sums)[J]) {
    constexpr int LINE = 64 / sizeof(W);
    Vec partial[M][J];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < J; j++) partial[m][j] = sums[m][j];
    const int full = begin + (end - begin) / LANES * LANES;
    for (int i = begin; i < full; i += LANES) {
        Vec values[M];
        for (int m = 0; m < M; m++) values[m] = load(x + m * stride + i);
        for (int j = 0; j < J; j++) {
            const Vec weights = load(w[j] + i);
            if (next && i * sizeof(W) % 64 == 0) prefetch(next + i * J + j * LINE);
            for (int m = 0; m < M; m++)
                partial[m][j] = multiply_add(weights, values[m], partial[m][j]);
        }
    }
    if (const int rest = end - full) {
        for (int m = 0; m < M; m++) {
            const Vec values = load_some(x + m * stride + full, rest);
            for (int j = 0; j < J; j++)
                partial[m][j] = multiply_add(load_some(w[j] + full, rest), values, partial[m][j]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < J; j++) sums[m][j] = partial[m][j];
}

template <int M, int J, class W>
inline void accumulate_rows(int rows, const W* const* w, const float* x, long stride, int begin,
                            int end, const W* next, Vec (*sums)[J]) {
    if constexpr (M > 1) {
        if (rows < M)
            return accumulate_rows<M - 1, J>(rows, w, x, stride, begin, end, next, sums);
    }
    accumulate<M, J>(w, x, stride, begin, end, next, sums);
}

template <class W>
inline void widen(const W* w, int inputs, float* out) {
    const int full = inputs / LANES * LANES, rest = inputs - full;
    for (int i = 0; i < full; i += LANES) store(out + i, load(w + i));
    if (rest) store_some(out + full, load_some(w + full, rest), rest);
}

// ---- integer arithmetic ----

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define HAS_VNNI 1
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
#endif

#if defined(HAS_VNNI)
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
#endif

// out[m][j] = sum over groups of scale * (sum of (nibble - 8) * x), before the row's own scale.
#if defined(HAS_VNNI)
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
#else
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

// ---- a share of one layer ----

// Calls finish(row, output, count, values) for the dot products of outputs [begin, end), J outputs
// and M rows at a time; WIDENS turns weights into floats once for all rows.
template <int M, int J, bool WIDENS, class W, class Finish>
inline void float_blocks(const Linear& layer, const Inputs& in, int begin, int end,
                         const Finish& finish) {
    const int inputs = layer.inputs;
    alignas(64) float wide[WIDENS ? J : 1][WIDENS ? INPUTS_BLOCK : 1];
    Vec sums[ROW_BLOCK][J];
    for (int o = begin; o < end; o += J) {
        const int count = end - o < J ? end - o : J;
        const W* w[J];
        for (int j = 0; j < J; j++)
            w[j] = static_cast<const W*>(layer.weight) +
                   static_cast<long>(o + (j < count ? j : 0)) * inputs;
        for (int m = 0; m < in.rows; m++)
            for (int j = 0; j < J; j++) sums[m][j] = Vec{};
        const int block = in.rows <= M ? inputs : INPUTS_BLOCK;
        for (int i = 0; i < inputs; i += block) {
            const int stop = inputs - i < block ? inputs : i + block;
            const W* next = w[0] + static_cast<long>(J) * inputs;
            const float* widened[J];
            if constexpr (WIDENS)
                for (int j = 0; j < J; j++) {
                    const W* share = next + i * J + j * (stop - i);
                    for (int k = 0; k < stop - i; k += 64 / sizeof(W)) prefetch(share + k);
                    widen(w[j] + i, stop - i, wide[j]);
                    widened[j] = wide[j];
                }
            for (int m = 0; m < in.rows; m += M) {
                const int rows = in.rows - m < M ? in.rows - m : M;
                const float* x = in.x + m * in.stride;
                if constexpr (WIDENS)
                    accumulate_rows<M, J, float>(rows, widened, x + i, in.stride, 0, stop - i, nullptr,
                                                 sums + m);
                else
                    accumulate_rows<M, J>(rows, w, x, in.stride, i, stop, m ? nullptr : next, sums + m);
            }
        }
        for (int m = 0; m < in.rows; m++) {
            float values[J];
            for (int j = 0; j < J; j += 4) sum4(sums[m] + j, values + j);
            finish(m, o, count, values);
        }
    }
}

template <class W, class Finish>
inline void float_share(const Linear& layer, const Inputs& in, int begin, int end,
                        const Finish& finish) {
    if (in.rows <= FEW_ROWS)
        float_blocks<FEW_ROWS, 4, false, W>(layer, in, begin, end, finish);
    else
        float_blocks<MORE_ROWS, OUTPUTS, sizeof(W) < sizeof(float), W>(layer, in, begin, end, finish);
}

template <int PLANES, class Finish>
inline void integer_share(const Linear& layer, const Inputs& in, int begin, int end,
                          const Finish& finish) {
    constexpr int MAX = LANES == 16 ? 6 / PLANES : 1;
    float out[MAX][4];
    for (int o = begin; o < end; o += 4) {
        const int count = end - o < 4 ? end - o : 4;
        int outputs[4];
        for (int j = 0; j < 4; j++) outputs[j] = o + (j < count ? j : 0);
        for (int m = 0; m < in.rows; m += MAX) {
            const int rows = in.rows - m < MAX ? in.rows - m : MAX;
            const long ahead = m == 0 ? 4l * layer.inputs : 0;
            rounded_dots_of<MAX, PLANES>(rows, layer, outputs, in, m, ahead, out);
            for (int r = 0; r < rows; r++) finish(m + r, o, count, out[r]);
        }
    }
}

#if defined(HAS_TILES)
template <class Finish>
inline void tiled_linear(const Linear& layer, const Inputs& in, int begin, int end,
                         const Finish& finish) {
    if (layer.kind == BFLOAT16) {
        tile_share<BFloat16, 3>(layer, in, begin, end, [&](int m, int o, float most, float rest) {
            const float value = most + rest;
            finish(m, o, 1, &value);
        });
        return;
    }
    const auto scaled = [&](int m, int o, int64_t sum) {
        const float value = static_cast<float>(sum) * (in.scale[m] * layer.scales[o]);
        finish(m, o, 1, &value);
    };
    if (in.planes == 2)
        tile_share<int8_t, 2>(layer, in, begin, end, [&](int m, int o, int32_t high, int32_t low) {
            scaled(m, o, 128 * int64_t{high} + low);
        });
    else
        tile_share<int8_t, 1>(layer, in, begin, end,
                              [&](int m, int o, int32_t sum, int32_t) { scaled(m, o, sum); });
}
#endif

template <class Finish>
inline void linear_share(const Linear& layer, const Inputs& inputs, int begin, int end,
                         const Finish& finish) {
    if (begin >= end) return;
#if defined(HAS_TILES)
    if (inputs.tiles) return tiled_linear(layer, inputs, begin, end, finish);
#endif
    for (int from = 0; from < inputs.rows; from += ROW_BLOCK) {
        const int stop = inputs.rows < from + ROW_BLOCK ? inputs.rows : from + ROW_BLOCK;
        const Inputs in = inputs.cut(from, stop);
        const auto shifted = [&](int m, int o, int count, const float* values) {
            finish(from + m, o, count, values);
        };
        switch (layer.kind) {
            case FLOAT32: float_share<float>(layer, in, begin, end, shifted); break;
            case BFLOAT16: float_share<BFloat16>(layer, in, begin, end, shifted); break;
            case INT8_FLOAT: {
                const auto scaled = [&](int m, int o, int count, const float* values) {
                    float y[OUTPUTS];
                    for (int j = 0; j < count; j++) y[j] = values[j] * layer.scales[o + j];
                    shifted(m, o, count, y);
                };
                float_share<int8_t>(layer, in, begin, end, scaled);
                break;
            }
            default:
                if (in.planes == 2)
                    integer_share<2>(layer, in, begin, end, shifted);
                else
                    integer_share<1>(layer, in, begin, end, shifted);
        }
    }
}

// y += or = x W^T + b for outputs [begin, end).
template <bool ADDS>
inline void linear_into(const Linear& layer, const Inputs& in, int begin, int end, float* y,
                        long stride) {
    linear_share(layer, in, begin, end,
                 [&](int m, int o, int count, const float* values) {
                     float* out = y + m * stride + o;
                     for (int j = 0; j < count; j++) {
                         float value = layer.bias ? values[j] + layer.bias[o + j] : values[j];
                         out[j] = ADDS ? out[j] + value : value;
                     }
                 });
}
