// One team of threads for a whole pass, and the barrier between its stages.
//
// The threads are those of the OpenMP runtime that torch runs on, entered once per pass, so that
// two pools never spin against each other.

#pragma once

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

struct Barrier {
    std::atomic<int> waiting{0};
    std::atomic<int> round{0};
};

inline void relax(int turns) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
    if (turns % 512 == 511) {  // somebody else may need this core to arrive at all
#if defined(__unix__) || defined(__APPLE__)
        sched_yield();
#endif
    }
}

struct Range {
    int begin, end;
};

struct Worker {
    int index;
    int count;
    Barrier* barrier;

    void wait() const {
        if (count == 1) return;
        int round = barrier->round.load(std::memory_order_relaxed);
        if (barrier->waiting.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            barrier->waiting.store(0, std::memory_order_relaxed);
            barrier->round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; barrier->round.load(std::memory_order_acquire) == round; turns++)
            relax(turns);
    }

    // This worker's share of `items`, in multiples of `unit`.
    Range share(int items, int unit = 1) const {
        long units = (items + unit - 1) / unit;
        int begin = static_cast<int>(units * index / count) * unit;
        int end = static_cast<int>(units * (index + 1) / count) * unit;
        return {begin, end < items ? end : items};
    }
};

template <class Work>
inline void run_team(int threads, const Work& work) {
#if defined(_OPENMP)
    if (threads > 1) {
        Barrier barrier;
#pragma omp parallel num_threads(threads)
        work(Worker{omp_get_thread_num(), omp_get_num_threads(), &barrier});
        return;
    }
#endif
    Barrier barrier;
    work(Worker{0, 1, &barrier});
}
