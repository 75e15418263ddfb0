// Tree attention on a CPU: `tree_attention` of tree_attention.py over packed rows, with the write of the
// pass's keys and values in front of it.
//
// b rows in use of B, T packed tokens, n tokens of one row, M tree slots a row, Hq query heads, Hkv key/value
// heads, G = Hq / Hkv, C capacity, D head_dim. A row's queries of one key/value head are R = G * n lines.
//
// One task is a row, a key/value head and a tile of lines. It walks the keys in blocks of 64 with a running
// softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) in float32: for each block, scores = Q K^T, then
// out += exp(scores - max) V. Slots past the live ones are never read.
//
// A line's bits depend on what it sees alone: its keys take their lanes of the blocks in the order of their
// slots, those that it does not see left out, and every sum goes through them one by one. So a token has the
// same bits as a tree node whose ancestors lie scattered, as one of a prompt's chunk, and decoded alone. What a
// line sees is a run of slots from 0 on (the prefix, and the first tree slots as far as it sees them all),
// which lines share, and single tree slots after that, its extras.

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 64;  // keys a block, and columns of the micro-kernel
constexpr int64_t LINES = 64;  // lines a tile
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

inline lanes multiply_add(float x, const float* line, lanes sum) {
  return multiply_add(all(x), load(line), sum);
}
#ifdef __AVX512BF16__
// the same with pairs of bf16 in a 32-bit word: vdpbf16ps adds both products to a float32
inline lanes multiply_add(uint32_t x, const uint32_t* line, lanes sum) {
  const __m512bh pairs = (__m512bh)_mm512_set1_epi32(x);
  return (lanes)_mm512_dpbf16_ps((__m512)sum, pairs, (__m512bh)_mm512_loadu_si512(line));
}
#endif

// c[r][0..63] (+)= sum_k a[r][k] * b[k][0..63], for up to ROWS lines r; a word of a and b is a number or a pair
template <int ROWS = 6, typename word>
void multiply(int64_t lines, const word* a, int64_t lda, const word* b, int64_t ldb, int64_t depth, float* c,
              int64_t ldc, bool add) {
  if (lines < ROWS) {
    if constexpr (ROWS > 1) multiply<ROWS - 1>(lines, a, lda, b, ldb, depth, c, ldc, add);
    return;
  }
  constexpr int WIDE = LANES == 16 || ROWS <= 2 ? 4 : 2;  // vectors, as registers allow
  for (int64_t j0 = 0; j0 < BLOCK; j0 += WIDE * LANES, b += WIDE * LANES, c += WIDE * LANES) {
    lanes sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < WIDE; ++j) sum[r][j] = add ? load(c + r * ldc + LANES * j) : lanes{};
    for (int64_t k = 0; k < depth; ++k)
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < WIDE; ++j)
          sum[r][j] = multiply_add(a[r * lda + k], b + k * ldb + LANES * j, sum[r][j]);
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < WIDE; ++j) store(c + r * ldc + LANES * j, sum[r][j]);
  }
}

template <typename word>
void multiply_lines(int64_t lines, const word* a, int64_t lda, const word* b, int64_t ldb, int64_t depth,
                    float* c, int64_t ldc, bool add) {
  for (; lines > 0; lines -= 6, a += 6 * lda, c += 6 * ldc)
    multiply(std::min<int64_t>(lines, 6), a, lda, b, ldb, depth, c, ldc, add);
}

// exp for x <= 0 to within 2 units in the last place (Cephes' reduction and polynomial); 0 below -87
inline lanes exp_of(lanes x) {
  const lanes kept = __builtin_convertvector(-(x > all(-87.0f)), lanes);  // 1 or 0
  x = x > all(-87.0f) ? x : all(-87.0f);
  const lanes magic = all(12582912.0f);  // 1.5 * 2^23: adding and taking it away rounds to a whole number
  const lanes n = (x * all(1.44269504088896341f) + magic) - magic;
  x = x - n * all(0.693359375f);
  x = x - n * all(-2.12194440e-4f);
  lanes p = all(1.9875691500e-4f);
  p = p * x + all(1.3981999507e-3f);
  p = p * x + all(8.3334519073e-3f);
  p = p * x + all(4.1665795894e-2f);
  p = p * x + all(1.6666665459e-1f);
  p = p * x + all(5.0000001201e-1f);
  p = p * x * x + x + all(1.0f);
  const integers bits = (__builtin_convertvector(n, integers) + 127) << 23;
  lanes scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale * kept;
}

