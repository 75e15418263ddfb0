// Tree attention on a CPU: `tree_attention` of tree_attention.py over packed rows, with the write of the
// pass's keys and values in front of it.
//
// b rows in use of B, T packed tokens, n tokens of one row, M tree slots a row, Hq query heads, Hkv key/value
// heads, G = Hq / Hkv, C capacity, D head_dim. A row's queries of one key/value head are R = G * n lines.
//
// One task is a row, a key/value head and a tile of lines. It walks the row's live slots in blocks of 64
// with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) in float32: for each block,
// scores = Q K^T, then out += exp(scores - max) V. Slots past the live ones are never read.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;  // keys a block, and columns of the micro-kernel
constexpr int64_t LINES = 64;  // lines a tile
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));

inline v16 load(const float* p) {
  v16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, v16 x) { __builtin_memcpy(p, &x, sizeof x); }
inline v16 all(float x) { return x - v16{}; }

inline v16 multiply_add(float x, const float* line, v16 sum) { return sum + all(x) * load(line); }
#ifdef __AVX512BF16__
// the same with pairs of bf16 in a 32-bit word: vdpbf16ps adds both products to a float32
inline v16 multiply_add(uint32_t x, const uint32_t* line, v16 sum) {
  const __m512bh pairs = (__m512bh)_mm512_set1_epi32(x);
  return (v16)_mm512_dpbf16_ps((__m512)sum, pairs, (__m512bh)_mm512_loadu_si512(line));
}
#endif

// c[r][0..63] (+)= sum_k a[r][k] * b[k][0..63], for ROWS lines r; a word of a and b is one number or a pair
template <int ROWS, typename word>
inline void multiply(const word* a, int64_t lda, const word* b, int64_t ldb, int64_t depth, float* c,
                     int64_t ldc, bool add) {
  v16 sum[ROWS][4];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 4; ++j) sum[r][j] = add ? load(c + r * ldc + 16 * j) : v16{};
  for (int64_t k = 0; k < depth; ++k)
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < 4; ++j)
        sum[r][j] = multiply_add(a[r * lda + k], b + k * ldb + 16 * j, sum[r][j]);
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < 4; ++j) store(c + r * ldc + 16 * j, sum[r][j]);
}

template <typename word>
void multiply_lines(int64_t lines, const word* a, int64_t lda, const word* b, int64_t ldb, int64_t depth,
                    float* c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + 4 <= lines; r += 4) multiply<4>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, add);
  a += r * lda, c += r * ldc;
  if (lines - r == 3) multiply<3>(a, lda, b, ldb, depth, c, ldc, add);
  if (lines - r == 2) multiply<2>(a, lda, b, ldb, depth, c, ldc, add);
  if (lines - r == 1) multiply<1>(a, lda, b, ldb, depth, c, ldc, add);
}

// exp for x <= 0 to within 2 units in the last place (Cephes' reduction and polynomial); 0 below -87
inline v16 exp16(v16 x) {
  const v16 kept = __builtin_convertvector(-(x > all(-87.0f)), v16);  // 1 or 0
  x = x > all(-87.0f) ? x : all(-87.0f);
  const v16 magic = all(12582912.0f);  // 1.5 * 2^23: adding and taking it away rounds to a whole number
  const v16 n = (x * all(1.44269504088896341f) + magic) - magic;
  x = x - n * all(0.693359375f);
  x = x - n * all(-2.12194440e-4f);
  v16 p = all(1.9875691500e-4f);
  p = p * x + all(1.3981999507e-3f);
  p = p * x + all(8.3334519073e-3f);
  p = p * x + all(4.1665795894e-2f);
  p = p * x + all(1.6666665459e-1f);
  p = p * x + all(5.0000001201e-1f);
  p = p * x * x + x + all(1.0f);
  const i16 bits = (__builtin_convertvector(n, i16) + 127) << 23;
  v16 scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale * kept;
}

inline float widen(float x) { return x; }
inline float widen(c10::BFloat16 x) { return static_cast<float>(x); }
inline float widen(c10::Half x) { return static_cast<float>(x); }

