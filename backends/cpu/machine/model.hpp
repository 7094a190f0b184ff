// A model of the artifact: its cache memory, slots, table rows, and native calls over rows of many sequences.
//
// glossary  cache   states [planes, slots, row bytes] in memory that grows by doubling; `uses` counts who uses a slot
//           table   i32[table rows][width]: row r holds the slots of a sequence's first positions; `width` grows up to the context.
//                   Sequences borrow table rows and copy only what is new; the least recently used one is taken from its sequence.
//           row     one token to run: at a position, into a slot, seeing the slots of one table row
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include "program.hpp"

extern "C" {
int64_t stemma_arena_bytes(void* model, int32_t function, const int64_t* sizes);
int32_t stemma_call(void* model, int32_t function, const int64_t* sizes, void* const* buffers, void* arena);
}

namespace stemma {

// Zeroed pages that the system commits when they are touched; large blocks ask for huge ones.
class Pages {
 public:
  Pages() {}
  Pages(Pages&& o) noexcept { swap(o); }
  Pages& operator=(Pages&& o) noexcept { swap(o); return *this; }
  ~Pages() { if (block_) munmap(block_, (size_t)length_); }
  static Pages of(int64_t bytes, const char* what) {
    Pages made;
    const int64_t huge = bytes >= HUGE ? HUGE : 0;
    made.length_ = std::max<int64_t>(bytes, 1) + huge;
    void* block = mmap(nullptr, (size_t)made.length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) fail("There is no memory for %s (%lld bytes).", what, (long long)bytes);
    made.block_ = made.data = (char*)block;
    made.bytes = bytes;
    if (huge) {
      made.data += -(uintptr_t)block % HUGE;
#if defined(MADV_HUGEPAGE)
      madvise(block, (size_t)made.length_, MADV_HUGEPAGE);
#endif
    }
    return made;
  }
  char* data = nullptr;
  int64_t bytes = 0;

 private:
  void swap(Pages& o) { std::swap(data, o.data), std::swap(bytes, o.bytes), std::swap(block_, o.block_), std::swap(length_,
      o.length_); }
  static constexpr int64_t HUGE = 2 << 20;
  char* block_ = nullptr;
  int64_t length_ = 0;
};

struct Row {
  int32_t token, position, slot, table;
  int32_t output;  // the number of its row of logits in its request; -1: none
};
// What one instance wants of a model. Filled by an operation, served by the machine in one or more calls.
struct Request {
  Model* model = nullptr;
  std::vector<Row> rows;
  std::vector<int32_t> mixed;   // [outputs, mix] tokens of rows with an output, when those are mixed
  std::vector<float> weights;   // [outputs, mix]
  std::vector<int32_t> pinned;  // table rows that must stay until it is served
  int64_t outputs = 0, done = 0;
  int64_t batch = 0;            // rows of the call that served it whole and computed outputs of all; 0: there was none such
  double seconds = 0;           // of that call
  Value logits, hidden;  // f32[outputs, vocab], f32[outputs, width]
};

struct Model : ModelSpec {
  int64_t calls = 0, run_rows = 0, run_outputs = 0;  // measured so far
  double seconds = 0;
  std::vector<float> cost;  // seconds of a call with that many rows, a moving average; 0: none seen
  bool needs_output = false;
  int64_t used = 0, capacity = 0, limit = 0;  // slots
  void* handle = nullptr;                     // of the native library

  Model(const ModelSpec& spec, void* native) : ModelSpec(spec), handle(native) {
    cost.resize((size_t)rows + 1);
    if (!valid(ROWS, 1))
      fail("The programs do not fit the kernels of this artifact: the model '%s' cannot be called.", name.c_str());
    needs_output = !valid(OUTPUTS, 0);
    rows = std::min(largest(ROWS, rows), largest(OUTPUTS, rows));
    limit = largest(SLOTS, INT32_MAX);
    int64_t slot_bytes = 0;
    for (const BufferSpec& b : buffers) slot_bytes += b.code == STATE_MEMORY ? b.planes * b.row_bytes : 0;
    if (slot_bytes) limit = std::min(limit, physical_memory() / 10 * 8 / slot_bytes);
    context = largest(CONTEXT, context);
    width_ = std::min<int64_t>(context, 512);
    table_rows_.resize((size_t)std::min(largest(SEQUENCES, 4096), std::max<int64_t>(((int64_t)4 << 30) / (4 * context), 256)));
    for (int64_t r = (int64_t)table_rows_.size(); r-- > 0;) free_rows_.push_back((int32_t)r);
    table_ = Pages::of((int64_t)table_rows_.size() * width_ * 4, "the table of sequences");
    for (auto* array : {&tokens_, &positions_, &slots_, &sequence_, &selected_}) array->resize((size_t)rows);
    tokens_.resize((size_t)(rows * mix));
    weights_.resize((size_t)(rows * mix));
  }
  ~Model() { for (auto& [data, bytes] : spare_) free(data); }

