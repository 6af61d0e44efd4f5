// y = x W^T for a W of floats as torch keeps it, row after row: what is left unpacked in a model.
#pragma once

#include "common.hpp"

namespace {

template <int N>
void dense_rows_plain(const char* weight, Type type, int64_t cols, int64_t row, const float* x, float* sums) {
    for (int b = 0; b < N; b++) {
        sums[b] = 0;
        for (int64_t j = 0; j < cols; j++) sums[b] += read(weight, row * cols + j, type) * x[b * cols + j];
    }
}

#if X86
template <Type T>
AVX2 inline __m256 eight_floats(const char* weight, int64_t at) {
    if constexpr (T == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(weight) + at);
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + 2 * at));
    if constexpr (T == F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <int N, Type T>
AVX2 void dense_rows_avx2(const char* weight, Type, int64_t cols, int64_t row, const float* x, float* sums) {
    const char* from = weight + row * cols * (T == F32 ? 4 : 2);
    __m256 even[N], odd[N];
    for (int b = 0; b < N; b++) even[b] = odd[b] = _mm256_setzero_ps();
    int64_t j = 0;
    for (; j + 16 <= cols; j += 16) {
        _mm_prefetch(from + j * (T == F32 ? 4 : 2) + AHEAD, _MM_HINT_T0);
        __m256 first = eight_floats<T>(from, j), second = eight_floats<T>(from, j + 8);
        for (int b = 0; b < N; b++) {
            even[b] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x + b * cols + j), even[b]);
            odd[b] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + b * cols + j + 8), odd[b]);
        }
    }
    for (int b = 0; b < N; b++) {
        sums[b] = sum_of_eight(_mm256_add_ps(even[b], odd[b]));
        for (int64_t k = j; k < cols; k++) sums[b] += read(from, k, T) * x[b * cols + k];
    }
}
#endif

using DenseRow = void (*)(const char*, Type, int64_t, int64_t, const float*, float*);

template <int N>
DenseRow dense_row_of(Level level, Type type) {
#if X86
    if (level >= LEVEL_AVX2)
        return type == BF16 ? dense_rows_avx2<N, BF16> : type == F16 ? dense_rows_avx2<N, F16> : dense_rows_avx2<N, F32>;
#endif
    return dense_rows_plain<N>;
}

DenseRow dense_row_for(int batch, Level level, Type type) {
    return batch == 1 ? dense_row_of<1>(level, type)
           : batch < 4 ? dense_row_of<2>(level, type)
                       : dense_row_of<4>(level, type);
}

}  // namespace
