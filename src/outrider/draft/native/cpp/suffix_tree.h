// A compressed suffix tree over several growing texts, in which no path is longer than `depth`.
//
// From every position of every text a window of `depth` tokens (fewer at the text's end) hangs from
// the root; equal beginnings share nodes. Every window ends at a node, and a node either has two
// children or is the end of a window: so the tree's shape follows from the texts alone, however they
// grew and whatever was removed. A node's count is the number of occurrences of its string.

#pragma once

#include <utility>

#include "children.h"

struct Text {
    Array<int32_t> tokens;
    std::vector<int32_t> ends;  // per window still growing: its last node, by start modulo depth
    int64_t serial = 0;         // texts in order of opening; 0 is none
};

// A place in the tree: `used` tokens into the edge that leads to `node`.
struct Point {
    int32_t node, used;
};

class SuffixTree {
   public:
    explicit SuffixTree(int32_t depth) : depth(depth) {}

    const int32_t depth;

    int32_t open() {
        int32_t text;
        if (free_texts_.empty()) {
            text = static_cast<int32_t>(texts_.size());
            texts_.emplace_back();
        } else {
            text = free_texts_.back();
            free_texts_.pop_back();
        }
        texts_[text].ends.assign(depth, NONE);
        texts_[text].serial = ++num_opened_;
        return text;
    }

    void append(int32_t text, int32_t token) {
        Text& own = texts_[text];
        const int32_t end = static_cast<int32_t>(own.tokens.size());
        own.tokens.push(token);
        num_tokens_++;
        for (int32_t start = std::max(0, end - depth + 1); start <= end; start++) {
            int32_t& node = own.ends[start % depth];
            node = advance(start == end ? ROOT : node, token, text, end);
        }
    }

    // Removing another text than the oldest may cost a pass over all that remain.
    void remove(int32_t text) {
        const int32_t size = static_cast<int32_t>(texts_[text].tokens.size());
        std::vector<int32_t> seen;  // nodes whose most recent occurrence is about to go
        for (int32_t start = 0; start < size; start++) withdraw(text, start, seen);
        num_tokens_ -= size;
        texts_[text] = Text();
        free_texts_.push_back(text);
        bool is_stale = false;
        for (int32_t node : seen) {
            if (nodes_[node].count == 0 || nodes_[node].text != text) continue;
            nodes_[node].text = NONE;
            is_stale = true;
        }
        if (is_stale) date_anew();
    }

    // Where a string leads; node NONE if it does not occur.
    Point find(const int32_t* tokens, int32_t size) const {
        Point point{ROOT, 0};
        for (int32_t at = 0; at < size;) {
            const int32_t node = nodes_.find(point.node, tokens[at]);
            if (node == NONE) return {NONE, 0};
            const int32_t used = std::min(nodes_[node].length, size - at);
            const int32_t* edge = edge_of(node);
            if (!std::equal(edge, edge + used, tokens + at)) return {NONE, 0};
            at += used;
            point = {node, used};
        }
        return point;
    }

    int32_t count(Point point) const { return nodes_[point.node].count; }
    bool is_inside(Point point) const { return point.used < nodes_[point.node].length; }
    bool goes_on(Point point) const { return is_inside(point) || nodes_[point.node].num_children; }

    // The only next token inside an edge.
    Child inside(Point point) const { return {edge_of(point.node)[point.used], point.node}; }
    Point below(Point point, Child child) const {
        return {child.node, is_inside(point) ? point.used + 1 : 1};
    }
    const Child* children(Point point) const { return nodes_.children(point.node); }
    int32_t num_children(Point point) const { return nodes_[point.node].num_children; }
    int32_t count(Child child) const { return nodes_[child.node].count; }

    // Whether one sibling's first token was seen later than the other's: in a newer text, or later.
    bool is_newer(Child one, Child other) const {
        const Node &a = nodes_[one.node], &b = nodes_[other.node];
        return is_later(a.text, a.end - a.length, b.text, b.end - b.length);
    }

    // What follows the first `used` tokens of an edge, where it was seen last.
    std::pair<const int32_t*, int32_t> after(Point point) const {
        const Node& n = nodes_[point.node];
        const Array<int32_t>& tokens = texts_[n.text].tokens;
        const int32_t start = n.end - n.length + 1 + point.used;
        return {&tokens[start], static_cast<int32_t>(tokens.size()) - start};
    }

    int64_t num_tokens() const { return num_tokens_; }
    int64_t num_nodes() const { return nodes_.size(); }
    int64_t bytes() const {
        int64_t total = static_cast<int64_t>(sizeof(*this)) + nodes_.bytes();
        for (const Text& text : texts_)
            total += static_cast<int64_t>(sizeof(Text)) + text.tokens.bytes() +
                     static_cast<int64_t>(text.ends.capacity()) * 4;
        return total;
    }

