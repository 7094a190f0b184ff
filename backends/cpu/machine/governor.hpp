// What speculation costs and gains, as in ir/ops/governor.py: how often drafted tokens are accepted, how long turns take.
//
// glossary  arm     a limit on the nodes of a tree, root included (1: nothing is drafted), with what turns under it brought and cost
//           turn    one call of the model with all that belongs to it: drafting, choosing, learning
//           others  how many times the governor's rows a call had: requests that are decoded together pay for each other's nodes
//           curve   seconds of a call by its rows
#pragma once
#include "reals.hpp"
#include "trees.hpp"

namespace stemma {
namespace governor {

constexpr int DEPTHS = 8, BUCKETS = 32, RANKS = 16;
constexpr int64_t LIMITS[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256};
constexpr size_t ARMS = sizeof LIMITS / sizeof *LIMITS;
constexpr int64_t FIRST[] = {3, 1, 6, 3, 1, 2, 6, 1, 4, 3};  // what the first turns try
constexpr int64_t FIRSTS = sizeof FIRST / sizeof *FIRST;
constexpr int64_t EXPLORE = 16, BURST = 3, PAUSE = 12, LONGEST_PAUSE = 256, MEMORY = 16, SHORT = 5, ROWS = 512;
constexpr double TRYING = 0.03;  // the share of time that trying other arms may cost

inline int bucket(int32_t rank, float score) {
  if (score >= 1) return std::min(rank, RANKS - 1);
  if (!(score > 0)) return BUCKETS - 1;
  int exponent;
  const double mantissa = frexp((double)score, &exponent);
  return RANKS + std::min(-2 * exponent + (mantissa < 0.70710678118654752440), BUCKETS - RANKS - 1);
}
inline double prior(int place) { return place < RANKS ? 0.8 / (1 + place)
    : 0.9 * real_exp(-0.34657359027997265471 * (place - RANKS)); }
inline void mix(double& average, double value, double weight) { average += (value - average) * weight; }

struct Governor : Object {
  int64_t size, sources, turns = 0;
  std::vector<double> accepted;
  std::vector<int64_t> trials;
  struct Arm { double tokens = 0, seconds = 0; int64_t turns = 0; };  // exponential averages per turn
  Arm arms[ARMS];
  int64_t timed = 0, next = FIRSTS;  // turns with a measured time; the first of BURST that try another arm
  int64_t tried = 0;                 // how often BURST turns did
  double wasted = 0;                 // seconds that those cost more than the best arm
  double others = 1, outside = 0;              // averages; outside: seconds of a turn that are not the model's
  // Seconds by rows (measured: 0 when never).
  std::vector<double> measured = std::vector<double>(ROWS + 1);
  mutable std::vector<double> curve;  // drawn anew when it is asked for
  mutable bool redraw = false;
  std::vector<int32_t> measurements = std::vector<int32_t>(ROWS + 1);
  Governor(int64_t n, int64_t k) : size(n), sources(k), accepted((size_t)(k * DEPTHS * BUCKETS)), trials(accepted.size()) {
    for (size_t i = 0; i < accepted.size(); ++i) accepted[i] = prior((int)(i % BUCKETS));
  }
  Object* clone() const override { return new Governor(*this); }

