// The heaviest continuations of a text's ending in a corpus: its range in the index, the votes of
// the places there, and the best nodes of their trie. He et al. 2023; the twin is
// outrider/draft/votes.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <queue>
#include <vector>

constexpr int32_t END = -1;   // stands behind each document
constexpr int32_t ROOT = -1;  // as a parent
constexpr size_t FEWEST_SLOTS = 64;

struct Ask {
    int32_t shortest, longest;  // tokens of an ending
    int64_t most;               // places that vote
    int32_t depth, width, num_nodes;
};

struct Range {
    int32_t length;
    int64_t low, high;
};

// Tokens and positions belong to the caller. Both may be mapped from a damaged file: what lies
// outside of the corpus reads as the end of a document.
class Datastore {
   public:
    Datastore(const int32_t* tokens, int64_t num_tokens, const void* positions,
              int64_t num_positions, bool is_wide)
        : tokens_(tokens),
          num_tokens_(num_tokens),
          narrow_(is_wide ? nullptr : static_cast<const int32_t*>(positions)),
          wide_(is_wide ? static_cast<const int64_t*>(positions) : nullptr),
          num_positions_(num_positions) {}

    // The longest ending that occurs, and [low, high) of the positions behind its places.
    Range search(const int32_t* context, int32_t size, const Ask& ask) const {
        Range found{0, 0, num_positions_};
        while (found.length < std::min(ask.longest, size)) {
            const int32_t token = context[size - 1 - found.length], back = found.length + 1;
            const int64_t low = first(found.low, found.high, back, token);
            if (low == found.high || before(low, back) != token) break;
            found = {back, low, first_above(low, found.high, back, token)};
        }
        return found.length >= ask.shortest ? found : Range{0, 0, 0};
    }

    // Writes the nodes, parents before children, and returns how many there are.
    int32_t draft(const int32_t* context, int32_t size, const Ask& ask, int32_t* tokens,
                  int32_t* parents) {
        const Range range = search(context, size, ask);
        if (!range.length || ask.depth < 1) return 0;
        begin(range, ask.most);
        int32_t count = 0;
        offer({0, static_cast<int64_t>(voters_.size())}, 0, ROOT,
              std::min(ask.width, ask.num_nodes));
        while (!waiting_.empty() && count < ask.num_nodes) {
            const Candidate best = waiting_.top();
            waiting_.pop();
            tokens[count] = best.token;
            parents[count++] = best.parent;
            if (best.depth + 1 < ask.depth)
                offer(best.voters, best.depth + 1, count - 1,
                      std::min(ask.width, ask.num_nodes - count));
        }
        return count;
    }

   private:
    struct Voters {
        int64_t start, stop;  // in `voters_`
    };
    struct Candidate {
        int32_t depth, age, token, parent;  // `age` settles ties, and no two are equal
        Voters voters;
        int64_t weight() const { return voters.stop - voters.start; }
        bool operator<(const Candidate& other) const {
            if (weight() != other.weight()) return weight() < other.weight();
            return depth != other.depth ? depth > other.depth : age > other.age;
        }
    };
    struct Group {
        int32_t token, count;
    };
    struct Cursor {
        int64_t at, step;
    };
    struct Slot {
        int32_t token, group;
        uint64_t turn;  // the slot is free unless this is the present one
    };

    int32_t token(int64_t at) const {
        return static_cast<uint64_t>(at) < static_cast<uint64_t>(num_tokens_) ? tokens_[at] : END;
    }
    int64_t position(int64_t i) const { return wide_ ? wide_[i] : narrow_[i]; }
    int32_t before(int64_t i, int32_t back) const { return token(position(i) - back); }

