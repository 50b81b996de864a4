// Attention of chains and draft trees over paged keys and values, read where they lie.
//
// The keys of a row are those of its path: cached positions, chain, ancestors, itself. They are
// taken in tiles of KEY_TILE positions from position 0; inside a tile the softmax has its own maximum
// and sum, and tiles are folded into the row in order (the online softmax of Milakov and Gimelshein
// 2018; tiles may be done by different threads, as in Flash-Decoding, Dao et al. 2023). Tiles begin
// at fixed positions, so neither the number of threads, nor the split of a prompt into passes, nor
// other rows change a bit of the result.

#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "inputs.h"
#include "team.h"

constexpr int KEY_TILE = 128;
constexpr int ITEM_ROWS = 16;    // of one work item
constexpr int FEW_ITEM_ROWS = 4;  // to which items shrink where there is little work
constexpr int MAX_QUERIES = 4;  // that share a load of values
constexpr long MAX_PARTIALS = 16 << 20;  // floats of partial states; beyond that tiles stay together

// One sequence of the pass, as Python lays it down (all int64).
struct SpanRecord {
    const int32_t* blocks;
    int64_t block_size, cached, chain, nodes;
};

// A row of the pass: its position, and the nodes of its path (places behind cached and chain).
struct RowPath {
    int span, position;
    int first_node, nodes;  // range in Paths::nodes; none for rows of the chain
};

struct Paths {
    const SpanRecord* spans;
    int num_spans;
    std::vector<RowPath> rows;
    std::vector<int> nodes;
    std::vector<int> first_row;  // per span, and the number of rows behind them

    long slot(int span, int place) const {
        const SpanRecord& s = spans[span];
        return static_cast<long>(s.blocks[place / s.block_size]) * s.block_size +
               place % s.block_size;
    }

    // Where position p of the row's path stands in its block table.
    int place(const RowPath& row, int p) const {
        const SpanRecord& s = spans[row.span];
        int context = static_cast<int>(s.cached + s.chain);
        return p < context ? p : context + nodes[row.first_node + p - context];
    }

    // Where row r itself stands in its block table.
    int place_of_row(int r) const {
        const int span = rows[r].span;
        return static_cast<int>(spans[span].cached) + r - first_row[span];
    }

    int context(int span) const {
        return static_cast<int>(spans[span].cached + spans[span].chain);
    }

    // parents: of all nodes of all spans, one span after the other.
    void trace(const SpanRecord* records, int count, const int64_t* parents) {
        spans = records;
        num_spans = count;
        rows.clear();
        nodes.clear();
        first_row.clear();
        for (int s = 0; s < count; s++) {
            const SpanRecord& span = records[s];
            first_row.push_back(static_cast<int>(rows.size()));
            for (int i = 0; i < span.chain; i++)
                rows.push_back({s, static_cast<int>(span.cached) + i, 0, 0});
            const int above = static_cast<int>(rows.size());
            for (int n = 0; n < span.nodes; n++) {
                int first = static_cast<int>(nodes.size());
                if (parents[n] >= 0) {
                    RowPath parent = rows[above + parents[n]];
                    for (int i = 0; i < parent.nodes; i++) {
                        int node = nodes[parent.first_node + i];
                        nodes.push_back(node);
                    }
                }
                nodes.push_back(n);
                int depth = static_cast<int>(nodes.size()) - first;
                rows.push_back({s, context(s) + depth - 1, first, depth});
            }
            parents += span.nodes;
        }
        first_row.push_back(static_cast<int>(rows.size()));
    }
};

struct AttentionShape {
    int32_t heads, groups, key_width, value_width;
    float scale, softcap;
    int32_t sliding, chunk;
    const float* sinks;  // [heads] or null
};

struct KV {
    float* keys;    // [slots, groups, key_width]
    float* values;  // [slots, groups, value_width]
};

// The state of one query's softmax: its maximum, its sum, and the weighted values.
struct Fold {
    float top, sum;
    float* values;
};

