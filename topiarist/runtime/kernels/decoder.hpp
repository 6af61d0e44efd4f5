// One step of a Llama-like model: a token of each sequence in, logits out; everything between stays in fp32.
//
// x = embedding; for each block: x += o(attention(norm(x))), x += down(activation(gate(norm(x))) * up(norm(x))); then a
// norm and the head. Attention is grouped-query with rotary embeddings (pairs half a head apart) and a cache of fixed size
//
//   keys, values  [batch][kv_heads][max_tokens][head_dim]
//
// of each block. Buffers come from outside, so a step allocates no more than the kernels' copy of their input.
#pragma once

#include "multiply.hpp"

namespace {

enum Activation { SILU = 0, GELU_TANH = 1 };

// One block, as `Block` in decoder.py fills it in. Norms are fp32; those of heads may be null.
struct Block {
    Weight query, key, value, output, gate, up, down;
    const float *input_norm, *feed_forward_norm, *query_norm, *key_norm;
    float *keys, *values;
    int64_t window;                          // tokens that a token sees, itself included; 0 for all
    int64_t heads, kv_heads, feed_forward;  // none of them where that part was removed
};

struct Decoder {
    int64_t num_blocks, hidden, head_dim, rotary_dim, max_tokens;
    int64_t most_heads, most_kv_heads, most_feed_forward;  // of any block
    float epsilon, attention_scale, embedding_scale;
    int32_t activation, level, threads;
    const float *cosines, *sines;  // [max_tokens][rotary_dim]
    const Block* blocks;
    const float* norm;
    Weight embedding, head;
};

// e^x to about two units in the last place, without branches, so that loops over it vectorise.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    float whole = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    int32_t power;
    std::memcpy(&power, &whole, 4);
    whole -= 12582912.0f;
    float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (power - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

void normalise(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    float factor = 1 / std::sqrt(dot(x, x, n) / float(n) + epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

void rotate(float* head, const float* cosines, const float* sines, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        float first = head[i], second = head[i + n / 2];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + n / 2] = second * cosines[i + n / 2] + first * sines[i + n / 2];
    }
}

void activate(const float* gate, const float* up, int64_t n, Activation activation, float* out) {
    if (activation == SILU) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
        return;
    }
    // 0.5 g (1 + tanh z) = g / (1 + e^(-2z)), z = sqrt(2/pi) (g + 0.044715 g^3)
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = gate[i], z = 0.7978845608f * (g + 0.044715f * g * g * g);
        out[i] = g / (1 + exponential(-2 * z)) * up[i];
    }
}

// One head of one sequence: softmax(q K^T scale) V over tokens [first, last].
void attend(const float* query, const float* keys, const float* values, int64_t first, int64_t last, int64_t dim,
            float scale, float* scores, float* out) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t t = first; t <= last; t++) {
        scores[t] = dot(query, keys + t * dim, dim) * scale;
        largest = std::max(largest, scores[t]);
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t t = first; t <= last; t++) {
        scores[t] = exponential(scores[t] - largest);
        sum += scores[t];
    }
    std::fill(out, out + dim, 0.0f);
    for (int64_t t = first; t <= last; t++) {
        float share = scores[t] / sum;
        for (int64_t i = 0; i < dim; i++) out[i] += share * values[t * dim + i];
    }
}

// Consecutive pieces of the caller's buffer.
struct Workspace {
    float* next;
    float* take(int64_t n) {
        float* piece = next;
        next += n;
        return piece;
    }
};

// Row `index` of a weight in fp32; row4 is room for four rows.
void read_row(const Weight& w, int64_t index, Level level, float* row4, float* out) {
    const char* values = static_cast<const char*>(w.values);
    if (w.type >= INT8) {
        Integers m(w);
        expand_integers(m, index / R, Type(w.type), Form(w.form), reinterpret_cast<char*>(row4), F32, level);
        std::copy(row4 + index % R * w.cols, row4 + (index % R + 1) * w.cols, out);
    } else {
        for (int64_t i = 0; i < w.cols; i++) out[i] = read(values, index * w.cols + i, Type(w.type));
    }
}

