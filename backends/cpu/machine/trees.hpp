// Token trees: drafted tokens, their run through the model in one call, the path that is followed.
#pragma once
#include "sequences.hpp"

extern "C" void stemma_top_k(void* model, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices);

namespace stemma {

inline bool op_tree(Call& call) {
  Tree* t = new Tree;
  const Value holder = state_value(t);
  t->size = call.size(0);
  if (t->size < 1 || t->size > 1 << 20) fail("tree: %lld is no size of a tree", (long long)t->size);
  t->limit = *call.in[1].i32();
  t->reserve(std::clamp<int64_t>(std::min(t->limit, t->size), 1, 64));
  t->tokens = {*call.in[0].i32()}, t->parents = {-1}, t->scores = {1.0f};
  t->sources = t->agreed = t->ranks = t->depths = t->orders = {0};
  call.out[0] = holder;
  return true;
}
inline bool op_tree_extend(Call& call) {
  Tree& t = own<Tree>(call.in[0]);
  const int64_t n = call.in[1].elements();
  if (call.in[2].elements() != n || call.in[3].elements() != n) fail("tree_extend: the lengths of its inputs differ");
  Value nodes = tensor(I32, {n});
  for (int64_t i = 0; i < n; ++i)
    nodes.i32()[i] = t.add(call.in[1].i32()[i], call.in[2].i32()[i], call.in[3].f32()[i], (int32_t)call.integer(0));
  call.out[0] = std::move(call.in[0]);
  call.out[1] = std::move(nodes);
  return true;
}
inline bool op_tree_merge(Call& call) {
  const Ref<Object> kept = call.in[1].state;  // the second may be the first
  const Tree& b = state_of<Tree>(call.in[1]);
  Tree& a = own<Tree>(call.in[0]);
  if (a.tokens[0] != b.tokens[0]) fail("tree_merge: the roots are the tokens %d and %d.", a.tokens[0], b.tokens[0]);
  std::vector<int32_t> place = {0};
  for (size_t i = 1; i < b.tokens.size(); ++i)
    place.push_back(a.add(place[(size_t)b.parents[i]], b.tokens[i], b.scores[i], b.sources[i], b.orders[i]));
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_tree_nodes(Call& call) {
  const Tree& t = state_of<Tree>(call.in[0]);
  call.out[0] = tensor(I32, {});
  *call.out[0].i32() = (int32_t)t.count();
  const std::vector<int32_t>* const columns[] = {&t.tokens, &t.parents};
  for (int k = 0; k < 2; ++k) {
    Value& v = call.out[k + 1] = tensor(I32, {t.size});
    std::copy(columns[k]->begin(), columns[k]->end(), v.i32());
    std::fill(v.i32() + t.count(), v.i32() + t.size, -1);
  }
  return true;
}

// Rows of zeros that need no memory until they are written (or read).
struct ZeroPages : Storage {
  Pages pages;
  explicit ZeroPages(Pages&& from) : Storage(from.data, from.bytes), pages(std::move(from)) {}
};
// The first n of the new nodes' rows, zeros for those that were not run and after the last; rows[i]: of new node i, or -1.
inline Value padded(const Value& rows, const std::vector<int32_t>& of_node, int64_t n) {
  bool together = (int64_t)of_node.size() >= n;
  for (size_t i = 0; i < of_node.size() && (int64_t)i < n; ++i) together &= of_node[i] == (int32_t)i;
  if (together) {
    Value v = rows;
    v.shape[0] = n;
    return v;
  }
  const int64_t each = rows.shape[1];
  Value v;
  v.rank = 2, v.shape[0] = n, v.shape[1] = each;
  v.storage = Ref<Storage>(new ZeroPages(Pages::of(v.bytes(), "logits")));
  for (size_t i = 0; i < of_node.size() && (int64_t)i < n; ++i)
    if (of_node[i] >= 0) memcpy(v.f32() + (int64_t)i * each, rows.f32() + of_node[i] * each, (size_t)each * 4);
  return v;
}

inline void start_expand(Call& call) {
  Sequences& s = own<Sequences>(call.in[0]);
  const Tree& t = state_of<Tree>(call.in[1]);
  Instance& instance = call.instance;
  if (s.each.size() != 1) fail("expand: it takes one sequence");
  if (!s.visited.empty()) fail("expand: a path of the tree was already followed. Settle it first.");
  if (s.tree && (t.count() < s.ran || !std::equal(t.tokens.begin(), t.tokens.begin() + s.ran, s.tree->tokens.begin()) ||
                 !std::equal(t.parents.begin(), t.parents.begin() + s.ran, s.tree->parents.begin())))
    fail("expand: the tree is not the one of the last expand, grown. Settle it first.");
  for (int64_t i = s.ran; i < t.count(); ++i) check_token(*s.model, t.tokens[(size_t)i]);
  check_length(*s.model, (int64_t)s.each[0].tokens.size() + 1);
  if (s.model == call.machine.models[0].get()) {
    for (Statistics* statistics : {&instance.statistics, &call.machine.statistics}) {
      statistics->trees += !s.tree;
      statistics->nodes += t.count() - s.ran;
      if (instance.drafting_since >= 0) statistics->drafting += instance.busy_now() - instance.drafting_since;
    }
    instance.drafting_since = -1;
  }
  s.tree = Ref<Tree>((Tree*)call.in[1].state.p);
}
// Slots, table rows and rows of the tokens not yet in the cache and of the new nodes. False: there is no room now.
inline bool place_tree(Sequences& s, Request& request) {
  Model& model = *s.model;
  Sequence& q = s.each[0];
  const Tree& t = *s.tree;
  const int64_t base = (int64_t)q.tokens.size(), first = s.ran, n = t.count();
  const auto runs = [&](int64_t i) { return base + t.depths[(size_t)i] < model.context; };
  int64_t missing = base - (int64_t)q.slots.size(), deepest = 0;
  for (int64_t i = (int64_t)s.node_slots.size(); i < n; ++i) missing += runs(i);
  if (!model.take(base - (int64_t)q.slots.size(), q.slots.empty() ? -1 : q.slots.back(), q.slots)) return false;
  std::vector<bool> leaf((size_t)n, true), placed((size_t)n, false);
  for (int64_t i = (int64_t)s.node_slots.size(); i < n; ++i) {
    if (!runs(i)) s.node_slots.push_back(-1);
    else if (!model.take(1, s.node_slots.empty() ? (q.slots.empty() ? -1 : q.slots.back()) : s.node_slots.back(),
        s.node_slots)) return false;
  }
  std::vector<int32_t> output((size_t)n, -1);
  for (int64_t i = first; i < n; ++i) {
    if (!runs(i)) continue;
    output[(size_t)i] = (int32_t)request.outputs++;
    deepest = std::max<int64_t>(deepest, t.depths[(size_t)i]);
    if (i) leaf[(size_t)t.parents[(size_t)i]] = false;
  }
  if (!place(q, request, base + deepest + 1)) return false;
  const int64_t outputs = request.outputs;
  add_pending(q, request, base);
  request.outputs = outputs;
  size_t leaves = 0;
  std::vector<int32_t> path;
  for (int64_t end = first; end < n; ++end) {
    if (!leaf[(size_t)end] || !runs(end)) continue;
    if (leaves == s.tree_rows.size() + 1) s.tree_rows.emplace_back();
    TableRow& row = leaves ? s.tree_rows[leaves - 1] : q.row;
    ++leaves;
    row.copied = std::min(row.copied, base);
    int32_t* entries = model.borrow(row, base + deepest + 1, request);
    if (!entries) return false;
    memcpy(entries + row.copied, q.slots.data() + row.copied, (size_t)(base - row.copied) * 4);
    row.copied = base;
    path.clear();
    for (int32_t i = (int32_t)end; i >= 0; i = t.parents[(size_t)i]) path.push_back(i);
    std::reverse(path.begin(), path.end());
    for (int32_t i : path) {
      entries[base + t.depths[(size_t)i]] = s.node_slots[(size_t)i];
      if (i < first || placed[(size_t)i]) continue;
      placed[(size_t)i] = true;
      request.rows.push_back({t.tokens[(size_t)i], (int32_t)(base + t.depths[(size_t)i]), s.node_slots[(size_t)i], row.row,
          output[(size_t)i]});
    }
  }
  return true;
}
inline bool op_expand(Call& call) {
  Instance& instance = call.instance;
  Request& request = instance.request;
  if (instance.stage == 0) {
    start_expand(call);
    instance.stage = 1;
  }
  Sequences& s = state_of<Sequences>(call.in[0]);
  const Tree& t = *s.tree;
  if (instance.stage == 1) {
    const int64_t missing = (int64_t)(s.each[0].tokens.size() - s.each[0].slots.size()) + t.count() - (int64_t)s.node_slots.size();
    if (!s.model->has_room(missing)) return wait_for_room(call, s.model, missing);
    begin(request, s.model);
    if (!place_tree(s, request)) return wait_for_room(call, s.model, 0);
    instance.stage = 2;
    if (!request.rows.empty()) return wait_for_model(call);
  }
  s.model->unpin(request);
  s.each[0].cached = (int64_t)s.each[0].tokens.size();
  if (request.logits.empty()) request.logits = zeros({0, s.model->vocab}), request.hidden = zeros({0, s.model->width});
  std::vector<int32_t> of_node;
  int32_t output = 0;
  for (int64_t i = s.ran; i < t.count(); ++i) {
    const bool runs = s.node_slots[(size_t)i] >= 0;
    of_node.push_back(runs ? output++ : -1);
    s.node_logits.push_back(runs ? row_of(request.logits, of_node.back()) : Value());
    s.node_hidden.push_back(runs ? row_of(request.hidden, of_node.back()) : Value());
  }
  s.expand_rows = (int64_t)request.rows.size(), s.expand_batch = request.batch, s.expand_seconds = request.seconds;
  s.ran = t.count();
  const int64_t fresh = call.size(0);
  call.out[0] = std::move(call.in[0]);
  if (call.wanted(1)) call.out[1] = padded(request.logits, of_node, fresh);
  if (call.wanted(2)) call.out[2] = padded(request.hidden, of_node, fresh);
  request.logits = request.hidden = Value();
  return true;
}

inline bool op_has_child(Call& call) {
  Value v = tensor(BOOL, {});
  *v.flags() = state_of<Sequences>(call.in[0]).child(*call.in[1].i32()) >= 0;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_follow(Call& call) {
  const int32_t token = *call.in[1].i32();
  Sequences& s = own<Sequences>(call.in[0]);
  const int32_t node = s.child(token);
  if (node < 0) fail("follow: the tree does not go on with the token %d.", token);
  s.each[0].tokens.push_back(token);
  s.visited.push_back(node);
  if (s.model == call.machine.models[0].get()) ++call.instance.statistics.followed, ++call.machine.statistics.followed;
  if (call.wanted(1)) call.out[1] = as_matrix(s.node_logits[(size_t)node]);
  if (call.wanted(2)) call.out[2] = as_matrix(s.node_hidden[(size_t)node]);
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_settle(Call& call) {
  settle(own<Sequences>(call.in[0]));
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_followed_path(Call& call) {
  const std::vector<int32_t>& path = state_of<Sequences>(call.in[0]).visited;
  const int64_t n = call.size(0);
  if (n < 0) fail("followed_path: its size is negative");
  call.out[0] = tensor(I32, {n});
  for (int64_t i = 0; i < n; ++i) call.out[0].i32()[i] = i < (int64_t)path.size() ? path[(size_t)i] : -1;
  return true;
}

// As stemma_top_k of one row: in the k blocks with the largest numbers are the k largest.
inline void largest(void* native, const float* x, int64_t n, int64_t k, float* values, int32_t* indices) {
  typedef float Four __attribute__((vector_size(16)));
  constexpr int64_t BLOCK = 32, MOST = 16;
  if (k > MOST || n < 8 * BLOCK || n > BLOCK << 24) return stemma_top_k(native, x, 1, n, k, values, indices);
  float top[MOST], least = -INFINITY;  // the largest first; equal ones as they come
  int32_t at[MOST];
  int64_t count = 0;
  const auto offer = [&](float value, int32_t index) {
    int64_t i = count < k ? count++ : k - 1;
    for (; i > 0 && value > top[i - 1]; --i) top[i] = top[i - 1], at[i] = at[i - 1];
    top[i] = value, at[i] = index;
    if (count == k) least = top[k - 1];
  };
  const Four none = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int64_t block = 0; block < n; block += BLOCK) {
    float most = -INFINITY;
    if (block + BLOCK <= n) {
      const auto part = [&](int64_t i) {
        Four v;
        memcpy(&v, x + block + 4 * i, sizeof v);
        return v;
      };
      const auto larger = [](Four a, Four b) { return a > b ? a : b; };  // b when one of them is not a number
      const Four a = larger(part(4), larger(part(0), none)), b = larger(part(5), larger(part(1), none));
      const Four c = larger(part(6), larger(part(2), none)), d = larger(part(7), larger(part(3), none));
      const Four all = larger(larger(a, b), larger(c, d));
      most = std::max(std::max(all[0], all[1]), std::max(all[2], all[3]));
    } else {
      for (int64_t i = block; i < n; ++i) most = x[i] > most ? x[i] : most;
    }
    if (most > least) offer(most, (int32_t)(block / BLOCK));
  }
  int32_t blocks[MOST];
  const int64_t chosen = count;
  std::copy(at, at + chosen, blocks);
  std::sort(blocks, blocks + chosen);
  const float enough = chosen == k ? top[k - 1] : -INFINITY;  // k numbers are at least as large
  count = 0, least = -INFINITY;
  for (int64_t b = 0; b < chosen; ++b)
    for (int64_t i = blocks[b] * BLOCK, end = std::min(i + BLOCK, n); i < end; ++i)
      if (x[i] >= enough && x[i] > least) offer(x[i], (int32_t)i);
  if (count < k) return stemma_top_k(native, x, 1, n, k, values, indices);
  std::copy(top, top + k, values), std::copy(at, at + k, indices);
}
inline bool op_node_top_k(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[0]);
  const int64_t k = call.integer(0), size = call.size(1);
  if (k < 1 || size < 1) fail("node_top_k: k is %lld and the size %lld.", (long long)k, (long long)size);
  Value values = tensor(F32, {size, k}), tokens = tensor(I32, {size, k});
  std::fill(values.f32(), values.f32() + size * k, -INFINITY);
  std::fill(tokens.i32(), tokens.i32() + size * k, -1);
  const int64_t n = s.tree ? std::min<int64_t>(size, s.ran) : 0;
  for (int64_t i = 0; i < n; ++i)
    if (const Value& row = s.node_logits[(size_t)i]; !row.empty())
      largest(call.machine.native, row.f32(), s.model->vocab, k, values.f32() + i * k, tokens.i32() + i * k);
  call.out[0] = std::move(values);
  if (call.code.outputs.size() > 1) call.out[1] = std::move(tokens);
  return true;
}

inline const OperationEntry TREES_OPERATIONS[] = {
    {"node_top_k", op_node_top_k, 1, 2, 2},
    {"tree", op_tree, 2, 1, 1},           {"tree_extend", op_tree_extend, 4, 2, 1}, {"tree_merge", op_tree_merge, 2, 1, 0},
    {"tree_nodes", op_tree_nodes, 1, 3, 0}, {"expand", op_expand, 2, 3, 1},         {"has_child", op_has_child, 2, 1, 0},
    {"follow", op_follow, 2, 3, 0},       {"settle", op_settle, 1, 1, 0},           {"followed_path", op_followed_path, 1, 1, 1},
};

}  // namespace stemma
