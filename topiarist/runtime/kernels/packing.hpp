// Codes (rows, cols), int8, into the layout of integers.hpp and back.
#pragma once

#include "two_four.hpp"

namespace {

// The codes of a run, zeros where the matrix has ended.
void read_run(const int8_t* codes, int64_t rows, int64_t cols, int64_t tile, int64_t block, int run, Form form, int8_t* out) {
    for (int at = 0; at < 64; at++) {
        int64_t row = tile * R + row_of(form, run, at), col = block * 64 + column_of(form, run, at);
        out[at] = row < rows && col < cols ? codes[row * cols + col] : int8_t(0);
    }
}

// Which of a run's codes are stored. 2:4 fills groups of four up to two, with codes that are zero.
uint64_t stored_bits(const int8_t* run, Form form) {
    uint64_t bits = 0;
    for (int j = 0; j < 64; j++) bits |= uint64_t(run[j] != 0) << j;
    if (form == TWO_FOUR)
        for (int group = 0; group < 64; group += 4)
            for (int j = group; j < group + 4 && __builtin_popcountll(bits >> group & 15) < 2; j++) bits |= uint64_t(1) << j;
    return form == FULL ? ~uint64_t(0) : bits;
}

// Where 2:4's values stand, from their bits: see `two_four_column`.
uint64_t two_four_index(uint64_t bits) {
    uint64_t index = 0;
    for (int slot = 0; slot < 32; slot += 2) {
        uint64_t group = bits >> two_four_group(slot) & 15;
        uint64_t first = uint64_t(__builtin_ctzll(group)), second = uint64_t(__builtin_ctzll(group & (group - 1)));
        index |= first << two_four_shift(slot) | second << two_four_shift(slot + 1);
    }
    return index;
}

int64_t bytes_of(int stored, Type type) { return type == INT8 ? stored : (stored + 1) / 2; }

// First step: the masks of a tile; returns how many bytes its values will take. `masks` is null in the form FULL.
int64_t find_integer_masks(const int8_t* codes, int64_t rows, int64_t cols, int64_t tile, Type type, Form form,
                           uint64_t* masks) {
    int64_t blocks = (cols + 63) / 64, bytes = 0;
    int8_t codes_of_run[64];
    for (int64_t block = 0; block < blocks; block++)
        for (int run = 0; run < R; run++) {
            read_run(codes, rows, cols, tile, block, run, form, codes_of_run);
            uint64_t bits = stored_bits(codes_of_run, form);
            if (form != FULL) masks[(tile * blocks + block) * R + run] = form == TWO_FOUR ? two_four_index(bits) : bits;
            bytes += bytes_of(__builtin_popcountll(bits), type);
        }
    return bytes;
}

// Second step: the values of a tile, in the order of its masks, into memory that is zero.
void gather_integers(const int8_t* codes, int64_t rows, int64_t cols, int64_t tile, Type type, Form form,
                     const uint64_t* masks, uint8_t* values) {
    int64_t blocks = (cols + 63) / 64;
    int8_t codes_of_run[64];
    for (int64_t block = 0; block < blocks; block++)
        for (int run = 0; run < R; run++) {
            uint64_t mask = form == FULL ? ~uint64_t(0) : masks[(tile * blocks + block) * R + run];
            read_run(codes, rows, cols, tile, block, run, form, codes_of_run);
            int next = 0;
            auto put = [&](int place, int8_t value) {
                if (type == INT8) values[place] = uint8_t(value);
                else values[place / 2] |= uint8_t((uint8_t(value) & 15) << (place % 2 ? 4 : 0));
                next++;
            };
            if (form == TWO_FOUR)
                for (int slot = 0; slot < 32; slot++)
                    put(type == INT8 ? slot : 2 * (slot & 15) + slot / 16, codes_of_run[two_four_column(mask, slot)]);
            else
                for (; mask; mask &= mask - 1) put(next, codes_of_run[__builtin_ctzll(mask)]);
            values += bytes_of(next, type);
        }
}

// Where expanded weights go: bf16, fp16 or fp32 as code times scale, rounded once; int8 as the codes themselves.
void write_scaled(const int8_t* codes, int width, float scale, char* out, int64_t at, Type type) {
    if (type == INT8) std::memcpy(out + at, codes, size_t(width));
    else if (type == F32) for (int j = 0; j < width; j++) reinterpret_cast<float*>(out)[at + j] = codes[j] * scale;
    else for (int j = 0; j < width; j++) write(out, at + j, type, codes[j] * scale);
}

#if X86
AVX2 void write_floats_avx2(const int8_t* codes, float scale, float* out) {
    for (int j = 0; j < 32; j += 8) {
        __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + j)));
        _mm256_storeu_ps(out + j, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale)));
    }
}

