#pragma once

// The heads of a layer do not depend on each other: what is plain C++ is done for several at once.

#include "kvmerge-graph.h"

// f(0), ..., f(n - 1) on the threads that compute the context's graphs: those wait for work by spinning, and others would
// find no free core. The graph has to be empty. What f throws is thrown here. false: the backend failed.
bool kvmerge_parallel(kvmerge_graph & graph, int n, const std::function<void(int)> & f);

// The same; f also gets the values of x, F32, which is computed first, or nullptr if x is.
bool kvmerge_parallel(kvmerge_graph & graph, ggml_tensor * x, int n, const std::function<void(int, const float *)> & f);
