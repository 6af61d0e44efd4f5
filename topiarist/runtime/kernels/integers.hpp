// y = x W^T for a W of 8-bit or 4-bit integers with scales, stored with or without its zeros.
//
// x is rounded to 8 bits per token and 32 columns (as Q8_0 of llama.cpp does), products are summed exactly in integers
// over those 32 columns, and each such sum is scaled and added in fp32. Four rows make a tile, 64 columns a block:
//
//   masks   [tiles][blocks][4]  uint64: bit j of (tile, block, r) set = weight (4 tile + r, 64 block + j) is stored;
//                               absent in the form FULL; positions in the form TWO_FOUR, see two_four.hpp
//   values  int8, or two's complement nibbles, low one first; the nibbles of a (tile, block, r) begin a new byte;
//           64 bytes past the last one may be read
//   starts  [tiles]             where a tile's values begin, in bytes
//   scales  [tiles][groups][4]  bf16 or fp32; a group is `group` columns, a multiple of 32 unless it is the whole row
//
// Rows and columns that fill up the last tile and block hold zeros.
#pragma once

#include "common.hpp"

namespace {

struct Integers {
    int64_t rows, cols, group, blocks, tiles, groups;
    const uint64_t* masks;
    const uint8_t* values;
    const int64_t* starts;
    const char* scales;
    Type scale_type;

    explicit Integers(const Weight& w)
        : rows(w.rows), cols(w.cols), group(w.group), blocks((cols + 63) / 64), tiles((rows + R - 1) / R),
          groups((cols + group - 1) / group), masks(static_cast<const uint64_t*>(w.masks)),
          values(static_cast<const uint8_t*>(w.values)), starts(w.starts), scales(static_cast<const char*>(w.scales)),
          scale_type(Type(w.scale_type)) {}

    // Of columns 64 block + 32 half and on; beyond the last group for columns that only fill up.
    int64_t scale_index(int64_t tile, int64_t block, int half) const {
        return (tile * groups + std::min((64 * block + 32 * half) / group, groups - 1)) * R;
    }
};

// ------------------------------------------------------------------------------------------------ inputs as 8 bits

// Codes [batch][blocks][64], then scales [batch][blocks][2]. AVX-512 wants codes plus 128, unsigned.
struct IntegerInputs : Aligned {
    int64_t stride, scale_stride;
    float* scales;

    IntegerInputs(const char* x, Type x_type, int64_t batch, const Integers& m, Level level)
        : Aligned(batch * m.blocks * (64 + 2 * 4)), stride(m.blocks * 64), scale_stride(m.blocks * 2),
          scales(reinterpret_cast<float*>(data + batch * stride)) {
        int offset = level >= LEVEL_AVX512 ? 128 : 0;
        for (int64_t b = 0; b < batch; b++)
            for (int64_t part = 0; part < scale_stride; part++) {
                float values[32] = {};
                int64_t first = part * 32, width = std::min<int64_t>(32, m.cols - first);
                for (int64_t j = 0; j < width; j++) values[j] = read(x, b * m.cols + first + j, x_type);
                scales[b * scale_stride + part] = round_to_codes(values, data + b * stride + first, offset);
            }
    }

    // A NaN or Inf in x gives a NaN scale, and so NaN in every sum, as it would in the dense product.
    static float round_to_codes(const float* values, char* codes, int offset) {
        float largest = 0, check = 0;
        for (int j = 0; j < 32; j++) {
            largest = std::max(largest, std::fabs(values[j]));
            check += values[j] * 0.0f;
        }
        float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, and vectorises.
        for (int j = 0; j < 32; j++) {
            float shifted = values[j] * inverse + 12582912.0f;
            int32_t bits;
            std::memcpy(&bits, &shifted, 4);
            codes[j] = char(bits - 0x4B400000 + offset);
        }
        return check == 0 ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    }
};

// --------------------------------------------------------------------------------------------- 64 weights, expanded

// The positions of 2:4: values and fields of two bits lie so that `two_four.hpp` finds them by one shift. Value `slot` of 32
// belongs to chunk 0, 2, 1 or 3 of sixteen columns, eight slots each; its column within its group of four stands in bits
// 8 (slot % 8) + 2 (slot / 8) of the index.
inline int two_four_shift(int slot) { return 8 * (slot % 8) + 2 * (slot / 8); }
inline int two_four_group(int slot) { return "\0\2\1\3"[slot / 8] * 16 + slot % 8 / 2 * 4; }
inline int two_four_column(uint64_t index, int slot) { return two_four_group(slot) + int(index >> two_four_shift(slot) & 3); }

inline int nibble(const uint8_t* values, int at) { return int8_t(uint8_t(values[at / 2] << (at % 2 ? 0 : 4))) >> 4; }

// Writes 64 codes and steps to the next run.
template <int BITS, int FORM>
void expand_plain(const uint8_t*& values, const uint64_t* mask, int8_t* codes) {
    if constexpr (FORM == TWO_FOUR) {
        std::fill(codes, codes + 64, int8_t(0));
        for (int slot = 0; slot < 32; slot++)
            codes[two_four_column(*mask, slot)] =
                BITS == 8 ? int8_t(values[slot]) : int8_t(nibble(values, 2 * (slot & 15) + slot / 16));
        values += 32 * BITS / 8;
        return;
    }
    int next = 0;
    for (int j = 0; j < 64; j++) {
        bool stored = FORM == FULL || (*mask >> j & 1);
        codes[j] = stored ? int8_t(BITS == 8 ? int8_t(values[next]) : nibble(values, next)) : int8_t(0);
        next += stored;
    }
    values += BITS == 8 ? next : (next + 1) / 2;
}

template <int BITS, int FORM, int N>
void integer_tile_plain(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* masks = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    for (int i = 0; i < R * N; i++) sums[i] = 0;
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++) {
            int8_t codes[64];
            expand_plain<BITS, FORM>(values, masks++, codes);
            for (int half = 0; half < 2; half++) {
                float scale = read(m.scales, m.scale_index(tile, block, half) + r, m.scale_type);
                for (int b = 0; b < N; b++) {
                    const char* x = in.data + (first + b) * in.stride + block * 64 + half * 32;
                    int32_t sum = 0;
                    for (int j = 0; j < 32; j++) sum += codes[half * 32 + j] * int8_t(x[j]);
                    sums[r * N + b] += float(sum) * (scale * in.scales[(first + b) * in.scale_stride + 2 * block + half]);
                }
            }
        }
}

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