inline void fold_in(Fold& into, float top, float sum, const float* values, int width) {
    if (sum == 0) return;
    if (into.sum == 0) {
        into.top = top;
        into.sum = sum;
        std::copy(values, values + width, into.values);
        return;
    }
    float higher = into.top > top ? into.top : top;
    Vec scales{};
    scales[0] = into.top - higher;
    scales[1] = top - higher;
    scales = exponential(scales);
    const float ours = scales[0], theirs = scales[1];
    into.top = higher;
    into.sum = into.sum * ours + sum * theirs;
    int full = width / LANES * LANES;
    for (int i = 0; i < full; i += LANES)
        store(into.values + i, load(into.values + i) * ours + load(values + i) * theirs);
    if (int rest = width - full) {
        Vec mixed = load_some(into.values + full, rest) * ours + load_some(values + full, rest) * theirs;
        store_some(into.values + full, mixed, rest);
    }
}

// What a thread needs to work on a tile.
struct TileScratch {
    const float* keys[KEY_TILE];
    const float* values[KEY_TILE];
    alignas(64) float scores[MAX_QUERIES][KEY_TILE];
    std::vector<float> weighted;  // [MAX_QUERIES, value width]
};

struct Query {
    const float* x;
    int begin, end;  // positions of the tile that it sees
};

inline void fetch(const float* row, int width) {
    for (int i = 0; i < width; i += 16) __builtin_prefetch(row + i, 0, 3);
}

// scores[q][p] = x[q] . key for every p below `count`.
template <int Q>
inline void score(const Query* queries, const AttentionShape& shape, int count, bool is_first,
                  TileScratch& scratch) {
    constexpr int AHEAD_OF_KEYS = 12;
    const float* const* keys = scratch.keys;
    float (*scores)[KEY_TILE] = scratch.scores;
    const int width = shape.key_width, full = width / LANES * LANES, rest = width - full;
    for (int p = 0; p < count; p += 4) {
        if (is_first)  // rows stand apart in memory: the processor does not guess the next one
            for (int j = 0; j < 4; j++) {
                fetch(keys[std::min(p + j + AHEAD_OF_KEYS, count - 1)], width);
                fetch(scratch.values[std::min(p + j, count - 1)], shape.value_width);
            }
        Vec sums[Q][4] = {};
        const float* k[4];
        for (int j = 0; j < 4; j++) k[j] = keys[p + j < count ? p + j : count - 1];
        for (int i = 0; i < full; i += LANES) {
            Vec key[4];
            for (int j = 0; j < 4; j++) key[j] = load(k[j] + i);
            for (int q = 0; q < Q; q++) {
                const Vec x = load(queries[q].x + i);
                for (int j = 0; j < 4; j++) sums[q][j] = multiply_add(x, key[j], sums[q][j]);
            }
        }
        if (rest) {
            Vec key[4];
            for (int j = 0; j < 4; j++) key[j] = load_some(k[j] + full, rest);
            for (int q = 0; q < Q; q++) {
                const Vec x = load_some(queries[q].x + full, rest);
                for (int j = 0; j < 4; j++) sums[q][j] = multiply_add(x, key[j], sums[q][j]);
            }
        }
        for (int q = 0; q < Q; q++) sum4(sums[q], scores[q] + p);
    }
}

// Scores to weights exp(score - top), zero where the query does not look; returns top and sum.
// Vectors of which it sees nothing are left out of the sums, to which they would add zeros.
inline void weigh(float* scores, const Query& query, int positions, const AttentionShape& shape,
                  float& top, float& sum_of_weights) {
    VecInt lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const int stop = padded(positions, LANES);
    Vec tops = broadcast(-INFINITY);
    for (int p = 0; p < stop; p += LANES) {
        Vec s = load(scores + p) * shape.scale;
        if (shape.softcap > 0) s = shape.softcap * hyperbolic_tangent(s / shape.softcap);
        const VecInt position = lane + p;
        s = where((position >= query.begin) & (position < query.end), s, broadcast(-INFINITY));
        store(scores + p, s);
        tops = maximum(tops, s);
    }
    top = max_lane(tops);
    Vec sums{};
    for (int p = 0; p < stop; p += LANES) {
        const VecInt position = lane + p;
        const Vec w = where((position >= query.begin) & (position < query.end),
                            exponential(load(scores + p) - top), Vec{});
        store(scores + p, w);
        sums += w;
    }
    sum_of_weights = sum(sums);
}

