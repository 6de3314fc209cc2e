// Collectives between ranks of one host through a shared segment.
//
// Every rank owns two slots. An exchange, numbered by `calls`, copies a rank's payload to its slot (number mod 2),
// publishes the number and waits until all ranks have published it; then the rank reads the others' slots. No second
// barrier is needed: a rank writes to a slot in exchange n + 2 after it has seen every rank publish n + 1, and a rank
// publishes n + 1 once it has read what it wants of exchange n. This holds for all operations because
// - every rank takes part in every exchange, also when it has nothing to give or take, and all compute alike how many
//   exchanges an operation has: from the payload's size, or in an all-to-all from everybody's counts;
// - nothing of exchange n is read after n + 1 was published. In an all-to-all the slots of the first exchange are read
//   by `finish`, and no other operation may come between `begin` and `finish`; the headers are copied in `begin`,
//   because they are needed in later rounds, when the slots have others.
#include "shared_segment.h"
#include "vector.h"

using namespace ridgewalk;
using namespace ridgewalk::shared;

namespace {

enum Op { ALL_REDUCE = 0, ALL_GATHER = 1, GATHER = 2, BROADCAST = 3 };

struct Group {
    Segment segment;
    size_t slot_bytes;
    uint32_t calls;
    // of the all-to-all between begin and finish
    size_t row_bytes;
    int64_t counts[MAX_RANKS][MAX_RANKS];  // rows by source and destination

    int rank() const { return segment.rank; }
    int size() const { return segment.size; }
    Counter* box(int r) const { return (Counter*)(segment.base + sizeof(Header)) + r; }
    char* slot(int r, uint32_t call) const {
        const size_t index = (size_t)(call & 1) * size() + r;
        return segment.base + sizeof(Header) + size() * sizeof(Counter) + index * slot_bytes;
    }

    // An all-to-all's slot: row bytes, counts by destination, then a round's share of the bytes that leave the rank.
    size_t header_bytes() const { return (size_t)((size() + 1) * 8 + 127) / 128 * 128; }
    size_t room() const { return slot_bytes - header_bytes(); }

    // Bytes that leave rank r for the ranks below `end`. Those it keeps need no slot.
    size_t outgoing(int r, int end) const {
        size_t rows = 0;
        for (int d = 0; d < end; d++) rows += d == r ? 0 : counts[r][d];
        return rows * row_bytes;
    }
};

size_t segment_bytes(int size, size_t slot_bytes) {
    return sizeof(Header) + size * (sizeof(Counter) + 2 * slot_bytes);
}

int exchange(Group& g) {
    publish(g.box(g.rank()), g.calls);
    for (int r = 0; r < g.size(); r++) {
        if (r == g.rank()) continue;
        if (int result = wait_for(g.segment, g.box(r), r, g.calls)) return result;
    }
    return OK;
}

template <class T>
void add_slots(const Group& g, T* out, size_t count) {
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vf total = load((const T*)g.slot(0, g.calls) + i);
        for (int r = 1; r < g.size(); r++) total += load((const T*)g.slot(r, g.calls) + i);
        store(out + i, total);
    }
    for (; i < count; i++) {
        float total = to_float(((const T*)g.slot(0, g.calls))[i]);
        for (int r = 1; r < g.size(); r++) total += to_float(((const T*)g.slot(r, g.calls))[i]);
        from_float(out + i, total);
    }
}

// Copy [from, to) of the bytes that leave this rank to its slot: `rows` without those that stay.
void write_round(const Group& g, const char* rows, size_t round) {
    const int me = g.rank();
    const size_t from = round * g.room(), total = g.outgoing(me, g.size());
    if (from >= total) return;
    const size_t to = from + g.room() < total ? from + g.room() : total;
    const size_t gap = g.outgoing(me, me), kept = g.counts[me][me] * g.row_bytes;
    char* slot = g.slot(me, g.calls) + g.header_bytes();
    const size_t below = from < gap ? (to < gap ? to : gap) - from : 0;
    memcpy(slot, rows + from, below);
    if (below < to - from) memcpy(slot + below, rows + kept + from + below, to - from - below);
}

// Copy what this round brought for this rank; `out` is ordered by source.
void read_round(const Group& g, char* out, size_t round) {
    const int me = g.rank();
    const size_t from = round * g.room(), to = from + g.room();
    for (int r = 0; r < g.size(); r++) {
        const size_t bytes = g.counts[r][me] * g.row_bytes;
        if (r != me) {
            const size_t start = g.outgoing(r, me);
            const size_t low = start > from ? start : from, high = start + bytes < to ? start + bytes : to;
            if (low < high) memcpy(out + low - start, g.slot(r, g.calls) + g.header_bytes() + low - from, high - low);
        }
        out += bytes;
    }
}

}  // namespace

