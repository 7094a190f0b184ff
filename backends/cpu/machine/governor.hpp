// What speculation costs and gains, as in ir/ops/governor.py: how often drafted tokens are accepted, how long calls take.
//
// glossary  on      trees are drafted; off: they are not, and tried again for PROBE turns now and then
//           others  how many times the governor's rows a call had: requests that are decoded together pay for each other's nodes
//           curve   seconds of a call by its rows
#pragma once
#include "reals.hpp"
#include "trees.hpp"

namespace stemma {
namespace governor {

constexpr int DEPTHS = 8, BUCKETS = 32, RANKS = 16;
constexpr int64_t LIMITS[] = {2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256};  // what `plan` chooses from
constexpr size_t CHOICES = sizeof LIMITS / sizeof *LIMITS;
constexpr int64_t EXPLORE = 16, PLAIN = 64, WINDOW = 16, PROBE = 4, FIRST_PAUSE = 32, LONGEST_PAUSE = 1024, ROWS = 512;

inline int bucket(int32_t rank, float score) {
  if (score >= 1) return std::min(rank, RANKS - 1);
  if (!(score > 0)) return BUCKETS - 1;
  int exponent;
  const double mantissa = frexp((double)score, &exponent);
  return RANKS + std::min(-2 * exponent + (mantissa < 0.70710678118654752440), BUCKETS - RANKS - 1);
}
inline double prior(int place) { return place < RANKS ? 0.8 / (1 + place) : 0.9 * real_exp(-0.34657359027997265471 * (place - RANKS)); }
inline void mix(double& average, double value, double weight) { average += (value - average) * weight; }

struct Governor : Object {
  int64_t size, sources, turns = 0;
  std::vector<double> accepted;
  std::vector<int64_t> tried;
  // Times.
  // Seconds by rows at the usual speed of the machine (measured: 0 when never), and how much slower than that it is now.
  std::vector<double> measured = std::vector<double>(ROWS + 1), curve;
  double slowness = 1;
  std::vector<int32_t> measurements = std::vector<int32_t>(ROWS + 1);
  double others = 1;  // an average
  // Of each of LIMITS: tokens and seconds of a call that were expected, seconds of drafting that were measured; 0: never.
  struct Choice { double tokens = 0, seconds = 0, drafting = 0; };
  std::vector<Choice> choices = std::vector<Choice>(CHOICES);
  int64_t widest = 0;  // limit so far
  // Whether it pays.
  bool on = true;
  int64_t resume = 0, pause = FIRST_PAUSE;  // when off: the turn of the next try, and the turns to wait after it
  int64_t window = 0;                       // turns with drafting that were added up
  double tokens = 0, seconds = 0;
  Governor(int64_t n, int64_t k) : size(n), sources(k), accepted((size_t)(k * DEPTHS * BUCKETS)), tried(accepted.size()) {
    for (size_t i = 0; i < accepted.size(); ++i) accepted[i] = prior((int)(i % BUCKETS));
  }
  Object* clone() const override { return new Governor(*this); }

