// The mask arithmetic of learned masks on a CPU: one pass over memory forward, one backward, one with Adam folded in.
//
// The numbers are those of relax.py and noise.py: the noise words are equal in every bit, the rest to fp32 rounding. Rows
// are independent, so a caller may split them over threads in any way. For the relaxation Categorical:
//
//   W weight (rows, groups * of)    pi logits (rows, classes, groups)    S table (classes, of)    G gradient by W * M
//   y = softmax((kappa pi + g) / tau)    M = y S    dM = G W - 2 lam W^2 M    dpi = kappa/tau y (dM S^T - <y, dM S^T>)
//
// TopN has one logit a weight (classes = of) and draws `keep` times: a_k = softmax(r_k / tau), r_k+1 = r_k + log(1 - a_k),
// M = sum a_k. Backward runs the draws in reverse: da = dM - dr / (1 - a), dr += a (da - <a, da>) / tau, dpi = kappa dr.
// Bernoulli has one gate a weight (classes = of = 1): M = sigmoid((kappa pi + l) / tau), dpi = kappa/tau M (1 - M) dM.
//
// A block is BLOCK groups of one row, held class by class in fp32 scratch that fits the first two cache levels; every
// inner loop runs over the groups of a block, so each is one vector pass. bf16 is a uint16 here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int BLOCK = 128;

using bf16 = uint16_t;

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float load(float x) { return x; }
inline float load(bf16 x) { return as_float(uint32_t(x) << 16); }

inline bf16 nearest(float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0;
}
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) { to = nearest(x); }

// Stochastic rounding: 16 random bits are added below the last kept one, so the expected value is exact.
inline void store(float& to, float x, uint32_t) { to = x; }
inline void store(bf16& to, float x, uint32_t random) { to = x == x ? (as_bits(x) + (random & 0xffff)) >> 16 : 0x7fc0; }

inline uint32_t mix(uint32_t x, uint32_t k1) {
  x ^= x >> 16; x *= 0x7feb352dU; x += k1;
  x ^= x >> 15; x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

// Cephes logf for positive normal numbers, error below 1 ulp or so; no branches, so loops over it vectorise.
inline float log_positive(float x) {
  const uint32_t bits = as_bits(x) - 0x3f3504f3U;  // mantissa from sqrt(1/2) to sqrt(2)
  const float exponent = float(int32_t(bits) >> 23);
  const float f = as_float((bits & 0x7fffffU) + 0x3f3504f3U) - 1.0f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = f * z * p;
  y = y + exponent * -2.12194440e-4f - 0.5f * z;
  return (f + y) + exponent * 0.693359375f;
}

// Cephes expf for x <= 0.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * as_float((as_bits(shifted) - 0x4b400000U + 127) << 23);
}

inline float uniform(uint32_t word) { return (float(int32_t(word >> 9)) + 0.5f) * 0x1p-23f; }
inline float gumbel(uint32_t word) { return -log_positive(-log_positive(uniform(word))); }
inline float logistic(uint32_t word) {
  const float u = uniform(word);
  return log_positive(u) - log_positive(1.0f - u);
}

enum Kind { CATEGORICAL = 0, TOPN = 1, BERNOULLI = 2 };
constexpr float ALMOST_ONE = 1.0f - 1e-6f;  // of TopN: log(1 - a) stays finite

}  // namespace

extern "C" {

// Kept in step with the ctypes structures in native.py.
struct Mask {
  int64_t rows, groups, of, classes;
  const uint8_t* table;
  const void* weight;
  const void* logits;
  int32_t weight_bf16, logits_bf16;
  float kappa, tau, lam;
  uint32_t key0, key1;
  int32_t first_row, first_group;
  int32_t noise;  // 0: the logits as they are, for evaluation
  int32_t hard;   // 1: the best candidate instead of the mixture (Categorical only)
  int32_t kind;   // which relaxation
  int32_t keep;   // TopN: how many draws
  float push;     // Bernoulli: added to every dM, the gradient of its density penalty
};

struct Adam {
  const void* grad_effective;  // G
  void* m;
  void* v;
  int32_t grad_bf16;
  int32_t moments_bf16;  // a shared second moment is fp32 whatever this says
  int32_t share;         // second moment per logit (0), per group (1) or per row (2)
  float lr, beta1, beta2, eps, decay, correction1, correction2, scale;
  uint32_t key0, key1, key2, key3;  // for rounding the moments, for rounding the logits
};

}  // extern "C"

