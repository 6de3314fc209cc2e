// The experts of a sparse layer: SwiGLU with the matrices of each row's slot, in two passes over the rows by slot.
// Work is cut by slot, row block and panel of outputs, so that all threads have some even when one token goes to few
// experts. The panels of gate and up lie in turns: what the second pass takes is made where both are at hand.
#include "matrix_product.h"

#include <vector>

using namespace ridgewalk;

namespace {

constexpr int64_t MAX_INNER = 1 << 24;  // elements of the inner rows that are held at once

struct Sizes {
    int64_t slots, hidden, inner;
    int64_t gate_up() const { return 2 * panels_of(inner) * PANEL * hidden; }  // elements of a slot
    int64_t down() const { return panels_of(hidden) * PANEL * inner; }
};

// Where the rows of each slot come from and go to.
struct Routes {
    const int64_t *starts, *order;  // order: null where rows lie by slot
    int64_t copies;                 // rows made from one of x
    int64_t target(int64_t i) const { return order ? order[i] : i; }
    int64_t source(int64_t i) const { return order ? order[i] / copies : i; }
};

// A run of rows of one slot.
struct Block {
    int64_t slot, first, count;
};

template <class T>
struct SourceRows {
    EvenRows<T> x;
    const Routes& routes;
    auto operator()(int64_t i) const { return x(routes.source(i)); }
};

struct Sink {
    vf start(int) const { return vf{}; }
};

struct GateSink : Sink {
    float* silu;
    int64_t first;  // row
    static vf silu_of(vf g) { return g / (1.0f + exp2_vector(g * -LOG2E)); }
    void finish(int64_t row, vf low, vf high) const {
        store(silu + (row - first) * PANEL, silu_of(low));
        store(silu + (row - first) * PANEL + LANES, silu_of(high));
    }
};

template <class Input>
struct UpSink : Sink {
    const float* silu;
    Input* inner;  // [rows][width], of the block's first row on
    int64_t first, panel, width;
    void finish(int64_t row, vf low, vf high) const {
        const float* gate = silu + (row - first) * PANEL;
        store_panel(inner + (row - first) * width, panel, width, low * load(gate), high * load(gate + LANES));
    }
};

template <class T>
struct DownSink : Sink {
    T* out;
    const Routes& routes;
    int64_t panel, width;
    void finish(int64_t row, vf low, vf high) const {
        store_panel(out + routes.target(row) * width, panel, width, low, high);
    }
};

// Blocks of the rows [begin, end) of the order by slot.
std::vector<Block> cut(const Routes& routes, int64_t slots, int64_t begin, int64_t end) {
    std::vector<Block> blocks;
    for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t last = std::min(end, routes.starts[slot + 1]);
        for (int64_t first = std::max(begin, routes.starts[slot]); first < last; first += ROW_BLOCK)
            blocks.push_back({slot, first, std::min<int64_t>(ROW_BLOCK, last - first)});
    }
    return blocks;
}

template <class T>
void run_experts(
    T* out, const EvenRows<T>& x, const Routes& routes, const T* gate_up, const T* down, const Sizes& s, int64_t begin,
    int64_t end, ThreadPool& pool
) {
    using Input = typename Packing<T>::Input;
    const std::unique_ptr<Input[]> inner(new Input[(end - begin) * s.inner]);
    const std::vector<Block> blocks = cut(routes, s.slots, begin, end);
    const SourceRows<T> sources{x, routes};
    const int64_t pairs = panels_of(s.inner), pair = 2 * PANEL * s.hidden;
    auto gate_of = [&](int64_t unit) {
        return gate_up + blocks[unit / pairs].slot * s.gate_up() + unit % pairs * pair;
    };
    for_units(pool, blocks.size() * pairs, [&](int64_t unit, int64_t next) {
        float silu[ROW_BLOCK * PANEL];
        const Block& b = blocks[unit / pairs];
        const T *gate = gate_of(unit), *up = gate + pair / 2;
        multiply_panel(gate, s.hidden, sources, b.first, b.count, GateSink{{}, silu, b.first}, up);
        const UpSink<Input> sink{{}, silu, inner.get() + (b.first - begin) * s.inner, b.first, unit % pairs, s.inner};
        multiply_panel(up, s.hidden, sources, b.first, b.count, sink, gate_of(next));
    });
    const EvenRows<T> inner_rows{inner.get() - begin * s.inner, s.inner};
    const int64_t panels = panels_of(s.hidden), size = PANEL * s.inner;
    auto down_of = [&](int64_t unit) { return down + blocks[unit / panels].slot * s.down() + unit % panels * size; };
    for_units(pool, blocks.size() * panels, [&](int64_t unit, int64_t next) {
        const Block& b = blocks[unit / panels];
        const DownSink<T> sink{{}, out, routes, unit % panels, s.hidden};
        multiply_panel(down_of(unit), s.inner, inner_rows, b.first, b.count, sink, down_of(next));
    });
}

