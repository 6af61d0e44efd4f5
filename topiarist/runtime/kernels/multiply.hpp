// The product with any weight, whichever way it is stored.
#pragma once

#include "dense.hpp"
#include "floats.hpp"
#include "panels.hpp"

namespace {

// How many rows of x the next kernel takes.
int step(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// y [batch][rows] = x [batch][cols] W^T + bias
void multiply(const Weight& w, const void* x_, Type x_type, int64_t batch, void* y_, Type y_type, Level level, int threads) {
    const char* x = static_cast<const char*>(x_);
    char* y = static_cast<char*>(y_);
    Type type = Type(w.type);
    int64_t tiles = (w.rows + R - 1) / R;
    auto store = [&](int64_t tile, int64_t first, int now, const float* sums) {
        for (int r = 0; r < R && tile * R + r < w.rows; r++)
            for (int b = 0; b < now; b++)
                finish(w, tile * R + r, sums[r * now + b], y, (first + b) * w.rows + tile * R + r, y_type);
    };
    if (type >= INT8) {
        Integers m(w);
        IntegerInputs inputs(x, x_type, batch, m, type);
        parallel_tiles(tiles, threads, [&](int64_t tile) {
            for (int64_t first = 0; first < batch; first += step(batch - first)) {
                int now = step(batch - first);
                float sums[R * MAX_BATCH];
                integer_tile_for(type, Form(w.form), now, level)(m, tile, inputs, first, sums);
                store(tile, first, now, sums);
            }
        });
    } else if (w.form == FULL) {
        Aligned floats(batch * w.cols * 4);
        float* from = reinterpret_cast<float*>(floats.data);
        for (int64_t i = 0; i < batch * w.cols; i++) from[i] = read(x, i, x_type);
        parallel_tiles(w.rows, threads, [&](int64_t row) {
            for (int64_t first = 0; first < batch; first += step(batch - first)) {
                int now = step(batch - first);
                float sums[MAX_BATCH];
                dense_row_for(now, level, type)(static_cast<const char*>(w.values), type, w.cols, row,
                                                from + first * w.cols, sums);
                for (int b = 0; b < now; b++) finish(w, row, sums[b], y, (first + b) * w.rows + row, y_type);
            }
        });
    } else {
        Matrix m(w);
        FloatInputs inputs(x, x_type, batch, m, level, type);
        parallel_tiles(tiles, threads, [&](int64_t tile) {
            for (int64_t first = 0; first < batch; first += MAX_BATCH) {
                int now = int(std::min<int64_t>(MAX_BATCH, batch - first));
                float sums[R * MAX_BATCH];
                tile_for(now, level, type)(m, tile, inputs.data + first * inputs.stride, inputs.stride, sums);
                store(tile, first, now, sums);
            }
        });
    }
}

}  // namespace
