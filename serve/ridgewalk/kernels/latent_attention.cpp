// Attention of many heads over one latent a token (MLA in absorbed form, arXiv 2405.04434): its whole width is the key
// of all heads, its first part their value. The rows of a query's heads, and of neighbouring queries, are taken
// together, so that both products run on blocks of registers and a latent is read once for all of them.
#include <memory>
#include <vector>

#include "latent_products.h"
#include "thread_pool.h"

using namespace ridgewalk;

namespace {

constexpr int SPLIT = 512;     // keys that one work item streams where a sequence has one query
constexpr int ITEM_ROWS = 64;  // (query, head) rows of one work item at most

template <class T>
struct LatentBatch {
    T* out;
    const T *query, *cache;
    const int32_t *cu_q, *used, *table;
    int64_t num_seqs;
};

// Rows [first, first + count) of a sequence, row = query * heads + head, over keys [from, to) at most.
struct Item {
    int64_t seq;
    int first, count, from, to;
    int64_t partial;  // where its state goes, in rows of partial results; -1: it is all of these rows' keys
};

// Buffers of one thread.
template <class T>
struct Scratch {
    std::vector<RowOf<T>> q;
    std::vector<float> scores, acc, top, total;
    std::vector<bf16> pairs;  // weights, as BF16
    const T* keys[TILE];

