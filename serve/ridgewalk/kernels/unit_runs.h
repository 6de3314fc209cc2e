// Units of work in runs of neighbours, one for each thread, so that a thread knows what it will read next and can fetch
// it. A thread goes through its own run from the front; one that is done helps the others, from the back of theirs. So
// a thread that the system has not scheduled still holds up no more than the unit it is at.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace ridgewalk {

// The units [front, back) that nobody has taken yet, in one word.
class alignas(64) UnitRun {
   public:
    void reset(uint32_t front, uint32_t back) { word_.store(pack(front, back), std::memory_order_relaxed); }

    // A unit, and its neighbour in the direction of taking: itself, if it was the last. False: there is none.
    bool take(bool from_front, int64_t& unit, int64_t& next) {
        uint64_t word = word_.load(std::memory_order_relaxed);
        while (true) {
            const uint32_t front = word >> 32, back = (uint32_t)word;
            if (front >= back) return false;
            const uint64_t left = from_front ? pack(front + 1, back) : pack(front, back - 1);
            if (!word_.compare_exchange_weak(word, left, std::memory_order_relaxed)) continue;
            const bool last = front + 1 == back;
            unit = from_front ? front : back - 1;
            next = last ? unit : from_front ? unit + 1 : unit - 1;
            return true;
        }
    }

   private:
    static uint64_t pack(uint32_t front, uint32_t back) { return (uint64_t)front << 32 | back; }

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
        for (int64_t i = 0; i < threads; i++)
            while (runs[(own + i) % threads].take(i == 0, unit, next)) body(unit, next);
    });
}

}  // namespace ridgewalk
