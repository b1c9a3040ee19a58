#pragma once

// The engine that a program's flags ask for: what llama-server (and llama-cli, which runs it inside) and llama-mtmd-cli share.

#include "kvmerge-flags.h"
#include "mtmd.h"

#include <cstdint>
#include <vector>

struct common_params;
struct llama_context;

struct kvmerge_program {
    kvmerge_flags    flags;
    kvmerge_engine * engine = nullptr; // while merging is off: none

    int32_t n_cells_max = 0; // 0: no limit

    // Before the context is made: checks the flags, and lets the cache begin small. false: they do not go together, the log says
    // why.
    bool begin(common_params & params);

    // Once it is made, and empty. false: it cannot be merged, the log says why.
    bool attach(llama_context * ctx);

    // tokens that one batch may have: a batch has to fit next to what a small cap leaves of the tokens before it
    int32_t n_batch(int32_t n_batch) const;

    // logs the last merge but n_back; returns how long it took (us), 0: there is none
    int64_t tell(int32_t n_back) const;
};

// While it lives, what is decoded is this picture or sound.
struct kvmerge_media_scope {
    kvmerge_media_scope(kvmerge_engine * engine, const mtmd_input_chunk * chunk);
    ~kvmerge_media_scope();

    kvmerge_engine * engine;
};

// What the tokens of a sequence are.
struct kvmerge_contents {
    int32_t n_text  = 0;
    int32_t n_media = 0;
    int32_t n_spans = 0; // pictures and sounds

    std::vector<int32_t> images; // tokens of each

    void add_media(const mtmd_input_chunk * chunk);

    // cells that it is merged down to
    int32_t n_kept(const kvmerge_flags & flags) const;
};
