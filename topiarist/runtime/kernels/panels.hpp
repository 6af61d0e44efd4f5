// y = x W^T for many rows of x: a panel of W is expanded to bf16 once, into cache, and multiplied with all of them.
//
// Products are dot products over the inputs, four rows of W by six of x at a time in registers, so that the expanded rows
// are used as they lie. Reached where the processor multiplies bf16 but has no AMX, whose products torch's own library
// makes several times as fast.
#pragma once

#include "packing.hpp"
#include "floats.hpp"

#if X86
#include <cpuid.h>
#endif

namespace {

#if X86

constexpr int64_t PANEL_BYTES = 1 << 17;  // of expanded rows; half of the smallest L2 of these processors and less
constexpr int64_t DEPTH = 2048;           // inputs that six rows of x are read for at a time: they stay in L1
constexpr int MANY = 6;

bool has_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

// Four vectors to the sums of each.
AVX512_BF16 inline __m128 four_sums(const __m512* v) {
    __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
    __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Adds to sums [N][4] the products of four rows of w, `stride` apart, with N rows of x, over `width` inputs.
template <int N>
AVX512_BF16 void add_products(const uint16_t* w, const uint16_t* x, int64_t stride, int64_t width, float* sums) {
    __m512 acc[N][R];
    for (int b = 0; b < N; b++)
        for (int r = 0; r < R; r++) acc[b][r] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= width; k += 32) {
        __m512bh weight[R];
        for (int r = 0; r < R; r++) weight[r] = as_bf16(_mm512_loadu_si512(w + r * stride + k));
        for (int b = 0; b < N; b++) {
            __m512bh input = as_bf16(_mm512_loadu_si512(x + b * stride + k));
            for (int r = 0; r < R; r++) acc[b][r] = _mm512_dpbf16_ps(acc[b][r], weight[r], input);
        }
    }
    if (const __mmask32 left = (__mmask32(1) << (width - k)) - 1)
        for (int r = 0; r < R; r++) {
            __m512bh weight = as_bf16(_mm512_maskz_loadu_epi16(left, w + r * stride + k));
            for (int b = 0; b < N; b++)
                acc[b][r] = _mm512_dpbf16_ps(acc[b][r], weight, as_bf16(_mm512_maskz_loadu_epi16(left, x + b * stride + k)));
        }
    for (int b = 0; b < N; b++) _mm_storeu_ps(sums + 4 * b, _mm_add_ps(_mm_loadu_ps(sums + 4 * b), four_sums(acc[b])));
}

using AddProducts = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, float*);
const AddProducts add_products_for[MANY] = {add_products<1>, add_products<2>, add_products<3>,
                                            add_products<4>, add_products<5>, add_products<6>};

// 16 codes times their scale.
AVX512_BF16 inline void scaled_row(const int8_t* codes, float scale, uint16_t* out, int64_t width) {
    __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
    __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(floats, _mm512_set1_ps(scale))));
    if (width >= 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
    else _mm256_mask_storeu_epi16(out, __mmask16((1 << width) - 1), rounded);
}

// A tile's rows in bf16, `stride` apart; rows beyond the last are left as they are.
template <int BITS, int FORM>
AVX512_BF16 void integer_rows(const Integers& m, int64_t tile, uint16_t* out, int64_t stride) {
    const uint64_t* mask = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const int rows = int(std::min<int64_t>(R, m.rows - tile * R));
    ScaleSteps steps(m, tile);
    for (int64_t block = 0; block < m.blocks; block++) {
        alignas(16) float scales[2][R];
        for (int half = 0; half < 2; half++) _mm_store_ps(scales[half], four_scales(m, steps.next()));
        for (int run = 0; run < R; run++, mask++) {
            _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
            alignas(64) int8_t codes[64];
            if constexpr (FORM == TWO_FOUR) {
                expand_run_avx2<BITS, FORM>(values, mask, codes);
            } else {
                const __m512i offset = _mm512_set1_epi8(char(IntegerInputs::offset(BITS == 8 ? INT8 : INT4)));
                _mm512_store_si512(codes, _mm512_sub_epi8(expand_avx512<BITS, FORM>(values, mask), offset));
            }
            for (int at = 0; at < 64; at += 16) {
                const int row = row_of(Form(FORM), run, at), column = column_of(Form(FORM), run, at);
                const int64_t left = m.cols - block * 64 - column;
                if (row >= rows || left <= 0) continue;
                scaled_row(codes + at, scales[column / 32][row], out + row * stride + block * 64 + column, left);
            }
        }
    }
}

