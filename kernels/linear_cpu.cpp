// A linear layer whose outputs are each summed over k in one fixed order, whatever the number of rows: `linear`
// of linear.py, over the weights as they lie.
//
// M rows, K inputs, N outputs: y [M, N] = x [M, K] W [N, K]^T + bias. A step takes `depth` of k.
//
// What is summed how depends on the types and the machine alone:
// - bf16 rows by bf16 weights with AMX: TDPBF16PS over blocks of 32 k; with AVX512-BF16: VDPBF16PS;
// - int8 weights: rows in int8 too; a group's sums are whole numbers, which are added up as float32;
// - everything else: chains of float32 multiply-adds, one in each lane of a vector, added up at the end.
// A row of a tile is computed as it would be in a tile of its own, and padding is zeros on both sides.

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int ROWS = 6;  // rows a tile of vectors
constexpr int NEAR = 8;  // outputs whose weights stay in the nearest cache

template <int R, int C>
inline void add(const float* x, int64_t ldx, const lanes (&line)[C], lanes (&sum)[R][C]) {
  for (int r = 0; r < R; ++r) {
    const lanes row = load(x + r * ldx);
    for (int c = 0; c < C; ++c) sum[r][c] = multiply_add(row, line[c], sum[r][c]);
  }
}

// One step over k: `depth` inputs of R rows and the weights of C outputs for them
template <typename scalar>
struct Plain {  // float32 or float16 weights
  typedef float input;
  typedef scalar weight;
  static constexpr int64_t depth = LANES;
  template <int R, int C>
  static inline void step(const float* x, int64_t ldx, const scalar* w, int64_t ldw, lanes (&sum)[R][C]) {
    lanes line[C];
    for (int c = 0; c < C; ++c) line[c] = wide(w + c * ldw);
    add<R, C>(x, ldx, line, sum);
  }
};
typedef Plain<float> Float;
typedef Plain<c10::Half> Half;

struct Pairs {  // bf16 weights; of the inputs of a step the even ones come first
  typedef float input;
  typedef uint16_t weight;
  static constexpr int64_t depth = 2 * LANES;
  template <int R, int C>
  static inline void step(const float* x, int64_t ldx, const uint16_t* w, int64_t ldw, lanes (&sum)[R][C]) {
    lanes line[C];
    for (int c = 0; c < C; ++c) line[c] = (lanes)(load<words>(w + c * ldw) << 16);
    add<R, C>(x, ldx, line, sum);
    for (int c = 0; c < C; ++c) line[c] = (lanes)(load<words>(w + c * ldw) & 0xffff0000u);
    add<R, C>(x + LANES, ldx, line, sum);
  }
};

#ifdef __AVX512BF16__
struct Dots {  // bf16 weights, bf16 rows
  typedef uint16_t input;
  typedef uint16_t weight;
  static constexpr int64_t depth = 2 * LANES;
  template <int R, int C>
  static inline void step(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw,
                          lanes (&sum)[R][C]) {
    for (int c = 0; c < C; ++c) {
      const __m512bh line = (__m512bh)_mm512_loadu_si512(w + c * ldw);
      for (int r = 0; r < R; ++r) {
        const __m512bh row = (__m512bh)_mm512_loadu_si512(x + r * ldx);
        sum[r][c] = (lanes)_mm512_dpbf16_ps((__m512)sum[r][c], row, line);
      }
    }
  }
};
#endif

constexpr int64_t GROUP = 64;
struct Group {  // of weights: value times scale; `quantize` of linear.py
  int8_t value[GROUP];
  float scale;
};
static_assert(sizeof(Group) == GROUP + 4);
struct RowGroup {
  int8_t value[GROUP];
  int32_t start[16];  // of each lane's sum: takes away what 128 more in every weight adds
  float scale;
};

// bytes a, b -> in each lane of float32 a part of sum a * b, exact
#ifdef __AVX512VNNI__
inline lanes dot(const int8_t* w, const RowGroup& x) {
  // the instruction multiplies unsigned bytes by signed ones
  const __m512i high = _mm512_set1_epi8(-128), weights = _mm512_xor_si512(_mm512_loadu_si512(w), high);
  const __m512i from = _mm512_loadu_si512(x.start), row = _mm512_loadu_si512(x.value);
  return (lanes)_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(from, weights, row));
}
#else
inline lanes dot(const int8_t* w, const RowGroup& x) {
  integers sum = {};
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int i = 0; i < GROUP; i += 32) {
    const __m256i a = ::load<__m256i>(x.value + i), b = ::load<__m256i>(w + i);
    // |a| by b with a's sign: two products fit 16 bits, as no byte is -128
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    sum += (integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  for (int i = 0; i < GROUP; ++i) sum[i % LANES] += x.value[i] * w[i];
#endif
  return __builtin_convertvector(sum, lanes);
}
#endif

struct Bytes {
  typedef RowGroup input;
  typedef Group weight;
  static constexpr int64_t depth = 1;
  template <int R, int C>
  static inline void step(const RowGroup* x, int64_t ldx, const Group* w, int64_t ldw, lanes (&sum)[R][C]) {
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r) {
        const RowGroup& row = x[r * ldx];
        const lanes part = dot(w[c * ldw].value, row) * all(row.scale);
        sum[r][c] = multiply_add(part, all(w[c * ldw].scale), sum[r][c]);
      }
  }
};