  size_t place(const Tree& t, size_t node) const {
    const int64_t source = std::clamp<int64_t>(t.sources[node], 0, sources - 1), depth = std::clamp<int64_t>(t.depths[node], 1, DEPTHS) - 1;
    return (size_t)((source * DEPTHS + depth) * BUCKETS + bucket(t.ranks[node], t.scores[node]));
  }
  std::vector<double> scores(const Tree& t) const {
    std::vector<double> found(1, 1.0);
    for (size_t i = 1; i < t.tokens.size(); ++i) found.push_back(found[(size_t)t.parents[i]] * accepted[place(t, i)]);
    return found;
  }
  // Seconds of a call in which this tree has that many rows.
  double cost(int64_t rows) const {
    if (curve.empty()) return 1 + (double)rows / 16;
    const double at = std::max((double)rows * others, 1.0);
    const int64_t low = (int64_t)at;
    if (low >= ROWS) return slowness * curve[ROWS] * at / ROWS;
    return slowness * (curve[(size_t)low] + (curve[(size_t)low + 1] - curve[(size_t)low]) * (at - (double)low));
  }
  void measure(int64_t rows, double took) {
    if (rows < 1 || rows > ROWS) return;
    double& average = measured[(size_t)rows];
    int32_t& n = measurements[(size_t)rows];
    if (n < 16) ++n;
    if (!curve.empty()) mix(slowness, std::clamp(took / curve[(size_t)rows], slowness / 2, slowness * 2), 0.25);
    mix(average, took / slowness, 1.0 / n);
    // Never falling: the middle between the largest before and the smallest after; straight between what was measured.
    curve.assign(ROWS + 1, 0.0);
    double most = 0, least = HUGE_VAL;
    for (int64_t r = 1; r <= ROWS; ++r)
      if (measured[(size_t)r] > 0) curve[(size_t)r] = most = std::max(most, measured[(size_t)r]);
    int64_t first = 0, last = 0;
    for (int64_t r = ROWS; r > 0; --r) {
      if (!(measured[(size_t)r] > 0)) continue;
      least = std::min(least, measured[(size_t)r]);
      curve[(size_t)r] = (curve[(size_t)r] + least) / 2;
      first = r;
      last = std::max(last, r);
    }
    for (int64_t r = 0; r < first; ++r) curve[(size_t)r] = curve[(size_t)first];
    for (int64_t a = first, b = first + 1; b <= last; ++b) {
      if (!(measured[(size_t)b] > 0)) continue;
      for (int64_t r = a + 1; r < b; ++r) curve[(size_t)r] = curve[(size_t)a] + (curve[(size_t)b] - curve[(size_t)a]) * (double)(r - a) / (double)(b - a);
      a = b;
    }
    const double slope = last > first ? (curve[(size_t)last] - curve[(size_t)first]) / (double)(last - first) : curve[(size_t)last] / 50;
    for (int64_t r = last + 1; r <= ROWS; ++r) curve[(size_t)r] = curve[(size_t)last] + slope * (double)(r - last);
  }
  bool knows_plain() const { return measured[(size_t)std::clamp<int64_t>((int64_t)(others + 0.5), 1, ROWS)] > 0; }
  // Seconds to draft with a limit: between what was measured of others, in proportion beyond.
  double drafting(int64_t limit) const {
    int64_t below = 0, above = 0;
    double low = 0, high = 0;
    for (size_t i = 0; i < CHOICES; ++i) {
      if (!(choices[i].drafting > 0)) continue;
      if (LIMITS[i] <= limit) below = LIMITS[i], low = choices[i].drafting;
      else if (!above) above = LIMITS[i], high = choices[i].drafting;
    }
    if (!above) return below ? low * (double)limit / (double)below : 0;
    return low + (high - low) * (double)(limit - below) / (double)(above - below);
  }
  // The largest limit, up to `most`, whose expected tokens per second are about the best.
  int64_t limit(int64_t most) const {
    if (turns < EXPLORE || turns % EXPLORE == EXPLORE - 1) return most;
    const auto rate = [&](size_t i) { return choices[i].tokens / (choices[i].seconds + drafting(LIMITS[i])); };
    double best = 0;
    for (size_t i = 0; i < CHOICES && LIMITS[i] <= most && choices[i].tokens > 0; ++i) best = std::max(best, rate(i));
    int64_t found = most;
    for (size_t i = 0; i < CHOICES && LIMITS[i] <= most && choices[i].tokens > 0; ++i)
      if (rate(i) > best * 0.97) found = i + 1 == CHOICES || LIMITS[i + 1] > most ? most : LIMITS[i];
    return found;
  }
  bool drafts() const { return on || turns >= resume; }
  // Whether what was drafted in the last turns made decoding faster.
  void judge() {
    if (++window < (on ? WINDOW : PROBE)) return;
    const bool pays = tokens * cost(1) > seconds * 0.98;
    window = 0, tokens = seconds = 0;
    if (pays) on = true, pause = FIRST_PAUSE;
    else {
      if (!on) pause = std::min(pause * 2, LONGEST_PAUSE);
      on = false;
      resume = turns + pause;
    }
  }
};

inline bool op_plan(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const int64_t most = std::min(call.size(0), g.size);
  call.out[0] = tensor(I32, {});
  *call.out[0].i32() = (int32_t)(g.drafts() ? std::max<int64_t>(g.limit(most), 1) : 1);
  return true;
}
inline bool op_prune(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const Tree& t = state_of<Tree>(call.in[1]);
  const double drafting = call.instance.drafting_since >= 0 ? call.instance.busy_now() - call.instance.drafting_since : 0;
  const std::vector<double> scores = g.scores(t);
  std::vector<int32_t> best;
  for (int32_t i = 1; i < (int32_t)t.count(); ++i) best.push_back(i);
  std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return scores[(size_t)a] > scores[(size_t)b]; });
  if ((int64_t)best.size() > g.size - 1) best.resize((size_t)(g.size - 1));
  // The best n of the nodes that a limit allows: (n, expected tokens, seconds of the call). order: of a node among its drafter's.
  std::vector<int64_t> order, seen((size_t)g.sources, 1);
  for (int64_t i = 0; i < t.count(); ++i) order.push_back(i ? seen[(size_t)std::clamp<int64_t>(t.sources[(size_t)i], 0, g.sources - 1)]++ : 0);
  const auto choose_of = [&](int64_t limit, double seconds) {
    std::tuple<size_t, double, double> found(0, 1.0, g.cost(1));
    double rate = 1 / (g.cost(1) + seconds), total = 1;
    int64_t rows = 1;
    for (size_t n = 1; n <= best.size(); ++n) {
      if (order[(size_t)best[n - 1]] >= limit) continue;
      total += scores[(size_t)best[n - 1]];
      const double call_seconds = g.cost(++rows), now = total / (call_seconds + seconds);
      if (now > rate) found = {n, total, call_seconds}, rate = now;
    }
    return found;
  };
  size_t count = std::get<0>(choose_of(INT64_MAX, drafting));
  if (g.turns % EXPLORE == EXPLORE - 1) count = std::min(best.size(), 2 * count + 2);
  else if (g.turns % PLAIN == PLAIN / 2) count = 0;
  else if (g.turns >= 2 && !g.curve.empty() && !g.knows_plain()) count = 0;  // a plain call must be seen once
  best.resize(count);
  std::sort(best.begin(), best.end());
  Tree* kept = new Tree;
  call.out[0] = state_value(kept);
  kept->size = t.size, kept->limit = t.limit;
  for (size_t i = 0; i < CHOICES && LIMITS[i] * g.sources <= t.limit; ++i) {
    const auto [n, tokens, seconds] = choose_of(LIMITS[i], g.drafting(LIMITS[i]));
    kept->prospects.emplace_back(tokens, seconds);
  }
  std::vector<int32_t> place((size_t)t.count(), 0);
  best.insert(best.begin(), 0);
  for (int32_t i : best) {
    const size_t at = (size_t)i;
    place[at] = (int32_t)kept->tokens.size();
    kept->tokens.push_back(t.tokens[at]), kept->parents.push_back(i ? place[(size_t)t.parents[at]] : -1), kept->scores.push_back(t.scores[at]);
    kept->sources.push_back(t.sources[at]), kept->ranks.push_back(t.ranks[at]), kept->depths.push_back(t.depths[at]);
  }
  return true;
}
inline bool op_learn(Call& call) {
  const Sequences& s = state_of<Sequences>(call.in[1]);
  Governor& g = own<Governor>(call.in[0]);
  for (size_t i = 0; i < s.visited.size(); ++i) {
    const int32_t node = s.visited[i], following = i + 1 < s.visited.size() ? s.visited[i + 1] : -1;
    for (int32_t child = node + 1; child < (int32_t)s.ran; ++child) {
      if (s.tree->parents[(size_t)child] != node) continue;
      const size_t at = g.place(*s.tree, (size_t)child);
      mix(g.accepted[at], child == following ? 1.0 : 0.0, 1.0 / (double)(std::min<int64_t>(g.tried[at], 60) + 4));
      ++g.tried[at];
    }
  }
  if (s.tree && s.expand_batch > 0 && s.expand_rows > 0) {
    mix(g.others, std::max((double)s.expand_batch / (double)s.expand_rows, 1.0), g.turns ? 0.125 : 1.0);
    g.measure(s.expand_batch, s.expand_seconds);
    if (s.tree->limit > 1) {
      const int64_t limit = s.tree->limit / g.sources;
      g.widest = std::max(g.widest, limit);
      for (size_t i = 0; i < CHOICES; ++i) {
        Governor::Choice& c = g.choices[i];
        if (LIMITS[i] <= limit && (i + 1 == CHOICES || LIMITS[i + 1] > limit)) mix(c.drafting, s.draft_seconds, c.drafting > 0 ? 0.125 : 1.0);
        if (i >= s.tree->prospects.size() || limit < g.widest) continue;  // choices are compared on the same turns
        const double weight = c.tokens > 0 ? 0.125 : 1.0;
        mix(c.tokens, s.tree->prospects[i].first, weight), mix(c.seconds, s.tree->prospects[i].second, weight);
      }
      g.tokens += (double)s.visited.size(), g.seconds += s.expand_seconds + s.draft_seconds;
      g.judge();
    }
  }
  ++g.turns;
  call.out[0] = std::move(call.in[0]);
  return true;
}

}  // namespace governor

inline const OperationEntry GOVERNOR_OPERATIONS[] = {
    {"plan", governor::op_plan, 1, 1, 1},
    {"prune", governor::op_prune, 2, 1, 0},
    {"learn", governor::op_learn, 2, 1, 0},
};
inline const StateEntry GOVERNOR_STATES[] = {
    {"governor", [](const std::vector<int64_t>& a) -> Object* {
       if (a.size() < 2 || a[0] < 1 || a[1] < 1 || a[0] > 1 << 20 || a[1] > 64) fail("the program is damaged: a governor has wrong arguments");
       return new governor::Governor(a[0], a[1]);
     }},
};

}  // namespace stemma