template <class T>
void expert_mlp(
    T* out, const T* x, int64_t stride, const Routes& routes, const T* gate_up, const T* down, const Sizes& s,
    int64_t rows, ThreadPool& pool
) {
    const InputRows<T> inputs(x, rows / routes.copies, stride, s.hidden, pool);
    const int64_t most = std::max<int64_t>(ROW_BLOCK, MAX_INNER / s.inner);
    for (int64_t begin = 0; begin < rows; begin += most)
        run_experts(out, inputs.rows, routes, gate_up, down, s, begin, std::min(rows, begin + most), pool);
}

template <class T>
void pack_experts(T* gate_up, T* down, const T* from_gate_up, const T* from_down, const Sizes& s, ThreadPool& pool) {
    const int64_t pairs = panels_of(s.inner), panels = panels_of(s.hidden), size = PANEL * s.hidden;
    for_rows(pool, s.slots * pairs, 2 * size, [&](int64_t i) {
        const int64_t slot = i / pairs, panel = i % pairs;
        const T* from = from_gate_up + slot * 2 * s.inner * s.hidden;
        T* to = gate_up + slot * s.gate_up() + panel * 2 * size;
        pack_panel(to, from, panel, s.inner, s.hidden);
        pack_panel(to + size, from + s.inner * s.hidden, panel, s.inner, s.hidden);
    });
    for_rows(pool, s.slots * panels, PANEL * s.inner, [&](int64_t i) {
        const int64_t slot = i / panels, panel = i % panels;
        T* to = down + slot * s.down() + panel * PANEL * s.inner;
        pack_panel(to, from_down + slot * s.hidden * s.inner, panel, s.hidden, s.inner);
    });
}

}  // namespace

extern "C" {

// Elements of the packed gate_up and down of one slot; 0 where the sizes cannot be packed.
void rw_expert_sizes(int64_t* gate_up, int64_t* down, int64_t hidden, int64_t inner, int dtype) {
    const Sizes s{1, hidden, inner};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool whole = hidden % Packing<T>::DEPTH == 0 && inner % Packing<T>::DEPTH == 0;
        *gate_up = whole ? s.gate_up() : 0;
        *down = whole ? s.down() : 0;
    });
}

void rw_pack_experts(
    void* gate_up, void* down, const void* from_gate_up, const void* from_down, int64_t slots, int64_t hidden,
    int64_t inner, int dtype, void* pool
) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pack_experts(
            (T*)gate_up, (T*)down, (const T*)from_gate_up, (const T*)from_down, Sizes{slots, hidden, inner},
            *(ThreadPool*)pool
        );
    });
}

void rw_expert_mlp(
    void* out, const void* x, int64_t stride, const int64_t* starts, const int64_t* order, int64_t copies,
    const void* gate_up, const void* down, int64_t rows, int64_t slots, int64_t hidden, int64_t inner, int dtype,
    void* pool
) {
    const Routes routes{starts, order, copies};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        expert_mlp(
            (T*)out, (const T*)x, stride, routes, (const T*)gate_up, (const T*)down, Sizes{slots, hidden, inner}, rows,
            *(ThreadPool*)pool
        );
    });
}

}