  // ---- slots ----
  // Appends n slots that nothing uses, now used once, the first after `hint` if possible. False (and none) when there are fewer.
  bool take(int64_t n, int32_t hint, std::vector<int32_t>& out) {
    if (capacity - used < n && !grow(used + n)) return false;
    for (; n > 0; --n) {
      hint = hint >= 0 && hint + 1 < capacity && !uses_[(size_t)hint + 1] ? hint + 1 : unused();
      uses_[(size_t)hint] = 1;
      blocks_[(size_t)hint / 16] = (uint16_t)(blocks_[(size_t)hint / 16] | 1u << hint % 16);
      ++used;
      out.push_back(hint);
    }
    return true;
  }
  bool has_room(int64_t n) const { return used + n <= limit; }
  void share(int32_t slot) { ++uses_[(size_t)slot]; }
  void release(int32_t slot) {
    if (--uses_[(size_t)slot]) return;
    blocks_[(size_t)slot / 16] = (uint16_t)(blocks_[(size_t)slot / 16] & ~(1u << slot % 16));
    --used;
  }

  // ---- table rows ----
  // The entries of a borrowed row, with room for `positions`; borrows one first when needed and pins it for `request`.
  // Null when every row is pinned. Pointers are good until the next call.
  int32_t* borrow(TableRow& row, int64_t positions, Request& request) {
    while (positions > width_) widen();
    if (!valid(row)) {
      if (free_rows_.empty() && !steal()) return nullptr;
      row = {free_rows_.back(), ++stamps_, 0};
      free_rows_.pop_back();
      table_rows_[(size_t)row.row].stamp = row.stamp;
    }
    Borrowed& borrowed = table_rows_[(size_t)row.row];
    borrowed.last_use = ++uses_of_rows_;
    ++borrowed.pins;
    request.pinned.push_back(row.row);
    return (int32_t*)table_.data + row.row * width_;
  }
  void give_back(TableRow& row) {
    if (valid(row)) {
      table_rows_[(size_t)row.row].stamp = 0;
      if (!table_rows_[(size_t)row.row].pins) free_rows_.push_back(row.row);
    }
    row = {};
  }
  void unpin(Request& request) {
    for (int32_t r : request.pinned)
      if (--table_rows_[(size_t)r].pins == 0 && !table_rows_[(size_t)r].stamp) free_rows_.push_back(r);
    request.pinned.clear();
  }

  // ---- calls ----
  // Adds the next rows of a request to the call being made; how many.
  int64_t add(Request& request, int64_t most) {
    const int64_t first = gathered_, n = std::min({most, rows - gathered_, (int64_t)request.rows.size() - request.done});
    const int64_t base = (int64_t)chosen_.size();
    const bool whole = n == (int64_t)request.rows.size();
    if (whole) chosen_.resize((size_t)(base + request.outputs));
    for (int64_t i = 0; i < n; ++i) {
      const Row& row = request.rows[(size_t)(request.done + i)];
      const size_t at = (size_t)(first + i);
      positions_[at] = row.position, slots_[at] = row.slot, sequence_[at] = row.table;
      for (int64_t k = 0; k < mix; ++k) {
        const bool mixed = row.output >= 0 && !request.mixed.empty();
        tokens_[at * (size_t)mix + (size_t)k] = mixed ? request.mixed[(size_t)(row.output * mix + k)] : row.token;
        weights_[at * (size_t)mix + (size_t)k] = mixed ? request.weights[(size_t)(row.output * mix + k)] : k == 0 ? 1.0f : 0.0f;
      }
      if (row.output < 0) continue;
      if (whole) chosen_[(size_t)(base + row.output)] = (int32_t)at;
      else chosen_.push_back((int32_t)at);
    }
    gathered_ += n;
    parts_.push_back({&request, n, base, whole});
    return n;
  }
  // Runs the call; nanoseconds. An Error when the kernels report one; the requests are then unfinished.
  int64_t run(Pages& arena) {
    running_.swap(parts_);
    parts_.clear();
    const int64_t n = gathered_, wanted = (int64_t)chosen_.size();
    std::copy(chosen_.begin(), chosen_.end(), selected_.begin());
    chosen_.clear(), gathered_ = 0;
    const int64_t outputs = wanted || !needs_output ? wanted : 1;
    if (outputs > wanted) selected_[0] = (int32_t)n - 1;  // logits for nobody
    Value logits = buffer(outputs, vocab), hidden = buffer(outputs, width);
    int64_t sizes[MAX_SIZES] = {};
    size_values(sizes, {n, outputs, (int64_t)table_rows_.size(), width_, capacity});
    const int64_t bytes = memcmp(sizes, last_sizes_, sizeof sizes) ? stemma_arena_bytes(handle, function, sizes) : last_bytes_;
    if (bytes < 0)
      fail("The kernels of the model '%s' refuse %lld rows in %lld slots.", name.c_str(), (long long)n, (long long)capacity);
    if (bytes > arena.bytes || !arena.data) arena = Pages::of(bytes + bytes / 4, "intermediate values");
    memcpy(last_sizes_, sizes, sizeof sizes);
    last_bytes_ = bytes;
    void* fixed[BUFFER_CODES] = {};
    fixed[TOKENS] = tokens_.data(), fixed[POSITIONS] = positions_.data(), fixed[ROW_SLOTS] = slots_.data(),
        fixed[SEQUENCE] = sequence_.data();
    fixed[TABLE] = table_.data, fixed[SELECTED] = selected_.data(), fixed[WEIGHTS] = weights_.data();
    fixed[LOGITS] = logits.storage->data, fixed[HIDDEN] = hidden.storage->data;
    pointers_.clear();
    size_t state = 0;
    for (const BufferSpec& b : buffers) pointers_.push_back(b.code == STATE_MEMORY ? states_[state++].data : fixed[b.code]);
    const int64_t started = now_nanoseconds();
    const int32_t status = stemma_call(handle, function, sizes, pointers_.data(), arena.data);
    const int64_t took = now_nanoseconds() - started;
    if (status)
      fail("The kernels of the model '%s' failed with the status %d on %lld rows.", name.c_str(), (int)status, (long long)n);
    ++calls, run_rows += n, run_outputs += outputs, seconds += (double)took * 1e-9;
    float& average = cost[(size_t)n];
    average = average ? 0.9f * average + 0.1e-9f * (float)took : 1e-9f * (float)took;
    for (const Part& part : running_) {
      finish(part, logits, hidden);
      part.request->batch = part.whole && outputs == n ? n : 0;
      part.request->seconds = (double)took * 1e-9;
    }
    return took;
  }

