// What speculation costs and gains, as in ir/ops/governor.py: how often drafted tokens are accepted, how long turns take.
//
// glossary  turn     one call of the model with all that belongs to it: drafting, choosing, learning
//           recent   how many drafted tokens the last turn accepted, at most RECENT - 1, as texts repeat by stretches; 1 if none was
//                    drafted, so that no bad stretch keeps drafters out for good
//           class    how certain a tree is of the token after its root, in CLASSES steps
//           gain     expected tokens of a tree less what its nodes cost, in tokens at the present rate; of a tree without nodes 0
//           speed    how long calls take now, over what the curve says: machines have fast and slow times
//           others   how many times the governor's rows a call had: requests that are decoded together pay for each other's nodes
#pragma once
#include "reals.hpp"
#include "trees.hpp"

namespace stemma {
namespace governor {

constexpr int DEPTHS = 8, AGREED = 3, RECENT = 4, BUCKETS = 32, RANKS = 16, HALVES = 8;
constexpr size_t CLASSES = 4;
constexpr int64_t EXPLORE = 32, SPARSELY = 32, PLAIN_FIRST = 4, ROWS = 512;
constexpr int64_t NODES = 64;  // of a drafter of which it is known what they bring
constexpr int64_t TRIAL = 4, PAUSE = 16, LONGEST = 512;  // turns in which a drafter is asked again; turns between them
constexpr int64_t SPARE = 3;       // nodes that are drafted beyond the last that brings more than
constexpr double NOTHING = 0.01;   // tokens
constexpr double TRYING = 0.01;    // share of the time that trials may take, unless pauses would be longer than LONGEST
constexpr double PATIENCE = 0.8;  // a drafter is asked until it brings less than this share of its cost

inline int halves(double x) {
  int exponent;
  const double mantissa = frexp(x, &exponent);
  return std::clamp(-2 * exponent + (mantissa < 0.70710678118654752440) - 2, 0, HALVES - 1);
}
inline int bucket(int32_t rank, float score) {
  if (score >= 1) return std::min(rank, RANKS - 1);
  if (!(score > 0)) return BUCKETS - 1;
  return RANKS + (score >= 0.5f ? halves(1 - (double)score) : HALVES + halves((double)score));
}
inline double prior(int place) {
  if (place < RANKS) return 0.8 / (1 + place);
  const double part = real_exp(-0.34657359027997265471 * ((place - RANKS) % HALVES + 2));
  return 0.9 * (place >= RANKS + HALVES ? part : 1 - part);
}
inline void mix(double& average, double value, double weight) { average += (value - average) * weight; }

// Seconds of a call by its rows.
struct Curve {
  std::vector<double> measured = std::vector<double>(ROWS + 1);  // averages; 0: never
  std::vector<int32_t> times = std::vector<int32_t>(ROWS + 1);
  int64_t last = 0;                                               // the most rows that were measured
  mutable std::vector<double> drawn;                              // anew when it is asked for
  mutable bool changed = false;
  double at(double rows) const {
    if (changed) draw();
    if (!last) return 1 + rows / 16;
    const int64_t low = (int64_t)rows;
    if (low >= last) return drawn[(size_t)last] + slope() * (rows - (double)last);
    return drawn[(size_t)low] + (drawn[(size_t)low + 1] - drawn[(size_t)low]) * (rows - (double)low);
  }
  double slope() const {  // after the last measurement; cheap when little is known, so that larger calls are tried
    int64_t first = 1;
    while (first < last && !times[(size_t)first]) ++first;
    return last > first ? (drawn[(size_t)last] - drawn[(size_t)first]) / (double)(last - first) / 2 : drawn[(size_t)last] / 50;
  }
  void take(int64_t rows, double took) {
    double& average = measured[(size_t)rows];
    int32_t& n = times[(size_t)rows];
    // The first ones may have been slow for another reason: the least counts. Later, what is far off counts as a little off.
    if (n < 4) average = n ? std::min(average, took) : took;
    else mix(average, std::min(took, 1.5 * average), 1.0 / 16);
    ++n;
    last = std::max(last, rows);
    changed = true;
  }
  // Never falling: the middle between the largest before and the smallest after; straight between what was measured.
  void draw() const {
    changed = false;
    drawn.assign((size_t)last + 1, 0.0);
    double most = 0, least = HUGE_VAL;
    for (int64_t r = 1; r <= last; ++r)
      if (times[(size_t)r]) drawn[(size_t)r] = most = std::max(most, measured[(size_t)r]);
    int64_t next = last;
    for (int64_t r = last; r >= 0; --r) {
      if (r && times[(size_t)r]) {
        least = std::min(least, measured[(size_t)r]);
        drawn[(size_t)r] = (drawn[(size_t)r] + least) / 2;
        next = r;
        continue;
      }
      int64_t before = r;
      while (before > 0 && !times[(size_t)before]) --before;
      // What lies before a row was not yet lowered to the middle; that is near enough.
      drawn[(size_t)r] = !before ? drawn[(size_t)next] : drawn[(size_t)before] + (drawn[(size_t)next] - drawn[(size_t)before])
          * (double)(r - before) / (double)(next - before);
    }
  }
};

// Seconds of a drafter by the nodes that it is allowed: the slope of a line through what was seen of late.
struct Effort {
  double nodes = 0, seconds = 0, products = 0, squares = 0;  // averages
  int64_t seen = 0;
  void take(double n, double took) {
    if (seen >= 4) took = std::min(took, 3 * seconds);  // interrupted
    const double weight = 1.0 / (double)std::min<int64_t>(++seen, 64);
    mix(nodes, n, weight), mix(seconds, took, weight), mix(products, n * took, weight), mix(squares, n * n, weight);
  }
  double per_node() const {
    const double spread = squares - nodes * nodes;
    return spread > 0.1 ? std::max((products - nodes * seconds) / spread, 0.0) : 0;
  }
};

struct Drafting {  // one drafter at trees of one class
  double gain = 0, seconds = 0;
  int64_t asked = 0;            // in all; in this trial, when there is one
  int64_t rest = 0, pause = 0;  // turns until it is asked again; the length of that pause, 0 while it is asked always
};

struct Governor : Object {
  int64_t size, sources, turns = 0, timed = 0;
  std::vector<double> accepted;
  std::vector<int64_t> trials;
  std::vector<Drafting> drafting;  // [sources, CLASSES]
  std::vector<double> brought;        // [sources, RECENT, NODES] what the n-th node of a drafter adds to the gain
  std::vector<int64_t> drafted;       // [sources, RECENT] how often that was seen
  std::vector<Effort> effort;         // [sources]
  Curve curve;
  int64_t recent = 1;
  double tokens = 0, seconds = 0;     // averages per turn
  double plain = 0, handling = 0;     // seconds outside of the model: of a plain token; what a tree adds to that, without drafting
  double speed = 1, others = 1;
  Governor(int64_t n, int64_t k) : size(n), sources(k), accepted((size_t)(k * DEPTHS * AGREED * RECENT * BUCKETS)),
      trials(accepted.size()), drafting((size_t)k * CLASSES), brought((size_t)(k * RECENT * NODES)),
      drafted((size_t)(k * RECENT)), effort((size_t)k) {
    for (size_t i = 0; i < accepted.size(); ++i) accepted[i] = prior((int)(i % BUCKETS));
  }
  Object* clone() const override { return new Governor(*this); }

