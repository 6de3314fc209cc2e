// Threads that share the pieces of a job. Unlike an OpenMP team, a thread that the system has not scheduled holds
// nothing up: the caller takes pieces too and waits only for pieces that were begun. A rank shares its cores with the
// processes that feed it, so that happens all the time. Idle threads look for work for some microseconds, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>
#include <vector>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ridgewalk {

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class ThreadPool {
   public:
    explicit ThreadPool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
    }

    ~ThreadPool() {
        stopping_.store(true);
        announce();
        for (auto& worker : workers_) worker.join();
    }

    int threads() const { return threads_; }

    // body(i) for 0 <= i < pieces, on any thread, in any order. One caller at a time.
    template <class F>
    void run(int64_t pieces, const F& body) {
        if (pieces <= 1 || threads_ == 1) {
            for (int64_t i = 0; i < pieces; i++) body(i);
            return;
        }
        for (int64_t from = 0; from < pieces; from += MOST) {  // as many as the claim word can count
            const int64_t count = std::min<int64_t>(MOST, pieces - from);
            auto shifted = [&](int64_t i) { body(from + i); };
            publish([](const void* job, int64_t i) { (*(const decltype(shifted)*)job)(i); }, &shifted, count);
        }
    }

   private:
    // The claim word: job number, pieces, next piece. A claim succeeds only while its own job has pieces left, which
    // keeps the job's fields from changing between reading them and using them.
    static constexpr int BITS = 20;
    static constexpr int64_t MOST = (1 << BITS) - 1;
    static constexpr int WORKER_SPINS = 2000;  // about 30 us: longer than the gaps between the operations of a step
    static constexpr int CALLER_SPINS = 4000;

    void publish(void (*function)(const void*, int64_t), const void* job, int64_t pieces) {
        function_.store(function, std::memory_order_relaxed);
        job_.store(job, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        number_++;
        claim_.store((number_ << (2 * BITS)) | ((uint64_t)pieces << BITS));
        announce();
        while (take_one()) {}
        for (int i = 0; i < CALLER_SPINS; i++) {
            if (done_.load(std::memory_order_acquire) == (uint32_t)pieces) return;
            pause_core();
        }
        while (true) {
            uint32_t done = done_.load();
            if (done == (uint32_t)pieces) return;
            caller_sleeps_.store(true);
            if (done_.load() == done) wait(&done_, done);
            caller_sleeps_.store(false);
        }
    }

    bool take_one() {
        uint64_t claim = claim_.load(std::memory_order_acquire);
        while (true) {
            const uint64_t pieces = (claim >> BITS) & MOST, piece = claim & MOST;
            if (piece >= pieces) return false;
            auto function = function_.load(std::memory_order_relaxed);
            auto job = job_.load(std::memory_order_relaxed);
            if (!claim_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) continue;
            function(job, piece);
            const uint32_t done = done_.fetch_add(1) + 1;
            if (done == pieces && caller_sleeps_.load()) wake(&done_, 1);
            return true;
        }
    }

    void work() {
        uint32_t seen = 0;
        while (!stopping_.load()) {
            while (take_one()) {}
            for (int i = 0; i < WORKER_SPINS && announced_.load(std::memory_order_acquire) == seen; i++) pause_core();
            if (announced_.load() == seen) {
                sleepers_.fetch_add(1);
                if (announced_.load() == seen && !stopping_.load()) wait(&announced_, seen);
                sleepers_.fetch_sub(1);
            }
            seen = announced_.load();
        }
    }

    void announce() {
        announced_.fetch_add(1);
        if (sleepers_.load()) wake(&announced_, INT_MAX);
    }

    static void wait(std::atomic<uint32_t>* word, uint32_t value) {
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
    }
    static void wake(std::atomic<uint32_t>* word, int count) {
        syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
    }

    const int threads_;
    std::vector<std::thread> workers_;
    uint64_t number_ = 0;
    alignas(128) std::atomic<uint64_t> claim_{0};
    std::atomic<void (*)(const void*, int64_t)> function_{nullptr};
    std::atomic<const void*> job_{nullptr};
    alignas(128) std::atomic<uint32_t> done_{0};
    std::atomic<bool> caller_sleeps_{false};
    alignas(128) std::atomic<uint32_t> announced_{0};
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> stopping_{false};
};

// body(row) for every row, in pieces of several rows; on this thread alone when there is little to do.
template <class F>
void for_rows(ThreadPool& pool, int64_t rows, int64_t elements_per_row, const F& body) {
    constexpr int64_t PIECE_ELEMENTS = 8192;  // some microseconds of work
    const int64_t piece = std::max<int64_t>(1, PIECE_ELEMENTS / std::max<int64_t>(1, elements_per_row));
    pool.run((rows + piece - 1) / piece, [&](int64_t i) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); row++) body(row);
    });
}

}  // namespace ridgewalk