 private:
  struct Borrowed { uint64_t stamp = 0, last_use = 0; int32_t pins = 0; };
  struct Part { Request* request; int64_t rows, outputs_from; bool whole; };
  struct Buffer : Storage {  // memory of logits that goes back to its model
    Model* home;
    Buffer(Model* model, char* memory, int64_t n) : Storage(memory, n), home(model) { owned = true; }
    ~Buffer() override {
      home->spare_.emplace_back(data, bytes);
      owned = false;
      if (home->spare_.size() <= 8) return;
      free(home->spare_.front().first);
      home->spare_.erase(home->spare_.begin());
    }
  };

  static int64_t physical_memory() { return (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE); }
  void size_values(int64_t* out, std::initializer_list<int64_t> by_code) const {
    for (size_t i = 0; i < sizes.size(); ++i) out[i] = by_code.begin()[sizes[i]];
  }
  bool valid(int32_t code, int64_t value) const {  // whether the step takes this size
    int64_t by_code[SIZE_CODES] = {1, 1, 1, 1, 1}, given[MAX_SIZES] = {};
    by_code[code] = value;
    for (size_t i = 0; i < sizes.size(); ++i) given[i] = by_code[sizes[i]];
    return stemma_arena_bytes(handle, function, given) >= 0;
  }
  int64_t largest(int32_t code, int64_t wanted) const {
    int64_t low = 1, high = wanted;
    if (valid(code, wanted)) return wanted;
    while (low + 1 < high) (valid(code, (low + high) / 2) ? low : high) = (low + high) / 2;
    return low;
  }

