// Attention of several queries a sequence: tiles of keys and values are packed to FP32 and multiplied with tiles of
// queries.
#include <vector>

#include "attention.h"
#include "thread_pool.h"

using namespace ridgewalk;

namespace {

constexpr int ROWS = 64;  // queries x heads of a group that share one packed tile

constexpr int STRIP = REGISTERS / 8;  // vectors of a row whose sums stay in registers

// c[4][STRIP vectors] += a[4][depth] * b[depth][STRIP vectors]
inline void multiply_strip(
    float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride, int depth
) {
    vf sums[4][STRIP];
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < STRIP; j++) sums[r][j] = load(c + r * c_stride + j * LANES);
    for (int i = 0; i < depth; i++) {
        const float* row = b + (size_t)i * b_stride;
        vf values[STRIP];
        for (int j = 0; j < STRIP; j++) values[j] = load(row + j * LANES);
        for (int r = 0; r < 4; r++) {
            const float x = a[r * a_stride + i];
            for (int j = 0; j < STRIP; j++) sums[r][j] += x * values[j];
        }
    }
    for (int r = 0; r < 4; r++)
        for (int j = 0; j < STRIP; j++) store(c + r * c_stride + j * LANES, sums[r][j]);
}

// c[4][TILE] += a[4][depth] * b[depth][TILE]
inline void multiply_tile(
    float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride, int depth
) {
    for (int i = 0; i < TILE; i += STRIP * LANES) multiply_strip(c + i, c_stride, a, a_stride, b + i, b_stride, depth);
}

// Buffers of one thread in prefill. Rows are (query, head of the group); widths are padded to whole tiles.
struct Scratch {
    std::vector<float> q, k, v, scores, acc, top, total;

    void resize(int rows, int d) {
        q.resize((size_t)rows * d);
        k.resize((size_t)d * TILE);
        v.resize((size_t)TILE * padded(d));
        scores.resize((size_t)rows * TILE);
        acc.resize((size_t)rows * padded(d));
        top.resize(rows);
        total.resize(rows);
    }
    static int padded(int d) { return (d + TILE - 1) / TILE * TILE; }
};

struct Item {
    int64_t seq;
    int first, count, kv_head;  // queries of the sequence
};

template <class T>
void attend(Scratch& w, const Batch<T>& b, const Item& item, const Shape& s) {
    const int64_t q_row = b.cu_q[item.seq];
    const int q_len = b.cu_q[item.seq + 1] - q_row, used = b.used[item.seq];
    const int d = s.head_dim, group = s.group(), wide = Scratch::padded(d);
    const int rows = item.count * group, whole_rows = (rows + 3) / 4 * 4;
    const int before = used - q_len + item.first;  // keys before the first query's own
    Walk walk(b.table + item.seq * s.table_stride, 0, s);
    auto row_of = [&](int r) {  // where a row's query begins, and its output
        return ((q_row + item.first + r / group) * s.num_heads + item.kv_head * group + r % group) * d;
    };
    std::fill(w.q.begin(), w.q.end(), 0.0f);
    for (int r = 0; r < rows; r++) {
        const T* from = b.query + row_of(r);
        for (int i = 0; i < d; i += LANES) store(&w.q[(size_t)r * d + i], load(from + i) * s.scale);
    }
    std::fill(w.acc.begin(), w.acc.end(), 0.0f);
    std::fill(w.top.begin(), w.top.end(), LOWEST);
    std::fill(w.total.begin(), w.total.end(), 0.0f);
    const int stop = before + item.count;
    for (int start = 0; start < stop; start += TILE) {
        const int count = std::min(TILE, stop - start);
        for (int t = 0; t < TILE; t++) {
            if (t >= count) {  // zero weights times whatever an earlier tile left would still be fine, NaN would not
                for (int i = 0; i < d; i++) w.k[(size_t)i * TILE + t] = 0.0f;
                continue;
            }
            const int64_t at = walk.next() + item.kv_head * d;
            for (int i = 0; i < d; i += LANES) {
                vf key = load(b.keys + at + i);
                for (int j = 0; j < LANES; j++) w.k[(size_t)(i + j) * TILE + t] = key[j];
                store(&w.v[(size_t)t * wide + i], load(b.values + at + i));
            }
        }
        std::fill(w.scores.begin(), w.scores.end(), 0.0f);
        for (int r = 0; r < whole_rows; r += 4)
            multiply_tile(&w.scores[(size_t)r * TILE], TILE, &w.q[(size_t)r * d], d, w.k.data(), TILE, d);
        for (int r = 0; r < rows; r++) {
            const int visible = std::min(count, before + r / group + 1 - start);
            float* scores = &w.scores[(size_t)r * TILE];
            if (visible <= 0) {
                std::fill(scores, scores + TILE, 0.0f);
                continue;
            }
            float factor = soften(scores, visible, w.top[r], w.total[r]);
            std::fill(scores + visible, scores + TILE, 0.0f);
            float* acc = &w.acc[(size_t)r * wide];
            if (factor != 1.0f)
                for (int i = 0; i < d; i += LANES) store(acc + i, load(acc + i) * factor);
        }
        for (int r = 0; r < whole_rows; r += 4) {
            const float* weights = &w.scores[(size_t)r * TILE];
            for (int i = 0; i < wide; i += TILE)
                multiply_tile(&w.acc[(size_t)r * wide + i], wide, weights, TILE, &w.v[i], wide, count);
        }
    }
    for (int r = 0; r < rows; r++) {
        T* to = b.out + row_of(r);
        write_head(to, &w.acc[(size_t)r * wide], w.total[r], d);
    }
}

template <class T>
void prefill(const Batch<T>& b, const Shape& s, ThreadPool& pool) {
    std::vector<Item> items;
    const int queries = std::max(1, ROWS / s.group());
    for (int64_t seq = 0; seq < b.num_seqs; seq++) {
        const int q_len = b.cu_q[seq + 1] - b.cu_q[seq];
        if (q_len == 1) continue;
        for (int first = 0; first < q_len; first += queries)
            for (int h = 0; h < s.num_kv_heads; h++) items.push_back({seq, first, std::min(queries, q_len - first), h});
    }
    const int rows = (queries * s.group() + 3) / 4 * 4;
    pool.run(items.size(), [&](int64_t i) {
        thread_local Scratch scratch;
        scratch.resize(rows, s.head_dim);
        attend(scratch, b, items[i], s);
    });
}

}  // namespace

// Sequences with one query are left alone.
extern "C" void rw_prefill_attention(
    void* out, const void* query, const void* keys, const void* values, const int32_t* cu_q, const int32_t* used,
    const int32_t* table, int64_t table_stride, int64_t num_seqs, int num_heads, int num_kv_heads, int head_dim,
    int block_size, float scale, int dtype, void* pool
) {
    Shape s{num_heads, num_kv_heads, head_dim, block_size, table_stride, scale * LOG2E};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Batch<T> batch{(T*)out, (const T*)query, (const T*)keys, (const T*)values, cu_q, used, table, num_seqs};
        prefill(batch, s, *(ThreadPool*)pool);
    });
}