namespace {

// Widens a run of n stored numbers to fp32.
inline void widen(const void* from, bool is_bf16, int64_t at, float* to, int n) {
  if (is_bf16)
    for (int i = 0; i < n; ++i) to[i] = load(static_cast<const bf16*>(from)[at + i]);
  else
    for (int i = 0; i < n; ++i) to[i] = static_cast<const float*>(from)[at + i];
}

// Between a group's weights side by side in memory and one vector per position within the group. The width is a constant
// where it matters, so that the strided accesses become shuffles.
template <int OF>
inline void split(const float* flat, float* to, int n, int of) {
  const int width = OF ? OF : of;
  for (int g = 0; g < n; ++g)
    for (int j = 0; j < width; ++j) to[j * BLOCK + g] = flat[g * width + j];
}
template <int OF>
inline void join(const float* from, float* flat, int n, int of) {
  const int width = OF ? OF : of;
  for (int g = 0; g < n; ++g)
    for (int j = 0; j < width; ++j) flat[g * width + j] = from[j * BLOCK + g];
}

inline double sum_of(const float* x, int64_t n, bool squared) {
  float part[16] = {};  // sixteen sums side by side: one vector
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 16; ++k) part[k] += squared ? x[i + k] * x[i + k] : x[i + k];
  double sum = 0.0;
  for (; i < n; ++i) sum += squared ? x[i] * x[i] : x[i];
  for (int k = 0; k < 16; ++k) sum += part[k];
  return sum;
}

// Scratch of one thread, and the arithmetic of one block.
struct Block {
  const Mask& a;
  const int of, classes;
  std::vector<float> flat, W, G, M, y, dy;  // dy is d loss / dy, and for TopN dr
  std::vector<float> drawn;                 // TopN: a_k of every draw
  alignas(64) float top[BLOCK], total[BLOCK], inner[BLOCK];
  uint32_t k0 = 0, k1 = 0;

  explicit Block(const Mask& a)
      : a(a), of(int(a.of)), classes(int(a.classes)), flat(of * BLOCK), W(of * BLOCK), G(of * BLOCK),
        M(of * BLOCK), y(classes * BLOCK), dy(classes * BLOCK), drawn(a.kind == TOPN ? a.keep * of * BLOCK : 0) {}

  void start_row(int64_t row) {
    const uint32_t global = uint32_t(row + a.first_row);
    k0 = mix(global ^ a.key0, a.key1);
    k1 = mix(k0 ^ a.key1, a.key0);
  }

  void gather(const void* from, bool is_bf16, int64_t at, float* to, int n) {
    widen(from, is_bf16, at, flat.data(), n * of);
    if (of == 1) std::memcpy(to, flat.data(), n * sizeof(float));
    else if (of == 4) split<4>(flat.data(), to, n, of);
    else if (of == 8) split<8>(flat.data(), to, n, of);
    else split<0>(flat.data(), to, n, of);
  }

  // y = kappa pi + noise of n groups from `first` on, or the logits as they are.
  void noisy(int64_t row, int64_t first, int n) {
    const int64_t at = row * classes * a.groups + first;
    for (int c = 0; c < classes; ++c) {
      float* z = &y[c * BLOCK];
      widen(a.logits, a.logits_bf16, at + c * a.groups, z, n);
      if (!a.noise) continue;
      const uint32_t counter = uint32_t(first + a.first_group) * uint32_t(classes) + uint32_t(c);
      if (a.kind == BERNOULLI)
        for (int g = 0; g < n; ++g) z[g] = a.kappa * z[g] + logistic(mix((counter + uint32_t(g)) ^ k0, k1));
      else
        for (int g = 0; g < n; ++g)
          z[g] = a.kappa * z[g] + gumbel(mix((counter + uint32_t(g) * uint32_t(classes)) ^ k0, k1));
    }
  }

  void highest(int n) {
    for (int g = 0; g < n; ++g) top[g] = -INFINITY;
    for (int c = 0; c < classes; ++c)
      for (int g = 0; g < n; ++g) top[g] = y[c * BLOCK + g] > top[g] ? y[c * BLOCK + g] : top[g];
  }