  size_t place(const Tree& t, size_t node) const {
    const int64_t source = std::clamp<int64_t>(t.sources[node], 0, sources - 1);
    const int64_t depth = std::clamp(t.depths[node], 1, DEPTHS) - 1, agreed = std::min(t.agreed[node], AGREED - 1);
    return (size_t)((((source * DEPTHS + depth) * AGREED + agreed) * RECENT + recent) * BUCKETS + bucket(t.ranks[node],
        t.scores[node]));
  }
  double cost(int64_t rows) const { return curve.at(std::max((double)rows * others, 1.0)); }
  double rate() const { return tokens > 0 ? tokens / seconds : 1 / cost(1); }

  // The chance that each node is reached; the root is.
  void scores(const Tree& t, std::vector<double>& found) const {
    found.assign(1, 1.0);
    for (size_t i = 1; i < t.tokens.size(); ++i) found.push_back(found[(size_t)t.parents[i]] * accepted[place(t, i)]);
  }
  std::vector<double> scores(const Tree& t) const {
    std::vector<double> found;
    scores(t, found);
    return found;
  }
  // The nodes that bring more than they cost, in `best`, and how much more, in tokens; `worth`: by each node of the tree.
  double choose(const Tree& t, std::vector<int32_t>& best, std::vector<double>& worth) const {
    static thread_local std::vector<double> scores;
    this->scores(t, scores);
    best.clear();
    for (int32_t i = 1; i < (int32_t)t.count(); ++i) best.push_back(i);
    std::sort(best.begin(), best.end(), [&](int32_t a, int32_t b) {
      return scores[(size_t)a] != scores[(size_t)b] ? scores[(size_t)a] > scores[(size_t)b] : a < b;
    });
    if ((int64_t)best.size() > size - 1) best.resize((size_t)(size - 1));
    const double per_second = rate(), one = cost(1);
    size_t count = 0;
    double most = 0, total = 0;
    for (size_t i = 0; i < best.size(); ++i) {
      total += scores[(size_t)best[i]];
      const double now = total - per_second * (cost((int64_t)i + 2) - one);
      if (now > most) count = i + 1, most = now;
    }
    if (turns % EXPLORE == EXPLORE - 1) count = std::min(best.size(), count + 1);
    best.resize(count);
    worth.assign((size_t)t.count(), 0.0);
    for (size_t i = 0; i < count; ++i)
      worth[(size_t)best[i]] = scores[(size_t)best[i]] - per_second * (cost((int64_t)i + 2) - cost((int64_t)i + 1));
    return most;
  }
  size_t stretch(const Asked& a) const { return (size_t)(a.source * RECENT + a.recent); }
  // Of at most `most` nodes of a slow drafter as many as bring most, less the time that they take it. At first, and now and then,
  // other numbers are tried, which say nothing of whether it pays.
  void allow(Asked& a, int64_t most) const {
    const Effort& e = effort[(size_t)a.source];
    const double* each = &brought[stretch(a) * NODES];
    const double took = rate() * e.per_node();
    double total = 0, best = 0;
    a.limit = 1;
    for (int64_t i = 0; i < std::min(most, NODES); ++i)
      if ((total += each[i] - took) > best) best = total, a.limit = i + 1;
    a.tried = e.seen < TRIAL || turns % EXPLORE == EXPLORE / 2;
    if (e.seen < TRIAL) a.limit = e.seen % 2 ? 1 : 3;
    else if (a.tried) ++a.limit;
    a.limit = std::min(a.limit, most);
  }
  // Of another drafter a few more than ever bring anything; at first, and now and then, all.
  void trim(Asked& a, int64_t most) const {
    a.limit = most;
    if (drafted[stretch(a)] < 2 * TRIAL || turns % EXPLORE == EXPLORE / 2) return;
    const double* each = &brought[stretch(a) * NODES];
    int64_t last = 0;
    for (int64_t i = 0; i < std::min(most, NODES); ++i)
      if (each[i] > NOTHING) last = i + 1;
    if (last < NODES) a.limit = std::min(most, last + SPARE);
  }
  void take(const Asked& a) {
    if (a.brought.empty()) return;  // samples are not chosen among
    const double weight = 1.0 / (double)std::min<int64_t>(++drafted[stretch(a)] + 2, 8);
    double* each = &brought[stretch(a) * NODES];
    for (size_t i = 0; i < a.brought.size(); ++i) mix(each[i], a.brought[i], weight);
    effort[(size_t)a.source].take((double)a.limit, a.seconds / speed);
  }
  size_t class_of(const Tree& t) const {
    double next = 0;
    for (size_t i = 1; i < t.tokens.size(); ++i)
      if (!t.parents[i]) next += accepted[place(t, i)];
    return std::min((size_t)(next * CLASSES), CLASSES - 1);
  }
  // One more answer to a question whether the drafter pays.
  void answered(Drafting& d, double gain, double took, bool first) {
    const double weight = 1.0 / (double)std::min<int64_t>(++d.asked, 32);
    mix(d.gain, gain, weight);
    // After a pause a drafter first takes in what was decoded meanwhile; that time is no measure of the next ones.
    if (d.asked < 3) d.seconds = took;
    else mix(d.seconds, std::min(took, 3 * d.seconds), weight);
    const double cost = rate() * (d.seconds + (first ? handling : 0));
    if (d.pause) {
      if (d.asked < TRIAL) return;
      const double longest = TRIAL * d.seconds / (TRYING * this->cost(1));
      d.pause = d.gain > cost ? 0 : std::min(2 * d.pause, (int64_t)std::clamp(longest, 8.0 * PAUSE, (double)LONGEST));
    } else if (d.asked >= PAUSE && d.gain < PATIENCE * cost) {
      d.pause = PAUSE;
    }
    d.rest = d.pause;
    if (d.pause) d.asked = 0;
  }
};

// What is asked of an instance's drafters in a turn is noted in `asked`; the last one drafts until `closed`. The gain of the tree.
inline double close(Instance& instance, const Governor& g, const Tree& tree, std::vector<int32_t>& best) {
  static thread_local std::vector<double> worth;
  const double gain = g.choose(tree, best, worth);
  for (Asked& last : instance.asked) {
    if (!last.open) continue;
    last.open = false;
    last.seconds += instance.busy_now() - last.since;
    last.gain = gain - last.gain;
    last.brought.assign((size_t)std::min(last.limit, NODES), 0.0);
    for (size_t i = 1; i < tree.tokens.size(); ++i)
      if (const size_t order = (size_t)tree.orders[i] - 1; tree.sources[i] == last.source && order < last.brought.size())
        last.brought[order] = worth[i];
  }
  return gain;
}

inline bool op_plan(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const int64_t most = std::max<int64_t>(std::min(call.size(0), g.size), 1);
  call.instance.asked.clear();
  call.out[0] = tensor(I32, {});
  int64_t wanted = !g.turns;
  for (int64_t s = 0; s < g.sources; ++s) wanted |= g.drafting[(size_t)s * CLASSES].rest <= 0;
  if (g.turns && g.turns <= PLAIN_FIRST) wanted = 0;
  *call.out[0].i32() = (int32_t)(wanted ? most : g.turns % SPARSELY == SPARSELY - 1 ? 1 : 0);
  return true;
}
inline bool op_ask(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const Tree& tree = state_of<Tree>(call.in[1]);
  Instance& instance = call.instance;
  Asked asked;
  asked.source = std::clamp<int64_t>(call.integer(0), 0, g.sources - 1);
  if (tree.count() > 1) {
    static thread_local std::vector<int32_t> best;
    asked.gain = close(instance, g, tree, best);
    asked.level = (int32_t)g.class_of(tree);
  }
  for (const Asked& other : instance.asked) asked.first &= !other.drafted;
  const int64_t most = tree.limit / g.sources - 1;
  asked.drafted = asked.open = most > 0 && g.drafting[(size_t)asked.source * CLASSES + (size_t)asked.level].rest <= 0;
  asked.recent = g.recent;
  if (asked.drafted && call.integer(1)) g.allow(asked, most);
  else if (asked.drafted) g.trim(asked, most);
  asked.since = instance.busy_now();
  instance.asked.push_back(asked);
  call.out[0] = tensor(I32, {});
  *call.out[0].i32() = asked.drafted ? (int32_t)asked.limit + 1 : 0;
  return true;
}
inline bool op_attend(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  Instance& instance = call.instance;
  bool wanted = g.turns % SPARSELY == SPARSELY - 1;
  const double now = instance.busy_now();
  for (Asked& each : instance.asked) {
    if (each.open) each.seconds += now - each.since;
    each.open = each.source == call.integer(0) && each.drafted;
    each.since = now;
    wanted |= each.open;
  }
  Value v = tensor(BOOL, {});
  *v.flags() = wanted;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_prune(Call& call) {
  const Governor& g = state_of<Governor>(call.in[0]);
  const Tree& t = state_of<Tree>(call.in[1]);
  static thread_local std::vector<int32_t> best, place;
  close(call.instance, g, t, best);
  std::sort(best.begin(), best.end());
  Tree* kept = new Tree;
  call.out[0] = state_value(kept);
  kept->size = t.size, kept->limit = t.limit;
  place.assign((size_t)t.count(), 0);
  best.insert(best.begin(), 0);
  kept->reserve((int64_t)best.size());
  for (int32_t i : best) {
    place[(size_t)i] = (int32_t)kept->tokens.size();
    kept->copy(t, (size_t)i, i ? place[(size_t)t.parents[(size_t)i]] : -1);
  }
  return true;
}
// A turn lasts from one `learn` of the instance to the next; one that took in a prompt says nothing of the others.
// False for such a turn.
inline bool take_time(Governor& g, Instance& instance, const Sequences& s) {
  const double now = instance.busy_now(), since = instance.learned;
  instance.learned = now;
  double drafting = 0;
  for (Asked& each : instance.asked) {
    if (each.open) each.seconds += now - each.since;
    drafting += each.seconds;
  }
  const int64_t rows = s.expand_batch, own = s.tree ? s.ran : 1, tokens = s.tree ? (int64_t)s.visited.size() : 1;
  if (rows < 1 || rows > ROWS || s.expand_rows != own || since < 0) return false;
  const double count = (double)tokens, known = g.curve.last ? g.curve.at((double)rows) : 0;
  if (g.timed >= PLAIN_FIRST) mix(g.speed, std::clamp(s.expand_seconds / known, 0.5 * g.speed, 2 * g.speed), 1.0 / 64);
  g.curve.take(rows, s.expand_seconds / g.speed);
  mix(g.others, std::max((double)rows / (double)own, 1.0), g.timed ? 0.125 : 1.0);
  const double outside = (now - since) / g.speed;
  if (!s.tree) mix(g.plain, g.plain > 0 ? std::min(outside, 3 * g.plain) : outside, 1.0 / 16);
  else if (drafting > 0) {
    const double handling = std::max(outside - drafting / g.speed - count * g.plain, 0.0);
    mix(g.handling, g.handling > 0 ? std::min(handling, 2 * g.handling) : handling, 1.0 / 16);
  }
  const double weight = 1.0 / (double)std::min<int64_t>(++g.timed, 64);
  mix(g.tokens, count, weight);
  mix(g.seconds, g.cost(own) + std::min(outside, g.cost(1) + 3 * (g.plain + g.handling)), weight);
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
  g.recent = s.tree && s.ran > 1 ? std::clamp<int64_t>((int64_t)s.visited.size() - 1, 0, RECENT - 1) : 1;
  Instance& instance = call.instance;
  const bool known = take_time(g, instance, s);
  for (const Asked& each : instance.asked) {
    Drafting& d = g.drafting[(size_t)each.source * CLASSES + (size_t)each.level];
    if (!each.drafted) --d.rest;
    else if (known && g.timed > PLAIN_FIRST) {
      g.take(each);
      if (!each.tried) g.answered(d, each.gain, each.seconds / g.speed, each.first);
    }
  }
  if (instance.asked.empty() && g.turns > PLAIN_FIRST)
    for (int64_t i = 0; i < g.sources; ++i) --g.drafting[(size_t)i * CLASSES].rest;
  instance.asked.clear();
  ++g.turns;
  call.out[0] = std::move(call.in[0]);
  return true;
}

}  // namespace governor

inline const OperationEntry GOVERNOR_OPERATIONS[] = {
    {"plan", governor::op_plan, 1, 1, 1},   {"ask", governor::op_ask, 2, 1, 2},     {"attend", governor::op_attend, 1, 1, 1},
    {"prune", governor::op_prune, 2, 1, 0}, {"learn", governor::op_learn, 2, 1, 0},
};
inline const StateEntry GOVERNOR_STATES[] = {
    {"governor", [](const std::vector<int64_t>& a) -> Object* {
       if (a.size() < 2 || a[0] < 1 || a[1] < 1 || a[0] > 1 << 20 || a[1] > 64)
         fail("the program is damaged: a governor has wrong arguments");
       return new governor::Governor(a[0], a[1]);
     }},
};

}  // namespace stemma
