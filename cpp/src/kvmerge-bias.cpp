// What lies beside K and V of every cell: its bias, and the attention that it got from all queries.

#include "kvmerge-buffers.h"
#include "kvmerge-engine.h"

#include "llama-context.h"

#include <algorithm>

bool kvmerge_engine::make_bias(uint32_t n_cells, const std::vector<uint32_t> & first, biases & out) const {
    const bool flash_attn = lctx->get_cparams().flash_attn;

    out.bias.resize(layers.size());
    out.sum .resize(layers.size());

    const auto make = [&](ggml_context * ctx, size_t l) {
        const auto & layer = layers[l];

        const int64_t n_rows = n_cells - first[l];

        out.bias[l] = ggml_new_tensor_2d(ctx, flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_rows, layer.n_head_kv);
        ggml_format_name(out.bias[l], "kvmerge_bias_l%d", layer.il);

        if (params.score == KVMERGE_SCORE_ALL || layer.sum) {
            out.sum[l] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rows, layer.n_head_kv);
            ggml_format_name(out.sum[l], "kvmerge_sum_l%d", layer.il);
        }
    };

    if (!kvmerge_alloc_beside_keys(layers, make, out.bufs)) {
        return false;
    }

    bias_values bias;

    for (size_t l = 0; l < layers.size(); ++l) {
        if (has_bias) {
            upload_bias(l, out.bias[l], first[l], bias);
        }
        if (const auto * sum = layers[l].sum) {
            std::vector<float> values(ggml_nelements(sum));
            ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

            const uint32_t i_first = std::max(layers[l].first, first[l]);
            const uint32_t i_last  = std::min<uint32_t>(layers[l].first + sum->ne[0], n_cells);

            for (int32_t h = 0; h < layers[l].n_head_kv && i_first < i_last; ++h) {
                ggml_backend_tensor_set(out.sum[l], values.data() + h*sum->ne[0] + i_first - layers[l].first,
                        h*out.sum[l]->nb[1] + (i_first - first[l])*sizeof(float), (i_last - i_first)*sizeof(float));
            }
        }
    }

    return true;
}

void kvmerge_engine::use_bias(biases && next) {
    for (size_t l = 0; l < layers.size(); ++l) {
        layers[l].bias = next.bias[l];
        layers[l].sum  = next.sum [l];
    }

    bufs_bias = std::move(next.bufs);
}

void kvmerge_engine::reserve_bias(size_t l, bias_values & values) const {
    const ggml_tensor * dst = layers[l].bias;

    values.floats.reserve(ggml_nelements(dst));
    values.halves.reserve(dst->type == GGML_TYPE_F16 ? ggml_nelements(dst) : 0);
}

void kvmerge_engine::upload_bias(size_t l, ggml_tensor * dst, uint32_t first, bias_values & values) const {
    auto & bias = values.floats;

    bias.assign(ggml_nelements(dst), 0.0f);

    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        for (size_t i = first; i < std::min<size_t>(is_merged.size(), first + dst->ne[0]); ++i) {
            bias[h*dst->ne[0] + i - first] = cell(i, l, h).bias;
        }
    }

    if (dst->type == GGML_TYPE_F16) {
        values.halves.resize(bias.size());
        ggml_fp32_to_fp16_row(bias.data(), values.halves.data(), bias.size());
        ggml_backend_tensor_set(dst, values.halves.data(), 0, ggml_nbytes(dst));
    } else {
        ggml_backend_tensor_set(dst, bias.data(), 0, ggml_nbytes(dst));
    }
}

void kvmerge_engine::upload_bias() {
    bias_values values;

    for (size_t l = 0; l < layers.size(); ++l) {
        upload_bias(l, values);
    }
}

void kvmerge_engine::load_sums(size_t l, const std::vector<uint32_t> & cells, std::vector<kvmerge_plan> & plans_layer) const {
    const ggml_tensor * sum = layers[l].sum;

    std::vector<float> values(ggml_nelements(sum));
    ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

    for (size_t h = 0; h < plans_layer.size(); ++h) {
        for (size_t i = 0; i < cells.size(); ++i) {
            plans_layer[h].score[i] = values[h*sum->ne[0] + cells[i]];
        }
    }
}

std::vector<float> kvmerge_engine::compact_sums(
        size_t l, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<kvmerge_plan> & plans_layer) const {
    const ggml_tensor * sum = layers[l].sum;

    std::vector<float> values(ggml_nelements(sum));
    ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

    std::vector<float> before(cells.size());

    for (size_t h = 0; h < plans_layer.size(); ++h) {
        float * row = values.data() + h*sum->ne[0];

        for (size_t i = 0; i < cells.size(); ++i) {
            before[i]     = row[cells[i]];
            row[cells[i]] = 0;
        }

        const auto    kept   = plans_layer[h].kept();
        const int32_t offset = n_after - kept.size();

        for (size_t c = 0; c < kept.size(); ++c) {
            row[cells[offset + c]] = before[kept[c]];
        }
    }

    return values;
}

void kvmerge_engine::clear_sum(uint32_t idx) {
    const float zero = 0;

    for (auto & layer : layers) {
        for (int32_t h = 0; layer.sum && h < layer.n_head_kv; ++h) {
            ggml_backend_tensor_set(layer.sum, &zero, h*layer.sum->nb[1] + (idx - layer.first)*sizeof(float), sizeof(float));
        }
    }
}
