// Nodes of a tree and their children: by first token, and in order of frequency.
//
// A node lists its children in falling order of their counts, so one more or one less is a swap
// with the first or last child of the same count. Up to FEW children are searched in the list;
// those of wider nodes are found through one hash table, too.

#pragma once

#include <algorithm>

#include "memory.h"

constexpr int32_t NONE = -1, ROOT = 0, FEW = 16;

struct Node {
    int32_t count;     // occurrences of the node's string: how many windows pass or end here
    int32_t parent;    // of a free node, the next free one
    int32_t token;     // first of the edge that leads here
    int32_t length;    // tokens of that edge
    int32_t text;      // the most recent occurrence of the node's string ends in this text
    int32_t end;       // ... at this position
    int32_t place;     // among the parent's children
    int32_t children;  // where they are in the pool
    int32_t num_children;
};

struct Child {
    int32_t token, node;
};

class Nodes {
   public:
    Nodes() { make(0, NONE, NONE, 0, NONE, NONE); }

    Node& operator[](int32_t node) { return nodes_[node]; }
    const Node& operator[](int32_t node) const { return nodes_[node]; }
    int64_t size() const { return num_nodes_; }
    int64_t bytes() const {
        return nodes_.bytes() + lists_.bytes() + static_cast<int64_t>(slots_.capacity()) * 4;
    }
    Child* children(int32_t node) { return lists_.at(nodes_[node].children); }
    const Child* children(int32_t node) const { return lists_.at(nodes_[node].children); }

    int32_t make(int32_t count, int32_t parent, int32_t token, int32_t length, int32_t text,
                 int32_t end) {
        int32_t node = free_;
        if (node == NONE)
            node = static_cast<int32_t>(nodes_.grow(1));
        else
            free_ = nodes_[node].parent;
        nodes_[node] = {count, parent, token, length, text, end, 0, NONE, 0};
        num_nodes_++;
        return node;
    }

    void discard(int32_t node) {
        drop_list(node);
        nodes_[node].count = 0;
        nodes_[node].parent = free_;
        free_ = node;
        num_nodes_--;
    }

    int32_t find(int32_t node, int32_t token) const {
        const Node& n = nodes_[node];
        if (n.num_children > FEW) return slots_[slot_of(node, token)];
        const Child* list = n.num_children ? lists_.at(n.children) : nullptr;
        for (int32_t i = 0; i < n.num_children; i++)
            if (list[i].token == token) return list[i].node;
        return NONE;
    }

    // The child's count must be the least of all.
    void add(int32_t node, int32_t child) {
        Node& n = nodes_[node];
        const int32_t count = n.num_children;
        if (count == 0 || (count & (count - 1)) == 0) make_room(n, count);
        nodes_[child].place = count;
        lists_.at(n.children)[count] = {nodes_[child].token, child};
        n.num_children++;
        if (n.num_children == FEW + 1)
            for (int32_t i = 0; i <= FEW; i++) enter(children(node)[i].node);
        else if (n.num_children > FEW)
            enter(child);
    }

    // The child's count must be the least of all.
    void remove(int32_t node, int32_t child) {
        Node& n = nodes_[node];
        if (n.num_children > FEW) leave(child);
        n.num_children--;
        if (n.num_children == FEW)
            for (int32_t i = 0; i < FEW; i++) leave(children(node)[i].node);
        const int32_t count = n.num_children;
        if (count == 0 || (count & (count - 1)) == 0) cut_room(n, count);
    }

    // `child` is replaced by a node of the same first token and count.
    void replace(int32_t child, int32_t other) {
        const int32_t parent = nodes_[child].parent, place = nodes_[child].place;
        if (nodes_[parent].num_children > FEW) slots_[slot_of(parent, nodes_[child].token)] = other;
        children(parent)[place].node = other;
        nodes_[other].parent = parent;
        nodes_[other].place = place;
        nodes_[other].token = nodes_[child].token;
    }

    // The first token of an only child changes.
    void rename_only(int32_t child, int32_t token) {
        nodes_[child].token = token;
        children(nodes_[child].parent)[0].token = token;
    }

