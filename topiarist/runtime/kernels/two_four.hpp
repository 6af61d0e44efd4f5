// Integers in the pattern 2:4: the inputs are gathered instead of the weights expanded, which halves the products.
//
// The index of 64 columns of a row is 32 fields of two bits. Shifted by 0, 2, 4 and 6 it gives 32 bytes, each the place of
// one kept weight within its group; added to where the group begins, that is the order in which `pshufb` takes x. One vector
// of 32 selected inputs meets 32 stored values, in four chunks of sixteen columns: 0, 2 in its lower half, 1, 3 in its upper.
#pragma once

#include "integers_x86.hpp"

namespace {

#if X86

constexpr int64_t EACH_WORD = 0x0000000100000001;

AVX2 inline __m256i places(uint64_t index) {
    __m256i shifted = _mm256_srlv_epi64(_mm256_set1_epi64x(int64_t(index)), _mm256_setr_epi64x(0, 2, 4, 6));
    return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

// Bytes that take the kept inputs of each chunk out of its sixteen.
AVX2 inline __m256i selection(uint64_t index) {
    return _mm256_or_si256(places(index), _mm256_set1_epi64x(0x0C0C080804040000));
}

AVX2 inline __m256i select_inputs(const char* x, __m256i order) {
    const __m256i* from = reinterpret_cast<const __m256i*>(x);
    __m256i low = _mm256_shuffle_epi8(_mm256_load_si256(from), order);
    __m256i high = _mm256_shuffle_epi8(_mm256_load_si256(from + 1), order);
    return _mm256_blend_epi32(low, high, 0xCC);
}

// 32 values; with nibbles the first sixteen are the low ones.
template <int BITS>
AVX2 inline __m256i stored_values(const uint8_t* values) {
    if constexpr (BITS == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), low = _mm_set1_epi8(15);
    __m256i nibbles = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(both, 4), low), _mm_and_si128(both, low));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(signed_nibbles()), nibbles);
}

// Two vectors of 32 codes: each column takes either value of its group whose place it is.
template <int BITS>
AVX2 inline void expand_two_four(const uint8_t* values, uint64_t index, __m256i* codes) {
    const __m256i of_slots = places(index), stored = stored_values<BITS>(values), column = _mm256_set1_epi32(0x03020100);
    const __m256i first = _mm256_setr_epi32(0, 0x02020202, 0x04040404, 0x06060606, 0, 0x02020202, 0x04040404, 0x06060606);
    for (int half = 0; half < 2; half++) {
        codes[half] = _mm256_setzero_si256();
        for (int value = 0; value < 2; value++) {
            __m256i slot = _mm256_add_epi8(first, _mm256_set1_epi8(char(8 * half + value)));
            __m256i here = _mm256_cmpeq_epi8(_mm256_shuffle_epi8(of_slots, slot), column);
            codes[half] = _mm256_or_si256(codes[half], _mm256_and_si256(_mm256_shuffle_epi8(stored, slot), here));
        }
    }
}

// One number for columns 0 to 31 and another for 32 to 63, as sums of four products lie.
AVX2 inline __m256 of_halves(const float* low, const float* high) {
    return _mm256_blend_ps(_mm256_broadcast_ss(low), _mm256_broadcast_ss(high), 0xCC);
}

