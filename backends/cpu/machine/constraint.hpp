// Constraints: automata in rows of allowed tokens, as in ir/ops/constraint.py.
#pragma once
#include "tensors.hpp"

namespace stemma {
namespace constraint {

struct Automaton {
  const int32_t *indptr, *tokens, *targets = nullptr;
  int64_t states, edges;
  Automaton(const Value& rows, const Value& of_tokens) : indptr(rows.i32()), tokens(of_tokens.i32()), states(rows.elements() - 1),
      edges(of_tokens.elements()) {}
  std::pair<int64_t, int64_t> row(int32_t state) const {
    if (state < 0) return {0, 0};
    if (state >= states)
      fail("The constraint has %lld states, and was asked for state %d.", (long long)std::max<int64_t>(states, 0), state);
    const int64_t first = indptr[state], last = indptr[state + 1];
    if (first < 0 || last < first || last > edges)
      fail("The constraint is damaged: state %d has the edges %lld to %lld of %lld.", state, (long long)first, (long long)last,
          (long long)edges);
    return {first, last};
  }
  void check(int64_t first, int64_t last, int64_t vocab) const {  // that every token is in the vocabulary
    const uint32_t top = (uint32_t)vocab - 1;
    uint32_t signs[8] = {};  // the sign of t or of top - t is set when t is outside; in blocks that become vectors
    int64_t e = first;
    for (; e + 8 <= last; e += 8)
      for (int j = 0; j < 8; ++j) signs[j] |= (uint32_t)tokens[e + j] | (top - (uint32_t)tokens[e + j]);
    for (; e < last; ++e) signs[0] |= (uint32_t)tokens[e] | (top - (uint32_t)tokens[e]);
    for (uint32_t each : signs) signs[0] |= each;
    for (e = first; signs[0] >> 31 && e < last; ++e)
      if (tokens[e] < 0 || tokens[e] >= vocab)
        fail("The constraint names the token %d; the vocabulary has %lld.", tokens[e], (long long)vocab);
  }
};
[[noreturn]] inline void nothing(int64_t row, int32_t state, const Value* positions) {
  char place[64] = "";
  if (positions) snprintf(place, sizeof place, " at position %d", positions->i32()[row]);
  fail("The constraint admits no token%s (sequence %lld, state %d).", place, (long long)row, state);
}
// Rows of logits, their states and (or null) their positions, whose input is number `at`.
inline const Value* check_rows(Call& call, int at) {
  if (call.count() < at) fail("the program is damaged: an input is missing");
  const Value& logits = call.in[0];
  if (logits.rank != 2 || call.in[1].elements() != logits.shape[0])
    fail("the program is damaged: a constraint needs a state for each row of logits");
  const Value* positions = call.count() > at && !call.in[at].empty() ? call.in + at : nullptr;
  if (positions && positions->elements() != logits.shape[0])
    fail("the program is damaged: a constraint needs a position for each row of logits");
  return positions;
}

inline bool op_allow(Call& call) {
  const Value* positions = check_rows(call, 4);
  const Value& logits = call.in[0];
  const Automaton a(call.in[2], call.in[3]);
  const int64_t vocab = logits.shape[1];
  Value v = tensor_like(F32, logits);
  std::fill(v.f32(), v.f32() + v.elements(), -INFINITY);
  for (int64_t i = 0; i < logits.shape[0]; ++i) {
    const int32_t state = call.in[1].i32()[i];
    const auto [first, last] = a.row(state);
    if (first == last) nothing(i, state, positions);
    a.check(first, last, vocab);
    const float* from = logits.f32() + i * vocab;
    float* to = v.f32() + i * vocab;
    for (int64_t e = first; e < last; ++e) to[a.tokens[e]] = from[a.tokens[e]];
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_advance(Call& call) {
  const Automaton a(call.in[2], call.in[3]);
  if (call.in[4].elements() != a.edges || call.in[1].elements() != call.in[0].elements())
    fail("the program is damaged: sizes of a constraint differ");
  const int32_t *chosen = call.in[1].i32(), *targets = call.in[4].i32();
  Value v = std::move(own_tensor(call.in[0]));
  int32_t* states = v.i32();
  for (int64_t i = 0, n = v.elements(); i < n; ++i) {
    const auto [first, last] = a.row(states[i]);
    if (chosen[i] < 0) continue;
    const int32_t* found = std::lower_bound(a.tokens + first, a.tokens + last, chosen[i]);
    states[i] = found < a.tokens + last && *found == chosen[i] ? targets[found - a.tokens] : -1;
  }
  call.out[0] = std::move(v);
  return true;
}
inline bool op_candidates(Call& call) {
  const Value* positions = check_rows(call, 5);
  const Value& logits = call.in[0];
  const Automaton a(call.in[2], call.in[3]);
  if (call.in[4].elements() != a.edges) fail("the program is damaged: sizes of a constraint differ");
  const int64_t n = logits.shape[0], vocab = logits.shape[1], width = call.size(0);
  if (width < 1) fail("the program is damaged: a width is wrong");
  const int64_t shape[] = {n, width};
  Value values = shaped(F32, 2, shape), tokens = shaped(I32, 2, shape), states = shaped(I32, 2, shape);
  const int32_t* targets = call.in[4].i32();
  bool any = !n;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t state = call.in[1].i32()[i];
    const auto [first, last] = a.row(state);
    if (last - first > width)
      fail("The constraint admits %lld tokens in state %d; `candidates` has width=%lld.", (long long)(last - first), state,
          (long long)width);
    float* value = values.f32() + i * width;
    int32_t *token = tokens.i32() + i * width, *after = states.i32() + i * width;
    const float* row = logits.f32() + i * vocab;
    any |= first < last;
    const int64_t count = last - first;
    // Tokens ascend: those that fill their range are a part of the row.
    if (const int64_t least = count ? a.tokens[first] : 0; count && least >= 0 && a.tokens[last - 1] < vocab
        && a.tokens[last - 1] == least + count - 1) {
      memcpy(value, row + least, (size_t)count * 4);
    } else {
      a.check(first, last, vocab);
      for (int64_t e = 0; e < count; ++e) value[e] = row[a.tokens[first + e]];
    }
    if (count) memcpy(token, a.tokens + first, (size_t)count * 4), memcpy(after, targets + first, (size_t)count * 4);
    value += count, token += count, after += count;
    const int64_t rest = width - count;
    std::fill(value, value + rest, -INFINITY), std::fill(token, token + rest, -1), std::fill(after, after + rest, -1);
  }
  if (!any) nothing(0, call.in[1].i32()[0], positions);
  call.out[0] = std::move(values), call.out[1] = std::move(tokens), call.out[2] = std::move(states);
  return true;
}

}  // namespace constraint

inline const OperationEntry CONSTRAINT_OPERATIONS[] = {
    {"allow", constraint::op_allow, -1, 1, 0},
    {"advance", constraint::op_advance, 5, 1, 0},
    {"candidates", constraint::op_candidates, -1, 3, 1},
};

}  // namespace stemma
