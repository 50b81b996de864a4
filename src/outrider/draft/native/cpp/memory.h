// Memory that grows without copying: blocks of one array, and small arrays inside it.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

// A growing array of plain values. Large ones are moved by the system's page tables, not copied.
template <class T>
class Array {
   public:
    Array() = default;
    Array(const Array&) = delete;
    Array(Array&& other) noexcept : items_(other.items_), size_(other.size_), room_(other.room_) {
        other.items_ = nullptr;
        other.size_ = other.room_ = 0;
    }
    Array& operator=(Array&& other) noexcept {
        std::swap(items_, other.items_);
        std::swap(size_, other.size_);
        std::swap(room_, other.room_);
        return *this;
    }
    ~Array() { std::free(items_); }

    T& operator[](int64_t i) { return items_[i]; }
    const T& operator[](int64_t i) const { return items_[i]; }
    int64_t size() const { return size_; }
    int64_t bytes() const { return room_ * static_cast<int64_t>(sizeof(T)); }

    // Returns where the `count` new values begin.
    int64_t grow(int64_t count) {
        const int64_t first = size_;
        size_ += count;
        if (size_ > room_) {
            room_ += room_ / 4 + 16;
            if (room_ < size_) room_ = size_;
            void* moved = std::realloc(items_, room_ * sizeof(T));
            if (!moved) throw std::bad_alloc();
            items_ = static_cast<T*>(moved);
        }
        return first;
    }
    void push(const T& value) {
        const int64_t last = grow(1);  // first: it may move the values
        items_[last] = value;
    }

   private:
    T* items_ = nullptr;
    int64_t size_ = 0, room_ = 0;
};

// Small arrays of 1, 2, 4, 8 .. values each in one pool; those given back are used again.
template <class T>
class Pool {
   public:
    T* at(int32_t place) { return &items_[place]; }
    const T* at(int32_t place) const { return &items_[place]; }
    int64_t bytes() const { return items_.bytes(); }

    static int class_of(int count) {
        int size_class = 0;
        while ((1 << size_class) < count) size_class++;
        return size_class;
    }
    int32_t take(int size_class) {
        std::vector<int32_t>& free = free_[size_class];
        if (free.empty()) return static_cast<int32_t>(items_.grow(int64_t{1} << size_class));
        const int32_t place = free.back();
        free.pop_back();
        return place;
    }
    void give(int32_t place, int size_class) { free_[size_class].push_back(place); }

   private:
    Array<T> items_;
    std::vector<int32_t> free_[31];
};
