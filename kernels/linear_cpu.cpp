// A linear layer whose outputs are each summed over k in one fixed order, whatever the number of rows: `linear`
// of linear.py over panels that `pack` there has made.
//
// M rows, K inputs, N outputs. A panel is 16 outputs; P panels. bf16 panels hold pairs of k in a 32-bit word,
// [P, K / 2, 16, 2] with K padded to 32; float32 panels are [P, K, 16].
//
// What is summed how depends on the types and the machine alone:
// - bf16 rows by bf16 panels with AMX: TDPBF16PS over blocks of 32 k; with AVX512-BF16: VDPBF16PS over pairs;
// - everything else: one chain of float32 multiply-adds an output, over k from 0.
// A row of a tile is computed as it would be in a tile of its own, and padding is zeros on both sides.

#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define WITH_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t WIDTH = 16;  // outputs a panel
constexpr int ROWS = 6;        // rows a tile of vectors
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

template <typename vector>
inline vector load(const void* p) {
  vector x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, v16 x) { __builtin_memcpy(p, &x, sizeof x); }

// x * w + sum, rounded once where the machine can
inline v16 multiply_add(float x, v16 w, v16 sum) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)w, (__m512)sum);
#else
  v16 many = x - v16{};
#if defined(__FMA__)
  __m256 a[2], b[2], c[2];
  __builtin_memcpy(a, &many, 64), __builtin_memcpy(b, &w, 64), __builtin_memcpy(c, &sum, 64);
  for (int i = 0; i < 2; ++i) c[i] = _mm256_fmadd_ps(a[i], b[i], c[i]);
  __builtin_memcpy(&sum, c, 64);
  return sum;
#else
  return sum + many * w;
#endif
#endif
}

// One step over k: `depth` inputs of a row, and a panel's weights for them
struct Float {
  typedef float input;
  static constexpr int64_t depth = 1, bytes = 64;
  template <int R, int P>
  static inline void step(const float* x, int64_t ld, const char* w, int64_t panel, v16 (&sum)[R][P]) {
    for (int p = 0; p < P; ++p) {
      const v16 weight = load<v16>(w + p * panel);
      for (int r = 0; r < R; ++r) sum[r][p] = multiply_add(x[r * ld], weight, sum[r][p]);
    }
  }
};

struct Pairs {  // bf16 weights, float32 rows
  typedef float input;
  static constexpr int64_t depth = 2, bytes = 64;
  template <int R, int P>
  static inline void step(const float* x, int64_t ld, const char* w, int64_t panel, v16 (&sum)[R][P]) {
    for (int p = 0; p < P; ++p) {
      const u16 word = load<u16>(w + p * panel);
      const v16 first = (v16)(word << 16), second = (v16)(word & 0xffff0000u);
      for (int r = 0; r < R; ++r) sum[r][p] = multiply_add(x[r * ld], first, sum[r][p]);
      for (int r = 0; r < R; ++r) sum[r][p] = multiply_add(x[r * ld + 1], second, sum[r][p]);
    }
  }
};

#ifdef __AVX512BF16__
struct Dots {  // bf16 weights, bf16 rows
  typedef uint16_t input;
  static constexpr int64_t depth = 2, bytes = 64;
  template <int R, int P>
  static inline void step(const uint16_t* x, int64_t ld, const char* w, int64_t panel, v16 (&sum)[R][P]) {
    for (int p = 0; p < P; ++p) {
      const __m512bh weight = (__m512bh)_mm512_loadu_si512(w + p * panel);
      for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(x + r * ld));
        sum[r][p] = (v16)_mm512_dpbf16_ps((__m512)sum[r][p], pair, weight);
      }
    }
  }
};
#endif

// Where a panel's outputs go
template <typename scalar>
struct Out {
  scalar* y;
  const float* bias;
  int64_t N;
  void put(int64_t row, int64_t panel, v16 sum) const {
    const int64_t first = panel * WIDTH, width = std::min(WIDTH, N - first);
    float line[WIDTH];
    store(line, sum);
    scalar* to = y + row * N + first;
    if (bias != nullptr)
      for (int64_t j = 0; j < width; ++j) line[j] += bias[first + j];
    for (int64_t j = 0; j < width; ++j) to[j] = static_cast<scalar>(line[j]);
  }
};

template <class Kind, int R, int P, typename scalar>
void tile(const typename Kind::input* x, int64_t ld, const char* w, int64_t steps, int64_t row, int64_t panel,
          const Out<scalar>& out) {
  v16 sum[R][P] = {};
  const int64_t size = steps * Kind::bytes;
  for (int64_t k = 0; k < steps; ++k)
    Kind::template step<R, P>(x + k * Kind::depth, ld, w + k * Kind::bytes, size, sum);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) out.put(row + r, panel + p, sum[r][p]);
}