// The two products of a block, in float32: keys transposed to [D, BLOCK], queries and weights as they are.
template <typename scalar>
struct Products {
  static void query(const scalar* from, int64_t D, float* line) {
    for (int64_t d = 0; d < D; ++d) line[d] = widen(from[d]);
  }
  static void keys(const scalar* K, int64_t width, int64_t D, float* Kt) {
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t s = 0; s < width; ++s) Kt[d * BLOCK + s] = widen(K[s * D + d]);
      for (int64_t s = width; s < BLOCK; ++s) Kt[d * BLOCK + s] = 0;
    }
  }
  static void values(const scalar* V, int64_t width, int64_t D, int64_t Dp, float* to) {
    for (int64_t s = 0; s < width; ++s) {
      for (int64_t d = 0; d < D; ++d) to[s * Dp + d] = widen(V[s * D + d]);
      for (int64_t d = D; d < Dp; ++d) to[s * Dp + d] = 0;
    }
  }
  static void scores(int64_t lines, const float* Q, const float* Kt, int64_t D, int64_t Dp, float* S) {
    multiply_lines(lines, Q, Dp, Kt, BLOCK, D, S, BLOCK, false);
  }
  static void weigh(int64_t lines, float* S, const float* V, int64_t width, int64_t Dp, float* acc) {
    for (int64_t d = 0; d < Dp; d += BLOCK)
      multiply_lines(lines, S, BLOCK, V + d, Dp, width, acc + d, Dp, true);
  }
};