  size_t place(const Tree& t, size_t node) const {
    const int64_t source = std::clamp<int64_t>(t.sources[node], 0, sources - 1), depth = std::clamp<int64_t>(t.depths[node], 1,
        DEPTHS) - 1;
    return (size_t)((source * DEPTHS + depth) * BUCKETS + bucket(t.ranks[node], t.scores[node]));
  }
  std::vector<double> scores(const Tree& t) const {
    std::vector<double> found(1, 1.0);
    for (size_t i = 1; i < t.tokens.size(); ++i) found.push_back(found[(size_t)t.parents[i]] * accepted[place(t, i)]);
    return found;
  }
  // Seconds of a call in which this tree has that many rows.
  double cost(int64_t rows) const {
    if (redraw) draw();
    if (curve.empty()) return 1 + (double)rows / 16;
    const double at = std::max((double)rows * others, 1.0);
    const int64_t low = (int64_t)at;
    if (low >= ROWS) return curve[ROWS] * at / ROWS;
    return curve[(size_t)low] + (curve[(size_t)low + 1] - curve[(size_t)low]) * (at - (double)low);
  }
  void measure(int64_t rows, double took) {
    if (rows < 1 || rows > ROWS) return;
    double& average = measured[(size_t)rows];
    int32_t& n = measurements[(size_t)rows];
    if (n < 16) ++n;
    mix(average, took, 1.0 / n);
    redraw = true;
  }
  void draw() const {
    redraw = false;
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
      for (int64_t r = a + 1; r < b; ++r)
        curve[(size_t)r] = curve[(size_t)a] + (curve[(size_t)b] - curve[(size_t)a]) * (double)(r - a) / (double)(b - a);
      a = b;
    }
    const double slope = last > first ? (curve[(size_t)last] - curve[(size_t)first]) / (double)(last - first)
        : curve[(size_t)last] / 50;
    for (int64_t r = last + 1; r <= ROWS; ++r) curve[(size_t)r] = curve[(size_t)last] + slope * (double)(r - last);
  }
  double rate(size_t arm) const { return arms[arm].turns ? arms[arm].tokens / arms[arm].seconds : 0; }
  size_t last_arm(int64_t most) const {
    size_t arm = 0;
    while (arm + 1 < ARMS && LIMITS[arm + 1] <= most) ++arm;
    return arm;
  }
  size_t best(size_t last) const {
    size_t found = 0;
    for (size_t i = 1; i <= last; ++i)
      if (rate(i) > rate(found)) found = i;
    return found;
  }
  // The arm of the next turn: the best one, now and then a neighbour, another, or none at all.
  size_t choose(size_t last) const {
    if (timed < FIRSTS) return last_arm(std::min(FIRST[timed], LIMITS[last]));
    const size_t now = best(last);
    if (timed < next) return now;
    switch (tried % 4) {
      case 0: return now < last ? now + 1 : now ? now - 1 : 0;
      case 1: return now > 0 ? now - 1 : std::min<size_t>(2, last);
      case 2: return 0;
      default: return (size_t)(tried / 4) % (last + 1);
    }
  }
};

inline bool op_plan(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const int64_t most = std::max<int64_t>(std::min(call.size(0), g.size), 1);
  const size_t last = g.last_arm(most), arm = g.choose(last);
  call.out[0] = tensor(I32, {});
  *call.out[0].i32() = (int32_t)(!g.turns ? most : arm == last && LIMITS[arm] * 2 > most ? most : LIMITS[arm]);
  return true;
}
inline bool op_prune(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const Tree& t = state_of<Tree>(call.in[1]);
  const std::vector<double> scores = g.scores(t);
  std::vector<int32_t> best;
  for (int32_t i = 1; i < (int32_t)t.count(); ++i) best.push_back(i);
  std::stable_sort(best.begin(), best.end(), [&](int32_t a, int32_t b) { return scores[(size_t)a] > scores[(size_t)b]; });
  const int64_t room = std::min(g.size, std::max<int64_t>(t.limit / g.sources, 1)) - 1;  // drafters together keep what one may
  if ((int64_t)best.size() > room) best.resize((size_t)room);
  size_t count = 0;
  double most = 1 / (g.cost(1) + g.outside), total = 1;
  for (size_t n = 1; n <= best.size(); ++n) {
    total += scores[(size_t)best[n - 1]];
    const double now = total / (g.cost((int64_t)n + 1) + g.outside);
    if (now > most) count = n, most = now;
  }
  if (!g.timed && g.turns % EXPLORE == EXPLORE - 1) count = std::min(best.size(), 2 * count + 2);
  if (g.timed && g.timed < FIRSTS) count = best.size();  // costs are not known yet
  best.resize(count);
  std::sort(best.begin(), best.end());
  Tree* kept = new Tree;
  call.out[0] = state_value(kept);
  kept->size = t.size, kept->limit = t.limit;
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
      mix(g.accepted[at], child == following ? 1.0 : 0.0, 1.0 / (double)(std::min<int64_t>(g.trials[at], 60) + 4));
      ++g.trials[at];
    }
  }
  // A turn lasts from one `learn` of the instance to the next; one that took in a prompt says nothing of the others.
  const double now = call.instance.busy_now(), since = call.instance.learned;
  call.instance.learned = now;
  if (s.tree && s.expand_batch > 0 && s.expand_rows == s.ran && since >= 0) {
    const double share = (double)s.expand_rows / (double)s.expand_batch;
    double seconds = s.expand_seconds * share + (now - since);
    mix(g.others, std::max(1 / share, 1.0), g.timed ? 0.125 : 1.0);
    g.measure(s.expand_batch, s.expand_seconds);
    const size_t arm = g.last_arm(s.tree->limit > 1 ? std::max<int64_t>(s.tree->limit / g.sources, 1) : 1);
    Governor::Arm& a = g.arms[arm];
    if (a.turns >= 2) seconds = std::min(seconds, 3 * a.seconds);  // the machine did something else meanwhile
    // What was tried long ago counts little: drafters learn, and the machine's speed changes.
    const double weight = 1.0 / (double)std::min<int64_t>(++a.turns, arm == g.best(ARMS - 1) ? MEMORY : SHORT);
    mix(a.tokens, (double)s.visited.size(), weight), mix(a.seconds, seconds, weight);
    if (arm) mix(g.outside, now - since, g.outside > 0 ? 0.125 : 1.0);
    const size_t best = g.best(ARMS - 1);
    if (g.timed >= g.next) g.wasted += std::max(seconds - (double)s.visited.size() / g.rate(best), 0.0);
    if (g.timed >= g.next + BURST - 1) {
      g.next = g.timed + std::clamp((int64_t)(g.wasted / (TRYING * g.arms[best].seconds)), PAUSE, LONGEST_PAUSE);
      g.wasted = 0, ++g.tried;
    }
    ++g.timed;
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
       if (a.size() < 2 || a[0] < 1 || a[1] < 1 || a[0] > 1 << 20 || a[1] > 64)
         fail("the program is damaged: a governor has wrong arguments");
       return new governor::Governor(a[0], a[1]);
     }},
};

}  // namespace stemma