template <int BITS, int N>
AVX2 void two_four_tile_avx2(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* index = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const char* x = in.data + first * in.stride;
    const float* x_scales = in.scales + first * in.scale_stride;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm256_setzero_ps();
    ScaleSteps steps(m, tile);
    for (int64_t block = 0; block < m.blocks; block++, x += 64, x_scales += 2, index += R) {
        alignas(16) float scales[2][R];
        for (int half = 0; half < 2; half++) _mm_store_ps(scales[half], four_scales(m, steps.next()));
        __m256 of_x[N];
        for (int b = 0; b < N; b++)
            of_x[b] = of_halves(x_scales + b * in.scale_stride, x_scales + b * in.scale_stride + 1);
        _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD + 64), _MM_HINT_T0);
        for (int r = 0; r < R; r++, values += 4 * BITS) {
            __m256i order = selection(index[r]), codes = stored_values<BITS>(values), absolute = _mm256_abs_epi8(codes);
            __m256 of_row = of_halves(&scales[0][r], &scales[1][r]);
            for (int b = 0; b < N; b++) {
                __m256i signed_inputs = _mm256_sign_epi8(select_inputs(x + b * in.stride, order), codes);
                __m256i pairs = _mm256_maddubs_epi16(absolute, signed_inputs);
                __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                acc[r][b] = _mm256_fmadd_ps(sum, _mm256_mul_ps(of_row, of_x[b]), acc[r][b]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = sum_of_eight(acc[r][b]);
}

// AVX-512 takes two rows at a time, one in each half of a vector.

// One number in the lower half, another in the upper.
AVX512 inline __m512i two_halves(int64_t low, int64_t high) {
    return _mm512_inserti64x4(_mm512_set1_epi64(low), _mm256_set1_epi64x(high), 1);
}

// 32 values of each of two rows.
template <int BITS>
AVX512 inline __m512i stored_values_of_two(const uint8_t* values) {
    if constexpr (BITS == 8) return _mm512_loadu_si512(values);
    __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
    both = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
    both = _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    both = _mm512_and_si512(both, _mm512_set1_epi8(15));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(signed_nibbles()), both);
}

// The scales of four rows: of columns 0 to 31 of the next block, then of 32 to 63.
AVX512 inline __m512 eight_scales(const Integers& m, ScaleSteps& steps) {
    __m128 low = four_scales(m, steps.next()), high = four_scales(m, steps.next());
    return _mm512_castps256_ps512(_mm256_set_m128(high, low));
}

template <int BITS, int N>
AVX512 void two_four_tile_avx512(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* index = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const char* x = in.data + first * in.stride;
    const float* x_scales = in.scales + first * in.scale_stride;
    const __m512i surplus = _mm512_set1_epi8(-128), begins = _mm512_set1_epi64(0x0C0C080804040000);
    const __m512i shifts = _mm512_setr_epi64(0, 2, 4, 6, 0, 2, 4, 6), place = _mm512_set1_epi8(3);
    const __mmask64 from_high = 0xFF00FF00FF00FF00;
    __m512 acc[R / 2][N];
    for (int pair = 0; pair < R / 2; pair++)
        for (int b = 0; b < N; b++) acc[pair][b] = _mm512_setzero_ps();
    ScaleSteps steps(m, tile);
    for (int64_t block = 0; block < m.blocks; block++, x += 64, x_scales += 2, index += R) {
        const __m512 of_rows = eight_scales(m, steps);
        const __m512i indices = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
        __m512i low[N], high[N];
        __m512 of_x[N];
        for (int b = 0; b < N; b++) {
            const __m256i* from = reinterpret_cast<const __m256i*>(x + b * in.stride);
            // Unsigned, as the instruction wants one factor.
            low[b] = _mm512_xor_si512(_mm512_broadcast_i64x4(_mm256_load_si256(from)), surplus);
            high[b] = _mm512_xor_si512(_mm512_broadcast_i64x4(_mm256_load_si256(from + 1)), surplus);
            const float* two = x_scales + b * in.scale_stride;
            of_x[b] = _mm512_mask_blend_ps(0xCCCC, _mm512_set1_ps(two[0]), _mm512_set1_ps(two[1]));
        }
        for (int pair = 0; pair < R / 2; pair++, values += 8 * BITS) {
            const int row = 2 * pair;
            _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
            __m512i order = _mm512_permutexvar_epi64(two_halves(row, row + 1), indices);
            order = _mm512_ternarylogic_epi64(_mm512_srlv_epi64(order, shifts), place, begins, 0xEA);  // (a & b) | c
            __m512i codes = stored_values_of_two<BITS>(values);
            // Inputs carry 128 more than they are: 128 times the sum of the weights is taken away.
            __m512i excess = _mm512_dpbusd_epi32(_mm512_setzero_si512(), surplus, codes);
            __m512i begin = _mm512_sub_epi32(_mm512_setzero_si512(), excess);
            __m512i of_pair = two_halves(row * EACH_WORD, (row + 1) * EACH_WORD);
            of_pair = _mm512_add_epi32(of_pair, _mm512_maskz_set1_epi32(0xCCCC, R));
            __m512 of_row = _mm512_permutexvar_ps(of_pair, of_rows);
            for (int b = 0; b < N; b++) {
                __m512i inputs = _mm512_shuffle_epi8(low[b], order);
                inputs = _mm512_mask_shuffle_epi8(inputs, from_high, high[b], order);
                __m512 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(begin, inputs, codes));
                acc[pair][b] = _mm512_fmadd_ps(sum, _mm512_mul_ps(of_row, of_x[b]), acc[pair][b]);
            }
        }
    }
    for (int pair = 0; pair < R / 2; pair++)
        for (int b = 0; b < N; b++) {
            sums[2 * pair * N + b] = sum_of_eight(_mm512_castps512_ps256(acc[pair][b]));
            sums[(2 * pair + 1) * N + b] = sum_of_eight(_mm512_extractf32x8_ps(acc[pair][b], 1));
        }
}

#endif

// ------------------------------------------------------------------------------------------------------- dispatch

using IntegerTile = void (*)(const Integers&, int64_t, const IntegerInputs&, int64_t, float*);

template <int BITS, int FORM, int N>
IntegerTile integer_tile_of(Level level) {
#if X86
    if constexpr (FORM == TWO_FOUR) {
        if (level >= LEVEL_AVX512) return two_four_tile_avx512<BITS, N>;
        if (level == LEVEL_AVX2) return two_four_tile_avx2<BITS, N>;
    } else {
        if (level >= LEVEL_AVX512) return integer_tile_avx512<BITS, FORM, N>;
        if (level == LEVEL_AVX2) return integer_tile_avx2<BITS, FORM, N>;
    }
#endif
    return integer_tile_plain<BITS, FORM, N>;
}

template <int BITS, int FORM>
IntegerTile integer_tile_of(int batch, Level level) {
    return batch == 1 ? integer_tile_of<BITS, FORM, 1>(level)
           : batch < 4 ? integer_tile_of<BITS, FORM, 2>(level)
                       : integer_tile_of<BITS, FORM, 4>(level);
}

// For the largest of 1, 2 and 4 rows of x that `batch` has.
IntegerTile integer_tile_for(Type type, Form form, int batch, Level level) {
    if (type == INT8)
        return form == FULL ? integer_tile_of<8, FULL>(batch, level)
               : form == TWO_FOUR ? integer_tile_of<8, TWO_FOUR>(batch, level)
                                  : integer_tile_of<8, MASKED>(batch, level);
    return form == FULL ? integer_tile_of<4, FULL>(batch, level)
           : form == TWO_FOUR ? integer_tile_of<4, TWO_FOUR>(batch, level)
                              : integer_tile_of<4, MASKED>(batch, level);
}

}  // namespace
