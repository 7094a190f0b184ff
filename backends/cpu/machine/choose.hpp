// Choosing tokens: by the sampler of the library, which adds counted noise.
#pragma once
#include "machine.hpp"

struct StemmaSampling {  // as in sampling.hpp.j2
  float temperature, top_p, min_p, repetition_penalty, presence_penalty;
  int32_t top_k;
  uint64_t seed, sequence, position;
};
extern "C" int32_t stemma_sample(void* model, const float* logits, int64_t vocab, const StemmaSampling* p, const int32_t* history, int64_t length);
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
  if (!(p.temperature >= 0) || !isfinite(p.temperature)) fail("select: the temperature is %g; it must be at least 0.", (double)p.temperature);
  if (isnan(p.top_p) || isnan(p.min_p) || isnan(p.repetition_penalty) || isnan(p.presence_penalty)) fail("select: a setting is no number.");
  return p;
}
inline int32_t choose(Machine& machine, const float* logits, int64_t vocab, StemmaSampling& p, const std::vector<int32_t>& history) {
  p.position = history.size();
  const int32_t token = stemma_sample(machine.native, logits, vocab, &p, history.data(), (int64_t)history.size());
  if (token < 0) fail("No token can be chosen at position %zu: no logit is a finite number, or a constraint admits no token.", history.size());
  return token;
}

inline bool op_select(Call& call) {
  const Value& logits = call.in[0];
  const Sequences& s = state_of<Sequences>(call.in[1]);
  if (logits.rank != 2 || logits.shape[0] != (int64_t)s.each.size()) fail("the program is damaged: select needs logits for each sequence");
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
  const int64_t k = call.integer(0);
  if (x.rank < 1 || k < 1) fail("top_k: k is %lld.", (long long)k);
  const int64_t n = x.shape[x.rank - 1];
  Value shape = x;
  shape.shape[x.rank - 1] = k;
  Value values = tensor_like(F32, shape), indices = tensor_like(I32, shape);
  stemma_top_k(call.machine.native, x.f32(), k ? values.elements() / k : 0, n, k, values.f32(), indices.i32());
  call.out[0] = std::move(values);
  if (call.code.outputs.size() > 1) call.out[1] = std::move(indices);
  return true;
}

}  // namespace choose

inline const OperationEntry CHOOSE_OPERATIONS[] = {
    {"select", choose::op_select, 10, 1, 0},
    {"noise", choose::op_noise, 3, 1, 1},
    {"top_k", choose::op_top_k, 1, 2, 1},
};

}  // namespace stemma
