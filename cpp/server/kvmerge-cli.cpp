#include "kvmerge-cli.h"

#include "log.h"

#include <algorithm>

static kvmerge_program  program;
static kvmerge_contents contents; // of the messages so far; answers are text that the next message finds in the cache

// The program ends without waiting for what its log has yet to print.
static bool flushed(bool res) {
    common_log_flush(common_log_main());

    return res;
}

bool kvmerge_cli_begin(common_params & params) {
    return program.begin(params) || flushed(false);
}

bool kvmerge_cli_attach(llama_context * ctx, int32_t & n_batch) {
    if (!program.attach(ctx)) {
        return flushed(false);
    }

    n_batch = program.n_batch(n_batch);

    return true;
}

kvmerge_cli_media::kvmerge_cli_media(const mtmd_input_chunk * chunk) : kvmerge_media_scope(program.engine, chunk) {}

bool kvmerge_cli_merge(const mtmd_input_chunks * chunks) {
    auto * engine = program.engine;
    if (!engine) {
        return true;
    }

    for (size_t i = 0; i < mtmd_input_chunks_size(chunks); ++i) {
        const auto * chunk = mtmd_input_chunks_get(chunks, i);

        if (mtmd_input_chunk_get_type(chunk) != MTMD_INPUT_CHUNK_TYPE_TEXT) {
            contents.add_media(chunk);
        }
    }
    contents.n_text = std::max(kvmerge_n_tokens(engine, 0) - contents.n_media, 0);

    const int32_t n_kept = contents.n_kept(program.flags);

    if (kvmerge_n_cells(engine, 0) <= n_kept) {
        return true;
    }

    const int32_t status = kvmerge_merge(engine, 0, n_kept);

    if (status != KVMERGE_OK) {
        LOG_ERR("kvmerge: not merged: %s\n", kvmerge_error_message());
        return flushed(status != KVMERGE_ERROR_CLEARED);
    }
    program.tell(0);

    return flushed(true);
}

void kvmerge_cli_clear() {
    contents = {};
}
