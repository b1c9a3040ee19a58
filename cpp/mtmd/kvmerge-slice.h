// kvmerge-slice.h - what the vision encoder gets of a slice of a picture
//
// Included at the end of upstream's mtmd.cpp, where the chunks of libmtmd are defined.

#pragma once

// The pixels of one slice, as floats in the order of the encoder: two slices with the same ones have the same embeddings.
//   chunk  a picture, or a slice of one
//   data   receives a pointer to them, which is valid as long as the chunk
// Returns their number; 0 where the pixels do not say all, or the chunk is no picture or lacks its content.
extern "C" MTMD_API int64_t kvmerge_slice_pixels(const mtmd_input_chunk * chunk, const float ** data) {
    if (chunk->type != MTMD_INPUT_CHUNK_TYPE_IMAGE || !chunk->tokens_image || chunk->tokens_image->is_placeholder()) {
        return 0;
    }

    const auto & entries = chunk->tokens_image->batch_f32.entries;
    if (entries.size() != 1) {
        return 0;
    }

    const auto & slice = entries[0];
    if (slice.anyres.is_tiled() || slice.add_viewsep || slice.add_newline || slice.lead_pad != 0) {
        return 0;
    }

    *data = slice.get_ro_buf().data();

    return slice.get_ro_buf().size();
}
