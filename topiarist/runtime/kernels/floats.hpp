// y = x W^T for a W of floats stored without its zeros, a few rows of x at a time.
//
// Decoding is bound by the bytes of W, so W is read packed and expanded in registers: a bit per weight says where the
// next values go. Products are then those of the dense matrix, zeros included: 0 * Inf is NaN here as it is there.
//
// Four rows of W make a tile, 32 columns a block. Masks and values of a tile lie in the order in which they are used,
// so memory sees two streams that run straight through the whole matrix, and four rows share every load of x:
//
//   masks   [tiles][blocks][4]  uint32: bit j of (tile, block, r) set = weight (4 tile + r, 32 block + j) is stored
//   values  flat, in the order of the masks' bits; 64 bytes past the last one may be read
//   starts  [tiles]             where a tile's values begin, in elements
//
// Rows and columns that fill up the last tile and block have no bits. Sums are fp32, rounded once on the way out.
#pragma once

#include "common.hpp"

namespace {

struct Matrix {
    int64_t rows, cols, blocks, tiles;
    const uint32_t* masks;
    const char* values;
    const int64_t* starts;

    Matrix(int64_t rows, int64_t cols, const void* masks, const void* values, const int64_t* starts)
        : rows(rows), cols(cols), blocks((cols + 31) / 32), tiles((rows + R - 1) / R),
          masks(static_cast<const uint32_t*>(masks)), values(static_cast<const char*>(values)), starts(starts) {}
    explicit Matrix(const Weight& w) : Matrix(w.rows, w.cols, w.masks, w.values, w.starts) {}
};

// ------------------------------------------------------------------------------------------------ a tile times x
// tile<N>(matrix, tile, x, stride, sums): sums[r * N + b] = W[4 tile + r] . x[b] for b < N; x as `FloatInputs` lays it out.

template <int N, Type T>
void tile_plain(const Matrix& m, int64_t tile, const char* x, int64_t stride, float* sums) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    int64_t at = m.starts[tile];
    for (int i = 0; i < R * N; i++) sums[i] = 0;
    for (int64_t block = 0; block < m.blocks; block++, x += 32 * 4)
        for (int r = 0; r < R; r++) {
            uint32_t bits = *masks++;
            int width = int(std::min<int64_t>(32, m.cols - 32 * block));
            for (int j = 0; j < width; j++) {
                float weight = bits >> j & 1 ? read(m.values, at++, T) : 0.0f;
                for (int b = 0; b < N; b++) sums[r * N + b] += weight * reinterpret_cast<const float*>(x + b * stride)[j];
            }
        }
}

#if X86

// AVX2 has no expand: eight values are moved to their places by a shuffle looked up from their eight mask bits.
struct Tables {
    alignas(64) uint8_t words[256][16];  // pshufb: which two bytes go to each of eight 16-bit places; 0x80 gives zero
    alignas(64) int32_t floats[256][8];  // permutevar8x32: which float goes to each of eight places
    Tables() {
        for (int bits = 0; bits < 256; bits++)
            for (int place = 0, next = 0; place < 8; place++) {
                bool set = bits >> place & 1;
                words[bits][2 * place] = uint8_t(set ? 2 * next : 0x80);
                words[bits][2 * place + 1] = uint8_t(set ? 2 * next + 1 : 0x80);
                floats[bits][place] = set ? next++ : 0;
            }
    }
};
const Tables tables;

template <Type T>
AVX2 inline __m256 eight_weights(const char*& values, unsigned bits) {
    const char* from = values;
    values += _mm_popcnt_u32(bits) * (T == F32 ? 4 : 2);
    if constexpr (T == F32) {
        __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(tables.floats[bits]));
        __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(from)), order);
        __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        __m256i stored = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), places), places);
        return _mm256_and_ps(moved, _mm256_castsi256_ps(stored));
    } else {
        __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(tables.words[bits]));
        __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), order);
        if constexpr (T == F16) return _mm256_cvtph_ps(moved);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(moved), 16));
    }
}

template <int N, Type T>
AVX2 void tile_avx2(const Matrix& m, int64_t tile, const char* x, int64_t stride, float* sums) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const char* values = m.values + m.starts[tile] * (T == F32 ? 4 : 2);
    __m256 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm256_setzero_ps();
    for (int64_t block = 0; block < m.blocks; block++, masks += R, x += 128)
        for (int r = 0; r < R; r++) {
            _mm_prefetch(values + AHEAD, _MM_HINT_T0);
            for (int part = 0; part < 4; part++) {
                __m256 weight = eight_weights<T>(values, masks[r] >> 8 * part & 255);
                for (int b = 0; b < N; b++) {
                    __m256 input = _mm256_load_ps(reinterpret_cast<const float*>(x + part * 32 + b * stride));
                    acc[r][b] = _mm256_fmadd_ps(weight, input, acc[r][b]);
                }
            }
        }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = sum_of_eight(acc[r][b]);
}