  // Unnormalised y and its sum. The largest y of a group is 1 before normalising.
  void probabilities(int64_t row, int64_t first, int n) {
    noisy(row, first, n);
    highest(n);
    for (int g = 0; g < n; ++g) total[g] = 0.0f;
    if (a.hard) {  // ties go to the first candidate, as argmax does
      for (int c = 0; c < classes; ++c)
        for (int g = 0; g < n; ++g) {
          y[c * BLOCK + g] = y[c * BLOCK + g] == top[g] && total[g] == 0.0f ? 1.0f : 0.0f;
          total[g] += y[c * BLOCK + g];
        }
      return;
    }
    const float sharp = 1.0f / a.tau;
    for (int c = 0; c < classes; ++c) {
      float* z = &y[c * BLOCK];
      for (int g = 0; g < n; ++g) {
        z[g] = exp_negative((z[g] - top[g]) * sharp);
        total[g] += z[g];
      }
    }
  }

  // M = y S from unnormalised y: `total` becomes 1 / total, M is normalised.
  void soft_mask(int n) {
    for (int g = 0; g < n; ++g) total[g] = 1.0f / total[g];
    std::memset(M.data(), 0, M.size() * sizeof(float));
    for (int c = 0; c < classes; ++c)
      for (int j = 0; j < of; ++j)
        if (a.table[c * of + j])
          for (int g = 0; g < n; ++g) M[j * BLOCK + g] += y[c * BLOCK + g];
    for (int j = 0; j < of; ++j)
      for (int g = 0; g < n; ++g) M[j * BLOCK + g] *= total[g];
  }

  // M of TopN, and a_k of every draw.
  void draws(int n) {
    const float sharp = 1.0f / a.tau;
    std::memset(M.data(), 0, M.size() * sizeof(float));
    for (int k = 0; k < a.keep; ++k) {
      float* d = &drawn[k * of * BLOCK];
      highest(n);
      for (int g = 0; g < n; ++g) total[g] = 0.0f;
      for (int j = 0; j < of; ++j)
        for (int g = 0; g < n; ++g) {
          d[j * BLOCK + g] = exp_negative((y[j * BLOCK + g] - top[g]) * sharp);
          total[g] += d[j * BLOCK + g];
        }
      for (int g = 0; g < n; ++g) total[g] = 1.0f / total[g];
      for (int j = 0; j < of; ++j)
        for (int g = 0; g < n; ++g) {
          const int i = j * BLOCK + g;
          d[i] *= total[g];
          M[i] += d[i];
          y[i] += log_positive(1.0f - (d[i] < ALMOST_ONE ? d[i] : ALMOST_ONE));
        }
    }
  }

  // M of Bernoulli.
  void gates(int n) {
    const float sharp = 1.0f / a.tau;
    for (int g = 0; g < n; ++g) {
      const float e = exp_negative(-std::fabs(y[g]) * sharp), one = 1.0f / (1.0f + e);
      M[g] = y[g] >= 0.0f ? one : e * one;
    }
  }

  // Returns the sum over groups of the largest probability (Categorical), or of M (Bernoulli), or nothing of use.
  double forward(int64_t row, int64_t first, int n, void* out) {
    if (a.kind == CATEGORICAL) {
      probabilities(row, first, n);
      soft_mask(n);
    } else {
      noisy(row, first, n);
      if (a.kind == TOPN) draws(n);
      else gates(n);
    }
    const double sum = sum_of(a.kind == BERNOULLI ? M.data() : total, n, false);
    if (!out) return sum;
    const int64_t at = (row * a.groups + first) * of;
    if (of == 1) std::memcpy(flat.data(), M.data(), n * sizeof(float));
    else if (of == 4) join<4>(M.data(), flat.data(), n, of);
    else if (of == 8) join<8>(M.data(), flat.data(), n, of);
    else join<0>(M.data(), flat.data(), n, of);
    if (a.weight_bf16) {
      const bf16* W = static_cast<const bf16*>(a.weight) + at;
      bf16* to = static_cast<bf16*>(out) + at;
      for (int i = 0; i < n * of; ++i) to[i] = nearest(load(W[i]) * flat[i]);
    } else {
      const float* W = static_cast<const float*>(a.weight) + at;
      float* to = static_cast<float*>(out) + at;
      for (int i = 0; i < n * of; ++i) to[i] = W[i] * flat[i];
    }
    return sum;
  }

  // G becomes dM = (G - 2 lam W M) W, with M at hand.
  void mask_gradient(int n) {
    const float twice = 2.0f * a.lam;
    for (int j = 0; j < of; ++j)
      for (int g = 0; g < n; ++g) {
        const int i = j * BLOCK + g;
        G[i] = (G[i] - twice * W[i] * M[i]) * W[i];
      }
  }