// out[q] = sum over p of weight * value, in order of p. Values that a row does not see weigh 0: only if
// a later row of its own sequence is not finite does it learn of it.
template <int Q, int V>
inline void mix(const float (*weights)[KEY_TILE], const float* const* values, int begin, int end,
                int from, float* out, int width) {
    Vec sums[Q][V] = {};
    for (int p = begin; p < end; p++) {
        Vec v[V];
        for (int i = 0; i < V; i++) v[i] = load(values[p] + from + i * LANES);
        for (int q = 0; q < Q; q++) {
            const Vec weight = broadcast(weights[q][p]);
            for (int i = 0; i < V; i++) sums[q][i] = multiply_add(v[i], weight, sums[q][i]);
        }
    }
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < V; i++) store(out + static_cast<long>(q) * width + from + i * LANES, sums[q][i]);
}

template <int Q>
inline void mix_rows(const float (*weights)[KEY_TILE], const float* const* values, int begin, int end,
                     float* out, int width) {
    constexpr int V = LANES == 16 ? 4 : 2;
    int from = 0;
    for (; from + V * LANES <= width; from += V * LANES)
        mix<Q, V>(weights, values, begin, end, from, out, width);
    for (; from + LANES <= width; from += LANES)
        mix<Q, 1>(weights, values, begin, end, from, out, width);
    if (int rest = width - from)
        for (int q = 0; q < Q; q++) {
            Vec sums{};
            for (int p = begin; p < end; p++)
                sums = multiply_add(load_some(values[p] + from, rest), broadcast(weights[q][p]), sums);
            store_some(out + static_cast<long>(q) * width + from, sums, rest);
        }
}

// One tile for Q queries over the same keys, folded into their states; the first to read these keys
// and values fetches them early.
template <int Q>
inline void attend_queries(const Query* queries, Fold* folds, int positions,
                           const AttentionShape& shape, bool is_first, TileScratch& scratch) {
    const int width = shape.value_width;
    float tops[Q], sums[Q];
    float* out = scratch.weighted.data();
    int begin = KEY_TILE, end = 0;
    score<Q>(queries, shape, positions, is_first, scratch);
    for (int q = 0; q < Q; q++) {
        begin = std::min(begin, queries[q].begin);
        end = std::max(end, queries[q].end);
        weigh(scratch.scores[q], queries[q], positions, shape, tops[q], sums[q]);
    }
    mix_rows<Q>(scratch.scores, scratch.values, begin, end, out, width);
    for (int q = 0; q < Q; q++)
        fold_in(folds[q], tops[q], sums[q], out + static_cast<long>(q) * width, width);
}

inline void attend_tile(const Query* queries, Fold* folds, int count, int positions,
                        const AttentionShape& shape, bool is_first, TileScratch& scratch) {
    switch (count) {
        case 1: return attend_queries<1>(queries, folds, positions, shape, is_first, scratch);
        case 2: return attend_queries<2>(queries, folds, positions, shape, is_first, scratch);
        case 3: return attend_queries<3>(queries, folds, positions, shape, is_first, scratch);
        default: return attend_queries<4>(queries, folds, positions, shape, is_first, scratch);
    }
}

// First position that a row sees.
inline int first_seen(int position, const AttentionShape& shape) {
    int first = 0;
    if (shape.sliding) first = std::max(first, position - shape.sliding + 1);
    if (shape.chunk) first = std::max(first, position / shape.chunk * shape.chunk);
    return first;
}

struct AttentionCall {
    const Paths& paths;
    AttentionShape shape;
    KV kv;
    const float* query;  // row r, head h at query + r * query_stride + h * key_width
    long query_stride;
    float* out;  // [rows, heads, value_width]
};

// Pointers to the keys and values of positions [at, at + positions) on the row's path.
inline void point(const AttentionCall& call, const RowPath& row, int at, int positions, int group,
                  TileScratch& scratch) {
    const AttentionShape& s = call.shape;
    const Paths& paths = call.paths;
    const long key_stride = static_cast<long>(s.groups) * s.key_width;
    const long value_stride = static_cast<long>(s.groups) * s.value_width;
    const float* keys = call.kv.keys + static_cast<long>(group) * s.key_width;
    const float* values = call.kv.values + static_cast<long>(group) * s.value_width;
    const SpanRecord& span = paths.spans[row.span];
    const int block_size = static_cast<int>(span.block_size);
    const int in_line = std::clamp(paths.context(row.span) - at, 0, positions);
    const int32_t* block = span.blocks + at / block_size;
    for (int p = 0, offset = at % block_size; p < in_line; block++, offset = 0) {
        const long first = static_cast<long>(*block) * block_size;
        for (; offset < block_size && p < in_line; offset++, p++) {
            scratch.keys[p] = keys + (first + offset) * key_stride;
            scratch.values[p] = values + (first + offset) * value_stride;
        }
    }
    for (int p = in_line; p < positions; p++) {  // nodes of a tree stand apart
        const long slot = paths.slot(row.span, paths.place(row, at + p));
        scratch.keys[p] = keys + slot * key_stride;
        scratch.values[p] = values + slot * value_stride;
    }
}

