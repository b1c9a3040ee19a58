// Loaded before the libraries: operator new, whose n-th call in the thread that says so fails.

#include <cstdlib>
#include <new>

static thread_local long n_calls   = -1; // -1: they are not counted
static thread_local long n_failing = 0;

extern "C" void failing_new_begin(long n) {
    n_failing = n;
    n_calls   = 0;
}

extern "C" long failing_new_end() {
    const long n = n_calls;

    n_calls = -1;

    return n;
}

void * operator new(std::size_t size) {
    void * res = n_calls >= 0 && ++n_calls == n_failing ? nullptr : std::malloc(size ? size : 1);

    if (!res) {
        throw std::bad_alloc();
    }

    return res;
}

void operator delete(void * p) noexcept {
    std::free(p);
}

void operator delete(void * p, std::size_t) noexcept {
    std::free(p);
}