// 32 weights as two vectors of floats. bf16 gives the even ones, then the odd ones; `FloatInputs` splits x likewise.
template <Type T>
AVX512 inline void expand_to_floats(const char*& values, uint32_t bits, __m512& first, __m512& second) {
    if constexpr (T == F32) {
        first = _mm512_maskz_expand_ps(__mmask16(bits), _mm512_loadu_ps(values));
        values += _mm_popcnt_u32(bits & 0xFFFF) * 4;
        second = _mm512_maskz_expand_ps(__mmask16(bits >> 16), _mm512_loadu_ps(values));
        values += _mm_popcnt_u32(bits >> 16) * 4;
    } else {
        __m512i v = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
        values += _mm_popcnt_u32(bits) * 2;
        if constexpr (T == BF16) {
            first = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
            second = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xFFFF0000))));
        } else {
            first = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
            second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
        }
    }
}

template <int N, Type T>
AVX512 void tile_avx512(const Matrix& m, int64_t tile, const char* x, int64_t stride, float* sums) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const char* values = m.values + m.starts[tile] * (T == F32 ? 4 : 2);
    __m512 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t block = 0; block < m.blocks; block++, masks += R, x += 128) {
        __m512 first[R], second[R];
        for (int r = 0; r < R; r++) {
            expand_to_floats<T>(values, masks[r], first[r], second[r]);
            _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        }
        for (int b = 0; b < N; b++) {
            __m512 input = _mm512_load_ps(x + b * stride), next = _mm512_load_ps(x + b * stride + 64);
            for (int r = 0; r < R; r++) acc[r][b] = _mm512_fmadd_ps(first[r], input, acc[r][b]);
            for (int r = 0; r < R; r++) acc[r][b] = _mm512_fmadd_ps(second[r], next, acc[r][b]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = _mm512_reduce_add_ps(acc[r][b]);
}

AVX512_BF16 inline __m512bh as_bf16(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

template <int N>
AVX512_BF16 void tile_bf16_dot(const Matrix& m, int64_t tile, const char* x, int64_t stride, float* sums) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const char* values = m.values + m.starts[tile] * 2;
    __m512 acc[R][N];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t block = 0; block < m.blocks; block++, masks += R, x += 64) {
        __m512bh weight[R];
        for (int r = 0; r < R; r++) {
            weight[r] = as_bf16(_mm512_maskz_expand_epi16(masks[r], _mm512_loadu_si512(values)));
            values += _mm_popcnt_u32(masks[r]) * 2;
            _mm_prefetch(values + AHEAD, _MM_HINT_T0);
        }
        for (int b = 0; b < N; b++) {
            __m512bh input = as_bf16(_mm512_load_si512(x + b * stride));
            for (int r = 0; r < R; r++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], weight[r], input);
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < N; b++) sums[r * N + b] = _mm512_reduce_add_ps(acc[r][b]);
}

#endif

// ------------------------------------------------------------------------------------------------------- dispatch

using Tile = void (*)(const Matrix&, int64_t, const char*, int64_t, float*);

template <int N>
Tile tile_of(Level level, Type type) {
#if X86
    if (level == LEVEL_AVX512_BF16 && type == BF16) return tile_bf16_dot<N>;
    if (level >= LEVEL_AVX512)
        return type == BF16 ? tile_avx512<N, BF16> : type == F16 ? tile_avx512<N, F16> : tile_avx512<N, F32>;
    if (level == LEVEL_AVX2)
        return type == BF16 ? tile_avx2<N, BF16> : type == F16 ? tile_avx2<N, F16> : tile_avx2<N, F32>;
#endif
    return type == BF16 ? tile_plain<N, BF16> : type == F16 ? tile_plain<N, F16> : tile_plain<N, F32>;
}

Tile tile_for(int batch, Level level, Type type) {
    switch (batch) {
        case 1: return tile_of<1>(level, type);
        case 2: return tile_of<2>(level, type);
        case 3: return tile_of<3>(level, type);
        default: return tile_of<4>(level, type);
    }
}

// x as the tile kernels read it: padded with zeros to whole blocks, fp32 unless bf16 is used as it is.
struct FloatInputs : Aligned {
    int64_t stride;
    FloatInputs(const char* x, Type x_type, int64_t batch, const Matrix& m, Level level, Type type)
        : Aligned(batch * m.blocks * 32 * 4), stride(m.blocks * 32 * 4) {
        bool as_bf16 = level == LEVEL_AVX512_BF16 && type == BF16;
        bool split = level == LEVEL_AVX512 && type == BF16;
        if (as_bf16) stride /= 2;
        for (int64_t b = 0; b < batch; b++) {
            float* floats = reinterpret_cast<float*>(data + b * stride);
            uint16_t* halves = reinterpret_cast<uint16_t*>(data + b * stride);
            for (int64_t col = 0; col < m.cols; col++) {
                float value = read(x, b * m.cols + col, x_type);
                if (as_bf16) halves[col] = to_bf16(value);
                else floats[split ? (col & ~31) + (col & 31) / 2 + (col & 1) * 16 : col] = value;
            }
        }
    }
};

template <class Element>
void expand_block(const Element* values, uint32_t bits, Element* out, int width) {
    for (int j = 0; j < width; j++) out[j] = bits >> j & 1 ? *values++ : Element(0);
}

#if X86
// A tile's rows, of bf16 or fp16, `stride` apart; rows beyond the last are left as they are.
AVX512 void rows_of_16_bits(const Matrix& m, int64_t tile, uint16_t* out, int64_t stride) {
    const uint32_t* mask = m.masks + tile * m.blocks * R;
    const uint16_t* values = reinterpret_cast<const uint16_t*>(m.values) + m.starts[tile];
    const int rows = int(std::min<int64_t>(R, m.rows - tile * R));
    for (int64_t col = 0; col < m.cols; col += 32)
        for (int r = 0; r < R; r++, mask++) {
            __m512i block = _mm512_maskz_expand_epi16(*mask, _mm512_loadu_si512(values));
            values += _mm_popcnt_u32(*mask);
            _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
            if (r >= rows) continue;
            uint16_t* to = out + r * stride + col;
            if (m.cols - col >= 32) _mm512_storeu_si512(to, block);
            else _mm512_mask_storeu_epi16(to, (__mmask32(1) << (m.cols - col)) - 1, block);
        }
}
#endif

template <class Element>
void expand_tile(const Matrix& m, int64_t tile, Element* out, Level level) {
#if X86
    if (sizeof(Element) == 2 && level >= LEVEL_AVX512)
        return rows_of_16_bits(m, tile, reinterpret_cast<uint16_t*>(out), m.cols);
#endif
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const Element* values = reinterpret_cast<const Element*>(m.values) + m.starts[tile];
    int rows = int(std::min<int64_t>(R, m.rows - tile * R));
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++) {
            uint32_t bits = *masks++;
            if (r >= rows) continue;
            int width = int(std::min<int64_t>(32, m.cols - block * 32));
            expand_block(values, bits, out + r * m.cols + block * 32, width);
            values += __builtin_popcount(bits);
        }
}

