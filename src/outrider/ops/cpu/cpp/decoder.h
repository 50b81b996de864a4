// A whole pass of a dense Llama-family decoder by one team of threads: one call from Python.
//
// Stages of a layer, with a barrier after each:
//   norm, QKV | head norms, rotation, KV write | attention | output, residual sum |
//   norm, gate and up, SiLU | down, residual sum
// Where rows are few every thread norms (and rounds) all of them for itself rather than wait.

#pragma once

#include <vector>

#include "attention.h"
#include "linear.h"
#include "team.h"

constexpr int FEW_VALUES = 32768;  // rows * width that a thread prepares alone

struct DecoderLayer {
    const float* attention_norm;
    const float* mlp_norm;
    const float* query_norm;  // [head width] or null
    const float* key_norm;
    Linear qkv, output, gate_up, down;
    int32_t sliding, chunk, has_rope;
};

struct Decoder {
    int32_t hidden, heads, groups, head_width, inner, vocabulary, num_layers, rotated;
    float eps, scale;
    const void* embedding;  // [embedded, hidden]
    int32_t embedding_kind;  // FLOAT32 or BFLOAT16
    int32_t embedded;
    const float* final_norm;
    Linear head;
    const DecoderLayer* layers;
};

struct DecoderCall {
    const int64_t* tokens;
    const SpanRecord* spans;
    const int64_t* parents;
    const int64_t* wanted;
    const float* cosines;  // [positions, rotated]
    const float* sines;    // the same, its first half negated
    const KV* kv;          // per layer
    float* logits;         // [wanted, vocabulary]
    const float* entry;    // [rows, hidden] that enter the first layer, or null: embedded tokens
    const float* first;    // [rows, inputs of the first qkv], normed already, or null
    const int32_t* taps;   // boundaries, rising: the residual stream before layer taps[i]
    float* tapped;         // [taps, rows, hidden]
    int32_t num_spans, num_wanted, threads, num_taps;
};

inline void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
    const int full = width / LANES * LANES, rest = width - full;
    Vec squares{};
    for (int i = 0; i < full; i += LANES) {
        Vec v = load(x + i);
        squares = multiply_add(v, v, squares);
    }
    if (rest) {
        Vec v = load_some(x + full, rest);
        squares = multiply_add(v, v, squares);
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    for (int i = 0; i < full; i += LANES)
        store(out + i, load(x + i) * factor * load(weight + i));
    if (rest)
        store_some(out + full, load_some(x + full, rest) * factor * load_some(weight + full, rest), rest);
}

// Turns the leading `rotated` values of a head: x cos + (second half, first half) sin.
inline void rotate(float* x, const float* cosines, const float* sines, int rotated) {
    const int half = rotated / 2;
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        const float left = b * sines[i], right = a * sines[i + half];
        x[i] = a * cosines[i] + left;
        x[i + half] = b * cosines[i + half] + right;
    }
}

inline void silu_times(const float* gate, const float* up, int count, float* out) {
    int full = count / LANES * LANES, rest = count - full;
    auto gated = [](Vec g, Vec u) { return g / (exponential(-g) + 1.0f) * u; };
    for (int i = 0; i < full; i += LANES) store(out + i, gated(load(gate + i), load(up + i)));
    if (rest)
        store_some(out + full, gated(load_some(gate + full, rest), load_some(up + full, rest)), rest);
}

// The memory of a pass; grows to the largest one seen and is used again.
struct DecoderScratch {
    struct Private {
        std::vector<float> normed;
        PreparedRows prepared;
        AttentionScratch attention;
    };
    std::vector<float> hidden, normed, qkv, attended, gate_up, inner;
    PreparedRows prepared;
    Paths paths;
    AttentionPlan plans[2];
    std::vector<Private> threads;
};

class DecoderPass {
public:
    DecoderPass(const Decoder& model, const DecoderCall& call, DecoderScratch& scratch)
        : model_(model), call_(call), scratch_(scratch), paths_(scratch.paths) {
        paths_.trace(call.spans, call.num_spans, call.parents);
        rows_ = static_cast<int>(paths_.rows.size());
        const size_t rows = rows_;
        const int most = std::max(rows_, call.num_wanted);
        qkv_width_ = (model.heads + 2 * model.groups) * model.head_width;
        grow(scratch.hidden, rows * model.hidden);
        grow(scratch.normed, static_cast<size_t>(most) * model.hidden);
        grow(scratch.qkv, rows * qkv_width_);
        grow(scratch.attended, rows * model.heads * model.head_width);
        grow(scratch.gate_up, rows * 2 * model.inner);
        grow(scratch.inner, rows * model.inner);
        if (scratch.threads.size() < static_cast<size_t>(call.threads))
            scratch.threads.resize(call.threads);
    }

