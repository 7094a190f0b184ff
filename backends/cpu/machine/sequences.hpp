// Sequences on a model: which tokens are in its cache, where, and the operations that append, fork and compare them.
#pragma once
#include "machine.hpp"

namespace stemma {

inline Sequences::Sequences(const Sequences& o)
    : Object(o), model(o.model), each(o.each), tree(o.tree), ran(o.ran), node_slots(o.node_slots), node_logits(o.node_logits),
      node_hidden(o.node_hidden), visited(o.visited), expand_rows(o.expand_rows), expand_batch(o.expand_batch),
      expand_seconds(o.expand_seconds) {
  for (Sequence& s : each) {
    s.row = {};
    for (int32_t slot : s.slots) model->share(slot);
  }
  for (int32_t slot : node_slots)
    if (slot >= 0) model->share(slot);
}

// Keeps the first `n` slots of a sequence.
inline void truncate(Model& model, Sequence& s, int64_t n) {
  while ((int64_t)s.slots.size() > n) model.release(s.slots.back()), s.slots.pop_back();
  s.cached = std::min(s.cached, n);
  s.row.copied = std::min(s.row.copied, n);
}
inline void drop_tree(Sequences& s) {
  for (int32_t slot : s.node_slots)
    if (slot >= 0) s.model->release(slot);
  s.tree = Ref<Tree>();
  s.ran = 0;
  s.node_slots.clear(), s.node_logits.clear(), s.node_hidden.clear(), s.visited.clear();
}
inline Sequences::~Sequences() {
  if (!model) return;
  drop_tree(*this);
  for (Sequence& s : each) truncate(*model, s, 0), model->give_back(s.row);
  for (TableRow& row : tree_rows) model->give_back(row);
}
// The path that was followed belongs to the sequence from now on; the rest of the tree is forgotten.
inline void settle(Sequences& s) {
  if (!s.tree) return;
  if (!s.visited.empty()) {
    Sequence& sequence = s.each[0];
    truncate(*s.model, sequence, (int64_t)(sequence.tokens.size() - s.visited.size()));
    for (int32_t node : s.visited) {
      sequence.slots.push_back(s.node_slots[(size_t)node]);
      s.node_slots[(size_t)node] = -1;
    }
    sequence.cached = (int64_t)sequence.slots.size();
  }
  drop_tree(s);
}

inline void check_token(const Model& model, int64_t token) {
  if (token < 0 || token >= model.vocab)
    fail("The token %lld is not in the vocabulary of the model '%s' (%lld tokens).", (long long)token, model.name.c_str(),
        (long long)model.vocab);
}
inline void check_length(const Model& model, int64_t length) {
  if (length > model.context)
    fail("The sequence is longer than the context of the model '%s' (%lld tokens).", model.name.c_str(), (long long)model.context);
}
inline void append(const Model& model, Sequence& s, int64_t token) {
  check_token(model, token);
  check_length(model, (int64_t)s.tokens.size() + 1);
  s.tokens.push_back((int32_t)token);
}

// ---- requests ----
inline void begin(Request& request, Model* model) {
  request.model = model;
  request.rows.clear(), request.mixed.clear(), request.weights.clear();
  request.outputs = request.done = request.batch = 0;
  request.logits = request.hidden = Value();
}
inline bool wait_for_room(Call& call, Model* model, int64_t slots) {
  Instance& instance = call.instance;
  instance.request.model = model;
  model->unpin(instance.request);
  instance.room = slots;
  instance.waits = Waits::ROOM;
  return false;
}
inline bool wait_for_model(Call& call) {
  call.instance.waits = Waits::MODEL;
  return false;
}
// Slots for all tokens of a sequence, and its table row with them; null: there is no row.
inline int32_t* place(Sequence& s, Request& request, int64_t positions) {
  int32_t* entries = request.model->borrow(s.row, std::max<int64_t>(positions, (int64_t)s.slots.size()), request);
  if (!entries) return nullptr;
  const int64_t n = (int64_t)s.slots.size();
  memcpy(entries + s.row.copied, s.slots.data() + s.row.copied, (size_t)(n - s.row.copied) * 4);
  s.row.copied = n;
  return entries;
}
// Adds the tokens that are not in the cache yet; those from the position `wanted` on give outputs.
inline void add_pending(Sequence& s, Request& request, int64_t wanted) {
  for (int64_t p = s.cached; p < (int64_t)s.tokens.size(); ++p)
    request.rows.push_back({std::max(s.tokens[(size_t)p], 0), (int32_t)p, s.slots[(size_t)p], s.row.row,
        p >= wanted ? (int32_t)request.outputs++ : -1});
}
// Runs the pending tokens of the sequences for which `used` holds, with outputs for the last `outputs` tokens of each.
// Called again until it returns true; instance.stage must be 1 at first and is 3 at the end.
template <class Used> bool run_pending(Call& call, Sequences& s, int64_t outputs, Used used) {
  Instance& instance = call.instance;
  Model& model = *s.model;
  if (instance.stage == 1) {
    int64_t missing = 0;
    for (size_t i = 0; i < s.each.size(); ++i)
      if (used(i)) missing += (int64_t)(s.each[i].tokens.size() - s.each[i].slots.size());
    if (!model.has_room(missing)) return wait_for_room(call, &model, missing);
    begin(instance.request, &model);
    for (size_t i = 0; i < s.each.size(); ++i) {
      Sequence& q = s.each[i];
      if (!used(i)) continue;
      const int64_t n = (int64_t)q.tokens.size();
      if (!model.take(n - (int64_t)q.slots.size(), q.slots.empty() ? -1 : q.slots.back(), q.slots) || !place(q, instance.request,
          n))
        return wait_for_room(call, &model, 0);
      add_pending(q, instance.request, n - outputs);
    }
    instance.stage = 2;
    if (!instance.request.rows.empty()) return wait_for_model(call);
  }
  if (instance.stage == 2) {
    model.unpin(instance.request);
    for (size_t i = 0; i < s.each.size(); ++i)
      if (used(i)) s.each[i].cached = (int64_t)s.each[i].tokens.size();
    instance.stage = 3;
  }
  return true;
}
inline Value zeros(std::initializer_list<int64_t> shape) {
  Value v = tensor(F32, shape);
  memset(v.storage->data, 0, (size_t)v.bytes());
  return v;
}
// Row `row` of a matrix as a vector that shares its memory.
inline Value row_of(const Value& matrix, int64_t row) {
  Value v = matrix;
  v.rank = 1, v.shape[0] = matrix.shape[1];
  v.offset = matrix.offset + row * matrix.shape[1] * 4;
  return v;
}
inline Value as_matrix(const Value& vector) {
  Value v = vector;
  v.rank = 2, v.shape[1] = vector.shape[0], v.shape[0] = 1;
  return v;
}
// Rows of the request for the sequences that were stepped, zeros for the others.
template <class Used> Value spread(const Value& rows, size_t count, Used used) {
  if (rows.shape[0] == (int64_t)count) return rows;
  Value v = zeros({(int64_t)count, rows.shape[1]});
  int64_t from = 0;
  for (size_t i = 0; i < count; ++i)
    if (used(i)) memcpy(v.f32() + (int64_t)i * v.shape[1], rows.f32() + from++ * v.shape[1], (size_t)v.shape[1] * 4);
  return v;
}
template <class Used> void give_outputs(Call& call, Sequences& s, Used used) {
  Request& request = call.instance.request;
  const size_t n = s.each.size();
  s.expand_rows = (int64_t)request.rows.size(), s.expand_batch = request.batch, s.expand_seconds = request.seconds;
  if (request.rows.empty()) request.logits = zeros({0, s.model->vocab}), request.hidden = zeros({0, s.model->width});
  call.out[0] = std::move(call.in[0]);
  if (call.wanted(1)) call.out[1] = spread(request.logits, n, used);
  if (call.wanted(2)) call.out[2] = spread(request.hidden, n, used);
  request.logits = request.hidden = Value();
}

// ---- operations ----
inline bool op_start(Call& call) {
  Model* model = call.machine.model(call.text(0));
  if (call.size(1) != model->vocab || (call.size(2) && call.size(2) != model->width))
    fail("The program was made for another model '%s'.", model->name.c_str());
  const int32_t* tokens = call.in[0].i32();
  Sequences* s = new Sequences;
  call.out[0] = state_value(s);
  s->model = model;
  s->each.resize(1);
  const int64_t n = call.in[0].elements();
  check_length(*model, n);
  for (int64_t i = 0; i < n; ++i) check_token(*model, tokens[i]);
  s->each[0].tokens.assign(tokens, tokens + n);
  return true;
}

inline bool op_step(Call& call) {
  const int32_t* tokens = call.in[1].i32();
  const auto used = [&](size_t i) { return tokens[i] >= 0; };
  if (call.instance.stage == 0) {
    Sequences& s = own<Sequences>(call.in[0]);
    if (call.in[1].elements() != (int64_t)s.each.size())
      fail("step: %lld tokens for %zu sequences", (long long)call.in[1].elements(), s.each.size());
    settle(s);
    for (size_t i = 0; i < s.each.size(); ++i)
      if (used(i)) append(*s.model, s.each[i], tokens[i]);
    call.instance.stage = 1;
  }
  Sequences& s = state_of<Sequences>(call.in[0]);
  if (!run_pending(call, s, 1, used)) return false;
  give_outputs(call, s, used);
  return true;
}

inline bool op_feed(Call& call) {
  const int64_t n = call.in[1].elements();
  const int32_t* tokens = call.in[1].i32();
  if (call.instance.stage == 0) {
    Sequences& s = own<Sequences>(call.in[0]);
    if (s.each.size() != 1) fail("feed: it takes one sequence");
    settle(s);
    for (int64_t i = 0; i < n; ++i) append(*s.model, s.each[0], tokens[i]);
    call.instance.stage = 1;
  }
  Sequences& s = state_of<Sequences>(call.in[0]);
  if (!run_pending(call, s, n, [&](size_t) { return n > 0; })) return false;
  Request& request = call.instance.request;
  if (!n) request.logits = zeros({0, s.model->vocab}), request.hidden = zeros({0, s.model->width});
  call.out[0] = std::move(call.in[0]);
  call.out[1] = std::move(request.logits);
  call.out[2] = std::move(request.hidden);
  return true;
}

inline bool op_step_mixed(Call& call) {
  const int32_t* tokens = call.in[1].i32();
  const float* weights = call.in[2].f32();
  const int64_t k = call.in[1].rank == 2 ? call.in[1].shape[1] : 0;
  const auto used = [](size_t) { return true; };
  if (call.instance.stage == 0) {
    Sequences& s = own<Sequences>(call.in[0]);
    if (k < 1 || k > s.model->mix)
      fail("step_mixed: %lld tokens are mixed, the model '%s' was compiled for at most %lld (mix=).", (long long)k,
          s.model->name.c_str(), (long long)s.model->mix);
    if (call.in[1].shape[0] != (int64_t)s.each.size() || call.in[2].elements() != call.in[1].elements())
      fail("step_mixed: the shapes do not fit");
    for (int64_t i = 0; i < call.in[1].elements(); ++i) check_token(*s.model, tokens[i]);
    settle(s);
    for (Sequence& q : s.each) {
      check_length(*s.model, (int64_t)q.tokens.size() + 1);
      q.tokens.push_back(-1);
    }
    call.instance.stage = 1;
  }
  Sequences& s = state_of<Sequences>(call.in[0]);
  const bool fresh = call.instance.stage == 1;
  const bool done = run_pending(call, s, 1, used);
  if (fresh && call.instance.stage == 2) {  // the request was just made
    Request& request = call.instance.request;
    for (size_t i = 0; i < s.each.size(); ++i)
      for (int64_t j = 0; j < s.model->mix; ++j) {
        request.mixed.push_back(tokens[(int64_t)i * k + std::min(j, k - 1)]);
        request.weights.push_back(j < k ? weights[(int64_t)i * k + j] : 0.0f);
      }
  }
  if (!done) return false;
  give_outputs(call, s, used);
  return true;
}

inline bool op_fork(Call& call) {
  const int64_t n = call.in[1].elements();
  const int32_t* indices = call.in[1].i32();
  Sequences& s = state_of<Sequences>(call.in[0]);
  const int64_t count = (int64_t)s.each.size();
  const auto uses = [&](size_t i) { return std::count(indices, indices + n, (int32_t)i); };
  if (call.instance.stage == 0) {
    for (int64_t i = 0; i < n; ++i)
      if (indices[i] < 0 || indices[i] >= count) fail("fork: the index %d leaves 0..%lld.", indices[i], (long long)count - 1);
    call.instance.stage = 1;
  }
  // Tokens that several sequences would run are run now, once. That changes no value, so it is done where they are, shared or not.
  if (!s.tree && !run_pending(call, s, 0,
      [&](size_t i) { return uses(i) > 1 && s.each[i].cached < (int64_t)s.each[i].tokens.size(); })) return false;
  Sequences& from = own<Sequences>(call.in[0]);
  settle(from);
  Sequences* made = new Sequences;
  call.out[0] = state_value(made);
  made->model = from.model;
  made->each.resize((size_t)n);
  for (int64_t i = 0; i < n; ++i) {
    Sequence& source = from.each[(size_t)indices[i]];
    if (std::find(indices + i + 1, indices + n, indices[i]) == indices + n) {  // the last use: moved
      made->each[(size_t)i] = std::move(source);
      source = Sequence();
      continue;
    }
    made->each[(size_t)i] = source;
    made->each[(size_t)i].row = {};
    for (int32_t slot : source.slots) from.model->share(slot);
  }
  return true;
}

inline bool op_sync(Call& call) {
  Sequences& a = own<Sequences>(call.in[0]);
  const Sequences& b = state_of<Sequences>(call.in[1]);
  if (a.each.size() != b.each.size()) fail("sync: the numbers of sequences differ");
  const bool table = call.count() > 2 && !call.in[2].empty();
  const int32_t* translated = table ? call.in[2].i32() : nullptr;
  const int64_t known = table ? call.in[2].elements() : 0;
  for (size_t i = 0; i < a.each.size(); ++i) {
    Sequence& s = a.each[i];
    const std::vector<int32_t>& tokens = b.each[i].tokens;
    const auto at = [&](size_t p) {
      const int32_t token = tokens[p];
      if (token < 0) fail("sync: a mixed token has no counterpart in another model.");
      if (!table) return token;
      if (token >= known) fail("sync: the table has no entry for the token %d.", token);
      return std::max(translated[token], 0);
    };
    const size_t base = s.tokens.size() - (i == 0 ? a.visited.size() : 0);  // before the root of a's tree
    size_t common = 0;
    while (common < base && common < tokens.size() && s.tokens[common] == at(common)) ++common;
    std::vector<int32_t> path;
    if (i == 0 && a.tree && common == base)
      for (int32_t node = -1; base + path.size() < tokens.size();) {
        node = a.tree->child(node, at(base + path.size()));
        if (node < 0 || node >= a.ran || a.node_slots[(size_t)node] < 0) break;
        path.push_back(node);
      }
    s.tokens.resize(base);
    truncate(*a.model, s, (int64_t)common);
    s.tokens.resize(common);
    for (size_t p = common; p < tokens.size(); ++p) {
      check_token(*a.model, at(p));
      s.tokens.push_back(at(p));
    }
    check_length(*a.model, (int64_t)s.tokens.size());
    for (int32_t node : path) {
      s.slots.push_back(a.node_slots[(size_t)node]);
      a.node_slots[(size_t)node] = -1;
    }
    if (!path.empty()) s.cached = (int64_t)s.slots.size();
  }
  drop_tree(a);
  call.out[0] = std::move(call.in[0]);
  return true;
}

inline bool op_length(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[0]);
  call.out[0] = tensor(I32, {(int64_t)s.each.size()});
  for (size_t i = 0; i < s.each.size(); ++i) call.out[0].i32()[i] = (int32_t)s.each[i].tokens.size();
  return true;
}
// Where a part of a history begins: `start`, from the end when it is negative, as Python slices.
inline int64_t first_of(const Sequence& s, int64_t start) {
  const int64_t n = (int64_t)s.tokens.size();
  return start < 0 ? std::max<int64_t>(n + start, 0) : std::min(start, n);
}
inline bool op_history(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[0]);
  const int64_t start = *call.in[1].i32(), size = call.size(0);
  if (size < 0) fail("history: its size is negative");
  call.out[0] = tensor(I32, {(int64_t)s.each.size(), size});
  int32_t* out = call.out[0].i32();
  for (const Sequence& q : s.each)
    for (int64_t i = 0, from = first_of(q, start), n = (int64_t)q.tokens.size(); i < size; ++i)
      *out++ = from + i < n ? q.tokens[(size_t)(from + i)] : -1;
  return true;
}
inline bool op_token_counts(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[0]);
  const int64_t start = *call.in[1].i32(), vocab = s.model->vocab;
  call.out[0] = zeros({(int64_t)s.each.size(), vocab});
  float* out = call.out[0].f32();
  for (const Sequence& q : s.each) {
    for (size_t i = (size_t)first_of(q, start); i < q.tokens.size(); ++i)
      if (q.tokens[i] >= 0) out[q.tokens[i]] += 1.0f;
    out += vocab;
  }
  return true;
}

inline const OperationEntry SEQUENCES_OPERATIONS[] = {
    {"start", op_start, 1, 1, 3},   {"step", op_step, 2, 3, 0},       {"feed", op_feed, 2, 3, 0},
    {"step_mixed", op_step_mixed, 3, 3, 0}, {"fork", op_fork, 2, 1, 0}, {"sync", op_sync, -1, 1, 0},
    {"length", op_length, 1, 1, 0}, {"history", op_history, 2, 1, 1}, {"token_counts", op_token_counts, 2, 1, 0},
};

}  // namespace stemma
