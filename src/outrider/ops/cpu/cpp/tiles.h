// Matrix units (Intel AMX): 16 rows of W meet up to 16 rows of x in one instruction.
//
// bfloat16 weights meet float32 rows without loss: a float32 is the sum of three bfloat16 (8 bits of
// mantissa each), products of two bfloat16 are exact in float32, and sums are kept in float32. int8
// weights meet the two planes of rounded rows; those sums are integers. A column of a tile never
// touches another, so a row's bits do not depend on the rows beside it.

#pragma once

#include <type_traits>

#include "inputs.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int TILE_ROWS = 16;                // of W in a tile
constexpr int TILE_OUTPUTS = 2 * TILE_ROWS;  // of W in registers
constexpr int AHEAD = 4;                     // steps by which weights are fetched early

#if defined(HAS_TILES)

// Linux hands out the tile registers per process, on request.
inline bool tiles_are_allowed() {
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return allowed;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Registers 0 to 3 are sums, 4 and 5 weights, 6 and 7 rows of x.
inline void configure(int columns) {
    TileConfig config;
    for (int t = 0; t < 8; t++) {
        config.rows[t] = 16;
        config.bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 64 : 4 * columns);
    }
    // GCC 12 takes the instruction to read 8 of the 64 bytes, and would drop the stores to the rest.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// The three parts of rows [begin, end) of x in the order in which tiles read them:
// tiles[part][group of 16 rows][step of 32 inputs][pair of inputs][row of the group].
inline void split_rows(const Inputs& in, int inputs, int begin, int end) {
    const int steps = padded(inputs, 32) / 32;
    for (int m = begin; m < end; m++) {
        const int group = m / 16, column = m % 16;
        const int columns = in.rows - 16 * group < 16 ? in.rows - 16 * group : 16;
        const float* x = in.x + m * in.stride;
        const long part = static_cast<long>(in.rows) * steps * 16;
        uint32_t* out = in.tiles + static_cast<long>(group) * 16 * steps * 16 + column;
        for (int s = 0; s < steps; s++) {
            alignas(64) uint32_t pairs[3][16];
            const int left = inputs - 32 * s;
            __m512 rest[2];
            for (int half = 0; half < 2; half++) {
                const int count = left - 16 * half;
                rest[half] = (__m512)(count >= 16 ? load(x + 32 * s + 16 * half)
                                                  : load_some(x + 32 * s + 16 * half, count > 0 ? count : 0));
            }
            for (int p = 0; p < 3; p++)
                for (int half = 0; half < 2; half++) {
                    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(rest[half]);
                    _mm256_store_si256(reinterpret_cast<__m256i*>(&pairs[p][8 * half]), rounded);
                    rest[half] -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
                }
            for (int p = 0; p < 3; p++)
                for (int i = 0; i < 16; i++)
                    out[p * part + (static_cast<long>(s) * 16 + i) * columns] = pairs[p][i];
        }
    }
}

// The planes of rounded rows likewise, four inputs at a time:
// tiles[plane][group][step of 64 inputs][four inputs][row of the group].
inline void arrange_rows(const Inputs& in, int begin, int end) {
    const int steps = in.width / BLOCK;
    for (int m = begin; m < end; m++) {
        const int group = m / 16, column = m % 16;
        const int columns = in.rows - 16 * group < 16 ? in.rows - 16 * group : 16;
        const long part = static_cast<long>(in.rows) * steps * 16;
        uint32_t* out = in.tiles + static_cast<long>(group) * 16 * steps * 16 + column;
        for (int p = 0; p < in.planes; p++) {
            const int8_t* from = (p ? in.low : in.high) + static_cast<long>(m) * in.width;
            for (int i = 0; i < steps * 16; i++)
                memcpy(out + p * part + static_cast<long>(i) * columns, from + 4 * i, 4);
        }
    }
}

// Weights of a step that reaches beyond the inputs, with zeros behind them.
template <class W, int STEP>
inline void copy_tail(const W* w, long stride, int count, W (*tail)[STEP]) {
    for (int r = 0; r < TILE_OUTPUTS; r++) {
        memset(tail[r], 0, sizeof tail[r]);
        memcpy(tail[r], w + r * stride, count * sizeof(W));
    }
}

// sums[2][32][16]: W's 32 rows times up to 16 rows of x, leading and lesser parts apart.
// W is bfloat16 with 3 parts or int8 with 1 or 2; `next` are the 32 rows to be read after these.
template <class W, int PARTS>
inline void tile_products(const W* w, long stride, int inputs, const uint32_t* x, long part,
                          int columns, const W* next, void* sums) {
    constexpr int STEP = 64 / sizeof(W);
    constexpr bool is_float = sizeof(W) == 2;
    const int full = inputs / STEP, steps = (inputs + STEP - 1) / STEP;
    alignas(64) W tail[TILE_OUTPUTS][STEP];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; s++) {
        const W* weights = w + static_cast<long>(s) * STEP;
        long row_bytes = stride * static_cast<long>(sizeof(W));
        if (s < full) {
            const W* soon = s + AHEAD < full ? weights + AHEAD * STEP : next + (s + AHEAD - full) * STEP;
            for (int r = 0; r < TILE_OUTPUTS; r++) __builtin_prefetch(soon + r * stride, 0, 3);
        } else {
            copy_tail<W, STEP>(weights, stride, inputs - full * STEP, tail);
            weights = tail[0];
            row_bytes = sizeof tail[0];
        }
        const long half = row_bytes * TILE_ROWS;
        const uint32_t* values = x + static_cast<long>(s) * 16 * columns;
        _tile_loadd(4, weights, row_bytes);
        _tile_loadd(5, reinterpret_cast<const char*>(weights) + half, row_bytes);
        _tile_loadd(6, values, 4 * columns);
        if constexpr (is_float) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        } else {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 5, 6);
        }
        if constexpr (PARTS > 1) {
            _tile_loadd(7, values + part, 4 * columns);
            if constexpr (is_float) {
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            } else {
                _tile_dpbssd(2, 4, 7);
                _tile_dpbssd(3, 5, 7);
            }
        }
        if constexpr (PARTS > 2) {
            _tile_loadd(6, values + 2 * part, 4 * columns);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    char* out = static_cast<char*>(sums);
    const long bytes = 4l * TILE_ROWS * 16;
    _tile_stored(0, out, 64);
    _tile_stored(1, out + bytes, 64);
    _tile_stored(2, out + 2 * bytes, 64);
    _tile_stored(3, out + 3 * bytes, 64);
}

