// Sums across the lanes of many vectors at once.
#pragma once

#include "vector.h"

namespace ridgewalk {

// Sums of sixteen vectors, one per lane.
static inline vf reduce16(const vf* a) {
    vf pairs[8], quads[4];
    for (int i = 0; i < 8; i++) {
        vf x = a[2 * i], y = a[2 * i + 1];
        pairs[i] = __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                   __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < 4; i++) {
        vf x = pairs[2 * i], y = pairs[2 * i + 1];
        quads[i] = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    auto across = [](vf x, vf y) {
        return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    return across(across(quads[0], quads[1]), across(quads[2], quads[3]));
}

}  // namespace ridgewalk
