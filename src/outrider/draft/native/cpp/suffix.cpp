// The C interface: what Python calls through ctypes. Pointers and sizes only.

#include "speculate.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

int32_t write(const Guess& guess, int32_t* tokens, int32_t* parents, double* numbers) {
    std::copy(guess.tokens.begin(), guess.tokens.end(), tokens);
    std::copy(guess.parents.begin(), guess.parents.end(), parents);
    numbers[0] = guess.score;
    numbers[1] = guess.match;
    std::copy(guess.probabilities.begin(), guess.probabilities.end(), numbers + 2);
    return guess.size();
}

}  // namespace

EXPORT SuffixTree* suffix_new(int32_t depth) { return new SuffixTree(depth); }

EXPORT void suffix_free(SuffixTree* tree) { delete tree; }

EXPORT int32_t suffix_open(SuffixTree* tree) { return tree->open(); }

EXPORT void suffix_extend(SuffixTree* tree, int32_t text, const int32_t* tokens, int32_t size) {
    for (int32_t i = 0; i < size; i++) tree->append(text, tokens[i]);
}

EXPORT void suffix_remove(SuffixTree* tree, int32_t text) { tree->remove(text); }

EXPORT int32_t suffix_count(SuffixTree* tree, const int32_t* tokens, int32_t size) {
    const Point point = tree->find(tokens, size);
    return point.node == NONE ? 0 : tree->count(point);
}

// Writes up to `num_nodes` tokens and parents, then score, match length and probabilities.
EXPORT int32_t suffix_speculate(SuffixTree* tree, const int32_t* context, int32_t size,
                                int32_t depth, int32_t width, int32_t num_nodes, double alpha,
                                double offset, double min_probability, int32_t* tokens,
                                int32_t* parents, double* numbers) {
    const Search search{depth, width, num_nodes, alpha, offset, min_probability};
    return write(speculate(*tree, context, size, search), tokens, parents, numbers);
}

EXPORT int32_t suffix_longest(SuffixTree* tree, const int32_t* context, int32_t size, int32_t most,
                              int32_t* tokens, int32_t* parents, double* numbers) {
    return write(longest(*tree, context, size, most), tokens, parents, numbers);
}

EXPORT int64_t suffix_num_tokens(SuffixTree* tree) { return tree->num_tokens(); }

EXPORT int64_t suffix_num_nodes(SuffixTree* tree) { return tree->num_nodes(); }

EXPORT int64_t suffix_bytes(SuffixTree* tree) { return tree->bytes(); }
