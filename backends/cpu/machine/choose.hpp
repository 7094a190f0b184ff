// Choosing tokens: by the sampler of the library, which adds counted noise.
#pragma once
#include "tensors.hpp"

struct StemmaSampling {  // as in sampling.hpp.j2
  float temperature, top_p, min_p, repetition_penalty, presence_penalty;
  int32_t top_k;
  uint64_t seed, sequence, position;
};
extern "C" int32_t stemma_sample(void* model, const float* logits, int64_t vocab, const StemmaSampling* p, const int32_t* history,
    int64_t length);
extern "C" int32_t stemma_probabilities(void* model, const float* logits, int64_t vocab, const StemmaSampling* p,
    const int32_t* history, int64_t length, float* out);
extern "C" void stemma_noise(void* model, const StemmaSampling* p, float* out, int64_t count);
extern "C" void stemma_top_k(void* model, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices);

namespace stemma {
namespace choose {

template <class T> inline T scalar(const Value& v) {
  if (v.elements() != 1) fail("the program is damaged: a scalar is expected");
  return *v.data<T>();
}
inline float scalar_f32(const Value& v) { return v.expect(F32), scalar<float>(v); }
inline int32_t scalar_i32(const Value& v) { return v.expect(I32), scalar<int32_t>(v); }
inline int64_t scalar_i64(const Value& v) { return v.expect(I64), scalar<int64_t>(v); }

// The settings of select, inputs `from` to from + 7; a filter outside of its range is an error, as it is for the caller of Python.
inline StemmaSampling settings(const Call& call, int from) {
  StemmaSampling p = {};
  p.temperature = scalar_f32(call.in[from]);
  p.top_k = scalar_i32(call.in[from + 1]);
  p.top_p = scalar_f32(call.in[from + 2]);
  p.min_p = scalar_f32(call.in[from + 3]);
  p.repetition_penalty = scalar_f32(call.in[from + 4]);
  p.presence_penalty = scalar_f32(call.in[from + 5]);
  p.seed = (uint64_t)scalar_i64(call.in[from + 6]);
  p.sequence = (uint64_t)scalar_i64(call.in[from + 7]);
  if (!(p.temperature >= 0) || !isfinite(p.temperature))
    fail("select: the temperature is %g; it must be at least 0.", (double)p.temperature);
  if (isnan(p.top_p) || isnan(p.min_p) || isnan(p.repetition_penalty) || isnan(p.presence_penalty))
    fail("select: a setting is no number.");
  return p;
}
inline int32_t choose(Machine& machine, const float* logits, int64_t vocab, StemmaSampling& p,
    const std::vector<int32_t>& history) {
  p.position = history.size();
  const int32_t token = stemma_sample(machine.native, logits, vocab, &p, history.data(), (int64_t)history.size());
  if (token < 0)
    fail("No token can be chosen at position %zu: no logit is a finite number, or a constraint admits no token.", history.size());
  return token;
}

inline bool op_select(Call& call) {
  const Value& logits = call.in[0];
  const Sequences& s = state_of<Sequences>(call.in[1]);
  if (logits.rank != 2 || logits.shape[0] != (int64_t)s.each.size())
    fail("the program is damaged: select needs logits for each sequence");
  StemmaSampling p = settings(call, 2);
  const uint64_t first = p.sequence;
  Value v = tensor(I32, {logits.shape[0]});
  for (int64_t i = 0; i < logits.shape[0]; ++i) {
    p.sequence = first + (uint64_t)i;
    v.i32()[i] = choose(call.machine, logits.f32() + i * logits.shape[1], logits.shape[1], p, s.each[(size_t)i].tokens);
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_noise(Call& call) {
  const int64_t size = call.size(0), rows = call.in[2].elements();
  if (size < 1) fail("noise: %lld tokens.", (long long)size);
  StemmaSampling p = {};
  p.seed = (uint64_t)scalar_i64(call.in[0]);
  p.sequence = (uint64_t)scalar_i64(call.in[1]);
  Value v = tensor(F32, {rows, size});
  for (int64_t i = 0; i < rows; ++i) {
    p.position = (uint64_t)(int64_t)call.in[2].i32()[i];
    stemma_noise(call.machine.native, &p, v.f32() + i * size, size);
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_top_k(Call& call) {
  const Value& x = call.in[0];
  const int64_t k = call.size(0);
  if (x.rank < 1 || k < 1 || k > 1 << 24) fail("top_k: k is %lld.", (long long)k);
  const int64_t n = x.shape[x.rank - 1];
  Value shape = x;
  shape.shape[x.rank - 1] = k;
  Value values = tensor_like(F32, shape), indices = tensor_like(I32, shape);
  stemma_top_k(call.machine.native, x.f32(), k ? values.elements() / k : 0, n, k, values.f32(), indices.i32());
  call.out[0] = std::move(values);
  if (call.code.outputs.size() > 1) call.out[1] = std::move(indices);
  return true;
}

// ---- verifiers ----
constexpr uint64_t RESIDUAL = 0x9E3779B97F4A7C15;  // as in ir/ops/verify_draft.py

// A word of Philox4x32-10 with counter (first, position, sequence).
inline uint32_t philox(const StemmaSampling& p, uint32_t first, int word) {
  uint32_t c[4] = {first, (uint32_t)p.position, (uint32_t)p.sequence, (uint32_t)(p.sequence >> 32)};
  uint32_t key[2] = {(uint32_t)p.seed, (uint32_t)(p.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key[0], c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key[1], c[3] = (uint32_t)a;
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return c[word];
}
inline double uniform(const StemmaSampling& p, uint32_t number) {
  return ((double)philox(p, 0xFFFFFFFFu - number, 0) + 0.5) / 4294967296.0;
}
inline double noise_of(const StemmaSampling& p, int32_t token) {  // Gumbel noise of one token
  return -real_log(-real_log(((double)philox(p, (uint32_t)token / 4, token % 4) + 0.5) / 4294967296.0));
}
// Tokens of the nodes under the last followed one, in their order; those outside of the vocabulary are no tokens.
inline std::vector<int32_t> drafted(const Sequences& s, int64_t vocab) {
  std::vector<int32_t> found;
  if (!s.tree || s.visited.empty()) return found;
  for (int64_t i = s.visited.back() + 1; i < s.ran; ++i)
    if (s.tree->parents[(size_t)i] == s.visited.back() && s.tree->tokens[(size_t)i] < vocab)
      found.push_back(s.tree->tokens[(size_t)i]);
  return found;
}
struct Verified {  // the inputs of a verifier: one row of logits, and at a temperature its probabilities
  const Sequences& s;
  const float* logits;
  int64_t vocab;
  StemmaSampling p;
  std::vector<float> probability;
  explicit Verified(Call& call) : s(state_of<Sequences>(call.in[1])), logits(call.in[0].f32()), p(settings(call, 2)) {
    if (call.in[0].rank != 2 || call.in[0].shape[0] != 1 || s.each.size() != 1)
      fail("the program is damaged: a verifier needs logits of one sequence");
    vocab = call.in[0].shape[1];
    const std::vector<int32_t>& history = s.each[0].tokens;
    p.position = history.size();
    if (!(p.temperature > 0)) return;
    probability.resize((size_t)vocab);
    if (stemma_probabilities(call.machine.native, logits, vocab, &p, history.data(), (int64_t)history.size(), probability.data()))
      probability.clear();
  }
};
inline void chosen(Call& call, int32_t token) {
  call.out[0] = tensor(I32, {1});
  *call.out[0].i32() = token;
}
inline double sum_of(const std::vector<float>& x) {
  double sum = 0;
  for (float each : x) sum += (double)each;
  return sum;
}
inline bool op_select_recursive(Call& call) {
  if (call.count() < 10) fail("the program is damaged: an input is missing");
  Verified v(call);
  if (v.probability.empty()) return chosen(call, choose(call.machine, v.logits, v.vocab, v.p, v.s.each[0].tokens)), true;
  std::vector<float>& p = v.probability;  // not normalized: `mass` is its sum
  std::vector<float> q;
  double mass = sum_of(p), drafts = 0;
  if (call.count() > 10 && call.text(0) == "scores" && !v.s.visited.empty()) {
    const Value& rows = call.in[10];
    if (rows.rank != 2 || rows.shape[1] != v.vocab) fail("the program is damaged: draft distributions of another vocabulary");
    const int64_t node = v.s.visited.back();
    if (node < rows.shape[0]) q.assign(rows.f32() + node * v.vocab, rows.f32() + (node + 1) * v.vocab);
    drafts = sum_of(q);
  }
  uint32_t number = 0;
  for (int32_t token : drafted(v.s, v.vocab)) {
    const size_t at = (size_t)token;
    const double chance = drafts > 0 ? (double)q[at] / drafts : 0;
    if (uniform(v.p, number++) * (chance > 0 ? chance : 1) < (double)p[at] / mass) return chosen(call, token), true;
    if (chance > 0) {
      for (size_t i = 0; i < p.size(); ++i) p[i] = (float)std::max((double)p[i] / mass - (double)q[i] / drafts, 0.0);
      q[at] = p[at] = 0;
      mass = sum_of(p), drafts = sum_of(q);
    } else {
      mass -= (double)p[at];
      p[at] = 0;
    }
    if (!(mass > 1e-12)) return chosen(call, token), true;  // rounding alone can lead here: the residual is empty
  }
  // What is left, by noise of another seed, so that it is independent of what a drafter may have drawn.
  stemma_rows(call.machine.native, ROWS_LOG, p.data(), 1, v.vocab, p.data());
  StemmaSampling plain = {};
  plain.temperature = 1, plain.seed = v.p.seed ^ RESIDUAL, plain.sequence = v.p.sequence, plain.position = v.p.position;
  const int32_t token = stemma_sample(call.machine.native, p.data(), v.vocab, &plain, nullptr, 0);
  if (token < 0) fail("No token can be chosen at position %zu.", v.s.each[0].tokens.size());
  return chosen(call, token), true;
}
inline bool op_select_typical(Call& call) {
  Verified v(call);
  int32_t best = -1;
  if (!v.probability.empty()) {
    double entropy = 0;
    std::vector<float> logs(v.probability);
    for (float& each : logs) each += 1e-5f;
    stemma_rows(call.machine.native, ROWS_LOG, logs.data(), 1, v.vocab, logs.data());
    for (size_t i = 0; i < logs.size(); ++i) entropy -= (double)v.probability[i] * (double)logs[i];
    const double bound = std::min((double)scalar_f32(call.in[10]), (double)scalar_f32(call.in[11]) * real_exp(-entropy));
    for (int32_t token : drafted(v.s, v.vocab))
      if ((double)v.probability[(size_t)token] > bound && (best < 0 || v.probability[(size_t)token] > v.probability[(size_t)best]))
        best = token;
  }
  return chosen(call, best >= 0 ? best : choose(call.machine, v.logits, v.vocab, v.p, v.s.each[0].tokens)), true;
}

}  // namespace choose

inline const OperationEntry CHOOSE_OPERATIONS[] = {
    {"select", choose::op_select, 10, 1, 0},
    {"noise", choose::op_noise, 3, 1, 1},
    {"top_k", choose::op_top_k, 1, 2, 1},
    {"select_recursive", choose::op_select_recursive, -1, 1, 1},
    {"select_typical", choose::op_select_typical, 12, 1, 0},
};

}  // namespace stemma
