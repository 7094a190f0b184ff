// Tables of drafters: the text itself, a trie of what was seen, n-grams with probabilities. As in ir/ops/tables.py.
#pragma once
#include <queue>

#include "choose.hpp"

namespace stemma {
namespace tables {

inline const Sequences& single(const Value& v) {
  const Sequences& s = state_of<Sequences>(v);
  if (s.each.size() != 1) fail("the program is damaged: one sequence is expected");
  return s;
}

inline bool op_suffix_lookup(Call& call) {
  const Sequences& s = single(call.in[0]);
  const int64_t longest = call.size(0), length = call.size(1);
  std::vector<int32_t> text = s.each[0].tokens;
  text.push_back(*call.in[1].i32());
  const int64_t n = (int64_t)text.size();
  int64_t best = 0, after = 0;
  for (int64_t end = n - 1; end > 0 && best < longest; --end) {
    int64_t k = 0;
    while (k < std::min(longest, end) && text[(size_t)(end - 1 - k)] == text[(size_t)(n - 1 - k)] && text[(size_t)(n - 1 - k)] >= 0)
      ++k;
    if (k > best) best = k, after = end;
  }
  Value v = shaped(I32, {length});
  int32_t* out = v.i32();
  std::fill(out, out + length, -1);
  for (int64_t i = 0; best && i < length; ++i) {
    const int32_t token = after + i < n ? text[(size_t)(after + i)] : out[after + i - n];
    if (token < 0) break;
    out[i] = token;
  }
  call.out[0] = std::move(v);
  return true;
}

// Guesses that wait to be added to a tree: the likeliest first, then the shallower, the lower token, the earlier parent.
struct Guess {
  double value;
  int32_t depth, token, parent;
  float score;
  int32_t place;  // in the table
  bool operator<(const Guess& o) const {  // comes later
    if (value != o.value) return value < o.value;
    return std::make_tuple(depth, token, parent) > std::make_tuple(o.depth, o.token, o.parent);
  }
};
using Guesses = std::priority_queue<Guess>;

// ---- trie ----
struct Trie : Object {
  static constexpr int32_t NONE = -1;
  struct Node { int32_t token, parent, first, next, count; };  // node 0 is the empty run; first child, next sibling
  int64_t capacity;
  std::vector<Node> nodes;
  std::vector<int32_t> slots;  // hash table of nodes by (parent, token); a power of two of them
  explicit Trie(int64_t n) : capacity(n) { clear(); }
  Object* clone() const override { return new Trie(*this); }
  void clear() {
    nodes.assign(1, {NONE, NONE, NONE, NONE, 0});
    slots.assign(64, NONE);
  }
  size_t slot(int32_t parent, int32_t token) const {
    uint64_t h = ((uint64_t)(uint32_t)parent << 32 | (uint32_t)token) * 0x9E3779B97F4A7C15ull;
    for (size_t at = (size_t)(h >> 20) & (slots.size() - 1);; at = (at + 1) & (slots.size() - 1)) {
      const int32_t node = slots[at];
      if (node == NONE || (nodes[(size_t)node].parent == parent && nodes[(size_t)node].token == token)) return at;
    }
  }
  int32_t child(int32_t parent, int32_t token) const { return parent == NONE ? NONE : slots[slot(parent, token)]; }
  int32_t grow(int32_t parent, int32_t token, int32_t count) {
    if (nodes.size() * 2 >= slots.size()) {
      slots.assign(slots.size() * 2, NONE);
      for (size_t i = 1; i < nodes.size(); ++i) slots[slot(nodes[i].parent, nodes[i].token)] = (int32_t)i;
    }
    const int32_t made = (int32_t)nodes.size();
    const size_t at = slot(parent, token);
    nodes.push_back({token, parent, NONE, nodes[(size_t)parent].first, count});
    nodes[(size_t)parent].first = made;
    slots[at] = made;
    return made;
  }
  int32_t find(const int32_t* run, int64_t length) const {
    int32_t node = 0;
    for (int64_t i = 0; i < length && node != NONE; ++i) node = child(node, run[i]);
    return node;
  }
  void halve() {
    const std::vector<Node> old = std::move(nodes);
    clear();
    std::vector<int32_t> place(old.size(), NONE);
    place[0] = 0;
    for (size_t i = 1; i < old.size(); ++i)  // parents come before children; a node may be lost with its parent
      if (old[i].count > 1 && place[(size_t)old[i].parent] != NONE)
        place[i] = grow(place[(size_t)old[i].parent], old[i].token, old[i].count / 2);
  }
};
inline bool op_trie_learn(Call& call) {
  const int64_t branch = call.size(0);
  const std::vector<int32_t>& text = single(call.in[1]).each[0].tokens;
  Trie& trie = own<Trie>(call.in[0]);
  if (branch < 2 || branch > trie.capacity) fail("trie_learn: branch=%lld is not between 2 and the capacity.", (long long)branch);
  std::vector<int32_t> ending;  // nodes of the runs of 0, 1, .. branch - 1 tokens before the next one
  const auto runs_before = [&](int64_t end) {
    ending.assign(1, 0);
    for (int64_t length = 1; length < branch && length <= end && text[(size_t)(end - length)] >= 0; ++length)
      ending.push_back(trie.find(text.data() + end - length, length));
  };
  const int64_t start = std::max(*call.in[2].i32(), 0);
  if (start < (int64_t)text.size()) runs_before(start);
  for (int64_t end = start; end < (int64_t)text.size(); ++end) {
    if ((int64_t)trie.nodes.size() - 1 + branch > trie.capacity) {
      while ((int64_t)trie.nodes.size() - 1 + branch > trie.capacity) trie.halve();
      runs_before(end);
    }
    const int32_t token = text[(size_t)end];
    if (token < 0) {
      ending.assign(1, 0);
      continue;
    }
    std::vector<int32_t> next(1, 0);
    for (int32_t run : ending) {
      int32_t node = trie.child(run, token);
      if (node != Trie::NONE) ++trie.nodes[(size_t)node].count;
      else if (run != Trie::NONE) node = trie.grow(run, token, 1);
      next.push_back(node);
    }
    if ((int64_t)next.size() > branch) next.resize((size_t)branch);
    ending = std::move(next);
  }
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_trie_draft(Call& call) {
  const int64_t branch = call.size(0);
  const Trie& trie = state_of<Trie>(call.in[0]);
  std::vector<int32_t> text = single(call.in[1]).each[0].tokens;
  Tree& tree = own<Tree>(call.in[2]);
  text.push_back(tree.tokens[0]);
  bool full = false;
  for (int64_t length = std::min(branch - 1, (int64_t)text.size()); length > 0 && !full; --length) {
    const int32_t* run = text.data() + text.size() - length;
    if (std::any_of(run, run + length, [](int32_t t) { return t < 0; })) continue;
    Guesses guesses;
    const auto offer = [&](int32_t from, int32_t parent, double value, int32_t depth) {
      for (int32_t i = trie.nodes[(size_t)from].first; i != Trie::NONE; i = trie.nodes[(size_t)i].next) {
        const float score = std::min((float)((double)trie.nodes[(size_t)i].count / (double)trie.nodes[(size_t)from].count), 1.0f);
        guesses.push({value * (double)score, depth, trie.nodes[(size_t)i].token, parent, score, i});
      }
    };
    if (const int32_t found = trie.find(run, length); found != Trie::NONE) offer(found, 0, 1.0, 1);
    while (!guesses.empty() && !full) {
      const Guess g = guesses.top();
      guesses.pop();
      const int32_t node = tree.add(g.parent, g.token, g.score, (int32_t)call.integer(1));
      full = node < 0;
      if (!full) offer(g.place, node, g.value, g.depth + 1);
    }
  }
  call.out[0] = std::move(call.in[2]);
  return true;
}

// ---- n-grams ----
struct Ngrams : Object {
  static constexpr size_t CONTEXTS = 1 << 16;
  struct Entry {
    int64_t count = 0;
    std::vector<std::pair<int32_t, double>> tokens;  // and their probabilities, likeliest first
  };
  int64_t order, k;
  std::unordered_map<std::string, Entry> entries;  // by the bytes of the context
  Ngrams(int64_t o, int64_t n) : order(o), k(n) {}
  Object* clone() const override { return new Ngrams(*this); }
  static std::string key(const std::vector<int32_t>& text, int64_t end, int64_t length) {
    return std::string((const char*)(text.data() + end - length), (size_t)length * 4);
  }
  const Entry* lookup(const std::vector<int32_t>& text) const {
    const int64_t n = (int64_t)text.size();
    for (int64_t length = std::min(order, n); length >= std::min<int64_t>(2, order); --length)
      if (const auto found = entries.find(key(text, n, length)); found != entries.end()) return &found->second;
    return nullptr;
  }
  Entry& at(const std::string& context) {
    if (const auto found = entries.find(context); found != entries.end()) return found->second;
    while (entries.size() >= CONTEXTS)
      for (auto i = entries.begin(); i != entries.end();) i = (i->second.count /= 2) ? std::next(i) : entries.erase(i);
    return entries[context];
  }
};
inline bool op_ngrams_learn(Call& call) {
  const Sequences& s = single(call.in[1]);
  const bool given = call.count() > 2;
  const Value none, &logits = given ? call.in[2] : none;
  Ngrams& table = own<Ngrams>(call.in[0]);
  const std::vector<int32_t>& text = s.each[0].tokens;
  const int64_t base = (int64_t)(text.size() - s.visited.size()), 
      vocab = !given ? s.model->vocab : logits.rank == 2 ? logits.shape[1] : 0;
  if (vocab < 1 || table.k > vocab)
    fail("ngrams_learn: the table keeps %lld tokens; the logits have %lld.", (long long)table.k, (long long)vocab);
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (size_t i = 0; i < s.visited.size(); ++i) rows.emplace_back(s.visited[i], base + (int64_t)i + 1);
  if (!s.tree && given) rows.emplace_back(0, base);
  std::vector<float> p((size_t)vocab), values((size_t)table.k);
  std::vector<int32_t> best((size_t)table.k);
  for (const auto& [row, end] : rows) {
    if (given && row >= logits.shape[0]) continue;
    const float* x = given ? logits.f32() + row * vocab : s.node_logits[(size_t)row].f32();
    stemma_rows(call.machine.native, ROWS_SOFTMAX, x, 1, vocab, p.data());
    stemma_top_k(call.machine.native, x, 1, vocab, table.k, values.data(), best.data());
    for (int64_t length = std::min<int64_t>(2, table.order); length <= std::min(table.order, end); ++length) {
      const int32_t* context = text.data() + end - length;
      if (std::any_of(context, context + length, [](int32_t t) { return t < 0; })) break;
      Ngrams::Entry& entry = table.at(Ngrams::key(text, end, length));
      const double count = (double)entry.count;
      for (auto& [token, each] : entry.tokens) each = each * count;
      for (int32_t token : best) {
        const auto known = std::find_if(entry.tokens.begin(), entry.tokens.end(), [&](const auto& e) { return e.first == token; });
        if (known != entry.tokens.end()) known->second += (double)p[(size_t)token];
        else entry.tokens.emplace_back(token, (double)p[(size_t)token]);
      }
      for (auto& [token, each] : entry.tokens) each /= count + 1;
      std::sort(entry.tokens.begin(), entry.tokens.end(),
          [](const auto& a, const auto& b) { return a.second != b.second ? a.second > b.second : a.first < b.first; });
      if ((int64_t)entry.tokens.size() > table.k) entry.tokens.resize((size_t)table.k);
      ++entry.count;
    }
  }
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_ngrams_draft(Call& call) {
  const Ngrams& table = state_of<Ngrams>(call.in[0]);
  const std::vector<int32_t>& history = single(call.in[1]).each[0].tokens;
  Tree& tree = own<Tree>(call.in[2]);
  const double temperature = (double)choose::scalar_f32(call.in[3]);
  StemmaSampling p = {};
  p.seed = (uint64_t)choose::scalar_i64(call.in[4]), p.sequence = (uint64_t)choose::scalar_i64(call.in[5]);
  Guesses guesses;
  std::vector<int32_t> text, path;
  std::vector<double> weight;
  const auto offer = [&](int32_t node, double value, int32_t depth) {
    path.clear();
    for (int32_t i = node; i >= 0; i = tree.parents[(size_t)i]) path.push_back(tree.tokens[(size_t)i]);
    const size_t all = history.size() + path.size(), last = std::min((size_t)table.order, all);  // only the end is looked at
    text.assign(history.end() - (int64_t)(last - std::min(last, path.size())), history.end());
    text.insert(text.end(), path.rend() - (int64_t)std::min(last, path.size()), path.rend());
    const Ngrams::Entry* entry = table.lookup(text);
    if (!entry) return;
    weight.clear();
    double most = -INFINITY, sum = 0;
    p.position = all;
    for (const auto& [token, each] : entry->tokens) {
      weight.push_back(temperature > 0 && each > 0 ? real_log(each) / temperature + choose::noise_of(p, token) : each);
      if (each > 0) most = std::max(most, weight.back());
    }
    for (size_t i = 0; i < weight.size() && temperature > 0; ++i)
      if (entry->tokens[i].second > 0) sum += weight[i] = real_exp(weight[i] - most);
    for (size_t i = 0; i < weight.size(); ++i) {
      if (!(entry->tokens[i].second > 0)) continue;
      const double share = temperature > 0 ? (double)(float)(weight[i] / sum) : weight[i];
      guesses.push({value * share, depth, entry->tokens[i].first, node, (float)share, 0});
    }
  };
  offer(0, 1.0, 1);
  while (!guesses.empty()) {
    const Guess g = guesses.top();
    guesses.pop();
    const int32_t node = tree.add(g.parent, g.token, g.score, (int32_t)call.integer(0));
    if (node < 0) break;
    offer(node, g.value, g.depth + 1);
  }
  call.out[0] = std::move(call.in[2]);
  return true;
}

inline int64_t argument(const std::vector<int64_t>& arguments, size_t i) {
  if (i >= arguments.size() || arguments[i] < 1 || arguments[i] > 1 << 28)
    fail("the program is damaged: a state has wrong arguments");
  return arguments[i];
}
inline bool op_empty_state(Call& call) {
  call.out[0] = state_value(make_state(call.text(0), call.list(1)));
  return true;
}

}  // namespace tables

inline const OperationEntry TABLES_OPERATIONS[] = {
    {"empty_state", tables::op_empty_state, 0, 1, 2},   {"suffix_lookup", tables::op_suffix_lookup, 2, 1, 2},
    {"trie_learn", tables::op_trie_learn, 3, 1, 1},     {"trie_draft", tables::op_trie_draft, 3, 1, 2},
    {"ngrams_learn", tables::op_ngrams_learn, -1, 1, 0}, {"ngrams_draft", tables::op_ngrams_draft, 6, 1, 1},
};
inline const StateEntry TABLES_STATES[] = {
    {"trie", [](const std::vector<int64_t>& a) -> Object* { return new tables::Trie(tables::argument(a, 0)); }},
    {"ngrams",
        [](const std::vector<int64_t>& a) -> Object* { return new tables::Ngrams(tables::argument(a, 0), tables::argument(a, 1)); }},
};

}  // namespace stemma