// Folds one tile into the states of rows [begin, end) of a span and one group of heads:
// folds[(row - begin) * ratio + head].
inline void attend_rows(const AttentionCall& call, int begin, int end, int group, int tile,
                        Fold* folds, TileScratch& scratch) {
    const AttentionShape& shape = call.shape;
    const int ratio = shape.heads / shape.groups, at = tile * KEY_TILE;
    const std::vector<RowPath>& rows = call.paths.rows;
    const bool is_shared =
        at + KEY_TILE <= call.paths.context(rows[begin].span) || rows[end - 1].nodes == 0;
    Query queries[MAX_QUERIES];
    Fold states[MAX_QUERIES];
    Fold* places[MAX_QUERIES];
    int count = 0, pointed = 0;
    bool is_first = true;  // that reads these keys
    scratch.weighted.resize(MAX_QUERIES * static_cast<size_t>(shape.value_width));
    const auto flush = [&] {
        if (count) attend_tile(queries, states, count, pointed, shape, is_first, scratch);
        if (count) is_first = false;
        for (int q = 0; q < count; q++) *places[q] = states[q];
        count = 0;
    };
    if (is_shared) {
        const RowPath* longest = &rows[begin];
        for (int r = begin; r < end; r++)
            if (rows[r].position > longest->position) longest = &rows[r];
        pointed = std::min(KEY_TILE, longest->position + 1 - at);
        if (pointed > 0) point(call, *longest, at, pointed, group, scratch);
    }
    for (int r = begin; r < end; r++) {
        const int seen = std::min(KEY_TILE, rows[r].position + 1 - at);
        const int from = std::max(0, first_seen(rows[r].position, shape) - at);
        if (from >= seen) continue;
        if (!is_shared) {
            flush();
            pointed = seen;
            is_first = true;
            point(call, rows[r], at, seen, group, scratch);
        }
        for (int h = 0; h < ratio; h++) {
            const float* x = call.query + r * call.query_stride +
                             static_cast<long>(group * ratio + h) * shape.key_width;
            queries[count] = {x, from, seen};
            places[count] = &folds[(r - begin) * ratio + h];
            states[count] = *places[count];
            if (++count == MAX_QUERIES) flush();
        }
    }
    flush();
}

// Some rows of one span, one group of heads, and a range of tiles.
struct AttentionItem {
    int begin, end, group;
    int first_tile, tiles;
    long partial;  // where its partial states begin, -1 if it folds all tiles itself
};

struct AttentionPlan {
    std::vector<AttentionItem> items;
    std::vector<float> partials;  // per state: top, sum, values
    bool is_split = false;
    std::atomic<int> next{0};
    int heads = 0, ratio = 0, width = 0;

    // Row blocks and groups make the work items; where those are fewer than threads can share
    // evenly, blocks shrink and tiles become items of their own, to be folded afterwards.
    void make(const Paths& paths, const AttentionShape& shape, int threads) {
        items.clear();
        heads = shape.heads;
        ratio = shape.heads / shape.groups;
        width = shape.value_width;
        int max_rows = ITEM_ROWS;
        is_split = threads > 1 && blocks(paths, max_rows) * shape.groups < 4 * threads &&
                   partial_size(paths) < MAX_PARTIALS;
        if (is_split) max_rows = FEW_ITEM_ROWS;
        long states = 0;
        for (int s = 0; s < paths.num_spans; s++)
            for (int begin = paths.first_row[s]; begin < paths.first_row[s + 1]; begin += max_rows) {
                const int end = std::min(begin + max_rows, paths.first_row[s + 1]);
                int last = 0, first = 1 << 30;
                for (int r = begin; r < end; r++) {
                    last = std::max(last, paths.rows[r].position);
                    first = std::min(first, first_seen(paths.rows[r].position, shape));
                }
                const int from = first / KEY_TILE, tiles = last / KEY_TILE + 1 - from;
                for (int g = 0; g < shape.groups; g++) {
                    if (!is_split) {
                        items.push_back({begin, end, g, from, tiles, -1});
                        continue;
                    }
                    for (int t = 0; t < tiles; t++) {
                        items.push_back({begin, end, g, from + t, 1, states});
                        states += static_cast<long>(end - begin) * ratio;
                    }
                }
            }
        if (is_split) partials.resize(states * (width + 2));
        next.store(0, std::memory_order_relaxed);
    }

