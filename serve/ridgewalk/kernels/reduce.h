// Sums across the lanes of many vectors at once.
#pragma once

#include "vector.h"

namespace ridgewalk {

// Sums of LANES vectors, one per lane.
static inline vf reduce(const vf* a) {
    vf pairs[LANES / 2], quads[LANES / 4];
    for (int i = 0; i < LANES / 2; i++) {
        vf x = a[2 * i], y = a[2 * i + 1];
#if defined(__AVX512F__)
        pairs[i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                   __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif defined(__AVX2__)
        pairs[i] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13) +
                   __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15);
#else
        pairs[i] = __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
    }
    for (int i = 0; i < LANES / 4; i++) {
        vf x = pairs[2 * i], y = pairs[2 * i + 1];
#if defined(__AVX512F__)
        quads[i] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#elif defined(__AVX2__)
        quads[i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
#else
        quads[i] = __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
#endif
    }
#if defined(__AVX512F__)
    auto across = [](vf x, vf y) {
        return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    return across(across(quads[0], quads[1]), across(quads[2], quads[3]));
#elif defined(__AVX2__)
    return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return quads[0];
#endif
}

}  // namespace ridgewalk
