#pragma once

// The heads of a layer do not depend on each other: what is plain C++ is done for several at once.

#include <functional>

// f(0), ..., f(n - 1) on so many threads; what one of them throws is thrown here
void kvmerge_parallel(int n_threads, int n, const std::function<void(int)> & f);