  void backward_topn(int n, float* grad) {
    const float sharp = 1.0f / a.tau;
    draws(n);
    mask_gradient(n);
    std::memset(dy.data(), 0, dy.size() * sizeof(float));
    for (int k = a.keep - 1; k >= 0; --k) {
      const float* d = &drawn[k * of * BLOCK];
      std::memset(inner, 0, sizeof(inner));
      for (int j = 0; j < of; ++j)
        for (int g = 0; g < n; ++g) {
          const int i = j * BLOCK + g;
          const float through = d[i] < ALMOST_ONE ? dy[i] / (1.0f - d[i]) : 0.0f;
          y[i] = d[i] * (G[i] - through);  // a da
          inner[g] += y[i];
        }
      for (int j = 0; j < of; ++j)
        for (int g = 0; g < n; ++g) {
          const int i = j * BLOCK + g;
          dy[i] += sharp * (y[i] - d[i] * inner[g]);
        }
    }
    for (int j = 0; j < of; ++j)
      for (int g = 0; g < n; ++g) grad[j * a.groups + g] = a.kappa * dy[j * BLOCK + g];
  }

  void backward_bernoulli(int n, float* grad) {
    const float sharp = a.kappa / a.tau;
    gates(n);
    mask_gradient(n);
    for (int g = 0; g < n; ++g) grad[g] = sharp * M[g] * (1.0f - M[g]) * (G[g] + a.push);
  }

  // dpi of n groups into grad, which is a row of (classes, groups) from group `first` on.
  void backward(int64_t row, int64_t first, int n, const void* grad_effective, bool is_bf16, float* grad) {
    const int64_t at = (row * a.groups + first) * of;
    gather(a.weight, a.weight_bf16, at, W.data(), n);
    gather(grad_effective, is_bf16, at, G.data(), n);
    if (a.kind != CATEGORICAL) {
      noisy(row, first, n);
      return a.kind == TOPN ? backward_topn(n, grad) : backward_bernoulli(n, grad);
    }
    probabilities(row, first, n);
    if (a.lam != 0.0f) {
      soft_mask(n);
      mask_gradient(n);
    } else {
      for (int g = 0; g < n; ++g) total[g] = 1.0f / total[g];
      for (int j = 0; j < of; ++j)
        for (int g = 0; g < n; ++g) G[j * BLOCK + g] *= W[j * BLOCK + g];
    }
    std::memset(dy.data(), 0, dy.size() * sizeof(float));
    std::memset(inner, 0, sizeof(inner));
    for (int c = 0; c < classes; ++c) {
      float* d = &dy[c * BLOCK];
      for (int j = 0; j < of; ++j)
        if (a.table[c * of + j])
          for (int g = 0; g < n; ++g) d[g] += G[j * BLOCK + g];
      for (int g = 0; g < n; ++g) {
        y[c * BLOCK + g] *= total[g];
        inner[g] += y[c * BLOCK + g] * d[g];
      }
    }
    const float sharp = a.kappa / a.tau;
    for (int c = 0; c < classes; ++c)
      for (int g = 0; g < n; ++g)
        grad[c * a.groups + g] = sharp * y[c * BLOCK + g] * (dy[c * BLOCK + g] - inner[g]);
  }
};

// 1 / (sqrt(v) + eps) for every group of a row whose logits share a second moment: the mean of their squared gradients.
void shared_moment(const Mask& a, const Adam& o, int64_t row, const float* grad, float* inverse) {
  const int64_t n = a.groups, classes = a.classes;
  const float bias = 1.0f / o.correction2, weight = (1.0f - o.beta2) * o.scale * o.scale / float(classes);
  for (int64_t g = 0; g < n; ++g) inverse[g] = 0.0f;
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t g = 0; g < n; ++g) inverse[g] += grad[c * n + g] * grad[c * n + g];
  if (o.share == 2) {
    float& v = static_cast<float*>(o.v)[row];
    v = o.beta2 * v + weight * float(sum_of(inverse, n, false) / double(n));
    const float one = 1.0f / (std::sqrt(v * bias) + o.eps);
    for (int64_t g = 0; g < n; ++g) inverse[g] = one;
    return;
  }
  float* v = static_cast<float*>(o.v) + row * n;
  for (int64_t g = 0; g < n; ++g) {
    v[g] = o.beta2 * v[g] + weight * inverse[g];
    inverse[g] = 1.0f / (std::sqrt(v[g] * bias) + o.eps);
  }
}