    // False, and nothing done, if a token is not in the embedding.
    bool run() {
        for (int r = 0; r < rows_ && !call_.entry; r++)
            if (call_.tokens[r] < 0 || call_.tokens[r] >= model_.embedded) return false;
        run_team(call_.threads, [&](const Worker& worker) { work(worker); });
        return true;
    }

private:
    static void grow(std::vector<float>& memory, size_t size) {
        if (memory.size() < size) memory.resize(size);
    }

    void work(const Worker& worker) {
        int tap = 0;
        embed(worker);
        worker.wait();
        for (int i = 0; i < model_.num_layers; i++) {
            tap = copy_out(worker, tap, i);
            const DecoderLayer& layer = model_.layers[i];
            // Two plans, for families whose layers take turns between two windows. The barrier
            // before attention is the one that makes a new plan known.
            AttentionPlan& plan = scratch_.plans[i % 2];
            const AttentionShape shape = {
                model_.heads, model_.groups, model_.head_width, model_.head_width, model_.scale, 0,
                layer.sliding, layer.chunk, nullptr};
            if (worker.index == 0) {
                if (i < 2 || !same_window(layer, model_.layers[i - 2]))
                    plan.make(paths_, shape, worker.count);
                plan.next.store(0, std::memory_order_relaxed);
            }
            project(worker, layer, i == 0 ? call_.first : nullptr);
            worker.wait();
            write_kv(worker, layer, call_.kv[i]);
            worker.wait();
            const AttentionCall attention = {
                paths_, shape, call_.kv[i], scratch_.qkv.data(), qkv_width_, scratch_.attended.data()};
            attend_together(attention, plan, worker, scratch_.threads[worker.index].attention);
            worker.wait();
            add_linear(worker, layer.output, scratch_.attended.data());
            worker.wait();
            feed_forward(worker, layer);
            worker.wait();
            add_linear(worker, layer.down, scratch_.inner.data());
            worker.wait();
        }
        copy_out(worker, tap, model_.num_layers);
        if (call_.num_wanted) predict(worker);
    }

    // Hands out this thread's rows of the residual stream where somebody asked for boundary `at`.
    // The barrier before it made them whole, and nobody changes them before the next but one.
    int copy_out(const Worker& worker, int tap, int at) {
        if (tap == call_.num_taps || call_.taps[tap] != at) return tap;
        const Range share = worker.share(rows_);
        const long width = model_.hidden, begin = share.begin * width;
        float* out = call_.tapped + static_cast<long>(tap) * rows_ * width + begin;
        memcpy(out, scratch_.hidden.data() + begin, (share.end - share.begin) * width * sizeof(float));
        return tap + 1;
    }

    static bool same_window(const DecoderLayer& a, const DecoderLayer& b) {
        return a.sliding == b.sliding && a.chunk == b.chunk;
    }

    void embed(const Worker& worker) {
        const Range share = worker.share(rows_);
        const long width = model_.hidden;
        for (int r = share.begin; r < share.end; r++) {
            float* out = scratch_.hidden.data() + r * width;
            if (call_.entry) {
                memcpy(out, call_.entry + r * width, width * sizeof(float));
                continue;
            }
            const long at = call_.tokens[r] * width;
            if (model_.embedding_kind == FLOAT32)
                memcpy(out, static_cast<const float*>(model_.embedding) + at, width * sizeof(float));
            else
                widen(static_cast<const BFloat16*>(model_.embedding) + at, model_.hidden, out);
        }
    }

    // The rows `picked` names (null: all), normed and ready for `layer`.
    Inputs normed(const Worker& worker, const Linear& layer, const float* weight,
                  const int64_t* picked, int rows) {
        const bool alone = static_cast<long>(rows) * model_.hidden <= FEW_VALUES || worker.count == 1;
        DecoderScratch::Private& own = scratch_.threads[worker.index];
        if (alone) grow(own.normed, static_cast<size_t>(rows) * model_.hidden);
        float* memory = alone ? own.normed.data() : scratch_.normed.data();
        Inputs in{memory, model_.hidden, rows};
        if (!alone) {  // one thread sizes the shared memory
            if (worker.index == 0) shared_ = scratch_.prepared.of(layer, in);
            worker.wait();
            in = shared_;
        } else {
            in = own.prepared.of(layer, in);
        }
        const Range share = alone ? Range{0, rows} : worker.share(rows);
        for (int r = share.begin; r < share.end; r++) {
            const long from = picked ? picked[r] : r;
            rms_norm(scratch_.hidden.data() + from * model_.hidden, weight, model_.hidden, model_.eps,
                     memory + static_cast<long>(r) * model_.hidden);
        }
        prepare_rows(layer, in, share.begin, share.end);
        if (!alone) worker.wait();
        return in;
    }

