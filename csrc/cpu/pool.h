// Threads that wait for work. Each process has one pool, made when first needed and again after fork.
#pragma once

#include <cstdint>

namespace rvqa {

// Calls work(begin, end) for consecutive parts of [0, N), each at most `grain` long, on up to `threads` threads, the
// caller's included. The next free thread takes a part. Rethrows the first exception. A call from inside work, or while
// another thread uses the pool, runs on the caller's thread alone.
void parallel(int64_t N, int64_t grain, int threads, void (*work)(void* context, int64_t begin, int64_t end),
              void* context);

template <class Work>
void parallel(int64_t N, int64_t grain, int threads, Work&& work) {
    parallel(
        N, grain, threads,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Work*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace rvqa
