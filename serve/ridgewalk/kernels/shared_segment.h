// What ranks of one host build on in a shared segment: counters that peers wait for, and how a wait ends when a peer
// does not come.
#pragma once

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "thread_pool.h"

namespace ridgewalk {
namespace shared {

enum Result { OK = 0, ABORTED = -1, TIMED_OUT = -2, MISMATCH = -3, INVALID = -4, PEER_DIED = 1 };  // PEER_DIED + rank

constexpr int MAX_RANKS = 64;

// Only grows, modulo 2^32; written by one rank.
struct alignas(128) Counter {
    std::atomic<uint32_t> value;
    std::atomic<uint32_t> sleepers;
};

struct alignas(128) Header {
    std::atomic<uint32_t> aborted;
};

// One rank's mapping of a segment, which begins with a Header.
struct Segment {
    char* base;
    size_t bytes;
    int rank, size, spins;
    double timeout_s;
    int pids[MAX_RANKS], pidfds[MAX_RANKS];  // of the peers; pidfd -1: the kernel has none, pid 0: a thread of this process

    Header* header() const { return (Header*)base; }
};

inline double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

inline void futex_wait(std::atomic<uint32_t>* word, uint32_t value, long nanoseconds) {
    timespec limit{0, nanoseconds};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

inline void futex_wake(std::atomic<uint32_t>* word) {
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline bool died(const Segment& s, int peer) {
    if (s.pids[peer] == 0) return false;
    if (s.pidfds[peer] >= 0) {
        pollfd event{s.pidfds[peer], POLLIN, 0};  // readable once the process has ended, reaped or not
        return poll(&event, 1, 0) > 0;
    }
    return kill(s.pids[peer], 0) != 0 && errno == ESRCH;
}

// Map a zeroed file of `bytes`; false on failure.
inline bool map_segment(
    Segment& s, const char* path, size_t bytes, int rank, int size, const int* pids, const int* pidfds, double timeout_s,
    int spins
) {
    int file = open(path, O_RDWR);
    if (file < 0) return false;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (base == MAP_FAILED) return false;
    s = Segment{(char*)base, bytes, rank, size, spins, timeout_s, {}, {}};
    for (int r = 0; r < size; r++) s.pids[r] = pids[r], s.pidfds[r] = pidfds[r];
    return true;
}

inline bool reached(const Counter* counter, uint32_t value) {
    return (int32_t)(counter->value.load(std::memory_order_acquire) - value) >= 0;
}

// Wait until `peer` has raised its counter to `value`. What it did before it died or left still counts.
inline int wait_for(const Segment& s, Counter* counter, int peer, uint32_t value) {
    for (int i = 0; i < s.spins; i++) {
        if (reached(counter, value)) return OK;
        pause_core();
    }
    const double until = now() + s.timeout_s;
    while (true) {
        counter->sleepers.fetch_add(1);
        uint32_t seen = counter->value.load();
        if ((int32_t)(seen - value) < 0) futex_wait(&counter->value, seen, 50'000'000);
        counter->sleepers.fetch_sub(1);
        if (reached(counter, value)) return OK;
        if (s.header()->aborted.load()) return ABORTED;
        if (died(s, peer)) return reached(counter, value) ? OK : PEER_DIED + peer;
        if (now() > until) return TIMED_OUT;
    }
}

inline void publish(Counter* counter, uint32_t value) {
    counter->value.store(value);
    if (counter->sleepers.load()) futex_wake(&counter->value);
}

}  // namespace shared
}  // namespace ridgewalk
