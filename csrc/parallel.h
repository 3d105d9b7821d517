// Work that is shared by threads.
#pragma once

#include <cstdint>
#include <functional>

namespace intarsia {

// Calls `work(i, scratch)` for i = 0 .. count - 1 on up to `threads` threads; `scratch` has `scratch_bytes` bytes,
// aligned to a cache line, and belongs to the thread. What `work(i)` computes must not depend on who runs it.
void parallel(int64_t count, int threads, int64_t scratch_bytes, const std::function<void(int64_t, char*)>& work);

// The same, but each thread begins with its own share of the work, the same in every call, and helps others when it has
// done that (if there is much to do): what a thread worked on in the last call is then still in its cache.
void parallel_shares(int64_t count, int threads, int64_t scratch_bytes,
                     const std::function<void(int64_t, char*)>& work);

}  // namespace intarsia
