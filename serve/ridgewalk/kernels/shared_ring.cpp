// A one-way pipe between two processes of one host: a ring of slots in a shared segment. Rank 0 sends, rank 1 receives.
//
// Piece n is in slot n mod SLOTS. The sender writes it after the receiver has consumed piece n - SLOTS, the last one
// that was there, and then publishes n; the receiver reads it after that, and then consumes it. So each slot has one
// owner at any time, and the sender may be SLOTS pieces ahead. A tensor is one piece or, beyond the size of a slot,
// several; one without bytes is one piece.
#include <cstring>

#include "shared_segment.h"

using namespace ridgewalk::shared;

namespace {

constexpr int SENDER = 0, RECEIVER = 1;

struct alignas(128) Piece {
    uint64_t tensor_bytes;  // of the tensor it is of; the data follows
};

struct Ring {
    Segment segment;
    size_t slot_bytes;
    uint32_t slots;
    uint32_t pieces;  // sent or received by this end

    Counter* published() const { return (Counter*)(segment.base + sizeof(Header)); }
    Counter* consumed() const { return published() + 1; }
    Piece* piece(uint32_t number) const {
        return (Piece*)((char*)(consumed() + 1) + (number % slots) * (sizeof(Piece) + slot_bytes));
    }
};

size_t ring_bytes(uint32_t slots, size_t slot_bytes) {
    return sizeof(Header) + 2 * sizeof(Counter) + slots * (sizeof(Piece) + slot_bytes);
}

}  // namespace

extern "C" {

size_t rw_ring_bytes(uint32_t slots, size_t slot_bytes) { return ring_bytes(slots, slot_bytes); }

// Map the segment (a zeroed file); null on failure. `slots` is a power of two, as piece numbers wrap around.
void* rw_ring_open(
    const char* path, int rank, uint32_t slots, size_t slot_bytes, const int* pids, const int* pidfds, double timeout_s,
    int spins
) {
    Ring* ring = new Ring{};
    ring->slots = slots;
    ring->slot_bytes = slot_bytes;
    if (map_segment(ring->segment, path, ring_bytes(slots, slot_bytes), rank, 2, pids, pidfds, timeout_s, spins))
        return ring;
    delete ring;
    return nullptr;
}

int rw_ring_send(void* handle, const void* data, size_t bytes) {
    Ring& ring = *(Ring*)handle;
    size_t done = 0;
    do {
        const size_t part = bytes - done < ring.slot_bytes ? bytes - done : ring.slot_bytes;
        const uint32_t number = ++ring.pieces;
        if (int result = wait_for(ring.segment, ring.consumed(), RECEIVER, number - ring.slots)) return result;
        Piece* piece = ring.piece(number);
        piece->tensor_bytes = bytes;
        memcpy(piece + 1, (const char*)data + done, part);
        publish(ring.published(), number);
        done += part;
    } while (done < bytes);
    return OK;
}

// Wait until a tensor, or its first piece, is there; adds the seconds it took to `waited`.
int rw_ring_await(void* handle, double* waited) {
    Ring& ring = *(Ring*)handle;
    if (reached(ring.published(), ring.pieces + 1)) return OK;
    const double started = now();
    const int result = wait_for(ring.segment, ring.published(), SENDER, ring.pieces + 1);
    *waited += now() - started;
    return result;
}

// MISMATCH: the tensor that is there has not so many bytes.
int rw_ring_recv(void* handle, void* data, size_t bytes) {
    Ring& ring = *(Ring*)handle;
    size_t done = 0;
    do {
        const size_t part = bytes - done < ring.slot_bytes ? bytes - done : ring.slot_bytes;
        const uint32_t number = ring.pieces + 1;
        if (int result = wait_for(ring.segment, ring.published(), SENDER, number)) return result;
        const Piece* piece = ring.piece(number);
        if (piece->tensor_bytes != bytes) return MISMATCH;
        memcpy((char*)data + done, piece + 1, part);
        ring.pieces = number;
        publish(ring.consumed(), number);
        done += part;
    } while (done < bytes);
    return OK;
}

// Make the other end return ABORTED once it has to wait.
void rw_ring_abort(void* handle) {
    Ring& ring = *(Ring*)handle;
    ring.segment.header()->aborted.store(1);
    futex_wake(&ring.published()->value);
    futex_wake(&ring.consumed()->value);
}

void rw_ring_close(void* handle) {
    Ring* ring = (Ring*)handle;
    munmap(ring->segment.base, ring->segment.bytes);
    delete ring;
}

}
