#include "kvmerge-fault.h"

#include "kvmerge.h"

#include <atomic>
#include <new>

static std::atomic<int32_t> n_passed { 0 };
static std::atomic<int32_t> n_failing { 0 }; // 0: none

void kvmerge_fail_at(int32_t n) {
    n_failing = n;
    n_passed  = 0;
}

int32_t kvmerge_fail_count(void) {
    return n_passed;
}

bool kvmerge_fails() {
    return ++n_passed == n_failing;
}

void kvmerge_may_fail() {
    if (kvmerge_fails()) {
        throw std::bad_alloc();
    }
}