extern "C" {

size_t rw_shm_bytes(int size, size_t slot_bytes) { return segment_bytes(size, slot_bytes); }

// Map the segment (a zeroed file); null on failure.
void* rw_shm_open(
    const char* path, int rank, int size, size_t slot_bytes, const int* pids, const int* pidfds, double timeout_s,
    int spins
) {
    Group* g = new Group{};
    g->slot_bytes = slot_bytes;
    if (map_segment(g->segment, path, segment_bytes(size, slot_bytes), rank, size, pids, pidfds, timeout_s, spins))
        return g;
    delete g;
    return nullptr;
}

// `bytes` is the payload of one rank. `in` is read where a rank contributes, `out` written where it receives: the sum
// in an all-reduce, [size][bytes] in a gather, the root's payload in a broadcast.
int rw_shm_collective(void* group, int op, int dtype, int root, const void* in, void* out, size_t bytes) {
    Group& g = *(Group*)group;
    const size_t element = dtype == 0 ? 4 : 2;
    for (size_t done = 0; done < bytes; done += g.slot_bytes) {
        const size_t part = bytes - done < g.slot_bytes ? bytes - done : g.slot_bytes;
        g.calls++;
        if (op != BROADCAST || g.rank() == root) memcpy(g.slot(g.rank(), g.calls), (const char*)in + done, part);
        if (int result = exchange(g)) return result;
        if (op == ALL_REDUCE)
            dispatch(dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                add_slots(g, (T*)((char*)out + done), part / element);
            });
        else if (op == ALL_GATHER || (op == GATHER && g.rank() == root))
            for (int r = 0; r < g.size(); r++) memcpy((char*)out + r * bytes + done, g.slot(r, g.calls), part);
        else if (op == BROADCAST && g.rank() != root)
            memcpy((char*)out + done, g.slot(root, g.calls), part);
    }
    return OK;
}

// First half of an all-to-all: `rows` are sorted by destination, counts[r] of them go to rank r. Returns in
// `received` how many come from each rank, so that the caller can make room for them. INVALID, before anything has
// happened: the counts do not add up to `num_rows`. MISMATCH: ranks disagree on the bytes of a row.
int rw_shm_all_to_all_begin(
    void* group, const void* rows, int64_t num_rows, size_t row_bytes, const int64_t* counts, int64_t* received
) {
    Group& g = *(Group*)group;
    const int me = g.rank();
    for (int r = 0; r < g.size(); r++) {
        if (counts[r] < 0) return INVALID;
        num_rows -= counts[r];
    }
    if (num_rows != 0) return INVALID;
    g.calls++;
    g.row_bytes = row_bytes;
    int64_t* header = (int64_t*)g.slot(me, g.calls);
    header[0] = row_bytes;
    memcpy(header + 1, counts, g.size() * sizeof(int64_t));
    memcpy(g.counts[me], counts, g.size() * sizeof(int64_t));
    write_round(g, (const char*)rows, 0);
    if (int result = exchange(g)) return result;
    for (int r = 0; r < g.size(); r++) {
        const int64_t* theirs = (const int64_t*)g.slot(r, g.calls);
        if (theirs[0] != (int64_t)row_bytes) return MISMATCH;
        memcpy(g.counts[r], theirs + 1, g.size() * sizeof(int64_t));
        received[r] = g.counts[r][me];
    }
    return OK;
}

// Second half: copies what comes to `out`, ordered by source. `rows` as in the first.
int rw_shm_all_to_all_finish(void* group, const void* rows, void* out) {
    Group& g = *(Group*)group;
    const int me = g.rank();
    size_t longest = 0, before = 0;
    for (int r = 0; r < g.size(); r++) {
        const size_t bytes = g.outgoing(r, g.size());
        longest = bytes > longest ? bytes : longest;
        before += r < me ? g.counts[r][me] * g.row_bytes : 0;
    }
    memcpy((char*)out + before, (const char*)rows + g.outgoing(me, me), g.counts[me][me] * g.row_bytes);
    read_round(g, (char*)out, 0);
    for (size_t round = 1; round * g.room() < longest; round++) {
        g.calls++;
        write_round(g, (const char*)rows, round);
        if (int result = exchange(g)) return result;
        read_round(g, (char*)out, round);
    }
    return OK;
}

// Make every rank that waits, now or later, return ABORTED.
void rw_shm_abort(void* group) {
    Group& g = *(Group*)group;
    g.segment.header()->aborted.store(1);
    for (int r = 0; r < g.size(); r++) futex_wake(&g.box(r)->value);
}

void rw_shm_close(void* group) {
    Group* g = (Group*)group;
    munmap(g->segment.base, g->segment.bytes);
    delete g;
}

}
