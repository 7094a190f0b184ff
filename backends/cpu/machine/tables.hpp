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
  const std::vector<int32_t>& text = single(call.in[0]).each[0].tokens;
  const int32_t root = *call.in[1].i32();
  const int64_t longest = call.size(0), length = call.size(1), n = (int64_t)text.size();  // the token comes after the text
  int64_t best = 0, after = 0;
  for (int64_t end = n; end > 0 && best < longest && root >= 0; --end) {
    if (text[(size_t)(end - 1)] != root) continue;
    int64_t k = 1;
    while (k < std::min(longest, end) && text[(size_t)(end - 1 - k)] == text[(size_t)(n - k)] && text[(size_t)(n - k)] >= 0) ++k;
    if (k > best) best = k, after = end;
  }
  Value v = shaped(I32, {length});
  int32_t* out = v.i32();
  std::fill(out, out + length, -1);
  for (int64_t i = 0; best && i < length; ++i) {
    const int64_t at = after + i;
    const int32_t token = at < n ? text[(size_t)at] : at == n ? root : out[at - n - 1];
    if (token < 0) break;
    out[i] = token;
  }
  call.out[0] = std::move(v);
  call.out[1] = tensor(I32, {});
  *call.out[1].i32() = (int32_t)best;
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
  std::vector<uint64_t> slots;  // hash table of nodes by (parent, token): half the hash, the node (0: free); a power of two of them
  std::vector<int32_t> last, ending;  // the end of what was learnt last, and the nodes of its last 0, 1, .. tokens
  explicit Trie(int64_t n) : capacity(n) { clear(); }
  Object* clone() const override { return new Trie(*this); }
  void clear() {
    nodes.assign(1, {NONE, NONE, NONE, NONE, 0});
    ending.clear();
    slots.assign(64, 0);
  }
  static uint64_t hash(int32_t parent, int32_t token) {
    const uint64_t h = ((uint64_t)(uint32_t)parent << 32 | (uint32_t)token) * 0x9E3779B97F4A7C15ull;
    return h ^ h >> 29;
  }
  void expect(int32_t parent, int32_t token) const { __builtin_prefetch(&slots[(size_t)hash(parent, token) & (slots.size() - 1)]); }
  size_t slot(int32_t parent, int32_t token) const {
    const uint64_t h = hash(parent, token);
    for (size_t at = (size_t)h & (slots.size() - 1);; at = (at + 1) & (slots.size() - 1)) {
      const uint64_t entry = slots[at];
      if (!entry) return at;
      if (entry >> 32 != h >> 32) continue;
      const Node& node = nodes[(size_t)(uint32_t)entry];
      if (node.parent == parent && node.token == token) return at;
    }
  }
  int32_t child(int32_t parent, int32_t token) const {
    if (parent == NONE) return NONE;
    const uint64_t entry = slots[slot(parent, token)];
    return entry ? (int32_t)(uint32_t)entry : NONE;
  }
  int32_t grow(int32_t parent, int32_t token, int32_t count) {
    if (nodes.size() * 2 >= slots.size()) {
      slots.assign(slots.size() * 2, 0);
      for (size_t i = 1; i < nodes.size(); ++i) set(slot(nodes[i].parent, nodes[i].token), (int32_t)i);
    }
    const int32_t made = (int32_t)nodes.size();
    const size_t at = slot(parent, token);
    nodes.push_back({token, parent, NONE, nodes[(size_t)parent].first, count});
    nodes[(size_t)parent].first = made;
    set(at, made);
    return made;
  }
  void set(size_t at, int32_t node) {
    slots[at] = hash(nodes[(size_t)node].parent, nodes[(size_t)node].token) >> 32 << 32 | (uint32_t)node;
  }
  int32_t find(const int32_t* run, int64_t length) const {
    int32_t node = 0;
    for (int64_t i = 0; i < length && node != NONE; ++i) node = child(node, run[i]);
    return node;
  }
  // The nodes of the runs of 0, 1, .. branch - 1 tokens before `end` of a text; NONE where there is none.
  void runs_before(const std::vector<int32_t>& text, int64_t end, int64_t branch, std::vector<int32_t>& found) const {
    int64_t most = 0;
    while (most < branch - 1 && most < end && text[(size_t)(end - 1 - most)] >= 0) ++most;
    if ((int64_t)ending.size() == most + 1 && (int64_t)last.size() == most
        && std::equal(last.begin(), last.end(), text.begin() + (end - most))) {
      found = ending;
      return;
    }
    found.assign(1, 0);
    for (int64_t length = 1; length <= most; ++length) found.push_back(find(text.data() + end - length, length));
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
  const int64_t start = std::max(*call.in[2].i32(), 0), size = (int64_t)text.size();
  std::vector<int32_t> next, ending;
  for (int64_t end = start; end < size; ++end) {
    const bool full = (int64_t)trie.nodes.size() - 1 + branch > trie.capacity;
    while ((int64_t)trie.nodes.size() - 1 + branch > trie.capacity) trie.halve();
    if (full || end == start) trie.runs_before(text, end, branch, ending);
    const int32_t token = text[(size_t)end];
    if (token < 0) {
      ending.assign(1, 0);
      continue;
    }
    next.assign(1, 0);
    for (int32_t run : ending)
      if (run != Trie::NONE) trie.expect(run, token);
    for (int32_t run : ending) {
      int32_t node = trie.child(run, token);
      if (node != Trie::NONE) ++trie.nodes[(size_t)node].count;
      else if (run != Trie::NONE) node = trie.grow(run, token, 1);
      next.push_back(node);
    }
    if ((int64_t)next.size() > branch) next.resize((size_t)branch);
    ending.swap(next);
  }
  if (start < size) {
    trie.last.assign(text.end() - (int64_t)(ending.size() - 1), text.end());
    trie.ending = std::move(ending);
  }
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_trie_draft(Call& call) {
  const int64_t branch = call.size(0);
  const Trie& trie = state_of<Trie>(call.in[0]);
  const std::vector<int32_t>& history = single(call.in[1]).each[0].tokens;
  Tree& tree = own<Tree>(call.in[2]);
  std::vector<int32_t> runs;  // of the text; with the root those that are one token longer
  trie.runs_before(history, (int64_t)history.size(), branch, runs);
  for (int32_t& run : runs) run = trie.child(run, tree.tokens[0]);
  if ((int64_t)runs.size() > branch - 1) runs.resize((size_t)(branch - 1));
  bool full = false;
  for (size_t length = runs.size(); length > 0 && !full; --length) {
    const int32_t found = runs[length - 1];
    if (found == Trie::NONE) continue;
    Guesses guesses;
    const auto offer = [&](int32_t from, int32_t parent, double value, int32_t depth) {
      for (int32_t i = trie.nodes[(size_t)from].first; i != Trie::NONE; i = trie.nodes[(size_t)i].next) {
        const float score = std::min((float)((double)trie.nodes[(size_t)i].count / (double)trie.nodes[(size_t)from].count), 1.0f);
        guesses.push({value * (double)score, depth, trie.nodes[(size_t)i].token, parent, score, i});
      }
    };
    offer(found, 0, 1.0, 1);
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

// ---- likely tokens ----
inline double power(double x) {  // e^x for x <= 0, to 1e-9: for scores, which only order guesses
  if (!(x > -80)) return 0;
  const double n = rint(x * 1.44269504088896338700), r = x - n * 0.69314718055994530942;
  const double p = 1 + r * (1 + r * (1 / 2.0 + r * (1 / 6.0 + r * (1 / 24.0 + r * (1 / 120.0 + r * (1 / 720.0 + r / 5040.0))))));
  return ldexp(p, (int)n);
}
// The k likeliest tokens of a row of logits, and their shares in e^logit among these.
inline void likeliest(void* native, const float* logits, int64_t vocab, int64_t k, int32_t* tokens, float* shares) {
  largest(native, logits, vocab, k, shares, tokens);
  const float top = shares[0];
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += (double)(shares[i] = (float)power((double)(shares[i] - top)));
  for (int64_t i = 0; i < k; ++i) shares[i] = (float)((double)shares[i] / sum);
}

// ---- n-grams ----
struct Ngrams : Object {
  static constexpr size_t CONTEXTS = 1 << 16;
  struct Entry {
    int64_t count = 0, tokens = 0;
  };
  int64_t order, k;
  std::vector<Entry> entries;
  std::vector<int32_t> contexts;   // of each entry its length, then room for `order` tokens
  std::vector<int32_t> tokens;     // of each entry room for k tokens, likeliest first
  std::vector<double> shares;      // and their probabilities
  std::vector<int32_t> slots = std::vector<int32_t>(64, -1);  // hash table of entries by context; a power of two of them
  Ngrams(int64_t o, int64_t n) : order(o), k(n) {}
  Object* clone() const override { return new Ngrams(*this); }
  size_t slot(const int32_t* context, int64_t length) const {
    uint64_t h = (uint64_t)length;
    for (int64_t i = 0; i < length; ++i) h = (h ^ (uint64_t)(uint32_t)context[i]) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
    for (size_t at = (size_t)h & (slots.size() - 1);; at = (at + 1) & (slots.size() - 1)) {
      if (slots[at] < 0) return at;
      const int32_t* known = contexts.data() + slots[at] * (order + 1);
      if (*known == length && std::equal(context, context + length, known + 1)) return at;
    }
  }
  int64_t lookup(const std::vector<int32_t>& text) const {  // the entry, or -1
    const int64_t n = (int64_t)text.size();
    for (int64_t length = std::min(order, n); length >= std::min<int64_t>(2, order); --length)
      if (const int32_t found = slots[slot(text.data() + n - length, length)]; found >= 0) return found;
    return -1;
  }
  int64_t at(const int32_t* context, int64_t length) {
    if (const int32_t found = slots[slot(context, length)]; found >= 0) return found;
    while (entries.size() >= CONTEXTS) halve();
    const int64_t made = (int64_t)entries.size();
    entries.emplace_back();
    contexts.resize((size_t)((made + 1) * (order + 1))), tokens.resize((size_t)((made + 1) * k)),
        shares.resize((size_t)((made + 1) * k));
    contexts[(size_t)(made * (order + 1))] = (int32_t)length;
    std::copy(context, context + length, contexts.begin() + made * (order + 1) + 1);
    if (entries.size() * 2 > slots.size()) rehash(slots.size() * 2);
    else slots[slot(context, length)] = (int32_t)made;
    return made;
  }
  void rehash(size_t size) {
    slots.assign(size, -1);
    for (size_t i = 0; i < entries.size(); ++i) {
      const int32_t* context = contexts.data() + (int64_t)i * (order + 1);
      slots[slot(context + 1, *context)] = (int32_t)i;
    }
  }
  void halve() {
    int64_t kept = 0;
    for (int64_t i = 0; i < (int64_t)entries.size(); ++i) {
      if (!(entries[(size_t)i].count /= 2)) continue;
      entries[(size_t)kept] = entries[(size_t)i];
      std::copy_n(contexts.begin() + i * (order + 1), order + 1, contexts.begin() + kept * (order + 1));
      std::copy_n(tokens.begin() + i * k, k, tokens.begin() + kept * k), std::copy_n(shares.begin() + i * k, k, shares.begin()
          + kept * k);
      ++kept;
    }
    entries.resize((size_t)kept);
    rehash(slots.size());
  }
  // Takes one more distribution into an entry's average: its k likeliest tokens.
  void take(int64_t entry, const int32_t* likely, const float* share) {
    static thread_local std::vector<std::pair<double, int32_t>> both;
    Entry& e = entries[(size_t)entry];
    int32_t* token = tokens.data() + entry * k;
    double* each = shares.data() + entry * k;
    const double count = (double)e.count;
    both.clear();
    for (int64_t i = 0; i < e.tokens; ++i) both.emplace_back(each[i] * count, token[i]);
    for (int64_t i = 0; i < k; ++i) {
      const auto known = std::find(token, token + e.tokens, likely[i]);
      if (known != token + e.tokens) both[(size_t)(known - token)].first += (double)share[i];
      else both.emplace_back((double)share[i], likely[i]);
    }
    for (auto& [p, t] : both) p /= count + 1;
    std::sort(both.begin(), both.end(), [](const auto& a, const auto& b) { return a.first != b.first ? a.first > b.first : a.second
        < b.second; });
    e.tokens = std::min((int64_t)both.size(), k);
    for (int64_t i = 0; i < e.tokens; ++i) each[i] = both[(size_t)i].first, token[i] = both[(size_t)i].second;
    ++e.count;
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
  std::vector<float> shares((size_t)table.k);
  std::vector<int32_t> tokens((size_t)table.k);
  const auto learn = [&](int64_t row, int64_t end) {
    if (given && row >= logits.shape[0]) return;
    const float* x = given ? logits.f32() + row * vocab : s.node_logits[(size_t)row].f32();
    likeliest(call.machine.native, x, vocab, table.k, tokens.data(), shares.data());
    for (int64_t length = std::min<int64_t>(2, table.order); length <= std::min(table.order, end); ++length) {
      const int32_t* context = text.data() + end - length;
      if (std::any_of(context, context + length, [](int32_t t) { return t < 0; })) break;
      table.take(table.at(context, length), tokens.data(), shares.data());
    }
  };
  for (size_t i = 0; i < s.visited.size(); ++i) learn(s.visited[i], base + (int64_t)i + 1);
  if (!s.tree && given) learn(0, base);
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
    const int64_t entry = table.lookup(text);
    if (entry < 0) return;
    const int32_t* tokens = table.tokens.data() + entry * table.k;
    const double* stored = table.shares.data() + entry * table.k;
    weight.clear();
    double most = -INFINITY, sum = 0;
    p.position = all;
    for (int64_t i = 0; i < table.entries[(size_t)entry].tokens; ++i) {
      weight.push_back(temperature > 0 && stored[i] > 0 ? real_log(stored[i]) / temperature + choose::noise_of(p, tokens[i])
          : stored[i]);
      if (stored[i] > 0) most = std::max(most, weight.back());
    }
    for (size_t i = 0; i < weight.size() && temperature > 0; ++i)
      if (stored[i] > 0) sum += weight[i] = real_exp(weight[i] - most);
    for (size_t i = 0; i < weight.size(); ++i) {
      if (!(stored[i] > 0)) continue;
      const double share = temperature > 0 ? (double)(float)(weight[i] / sum) : weight[i];
      guesses.push({value * share, depth, tokens[i], node, (float)share, 0});
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

// ---- recycling ----
struct Recycled : Object {  // of each token the k likeliest after it (-1: never seen) and their shares
  int64_t vocab, k;
  std::vector<int32_t> tokens;
  std::vector<float> shares;
  Recycled(int64_t v, int64_t n) : vocab(v), k(n), tokens((size_t)(v * n), -1), shares(tokens.size()) {}
  Object* clone() const override { return new Recycled(*this); }
};
inline bool op_recycling_learn(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[1]);
  Recycled& table = own<Recycled>(call.in[0]);
  const int64_t vocab = s.model->vocab, k = table.k;
  if (table.vocab != vocab || k > vocab) fail("recycling_learn: the table is of another model than '%s'.", s.model->name.c_str());
  for (int64_t i = 0; s.tree && i < s.ran; ++i)
    if (const Value& row = s.node_logits[(size_t)i]; !row.empty()) {
      const int64_t at = s.tree->tokens[(size_t)i] * k;
      likeliest(call.machine.native, row.f32(), vocab, k, table.tokens.data() + at, table.shares.data() + at);
    }
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_recycling_draft(Call& call) {
  const Recycled& table = state_of<Recycled>(call.in[0]);
  Tree& tree = own<Tree>(call.in[1]);
  const std::vector<Attribute>&parents = call.attribute(0).items, &ranks = call.attribute(1).items;
  std::vector<int32_t> place(1, 0);
  for (size_t i = 0; i < parents.size() && i < ranks.size(); ++i) {
    const size_t above = (size_t)std::clamp<int64_t>(parents[i].integer, 0, (int64_t)i);
    const int64_t rank = std::clamp<int64_t>(ranks[i].integer, 0, table.k - 1);
    const int32_t parent = place[above];
    const size_t at = parent < 0 ? 0 : (size_t)(tree.tokens[(size_t)parent] * table.k + rank);
    const bool known = parent >= 0 && at < table.tokens.size();
    place.push_back(known ? tree.add(parent, table.tokens[at], table.shares[at], (int32_t)call.integer(2)) : -1);
  }
  call.out[0] = std::move(call.in[1]);
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
    {"empty_state", tables::op_empty_state, 0, 1, 2},   {"suffix_lookup", tables::op_suffix_lookup, 2, 2, 2},
    {"trie_learn", tables::op_trie_learn, 3, 1, 1},     {"trie_draft", tables::op_trie_draft, 3, 1, 2},
    {"ngrams_learn", tables::op_ngrams_learn, -1, 1, 0}, {"ngrams_draft", tables::op_ngrams_draft, 6, 1, 1},
    {"recycling_learn", tables::op_recycling_learn, 2, 1, 0}, {"recycling_draft", tables::op_recycling_draft, 2, 1, 3},
};
inline const StateEntry TABLES_STATES[] = {
    {"trie", [](const std::vector<int64_t>& a) -> Object* { return new tables::Trie(tables::argument(a, 0)); }},
    {"recycling",
        [](const std::vector<int64_t>& a) -> Object* {
          return new tables::Recycled(tables::argument(a, 0), tables::argument(a, 1));
        }},
    {"ngrams",
        [](const std::vector<int64_t>& a) -> Object* {
          return new tables::Ngrams(tables::argument(a, 0), tables::argument(a, 1));
        }},
};

}  // namespace stemma