    int64_t first(int64_t low, int64_t high, int32_t back, int64_t wanted) const {
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (before(middle, back) < wanted)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    // Most ranges are far shorter than the one they lie in: steps double from its start.
    int64_t first_above(int64_t low, int64_t high, int32_t back, int64_t wanted) const {
        int64_t step = 1;
        while (low + step < high && before(low + step, back) == wanted) {
            low += step;
            step *= 2;
        }
        return first(low + 1, std::min(low + step, high), back, wanted + 1);
    }

    // Places of a range, spread evenly over it.
    void begin(const Range& range, int64_t most) {
        const int64_t held = range.high - range.low, count = std::min(held, most);
        voters_.resize(count);
        for (int64_t i = 0; i < count; i++)
            voters_[i] = position(range.low + (held == count ? i : i * held / count));
        waiting_ = {};
        age_ = 0;
    }

    // The heaviest nodes below one; voters whose document ends here are silent.
    void offer(Voters voters, int32_t depth, int32_t parent, int32_t most) {
        if (most < 1) return;
        if (voters.stop - voters.start == 1) {
            const int32_t next = token(voters_[voters.start] + depth);
            if (next != END) waiting_.push({depth, age_++, next, parent, voters});
            return;
        }
        count(voters, depth);
        choose(most);
        int64_t start = static_cast<int64_t>(voters_.size());
        scatter(voters);
        for (const int32_t index : chosen_) {
            const Group& group = groups_[index];
            waiting_.push({depth, age_++, group.token, parent, {start, start + group.count}});
            start += group.count;
        }
    }

    // Groups the voters by their token. All tokens are fetched before the first is looked up, so
    // that the waits for memory overlap.
    void count(Voters voters, int32_t depth) {
        const size_t size = static_cast<size_t>(voters.stop - voters.start);
        if (group_of_.size() < size) group_of_.resize(size);
        for (size_t i = 0; i < size; i++) group_of_[i] = token(voters_[voters.start + i] + depth);
        groups_.clear();
        mask_ = FEWEST_SLOTS - 1;
        turn_++;
        for (size_t i = 0; i < size; i++)
            if (group_of_[i] != END) group_of_[i] = enter(group_of_[i]);
    }

    int32_t enter(int32_t token) {
        uint64_t at = slot_of(token);
        if (slots_[at].turn != turn_) {
            if (4 * groups_.size() > mask_) at = widen(token);
            slots_[at] = {token, static_cast<int32_t>(groups_.size()), turn_};
            groups_.push_back({token, 0});
        }
        groups_[slots_[at].group].count++;
        return slots_[at].group;
    }

    // Where the token is, or the free slot where the search for it ends.
    uint64_t slot_of(int32_t token) const {
        uint64_t at = static_cast<uint32_t>(token) * 0x9E3779B97F4A7C15u >> 32 & mask_;
        while (slots_[at].turn == turn_ && slots_[at].token != token) at = (at + 1) & mask_;
        return at;
    }

    // A table twice as large with the same groups; returns the slot for one more.
    uint64_t widen(int32_t token) {
        mask_ = 2 * mask_ + 1;
        if (slots_.size() <= mask_) slots_.resize(mask_ + 1, {0, 0, 0});
        turn_++;
        for (size_t i = 0; i < groups_.size(); i++)
            slots_[slot_of(groups_[i].token)] = {groups_[i].token, static_cast<int32_t>(i), turn_};
        return slot_of(token);
    }

    // The largest groups, of equals that of the lesser token first.
    void choose(int32_t most) {
        chosen_.resize(groups_.size());
        for (size_t i = 0; i < chosen_.size(); i++) chosen_[i] = static_cast<int32_t>(i);
        const size_t kept = std::min(chosen_.size(), static_cast<size_t>(most));
        std::partial_sort(chosen_.begin(), chosen_.begin() + kept, chosen_.end(),
                          [&](int32_t one, int32_t other) {
                              const Group &a = groups_[one], &b = groups_[other];
                              return a.count != b.count ? a.count > b.count : a.token < b.token;
                          });
        chosen_.resize(kept);
    }

    // Copies the voters of each chosen group, one group after the other. No branch: those of other
    // groups, and the silent ones, overwrite the first of the root's, which is read no more.
    void scatter(Voters voters) {
        int64_t at = static_cast<int64_t>(voters_.size());
        cursors_.assign(groups_.size() + 1, {0, 0});
        for (const int32_t index : chosen_) {
            cursors_[index + 1] = {at, 1};
            at += groups_[index].count;
        }
        voters_.resize(at);
        for (int64_t i = voters.start; i < voters.stop; i++) {
            Cursor& cursor = cursors_[group_of_[i - voters.start] + 1];
            voters_[cursor.at] = voters_[i];
            cursor.at += cursor.step;
        }
    }

    const int32_t* tokens_;
    int64_t num_tokens_;
    const int32_t* narrow_;
    const int64_t* wide_;
    int64_t num_positions_;

    // One draft's, kept for the next one's.
    std::vector<int64_t> voters_;  // positions: those of the root, then those of each node offered
    std::priority_queue<Candidate> waiting_;
    // A table that is never cleared: only slots of this turn are taken, and only those up to `mask_`.
    std::vector<Slot> slots_ = std::vector<Slot>(FEWEST_SLOTS, {0, 0, 0});
    uint64_t mask_ = FEWEST_SLOTS - 1, turn_ = 0;
    std::vector<Group> groups_;
    std::vector<Cursor> cursors_;
    std::vector<int32_t> group_of_, chosen_;
    int32_t age_ = 0;
};