    void resize(const LatentShape& s) {
        q.resize(PAIRS<T> ? 0 : (size_t)ITEM_ROWS * s.width);
        scores.resize((size_t)ITEM_ROWS * TILE);
        pairs.resize(PAIRS<T> ? (size_t)ITEM_ROWS * TILE : 0);
        acc.resize((size_t)ITEM_ROWS * s.value_dim);
        top.resize(ITEM_ROWS);
        total.resize(ITEM_ROWS);
    }
};

template <class T, int ROWS>
void add_values(Scratch<T>& w, int row, int count, int value_dim, Prefetch& prefetch) {
    float* acc = &w.acc[(size_t)row * value_dim];
    const float* weights = &w.scores[(size_t)row * TILE];
    const bf16* pairs = PAIRS<T> ? &w.pairs[(size_t)row * TILE] : nullptr;
    int column = 0;
    for (; column + 2 * LANES <= value_dim; column += 2 * LANES)
        add_columns<T, ROWS>(acc, weights, pairs, w.keys, column, count, value_dim, prefetch);
    if (column < value_dim)
        for (int r = 0; r < ROWS; r++) {
            vf sums = load(acc + (size_t)r * value_dim + column);
            for (int t = 0; t < count; t++) sums += weights[r * TILE + t] * load(w.keys[t] + column);
            store(acc + (size_t)r * value_dim + column, sums);
        }
}

template <class T>
void score_tile(
    Scratch<T>& w, const RowOf<T>* q, int rows, int count, const LatentShape& s, Prefetch& prefetch
) {
    for (int t = count; t < (count + LANES - 1) / LANES * LANES; t++) w.keys[t] = w.keys[0];
    auto keys_by = [&](auto block, int row, int step) {
        float* scores = &w.scores[(size_t)row * TILE];
        for (int t = 0; t < count; t += step)
            block(scores + t, q + (size_t)row * s.width, w.keys + t, s.width, s.cache.scale, prefetch);
    };
    int row = 0;
    for (; row + 4 <= rows; row += 4) keys_by(score_block<T, 4>, row, LANES / 4);
    if (row + 2 <= rows) keys_by(score_block<T, 2>, row, LANES / 2), row += 2;
    if (row < rows) keys_by(score_block<T, 1>, row, LANES);
}

// The softmax of a tile's scores: weights in place of scores, older sums rescaled.
template <class T>
void soften_tile(Scratch<T>& w, const Item& item, int start, int count, int before, const LatentShape& s) {
    const int even = std::min(TILE, count + 1);
    for (int r = 0; r < item.count; r++) {
        float* scores = &w.scores[(size_t)r * TILE];
        const int visible = std::min(count, before + (item.first + r) / s.num_heads + 1 - start);
        if (visible > 0) {
            const float factor = soften(scores, visible, w.top[r], w.total[r]);
            float* acc = &w.acc[(size_t)r * s.value_dim];
            if (factor != 1.0f)
                for (int i = 0; i < s.value_dim; i += LANES) store(acc + i, load(acc + i) * factor);
        }
        std::fill(scores + std::max(visible, 0), scores + even, 0.0f);
        if constexpr (PAIRS<T>)
            for (int t = 0; t < TILE; t += LANES) store(&w.pairs[(size_t)r * TILE + t], load(scores + t));
    }
}

template <class T>
void attend(Scratch<T>& w, const LatentBatch<T>& b, const Item& item, const Item* next, const LatentShape& s) {
    const int q_len = b.cu_q[item.seq + 1] - b.cu_q[item.seq], before = b.used[item.seq] - q_len;
    const T* query = b.query + ((int64_t)b.cu_q[item.seq] * s.num_heads + item.first) * s.width;
    const RowOf<T>* q;
    if constexpr (PAIRS<T>) {
        q = query;
    } else {
        for (int64_t i = 0; i < (int64_t)item.count * s.width; i += LANES) store(&w.q[i], load(query + i));
        q = w.q.data();
    }
    std::fill(w.top.begin(), w.top.end(), LOWEST);
    std::fill(w.total.begin(), w.total.end(), 0.0f);
    std::fill(w.acc.begin(), w.acc.begin() + (size_t)item.count * s.value_dim, 0.0f);
    auto walk_from = [&](const Item& i) { return Walk(b.table + i.seq * s.cache.table_stride, i.from, s.cache); };
    Walk walk = walk_from(item);
    Prefetch prefetch(b.cache, s, walk);
    for (int start = item.from; start < item.to; start += TILE) {
        const int count = std::min(TILE, item.to - start), after = std::min(TILE, item.to - start - count);
        for (int t = 0; t < count; t++) w.keys[t] = b.cache + walk.next();
        if (after > 0) prefetch.start(walk, after, item.count);
        else if (next) prefetch.start(walk_from(*next), std::min(TILE, next->to - next->from), item.count);
        score_tile(w, q, item.count, count, s, prefetch);
        soften_tile(w, item, start, count, before, s);
        int row = 0;
        for (; row + 8 <= item.count; row += 8) add_values<T, 8>(w, row, count, s.value_dim, prefetch);
        if (row + 4 <= item.count) add_values<T, 4>(w, row, count, s.value_dim, prefetch), row += 4;
        if (row + 2 <= item.count) add_values<T, 2>(w, row, count, s.value_dim, prefetch), row += 2;
        if (row < item.count) add_values<T, 1>(w, row, count, s.value_dim, prefetch);
    }
}

// State of rows over a part of their keys: greatest score, total weight, weighted values.
struct Partials {
    int value_dim;
    std::vector<float> data;
    float* row(int64_t i) { return &data[i * (value_dim + 2)]; }
};

// Put the splits of one sequence together; its rows lie `rows` apart in the partial results.
template <class T>
void merge(T* out, Partials& partials, int64_t first, int splits, int rows) {
    const int d = partials.value_dim;
    std::vector<float> acc(d);
    for (int r = 0; r < rows; r++) {
        float top = LOWEST, total = 0;
        for (int i = 0; i < splits; i++) top = std::max(top, partials.row(first + i * rows + r)[0]);
        std::fill(acc.begin(), acc.end(), 0.0f);
        for (int i = 0; i < splits; i++) {
            const float* one = partials.row(first + i * rows + r);
            const float factor = std::exp2(one[0] - top);
            total += factor * one[1];
            for (int j = 0; j < d; j += LANES) store(&acc[j], load(&acc[j]) + load(one + 2 + j) * factor);
        }
        write_head(out + (int64_t)r * d, acc.data(), total, d);
    }
}

struct Plan {
    std::vector<Item> items, merges;  // merges: first item of each sequence that is in several splits
    int64_t partial_rows = 0;
};

// Sequences with one query are cut by keys, at fixed places, so that a result does not depend on the batch; the others
// by rows. A row's result does not depend on how many rows share its item.
template <class T>
Plan plan(const LatentBatch<T>& b, const LatentShape& s, int threads) {
    Plan p;
    const int heads = s.num_heads;
    int64_t works = 0;
    for (int64_t seq = 0; seq < b.num_seqs; seq++) {
        const int rows = (b.cu_q[seq + 1] - b.cu_q[seq]) * heads;
        works += rows == heads ? (b.used[seq] + SPLIT - 1) / SPLIT : (rows + ITEM_ROWS - 1) / ITEM_ROWS;
    }
    int most = std::min(ITEM_ROWS, heads);  // rows of an item of a sequence with one query
    while (most > 4 && works * ((heads + most - 1) / most) < 2 * threads) most = (most / 2 + 3) / 4 * 4;
    for (int64_t seq = 0; seq < b.num_seqs; seq++) {
        const int q_len = b.cu_q[seq + 1] - b.cu_q[seq], used = b.used[seq], rows = q_len * heads;
        if (q_len == 1) {
            const int splits = (used + SPLIT - 1) / SPLIT;
            if (splits > 1) p.merges.push_back({seq, 0, rows, 0, splits, p.partial_rows});
            for (int i = 0; i < splits; i++)
                for (int r = 0; r < rows; r += most)
                    p.items.push_back({
                        seq, r, std::min(most, rows - r), i * SPLIT, std::min(used, (i + 1) * SPLIT),
                        splits > 1 ? p.partial_rows + (int64_t)i * rows + r : -1
                    });
            if (splits > 1) p.partial_rows += (int64_t)splits * rows;
        } else {
            for (int r = 0; r < rows; r += ITEM_ROWS) {
                const int count = std::min(ITEM_ROWS, rows - r), last = (r + count - 1) / heads;
                p.items.push_back({seq, r, count, 0, used - q_len + last + 1, -1});
            }
        }
    }
    // Longest first, so that threads end together.
    std::stable_sort(p.items.begin(), p.items.end(), [](const Item& x, const Item& y) {
        return (int64_t)(x.to - x.from) * x.count > (int64_t)(y.to - y.from) * y.count;
    });
    return p;
}

// Write an item's rows, or its state where other items have the rest of their keys.
template <class T>
void finish(const Scratch<T>& w, const LatentBatch<T>& b, const Item& item, Partials& partials, const LatentShape& s) {
    const int d = s.value_dim;
    for (int r = 0; r < item.count; r++) {
        const float* acc = &w.acc[(size_t)r * d];
        if (item.partial < 0) {
            const int64_t row = (int64_t)b.cu_q[item.seq] * s.num_heads + item.first + r;
            write_head(b.out + row * d, acc, w.total[r], d);
        } else {
            float* to = partials.row(item.partial + r);
            to[0] = w.top[r];
            to[1] = w.total[r];
            memcpy(to + 2, acc, d * sizeof(float));
        }
    }
}

template <class T>
void attention(const LatentBatch<T>& b, const LatentShape& s, ThreadPool& pool) {
    const Plan p = plan(b, s, pool.threads());
    const int d = s.value_dim;
    Partials partials{d, std::vector<float>(p.partial_rows * (d + 2))};
    const int64_t count = p.items.size();
    // Several at a time, so that a thread knows which one it should fetch next.
    const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(8, count / (4 * pool.threads())));
    pool.run((count + chunk - 1) / chunk, [&](int64_t piece) {
        thread_local Scratch<T> scratch;
        scratch.resize(s);
        const int64_t end = std::min(count, (piece + 1) * chunk);
        for (int64_t i = piece * chunk; i < end; i++) {
            const Item& item = p.items[i];
            attend(scratch, b, item, i + 1 < end ? &p.items[i + 1] : nullptr, s);
            finish(scratch, b, item, partials, s);
        }
    });
    pool.run(p.merges.size(), [&](int64_t i) {
        const Item& item = p.merges[i];
        merge(b.out + (int64_t)b.cu_q[item.seq] * s.num_heads * d, partials, item.partial, item.to, item.count);
    });
}

}  // namespace

// width and value_dim are multiples of LANES.
extern "C" void rw_latent_attention(
    void* out, const void* query, const void* cache, const int32_t* cu_q, const int32_t* used, const int32_t* table,
    int64_t table_stride, int64_t num_seqs, int num_heads, int width, int value_dim, int block_size, float scale,
    int dtype, void* pool
) {
    const LatentShape s{num_heads, width, value_dim, {1, 1, width, block_size, table_stride, scale * LOG2E}};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        LatentBatch<T> batch{(T*)out, (const T*)query, (const T*)cache, cu_q, used, table, num_seqs};
        attention(batch, s, *(ThreadPool*)pool);
    });
}