// x [K] -> its groups; not finite where x is not
void quantize_row(const float* x, int64_t K, RowGroup* to) {
  for (int64_t k = 0; k < K; k += GROUP, ++to) {
    const int64_t n = std::min(GROUP, K - k);
    float largest = 0, finite = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[k + i])), finite += x[k + i] * 0;
    *to = {};
    to->scale = largest / 127 + finite;
    if (largest <= 1e-30f || finite != 0) continue;  // NaN is not 0
    const float inverse = 127 / largest;
    for (int64_t i = 0; i < n; ++i) {
      to->value[i] = static_cast<int8_t>(std::nearbyint(x[k + i] * inverse));
      to->start[i / 4] -= 128 * to->value[i];
    }
  }
}

// Where outputs go
struct Out {
  void* y;
  at::ScalarType type;
  const float* bias;
  int64_t N;
  void put(int64_t row, int64_t n, float sum) const {
    if (bias != nullptr) sum += bias[n];
    const int64_t at = row * N + n;
    if (type == at::kFloat) static_cast<float*>(y)[at] = sum;
    if (type == at::kBFloat16) static_cast<c10::BFloat16*>(y)[at] = sum;
    if (type == at::kHalf) static_cast<c10::Half*>(y)[at] = sum;
  }
};

// rows [row, row + R) by outputs [n, n + C). Meanwhile the weights of NEAR outputs further on are asked for, by
// each of the `blocks` blocks of rows its part, so that memory and arithmetic take turns in none of them.
template <class Kind, int R, int C>
void tile(const typename Kind::input* x, int64_t ldx, const typename Kind::weight* w, int64_t K, int64_t row,
          int64_t n, const Out& out, int64_t block, int64_t blocks) {
  constexpr int64_t depth = Kind::depth;
  lanes sum[R][C] = {};
  x += row * ldx, w += n * K;
  int64_t k = 0, until = block + 1;
  for (; k + depth <= K; k += depth) {
    if (--until == 0) {
      until = blocks;
      for (int c = 0; c < C; ++c) __builtin_prefetch(w + (NEAR + c) * K + k, 0, 2);
    }
    Kind::template step<R, C>(x + k, ldx, w + k, K, sum);
  }
  if (k < K) {  // the rows are padded, the weights are not
    typename Kind::weight rest[C][depth] = {};
    for (int c = 0; c < C; ++c) std::memcpy(rest[c], w + c * K + k, (K - k) * sizeof *w);
    Kind::template step<R, C>(x + k, ldx, rest[0], depth, sum);
  }
  for (int r = 0; r < R; ++r) {
    float line[C];
    add_up<C>(sum[r], line);
    for (int c = 0; c < C; ++c) out.put(row + r, n + c, line[c]);
  }
}

template <class Kind, int R = ROWS>
void rows_of(int64_t rows, const typename Kind::input* x, int64_t ldx, const typename Kind::weight* w,
             int64_t K, int64_t row, int64_t begin, int64_t end, const Out& out, int64_t block, int64_t blocks) {
  if (rows != R) {
    if constexpr (R > 1) rows_of<Kind, R - 1>(rows, x, ldx, w, K, row, begin, end, out, block, blocks);
    return;
  }
  constexpr int C = LANES == 8 && R > 2 ? 2 : 4;  // as registers allow
  int64_t n = begin;
  for (; n + C <= end; n += C) tile<Kind, R, C>(x, ldx, w, K, row, n, out, block, blocks);
  for (; n < end; ++n) tile<Kind, R, 1>(x, ldx, w, K, row, n, out, block, blocks);
}

