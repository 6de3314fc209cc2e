// What `for_units` does: how often each unit is done, and how far from it the next is. Where there are several threads,
// unit `slow` lasts until all others are done.
#include "unit_runs.h"

extern "C" void count_units(int threads, int64_t units, int64_t slow, int* done, int64_t* apart) {
    ridgewalk::ThreadPool pool(threads);
    std::vector<std::atomic<int>> times(units);
    std::atomic<int64_t> others{0};
    ridgewalk::for_units(pool, units, [&](int64_t unit, int64_t next) {
        while (unit == slow && threads > 1 && others.load() < units - 1) std::this_thread::yield();
        times[unit]++;
        apart[unit] = next < 0 || next >= units ? units : next - unit;
        others++;
    });
    for (int64_t unit = 0; unit < units; unit++) done[unit] = times[unit];
}