// The two products of a block, in float32: keys transposed to [D, BLOCK], queries and weights as they are. UNIT
// lanes are added at once, from a multiple of it on.
template <typename scalar>
struct Products {
  static constexpr int64_t UNIT = 1;
  static void query(const scalar* from, int64_t D, float* line) {
    for (int64_t d = 0; d < D; ++d) line[d] = widen(from[d]);
  }
  static void keys(const scalar* K, int64_t width, int64_t D, float* Kt) {
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t s = 0; s < width; ++s) Kt[d * BLOCK + s] = widen(K[s * D + d]);
      for (int64_t s = width; s < BLOCK; ++s) Kt[d * BLOCK + s] = 0;
    }
  }
  // value(s) is where the D values of lane s lie; columns [D, Dp) of `to` are zeros
  template <class Value>
  static void values(const Value& value, int64_t width, int64_t D, int64_t Dp, float* to) {
    for (int64_t s = 0; s < width; ++s) {
      const scalar* from = value(s);
      for (int64_t d = 0; d < D; ++d) to[s * Dp + d] = widen(from[d]);
      for (int64_t d = D; d < Dp; ++d) to[s * Dp + d] = 0;
    }
  }
  static void scores(int64_t lines, const float* Q, const float* Kt, int64_t D, int64_t Dp, float* S,
                     int64_t ld) {
    multiply_lines(lines, Q, Dp, Kt, BLOCK, D, S, ld, false);
  }
  static void ready(float*) {}
  // acc += weights of `lanes` lanes from `lane` on, times their values
  static void weigh(int64_t lines, const float* S, int64_t lane, int64_t lanes, const float* V, int64_t Dp,
                    float* acc) {
    for (int64_t d = 0; d < Dp; d += BLOCK)
      multiply_lines(lines, S + lane, BLOCK, V + d, Dp, lanes, acc + d, Dp, true);
  }
};

