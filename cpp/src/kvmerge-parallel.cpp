#include "kvmerge-parallel.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <system_error>
#include <vector>

void kvmerge_parallel(int n_threads, int n, const std::function<void(int)> & f) {
    std::atomic<int> next { 0 };

    const auto work = [&]() {
        for (int i = next++; i < n; i = next++) {
            f(i);
        }
    };

    std::vector<std::future<void>> others; // their destructors wait

    try {
        for (int t = 1; t < std::min(n_threads, n); ++t) {
            others.push_back(std::async(std::launch::async, work));
        }
    } catch (const std::system_error &) {
        // no more threads to be had: those that run do the work
    }

    work();

    for (auto & other : others) {
        other.get();
    }
}
