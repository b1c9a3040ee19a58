#pragma once

// Memory of the host that grows and shrinks where it lies. A range of addresses is reserved once; the system adds a page
// when something is first written there, and takes it back when it is given up. So what lies there need not move in order
// to grow, and takes no more memory than what was written.

#include <cstddef>
#include <utility>

class kvmerge_pages {
public:
    kvmerge_pages() = default;

    // data() is nullptr where the system offers nothing of the kind, or not as much
    explicit kvmerge_pages(size_t n_bytes);
    ~kvmerge_pages();

    kvmerge_pages(kvmerge_pages && other) noexcept { swap(other); }
    kvmerge_pages & operator=(kvmerge_pages && other) noexcept { swap(other); return *this; }

    char * data() const { return base; }

    // what lies behind the first n_bytes is zero again, and goes back to the system
    void keep(size_t n_bytes);

private:
    void swap(kvmerge_pages & other) noexcept {
        std::swap(base, other.base);
        std::swap(size, other.size);
    }

    char * base = nullptr;
    size_t size = 0;
};