// Calls take(row, output, leading, lesser) for outputs [begin, end) of W and every row of x.
template <class W, int PARTS, class Take>
inline void tile_share(const Linear& layer, const Inputs& in, int begin, int end, const Take& take) {
    typedef std::conditional_t<sizeof(W) == 2, float, int32_t> Sum;
    constexpr int STEP = 64 / sizeof(W);
    const int inputs = layer.inputs;
    const int steps = (inputs + STEP - 1) / STEP;
    const long part = static_cast<long>(in.rows) * steps * 16;
    alignas(64) Sum sums[2][TILE_OUTPUTS][16];
    int configured = 0;
    for (int o = begin; o < end; o += TILE_OUTPUTS) {
        // The last block begins earlier, on rows that are done already.
        const int from = o + TILE_OUTPUTS <= layer.outputs ? o : layer.outputs - TILE_OUTPUTS;
        const int stop = end < o + TILE_OUTPUTS ? end : o + TILE_OUTPUTS;
        const W* w = static_cast<const W*>(layer.weight) + static_cast<long>(from) * inputs;
        for (int m = 0; m < in.rows; m += 16) {
            const int columns = in.rows - m < 16 ? in.rows - m : 16;
            if (columns != configured) configure(configured = columns);
            const W* next = m + 16 < in.rows ? w : w + static_cast<long>(TILE_OUTPUTS) * inputs;
            tile_products<W, PARTS>(w, inputs, inputs, in.tiles + static_cast<long>(m) * steps * 16,
                                    part, columns, next, sums);
            for (int c = 0; c < columns; c++)
                for (int r = o; r < stop; r++)
                    take(m + c, r, sums[0][r - from][c], sums[1][r - from][c]);
        }
    }
    _tile_release();
}

#else

inline bool tiles_are_allowed() { return false; }
inline void split_rows(const Inputs&, int, int, int) {}
inline void arrange_rows(const Inputs&, int, int) {}

#endif