#ifdef __AVX512BF16__
// The same in pairs: keys [pairs of D, BLOCK], values [pairs of slots, Dp], weights in the scores' place.
template <>
struct Products<c10::BFloat16> {
  static constexpr int64_t UNIT = 2;
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
  template <class Value>
  static void values(const Value& value, int64_t width, int64_t D, int64_t Dp, float* packed) {
    auto* to = reinterpret_cast<uint32_t*>(packed);
    for (int64_t s = 0; s < width; s += 2, to += Dp) {
      const auto* even = reinterpret_cast<const uint16_t*>(value(s));
      if (s + 1 < width) {
        const auto* odd = reinterpret_cast<const uint16_t*>(value(s + 1));
        for (int64_t d = 0; d < D; ++d) to[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
      } else {
        for (int64_t d = 0; d < D; ++d) to[d] = even[d];
      }
      for (int64_t d = D; d < Dp; ++d) to[d] = 0;
    }
  }
  static void scores(int64_t lines, const float* Q, const float* Kt, int64_t D, int64_t Dp, float* S,
                     int64_t ld) {
    multiply_lines(lines, reinterpret_cast<const uint32_t*>(Q), Dp,
                   reinterpret_cast<const uint32_t*>(Kt), BLOCK, (D + 1) / 2, S, ld, false);
  }
  static void ready(float* line) {  // the weights of a line become bf16 in its own place
    for (int64_t s = 0; s < BLOCK; s += 32) {
      const __m512 low = _mm512_loadu_ps(line + s), high = _mm512_loadu_ps(line + s + 16);
      _mm512_storeu_si512(line + s / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
  static void weigh(int64_t lines, const float* S, int64_t lane, int64_t lanes, const float* V, int64_t Dp,
                    float* acc) {
    for (int64_t d = 0; d < Dp; d += BLOCK)
      multiply_lines(lines, reinterpret_cast<const uint32_t*>(S) + lane / 2, BLOCK,
                     reinterpret_cast<const uint32_t*>(V) + d, Dp, (lanes + 1) / 2, acc + d, Dp, true);
  }
};
#endif

// What a token of the pass sees: slots below `run`, and `count` tree slots after them, from `extras` on
struct Seen {
  int64_t run, count;
  const int64_t* extras;  // numbers of tree slots
  int64_t end() const { return run + count; }  // lanes it fills, from 0
};

// What holds for every layer of a pass: `TreeContext`. mask [b, N, M] and tree_positions [b, M] describe the
// tree's slots, the last N of them the queries', no mask a causal tree; starts [b + 1] says which packed tokens
// are a row's.
struct Pass : torch::CustomClassHolder {
  at::Tensor buffer, rows, starts, lengths, places;
  int64_t offset, M;
  std::vector<Seen> seen;  // [T]
  std::vector<int64_t> extras;

  Pass(at::Tensor buffer_, at::Tensor rows_, at::Tensor starts_, at::Tensor lengths_,
       std::optional<at::Tensor> mask_, at::Tensor tree_positions, int64_t offset_)
      : buffer(buffer_), rows(rows_), starts(starts_), lengths(lengths_), places(tree_positions.contiguous()),
        offset(offset_), M(places.size(1)) {
    TORCH_CHECK(buffer.is_contiguous());
    const at::Tensor mask = mask_ ? mask_->contiguous() : at::Tensor();
    const int64_t b = rows.size(0), N = M - offset;
    const int64_t *start = starts.data_ptr<int64_t>(), *length = lengths.data_ptr<int64_t>(), T = start[b];
    seen.resize(T);
    if (mask_) extras.resize(T * M);
    for (int64_t i = 0; i < b; ++i)
      for (int64_t t = start[i]; t < start[i + 1]; ++t) {
        seen[t] = {length[i] + offset + t - start[i] + 1, 0, nullptr};
        if (!mask_) continue;
        const bool* line = mask.data_ptr<bool>() + (i * N + t - start[i]) * M;
        int64_t *found = extras.data() + t * M, m = 0, end = offset + start[i + 1] - start[i];
        while (m < end && line[m]) ++m;
        seen[t] = {length[i] + m, 0, found};
        for (; m < end; ++m)
          if (line[m]) found[seen[t].count++] = m;
      }
  }
};
c10::intrusive_ptr<Pass> current;

template <typename scalar>
void attend_typed(const Pass& pass, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  int64_t layer, float scaling, int64_t window, float softcap, const float* sinks,
                  at::Tensor& out) {
  using Kind = Products<scalar>;
  const int64_t Hq = q.size(1), D = q.size(3), Hkv = k.size(1), G = Hq / Hkv;
  const int64_t b = pass.rows.size(0), M = pass.M, offset = pass.offset;
  const int64_t C = pass.buffer.size(4), B = pass.buffer.size(2), half = B * Hkv * C * D;
  scalar* keys = pass.buffer.data_ptr<scalar>() + layer * 2 * half;
  scalar* values = keys + half;
  const int64_t *rows = pass.rows.data_ptr<int64_t>(), *starts = pass.starts.data_ptr<int64_t>(),
                *lengths = pass.lengths.data_ptr<int64_t>(),
                *places = pass.places.data_ptr<int64_t>();
  const scalar *qp = q.data_ptr<scalar>(), *kp = k.data_ptr<scalar>(), *vp = v.data_ptr<scalar>();
  scalar* op = out.data_ptr<scalar>();
  const int64_t q_head = q.stride(1), q_token = q.stride(2), k_head = k.stride(1), k_token = k.stride(2),
                v_head = v.stride(1), v_token = v.stride(2);

  int64_t longest = 0;
  for (int64_t i = 0; i < b; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
  const int64_t tiles = (G * longest + LINES - 1) / LINES;
  // depth of the products in whole registers, and columns in whole micro-kernels
  const int64_t Dp = (D + BLOCK - 1) / BLOCK * BLOCK, Mp = (M + BLOCK - 1) / BLOCK * BLOCK;

  // a row's tiles of one head share what they write, so they are written before any of them reads
  for (int64_t i = 0; i < b; ++i)
    for (int64_t t = starts[i]; t < starts[i + 1]; ++t)
      for (int64_t h = 0; h < Hkv; ++h) {
        const int64_t to = ((rows[i] * Hkv + h) * C + lengths[i] + offset + t - starts[i]) * D;
        std::memcpy(keys + to, kp + h * k_head + t * k_token, D * sizeof(scalar));
        std::memcpy(values + to, vp + h * v_head + t * v_token, D * sizeof(scalar));
      }

  at::parallel_for(0, b * Hkv * tiles, 1, [&](int64_t from, int64_t till) {
    thread_local std::vector<float> space;  // kept: zeroing it anew costs more than a small pass
    space.resize(std::max<size_t>(
        space.size(), LINES * Dp * 2 + BLOCK * Dp * 3 + LINES * (BLOCK + Mp) + 2 * LINES));
    float* Q = space.data();             // [lines, Dp]
    float* acc = Q + LINES * Dp;         // [lines, Dp]
    float* Kt = acc + LINES * Dp;        // [Dp, BLOCK]
    float* V = Kt + BLOCK * Dp;          // [BLOCK, Dp]
    float* own = V + BLOCK * Dp;         // [BLOCK, Dp], values of a token's extras
    float* S = own + BLOCK * Dp;         // [lines, BLOCK]
    float* tree = S + LINES * BLOCK;     // [lines, Mp], scores of tree slots
    float* top = tree + LINES * Mp;      // [lines]
    float* mass = top + LINES;           // [lines]
    for (int64_t task = from; task < till; ++task) {
      const int64_t i = task / (Hkv * tiles), h = task / tiles % Hkv, tile = task % tiles;
      const int64_t n = starts[i + 1] - starts[i], first = tile * LINES;
      const int64_t lines = std::min(LINES, G * n - first);
      if (lines <= 0) continue;
      const int64_t prefix = lengths[i];
      const scalar* K0 = keys + (rows[i] * Hkv + h) * C * D;
      const scalar* V0 = values + (rows[i] * Hkv + h) * C * D;
      // line r is query token (first + r) / G under query head h * G + (first + r) % G
      const auto token_of = [&](int64_t r) { return (first + r) / G; };
      const auto seen_of = [&](int64_t r) -> const Seen& { return pass.seen[starts[i] + token_of(r)]; };
      const auto place_of = [&](int64_t r) { return places[i * M + offset + token_of(r)]; };
      int64_t lowest = std::numeric_limits<int64_t>::max();  // the oldest position any line looks at
      int64_t shortest = lowest, run = 0, end = 0, low = M, high = 0;  // slots in runs, lanes, extras
      for (int64_t r = 0; r < lines; ++r) {
        const int64_t head = h * G + (first + r) % G;
        const Seen& line = seen_of(r);
        Kind::query(qp + head * q_head + (starts[i] + token_of(r)) * q_token, D, Q + r * Dp);
        lowest = std::min(lowest, place_of(r) - window + 1);
        shortest = std::min(shortest, line.run);
        run = std::max(run, line.run);
        end = std::max(end, line.end());
        if (line.count) {
          low = std::min(low, line.extras[0]);
          high = std::max(high, line.extras[line.count - 1] + 1);
        }
        top[r] = NOTHING;
        mass[r] = 0;
      }
      std::fill(acc, acc + lines * Dp, 0.0f);
      for (int64_t m = low; m < high; m += BLOCK) {
        Kind::keys(K0 + (prefix + m) * D, std::min(BLOCK, high - m), D, Kt);
        Kind::scores(lines, Q, Kt, D, Dp, tree + m - low, Mp);
      }
      const int64_t begin = window ? std::max<int64_t>(0, std::min(lowest, prefix)) / BLOCK * BLOCK : 0;
      for (int64_t s0 = begin; s0 < end; s0 += BLOCK) {
        const auto lanes_to = [&](int64_t slot) { return std::clamp<int64_t>(slot - s0, 0, BLOCK); };
        if (const int64_t width = lanes_to(run)) {
          Kind::keys(K0 + s0 * D, width, D, Kt);
          Kind::values([&](int64_t s) { return V0 + (s0 + s) * D; }, width, D, Dp, V);
          Kind::scores(lines, Q, Kt, D, Dp, S, BLOCK);
        }
        for (int64_t r = 0; r < lines; ++r) {
          float* score = S + r * BLOCK;
          const Seen& line = seen_of(r);
          const int64_t width = lanes_to(line.end());
          for (int64_t s = lanes_to(line.run); s < width; ++s)
            score[s] = tree[r * Mp + line.extras[s0 + s - line.run] - low];
          for (int64_t s = 0; s < BLOCK; s += LANES) store(score + s, load(score + s) * all(scaling));
          if (softcap > 0)
            for (int64_t s = 0; s < width; ++s) score[s] = softcap * std::tanh(score[s] / softcap);
          if (window) {
            const int64_t oldest = place_of(r) - window;  // this one is out
            for (int64_t s = 0; s < width; ++s) {
              const int64_t slot = s0 + s, extra = slot - line.run;
              const int64_t m = extra < 0 ? slot - prefix : line.extras[extra];
              if ((m < 0 ? slot : places[i * M + m]) <= oldest) score[s] = NOTHING;
            }
          }
          for (int64_t s = width; s < BLOCK; ++s) score[s] = NOTHING;
          lanes peak = load(score);
          for (int64_t s = LANES; s < BLOCK; s += LANES) {
            const lanes next = load(score + s);
            peak = next > peak ? next : peak;
          }
          float best = top[r];
          for (int lane = 0; lane < LANES; ++lane) best = std::max(best, peak[lane]);
          if (best == NOTHING) {  // to see so far
            std::fill(score, score + BLOCK, 0.0f);
            continue;
          }
          const float shrink = std::exp(top[r] - best);
          lanes total{};
          for (int64_t s = 0; s < BLOCK; s += LANES) {
            const lanes weight = exp_of(load(score + s) - all(best));
            store(score + s, weight);
            total += weight;
          }
          float sum = 0;
          for (int lane = 0; lane < LANES; ++lane) sum += total[lane];
          mass[r] = mass[r] * shrink + sum;
          top[r] = best;
          if (shrink != 1.0f)
            for (int64_t d = 0; d < Dp; ++d) acc[r * Dp + d] *= shrink;
          Kind::ready(score);
        }
        // what all lines see together, then what each token sees besides: the rest of its run, its extras
        const auto whole = [&](int64_t lanes) { return lanes / Kind::UNIT * Kind::UNIT; };
        const int64_t shared = whole(lanes_to(shortest));
        if (shared) Kind::weigh(lines, S, 0, shared, V, Dp, acc);
        for (int64_t r = 0, count; r < lines; r += count) {
          count = std::min(lines - r, G - (first + r) % G);
          const Seen& line = seen_of(r);
          const int64_t till = whole(lanes_to(line.run)), width = lanes_to(line.end());
          if (till > shared)
            Kind::weigh(count, S + r * BLOCK, shared, till - shared, V + shared / Kind::UNIT * Dp, Dp,
                        acc + r * Dp);
          if (width <= till) continue;
          const auto value = [&](int64_t s) {
            const int64_t slot = s0 + till + s, extra = slot - line.run;
            return V0 + (extra < 0 ? slot : prefix + line.extras[extra]) * D;
          };
          Kind::values(value, width - till, D, Dp, own);
          Kind::weigh(count, S + r * BLOCK, till, width - till, own, Dp, acc + r * Dp);
        }
      }
      for (int64_t r = 0; r < lines; ++r) {
        const int64_t head = h * G + (first + r) % G;
        float scale = mass[r] > 0 ? 1 / mass[r] : 0;
        if (sinks != nullptr && mass[r] > 0) {  // one more logit that takes probability and gives nothing
          const float best = std::max(top[r], sinks[head]), shrink = std::exp(top[r] - best);
          scale = shrink / (mass[r] * shrink + std::exp(sinks[head] - best));
        }
        scalar* to = op + ((starts[i] + token_of(r)) * Hq + head) * D;
        for (int64_t d = 0; d < D; ++d) to[d] = static_cast<scalar>(acc[r * Dp + d] * scale);
      }
    }
  });
}

at::Tensor attend(const c10::intrusive_ptr<Pass>& pass, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, int64_t layer, double scaling, int64_t window, double softcap,
                  const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1);
  TORCH_CHECK(q.scalar_type() == pass->buffer.scalar_type() && q.size(2) == k.size(2));
  TORCH_CHECK(q.size(2) == static_cast<int64_t>(pass->seen.size()));
  auto out = at::empty({1, q.size(2), q.size(1), q.size(3)}, q.options());
  at::Tensor sink;
  if (sinks) sink = sinks->to(at::kFloat).contiguous();
  const float* s = sinks ? sink.data_ptr<float>() : nullptr;
  if (q.scalar_type() == at::kBFloat16)
    attend_typed<c10::BFloat16>(*pass, q, k, v, layer, scaling, window, softcap, s, out);
  else if (q.scalar_type() == at::kHalf)
    attend_typed<c10::Half>(*pass, q, k, v, layer, scaling, window, softcap, s, out);
  else if (q.scalar_type() == at::kFloat)
    attend_typed<float>(*pass, q, k, v, layer, scaling, window, softcap, s, out);
  else
    TORCH_CHECK(false, "eagle::attend takes float32, bfloat16 or float16, not ", q.scalar_type());
  return out;
}

at::Tensor attend_in_pass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t layer,
                          double scaling, int64_t window, double softcap,
                          const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(current, "eagle::attend outside of a pass");
  return attend(current, q, k, v, layer, scaling, window, softcap, sinks);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(eagle_cpu, m) {
  m.class_<Pass>("Pass").def(torch::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                         std::optional<at::Tensor>, at::Tensor, int64_t>());
  m.def("enter(__torch__.torch.classes.eagle_cpu.Pass? context) -> ()",
        [](std::optional<c10::intrusive_ptr<Pass>> pass) { current = pass ? *pass : nullptr; });
  m.def("attend(__torch__.torch.classes.eagle_cpu.Pass context, Tensor q, Tensor k, Tensor v, int layer, "
        "float scaling, int window, float softcap, Tensor? sinks) -> Tensor", attend);
}

TORCH_LIBRARY_IMPL(eagle, CPU, m) { m.impl("attend", attend_in_pass); }
