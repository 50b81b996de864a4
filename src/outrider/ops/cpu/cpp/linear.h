// y[M, O] = x[M, I] W[O, I]^T for few rows: every output is one dot product, summed over I in an
// order that depends on I alone.
//
// A few rows of W at a time meet a few rows of x in registers. Weights are read where the checkpoint
// has them, row after row; 16-bit and 8-bit ones are widened to float32 on the way, which changes
// nothing in the sums. Integer kinds round each row of x first (see `round_row`), sum exactly and
// scale once (int8) or per group of 32 (int4).

#pragma once

#include <vector>

#include "integer.h"
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

// Cache lines of W that are fetched during a sweep: per vector of inputs, `count` from `first` on.
template <class W>
struct Ahead {
    const W* first = nullptr;
    int count = 0;
};

// The share of the J rows of W behind these that sweep `sweep` of `sweeps` fetches. All of them fetch
// alike: were it left to the first, it would wait for memory and the others leave memory idle.
template <int J, class W>
inline Ahead<W> fetched(const W* next, int sweep, int sweeps) {
    const int each = (J + sweeps - 1) / sweeps, begin = sweep * each;
    if (begin >= J) return {};
    return {next + begin * (64 / sizeof(W)), J - begin < each ? J - begin : each};
}

// sums[m][j] += x[m] . w[j] over inputs [begin, end), lane by lane.
template <int M, int J, class W>
KERNEL void accumulate(const W* const* w, const float* x, long stride, int begin, int end,
                       Ahead<W> ahead, Vec (*sums)[J]) {
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
            if (j < ahead.count && i * sizeof(W) % 64 == 0)
                prefetch(ahead.first + i * J + j * LINE);
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
                            int end, Ahead<W> ahead, Vec (*sums)[J]) {
    if constexpr (M > 1) {
        if (rows < M)
            return accumulate_rows<M - 1, J>(rows, w, x, stride, begin, end, ahead, sums);
    }
    accumulate<M, J>(w, x, stride, begin, end, ahead, sums);
}

template <class W>
inline void widen(const W* w, int inputs, float* out) {
    const int full = inputs / LANES * LANES, rest = inputs - full;
    for (int i = 0; i < full; i += LANES) store(out + i, load(w + i));
    if (rest) store_some(out + full, load_some(w + full, rest), rest);
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
        const int sweeps = (in.rows + M - 1) / M;
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
                    accumulate_rows<M, J, float>(rows, widened, x + i, in.stride, 0, stop - i, {},
                                                 sums + m);
                else
                    accumulate_rows<M, J>(rows, w, x, in.stride, i, stop,
                                          fetched<J>(next, m / M, sweeps), sums + m);
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
    constexpr int MAX = LANES == 16 ? 6 / PLANES : LANES == 8 ? 2 : 1;
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
