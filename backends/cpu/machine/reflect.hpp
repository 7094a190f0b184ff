// A second look at a drafted chain, as in ir/ops/reflect.py.
#pragma once
#include "governor.hpp"
#include "tensors.hpp"

namespace stemma {
namespace reflect {

inline bool op_best_chain(Call& call) {
  if (call.count() < 1 || call.count() > 2) fail("the program is damaged: best_chain takes a tree and a governor");
  const Tree& t = state_of<Tree>(call.in[0]);
  std::vector<double> reached(1, 1.0), values(1, 0.0);
  if (call.count() > 1) reached = state_of<governor::Governor>(call.in[1]).scores(t);
  size_t end = 0;
  for (size_t i = 1; i < t.tokens.size(); ++i) {
    const size_t parent = (size_t)t.parents[i];
    if (call.count() == 1) reached.push_back(reached[parent] * (double)t.scores[i]);
    values.push_back(values[parent] + reached[i]);
    if (values[i] > values[end]) end = i;
  }
  std::vector<size_t> path;
  for (int32_t i = (int32_t)end; i >= 0; i = t.parents[(size_t)i]) path.push_back((size_t)i);
  Tree* chain = new Tree;
  call.out[0] = state_value(chain);
  chain->size = t.size, chain->limit = t.limit;
  for (size_t k = path.size(); k-- > 0;) chain->copy(t, path[k], (int32_t)chain->tokens.size() - 1);
  return true;
}

// What `learn` reads of the call is scaled to the nodes that are left: they had the cost of all.
inline bool op_retract(Call& call) {
  const Tree& t = state_of<Tree>(call.in[1]);
  Sequences& s = own<Sequences>(call.in[0]);
  const int64_t n = t.count();
  if (!s.visited.empty()) fail("retract: a path of the tree was already followed.");
  if (!s.tree || n > s.ran || !std::equal(t.tokens.begin(), t.tokens.end(), s.tree->tokens.begin()) ||
      !std::equal(t.parents.begin(), t.parents.end(), s.tree->parents.begin()))
    fail("retract: the tree is not the beginning of one that was expanded.");
  for (size_t i = (size_t)n; i < s.node_slots.size(); ++i)
    if (s.node_slots[i] >= 0) s.model->release(s.node_slots[i]);
  s.node_slots.resize((size_t)n), s.node_logits.resize((size_t)n), s.node_hidden.resize((size_t)n);
  if (n < s.ran) {
    s.expand_batch = s.expand_rows == s.ran ? std::max(s.expand_batch * n / s.expand_rows, n) : 0;
    s.expand_rows = n;
  }
  s.ran = n;
  s.tree = Ref<Tree>((Tree*)call.in[1].state.p);
  call.out[0] = std::move(call.in[0]);
  return true;
}

// log sum exp of a row; `work` has room for it.
inline double total(Call& call, const float* x, int64_t n, float* work) {
  float most = -INFINITY;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, x[i]);
  for (int64_t i = 0; i < n; ++i) work[i] = x[i] - most;
  stemma_rows(call.machine.native, ROWS_EXP, work, 1, n, work);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (double)work[i];
  return (double)most + real_log(sum);
}
inline bool op_mix_logits(Call& call) {
  const Value &a = call.in[0], &b = call.in[1];
  const float weight = *call.in[2].f32();
  if (!(weight >= 0 && weight <= 1)) fail("mix_logits: the weight is %g; it must be between 0 and 1.", (double)weight);
  if (a.rank != 2 || b.rank != 2 || a.shape[0] != b.shape[0] || a.shape[1] != b.shape[1])
    fail("the program is damaged: mix_logits needs logits of one shape");
  if (weight == 0) {
    call.out[0] = a;
    return true;
  }
  const int64_t n = a.shape[1];
  Value v = tensor_like(F32, a);
  std::vector<float> work((size_t)n);
  const float kept = (float)real_log(1 - (double)weight);
  for (int64_t row = 0; row < a.shape[0]; ++row) {
    const float *x = a.f32() + row * n, *y = b.f32() + row * n;
    float *out = v.f32() + row * n, *t = work.data();
    const double shift = total(call, x, n, t) - total(call, y, n, t) + real_log((double)weight);
    for (int64_t i = 0; i < n; ++i) {
      const float p = x[i] + kept, q = (float)((double)y[i] + shift), most = std::max(p, q);
      out[i] = most;
      t[i] = most > -INFINITY ? std::min(p, q) - most : 0;
    }
    stemma_rows(call.machine.native, ROWS_EXP, t, 1, n, t);
    for (int64_t i = 0; i < n; ++i) t[i] += 1;
    stemma_rows(call.machine.native, ROWS_LOG, t, 1, n, t);
    for (int64_t i = 0; i < n; ++i) out[i] += t[i];
  }
  call.out[0] = std::move(v);
  return true;
}

}  // namespace reflect

inline const OperationEntry REFLECT_OPERATIONS[] = {
    {"best_chain", reflect::op_best_chain, -1, 1, 0},
    {"retract", reflect::op_retract, 2, 1, 0},
    {"mix_logits", reflect::op_mix_logits, 3, 1, 0},
};

}  // namespace stemma
