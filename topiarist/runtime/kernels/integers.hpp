// y = x W^T for a W of 8-bit or 4-bit integers with scales, stored with or without its zeros.
//
// x is rounded to 8 bits per token and 32 columns (as Q8_0 of llama.cpp does), products are summed exactly in integers
// over those 32 columns, and each such sum is scaled and added in fp32. Four rows make a tile, 64 columns a block, and a
// block of a tile four runs of 64 weights: sixteen columns of all four rows, row after row, so that one vector's products
// are scaled for four rows at once; in the form TWO_FOUR all 64 columns of one row.
//
//   masks   [tiles][blocks][4]  uint64: a bit for every weight of a run, set = it is stored; absent in the form FULL;
//                               positions in the form TWO_FOUR, see two_four.hpp
//   values  int8, or two's complement nibbles, low one first; the nibbles of a run begin a new byte;
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

// Where weight `at` of run `run` of a block stands.
inline int row_of(Form form, int run, int at) { return form == TWO_FOUR ? run : at / 16; }
inline int column_of(Form form, int run, int at) { return form == TWO_FOUR ? at : 16 * run + at % 16; }

// The scale indices of a tile from the left, 32 columns a step. No division: one takes as long as a run of weights.
struct ScaleSteps {
    int64_t index, last, group, left;
    ScaleSteps(const Integers& m, int64_t tile)
        : index(tile * m.groups * R), last(index + (m.groups - 1) * R), group(m.group), left(m.group) {}
    int64_t next() {
        int64_t here = index;
        left -= 32;
        if (left <= 0 && index < last) index += R, left = group;
        return here;
    }
};

// ------------------------------------------------------------------------------------------------ inputs as 8 bits

// Codes [batch][blocks][64], sums [batch][blocks][2][4] and scales [batch][blocks][2]. Weights that carry `offset` more than
// they are, which makes them unsigned, add that many times x to their product: the sums are to be added to make up for it.
// Each is over eight of 32 columns: four of the first sixteen and four of the others.
struct IntegerInputs : Aligned {
    int64_t stride, sum_stride, scale_stride;
    int32_t* sums;
    float* scales;

    IntegerInputs(const char* x, Type x_type, int64_t batch, const Integers& m, Type weight_type)
        : Aligned(batch * m.blocks * (64 + 8 * 4 + 2 * 4)), stride(m.blocks * 64), sum_stride(m.blocks * 8),
          scale_stride(m.blocks * 2), sums(reinterpret_cast<int32_t*>(data + batch * stride)),
          scales(reinterpret_cast<float*>(sums + batch * sum_stride)) {
        for (int64_t b = 0; b < batch; b++)
            for (int64_t part = 0; part < scale_stride; part++) {
                float values[32] = {};
                int64_t first = part * 32, width = std::min<int64_t>(32, m.cols - first);
                for (int64_t j = 0; j < width; j++) values[j] = read(x, b * m.cols + first + j, x_type);
                char* codes = data + b * stride + first;
                scales[b * scale_stride + part] = round_to_codes(values, codes);
                for (int i = 0; i < 4; i++) {
                    int32_t sum = 0;
                    for (int j = 4 * i; j < 4 * i + 4; j++) sum += int8_t(codes[j]) + int8_t(codes[16 + j]);
                    sums[b * sum_stride + part * 4 + i] = -offset(weight_type) * sum;
                }
            }
    }

    static constexpr int32_t offset(Type weight_type) { return weight_type == INT8 ? 128 : 8; }

    // A NaN or Inf in x gives a NaN scale, and so NaN in every sum, as it would in the dense product.
    static float round_to_codes(const float* values, char* codes) {
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
            codes[j] = char(bits - 0x4B400000);
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

// Writes the 64 codes of a run and steps to the next.
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
    for (int64_t block = 0; block < m.blocks; block++) {
        int32_t products[2][R][N] = {};
        for (int run = 0; run < R; run++) {
            int8_t codes[64];
            expand_plain<BITS, FORM>(values, masks++, codes);
            for (int b = 0; b < N; b++) {
                const char* x = in.data + (first + b) * in.stride + block * 64;
                for (int at = 0; at < 64; at++) {
                    int column = column_of(Form(FORM), run, at);
                    products[column / 32][row_of(Form(FORM), run, at)][b] += codes[at] * int8_t(x[column]);
                }
            }
        }
        for (int half = 0; half < 2; half++)
            for (int r = 0; r < R; r++) {
                float scale = read(m.scales, m.scale_index(tile, block, half) + r, m.scale_type);
                for (int b = 0; b < N; b++)
                    sums[r * N + b] +=
                        float(products[half][r][b]) * (scale * in.scales[(first + b) * in.scale_stride + 2 * block + half]);
            }
    }
}

}  // namespace
