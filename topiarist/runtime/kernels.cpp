// y = x W^T + bias for a W stored without its zeros, a few rows of x at a time.
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
//   x       [batch][cols]       same type as the values; y [batch][rows] likewise; bias [rows] or null
//
// Rows and columns that fill up the last tile and block have no bits. Sums are fp32, rounded once on the way out.
// Every instruction set is compiled into one library and chosen at run time. OpenMP symbols are left undefined on
// purpose: they resolve to the runtime that torch has loaded, so both share one pool of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,bmi2,popcnt,fma,f16c")))
#define AVX512_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt,fma,f16c")))
#define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt,fma,f16c")))
#endif

namespace {

enum Type { BF16 = 0, F16 = 1, F32 = 2 };
enum Level { PLAIN = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3 };

constexpr int R = 4;          // rows of W in a tile
constexpr int MAX_BATCH = 4;  // rows of x that share one expansion

// Products fill the window of instructions in flight, so values must be asked for well ahead: faster by up to
// 60 % (fp32, batch 4). From 2 to 8 KB ahead makes no difference.
constexpr int AHEAD = 2048;

struct Matrix {
    int64_t rows, cols, blocks, tiles;
    const uint32_t* masks;
    const char* values;
    const int64_t* starts;

    Matrix(int64_t rows, int64_t cols, const uint32_t* masks, const void* values, const int64_t* starts)
        : rows(rows), cols(cols), blocks((cols + 31) / 32), tiles((rows + R - 1) / R), masks(masks),
          values(static_cast<const char*>(values)), starts(starts) {}
};

// ---------------------------------------------------------------------------------------------- scalar conversions

float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return uint16_t(bits >> 16 | 0x40);  // stays a NaN even if its payload was in the low half
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_f16(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    float value;
    if (exponent == 0) {
        value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    uint32_t wide = sign | (exponent == 31 ? 0xFFu : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_f16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7C00);
    if (magnitude < 0x38800000) {  // denormal: let the adder round to a multiple of 2^-24
        float absolute, shifted;
        std::memcpy(&absolute, &magnitude, 4);
        shifted = absolute + 0.5f;
        std::memcpy(&bits, &shifted, 4);
        return uint16_t(sign | (bits - 0x3F000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
}

float read(const char* at, int64_t index, Type type) {
    if (type == F32) return reinterpret_cast<const float*>(at)[index];
    uint16_t bits = reinterpret_cast<const uint16_t*>(at)[index];
    return type == BF16 ? from_bf16(bits) : from_f16(bits);
}

void write(char* at, int64_t index, Type type, float value) {
    if (type == F32) reinterpret_cast<float*>(at)[index] = value;
    else reinterpret_cast<uint16_t*>(at)[index] = type == BF16 ? to_bf16(value) : to_f16(value);
}

// ------------------------------------------------------------------------------------------------ a tile times x
// tile<N>(matrix, tile, x, stride, sums): sums[r * N + b] = W[4 tile + r] . x[b] for b < N; x as `Inputs` lays it out.

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
        for (int b = 0; b < N; b++) {
            alignas(32) float lane[8];
            _mm256_store_ps(lane, acc[r][b]);
            sums[r * N + b] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
        }
}

// 32 weights as two vectors of floats. bf16 gives the even ones, then the odd ones; `Inputs` splits x likewise.
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

// x as the tile kernels read it: padded with zeros to whole blocks, 64-byte aligned, fp32 unless bf16 is used as it is.
struct Inputs {
    std::vector<char> memory;
    char* data;
    int64_t stride;
    Inputs(const char* x, int64_t batch, const Matrix& m, Level level, Type type) {
        bool as_is = level == LEVEL_AVX512_BF16 && type == BF16;
        bool split = level == LEVEL_AVX512 && type == BF16;
        stride = m.blocks * 32 * (as_is ? 2 : 4);
        memory.resize(size_t(batch * stride + 64));
        data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
        for (int64_t b = 0; b < batch; b++) {
            char* out = data + b * stride;
            if (as_is) {
                std::memcpy(out, x + b * m.cols * 2, size_t(m.cols * 2));
                continue;
            }
            float* to = reinterpret_cast<float*>(out);
            for (int64_t col = 0; col < m.cols; col++) {
                int64_t place = split ? (col & ~31) + (col & 31) / 2 + (col & 1) * 16 : col;
                to[place] = read(x, b * m.cols + col, type);
            }
        }
    }
};

// Tiles are handed out in chunks as threads become free: a core that is busy with other work then costs little.
template <class Body>
void parallel_tiles(int64_t tiles, int threads, Body body) {
    int64_t chunk = std::max<int64_t>(1, tiles / (threads * 16));
    int64_t chunks = (tiles + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < chunks; i++)
        for (int64_t tile = i * chunk; tile < std::min(tiles, (i + 1) * chunk); tile++) body(tile);
}

template <class Element>
void expand_block(const Element* values, uint32_t bits, Element* out, int width) {
    for (int j = 0; j < width; j++) out[j] = bits >> j & 1 ? *values++ : Element(0);
}

#if X86
AVX512 void expand_block_avx512(const uint16_t* values, uint32_t bits, uint16_t* out, int width) {
    __m512i v = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
    _mm512_mask_storeu_epi16(out, uint32_t((uint64_t(1) << width) - 1), v);
}
#endif

template <class Element>
void expand_tile(const Matrix& m, int64_t tile, Element* out, Level level) {
    const uint32_t* masks = m.masks + tile * m.blocks * R;
    const Element* values = reinterpret_cast<const Element*>(m.values) + m.starts[tile];
    int rows = int(std::min<int64_t>(R, m.rows - tile * R));
    for (int64_t block = 0; block < m.blocks; block++)
        for (int r = 0; r < R; r++) {
            uint32_t bits = *masks++;
            if (r >= rows) continue;
            Element* to = out + r * m.cols + block * 32;
            int width = int(std::min<int64_t>(32, m.cols - block * 32));
#if X86
            if (sizeof(Element) == 2 && level >= LEVEL_AVX512)
                expand_block_avx512(reinterpret_cast<const uint16_t*>(values), bits, reinterpret_cast<uint16_t*>(to), width);
            else
#endif
                expand_block(values, bits, to, width);
            values += __builtin_popcount(bits);
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

// --------------------------------------------------------------------------------------------------- C interface

extern "C" {

// The best instruction set this processor has; see `Level`.
int topiarist_level() {
#if X86
    __builtin_cpu_init();
    bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vbmi2");
    if (has_512) return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LEVEL_AVX2;
#endif
    return PLAIN;
}

// First step of packing: the masks of a dense weight, and how many values each tile has.
void topiarist_find_masks(int type, int64_t rows, int64_t cols, const void* weight, uint32_t* masks, int64_t* counts,
                          int threads) {
    Matrix m(rows, cols, nullptr, nullptr, nullptr);
    parallel_tiles(m.tiles, threads, [&](int64_t tile) {
        counts[tile] = type == F32 ? find_masks(static_cast<const uint32_t*>(weight), m, tile, masks)
                                   : find_masks(static_cast<const uint16_t*>(weight), m, tile, masks);
    });
}

// Second step: the values, in the order of the masks.
void topiarist_gather_values(int type, int64_t rows, int64_t cols, const void* weight, const uint32_t* masks,
                             const int64_t* starts, void* values, int threads) {
    Matrix m(rows, cols, masks, nullptr, starts);
    parallel_tiles(m.tiles, threads, [&](int64_t tile) {
        if (type == F32) gather_values(static_cast<const uint32_t*>(weight), m, tile, static_cast<uint32_t*>(values));
        else gather_values(static_cast<const uint16_t*>(weight), m, tile, static_cast<uint16_t*>(values));
    });
}

// y [batch][rows] = x [batch][cols] W^T + bias
void topiarist_multiply(int level, int type, int64_t rows, int64_t cols, const uint32_t* masks, const void* values,
                        const int64_t* starts, const void* x, int64_t batch, const void* bias, void* y, int threads) {
    Matrix m(rows, cols, masks, values, starts);
    Type t = Type(type);
    Inputs inputs(static_cast<const char*>(x), batch, m, Level(level), t);
    parallel_tiles(m.tiles, threads, [&](int64_t tile) {
        for (int64_t first = 0; first < batch; first += MAX_BATCH) {
            int now = int(std::min<int64_t>(MAX_BATCH, batch - first));
            float sums[R * MAX_BATCH];
            tile_for(now, Level(level), t)(m, tile, inputs.data + first * inputs.stride, inputs.stride, sums);
            for (int r = 0; r < R && tile * R + r < rows; r++)
                for (int b = 0; b < now; b++) {
                    float sum = sums[r * now + b];
                    if (bias) sum += read(static_cast<const char*>(bias), tile * R + r, t);
                    write(static_cast<char*>(y), (first + b) * rows + tile * R + r, t, sum);
                }
        }
    });
}

// Tiles [begin, end) as dense rows of the same type.
void topiarist_expand(int level, int type, int64_t rows, int64_t cols, const uint32_t* masks, const void* values,
                      const int64_t* starts, int64_t begin, int64_t end, void* out, int threads) {
    Matrix m(rows, cols, masks, values, starts);
    parallel_tiles(end - begin, threads, [&](int64_t i) {
        if (type == F32) expand_tile(m, begin + i, static_cast<uint32_t*>(out) + i * R * cols, Level(level));
        else expand_tile(m, begin + i, static_cast<uint16_t*>(out) + i * R * cols, Level(level));
    });
}

}  // extern "C"
