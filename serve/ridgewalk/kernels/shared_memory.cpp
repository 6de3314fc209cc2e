// Collectives between ranks of one host through a shared segment.
//
// Every rank owns two slots. A call copies its payload to slot (call number mod 2), publishes the call number and waits
// until all ranks have published it; then it reads the others' slots. No second barrier is needed: a rank that
// overwrites a slot has seen every rank publish the call after it, which they do once they have read it.
#include <atomic>
#include <cerrno>
#include <climits>
#include <ctime>

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "thread_pool.h"
#include "vector.h"

using namespace ridgewalk;

namespace {

enum Result { OK = 0, ABORTED = -1, TIMED_OUT = -2, PEER_DIED = 1 };  // PEER_DIED + rank
enum Op { ALL_REDUCE = 0, ALL_GATHER = 1, GATHER = 2, BROADCAST = 3 };

struct alignas(128) Mailbox {
    std::atomic<uint32_t> published;  // number of the last call whose payload is in its slot
    std::atomic<uint32_t> sleepers;
};

struct alignas(128) Header {
    std::atomic<uint32_t> aborted;
};

struct Group {
    char* base;
    size_t bytes, slot_bytes;
    int rank, size, spins;
    double timeout_s;
    uint32_t calls;
    int pids[64], pidfds[64];  // of the peers; pidfd -1 where the kernel has none, pid 0 for a thread of this process

    Header* header() const { return (Header*)base; }
    Mailbox* box(int r) const { return (Mailbox*)(base + sizeof(Header)) + r; }
    char* slot(int r, uint32_t call) const {
        return base + sizeof(Header) + size * sizeof(Mailbox) + ((size_t)(call & 1) * size + r) * slot_bytes;
    }
};

size_t segment_bytes(int size, size_t slot_bytes) {
    return sizeof(Header) + size * (sizeof(Mailbox) + 2 * slot_bytes);
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void futex_wait(std::atomic<uint32_t>* word, uint32_t value, long nanoseconds) {
    timespec limit{0, nanoseconds};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

bool died(const Group& g, int peer) {
    if (g.pids[peer] == 0) return false;
    if (g.pidfds[peer] >= 0) {
        pollfd event{g.pidfds[peer], POLLIN, 0};  // readable once the process has ended, reaped or not
        return poll(&event, 1, 0) > 0;
    }
    return kill(g.pids[peer], 0) != 0 && errno == ESRCH;
}

int wait_for(const Group& g, int peer, uint32_t call) {
    Mailbox* box = g.box(peer);
    auto arrived = [&](uint32_t published) { return (int32_t)(published - call) >= 0; };
    for (int i = 0; i < g.spins; i++) {
        if (arrived(box->published.load(std::memory_order_acquire))) return OK;
        pause_core();
    }
    const double until = now() + g.timeout_s;
    while (true) {
        box->sleepers.fetch_add(1);
        uint32_t published = box->published.load();
        if (!arrived(published)) futex_wait(&box->published, published, 50'000'000);
        box->sleepers.fetch_sub(1);
        if (arrived(box->published.load())) return OK;
        if (g.header()->aborted.load()) return ABORTED;
        if (died(g, peer)) return arrived(box->published.load()) ? OK : PEER_DIED + peer;
        if (now() > until) return TIMED_OUT;
    }
}

int exchange(Group& g) {
    Mailbox* own = g.box(g.rank);
    own->published.store(g.calls);
    if (own->sleepers.load()) futex_wake(&own->published);
    for (int r = 0; r < g.size; r++) {
        if (r == g.rank) continue;
        if (int result = wait_for(g, r, g.calls)) return result;
    }
    return OK;
}

template <class T>
void add_slots(const Group& g, T* out, size_t count) {
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vf total = load((const T*)g.slot(0, g.calls) + i);
        for (int r = 1; r < g.size; r++) total += load((const T*)g.slot(r, g.calls) + i);
        store(out + i, total);
    }
    for (; i < count; i++) {
        float total = to_float(((const T*)g.slot(0, g.calls))[i]);
        for (int r = 1; r < g.size; r++) total += to_float(((const T*)g.slot(r, g.calls))[i]);
        from_float(out + i, total);
    }
}

void wake_all(const Group& g) {
    for (int r = 0; r < g.size; r++) futex_wake(&g.box(r)->published);
}

}  // namespace

extern "C" {

size_t rw_shm_bytes(int size, size_t slot_bytes) { return segment_bytes(size, slot_bytes); }

// Map the segment (a zeroed file); null on failure.
void* rw_shm_open(
    const char* path, int rank, int size, size_t slot_bytes, const int* pids, const int* pidfds, double timeout_s,
    int spins
) {
    int file = open(path, O_RDWR);
    if (file < 0) return nullptr;
    size_t bytes = segment_bytes(size, slot_bytes);
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (base == MAP_FAILED) return nullptr;
    Group* g = new Group{(char*)base, bytes, slot_bytes, rank, size, spins, timeout_s, 0, {}, {}};
    for (int r = 0; r < size; r++) g->pids[r] = pids[r], g->pidfds[r] = pidfds[r];
    return g;
}

// `bytes` is the payload of one rank. `in` is read where a rank contributes, `out` written where it receives: the sum
// in an all-reduce, [size][bytes] in a gather, the root's payload in a broadcast.
int rw_shm_collective(void* group, int op, int dtype, int root, const void* in, void* out, size_t bytes) {
    Group& g = *(Group*)group;
    const size_t element = dtype == 0 ? 4 : 2;
    for (size_t done = 0; done < bytes; done += g.slot_bytes) {
        const size_t part = bytes - done < g.slot_bytes ? bytes - done : g.slot_bytes;
        g.calls++;
        if (op != BROADCAST || g.rank == root) memcpy(g.slot(g.rank, g.calls), (const char*)in + done, part);
        if (int result = exchange(g)) return result;
        if (op == ALL_REDUCE)
            dispatch(dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                add_slots(g, (T*)((char*)out + done), part / element);
            });
        else if (op == ALL_GATHER || (op == GATHER && g.rank == root))
            for (int r = 0; r < g.size; r++) memcpy((char*)out + r * bytes + done, g.slot(r, g.calls), part);
        else if (op == BROADCAST && g.rank != root)
            memcpy((char*)out + done, g.slot(root, g.calls), part);
    }
    return OK;
}

// Make every rank that waits, now or later, return ABORTED.
void rw_shm_abort(void* group) {
    Group& g = *(Group*)group;
    g.header()->aborted.store(1);
    wake_all(g);
}

void rw_shm_close(void* group) {
    Group* g = (Group*)group;
    munmap(g->base, g->bytes);
    delete g;
}

}
