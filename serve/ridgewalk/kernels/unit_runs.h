// Units of work in runs of neighbours, one for each thread, so that a thread knows what it will read next and can fetch
// it. A thread goes through its own run from the front; one that is done steals from the others, from the back of
// theirs. So a thread that the system has not scheduled still holds up no more than the unit it is at.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace ridgewalk {

// The units [front, back) that nobody has taken yet, in one word.
class alignas(128) UnitRun {
   public:
    void reset(uint32_t front, uint32_t back) { word_.store(pack(front, back), std::memory_order_relaxed); }

    // A unit, and its neighbour inwards: itself, if it was the last. False: there is none.
    bool take_front(int64_t& unit, int64_t& next) {
        return take([&](uint32_t front, uint32_t back) {
            unit = front;
            next = front + 1 == back ? front : front + 1;
            return pack(front + 1, back);
        });
    }
    bool steal_back(int64_t& unit, int64_t& next) {
        return take([&](uint32_t front, uint32_t back) {
            unit = back - 1;
            next = front + 1 == back ? unit : unit - 1;
            return pack(front, back - 1);
        });
    }

   private:
    static uint64_t pack(uint32_t front, uint32_t back) { return (uint64_t)front << 32 | back; }

    template <class F>
    bool take(const F& left) {
        uint64_t word = word_.load(std::memory_order_relaxed);
        while (true) {
            const uint32_t front = word >> 32, back = (uint32_t)word;
            if (front >= back) return false;
            if (word_.compare_exchange_weak(word, left(front, back), std::memory_order_relaxed)) return true;
        }
    }

    std::atomic<uint64_t> word_{0};
};

// body(unit, next) for 0 <= unit < units, fewer than 2^32, in any order. `next` is what this thread will most likely do
// after `unit`; `unit` itself where it does not know.
template <class F>
void for_units(ThreadPool& pool, int64_t units, const F& body) {
    const int64_t threads = std::min<int64_t>(pool.threads(), units);
    if (threads <= 1) {
        for (int64_t unit = 0; unit < units; unit++) body(unit, std::min(unit + 1, units - 1));
        return;
    }
    std::vector<UnitRun> runs(threads);
    for (int64_t i = 0; i < threads; i++) runs[i].reset(units * i / threads, units * (i + 1) / threads);
    pool.run(threads, [&](int64_t own) {
        int64_t unit, next;
        while (runs[own].take_front(unit, next)) body(unit, next);
        for (int64_t i = 1; i < threads; i++)
            while (runs[(own + i) % threads].steal_back(unit, next)) body(unit, next);
    });
}

}  // namespace ridgewalk
