#include "kvmerge-pages.h"

#if defined(__unix__) || defined(__APPLE__)

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

static void * map(void * where, size_t n_bytes, int flags) {
    void * res = mmap(where, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);

    return res == MAP_FAILED ? nullptr : res;
}

kvmerge_pages::kvmerge_pages(size_t n_bytes) : base(static_cast<char *>(map(nullptr, n_bytes, 0))), size(base ? n_bytes : 0) {
}

kvmerge_pages::~kvmerge_pages() {
    if (base) {
        munmap(base, size);
    }
}

void kvmerge_pages::keep(size_t n_bytes) {
    const size_t page  = sysconf(_SC_PAGESIZE);
    const size_t first = std::min(size, (n_bytes + page - 1)/page*page);

    memset(base + n_bytes, 0, first - n_bytes);

    if (first == size) {
        return;
    }

#ifdef __linux__
    const bool ok = madvise(base + first, size - first, MADV_DONTNEED) == 0;
#else
    // elsewhere advice may be taken later or not at all
    const bool ok = map(base + first, size - first, MAP_FIXED) != nullptr;
#endif

    if (!ok) {
        memset(base + first, 0, size - first);
    }
}

#else

// buffers are replaced instead
kvmerge_pages::kvmerge_pages(size_t) {}
kvmerge_pages::~kvmerge_pages() = default;
void kvmerge_pages::keep(size_t) {}

#endif
