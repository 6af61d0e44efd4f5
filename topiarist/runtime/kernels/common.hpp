// What all kernels share: the weight as Python describes it, number formats, the pool of threads.
//
// Every instruction set is compiled into one library and chosen at run time. OpenMP symbols are left undefined on
// purpose: they resolve to the runtime that torch has loaded, so both share one pool of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX512 \
    __attribute__((                                                                                                     \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx2,bmi,bmi2,popcnt,fma,f16c")))
#define AVX512_BF16                                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,bmi,bmi2," \
                          "popcnt,fma,f16c")))
#define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt,fma,f16c")))
#else
#define AVX2
#endif

namespace {

enum Type { BF16 = 0, F16 = 1, F32 = 2, INT8 = 3, INT4 = 4 };
enum Form { MASKED = 0, TWO_FOUR = 1, FULL = 2 };
enum Level { PLAIN = 0, LEVEL_AVX2 = 1, LEVEL_AVX512 = 2, LEVEL_AVX512_BF16 = 3 };

constexpr int R = 4;          // rows of W in a tile
constexpr int MAX_BATCH = 4;  // rows of x that share one expansion

// Products fill the window of instructions in flight, so values must be asked for well ahead: faster by up to
// 60 % (fp32, batch 4). From 2 to 8 KB ahead makes no difference.
constexpr int AHEAD = 2048;

// A matrix (rows, cols) as `Weight` in build.py fills it in; how values lie is said in floats.hpp and integers.hpp.
struct Weight {
    int64_t rows, cols;
    int64_t group;  // columns of a row that share a scale; integers only
    int32_t type, form, scale_type, bias_type;
    const void* masks;
    const void* values;
    const int64_t* starts;
    const void* scales;
    const void* bias;  // [rows] or null
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

// A finished sum, with its bias, as element `at` of y.
void finish(const Weight& w, int64_t row, float sum, char* y, int64_t at, Type y_type) {
    if (w.bias) sum += read(static_cast<const char*>(w.bias), row, Type(w.bias_type));
    write(y, at, y_type, sum);
}

size_t size_of(Type type) { return type == F32 ? 4 : 2; }

// x as kernels read it: a copy in memory of our own, at a multiple of 64 bytes.
struct Aligned {
    std::vector<char> memory;
    char* data;
    explicit Aligned(int64_t bytes) : memory(size_t(bytes + 64)) {
        data = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    }
};

#if X86
AVX2 inline float sum_of_four(__m128 v) {
    alignas(16) float lane[4];
    _mm_store_ps(lane, v);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

AVX2 inline float sum_of_eight(__m256 v) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, v);
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}
#endif

// Tiles are handed out in chunks as threads become free: a core that is busy with other work then costs little.
template <class Body>
void parallel_tiles(int64_t tiles, int threads, Body body) {
    int64_t chunk = std::max<int64_t>(1, tiles / (threads * 16));
    int64_t chunks = (tiles + chunk - 1) / chunk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < chunks; i++)
        for (int64_t tile = i * chunk; tile < std::min(tiles, (i + 1) * chunk); tile++) body(tile);
}

}  // namespace
