// The C interface: what Python calls through ctypes. Pointers and sizes only, no torch.

#include "decoder.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct AttendScratch {
    Paths paths;
    AttentionPlan plan;
    std::vector<AttentionScratch> threads;
};

int64_t likeliest(const float* row, int width) {
    const int full = width / LANES * LANES;
    Vec tops = broadcast(-INFINITY);
    VecInt odd{};
    for (int i = 0; i < full; i += LANES) {
        const Vec v = load(row + i);
        odd |= v != v;
        tops = maximum(v, tops);
    }
    bool is_number = true;
    for (int i = 0; i < LANES; i++) is_number = is_number && !odd[i];
    float top = max_lane(tops);
    for (int i = full; i < width; i++) {
        is_number = is_number && row[i] == row[i];
        top = row[i] > top ? row[i] : top;
    }
    if (!is_number || !std::isfinite(top)) return -1;
    int64_t at = 0;
    while (row[at] != top) at++;
    return at;
}

}  // namespace

EXPORT int32_t outrider_lanes() { return LANES; }

EXPORT int32_t outrider_has_tiles() { return tiles_are_allowed(); }

EXPORT int32_t outrider_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// The sum of `size` floats: as fast as this machine reads memory, which is what decoding is held to.
EXPORT double outrider_read(const float* x, int64_t size, int32_t threads) {
    std::atomic<double> total{0};
    run_team(threads, [&](const Worker& worker) {
        // Four streams, a stretch apart, keep more of the memory busy than one.
        const int64_t stretch = size / (4 * LANES * worker.count);
        const float* from = x + 4 * LANES * stretch * worker.index;
        Vec sums[4] = {};
        for (int64_t i = 0; i < stretch; i++)
            for (int j = 0; j < 4; j++) {
                const float* p = from + (j * stretch + i) * LANES;
                __builtin_prefetch(p + 16 * LANES, 0, 2);
                sums[j] += load(p);
            }
        const double mine = sum(sums[0] + sums[1] + sums[2] + sums[3]);
        double before = total.load();
        while (!total.compare_exchange_weak(before, before + mine)) {
        }
    });
    return total.load();
}

// y[rows, O] = x[rows, I] W^T + b
EXPORT void outrider_linear(const Linear* layer, const float* x, int64_t stride, int32_t rows,
                            float* y, int32_t threads) {
    static thread_local PreparedRows scratch;
    const Inputs in = scratch.of(*layer, {x, static_cast<long>(stride), rows});
    run_team(threads, [&](const Worker& worker) {
        if (needs_preparation(*layer, in)) {
            const Range mine = worker.share(rows);
            prepare_rows(*layer, in, mine.begin, mine.end);
            worker.wait();
        }
        const Range share = worker.share(layer->outputs, TILE_OUTPUTS);
        linear_into<false>(*layer, in, share.begin, share.end, y, layer->outputs);
    });
}

// Positions and slots of the rows of a pass.
EXPORT void outrider_layout(const SpanRecord* spans, int32_t num_spans, const int64_t* parents,
                            int64_t* positions, int64_t* slots) {
    static thread_local Paths paths;
    paths.trace(spans, num_spans, parents);
    for (size_t r = 0; r < paths.rows.size(); r++) {
        positions[r] = paths.rows[r].position;
        slots[r] = paths.slot(paths.rows[r].span, paths.place_of_row(static_cast<int>(r)));
    }
}

EXPORT void outrider_attend(const SpanRecord* spans, int32_t num_spans, const int64_t* parents,
                            const AttentionShape* shape, const KV* kv, const float* query,
                            int64_t query_stride, float* out, int32_t threads) {
    static thread_local AttendScratch scratch;
    AttendScratch& memory = scratch;
    memory.paths.trace(spans, num_spans, parents);
    if (memory.threads.size() < static_cast<size_t>(threads)) memory.threads.resize(threads);
    memory.plan.make(memory.paths, *shape, threads);
    const AttentionCall call = {memory.paths, *shape, *kv, query, static_cast<long>(query_stride), out};
    run_team(threads, [&](const Worker& worker) {
        attend_together(call, memory.plan, worker, memory.threads[worker.index]);
    });
}

// to[slots[r]] = from[r], rows of `width` values.
EXPORT void outrider_write(float* to, const float* from, int64_t stride, const int64_t* slots,
                           int32_t rows, int32_t width) {
    for (int r = 0; r < rows; r++)
        memcpy(to + slots[r] * width, from + r * stride, width * sizeof(float));
}

EXPORT void* outrider_decoder_scratch() { return new DecoderScratch; }

EXPORT void outrider_decoder_free(void* scratch) { delete static_cast<DecoderScratch*>(scratch); }

// 0, or 1 if a token is not in the vocabulary; then nothing was done.
EXPORT int32_t outrider_decoder(const Decoder* model, const DecoderCall* call, void* scratch) {
    return DecoderPass(*model, *call, *static_cast<DecoderScratch*>(scratch)).run() ? 0 : 1;
}

// The likeliest token of each row, the lowest id of equals; -1 where the largest is no finite number.
EXPORT void outrider_argmax(const float* logits, int32_t rows, int32_t width, int64_t* tokens,
                            int32_t threads) {
    constexpr int64_t WORTH_A_TEAM = 1 << 18;
    if (static_cast<int64_t>(rows) * width < WORTH_A_TEAM || rows < 2) threads = 1;
    run_team(threads, [&](const Worker& worker) {
        const Range share = worker.share(rows);
        for (int r = share.begin; r < share.end; r++)
            tokens[r] = likeliest(logits + static_cast<int64_t>(r) * width, width);
    });
}

// Sizes of the structs that Python mirrors, in the order of its list.
EXPORT int32_t outrider_size(int32_t index) {
    const size_t sizes[] = {sizeof(Linear),       sizeof(AttentionShape), sizeof(KV),
                            sizeof(DecoderLayer), sizeof(Decoder),        sizeof(DecoderCall)};
    return static_cast<int32_t>(sizes[index]);
}