// AdamW on one row of logits: p <- (1 - lr decay) p - lr m / (sqrt(v) + eps), moments corrected for their start at zero.
template <typename Logit, typename Moment, bool SHARED>
void adam_row(const Mask& a, const Adam& o, int64_t row, const float* grad, float* inverse) {
  const int64_t n = a.groups, classes = a.classes, at = row * classes * n;
  const uint32_t global = uint32_t(row + a.first_row);
  const uint32_t k0 = mix(global ^ o.key0, o.key1), k1 = mix(k0 ^ o.key1, o.key0);
  const uint32_t l0 = mix(global ^ o.key2, o.key3), l1 = mix(l0 ^ o.key3, o.key2);
  const float bias1 = 1.0f / o.correction1, bias2 = 1.0f / o.correction2, keep = 1.0f - o.lr * o.decay;
  const float beta1 = o.beta1, beta2 = o.beta2, lr = o.lr, eps = o.eps, scale = o.scale;
  if (SHARED) shared_moment(a, o, row, grad, inverse);
  for (int64_t c = 0; c < classes; ++c) {
    Logit* __restrict__ pi = const_cast<Logit*>(static_cast<const Logit*>(a.logits)) + at + c * n;
    Moment* __restrict__ m = static_cast<Moment*>(o.m) + at + c * n;
    Moment* __restrict__ v = SHARED ? nullptr : static_cast<Moment*>(o.v) + at + c * n;
    const float* __restrict__ gradient = grad + c * n;
    const uint32_t counter = uint32_t(a.first_group) * uint32_t(classes) + uint32_t(c);
    for (int64_t g = 0; g < n; ++g) {
      const uint32_t word = counter + uint32_t(g) * uint32_t(classes);
      const uint32_t random = sizeof(Moment) == 2 ? mix(word ^ k0, k1) : 0;
      const float d = gradient[g] * scale;
      const float m_new = beta1 * load(m[g]) + (1.0f - beta1) * d;
      store(m[g], m_new, random);
      float step;
      if constexpr (SHARED) {
        step = inverse[g];
      } else {
        const float v_new = beta2 * load(v[g]) + (1.0f - beta2) * d * d;
        store(v[g], v_new, random >> 16);
        step = 1.0f / (std::sqrt(v_new * bias2) + eps);
      }
      store(pi[g], load(pi[g]) * keep - lr * (m_new * bias1) * step, sizeof(Logit) == 2 ? mix(word ^ l0, l1) : 0);
    }
  }
}

using AdamRow = void (*)(const Mask&, const Adam&, int64_t, const float*, float*);

template <typename Logit>
AdamRow adam_of(const Adam& o) {
  if (o.share) return o.moments_bf16 ? adam_row<Logit, bf16, true> : adam_row<Logit, float, true>;
  return o.moments_bf16 ? adam_row<Logit, bf16, false> : adam_row<Logit, float, false>;
}

}  // namespace

extern "C" {

int64_t topiarist_abi() { return int64_t(sizeof(Mask)) * 1000 + int64_t(sizeof(Adam)); }

// out = W * M for rows begin..end, if given; *top = the sum that Block::forward returns.
void topiarist_forward(const Mask* a, void* out, double* top, int64_t begin, int64_t end) {
  Block block(*a);
  double sum = 0.0;
  for (int64_t row = begin; row < end; ++row) {
    block.start_row(row);
    for (int64_t first = 0; first < a->groups; first += BLOCK)
      sum += block.forward(row, first, int(std::min<int64_t>(BLOCK, a->groups - first)), out);
  }
  *top = sum;
}

// dpi of rows begin..end: into `out` if given, its squared norm into `squares` if given, and one step of AdamW on logits
// and moments in place if o->m is given.
void topiarist_backward(const Mask* a, const Adam* o, float* out, double* squares, int64_t begin, int64_t end) {
  Block block(*a);
  const int64_t size = a->classes * a->groups;
  std::vector<float> scratch(out ? 0 : size), shared(a->groups);
  const AdamRow step = a->logits_bf16 ? adam_of<bf16>(*o) : adam_of<float>(*o);
  double sum = 0.0;
  for (int64_t row = begin; row < end; ++row) {
    float* grad = out ? out + row * size : scratch.data();
    block.start_row(row);
    for (int64_t first = 0; first < a->groups; first += BLOCK)
      block.backward(row, first, int(std::min<int64_t>(BLOCK, a->groups - first)), o->grad_effective, o->grad_bf16,
                     grad + first);
    if (squares) sum += sum_of(grad, size, true);
    if (o->m) step(*a, *o, row, grad, shared.data());
  }
  if (squares) *squares = sum;
}

}  // extern "C"