#ifdef __AVX512BF16__
// The same in pairs: keys [pairs of D, BLOCK], values [pairs of slots, Dp], weights in the scores' place.
template <>
struct Products<c10::BFloat16> {
  static void query(const c10::BFloat16* from, int64_t D, float* line) {
    auto* to = reinterpret_cast<uint16_t*>(line);
    std::memcpy(to, from, D * 2);
    if (D % 2) to[D] = 0;
  }
  static void keys(const c10::BFloat16* K, int64_t width, int64_t D, float* Kt) {
    auto* to = reinterpret_cast<uint32_t*>(Kt);
    const int64_t pairs = (D + 1) / 2;
    for (int64_t s = 0; s < width; ++s) {
      const auto* from = reinterpret_cast<const uint16_t*>(K + s * D);
      for (int64_t d = 0; d < D / 2; ++d) {
        uint32_t pair;
        std::memcpy(&pair, from + 2 * d, 4);
        to[d * BLOCK + s] = pair;
      }
      if (D % 2) to[(pairs - 1) * BLOCK + s] = from[D - 1];
    }
    for (int64_t d = 0; d < pairs; ++d)
      for (int64_t s = width; s < BLOCK; ++s) to[d * BLOCK + s] = 0;
  }
  static void values(const c10::BFloat16* V, int64_t width, int64_t D, int64_t Dp, float* packed) {
    auto* to = reinterpret_cast<uint32_t*>(packed);
    const auto* from = reinterpret_cast<const uint16_t*>(V);
    for (int64_t s = 0; s < width; s += 2, to += Dp) {
      const uint16_t *even = from + s * D, *odd = even + D;
      if (s + 1 < width)
        for (int64_t d = 0; d < D; ++d) to[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      else
        for (int64_t d = 0; d < D; ++d) to[d] = even[d];
      for (int64_t d = D; d < Dp; ++d) to[d] = 0;
    }
  }
  static void scores(int64_t lines, const float* Q, const float* Kt, int64_t D, int64_t Dp, float* S) {
    multiply_lines(lines, reinterpret_cast<const uint32_t*>(Q), Dp,
                   reinterpret_cast<const uint32_t*>(Kt), BLOCK, (D + 1) / 2, S, BLOCK, false);
  }
  static void weigh(int64_t lines, float* S, const float* V, int64_t width, int64_t Dp, float* acc) {
    for (int64_t r = 0; r < lines; ++r) {  // the weights of a line become bf16 in its own place
      float* line = S + r * BLOCK;
      for (int64_t s = 0; s < BLOCK; s += 32) {
        const __m512 low = _mm512_loadu_ps(line + s), high = _mm512_loadu_ps(line + s + 16);
        _mm512_storeu_si512(line + s / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
    for (int64_t d = 0; d < Dp; d += BLOCK)
      multiply_lines(lines, reinterpret_cast<const uint32_t*>(S), BLOCK,
                     reinterpret_cast<const uint32_t*>(V) + d, Dp, (width + 1) / 2, acc + d, Dp, true);
  }
};
#endif

// What holds for every layer of a pass. mask [b, N, M] and tree_positions [b, M] describe the tree's slots;
// starts [b + 1] says which packed tokens are a row's.
struct Pass {
  at::Tensor buffer, rows, starts, lengths, mask, tree_positions;
  int64_t offset = 0;
};
Pass current;

template <typename scalar>
void attend_typed(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t layer, float scaling,
                  int64_t window, float softcap, const float* sinks, at::Tensor& out) {
  const int64_t T = q.size(2), Hq = q.size(1), D = q.size(3), Hkv = k.size(1), G = Hq / Hkv;
  const int64_t b = current.rows.size(0), N = current.mask.size(1), M = current.mask.size(2);
  const int64_t C = current.buffer.size(4), B = current.buffer.size(2);
  const int64_t half = B * Hkv * C * D;
  scalar* keys = current.buffer.data_ptr<scalar>() + layer * 2 * half;
  scalar* values = keys + half;
  const int64_t *rows = current.rows.data_ptr<int64_t>(), *starts = current.starts.data_ptr<int64_t>(),
                *lengths = current.lengths.data_ptr<int64_t>(),
                *places = current.tree_positions.data_ptr<int64_t>();
  const bool* mask = current.mask.data_ptr<bool>();
  const scalar *qp = q.data_ptr<scalar>(), *kp = k.data_ptr<scalar>(), *vp = v.data_ptr<scalar>();
  scalar* op = out.data_ptr<scalar>();
  const int64_t q_head = q.stride(1), q_token = q.stride(2), k_head = k.stride(1), k_token = k.stride(2),
                v_head = v.stride(1), v_token = v.stride(2);

  int64_t longest = 0;
  for (int64_t i = 0; i < b; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
  const int64_t tiles = (G * longest + LINES - 1) / LINES;
  // depth of the products in whole registers, and columns in whole micro-kernels
  const int64_t Dp = (D + BLOCK - 1) / BLOCK * BLOCK;

  // a row's tiles of one head share what they write, so they are written before any of them reads
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = starts[i]; t < starts[i + 1]; ++t)
      for (int64_t h = 0; h < Hkv; ++h) {
        const int64_t slot = lengths[i] + current.offset + t - starts[i];
        const int64_t to = ((rows[i] * Hkv + h) * C + slot) * D;
        std::memcpy(keys + to, kp + h * k_head + t * k_token, D * sizeof(scalar));
        std::memcpy(values + to, vp + h * v_head + t * v_token, D * sizeof(scalar));
      }

  at::parallel_for(0, b * Hkv * tiles, 1, [&](int64_t from, int64_t till) {
    thread_local std::vector<float> space;  // kept: zeroing it anew costs more than a small pass
    space.resize(std::max<size_t>(
        space.size(), LINES * Dp * 2 + BLOCK * Dp * 2 + LINES * BLOCK + 2 * LINES));
    float* Q = space.data();           // [lines, Dp]
    float* acc = Q + LINES * Dp;       // [lines, Dp]
    float* Kt = acc + LINES * Dp;      // [Dp, BLOCK]
    float* V = Kt + BLOCK * Dp;        // [BLOCK, Dp]
    float* S = V + BLOCK * Dp;         // [lines, BLOCK]
    float* top = S + LINES * BLOCK;    // [lines]
    float* mass = top + LINES;         // [lines]
    for (int64_t task = from; task < till; ++task) {
      const int64_t i = task / (Hkv * tiles), h = task / tiles % Hkv, tile = task % tiles;
      const int64_t n = starts[i + 1] - starts[i], first = tile * LINES;
      const int64_t lines = std::min(LINES, G * n - first);
      if (lines <= 0) continue;
      const int64_t prefix = lengths[i], end = prefix + current.offset + n;
      const scalar* K0 = keys + (rows[i] * Hkv + h) * C * D;
      const scalar* V0 = values + (rows[i] * Hkv + h) * C * D;
      // line r is query token (first + r) / G under query head h * G + (first + r) % G
      int64_t lowest = std::numeric_limits<int64_t>::max();  // the oldest position any line looks at
      for (int64_t r = 0; r < lines; ++r) {
        const int64_t token = (first + r) / G, head = h * G + (first + r) % G;
        Products<scalar>::query(qp + head * q_head + (starts[i] + token) * q_token, D, Q + r * Dp);
        lowest = std::min(lowest, places[i * M + M - N + token] - window + 1);
        top[r] = -std::numeric_limits<float>::infinity();
        mass[r] = 0;
      }
      std::fill(acc, acc + lines * Dp, 0.0f);
      const int64_t begin = window ? std::max<int64_t>(0, std::min(lowest, prefix)) / BLOCK * BLOCK : 0;
      for (int64_t s0 = begin; s0 < end; s0 += BLOCK) {
        const int64_t width = std::min(BLOCK, end - s0);
        Products<scalar>::keys(K0 + s0 * D, width, D, Kt);
        Products<scalar>::values(V0 + s0 * D, width, D, Dp, V);
        Products<scalar>::scores(lines, Q, Kt, D, Dp, S);
        for (int64_t r = 0; r < lines; ++r) {
          float* score = S + r * BLOCK;
          const int64_t token = (first + r) / G;
          for (int64_t s = 0; s < BLOCK; s += 16) store(score + s, load(score + s) * all(scaling));
          if (softcap > 0)
            for (int64_t s = 0; s < width; ++s) score[s] = softcap * std::tanh(score[s] / softcap);
          const bool* seen = mask + (i * N + token) * M;
          for (int64_t s = std::max<int64_t>(0, prefix - s0); s < width; ++s)
            if (!seen[s0 + s - prefix]) score[s] = -std::numeric_limits<float>::infinity();
          if (window) {
            const int64_t oldest = places[i * M + M - N + token] - window;  // this one is out
            for (int64_t s = 0; s < width; ++s) {
              const int64_t slot = s0 + s;
              const int64_t at = slot < prefix ? slot : places[i * M + slot - prefix];
              if (at <= oldest) score[s] = -std::numeric_limits<float>::infinity();
            }
          }
          for (int64_t s = width; s < BLOCK; ++s) score[s] = -std::numeric_limits<float>::infinity();
          v16 peak = load(score);
          for (int64_t s = 16; s < BLOCK; s += 16) {
            const v16 next = load(score + s);
            peak = next > peak ? next : peak;
          }
          float best = top[r];
          for (int lane = 0; lane < 16; ++lane) best = std::max(best, peak[lane]);
          if (best == -std::numeric_limits<float>::infinity()) {  // nothing to see so far
            for (int64_t s = 0; s < BLOCK; ++s) score[s] = 0;
            continue;
          }
          const float shrink = std::exp(top[r] - best);
          v16 total{};
          for (int64_t s = 0; s < BLOCK; s += 16) {
            const v16 weight = exp16(load(score + s) - all(best));
            store(score + s, weight);
            total += weight;
          }
          float sum = 0;
          for (int lane = 0; lane < 16; ++lane) sum += total[lane];
          mass[r] = mass[r] * shrink + sum;
          top[r] = best;
          if (shrink != 1.0f)
            for (int64_t d = 0; d < Dp; ++d) acc[r * Dp + d] *= shrink;
        }
        Products<scalar>::weigh(lines, S, V, width, Dp, acc);
      }
      for (int64_t r = 0; r < lines; ++r) {
        const int64_t token = (first + r) / G, head = h * G + (first + r) % G;
        float scale = mass[r] > 0 ? 1 / mass[r] : 0;
        if (sinks != nullptr && mass[r] > 0) {  // one more logit that takes probability and gives nothing
          const float best = std::max(top[r], sinks[head]), shrink = std::exp(top[r] - best);
          scale = shrink / (mass[r] * shrink + std::exp(sinks[head] - best));
        }
        scalar* to = op + ((starts[i] + token) * Hq + head) * D;
        for (int64_t d = 0; d < D; ++d) to[d] = static_cast<scalar>(acc[r * Dp + d] * scale);
      }
    }
  });
}

at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t layer, double scaling,
                  int64_t window, double softcap, const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(current.buffer.defined(), "eagle::attend outside of a pass");
  TORCH_CHECK(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1 && current.buffer.is_contiguous());
  TORCH_CHECK(q.scalar_type() == current.buffer.scalar_type() && q.size(2) == k.size(2));
  auto out = at::empty({1, q.size(2), q.size(1), q.size(3)}, q.options());
  at::Tensor sink;
  if (sinks) sink = sinks->to(at::kFloat).contiguous();
  const float* s = sinks ? sink.data_ptr<float>() : nullptr;
  if (q.scalar_type() == at::kBFloat16)
    attend_typed<c10::BFloat16>(q, k, v, layer, scaling, window, softcap, s, out);
  else if (q.scalar_type() == at::kHalf)
    attend_typed<c10::Half>(q, k, v, layer, scaling, window, softcap, s, out);
  else if (q.scalar_type() == at::kFloat)
    attend_typed<float>(q, k, v, layer, scaling, window, softcap, s, out);
  else
    TORCH_CHECK(false, "eagle::attend takes float32, bfloat16 or float16, not ", q.scalar_type());
  return out;
}

void enter(const at::Tensor& buffer, const at::Tensor& rows, const at::Tensor& starts,
           const at::Tensor& lengths, const at::Tensor& mask, const at::Tensor& tree_positions,
           int64_t offset) {
  current = {buffer, rows, starts, lengths, mask.contiguous(), tree_positions.contiguous(), offset};
}

void leave() { current = {}; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(eagle_cpu, m) {
  m.def("enter(Tensor buffer, Tensor rows, Tensor starts, Tensor lengths, Tensor mask, "
        "Tensor tree_positions, int offset) -> ()", enter);
  m.def("leave() -> ()", leave);
}

TORCH_LIBRARY_IMPL(eagle, CPU, m) { m.impl("attend", attend); }
