#pragma once

// What llama-mtmd-cli does with a cache that merges: its hooks call these functions, and know nothing else of the engine. It has
// one context with one sequence. Without --kv-merge they do nothing. (llama-cli runs llama-server inside.)

#include "kvmerge-program.h"

// Before the context is made, and after. false: it cannot be merged, the log says why.
//   n_batch  becomes what a batch may have next to a small cap
bool kvmerge_cli_begin (common_params & params);
bool kvmerge_cli_attach(llama_context * ctx, int32_t & n_batch);

// While it lives, what is decoded is this picture or sound.
struct kvmerge_cli_media : kvmerge_media_scope {
    explicit kvmerge_cli_media(const mtmd_input_chunk * chunk);
};

// A message was read: merge all that was so far. false: the merge broke off, and the conversation is gone.
bool kvmerge_cli_merge(const mtmd_input_chunks * chunks);

// The conversation was cleared.
void kvmerge_cli_clear();