   private:
    const int32_t* edge_of(int32_t node) const {
        const Node& n = nodes_[node];
        return &texts_[n.text].tokens[n.end - n.length + 1];
    }

    bool is_later(int32_t text, int32_t end, int32_t than_text, int32_t than_end) const {
        if (text == than_text) return end > than_end;
        return texts_[text].serial > texts_[than_text].serial;
    }

    void date(int32_t node, int32_t text, int32_t end) {
        Node& n = nodes_[node];
        if (n.text != NONE && !is_later(text, end, n.text, n.end)) return;
        n.text = text;
        n.end = end;
    }

    // A window that ended at `from` takes in one more token; returns where it ends now.
    int32_t advance(int32_t from, int32_t token, int32_t text, int32_t end) {
        int32_t node = nodes_.find(from, token);
        if (node == NONE) {
            if (from != ROOT && nodes_[from].count == 1) return lengthen(from, text, end);
            node = nodes_.make(1, from, token, 1, text, end);
            nodes_.add(from, node);
            return node;
        }
        // This window is all that told `from` from the longer string below it.
        const bool is_left = from != ROOT && nodes_[from].count == nodes_[node].count + 1;
        if (nodes_[node].length > 1) {
            if (is_left) return slide(from, node, text, end);
            node = split(node);
        }
        nodes_.raise(node);
        date(node, text, end);
        if (is_left) absorb(from, node);
        return node;
    }

    // A leaf with one window grows with it.
    int32_t lengthen(int32_t leaf, int32_t text, int32_t end) {
        nodes_[leaf].length++;
        nodes_[leaf].text = text;
        nodes_[leaf].end = end;
        return leaf;
    }

    // Splitting `below` and absorbing `node`, in one: the border between them moves by a token.
    int32_t slide(int32_t node, int32_t below, int32_t text, int32_t end) {
        Node &upper = nodes_[node], &lower = nodes_[below];
        upper.length++;
        upper.text = lower.text;
        upper.end = lower.end - lower.length + 1;
        lower.length--;
        nodes_.rename_only(below, *edge_of(below));
        date(node, text, end);
        return node;
    }

    // Returns a new node after the first token of the edge to `node`.
    int32_t split(int32_t node) {
        const Node old = nodes_[node];
        const int32_t first = old.end - old.length + 1;
        const int32_t upper = nodes_.make(old.count, old.parent, old.token, 1, old.text, first);
        nodes_.replace(node, upper);
        nodes_[node].length--;
        nodes_[node].parent = upper;
        nodes_[node].token = *edge_of(node);
        nodes_.add(upper, node);
        return upper;
    }

    // A node that nothing ends at goes up in its only child.
    void absorb(int32_t node, int32_t child) {
        nodes_[child].length += nodes_[node].length;
        nodes_.replace(node, child);
        nodes_.discard(node);
    }

    void absorb_if_idle(int32_t node) {
        if (node == ROOT || nodes_[node].num_children != 1) return;
        const int32_t child = nodes_.children(node)[0].node;
        if (nodes_[child].count == nodes_[node].count) absorb(node, child);
    }

    // Takes one window of a text out of the tree.
    void withdraw(int32_t text, int32_t start, std::vector<int32_t>& seen) {
        const Array<int32_t>& tokens = texts_[text].tokens;
        const int32_t stop = std::min<int64_t>(tokens.size(), int64_t{start} + depth);
        int32_t node = ROOT;
        for (int32_t at = start; at < stop; at += nodes_[node].length) {
            node = nodes_.find(node, tokens[at]);
            nodes_.lower(node);
            if (nodes_[node].text == text) seen.push_back(node);
        }
        if (nodes_[node].count > 0) return absorb_if_idle(node);
        const int32_t parent = nodes_[node].parent;
        nodes_.remove(parent, node);
        nodes_.discard(node);
        absorb_if_idle(parent);
    }

    // Finds the most recent occurrence of every node whose own was removed.
    void date_anew() {
        for (int32_t text = 0; text < static_cast<int32_t>(texts_.size()); text++) {
            const int64_t size = texts_[text].tokens.size();
            for (int64_t start = 0; start < size; start++) {
                int32_t node = ROOT;
                for (int64_t at = start; at < std::min(size, start + depth);) {
                    node = nodes_.find(node, texts_[text].tokens[at]);
                    at += nodes_[node].length;
                    date(node, text, static_cast<int32_t>(at - 1));
                }
            }
        }
    }

    Nodes nodes_;
    std::vector<Text> texts_;
    std::vector<int32_t> free_texts_;
    int64_t num_opened_ = 0, num_tokens_ = 0;
};
