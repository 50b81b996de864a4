// Linear layers as Python describes them, and the rows that go into them.
//
// The integer kinds round each row first; matrix units want rows in an order of their own.

#pragma once

#include <vector>

#include "vec.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8_FLOAT = 2, INT8 = 3, INT4 = 4 };

constexpr int GROUP = 32;  // inputs that share a scale in INT4
constexpr int BLOCK = 64;  // inputs per step of the integer kernels; rounded rows are padded to it

// One linear layer; the caller keeps what it points to.
struct Linear {
    const void* weight;
    const float* scales;  // INT8: [O]; INT4: [O, padded I / GROUP]
    const float* bias;    // [O] or null
    int32_t kind, outputs, inputs, activation_bits;
};

inline int padded(int n, int unit) { return (n + unit - 1) / unit * unit; }

inline bool is_integer(const Linear& layer) { return layer.kind == INT8 || layer.kind == INT4; }

// Rows of x, as floats and, for the integer kinds, rounded.
struct Inputs {
    const float* x;
    long stride;
    int rows;
    // [rows, width] with width = padded(I, BLOCK); x ~ scale * (128 * high + low), or scale * high
    // where one plane is enough.
    int width = 0;
    int planes = 0;
    int8_t* high = nullptr;
    int8_t* low = nullptr;
    float* scale = nullptr;
    int64_t* total = nullptr;    // sum of the rounded row
    int32_t* offsets = nullptr;  // INT4: [rows, width / BLOCK, 16], -8 * the sums of both groups
    uint32_t* tiles = nullptr;   // for matrix units (tiles.h)

    // Rows [begin, end) alone; tiles, which stand in groups, cannot be cut.
    Inputs cut(int begin, int end) const {
        Inputs part = *this;
        part.x += begin * stride;
        part.rows = end - begin;
        part.tiles = nullptr;
        if (!planes) return part;
        part.high += static_cast<long>(begin) * width;
        part.low += static_cast<long>(begin) * width;
        part.scale += begin;
        part.total += begin;
        part.offsets += static_cast<long>(begin) * width / BLOCK * 16;
        return part;
    }
};

// Row m of x to integers of `bits` bits: x / s, s = largest magnitude / (2^(bits-1) - 1), or 1 where
// that is no normal number; halves to even. A row that is not finite gets a scale that is not.
inline void round_row(const Inputs& in, int m, int inputs, int bits) {
    const float* x = in.x + m * in.stride;
    Vec tops{};
    int full = inputs / LANES * LANES, rest = inputs - full;
    auto widen = [&](Vec v) {
        v = absolute(v);
        tops = where((v > tops) | (v != v), v, tops);
    };
    for (int i = 0; i < full; i += LANES) widen(load(x + i));
    if (rest) widen(load_some(x + full, rest));
    float lanes[LANES], top = 0;
    store(lanes, tops);
    for (float lane : lanes) top = lane > top || lane != lane ? lane : top;
    const int limit = (1 << (bits - 1)) - 1;
    float scale = top / static_cast<float>(limit);
    if (!(scale >= 1.17549435e-38f)) scale = 1;
    if (!(top < INFINITY)) scale = NAN;
    in.scale[m] = scale;
    int8_t* high = in.high + static_cast<long>(m) * in.width;
    int8_t* low = in.low + static_cast<long>(m) * in.width;
    int32_t* offsets = in.offsets + static_cast<long>(m) * in.width / BLOCK * 16;
    int64_t total = 0;
    for (int at = 0; at < in.width; at += BLOCK) {
        int32_t whole[BLOCK];
        for (int i = 0; i < BLOCK; i += LANES) {
            int left = inputs - at - i;
            Vec v = left >= LANES ? load(x + at + i) : load_some(x + at + i, left > 0 ? left : 0);
            v /= scale;
            v = (v + 12582912.0f) - 12582912.0f;  // to the nearest integer, halves to even
            VecInt n = __builtin_convertvector(v, VecInt);
            n = n > limit ? VecInt{} + limit : n;
            n = n < -limit ? VecInt{} - limit : n;
            memcpy(whole + i, &n, sizeof n);
        }
        int32_t sums[2] = {0, 0};
        for (int i = 0; i < BLOCK; i++) sums[i / GROUP] += whole[i];
        total += sums[0] + sums[1];
        for (int i = 0; i < 16; i++) offsets[at / BLOCK * 16 + i] = 0;
        offsets[at / BLOCK * 16] = -8 * sums[0];
        offsets[at / BLOCK * 16 + 8] = -8 * sums[1];
        if (in.planes == 1) {
            for (int i = 0; i < BLOCK; i++) high[at + i] = static_cast<int8_t>(whole[i]);
        } else {
            for (int i = 0; i < BLOCK; i++) {
                high[at + i] = static_cast<int8_t>(whole[i] >> 7);
                low[at + i] = static_cast<int8_t>(whole[i] & 127);
            }
        }
    }
    in.total[m] = total;
}

inline void prefetch(const void* w) { __builtin_prefetch(w, 0, 2); }