#if X86
template <Type T>
AVX2 void expand_floats_avx2(const char*& values, uint32_t bits, float* out) {
    for (int part = 0; part < 4; part++)
        _mm256_storeu_ps(out + 8 * part, eight_weights<T>(values, bits >> 8 * part & 255));
}
#endif

// The same rows in fp32, from a weight of type T.
template <Type T>
void expand_tile_to_floats(const Matrix& m, int64_t tile, float* out, Level level) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const char* values = m.values + m.starts[tile] * int64_t(size_of(T));
    int rows = int(std::min<int64_t>(R, m.rows - tile * R));
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++) {
            uint32_t bits = *masks++;
            if (r >= rows) continue;
            float* to = out + r * m.cols + block * 32;
            int width = int(std::min<int64_t>(32, m.cols - block * 32));
#if X86
            if (level >= LEVEL_AVX2 && width == 32) {
                expand_floats_avx2<T>(values, bits, to);
                continue;
            }
#endif
            int next = 0;
            for (int j = 0; j < width; j++) to[j] = bits >> j & 1 ? read(values, next++, T) : 0.0f;
            values += next * int(size_of(T));
        }
}

// A -0.0 counts as a zero, unlike in a packed file: `weight * mask` makes half of all pruned weights -0.0.
template <class Element>
int64_t find_masks(const Element* weight, const Matrix& m, int64_t tile, uint32_t* masks) {
    int64_t count = 0;
    masks += tile * m.blocks * R;
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++) {
            uint32_t bits = 0;
            if (tile * R + r < m.rows) {
                const Element* from = weight + (tile * R + r) * m.cols + block * 32;
                int width = int(std::min<int64_t>(32, m.cols - block * 32));
                for (int j = 0; j < width; j++) bits |= uint32_t(Element(from[j] << 1) != 0) << j;
            }
            *masks++ = bits;
            count += __builtin_popcount(bits);
        }
    return count;
}

template <class Element>
void gather_values(const Element* weight, const Matrix& m, int64_t tile, Element* values) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    values += m.starts[tile];
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++)
            for (uint32_t bits = *masks++; bits; bits &= bits - 1)
                *values++ = weight[(tile * R + r) * m.cols + block * 32 + __builtin_ctz(bits)];
}

}  // namespace
