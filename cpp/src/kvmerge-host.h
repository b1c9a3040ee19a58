#pragma once

// The memory of the CPU can be read and written where it lies. There some steps are one operation of our own where a graph
// of plain ones would write and read again what a core can keep to itself, and the cache grows without moving. Every such
// step is also there as other devices take it.

struct ggml_tensor;

// Does this tensor lie in the memory of the CPU? With the environment variable KVMERGE_AS_DEVICE set to anything, none
// does: the CPU is then treated as any other device, for tests and for comparison.
bool kvmerge_is_host(const ggml_tensor * tensor);
