// Attention of one query a sequence. Keys and values are streamed once, straight from their pages, near memory
// bandwidth. A long sequence is cut into splits of fixed length (flash decoding), so that its result does not depend
// on what else is in the batch.
#include <vector>

#include "attention.h"
#include "reduce.h"
#include "thread_pool.h"

using namespace ridgewalk;

namespace {

constexpr int SPLIT = 512;  // keys of one sequence that one work item streams

// Query rows as the dot product wants them: BF16 where the CPU multiplies BF16 pairs, else FP32.
#if defined(__AVX512BF16__)
template <class T>
using QueryOf = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
inline void dot_step(vf& acc, const bf16* q, const bf16* k) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(q), (__m512bh)_mm512_loadu_si512(k));
}
constexpr int BF16_STEP = 32;
#else
template <class T>
using QueryOf = float;
constexpr int BF16_STEP = LANES;
#endif
template <class T>
inline void dot_step(vf& acc, const float* q, const T* k) {
    acc += load(q) * load(k);
}

// D is the head size where it is known at compile time, else 0.
template <class T, int D>
inline vf dot(const QueryOf<T>* q, const T* k, int head_dim) {
    vf acc = {};
    constexpr int step = std::is_same_v<T, bf16> ? BF16_STEP : LANES;
    const int d = D ? D : head_dim;
    int i = 0;
    for (; i + step <= d; i += step) dot_step(acc, q + i, k + i);
    if constexpr (step > LANES && (D == 0 || D % step != 0))
        if (i < d) acc += load(q + i) * load(k + i);
    return acc;
}

// Positions [from, to) of one sequence and KV heads [kv_from, kv_to).
struct Range {
    const int32_t* table;
    int from, to, kv_from, kv_to;
};

// Fetches a tile into the cache, one line of keys and one of values at a time between other work: the hardware does not
// see past the end of a page, and many requests at once would stall.
template <class T>
struct Prefetch {
    const T *keys, *values;
    const Shape& s;
    Walk walk;
    const char *key, *value;
    int64_t first, bytes, done;  // of a row: the heads of the range
    int left;

    void start(const Range& r) {
        walk = Walk(r.table, r.from, s);
        left = std::min(r.to - r.from, TILE);
        first = r.kv_from * s.head_dim;
        bytes = (int64_t)(r.kv_to - r.kv_from) * s.head_dim * sizeof(T);
        if (left > 0) row();
    }
    void row() {
        const int64_t at = walk.next() + first;
        key = (const char*)(keys + at);
        value = (const char*)(values + at);
        done = 0;
    }
    void step() {
        if (left <= 0) return;
        __builtin_prefetch(key + done, 0, 2);
        __builtin_prefetch(value + done, 0, 2);
        done += 64;
        if (done >= bytes && --left > 0) row();
    }
};

// acc[g] (NV vectors each) += sum over t of p[g][t] * v[t]
template <class T, int NG, int NV>
inline void accumulate(
    float* acc, int acc_stride, const float* p, const T* const* v, int offset, int count, Prefetch<T>& prefetch,
    int steps
) {
    vf a[NG][NV];
    for (int g = 0; g < NG; g++)
        for (int j = 0; j < NV; j++) a[g][j] = load(acc + g * acc_stride + j * LANES);
    for (int t = 0; t < count; t++) {
        vf row[NV];
        for (int j = 0; j < NV; j++) row[j] = load(v[t] + offset + j * LANES);
        for (int i = 0; i < steps; i++) prefetch.step();
        for (int g = 0; g < NG; g++) {
            float weight = p[g * TILE + t];
            for (int j = 0; j < NV; j++) a[g][j] += weight * row[j];
        }
    }
    for (int g = 0; g < NG; g++)
        for (int j = 0; j < NV; j++) store(acc + g * acc_stride + j * LANES, a[g][j]);
}

template <class T, int NG>
void accumulate_heads(
    float* acc, const float* p, const T* const* v, int offset, int count, int d, Prefetch<T>& prefetch, int steps
) {
    constexpr int NV = REGISTERS / 8;
    int i = 0;
    for (; i + NV * LANES <= d; i += NV * LANES, steps = 0)
        accumulate<T, NG, NV>(acc + i, d, p, v, offset + i, count, prefetch, steps);
    for (; i < d; i += LANES, steps = 0) accumulate<T, NG, 1>(acc + i, d, p, v, offset + i, count, prefetch, steps);
}

