// The C interface of the datastore: what Python calls through ctypes. Pointers and sizes only.

#include "datastore.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Tokens and positions must stay where they are until it is freed.
EXPORT Datastore* datastore_new(const int32_t* tokens, int64_t num_tokens, const void* positions,
                                int64_t num_positions, int32_t is_wide) {
    return new Datastore(tokens, num_tokens, positions, num_positions, is_wide != 0);
}

EXPORT void datastore_free(Datastore* store) { delete store; }

// Returns the length of the longest ending and writes [low, high) of the positions.
EXPORT int32_t datastore_search(Datastore* store, const int32_t* context, int32_t size,
                                int32_t shortest, int32_t longest, int64_t* range) {
    const Range found = store->search(context, size, {shortest, longest, 0, 0, 0, 0});
    range[0] = found.low;
    range[1] = found.high;
    return found.length;
}

// Writes up to `num_nodes` tokens and parents, and returns how many there are.
EXPORT int32_t datastore_draft(Datastore* store, const int32_t* context, int32_t size,
                               int32_t shortest, int32_t longest, int64_t most, int32_t depth,
                               int32_t width, int32_t num_nodes, int32_t* tokens,
                               int32_t* parents) {
    const Ask ask{shortest, longest, most, depth, width, num_nodes};
    return store->draft(context, size, ask, tokens, parents);
}
