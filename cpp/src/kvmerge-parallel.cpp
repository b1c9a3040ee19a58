#include "kvmerge-parallel.h"

#include <atomic>
#include <exception>
#include <mutex>

namespace {

struct parallel_work {
    const std::function<void(int, const float *)> & f;
    const int                                       n;

    std::atomic<int>   next  { 0 };
    std::exception_ptr error {};
    std::mutex         mutex {};
};

} // namespace

static void compute_work(ggml_tensor * dst, int /*ith*/, int /*nth*/, void * userdata) {
    auto & work = *static_cast<parallel_work *>(userdata);

    const float * x = dst->src[0] ? static_cast<const float *>(dst->src[0]->data) : nullptr;

    try {
        for (int i = work.next++; i < work.n; i = work.next++) {
            work.f(i, x);
        }
    } catch (...) {
        // nothing may be thrown through ggml
        std::lock_guard<std::mutex> lock(work.mutex);
        work.error = std::current_exception();
    }
}

bool kvmerge_parallel(kvmerge_graph & graph, int n, const std::function<void(int)> & f) {
    return kvmerge_parallel(graph, nullptr, n, [&](int i, const float *) { f(i); });
}

bool kvmerge_parallel(kvmerge_graph & graph, ggml_tensor * x, int n, const std::function<void(int, const float *)> & f) {
    parallel_work work { f, n };

    graph.store(ggml_custom_4d(graph.ctx(), GGML_TYPE_I32, 1, 1, 1, 1, &x, x ? 1 : 0, compute_work, GGML_N_TASKS_MAX, &work));

    const bool ok = graph.run();

    if (work.error) {
        std::rethrow_exception(work.error);
    }

    return ok;
}