void cache_and_attend(const Decoder& d, const Block& block, int64_t batch, int64_t position, float* q, float* k,
                      const float* v, float* scores, float* out) {
    int64_t dim = d.head_dim, first = block.window ? std::max<int64_t>(0, position - block.window + 1) : 0;
    const float *cosines = d.cosines + position * d.rotary_dim, *sines = d.sines + position * d.rotary_dim;
    for (int64_t i = 0; i < batch * block.kv_heads; i++) {
        if (block.key_norm) normalise(k + i * dim, block.key_norm, d.epsilon, dim, k + i * dim);
        rotate(k + i * dim, cosines, sines, d.rotary_dim);
        std::copy(k + i * dim, k + (i + 1) * dim, block.keys + (i * d.max_tokens + position) * dim);
        std::copy(v + i * dim, v + (i + 1) * dim, block.values + (i * d.max_tokens + position) * dim);
    }
    bool many = batch * block.heads * (position - first) * dim > 1 << 16;  // less is not worth waking another thread
#pragma omp parallel for num_threads(d.threads) if (d.threads > 1 && many)
    for (int64_t i = 0; i < batch * block.heads; i++) {
        int64_t cached = (i / block.heads * block.kv_heads + i % block.heads * block.kv_heads / block.heads) * d.max_tokens * dim;
        float* head = q + i * dim;
        if (block.query_norm) normalise(head, block.query_norm, d.epsilon, dim, head);
        rotate(head, cosines, sines, d.rotary_dim);
        attend(head, block.keys + cached, block.values + cached, first, position, dim, d.attention_scale,
               scores + i * d.max_tokens, out + i * dim);
    }
}

// Floats of workspace that a step of so many sequences needs.
int64_t workspace_size(const Decoder& d, int64_t batch) {
    int64_t heads = d.most_heads * (2 * d.head_dim + d.max_tokens), kv = 2 * d.most_kv_heads * d.head_dim;
    return batch * (3 * d.hidden + heads + kv + 2 * d.most_feed_forward) + R * d.hidden;
}

// tokens [batch], all at `position`; logits [batch][vocabulary].
void step_decoder(const Decoder& d, const int64_t* tokens, int64_t batch, int64_t position, float* workspace,
                  float* logits) {
    int64_t q_width = d.most_heads * d.head_dim, kv_width = d.most_kv_heads * d.head_dim;
    Workspace space{workspace};
    float *x = space.take(batch * d.hidden), *normed = space.take(batch * d.hidden), *added = space.take(batch * d.hidden);
    float *q = space.take(batch * q_width), *attended = space.take(batch * q_width);
    float *k = space.take(batch * kv_width), *v = space.take(batch * kv_width);
    float *gate = space.take(batch * d.most_feed_forward), *up = space.take(batch * d.most_feed_forward);
    float *scores = space.take(batch * d.most_heads * d.max_tokens), *row4 = space.take(R * d.hidden);
    auto linear = [&](const Weight& w, const float* from, float* to) {
        multiply(w, from, F32, batch, to, F32, Level(d.level), d.threads);
    };
    auto norm_all = [&](const float* weight) {
        for (int64_t b = 0; b < batch; b++)
            normalise(x + b * d.hidden, weight, d.epsilon, d.hidden, normed + b * d.hidden);
    };
    auto add = [&]() {
        for (int64_t i = 0; i < batch * d.hidden; i++) x[i] += added[i];
    };
    for (int64_t b = 0; b < batch; b++) {
        read_row(d.embedding, tokens[b], Level(d.level), row4, x + b * d.hidden);
        for (int64_t i = 0; i < d.hidden; i++) x[b * d.hidden + i] *= d.embedding_scale;
    }
    for (const Block* block = d.blocks; block < d.blocks + d.num_blocks; block++) {
        if (block->heads) {
            norm_all(block->input_norm);
            linear(block->query, normed, q);
            linear(block->key, normed, k);
            linear(block->value, normed, v);
            cache_and_attend(d, *block, batch, position, q, k, v, scores, attended);
            linear(block->output, attended, added);
            add();
        }
        if (block->feed_forward) {
            norm_all(block->feed_forward_norm);
            linear(block->gate, normed, gate);
            linear(block->up, normed, up);
            activate(gate, up, batch * block->feed_forward, Activation(d.activation), gate);
            linear(block->down, gate, added);
            add();
        }
    }
    norm_all(d.norm);
    linear(d.head, normed, logits);
}

}  // namespace
