#pragma once

// On the CPU some steps are one operation of our own where a graph of plain ones would write and read again what a core
// can keep to itself. Every such step has both.

struct ggml_tensor;

// Can the CPU read this tensor where it lies? With the environment variable KVMERGE_PLAIN_GRAPHS set to anything, never:
// the CPU then computes what other backends do, for tests and for comparison.
bool kvmerge_can_fuse(const ggml_tensor * tensor);