  int32_t unused() {  // the first slot of a block of 16 that are free, so that neighbours stay free for its sequence; else any
    const size_t n = (size_t)((capacity + 15) / 16);
    for (size_t i = 0; i < n; ++i) {
      const size_t b = (cursor_ + i) % n;
      if (blocks_[b]) continue;
      cursor_ = b;
      return (int32_t)(b * 16);
    }
    for (size_t i = 0;; ++i) {
      const size_t b = (cursor_ + i) % n;
      if (blocks_[b] == 0xFFFF) continue;
      cursor_ = b;
      return (int32_t)(b * 16) + __builtin_ctz(~(uint32_t)blocks_[b]);
    }
  }
  bool grow(int64_t needed) {
    if (needed > limit) return false;
    int64_t wanted = std::max<int64_t>(capacity, std::min<int64_t>(256, limit));
    while (wanted < needed) wanted = std::min(wanted * 2, limit);
    size_t state = 0;
    for (const BufferSpec& b : buffers) {
      if (b.code != STATE_MEMORY) continue;
      Pages made = Pages::of(b.planes * wanted * b.row_bytes, "the cache");
      if (state == states_.size()) states_.emplace_back();
      for (int64_t p = 0; p < b.planes && capacity; ++p)
        memcpy(made.data + p * wanted * b.row_bytes, states_[state].data + p * capacity * b.row_bytes,
            (size_t)(capacity * b.row_bytes));
      states_[state++] = std::move(made);
    }
    capacity = wanted;
    uses_.resize((size_t)wanted);
    blocks_.resize((size_t)((wanted + 15) / 16));
    if (wanted % 16) blocks_.back() = (uint16_t)(blocks_.back() | 0xFFFFu << wanted % 16);
    return true;
  }
  bool valid(const TableRow& row) const { return row.row >= 0 && table_rows_[(size_t)row.row].stamp == row.stamp; }
  bool steal() {
    int32_t oldest = -1;
    for (int32_t r = 0; r < (int32_t)table_rows_.size(); ++r) {
      const Borrowed& b = table_rows_[(size_t)r];
      if (!b.pins && b.stamp && (oldest < 0 || b.last_use < table_rows_[(size_t)oldest].last_use)) oldest = r;
    }
    if (oldest < 0) return false;
    table_rows_[(size_t)oldest].stamp = 0;
    free_rows_.push_back(oldest);
    return true;
  }
  void widen() {
    const int64_t wanted = std::min(width_ * 2, context);
    if (wanted == width_) fail("a sequence exceeds the context");
    Pages made = Pages::of((int64_t)table_rows_.size() * wanted * 4, "the table of sequences");
    for (size_t r = 0; r < table_rows_.size(); ++r)
      if (table_rows_[r].stamp || table_rows_[r].pins)
        memcpy(made.data + (int64_t)r * wanted * 4, table_.data + (int64_t)r * width_ * 4, (size_t)width_ * 4);
    table_ = std::move(made);
    width_ = wanted;
  }
  Value buffer(int64_t n, int64_t each) {
    Value v;
    v.rank = 2, v.shape[0] = n, v.shape[1] = each;
    const int64_t bytes = v.bytes();
    if (bytes <= 4096) {
      v.storage = Ref<Storage>(new Storage(bytes));
      return v;
    }
    size_t best = spare_.size();
    for (size_t i = 0; i < spare_.size(); ++i)
      if (spare_[i].second >= bytes && (best == spare_.size() || spare_[i].second < spare_[best].second)) best = i;
    void* memory = nullptr;
    int64_t size = (bytes + 4095) / 4096 * 4096;
    if (best < spare_.size()) {
      memory = spare_[best].first, size = spare_[best].second;
      spare_.erase(spare_.begin() + (int64_t)best);
    } else if (posix_memalign(&memory, 4096, (size_t)size)) {
      fail("There is no memory for logits (%lld bytes).", (long long)bytes);
    }
    v.storage = Ref<Storage>(new Buffer(this, (char*)memory, size));
    return v;
  }
  // Gives a request its rows of the call: a view when they are together, else copies.
  void finish(const Part& part, const Value& logits, const Value& hidden) {
    Request& request = *part.request;
    const std::pair<Value*, const Value*> both[] = {{&request.logits, &logits}, {&request.hidden, &hidden}};
    for (const auto& [mine, all] : both) {
      const int64_t each = all->shape[1];
      if (part.whole) {
        *mine = *all;
        mine->shape[0] = request.outputs;
        mine->offset = part.outputs_from * each * 4;
        continue;
      }
      if (mine->empty()) *mine = buffer(request.outputs, each);
      int64_t from = part.outputs_from;
      for (int64_t i = request.done; i < request.done + part.rows; ++i)
        if (const int32_t output = request.rows[(size_t)i].output; output >= 0)
          memcpy(mine->f32() + output * each, all->f32() + from++ * each, (size_t)each * 4);
    }
    request.done += part.rows;
  }

  std::vector<Pages> states_;
  std::vector<int32_t> uses_;
  std::vector<uint16_t> blocks_;  // a bit per slot: used
  size_t cursor_ = 0;
  Pages table_;
  int64_t width_ = 0;
  std::vector<Borrowed> table_rows_;
  std::vector<int32_t> free_rows_;
  uint64_t stamps_ = 0, uses_of_rows_ = 0;
  std::vector<int32_t> tokens_, positions_, slots_, sequence_, selected_, chosen_;
  std::vector<float> weights_;
  std::vector<Part> parts_, running_;
  int64_t last_sizes_[MAX_SIZES] = {}, last_bytes_ = 0;
  int64_t gathered_ = 0;
  std::vector<void*> pointers_;
  std::vector<std::pair<char*, int64_t>> spare_;
};

}  // namespace stemma
