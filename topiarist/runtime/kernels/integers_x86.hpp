// The products of integers.hpp by AVX2 and by AVX-512, for weights with all their zeros and for those without.
#pragma once

#include "integers.hpp"

namespace {

#if X86

// pshufb: which of the next bytes goes to each of eight places, by their mask bits; 0x80 gives zero. `after` is to be added for
// sixteen places, of which the second eight begin `n` values later; `by` for sixteen that all do.
struct Moves {
    alignas(16) uint64_t of[256];
    alignas(16) uint64_t after[9][2], by[2][2];
    Moves() {
        for (int bits = 0; bits < 256; bits++) {
            of[bits] = 0;
            for (int place = 0, next = 0; place < 8; place++)
                of[bits] |= uint64_t(bits >> place & 1 ? next++ : 0x80) << 8 * place;
        }
        for (unsigned n = 0; n < 9; n++) after[n][0] = 0, after[n][1] = n * EACH_BYTE;
        for (unsigned n = 0; n < 2; n++) by[n][0] = by[n][1] = n * EACH_BYTE;
    }
    static constexpr uint64_t EACH_BYTE = 0x0101010101010101;
};
const Moves moves;

AVX2 inline __m128i signed_nibbles() { return _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1); }

// 16 nibbles as bytes, unsigned, from eight bytes.
AVX2 inline __m128i sixteen_nibbles(const uint8_t* from) {
    __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), low = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
}

// Sixteen columns of a run whose first `taken` values are used up; steps over theirs. Nibbles stay unsigned.
template <int BITS>
AVX2 inline __m128i expand_sixteen(const uint8_t* values, uint32_t bits, int& taken) {
    const uint8_t first = uint8_t(bits), second = uint8_t(bits >> 8);
    __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&moves.of[first]));
    order = _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(order), reinterpret_cast<const double*>(&moves.of[second])));
    order = _mm_add_epi8(order, *reinterpret_cast<const __m128i*>(moves.after[_mm_popcnt_u32(first)]));
    const int before = taken;
    taken += _mm_popcnt_u32(bits & 0xFFFF);
    if constexpr (BITS == 8)
        return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + before)), order);
    const int odd = before & 1;
    if (odd && taken - before == 16) {  // the only case in which 16 values do not begin at one of 16 nibbles
        __m128i early = sixteen_nibbles(values + before / 2), late = sixteen_nibbles(values + before / 2 + 1);
        return _mm_or_si128(_mm_srli_si128(early, 1), _mm_slli_si128(_mm_srli_si128(late, 14), 15));
    }
    order = _mm_add_epi8(order, *reinterpret_cast<const __m128i*>(moves.by[odd]));
    return _mm_shuffle_epi8(sixteen_nibbles(values + before / 2), order);
}

// A run: two rows in each vector.
template <int BITS, int FORM>
AVX2 inline void expand_avx2(const uint8_t*& values, const uint64_t* mask, __m256i* codes) {
    int taken = 0;
    for (int half = 0; half < 2; half++) {
        if constexpr (FORM == FULL && BITS == 8) {
            codes[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * half));
        } else if constexpr (FORM == FULL) {
            codes[half] = _mm256_set_m128i(sixteen_nibbles(values + 16 * half + 8), sixteen_nibbles(values + 16 * half));
        } else {
            __m128i low = expand_sixteen<BITS>(values, uint32_t(*mask >> 32 * half), taken);
            __m128i high = expand_sixteen<BITS>(values, uint32_t(*mask >> (32 * half + 16)), taken);
            codes[half] = _mm256_set_m128i(high, low);
        }
        if constexpr (BITS == 4)
            codes[half] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(signed_nibbles()), codes[half]);
    }
    values += FORM == FULL ? 8 * BITS : BITS == 8 ? taken : (taken + 1) / 2;
}

AVX2 inline __m128 four_scales(const Integers& m, int64_t index) {
    if (m.scale_type == F32) return _mm_loadu_ps(reinterpret_cast<const float*>(m.scales) + index);
    __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(m.scales + 2 * index));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
}