// The same for any weight that `has_panels`.
void expand_rows(const Weight& w, int64_t tile, uint16_t* out, int64_t stride) {
    if (Type(w.type) == BF16) return rows_of_16_bits(Matrix(w), tile, out, stride);
    Integers m(w);
    Form form = Form(w.form);
    if (Type(w.type) == INT8) {
        if (form == FULL) return integer_rows<8, FULL>(m, tile, out, stride);
        return form == TWO_FOUR ? integer_rows<8, TWO_FOUR>(m, tile, out, stride) : integer_rows<8, MASKED>(m, tile, out, stride);
    }
    if (form == FULL) return integer_rows<4, FULL>(m, tile, out, stride);
    return form == TWO_FOUR ? integer_rows<4, TWO_FOUR>(m, tile, out, stride) : integer_rows<4, MASKED>(m, tile, out, stride);
}

// The sums [now][4] of a tile, with their bias, where they belong in y.
AVX512_BF16 inline void write_tile(const Weight& w, int64_t tile, const float* sums, uint16_t* y, int now) {
    float bias[R] = {};
    const int rows = int(std::min<int64_t>(R, w.rows - tile * R));
    for (int r = 0; w.bias && r < rows; r++)
        bias[r] = read(static_cast<const char*>(w.bias), tile * R + r, Type(w.bias_type));
    for (int b = 0; b < now; b++) {
        __m128 finished = _mm_add_ps(_mm_loadu_ps(sums + R * b), _mm_loadu_ps(bias));
        __m128i rounded = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(finished));
        uint16_t* to = y + b * w.rows + tile * R;
        if (rows == R) _mm_storel_epi64(reinterpret_cast<__m128i*>(to), rounded);
        else _mm_mask_storeu_epi16(to, __mmask8((1 << rows) - 1), rounded);
    }
}

// Memory that a thread keeps, so that neither fresh pages nor zeros are paid for at every product.
uint16_t* scratch(int64_t elements) {
    thread_local std::vector<uint16_t> memory;
    if (int64_t(memory.size()) < elements + 32) memory.resize(size_t(elements + 32));
    return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 2;
}

// y [batch][rows] = x [batch][cols] W^T + bias, x and y bf16.
void multiply_by_panels(const Weight& w, const uint16_t* x, int64_t batch, uint16_t* y, int threads) {
    const int64_t tiles = (w.rows + R - 1) / R, in_panel = std::max<int64_t>(1, PANEL_BYTES / (w.cols * 2 * R));
    // Rows a power of two apart would fall into the same few lines of L1.
    const int64_t stride = (w.cols + 31) / 32 * 32 + 32, step = R * stride;
    const int64_t groups = (batch + MANY - 1) / MANY, size = (batch + groups - 1) / groups;
    Aligned copy(batch * stride * 2);
    uint16_t* inputs = reinterpret_cast<uint16_t*>(copy.data);
    for (int64_t b = 0; b < batch; b++) std::memcpy(inputs + b * stride, x + b * w.cols, size_t(w.cols) * 2);
    parallel_tiles((tiles + in_panel - 1) / in_panel, threads, [&](int64_t panel) {
        const int64_t begin = panel * in_panel, end = std::min(tiles, begin + in_panel);
        uint16_t* expanded = scratch((end - begin) * step);
        for (int64_t tile = begin; tile < end; tile++) expand_rows(w, tile, expanded + (tile - begin) * step, stride);
        std::vector<float> sums(size_t((end - begin) * R * MANY));
        for (int64_t first = 0; first < batch; first += size) {
            const int now = int(std::min(size, batch - first));
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t k = 0; k < w.cols; k += DEPTH)
                for (int64_t tile = begin; tile < end; tile++)
                    add_products_for[now - 1](expanded + (tile - begin) * step + k, inputs + first * stride + k, stride,
                                              std::min(DEPTH, w.cols - k), sums.data() + (tile - begin) * R * MANY);
            for (int64_t tile = begin; tile < end; tile++)
                write_tile(w, tile, sums.data() + (tile - begin) * R * MANY, y + first * w.rows, now);
        }
    });
}

#endif

}  // namespace