// outputs [begin, end) for all rows
template <class Kind>
void multiply(const typename Kind::input* x, int64_t ldx, int64_t M, const typename Kind::weight* w, int64_t K,
              int64_t begin, int64_t end, const Out& out) {
  const int64_t parts = (M + 65) / 66;
  for (int64_t part = 0, from = 0, some; part < parts; ++part, from += some) {
    some = M / parts + (part < M % parts);  // rows that stay near while all weights go by
    const int64_t blocks = (some + ROWS - 1) / ROWS;
    for (int64_t n = begin; n < end; n += NEAR) {  // some weights stay nearer while those rows go by
      const int64_t last = std::min(n + NEAR, end);
      for (int64_t i = 0, row = from; i < blocks; ++i) {
        const int64_t rows = some / blocks + (i < some % blocks);
        rows_of<Kind>(rows, x, ldx, w, K, row, n, last, out, i, blocks);
        row += rows;
      }
    }
  }
}

#ifdef WITH_AMX
bool amx() {  // the kernel lends the tiles' state to processes that ask; one answer for the whole process
  constexpr int REQUEST = 0x1023, TILES = 18;
  static const bool lent = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
  return lent;
}

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 sums [16 outputs, 16 rows], 4-5 weights [16, 32 k], 6-7 rows [16 pairs of k, 16]
void configure() {
  Tiles tiles;
  for (int t = 0; t < 8; ++t) tiles.bytes[t] = 64, tiles.rows[t] = 16;
  __asm__ volatile("" ::"r"(&tiles) : "memory");  // gcc 12 says that only its first word is read
  _tile_loadconfig(&tiles);
}