// Running state of the softmax of some heads.
struct State {
    float* top;    // greatest score so far
    float* total;  // sum of weights
    float* acc;    // weighted values, [heads][head_dim]
};

// Attend one query to a range; `next` is what this thread streams afterwards.
template <class T, int D>
void stream(
    State state, const QueryOf<T>* q, const T* keys, const T* values, const Range& range, const Range& next,
    const Shape& s
) {
    const auto [table, from, to, kv_from, kv_to] = range;
    Prefetch<T> prefetch{keys, values, s, Walk(table, from, s), nullptr, nullptr, 0, 0, 0, 0};
    Walk walk(table, from, s);
    const int d = D ? D : s.head_dim, group = s.group();
    const int steps = (d * (int)sizeof(T) + 127) / 128;  // a head scores each key once and adds each value once
    const T *k[TILE], *v[TILE];
    std::vector<float> weights((size_t)group * TILE);
    for (int start = from; start < to; start += TILE) {
        const int count = std::min(TILE, to - start);
        for (int t = 0; t < count; t++) {
            const int64_t at = walk.next();
            k[t] = keys + at;
            v[t] = values + at;
        }
        for (int t = count; t < (count + LANES - 1) / LANES * LANES; t++) k[t] = k[0];
        prefetch.start(start + TILE < to ? Range{table, start + TILE, to, kv_from, kv_to} : next);
        for (int h = kv_from; h < kv_to; h++) {
            const int head = (h - kv_from) * group;
            float* acc = state.acc + (size_t)head * d;
            for (int g = 0; g < group; g++) {
                float* scores = weights.data() + g * TILE;
                const QueryOf<T>* row = q + (size_t)(h * group + g) * d;
                for (int t = 0; t < count; t += LANES) {
                    vf sums[LANES];
                    for (int i = 0; i < LANES; i++) {
                        sums[i] = dot<T, D>(row, k[t + i] + h * d, d);
                        if (g == 0)
                            for (int n = 0; n < steps; n++) prefetch.step();
                    }
                    store(scores + t, reduce(sums) * s.scale);
                }
                float factor = soften(scores, count, state.top[head + g], state.total[head + g]);
                if (factor != 1.0f)
                    for (int i = 0; i < d; i += LANES) store(acc + g * d + i, load(acc + g * d + i) * factor);
            }
            for (int g = 0; g < group;) {
                float *to = acc + g * d, *p = weights.data() + g * TILE;
                const int ahead = g == 0 ? steps : 0;
                if (group - g >= 4)
                    accumulate_heads<T, 4>(to, p, v, h * d, count, d, prefetch, ahead), g += 4;
                else if (group - g >= 2)
                    accumulate_heads<T, 2>(to, p, v, h * d, count, d, prefetch, ahead), g += 2;
                else
                    accumulate_heads<T, 1>(to, p, v, h * d, count, d, prefetch, ahead), g += 1;
            }
        }
    }
}

struct Item {
    int64_t seq;
    int split, splits;
    int64_t partial;  // index of this sequence's first partial result; -1 when there is one split
};

// Combine the splits of one sequence.
template <class T>
void merge(T* out, const float* partial, int splits, const Shape& s) {
    const int d = s.head_dim;
    const size_t width = (size_t)s.num_heads * (d + 2);
    std::vector<float> acc(d);
    for (int h = 0; h < s.num_heads; h++) {
        float top = LOWEST, total = 0;
        for (int i = 0; i < splits; i++) top = std::max(top, partial[i * width + h]);
        std::fill(acc.begin(), acc.end(), 0.0f);
        for (int i = 0; i < splits; i++) {
            const float* one = partial + i * width;
            const float factor = std::exp2(one[h] - top);
            total += factor * one[s.num_heads + h];
            const float* from = one + 2 * s.num_heads + (size_t)h * d;
            for (int j = 0; j < d; j += LANES) store(&acc[j], load(&acc[j]) + load(from + j) * factor);
        }
        write_head(out + (size_t)h * d, acc.data(), total, d);
    }
}

