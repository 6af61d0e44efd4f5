// The C interface of the kernels, called from build.py.

#include "decoder.hpp"

extern "C" {

// The best instruction set this processor has; see `Level`.
int topiarist_level() {
#if X86
    __builtin_cpu_init();
    bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("avx512vnni");
    if (has_512) return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return LEVEL_AVX2;
#endif
    return PLAIN;
}

// First step of packing: the masks of dense floats, and how many values each tile has.
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

// The same two steps for integer codes; sizes are bytes of values a tile.
void topiarist_find_integer_masks(int type, int form, int64_t rows, int64_t cols, const int8_t* codes, uint64_t* masks,
                                  int64_t* sizes, int threads) {
    parallel_tiles((rows + R - 1) / R, threads, [&](int64_t tile) {
        sizes[tile] = find_integer_masks(codes, rows, cols, tile, Type(type), Form(form), masks);
    });
}

void topiarist_gather_integers(int type, int form, int64_t rows, int64_t cols, const int8_t* codes,
                               const uint64_t* masks, const int64_t* starts, uint8_t* values, int threads) {
    parallel_tiles((rows + R - 1) / R, threads, [&](int64_t tile) {
        gather_integers(codes, rows, cols, tile, Type(type), Form(form), masks, values + starts[tile]);
    });
}

// y [batch][rows] = x [batch][cols] W^T + bias
void topiarist_multiply(const Weight* w, const void* x, int x_type, int64_t batch, void* y, int y_type, int level,
                        int threads) {
    multiply(*w, x, Type(x_type), batch, y, Type(y_type), Level(level), threads);
}

// Whether `topiarist_multiply_by_panels` is there and the fastest way for this weight.
int topiarist_has_panels(const Weight* w) {
#if X86
    static const bool fast = topiarist_level() >= LEVEL_AVX512_BF16 && !has_amx();
    return fast && (w->type >= INT8 || (w->type == BF16 && w->form != FULL));
#endif
    return 0;
}

// y [batch][rows] = x [batch][cols] W^T + bias, x and y bf16; for many rows of x.
void topiarist_multiply_by_panels(const Weight* w, const uint16_t* x, int64_t batch, uint16_t* y, int threads) {
#if X86
    multiply_by_panels(*w, x, batch, y, threads);
#endif
}

// Tiles [begin, end) as dense rows: floats of the weight's own type or fp32, integers as `out_type` says.
void topiarist_expand(const Weight* w, int64_t begin, int64_t end, void* out, int out_type, int level_, int threads) {
    Type type = Type(w->type), to = Type(out_type);
    Level level = Level(level_);
    int64_t step = R * w->cols * (to == INT8 ? 1 : int64_t(size_of(to)));
    parallel_tiles(end - begin, threads, [&](int64_t i) {
        char* at = static_cast<char*>(out) + i * step;
        int64_t tile = begin + i;
#if X86
        if (type >= INT8 && to == BF16 && level == LEVEL_AVX512_BF16)
            return expand_rows(*w, tile, reinterpret_cast<uint16_t*>(at), w->cols);
#endif
        if (type >= INT8) expand_integers(Integers(*w), tile, type, Form(w->form), at, to, level);
        else if (type == F32) expand_tile(Matrix(*w), tile, reinterpret_cast<uint32_t*>(at), level);
        else if (to != F32) expand_tile(Matrix(*w), tile, reinterpret_cast<uint16_t*>(at), level);
        else if (type == BF16) expand_tile_to_floats<BF16>(Matrix(*w), tile, reinterpret_cast<float*>(at), level);
        else expand_tile_to_floats<F16>(Matrix(*w), tile, reinterpret_cast<float*>(at), level);
    });
}

// Rows `indices` of a weight, in fp32.
void topiarist_rows(const Weight* w, const int64_t* indices, int64_t count, float* out, int level) {
    std::vector<float> row4(size_t(R * w->cols));
    for (int64_t i = 0; i < count; i++) read_row(*w, indices[i], Level(level), row4.data(), out + i * w->cols);
}

int64_t topiarist_workspace_size(const Decoder* decoder, int64_t batch) { return workspace_size(*decoder, batch); }

// tokens [batch], all at `position`; logits [batch][vocabulary] in fp32.
void topiarist_step(const Decoder* decoder, const int64_t* tokens, int64_t batch, int64_t position, float* workspace,
                    float* logits) {
    step_decoder(*decoder, tokens, batch, position, workspace, logits);
}

}  // extern "C"
