// The bookkeeping of a draft tree on a CPU, for which a dozen small tensor operations a level cost more than
// the level's own pass: the functions of grow_tree.py and commit_kv.py, of the same meaning.
//
// b rows, n beams, k candidates a beam, P candidates a row, H hidden, D draft vocabulary, N nodes.

#include "vectors.h"

namespace {

using at::Tensor;

// The `count` largest of `values`, the first of equals first, by place.
void largest(const float* values, int64_t size, int64_t count, std::vector<int64_t>& places) {
  // a sorted list of the best so far: almost every value is refused by its first comparison
  places.clear();
  for (int64_t i = 0; i < size; ++i) {
    if (static_cast<int64_t>(places.size()) == count) {
      if (!(values[i] > values[places.back()])) continue;
      places.pop_back();
    }
    auto at = places.end();
    while (at != places.begin() && values[i] > values[*(at - 1)]) --at;
    places.insert(at, i);
  }
}

std::tuple<Tensor, Tensor> candidates(const Tensor& log_probs, const std::optional<Tensor>& beam_scores,
                                      const Tensor& to_target, int64_t k) {
  const auto b = log_probs.size(0), n = log_probs.size(1), D = log_probs.size(2);
  const Tensor from = log_probs.contiguous();
  auto scores = at::empty({b, n * k}, from.options());
  auto tokens = at::empty({b, n * k}, to_target.options());
  const float* p = from.data_ptr<float>();
  Tensor before;
  if (beam_scores) before = beam_scores->contiguous();
  const float* base = beam_scores ? before.data_ptr<float>() : nullptr;
  const int64_t* ids = to_target.data_ptr<int64_t>();
  float* score = scores.data_ptr<float>();
  int64_t* token = tokens.data_ptr<int64_t>();
  std::vector<int64_t> best;
  for (int64_t line = 0; line < b * n; ++line) {
    largest(p + line * D, D, k, best);
    for (int64_t j = 0; j < k; ++j) {
      score[line * k + j] = p[line * D + best[j]] + (base ? base[line] : 0.0f);
      token[line * k + j] = ids[best[j]];
    }
  }
  return {scores, tokens};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_beams(const Tensor& scores, const Tensor& tokens,
                                                              const Tensor& hidden, const Tensor& seen,
                                                              int64_t k) {
  const auto b = scores.size(0), P = scores.size(1), m = hidden.size(1), H = hidden.size(2),
             M = seen.size(2);
  const Tensor states = hidden.contiguous(), visible = seen.contiguous();
  auto beam_scores = at::empty({b, k}, scores.options());
  auto pick = at::empty({b, k}, tokens.options()), beam_tokens = at::empty({b, k}, tokens.options());
  auto next = at::empty({b, k, H}, hidden.options()), sees = at::zeros({b, k, M + k}, seen.options());
  const float* s = scores.data_ptr<float>();
  const int64_t* t = tokens.data_ptr<int64_t>();
  const auto* from = static_cast<const char*>(states.data_ptr());
  auto* to = static_cast<char*>(next.data_ptr());
  const int64_t bytes = H * hidden.element_size();
  std::vector<int64_t> best;
  for (int64_t i = 0; i < b; ++i) {
    largest(s + i * P, P, k, best);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t place = best[j], beam = place / k, line = i * k + j;
      beam_scores.data_ptr<float>()[line] = s[i * P + place];
      pick.data_ptr<int64_t>()[line] = place;
      beam_tokens.data_ptr<int64_t>()[line] = t[i * P + place];
      std::memcpy(to + line * bytes, from + (i * m + beam) * bytes, bytes);
      bool* row = sees.data_ptr<bool>() + line * (M + k);
      if (M) std::memcpy(row, visible.data_ptr<bool>() + (i * m + beam) * M, M);
      row[M + j] = true;
    }
  }
  return {beam_scores, pick, beam_tokens, next, sees};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> keep_best(
    const Tensor& root, const Tensor& tokens, const Tensor& parents, const Tensor& scores, const Tensor& depth,
    int64_t num_nodes) {
  const auto b = scores.size(0), P = scores.size(1), N = std::min<int64_t>(num_nodes, P + 1);
  const Tensor all_tokens = tokens.contiguous(), all_parents = parents.contiguous(),
               all_scores = scores.contiguous(), levels = depth.contiguous();
  auto node_tokens = at::empty({b, N}, tokens.options());
  auto node_parents = at::zeros({b, N}, parents.options()), node_depth = at::zeros({b, N}, depth.options());
  auto node_scores = at::zeros({b, N}, scores.options());
  auto mask = at::zeros({b, N, N}, scores.options().dtype(at::kBool));
  std::vector<int64_t> place(P + 1), order(P);
  for (int64_t i = 0; i < b; ++i) {
    const float* s = all_scores.data_ptr<float>() + i * P;
    std::iota(order.begin(), order.end(), 0);
    // the first of equals first: a parent comes before its child
    std::partial_sort(order.begin(), order.begin() + N - 1, order.end(), [s](int64_t x, int64_t y) {
      return s[x] > s[y] || (s[x] == s[y] && x < y);
    });
    std::sort(order.begin(), order.begin() + N - 1);
    bool* seen = mask.data_ptr<bool>() + i * N * N;
    seen[0] = true;
    node_tokens.data_ptr<int64_t>()[i * N] = root.data_ptr<int64_t>()[i];
    place[0] = 0;
    for (int64_t node = 1; node < N; ++node) {
      const int64_t c = order[node - 1], at = i * P + c;
      place[c + 1] = node;
      const int64_t parent = place[all_parents.data_ptr<int64_t>()[at]];
      node_tokens.data_ptr<int64_t>()[i * N + node] = all_tokens.data_ptr<int64_t>()[at];
      node_parents.data_ptr<int64_t>()[i * N + node] = parent;
      node_depth.data_ptr<int64_t>()[i * N + node] = levels.data_ptr<int64_t>()[c];
      node_scores.data_ptr<float>()[i * N + node] = all_scores.data_ptr<float>()[at];
      std::memcpy(seen + node * N, seen + parent * N, node);
      seen[node * N + node] = true;
    }
  }
  return {node_tokens, node_parents, node_depth, mask, node_scores};
}

std::tuple<Tensor, Tensor, Tensor> longest_path(const Tensor& tokens, const Tensor& parents,
                                                const Tensor& depth, const Tensor& choices, int64_t levels) {
  const auto b = tokens.size(0), N = tokens.size(1);
  const Tensor t = tokens.contiguous(), p = parents.contiguous(), d = depth.contiguous(),
               c = choices.contiguous();
  auto accepted = at::empty({b}, tokens.options());
  auto path = at::zeros({b, levels + 1}, tokens.options()), gained = at::empty({b, levels + 1}, tokens.options());
  std::vector<char> right(N);
  for (int64_t i = 0; i < b; ++i) {
    const int64_t *token = t.data_ptr<int64_t>() + i * N, *parent = p.data_ptr<int64_t>() + i * N,
                  *level = d.data_ptr<int64_t>() + i * N, *choice = c.data_ptr<int64_t>() + i * N;
    int64_t deepest = 0;
    right[0] = true;
    for (int64_t n = 1; n < N; ++n) {
      right[n] = right[parent[n]] && token[n] == choice[parent[n]];
      if (right[n] && level[n] > level[deepest]) deepest = n;
    }
    accepted.data_ptr<int64_t>()[i] = level[deepest];
    int64_t* steps = path.data_ptr<int64_t>() + i * (levels + 1);
    for (int64_t n = deepest; n; n = parent[n]) steps[level[n]] = n;
    for (int64_t j = 0; j <= levels; ++j)
      gained.data_ptr<int64_t>()[i * (levels + 1) + j] = choice[steps[j]];
  }
  return {accepted, path, gained};
}

// commit_kv of commit_kv.py. buffer [L, 2, B, H, C, D] of any dtype.
void commit_kv(const Tensor& buffer, const Tensor& lengths, const Tensor& path, const Tensor& counts) {
  TORCH_CHECK(buffer.is_contiguous());
  const auto B = buffer.size(2), H = buffer.size(3), C = buffer.size(4), K = path.size(1);
  const int64_t bytes = buffer.size(5) * buffer.element_size(), slabs = buffer.size(0) * 2;
  const Tensor steps = path.contiguous(), front = lengths.contiguous(), moved = counts.contiguous();
  const int64_t *length = front.data_ptr<int64_t>(), *count = moved.data_ptr<int64_t>();
  auto* data = static_cast<char*>(buffer.data_ptr());
  at::parallel_for(0, slabs, 8, [&](int64_t from, int64_t till) {
    std::vector<char> kept(K * bytes);
    for (int64_t slab = from; slab < till; ++slab)
      for (int64_t i = 0; i < B; ++i) {
        const int64_t* node = steps.data_ptr<int64_t>() + i * K;
        int64_t first = 0;  // what is in its place stays there
        while (first < count[i] && node[first] == first) ++first;
        if (first >= count[i]) continue;
        for (int64_t h = 0; h < H; ++h) {
          char* to = data + (((slab * B + i) * H + h) * C + length[i]) * bytes;
          for (int64_t j = first; j < count[i]; ++j)
            std::memcpy(kept.data() + j * bytes, to + node[j] * bytes, bytes);
          std::memcpy(to + first * bytes, kept.data() + first * bytes, (count[i] - first) * bytes);
        }
      }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(eagle_cpu, m) {
  m.def("candidates(Tensor log_probs, Tensor? beam_scores, Tensor to_target, int k) -> (Tensor, Tensor)",
        candidates);
  m.def("best_beams(Tensor scores, Tensor tokens, Tensor hidden, Tensor seen, int k) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)", best_beams);
  m.def("keep_best(Tensor root, Tensor tokens, Tensor parents, Tensor scores, Tensor depth, int num_nodes) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)", keep_best);
  m.def("commit_kv(Tensor(a!) buffer, Tensor lengths, Tensor path, Tensor counts) -> ()", commit_kv);
  m.def("longest_path(Tensor tokens, Tensor parents, Tensor depth, Tensor choices, int levels) "
        "-> (Tensor, Tensor, Tensor)", longest_path);
}
