#pragma once

// nearest: the pivot with which each key has the largest product.

#include "ggml.h"

//   pivots  F32 [d, n_pivots]
//   keys    F32 [d, n_keys]
// Returns I32 [n_keys], indices of pivots. Fused, product and maximum are one operation of the CPU, and no product leaves
// the registers; else they are two nodes that every backend has.
ggml_tensor * kvmerge_build_nearest(ggml_context * ctx, ggml_tensor * pivots, ggml_tensor * keys, bool fuse);

// can keys from this cache take the fused operation?
bool kvmerge_can_fuse_nearest(const ggml_tensor * cache);