template <class T>
void decode(const Batch<T>& b, const Shape& s, ThreadPool& pool) {
    const int d = s.head_dim;
    std::vector<Item> items;
    std::vector<Item> merges;
    int64_t partials = 0;
    for (int64_t seq = 0; seq < b.num_seqs; seq++) {
        if (b.cu_q[seq + 1] - b.cu_q[seq] != 1) continue;
        const int splits = (b.used[seq] + SPLIT - 1) / SPLIT;
        const int64_t first = splits > 1 ? partials : -1;
        for (int i = 0; i < splits; i++) items.push_back({seq, i, splits, first});
        if (splits > 1) {
            merges.push_back(items.back());
            partials += splits;
        }
    }
    // Longest first, so that threads end together.
    std::stable_sort(items.begin(), items.end(), [&](const Item& x, const Item& y) {
        return b.used[x.seq] - x.split * SPLIT > b.used[y.seq] - y.split * SPLIT;
    });
    // With few items, threads share one by its heads; heads do not touch each other, so the result is the same.
    int parts = 1;
    while (s.num_kv_heads % (parts * 2) == 0 && (int64_t)items.size() * parts < 2 * pool.threads()) parts *= 2;
    const int kv_heads = s.num_kv_heads / parts, heads = kv_heads * s.group();
    const size_t width = (size_t)s.num_heads * (d + 2);
    std::vector<float> partial(partials * width);
    const int64_t works = (int64_t)items.size() * parts;
    auto range_of = [&](int64_t work) {
        if (work >= works) return Range{nullptr, 0, 0, 0, 0};
        const Item& item = items[work / parts];
        const int from = item.split * SPLIT, part = work % parts;
        return Range{
            b.table + item.seq * s.table_stride, from, std::min(b.used[item.seq], from + SPLIT), part * kv_heads,
            (part + 1) * kv_heads
        };
    };
    // Several at a time, so that a thread knows which one it should fetch next.
    const int64_t chunk = std::max<int64_t>(1, std::min<int64_t>(8, works / (4 * pool.threads())));
    pool.run((works + chunk - 1) / chunk, [&](int64_t piece) {
        std::vector<float> own(width);
        std::vector<QueryOf<T>> q((size_t)s.num_heads * d);
        for (int64_t work = piece * chunk; work < std::min(works, (piece + 1) * chunk); work++) {
            const Item& item = items[work / parts];
            const Range range = range_of(work);
            const int first_head = range.kv_from * s.group();
            const int64_t row = (int64_t)b.cu_q[item.seq] * s.num_heads * d;
            if constexpr (std::is_same_v<QueryOf<T>, T>)
                memcpy(q.data(), b.query + row, q.size() * sizeof(T));
            else
                for (size_t i = 0; i < q.size(); i += LANES) store(q.data() + i, load(b.query + row + i));
            float* base = item.partial < 0 ? own.data() : partial.data() + (item.partial + item.split) * width;
            State state{
                base + first_head, base + s.num_heads + first_head, base + 2 * s.num_heads + (size_t)first_head * d
            };
            for (int h = 0; h < heads; h++) state.top[h] = LOWEST, state.total[h] = 0;
            std::fill(state.acc, state.acc + (size_t)heads * d, 0.0f);
            auto* run = d == 64 ? stream<T, 64> : d == 128 ? stream<T, 128> : stream<T, 0>;
            run(state, q.data(), b.keys, b.values, range, range_of(work + 1), s);
            if (item.partial < 0)
                for (int h = 0; h < heads; h++)
                    write_head(b.out + row + (first_head + h) * d, state.acc + h * d, state.total[h], d);
        }
    });
    for (const Item& item : merges) {
        T* to = b.out + (int64_t)b.cu_q[item.seq] * s.num_heads * d;
        merge(to, &partial[item.partial * width], item.splits, s);
    }
}

}  // namespace

// Sequences with another number of queries than one are left alone.
extern "C" void rw_decode_attention(
    void* out, const void* query, const void* keys, const void* values, const int32_t* cu_q, const int32_t* used,
    const int32_t* table, int64_t table_stride, int64_t num_seqs, int num_heads, int num_kv_heads, int head_dim,
    int block_size, float scale, int dtype, void* pool
) {
    Shape s{num_heads, num_kv_heads, head_dim, block_size, table_stride, scale * LOG2E};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Batch<T> batch{(T*)out, (const T*)query, (const T*)keys, (const T*)values, cu_q, used, table, num_seqs};
        decode(batch, s, *(ThreadPool*)pool);
    });
}