// x [blocks of 16 rows, blocks of 32 k, 16 pairs, 16 rows, 2]
void multiply_tiles(const uint16_t* x, int64_t M, const uint16_t* w, int64_t K, int64_t begin, int64_t end,
                    const Out& out) {
  alignas(64) float sums[4][256];
  alignas(64) uint16_t rest[32 * 32];  // weights of a block that lacks outputs or inputs
  const int64_t blocks = (K + 31) / 32, size = blocks * 512;
  configure();
  for (int64_t n = begin; n < end; n += 32) {
    const int64_t outputs = std::min<int64_t>(32, end - n);
    for (int64_t row = 0; row < M; row += 32) {
      const uint16_t* a = x + row / 16 * size;
      const bool both = row + 16 < M;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t k = 32 * block, inputs = std::min<int64_t>(32, K - k);
        const uint16_t* from = w + n * K + k;
        int64_t line = K;
        if (row == 0)
          for (int64_t i = 32; i < 64; ++i) __builtin_prefetch(from + i * K, 0, 3);
        if (outputs < 32 || inputs < 32) {
          std::memset(rest, 0, sizeof rest);
          for (int64_t i = 0; i < outputs; ++i) std::memcpy(rest + 32 * i, from + i * K, inputs * 2);
          from = rest, line = 32;
        }
        _tile_loadd(4, from, line * 2);
        _tile_loadd(5, from + 16 * line, line * 2);
        _tile_loadd(6, a + 512 * block, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
          _tile_loadd(7, a + size + 512 * block, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      for (int64_t r = 0; r < std::min<int64_t>(32, M - row); ++r)
        for (int64_t i = 0; i < outputs; ++i)
          out.put(row + r, n + i, sums[r / 16 * 2 + i / 16][i % 16 * 16 + r % 16]);
    }
  }
  _tile_release();
}

// x [M, K] bf16 as `multiply_tiles` takes it
at::Tensor tiled(const at::Tensor& x) {
  const int64_t M = x.size(0), K = x.size(1), Mp = (M + 15) / 16 * 16, Kp = (K + 31) / 32 * 32;
  auto padded = at::zeros({Mp, Kp}, x.options());
  padded.narrow(0, 0, M).narrow(1, 0, K).copy_(x);
  return padded.view({Mp / 16, 16, Kp / 32, 16, 2}).permute({0, 2, 3, 1, 4}).contiguous();
}
#endif

// rows [M, K] as `type`, K padded with zeros to whole steps
at::Tensor rows_as(const at::Tensor& x, at::ScalarType type, int64_t depth) {
  const int64_t M = x.size(0), K = x.size(1), more = (depth - K % depth) % depth;
  if (more == 0) return x.to(type).contiguous();
  auto padded = at::zeros({M, K + more}, x.options().dtype(type));
  padded.narrow(1, 0, K).copy_(x);
  return padded;
}

// part(a, b): outputs [32 a, 32 b)
template <class Part>
void over_outputs(int64_t N, int64_t K, const Part& part) {
  // a thread is worth some tens of thousands of multiply-adds
  at::parallel_for(0, (N + 31) / 32, std::max<int64_t>(1, (1 << 16) / (32 * K)), part);
}

template <class Kind>
void run(const at::Tensor& rows, const at::Tensor& weight, const Out& out) {
  const int64_t M = rows.size(0), K = weight.size(1), ldx = rows.numel() / M;
  const auto* x = static_cast<const typename Kind::input*>(rows.data_ptr());
  const auto* w = static_cast<const typename Kind::weight*>(weight.data_ptr());
  over_outputs(out.N, K, [&](int64_t a, int64_t b) {
    multiply<Kind>(x, ldx, M, w, K, 32 * a, std::min(32 * b, out.N), out);
  });
}

void linear_in_int8(const at::Tensor& x, const at::Tensor& weight, const Out& out) {
  const int64_t M = x.size(0), K = x.size(1), groups = (K + GROUP - 1) / GROUP;
  const auto rows = x.to(at::kFloat).contiguous();
  const auto* w = reinterpret_cast<const Group*>(weight.data_ptr());
  std::vector<RowGroup> quantized(M * groups);
  at::parallel_for(0, M, std::max<int64_t>(1, (1 << 14) / K), [&](int64_t a, int64_t b) {
    for (; a < b; ++a) quantize_row(rows.data_ptr<float>() + a * K, K, &quantized[a * groups]);
  });
  over_outputs(out.N, K, [&](int64_t a, int64_t b) {
    multiply<Bytes>(quantized.data(), groups, M, w, groups, 32 * a, std::min(32 * b, out.N), out);
  });
}

void linear_into(const at::Tensor& x, const at::Tensor& weight, const Out& out) {
  if (weight.scalar_type() == at::kByte) return linear_in_int8(x, weight, out);
  if (weight.scalar_type() == at::kFloat) return run<Float>(rows_as(x, at::kFloat, Float::depth), weight, out);
  if (weight.scalar_type() == at::kHalf) return run<Half>(rows_as(x, at::kFloat, Half::depth), weight, out);
#ifdef __AVX512BF16__
  if (x.scalar_type() == at::kBFloat16) {
#ifdef WITH_AMX
    if (amx()) {
      const auto rows = tiled(x);
      const auto *from = static_cast<const uint16_t*>(rows.data_ptr()),
                 *w = static_cast<const uint16_t*>(weight.data_ptr());
      const int64_t M = x.size(0), K = x.size(1);
      over_outputs(out.N, K, [&](int64_t a, int64_t b) {
        multiply_tiles(from, M, w, K, 32 * a, std::min(32 * b, out.N), out);
      });
      return;
    }
#endif
    return run<Dots>(rows_as(x, at::kBFloat16, Dots::depth), weight, out);
  }
#endif
  const auto rows = rows_as(x, at::kFloat, Pairs::depth), parted = at::empty(rows.sizes(), rows.options());
  const float* from = rows.data_ptr<float>();
  float* to = parted.data_ptr<float>();
  for (int64_t i = 0; i < rows.numel(); i += Pairs::depth)
    for (int64_t j = 0; j < LANES; ++j) to[i + j] = from[i + 2 * j], to[i + LANES + j] = from[i + 2 * j + 1];
  run<Pairs>(parted, weight, out);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t K = x.size(-1), N = weight.size(0);
  const bool bytes = weight.scalar_type() == at::kByte;
  const int64_t width = bytes ? (K + GROUP - 1) / GROUP * sizeof(Group) : K;
  TORCH_CHECK(weight.size(1) == width && weight.is_contiguous(), "eagle::linear: the weights ",
              weight.sizes(), " must be contiguous, and as wide as the rows, ", K);
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "eagle::linear takes float32, bfloat16 or float16, not ", type);
  auto shape = x.sizes().vec();
  shape.back() = N;
  auto y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const auto rows = x.reshape({-1, K}), added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  linear_into(rows, weight, {y.data_ptr(), y.scalar_type(), bias ? added.data_ptr<float>() : nullptr, N});
  return y;
}

// The weights of a pass, by number
struct Linears : torch::CustomClassHolder {
  std::vector<at::Tensor> weights;
  std::vector<std::optional<at::Tensor>> biases;
  Linears(std::vector<at::Tensor> w, std::vector<std::optional<at::Tensor>> b)
      : weights(std::move(w)), biases(std::move(b)) {}
};
c10::intrusive_ptr<Linears> lent;

at::Tensor linear_of_pass(const at::Tensor& x, int64_t number, int64_t) {
  TORCH_CHECK(lent, "eagle::linear outside of a pass");
  return ::linear(x, lent->weights.at(number), lent->biases.at(number));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(eagle_cpu, m) {
  m.class_<Linears>("Linears")
      .def(torch::init<std::vector<at::Tensor>, std::vector<std::optional<at::Tensor>>>());
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear);
  m.def("lend(__torch__.torch.classes.eagle_cpu.Linears? weights) -> ()",
        [](std::optional<c10::intrusive_ptr<Linears>> weights) { lent = weights ? *weights : nullptr; });
}

TORCH_LIBRARY_IMPL(eagle, CPU, m) { m.impl("linear", linear_of_pass); }