// The same as bf16, rounded to the nearest, ties to even.
AVX2 void write_bf16_avx2(const int8_t* codes, float scale, uint16_t* out) {
    for (int j = 0; j < 32; j += 16) {
        __m256i rounded[2];
        for (int part = 0; part < 2; part++) {
            __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + j + 8 * part)));
            __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale)));
            __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
            rounded[part] = _mm256_srli_epi32(bits, 16);
        }
        __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xD8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), both);
    }
}

template <int BITS, int FORM>
AVX2 void expand_run_avx2(const uint8_t*& values, const uint64_t* mask, int8_t* codes) {
    __m256i both[2];
    if constexpr (FORM == TWO_FOUR) {
        expand_two_four<BITS>(values, *mask, both);
        values += 4 * BITS;
    } else {
        expand_avx2<BITS, FORM>(values, mask, both);
    }
    for (int half = 0; half < 2; half++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * half), both[half]);
}
#endif

// A tile's dense rows, `out` being where its first row begins.
template <int BITS, int FORM>
void expand_integer_tile(const Integers& m, int64_t tile, char* out, Type type, Level level) {
    const uint64_t* mask = m.masks + tile * m.blocks * R;
    const uint8_t* values = m.values + m.starts[tile];
    for (int64_t block = 0; block < m.blocks; block++) {
        int8_t codes[R][64];
        for (int run = 0; run < R; run++, mask++) {
            int8_t codes_of_run[64];
#if X86
            if (level >= LEVEL_AVX2) expand_run_avx2<BITS, FORM>(values, mask, codes_of_run);
            else
#endif
                expand_plain<BITS, FORM>(values, mask, codes_of_run);
            constexpr int piece = FORM == TWO_FOUR ? 64 : 16;
            for (int at = 0; at < 64; at += piece)
                std::memcpy(codes[row_of(Form(FORM), run, at)] + column_of(Form(FORM), run, at), codes_of_run + at, piece);
        }
        for (int r = 0; r < R && tile * R + r < m.rows; r++)
            for (int half = 0; half < 2; half++) {
                int64_t first = block * 64 + half * 32;
                int width = int(std::min<int64_t>(32, m.cols - first));
                if (width <= 0) break;
                float scale = read(m.scales, m.scale_index(tile, block, half) + r, m.scale_type);
#if X86
                if (level >= LEVEL_AVX2 && width == 32 && (type == F32 || type == BF16)) {
                    int64_t at = r * m.cols + first;
                    if (type == F32) write_floats_avx2(codes[r] + 32 * half, scale, reinterpret_cast<float*>(out) + at);
                    else write_bf16_avx2(codes[r] + 32 * half, scale, reinterpret_cast<uint16_t*>(out) + at);
                    continue;
                }
#endif
                write_scaled(codes[r] + 32 * half, width, scale, out, r * m.cols + first, type);
            }
    }
}

void expand_integers(const Integers& m, int64_t tile, Type from, Form form, char* out, Type type, Level level) {
    auto expand = from == INT8 ? (form == FULL       ? expand_integer_tile<8, FULL>
                                  : form == TWO_FOUR ? expand_integer_tile<8, TWO_FOUR>
                                                     : expand_integer_tile<8, MASKED>)
                               : (form == FULL       ? expand_integer_tile<4, FULL>
                                  : form == TWO_FOUR ? expand_integer_tile<4, TWO_FOUR>
                                                     : expand_integer_tile<4, MASKED>);
    expand(m, tile, out, type, level);
}

}  // namespace
