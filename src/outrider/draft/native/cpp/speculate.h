// Drafts from a suffix tree: the most frequent continuation, a tree of continuations, or the text
// after the longest match. Oliaro et al. 2024; the twin is outrider/draft/suffix_tree.py.

#pragma once

#include <cmath>
#include <queue>

#include "suffix_tree.h"

struct Search {
    int32_t depth, width, num_nodes;
    double alpha, offset, min_probability;
};

struct Guess {
    std::vector<int32_t> tokens, parents;
    std::vector<double> probabilities;
    double score = 0;
    int32_t match = 0;

    int32_t size() const { return static_cast<int32_t>(tokens.size()); }
    void add(int32_t token, int32_t parent, double probability) {
        tokens.push_back(token);
        parents.push_back(parent);
        probabilities.push_back(probability);
        score += probability;
    }
};

// Most frequent first, of equal ones the most recent first; at most `most` of those whose
// probability, given that of the point itself, is not less than asked for.
inline std::vector<std::pair<Child, double>> continuations(const SuffixTree& tree, Point point,
                                                           double probability,
                                                           double min_probability, int32_t most) {
    std::vector<std::pair<Child, double>> found;
    const double total = tree.count(point);
    if (tree.is_inside(point)) {
        if (probability * total / total >= min_probability)
            found.push_back({tree.inside(point), probability * total / total});
        return found;
    }
    const Child* list = tree.children(point);
    for (int32_t i = 0; i < tree.num_children(point); i++) {
        const int32_t count = tree.count(list[i]);
        const bool is_tied = i > 0 && count == tree.count(list[i - 1]);
        const double p = probability * count / total;
        if (p < min_probability || (i >= most && !is_tied)) break;
        found.push_back({list[i], p});
    }
    const int32_t kept = std::min(most, static_cast<int32_t>(found.size()));
    const auto is_better = [&](const auto& one, const auto& other) {
        const int32_t a = tree.count(one.first), b = tree.count(other.first);
        return a != b ? a > b : tree.is_newer(one.first, other.first);
    };
    std::partial_sort(found.begin(), found.begin() + kept, found.end(), is_better);
    found.resize(kept);
    return found;
}

inline Guess chain(const SuffixTree& tree, Point point, int32_t most, double min_probability) {
    Guess guess;
    double probability = 1;
    while (guess.size() < most) {
        const auto next = continuations(tree, point, probability, min_probability, 1);
        if (next.empty()) break;
        probability = next[0].second;
        guess.add(next[0].first.token, guess.size() - 1, probability);
        point = tree.below(point, next[0].first);
    }
    return guess;
}

// Always the likeliest node that hangs on what is there already, until `num_nodes` do.
inline Guess branches(const SuffixTree& tree, Point point, int32_t depth, int32_t width,
                      int32_t num_nodes, double min_probability) {
    struct Candidate {
        double probability;
        int32_t order, token, parent, depth;
        Point point;
        bool operator<(const Candidate& other) const {
            if (probability != other.probability) return probability < other.probability;
            return order > other.order;
        }
    };
    Guess guess;
    std::priority_queue<Candidate> waiting;
    int32_t order = 0;
    const auto offer = [&](Point from, double probability, int32_t parent, int32_t below) {
        const int32_t most = parent == NONE ? width : num_nodes;
        for (const auto& [child, p] : continuations(tree, from, probability, min_probability, most))
            waiting.push({p, order++, child.token, parent, below + 1, tree.below(from, child)});
    };
    offer(point, 1, NONE, 0);
    while (!waiting.empty() && guess.size() < num_nodes) {
        const Candidate next = waiting.top();
        waiting.pop();
        guess.add(next.token, next.parent, next.probability);
        if (next.depth < depth) offer(next.point, next.probability, guess.size() - 1, next.depth);
    }
    return guess;
}

inline bool goes_on(const SuffixTree& tree, const int32_t* tokens, int32_t size) {
    const Point point = tree.find(tokens, size);
    return point.node != NONE && tree.goes_on(point);
}

// Length of the longest ending of the context that goes on somewhere. All shorter ones do, too.
inline int32_t longest_match(const SuffixTree& tree, const int32_t* context, int32_t size) {
    int32_t low = 0, high = std::min(size, tree.depth - 1);
    while (low < high) {
        const int32_t match = (low + high + 1) / 2;
        if (goes_on(tree, context + size - match, match))
            low = match;
        else
            high = match - 1;
    }
    return low;
}

// The best draft over all lengths of match; of equal scores that of the longer match, so the search
// begins there, and ends once no shorter match may draft far enough to be better.
inline Guess speculate(const SuffixTree& tree, const int32_t* context, int32_t size,
                       const Search& search) {
    Guess best;
    for (int32_t match = longest_match(tree, context, size); match > 0; match--) {
        const double reach = std::floor(match * search.alpha + search.offset);
        const int32_t depth = static_cast<int32_t>(std::min<double>(search.depth, reach));
        const int64_t most = std::min<int64_t>(search.num_nodes, int64_t{search.width} * depth);
        if (depth < 1 || (search.width == 1 && best.score >= static_cast<double>(most))) break;
        const Point point = tree.find(context + size - match, match);
        Guess guess = search.width == 1
                          ? chain(tree, point, static_cast<int32_t>(most), search.min_probability)
                          : branches(tree, point, depth, search.width, static_cast<int32_t>(most),
                                     search.min_probability);
        if (guess.score > best.score || (guess.size() && !best.size())) {
            best = std::move(guess);
            best.match = match;
        }
    }
    return best;
}

// What stood after the longest match that went on, where that was seen last.
inline Guess longest(const SuffixTree& tree, const int32_t* context, int32_t size, int32_t most) {
    Guess guess;
    guess.match = longest_match(tree, context, size);
    if (guess.match == 0) return guess;
    Point point = tree.find(context + size - guess.match, guess.match);
    if (!tree.is_inside(point)) {
        const Child* list = tree.children(point);
        Child newest = list[0];
        for (int32_t i = 1; i < tree.num_children(point); i++)
            if (tree.is_newer(list[i], newest)) newest = list[i];
        point = {newest.node, 0};
    }
    const auto [tokens, left] = tree.after(point);
    const int32_t count = std::min({left, most, 4 * guess.match});
    for (int32_t i = 0; i < count; i++) guess.add(tokens[i], i - 1, 1);
    guess.score = guess.match;
    return guess;
}