// Two vectors of 32 codes.
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
    __m256 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm256_setzero_ps();
    for (int64_t block = 0; block < m.blocks; block++, x += 64, x_scales += 2, masks += R) {
        alignas(16) float scales[N][2][R];
        for (int half = 0; half < 2; half++) {
            __m128 of_rows = four_scales(m, m.scale_index(tile, block, half));
            for (int b = 0; b < N; b++)
                _mm_store_ps(scales[b][half], _mm_mul_ps(of_rows, _mm_set1_ps(x_scales[b * in.scale_stride + half])));
        }
        for (int r = 0; r < R; r++) {
            _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
            __m256i codes[2];
            expand_avx2<BITS, FORM>(values, masks + r, codes);
            for (int half = 0; half < 2; half++) {
                // |w| times x with w's sign, as the instruction wants one factor unsigned: 2 * 128 * 127 fits 16 bits.
                __m256i absolute = _mm256_abs_epi8(codes[half]);
                for (int b = 0; b < N; b++) {
                    __m256i input = _mm256_load_si256(reinterpret_cast<const __m256i*>(x + b * in.stride + 32 * half));
                    __m256i pairs = _mm256_maddubs_epi16(absolute, _mm256_sign_epi8(input, codes[half]));
                    __m256 sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
                    acc[r][b] = _mm256_fmadd_ps(sum, _mm256_broadcast_ss(&scales[b][half][r]), acc[r][b]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = sum_of_eight(acc[r][b]);
}

template <int BITS, int FORM>
AVX512 inline __m512i expand_avx512(const uint8_t*& values, const uint64_t* mask) {
    __m512i stored;
    if constexpr (BITS == 8) {
        stored = _mm512_loadu_si512(values);
    } else {
        __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
        __m512i both = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(15));
        stored = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(signed_nibbles()), both);
    }
    int count = FORM == FULL ? 64 : int(_mm_popcnt_u64(*mask));
    values += BITS == 8 ? count : (count + 1) / 2;
    if constexpr (FORM == FULL) return stored;
    return _mm512_maskz_expand_epi8(*mask, stored);
}

// One value for columns 0 to 31 of a block, another for 32 to 63.
AVX512 inline __m512 halves(float low, float high) {
    return _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(low), _mm512_set1_ps(high));
}

template <int BITS, int FORM, int N>
AVX512 void integer_tile_avx512(const Integers& m, int64_t tile, const IntegerInputs& in, int64_t first, float* sums) {
    const uint64_t* masks = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    const char* x = in.data + first * in.stride;
    const float* x_scales = in.scales + first * in.scale_stride;
    __m512 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t block = 0; block < m.blocks; block++, x += 64, x_scales += 2, masks += R) {
        alignas(16) float row_scales[2][R];
        for (int half = 0; half < 2; half++)
            _mm_store_ps(row_scales[half], four_scales(m, m.scale_index(tile, block, half)));
        for (int r = 0; r < R; r++) {
            _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD), _MM_HINT_T0);
            __m512i codes = expand_avx512<BITS, FORM>(values, masks + r);
            // Inputs carry 128 more than they are: 128 times the sum of the weights is taken away beforehand.
            __m512i surplus = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), codes);
            __m512i begin = _mm512_sub_epi32(_mm512_setzero_si512(), surplus);
            __m512 of_row = halves(row_scales[0][r], row_scales[1][r]);
            for (int b = 0; b < N; b++) {
                __m512i sum = _mm512_dpbusd_epi32(begin, _mm512_load_si512(x + b * in.stride), codes);
                const float* of_x = x_scales + b * in.scale_stride;
                __m512 scale = _mm512_mul_ps(of_row, halves(of_x[0], of_x[1]));
                acc[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[r][b]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = _mm512_reduce_add_ps(acc[r][b]);
}

#endif

}  // namespace