// panels [begin, end) for all rows, some panels at a time, as registers allow
template <class Kind, int R, typename scalar>
void rows_of(const typename Kind::input* x, int64_t ld, const char* w, int64_t steps, int64_t row, int64_t begin,
             int64_t end, const Out<scalar>& out) {
#ifdef __AVX512F__
  constexpr int P = 4;
#else
  constexpr int P = R == 1 ? 4 : R <= 3 ? 2 : 1;
#endif
  const int64_t size = steps * Kind::bytes;
  int64_t p = begin;
  for (; p + P <= end; p += P) tile<Kind, R, P>(x + row * ld, ld, w + p * size, steps, row, p, out);
  for (; p < end; ++p) tile<Kind, R, 1>(x + row * ld, ld, w + p * size, steps, row, p, out);
}

template <class Kind, typename scalar>
void multiply(const typename Kind::input* x, int64_t ld, int64_t M, const char* w, int64_t steps, int64_t begin,
              int64_t end, const Out<scalar>& out) {
  const int64_t blocks = (M + ROWS - 1) / ROWS;
  for (int64_t p = begin; p < end; p += 4) {  // a few panels stay near while all rows go by
    const int64_t last = std::min(p + 4, end);
    for (int64_t i = 0, row = 0; i < blocks; ++i) {
      const int64_t rows = M / blocks + (i < M % blocks);
      if (rows == 1) rows_of<Kind, 1>(x, ld, w, steps, row, p, last, out);
      if (rows == 2) rows_of<Kind, 2>(x, ld, w, steps, row, p, last, out);
      if (rows == 3) rows_of<Kind, 3>(x, ld, w, steps, row, p, last, out);
      if (rows == 4) rows_of<Kind, 4>(x, ld, w, steps, row, p, last, out);
      if (rows == 5) rows_of<Kind, 5>(x, ld, w, steps, row, p, last, out);
      if (rows == 6) rows_of<Kind, 6>(x, ld, w, steps, row, p, last, out);
      row += rows;
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

// Tiles 0-3 sums, 4-5 rows, 6-7 weights; tiles 0, 1 and 4 have `upper` rows, 2, 3 and 5 have `lower`.
void configure(int64_t upper, int64_t lower) {
  Tiles tiles;
  for (int t = 0; t < 8; ++t) tiles.bytes[t] = 64, tiles.rows[t] = 16;
  tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = upper;
  tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = lower;
  __asm__ volatile("" ::"r"(&tiles) : "memory");  // gcc 12 says that only its first word is read
  _tile_loadconfig(&tiles);
}

template <typename scalar>
void put_tile(const float* sums, int64_t row, int64_t rows, int64_t panel, const Out<scalar>& out) {
  for (int64_t r = 0; r < rows; ++r) out.put(row + r, panel, load<v16>(sums + r * WIDTH));
}

// x bf16 [M, ld]; blocks of 32 k
template <typename scalar>
void multiply_tiles(const uint16_t* x, int64_t ld, int64_t M, const char* w, int64_t blocks, int64_t begin,
                    int64_t end, const Out<scalar>& out) {
  alignas(64) float sums[4][16 * WIDTH];
  const int64_t size = blocks * 1024;
  for (int64_t row = 0, set = -1; row < M;) {
    const int64_t upper = std::min<int64_t>(16, M - row), lower = std::min<int64_t>(16, M - row - upper);
    if (set != upper * 32 + lower) configure(upper, lower ? lower : 1), set = upper * 32 + lower;
    const uint16_t* a = x + row * ld;
    for (int64_t p = begin; p < end; p += 2) {
      const bool both = p + 1 < end;
      const char *b = w + p * size, *c = both ? b + size : b;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (lower) {
        for (int64_t k = 0; k < blocks; ++k) {
          _tile_loadd(4, a + 32 * k, ld * 2);
          _tile_loadd(6, b + 1024 * k, 64);
          _tile_loadd(7, c + 1024 * k, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a + 16 * ld + 32 * k, ld * 2);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
      } else {
        for (int64_t k = 0; k < blocks; ++k) {
          for (int line = 0; line < 1024; line += 64) {
            _mm_prefetch(b + 1024 * k + 4096 + line, _MM_HINT_T0);
            _mm_prefetch(c + 1024 * k + 4096 + line, _MM_HINT_T0);
          }
          _tile_loadd(4, a + 32 * k, ld * 2);
          _tile_loadd(6, b + 1024 * k, 64);
          _tile_loadd(7, c + 1024 * k, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      for (int64_t t = 0; t < 1 + both; ++t) {
        put_tile(sums[t], row, upper, p + t, out);
        put_tile(sums[2 + t], row + 16, lower, p + t, out);
      }
    }
    row += upper + lower;
  }
  _tile_release();
}
#endif

// rows [M, K] of any type as `type`, contiguous, K padded with zeros to a multiple of `unit`
at::Tensor rows_as(const at::Tensor& x, at::ScalarType type, int64_t unit) {
  const int64_t M = x.size(0), K = x.size(1), more = (unit - K % unit) % unit;
  if (more == 0) return x.to(type).contiguous();
  auto padded = at::zeros({M, K + more}, x.options().dtype(type));
  padded.narrow(1, 0, K).copy_(x);
  return padded;
}

template <typename scalar>
void linear_typed(const at::Tensor& x, const at::Tensor& panels, const float* bias, at::Tensor& y) {
  const int64_t M = x.size(0), P = panels.size(0), N = y.size(1);
  const char* w = static_cast<const char*>(panels.data_ptr());
  const Out<scalar> out{y.data_ptr<scalar>(), bias, N};
  // a thread is worth some tens of thousands of multiply-adds
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (x.size(1) * WIDTH));
  const auto over_panels = [&](auto&& part) { at::parallel_for(0, P, grain, part); };
  if (panels.scalar_type() == at::kBFloat16) {
    const int64_t pairs = panels.size(1);
#ifdef __AVX512BF16__
    if (x.scalar_type() == at::kBFloat16) {
      const auto rows = rows_as(x, at::kBFloat16, 32);
      const auto* from = reinterpret_cast<const uint16_t*>(rows.data_ptr());
      const int64_t ld = rows.size(1);
#ifdef WITH_AMX
      if (amx())
        return over_panels([&](int64_t begin, int64_t end) {
          multiply_tiles(from, ld, M, w, pairs / 16, begin, end, out);
        });
#endif
      return over_panels(
          [&](int64_t begin, int64_t end) { multiply<Dots>(from, ld, M, w, pairs, begin, end, out); });
    }
#endif
    const auto rows = rows_as(x, at::kFloat, 32);
    const auto* from = rows.data_ptr<float>();
    return over_panels([&](int64_t begin, int64_t end) {
      multiply<Pairs>(from, rows.size(1), M, w, pairs, begin, end, out);
    });
  }
  const auto rows = rows_as(x, at::kFloat, 1);
  const auto* from = rows.data_ptr<float>();
  over_panels([&](int64_t begin, int64_t end) {
    multiply<Float>(from, rows.size(1), M, w, panels.size(1), begin, end, out);
  });
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& panels, const std::optional<at::Tensor>& bias,
                  int64_t N) {
  const int64_t K = x.size(-1), depth = panels.scalar_type() == at::kBFloat16 ? (K + 31) / 32 * 16 : K;
  TORCH_CHECK(panels.is_contiguous() && panels.size(1) == depth && panels.size(0) == (N + WIDTH - 1) / WIDTH,
              "eagle::linear: these weights are not of ", K, " inputs and ", N, " outputs");
  auto shape = x.sizes().vec();
  shape.back() = N;
  auto y = at::empty(shape, x.options());
  const auto rows = x.reshape({-1, K});
  auto flat = y.view({-1, N});
  const float* added = bias ? bias->data_ptr<float>() : nullptr;
  if (y.numel() == 0) return y;
  if (x.scalar_type() == at::kBFloat16)
    linear_typed<c10::BFloat16>(rows, panels, added, flat);
  else if (x.scalar_type() == at::kHalf)
    linear_typed<c10::Half>(rows, panels, added, flat);
  else if (x.scalar_type() == at::kFloat)
    linear_typed<float>(rows, panels, added, flat);
  else
    TORCH_CHECK(false, "eagle::linear takes float32, bfloat16 or float16, not ", x.scalar_type());
  return y;
}

// The weights of a pass, by number
struct Linears : torch::CustomClassHolder {
  std::vector<at::Tensor> panels, biases;  // an undefined bias is none
  Linears(std::vector<at::Tensor> p, std::vector<std::optional<at::Tensor>> b) : panels(std::move(p)) {
    for (auto& bias : b) biases.push_back(bias ? *bias : at::Tensor());
  }
};
c10::intrusive_ptr<Linears> lent;

at::Tensor linear_of_pass(const at::Tensor& x, int64_t number, int64_t N) {
  TORCH_CHECK(lent, "eagle::linear outside of a pass");
  const at::Tensor& bias = lent->biases.at(number);
  return linear(x, lent->panels.at(number), bias.defined() ? std::optional(bias) : std::nullopt, N);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(eagle_cpu, m) {
  m.class_<Linears>("Linears")
      .def(torch::init<std::vector<at::Tensor>, std::vector<std::optional<at::Tensor>>>());
  m.def("linear(Tensor x, Tensor panels, Tensor? bias, int out_features) -> Tensor", linear);
  m.def("lend(__torch__.torch.classes.eagle_cpu.Linears? weights) -> ()",
        [](std::optional<c10::intrusive_ptr<Linears>> weights) { lent = weights ? *weights : nullptr; });
}

TORCH_LIBRARY_IMPL(eagle, CPU, m) { m.impl("linear", linear_of_pass); }