    void raise(int32_t node) {
        const int32_t count = nodes_[node].count++;
        Child* list = children(nodes_[node].parent);
        const int32_t place = nodes_[node].place;
        if (place == 0 || nodes_[list[place - 1].node].count > count) return;
        Child* first = std::partition_point(list, list + place, [&](const Child& other) {
            return nodes_[other.node].count > count;
        });
        swap(list, place, static_cast<int32_t>(first - list));
    }

    void lower(int32_t node) {
        const int32_t count = nodes_[node].count--;
        Child* list = children(nodes_[node].parent);
        const int32_t place = nodes_[node].place;
        Child* stop = list + nodes_[nodes_[node].parent].num_children;
        Child* last = std::partition_point(list + place + 1, stop, [&](const Child& other) {
            return nodes_[other.node].count >= count;
        });
        swap(list, place, static_cast<int32_t>(last - list) - 1);
    }

   private:
    void swap(Child* list, int32_t one, int32_t other) {
        std::swap(list[one], list[other]);
        nodes_[list[one].node].place = one;
        nodes_[list[other].node].place = other;
    }

    void make_room(Node& n, int32_t count) {
        const int32_t moved = lists_.take(Pool<Child>::class_of(count + 1));
        move_list(n, count, moved, count);
    }

    void cut_room(Node& n, int32_t count) {
        const int32_t moved = count ? lists_.take(Pool<Child>::class_of(count)) : NONE;
        move_list(n, count, moved, count + 1);
    }

    // `held` children fitted into the old list, `count` are kept.
    void move_list(Node& n, int32_t count, int32_t moved, int32_t held) {
        if (moved != NONE && n.children != NONE)
            std::copy_n(lists_.at(n.children), count, lists_.at(moved));
        if (n.children != NONE) lists_.give(n.children, Pool<Child>::class_of(held));
        n.children = moved;
    }

    void drop_list(int32_t node) {
        Node& n = nodes_[node];
        if (n.num_children > FEW)
            for (int32_t i = 0; i < n.num_children; i++) leave(children(node)[i].node);
        if (n.children != NONE) lists_.give(n.children, Pool<Child>::class_of(n.num_children));
        n.children = NONE;
        n.num_children = 0;
    }

    // Open addressing with steps of one, keyed by parent and first token.
    uint64_t home(int32_t node, int32_t token) const {
        const uint64_t key = static_cast<uint64_t>(node) << 32 | static_cast<uint32_t>(token);
        return (key * 0x9E3779B97F4A7C15u >> 20) & (slots_.size() - 1);
    }

    // Where the child is, or the free slot where the search for it ends.
    uint64_t slot_of(int32_t node, int32_t token) const {
        uint64_t slot = home(node, token);
        for (; slots_[slot] != NONE; slot = (slot + 1) & (slots_.size() - 1)) {
            const Node& child = nodes_[slots_[slot]];
            if (child.parent == node && child.token == token) break;
        }
        return slot;
    }

    void enter(int32_t child) {
        if (slots_.size() < 2 * (num_slots_ + 1)) rehash();
        slots_[slot_of(nodes_[child].parent, nodes_[child].token)] = child;
        num_slots_++;
    }

    void leave(int32_t child) {
        const uint64_t mask = slots_.size() - 1;
        uint64_t hole = slot_of(nodes_[child].parent, nodes_[child].token);
        for (uint64_t next = (hole + 1) & mask; slots_[next] != NONE; next = (next + 1) & mask) {
            const Node& other = nodes_[slots_[next]];
            if (((next - home(other.parent, other.token)) & mask) >= ((next - hole) & mask)) {
                slots_[hole] = slots_[next];
                hole = next;
            }
        }
        slots_[hole] = NONE;
        num_slots_--;
    }

    void rehash() {
        std::vector<int32_t> old(slots_.empty() ? 64 : 2 * slots_.size(), NONE);
        old.swap(slots_);
        for (int32_t child : old)
            if (child != NONE) slots_[slot_of(nodes_[child].parent, nodes_[child].token)] = child;
    }

    Array<Node> nodes_;
    Pool<Child> lists_;
    std::vector<int32_t> slots_;
    uint64_t num_slots_ = 0;
    int32_t free_ = NONE;
    int64_t num_nodes_ = 0;
};