template <int BITS, int FORM, int N>
AVX2 void integer_tile_avx2(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* masks = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const char* x = in.data + first * in.stride;
    const float* x_scales = in.scales + first * in.scale_stride;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 acc[2][N];
    for (int pair = 0; pair < 2; pair++)
        for (int b = 0; b < N; b++) acc[pair][b] = _mm256_setzero_ps();
    ScaleSteps steps(m, tile);
    for (int64_t half = 0; half < 2 * m.blocks; half++, x += 32, x_scales++) {
        const __m128 four = four_scales(m, steps.next());
        const __m256 of_rows[2] = {_mm256_set_m128(_mm_permute_ps(four, 0x55), _mm_permute_ps(four, 0x00)),
                                   _mm256_set_m128(_mm_permute_ps(four, 0xFF), _mm_permute_ps(four, 0xAA))};
        __m256i products[2][N];
        for (int run = 0; run < 2; run++, masks++) {
            _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
            __m256i codes[2];
            expand_avx2<BITS, FORM>(values, masks, codes);
            for (int pair = 0; pair < 2; pair++) {
                // |w| times x with w's sign, as the instruction wants one factor unsigned: 2 * 128 * 127 fits 16 bits.
                __m256i absolute = _mm256_abs_epi8(codes[pair]);
                for (int b = 0; b < N; b++) {
                    const __m128i* from = reinterpret_cast<const __m128i*>(x + b * in.stride + 16 * run);
                    __m256i input = _mm256_broadcastsi128_si256(_mm_load_si128(from));
                    __m256i pairs = _mm256_maddubs_epi16(absolute, _mm256_sign_epi8(input, codes[pair]));
                    __m256i product = _mm256_madd_epi16(pairs, ones);
                    products[pair][b] = run ? _mm256_add_epi32(products[pair][b], product) : product;
                }
            }
        }
        for (int b = 0; b < N; b++) {
            const __m256 of_x = _mm256_broadcast_ss(x_scales + b * in.scale_stride);
            for (int pair = 0; pair < 2; pair++)
                acc[pair][b] = _mm256_fmadd_ps(
                    _mm256_cvtepi32_ps(products[pair][b]), _mm256_mul_ps(of_rows[pair], of_x), acc[pair][b]);
        }
    }
    for (int pair = 0; pair < 2; pair++)
        for (int b = 0; b < N; b++) {
            sums[2 * pair * N + b] = sum_of_four(_mm256_castps256_ps128(acc[pair][b]));
            sums[(2 * pair + 1) * N + b] = sum_of_four(_mm256_extractf128_ps(acc[pair][b], 1));
        }
}

// A run's codes, each with `IntegerInputs::offset` more than it is, so unsigned.
template <int BITS, int FORM>
AVX512 inline __m512i expand_avx512(const uint8_t*& values, const uint64_t* mask) {
    constexpr int OFFSET = IntegerInputs::offset(BITS == 8 ? INT8 : INT4);
    const __m512i zeros = _mm512_set1_epi8(char(OFFSET));
    __m512i stored;
    if constexpr (BITS == 8) {
        stored = _mm512_xor_si512(_mm512_loadu_si512(values), zeros);
    } else {
        // Eight nibbles in each 64 bits, then one in each byte; the upper half of a byte is cut off as the offset is added.
        __m512i eights = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        __m512i spread = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1C1814100C080400), eights);
        stored = _mm512_ternarylogic_epi64(spread, _mm512_set1_epi8(15), zeros, 0x6A);  // (spread & 15) ^ zeros
    }
    int count = FORM == FULL ? 64 : int(_mm_popcnt_u64(*mask));
    values += BITS == 8 ? count : (count + 1) / 2;
    if constexpr (FORM == FULL) return stored;
    return _mm512_mask_expand_epi8(zeros, *mask, stored);
}

// Sixteen bytes, four times.
AVX512 inline __m512i four_times(const void* from) {
    return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(from)));
}

template <int BITS, int FORM, int N>
AVX512 void integer_tile_avx512(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* masks = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const char* x = in.data + first * in.stride;
    const int32_t* x_sums = in.sums + first * in.sum_stride;
    const float* x_scales = in.scales + first * in.scale_stride;
    const __m512i row_of_sum = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 acc[2][N];  // of either half of a block, so that additions need not wait for each other
    for (int half = 0; half < 2; half++)
        for (int b = 0; b < N; b++) acc[half][b] = _mm512_setzero_ps();
    ScaleSteps steps(m, tile);
    for (int64_t block = 0; block < m.blocks; block++)
        for (int half = 0; half < 2; half++, x += 32, x_sums += 4, x_scales++) {
            const __m512 four = _mm512_castps128_ps512(four_scales(m, steps.next()));
            const __m512 of_rows = _mm512_permutexvar_ps(row_of_sum, four);
            __m512i codes[2];
            for (int run = 0; run < 2; run++, masks++) {
                _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
                codes[run] = expand_avx512<BITS, FORM>(values, masks);
            }
            for (int b = 0; b < N; b++) {
                __m512i sum = four_times(x_sums + b * in.sum_stride);
                for (int run = 0; run < 2; run++)
                    sum = _mm512_dpbusd_epi32(sum, codes[run], four_times(x + b * in.stride + 16 * run));
                __m512 scale = _mm512_mul_ps(of_rows, _mm512_set1_ps(x_scales[b * in.scale_stride]));
                acc[half][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[half][b]);
            }
        }
    for (int b = 0; b < N; b++) {
        alignas(64) float lanes[16];
        _mm512_store_ps(lanes, _mm512_add_ps(acc[0][b], acc[1][b]));
        for (int r = 0; r < R; r++) sums[r * N + b] = sum_of_four(_mm_load_ps(lanes + 4 * r));
    }
}

#endif

}  // namespace