    // Floats that the states of all rows, heads and tiles would take.
    long partial_size(const Paths& paths) const {
        long tiles = 0;
        for (const RowPath& row : paths.rows) tiles += row.position / KEY_TILE + 1;
        return tiles * heads * (width + 2);
    }

    static int blocks(const Paths& paths, int max_rows) {
        int count = 0;
        for (int s = 0; s < paths.num_spans; s++)
            count += (paths.first_row[s + 1] - paths.first_row[s] + max_rows - 1) / max_rows;
        return count;
    }
};

struct AttentionScratch {
    TileScratch tile;
    std::vector<float> memory;
    std::vector<Fold> folds;

    Fold* fresh(int count, int width) {
        memory.resize(static_cast<size_t>(count) * width);
        folds.resize(count);
        for (int i = 0; i < count; i++)
            folds[i] = {-INFINITY, 0, memory.data() + static_cast<long>(i) * width};
        return folds.data();
    }
};

inline void finish_row(const AttentionCall& call, int row, int head, const Fold& state) {
    const int width = call.shape.value_width;
    float* out = call.out + (static_cast<long>(row) * call.shape.heads + head) * width;
    float total = state.sum, scale = 1;
    if (call.shape.sinks) {
        const float sink = call.shape.sinks[head];
        const float higher = state.top > sink ? state.top : sink;
        Vec scales{};
        scales[0] = state.top - higher;
        scales[1] = sink - higher;
        scales = exponential(scales);
        scale = scales[0];
        total = total * scale + scales[1];
    }
    for (int i = 0; i < width; i++) out[i] = state.values[i] * scale / total;
}

// All threads of the team call this together; there is a barrier inside where work was split.
inline void attend_together(const AttentionCall& call, AttentionPlan& plan, const Worker& worker,
                            AttentionScratch& scratch) {
    const int ratio = plan.ratio, width = plan.width;
    const int count = static_cast<int>(plan.items.size());
    for (int i = plan.next.fetch_add(1); i < count; i = plan.next.fetch_add(1)) {
        const AttentionItem& item = plan.items[i];
        const int states = (item.end - item.begin) * ratio;
        Fold* whole = scratch.fresh(states, width);
        for (int t = 0; t < item.tiles; t++)
            attend_rows(call, item.begin, item.end, item.group, item.first_tile + t, whole,
                        scratch.tile);
        if (item.partial < 0) {
            for (int s = 0; s < states; s++)
                finish_row(call, item.begin + s / ratio, item.group * ratio + s % ratio, whole[s]);
            continue;
        }
        for (int s = 0; s < states; s++) {
            float* partial = plan.partials.data() + (item.partial + s) * (width + 2);
            partial[0] = whole[s].top;
            partial[1] = whole[s].sum;
            if (whole[s].sum != 0) std::copy(whole[s].values, whole[s].values + width, partial + 2);
        }
    }
    if (!plan.is_split) return;
    worker.wait();
    // Items of one row block and group stand side by side, tile after tile.
    int group_of_items = 0;
    for (int i = 0; i < count; group_of_items++) {
        int stop = i + 1;
        const AttentionItem& item = plan.items[i];
        while (stop < count && plan.items[stop].begin == item.begin && plan.items[stop].group == item.group)
            stop++;
        if (group_of_items % worker.count == worker.index) {
            const int states = (item.end - item.begin) * ratio;
            Fold* whole = scratch.fresh(states, width);
            for (int s = 0; s < states; s++) {
                for (int t = i; t < stop; t++) {
                    const float* partial = plan.partials.data() + (plan.items[t].partial + s) * (width + 2);
                    fold_in(whole[s], partial[0], partial[1], partial + 2, width);
                }
                finish_row(call, item.begin + s / ratio, item.group * ratio + s % ratio, whole[s]);
            }
        }
        i = stop;
    }
}
