#pragma once

// What llama-server does with a cache that merges: its hooks call these functions, and know nothing else of the engine.
//
// A process serves one context, so there is one engine. Without --kv-merge every function does nothing and returns what
// llama-server would use. All but the reports belong to the thread that decodes; the reports may be asked for by any.

#include "kvmerge-program.h"
#include "llama.h"
#include "server-common.h" // json

#include <cstddef>
#include <cstdint>
#include <string>

// Before the context is made: checks the flags, and lets the cache begin small. false: they do not go together, the log says
// why.
bool kvmerge_server_begin(common_params & params);

// Once it is made, and empty. false: it cannot be merged, the log says why.
bool kvmerge_server_attach(llama_context * ctx);

// tokens that one batch may have: a batch has to fit next to what a small cap leaves of the tokens before it
int32_t kvmerge_server_n_batch(int32_t n_batch);

// whether cells can be moved to other positions (--cache-reuse): merged ones stand for several
bool kvmerge_server_can_shift();

// How many of the n_past tokens that a prompt has in common with its slot are used. Where that would cut into merged cells, or
// leave nothing to go on from, the slot is emptied: 0.
int32_t kvmerge_server_reuse(int32_t id_slot, const server_tokens & tokens, int32_t n_past);

// After how many tokens of a prompt its cells are merged, 0: not at all. Where a policy leaves text alone, that is before the
// last message if it shows nothing: another question about the same pictures then goes on from there.
//   n_past         tokens that are in the cache
//   last_user_pos  where the last message of the user begins, -1: not known
int32_t kvmerge_server_merge_at(const server_tokens & prompt, int32_t n_past, int32_t last_user_pos);

// While it lives, what is decoded is this picture or sound.
struct kvmerge_server_media : kvmerge_media_scope {
    explicit kvmerge_server_media(const mtmd_input_chunk * chunk);
};

// Whether anybody is waiting for a slot: where cells run out, what is idle merges first.
void kvmerge_server_idle(int32_t id_slot, bool is_idle);

// Whether a merge that a batch needed broke off since this was last asked, and took the cells of the slot with it.
bool kvmerge_server_was_cleared(int32_t id_slot);

// A batch was decoded: tells of merges that it needed.
void kvmerge_server_decoded();

// Merge what a slot has read. false: the merge broke off, and the slot has to be emptied.
bool kvmerge_server_merge(int32_t id_slot, const server_tokens & tokens);

//
// reports
//

// Bring the figures up to date; only while nothing is decoded.
void kvmerge_server_update(int32_t n_slots);

json        kvmerge_server_props();              // for /props, null when merging is off
json        kvmerge_server_slot(int32_t id_slot); // for /slots, null when merging is off
std::string kvmerge_server_metrics();            // for /metrics, in Prometheus' text format
