// One step of ALPS's ADMM on a weight: one pass over memory instead of a dozen. Symbols as in admm.py; W, D, U, T fp32, Y, Z bf16.
// Every number is rounded as torch rounds it, so that both ways give the same bits.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace {

constexpr int64_t LANES = 16, CHUNK = 256 * LANES;  // floats of a register, of a thread's turn

struct State {
  const float* W;
  float *D, *U;
  uint16_t* Y;
};

AVX512 inline __mmask16 lanes(int64_t left) { return __mmask16(left < LANES ? (1u << left) - 1 : 0xffff); }

// T = D + relaxation (W - Z - D) + U
AVX512 inline __m512 relaxed(const State& s, const uint16_t* Z, float relaxation, int64_t at, __mmask16 in) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, Z + at));
  const __m512 B = _mm512_sub_ps(_mm512_maskz_loadu_ps(in, s.W + at), _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
  const __m512 beyond = _mm512_sub_ps(B, _mm512_maskz_loadu_ps(in, s.D + at));
  const __m512 T = _mm512_fmadd_ps(_mm512_set1_ps(relaxation - 1.0f), beyond, B);
  return _mm512_add_ps(T, _mm512_maskz_loadu_ps(in, s.U + at));
}

// D = T where kept, U = growth (T - D), Y = W - D + U
AVX512 inline void project(const State& s, __m512 T, __mmask16 kept, float growth, int64_t at, __mmask16 in) {
  const __m512 D = _mm512_maskz_mov_ps(kept, T);
  const __m512 U = _mm512_mul_ps(_mm512_sub_ps(T, D), _mm512_set1_ps(growth));
  const __m512 Y = _mm512_add_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(in, s.W + at), D), U);
  _mm512_mask_storeu_ps(s.D + at, in, D);
  _mm512_mask_storeu_ps(s.U + at, in, U);
  const __m512i bits = _mm512_castps_si512(Y), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));  // to the nearest even
  _mm256_mask_storeu_epi16(s.Y + at, in, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// Which `keep` of every `of` neighbouring sizes are largest; of equals the first. `of` divides LANES.
AVX512 inline __mmask16 largest(__m512 sizes, int keep, int of, const __m512i* turned, const __mmask16* earlier) {
  __m512i beaten = _mm512_setzero_si512();
  for (int r = 1; r < of; ++r) {
    const __m512 other = _mm512_permutexvar_ps(turned[r], sizes);
    const __mmask16 beats = _mm512_cmp_ps_mask(other, sizes, _CMP_GT_OQ) |
                            (_mm512_cmp_ps_mask(other, sizes, _CMP_EQ_OQ) & earlier[r]);
    beaten = _mm512_mask_add_epi32(beaten, beats, beaten, _mm512_set1_epi32(1));
  }
  return _mm512_cmplt_epi32_mask(beaten, _mm512_set1_epi32(keep));
}

AVX512 void step_nm(const State& s, const uint16_t* Z, float relaxation, float growth, int keep, int of, int64_t from,
                    int64_t to) {
  __m512i turned[LANES];    // the lane that is r further in the same group, round and round
  __mmask16 earlier[LANES]; // whether that lane comes before
  for (int r = 1; r < of; ++r) {
    alignas(64) int32_t index[LANES];
    earlier[r] = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      index[lane] = lane / of * of + (lane + r) % of;
      if (index[lane] < lane) earlier[r] |= __mmask16(1u << lane);
    }
    turned[r] = _mm512_load_si512(index);
  }
  for (int64_t at = from; at < to; at += LANES) {
    const __mmask16 in = lanes(to - at);
    const __m512 T = relaxed(s, Z, relaxation, at, in);
    project(s, T, largest(_mm512_abs_ps(T), keep, of, turned, earlier), growth, at, in);
  }
}

AVX512 void relax(const State& s, const uint16_t* Z, float relaxation, float* T, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += LANES) {
    const __mmask16 in = lanes(to - at);
    _mm512_mask_storeu_ps(T + at, in, relaxed(s, Z, relaxation, at, in));
  }
}

AVX512 void project_masked(const State& s, const float* T, const uint8_t* mask, float growth, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += LANES) {
    const __mmask16 in = lanes(to - at);
    const __m128i bytes = _mm_maskz_loadu_epi8(in, mask + at);
    project(s, _mm512_maskz_loadu_ps(in, T + at), _mm_test_epi8_mask(bytes, bytes), growth, at, in);
  }
}

template <class Work>
void in_chunks(int64_t size, int threads, Work work) {
#pragma omp parallel for num_threads(threads)
  for (int64_t from = 0; from < size; from += CHUNK) work(from, std::min(size, from + CHUNK));
}

}  // namespace

extern "C" {

// A whole step under an N:M pattern along the rows; of is 2, 4, 8 or 16 and divides size.
void topiarist_admm_nm(const float* W, float* D, float* U, uint16_t* Y, int64_t size, const uint16_t* Z, float relaxation,
                       float growth, int keep, int of, int threads) {
  const State s{W, D, U, Y};
  in_chunks(size, threads, [&](int64_t a, int64_t b) { step_nm(s, Z, relaxation, growth, keep, of, a, b); });
}

// The first half of a step under any pattern: T, whose entries' sizes choose the mask.
void topiarist_admm_relax(const float* W, float* D, float* U, uint16_t* Y, int64_t size, const uint16_t* Z, float relaxation,
                          float* T, int threads) {
  const State s{W, D, U, Y};
  in_chunks(size, threads, [&](int64_t a, int64_t b) { relax(s, Z, relaxation, T, a, b); });
}

// The second half.
void topiarist_admm_project(const float* W, float* D, float* U, uint16_t* Y, int64_t size, const float* T,
                            const uint8_t* mask, float growth, int threads) {
  const State s{W, D, U, Y};
  in_chunks(size, threads, [&](int64_t a, int64_t b) { project_masked(s, T, mask, growth, a, b); });
}

}  // extern "C"