    // Rows of x in the form that `layer` wants.
    Inputs prepared(const Worker& worker, const Linear& layer, const float* x) {
        Inputs in{x, layer.inputs, rows_};
        if (!is_integer(layer) && !uses_tiles(layer, rows_)) return in;
        const bool alone = static_cast<long>(rows_) * layer.inputs <= FEW_VALUES || worker.count == 1;
        if (alone) {
            in = scratch_.threads[worker.index].prepared.of(layer, in);
            prepare_rows(layer, in, 0, rows_);
            return in;
        }
        if (worker.index == 0) shared_ = scratch_.prepared.of(layer, in);
        worker.wait();
        in = shared_;
        const Range share = worker.share(rows_);
        prepare_rows(layer, in, share.begin, share.end);
        worker.wait();
        return in;
    }

    void project(const Worker& worker, const DecoderLayer& layer, const float* given) {
        const Inputs in = given ? prepared(worker, layer.qkv, given)
                                : normed(worker, layer.qkv, layer.attention_norm, nullptr, rows_);
        const Range share = worker.share(layer.qkv.outputs, TILE_OUTPUTS);
        linear_into<false>(layer.qkv, in, share.begin, share.end, scratch_.qkv.data(), qkv_width_);
    }

    // Queries and keys are normed and turned where they lie; keys and values go to their slots.
    void write_kv(const Worker& worker, const DecoderLayer& layer, const KV& kv) {
        const int width = model_.head_width, turned = model_.heads + model_.groups;
        const int units = turned + model_.groups;
        const Range share = worker.share(rows_ * units);
        for (int unit = share.begin; unit < share.end; unit++) {
            const int r = unit / units, h = unit % units;
            const RowPath& row = paths_.rows[r];
            float* x = scratch_.qkv.data() + static_cast<long>(r) * qkv_width_ + static_cast<long>(h) * width;
            if (h < turned) {
                const float* norm = h < model_.heads ? layer.query_norm : layer.key_norm;
                if (norm) rms_norm(x, norm, width, model_.eps, x);
                const long at = static_cast<long>(row.position) * model_.rotated;
                if (layer.has_rope) rotate(x, call_.cosines + at, call_.sines + at, model_.rotated);
                if (h < model_.heads) continue;
            }
            const int place = paths_.place_of_row(r);
            const long slot = paths_.slot(row.span, place);
            const bool is_key = h < turned;
            const int group = is_key ? h - model_.heads : h - turned;
            float* to = (is_key ? kv.keys : kv.values) + (slot * model_.groups + group) * width;
            memcpy(to, x, width * sizeof(float));
        }
    }

    void add_linear(const Worker& worker, const Linear& layer, const float* x) {
        const Inputs in = prepared(worker, layer, x);
        const Range share = worker.share(layer.outputs, TILE_OUTPUTS);
        linear_into<true>(layer, in, share.begin, share.end, scratch_.hidden.data(), model_.hidden);
    }

    // A thread makes the same part of gate and up, so that it can join them by itself.
    void feed_forward(const Worker& worker, const DecoderLayer& layer) {
        const Inputs in = normed(worker, layer.gate_up, layer.mlp_norm, nullptr, rows_);
        const Range share = worker.share(model_.inner, TILE_OUTPUTS);
        const long stride = 2l * model_.inner;
        float* both = scratch_.gate_up.data();
        linear_into<false>(layer.gate_up, in, share.begin, share.end, both, stride);
        linear_into<false>(layer.gate_up, in, model_.inner + share.begin, model_.inner + share.end, both,
                           stride);
        for (int r = 0; r < rows_; r++) {
            const float* gate = both + r * stride + share.begin;
            silu_times(gate, gate + model_.inner, share.end - share.begin,
                       scratch_.inner.data() + static_cast<long>(r) * model_.inner + share.begin);
        }
    }

    void predict(const Worker& worker) {
        const Inputs in = normed(worker, model_.head, model_.final_norm, call_.wanted, call_.num_wanted);
        const Range share = worker.share(model_.head.outputs, TILE_OUTPUTS);
        linear_into<false>(model_.head, in, share.begin, share.end, call_.logits, model_.vocabulary);
    }

    const Decoder& model_;
    const DecoderCall& call_;
    DecoderScratch& scratch_;
    Paths& paths_;
    Inputs shared_{};
    int rows_ = 0;
    int qkv_width_ = 0;
};
