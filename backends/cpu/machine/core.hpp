// The decoding machine: values, operations, sequences, models. One machine runs any number of program instances together.
//
// glossary  block      a function or region of a program: instructions over registers, then the registers that it returns
//           instance   one run of a program; it advances until it needs a model, then waits for the batch that serves all
//           value      a tensor or a state; values share storage, and an operation that changes one copies it first unless it holds
//                      the only reference (`own`), so that programs keep the meaning of pure functions
//           slot       one position of a model's caches; a sequence is a row of a table that maps positions to slots
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <new>
#include <string>
#include <typeinfo>
#include <unordered_map>
#include <utility>
#include <vector>

namespace stemma {

// What goes wrong while a program runs: ends the instance with this message, never the process.
struct Error {
  std::string text;
};
[[noreturn]] inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error{text};
}

// ---- values ----
struct Object {
  int32_t references = 0;
  Object() {}
  Object(const Object&) {}  // a copy begins without references
  Object& operator=(const Object&) { return *this; }
  virtual ~Object() {}
  virtual Object* clone() const { fail("this state cannot be copied"); }
};
template <class T> struct Ref {
  T* p = nullptr;
  Ref() {}
  Ref(T* q) : p(q) { if (p) ++p->references; }
  Ref(const Ref& o) : Ref(o.p) {}
  Ref(Ref&& o) noexcept : p(o.p) { o.p = nullptr; }
  Ref& operator=(const Ref& o) { return *this = Ref(o); }
  Ref& operator=(Ref&& o) noexcept {
    T* const taken = o.p;
    o.p = nullptr;
    T* const old = p;
    p = taken;
    if (old) drop(old);
    return *this;
  }
  ~Ref() { if (p) drop(p); }
  T* operator->() const { return p; }
  T& operator*() const { return *p; }
  explicit operator bool() const { return p; }

 private:
  static void drop(T* q) { if (--q->references == 0) destroy(q); }
  [[gnu::noinline]] static void destroy(T* q) { delete q; }
};

enum DType : int32_t { F32 = 0, I32 = 1, I64 = 2, BOOL = 3, STATE = 4 };
inline int64_t item_bytes(DType t) { return t == I64 ? 8 : t == BOOL ? 1 : 4; }

struct Storage : Object {  // 64-byte aligned memory of tensors; small ones need no allocation of their own
  char* data;
  int64_t bytes;
  bool owned;  // false: memory of somebody else, which may be read only and outlives this
  explicit Storage(int64_t n) : bytes(n), owned(true) {
    if (n < 0 || n > (int64_t)1 << 40) fail("a tensor of %lld bytes is too large", (long long)n);
    data = small;
    if (n <= (int64_t)sizeof small) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, (size_t)(n + 63) / 64 * 64)) fail("there is no memory for %lld bytes", (long long)n);
    data = (char*)memory;
  }
  Storage(char* foreign, int64_t n) : data(foreign), bytes(n), owned(false) {}
  ~Storage() override { if (owned && data != small) free(data); }
  static void* operator new(size_t size) {
    if (size == sizeof(Storage) && spare) {
      void* memory = spare;
      spare = *(void**)memory;
      return memory;
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max(size, sizeof(Storage)))) throw std::bad_alloc();
    return memory;
  }
  static void operator delete(void* memory) {  // a list of spare objects, at most as long as there were tensors at one time
    *(void**)memory = spare;
    spare = memory;
  }

 private:
  static inline thread_local void* spare = nullptr;
  alignas(64) char small[64];
};

constexpr int MAX_RANK = 4;
struct Value {
  DType dtype = F32;
  int32_t rank = 0;
  int64_t shape[MAX_RANK] = {};
  Ref<Storage> storage;  // tensors: contiguous, row-major, from byte `offset` on
  int64_t offset = 0;
  Ref<Object> state;     // states

  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i)
      if (shape[i] < 0 || __builtin_mul_overflow(n, shape[i], &n) || n > (int64_t)1 << 40) fail("a tensor has a wrong size");
    return n;
  }
  int64_t bytes() const { return elements() * item_bytes(dtype); }
  template <class T> T* data() const {
    if (!storage) fail("the program is damaged: a value is missing");
    return (T*)(storage->data + offset);
  }
  void expect(DType t) const { if (dtype != t) fail("the program is damaged: a value has the wrong type"); }
  float* f32() const { return expect(F32), data<float>(); }
  int32_t* i32() const { return expect(I32), data<int32_t>(); }
  int64_t* i64() const { return expect(I64), data<int64_t>(); }
  uint8_t* flags() const { return expect(BOOL), data<uint8_t>(); }
  bool empty() const { return !storage && !state; }
  void clear() {
    if (storage) storage = Ref<Storage>();
    if (state) state = Ref<Object>();
  }
};
inline Value tensor(DType dtype, std::initializer_list<int64_t> shape) {
  Value v;
  v.dtype = dtype;
  for (int64_t s : shape) v.shape[v.rank++] = s;
  v.storage = Ref<Storage>(new Storage(v.bytes()));
  return v;
}
inline Value tensor_like(DType dtype, const Value& shape_of) {
  Value v;
  v.dtype = dtype;
  v.rank = shape_of.rank;
  memcpy(v.shape, shape_of.shape, sizeof v.shape);
  v.storage = Ref<Storage>(new Storage(v.bytes()));
  return v;
}
inline Value state_value(Object* object) {
  Value v;
  v.dtype = STATE;
  v.state = Ref<Object>(object);
  return v;
}
template <class T> T& state_of(const Value& v) {  // types were checked by the compiler; this is for damaged programs
  if (!v.state || typeid(*v.state.p) != typeid(T)) fail("the program is damaged: a state has the wrong type");
  return *(T*)v.state.p;
}
// The state to change in place: copied first when something else refers to it.
template <class T> T& own(Value& v) {
  T& state = state_of<T>(v);
  if (state.references == 1) return state;
  v.state = Ref<Object>(state.clone());
  return *(T*)v.state.p;
}
// A tensor to change in place: copied first when shared.
inline Value& own_tensor(Value& v) {
  const char* data = v.data<char>();
  if (v.storage->references > 1 || !v.storage->owned) {
    Ref<Storage> copy(new Storage(v.bytes()));
    memcpy(copy->data, data, (size_t)v.bytes());
    v.storage = copy;
    v.offset = 0;
  }
  return v;
}

// ---- programs ----
struct Attribute {  // one attribute of an operation
  enum Kind : int32_t { NONE, INT, FLOAT, TEXT, LIST, REGION, TYPE, SIZE } kind = NONE;
  // INT (also bool); REGION: the block; TEXT: the string's number; TYPE: the dtype
  int64_t integer = 0;
  double number = 0;                                // FLOAT
  std::vector<Attribute> items;                     // LIST; TYPE: the sizes (INT or SIZE)
  std::vector<std::pair<int32_t, int64_t>> postfix;  // SIZE: (operation, value)
};
struct Machine;
struct Instance;
struct Call;
using Operation = bool (*)(Call&);  // false: the instance waits, and the operation is called again when what it waits for is there
struct OperationEntry {  // each header of operations lists its own in an array of these, which machine.cpp collects
  const char* name;
  Operation operation;
  int32_t inputs = -1, outputs = -1, attributes = -1;  // exact numbers that a program must give; -1: any
};
struct StateEntry {  // how an empty state of a kind is made (what persistent parameters begin with); `arguments`: those of its type
  const char* kind;
  Object* (*make)(const std::vector<int64_t>& arguments);
};
// from the tables of StateEntry; fails if unknown
Object* make_state(const std::string& kind, const std::vector<int64_t>& arguments);

struct Instruction {
  enum Kind : int32_t { PLAIN, LOOP, COND, PLAN } kind = PLAIN;
  Operation operation = nullptr;
  int32_t name = 0;                      // the operation's name among the strings, for messages
  std::vector<int32_t> inputs, outputs;  // registers; an input of -1 - r is the last use of register r: its value is moved out
  std::vector<Attribute> attributes;     // in the order in which the operation declares them
};
struct Block {
  int32_t registers = 0;
  std::vector<int32_t> parameters, results;
  std::vector<std::pair<int32_t, Value>> constants;  // registers that are set when the block is entered
  std::vector<bool> last;                            // of each result: whether its register may be moved out
  // constants that are set again before each turn, as the code changes their registers
  std::vector<int32_t> restored;
  std::vector<Instruction> code;
};

// What an operation sees: its inputs (which it may take over), its outputs (empty; a result that nobody wants has the output
// register -1), its attributes. A missing input is an empty value, and reading one fails; so does a missing attribute.
struct Call {
  Machine& machine;
  Instance& instance;
  const Instruction& code;
  Value* in;
  Value* out;
  int64_t count() const { return (int64_t)code.inputs.size(); }
  bool wanted(int i) const { return i < (int)code.outputs.size() && code.outputs[(size_t)i] >= 0; }
  const Attribute& attribute(int i) const {
    if (i >= (int)code.attributes.size()) fail("the program is damaged: an attribute is missing");
    return code.attributes[(size_t)i];
  }
  bool has(int i) const { return attribute(i).kind != Attribute::NONE; }
  int64_t integer(int i) const { return attribute(i).integer; }
  double number(int i) const { return attribute(i).kind == Attribute::INT ? (double)attribute(i).integer : attribute(i).number; }
  const std::string& text(int i) const;  // of a TEXT attribute
  int64_t size(int i) const;             // of an INT or SIZE attribute
  std::vector<int64_t> list(int i) const;  // of a LIST of INT or SIZE
};

// ---- trees ----
struct Tree : Object {
  int64_t size = 1, limit = 1;
  // source: the drafter that gave it first; agreed: how many others gave it too; rank: place among the siblings of one source;
  // depth of the root: 0; order: its number in the tree of that drafter alone
  std::vector<int32_t> tokens, parents, sources, agreed, ranks, depths, orders;
  std::vector<float> scores;
  Object* clone() const override { return new Tree(*this); }
  int64_t count() const { return (int64_t)tokens.size(); }
  void reserve(int64_t nodes) {  // once, as trees are made and grown in every turn
    for (auto* column : {&tokens, &parents, &sources, &agreed, &ranks, &depths, &orders}) column->reserve((size_t)nodes);
    scores.reserve((size_t)nodes);
  }
  int32_t child(int32_t parent, int32_t token) const {
    for (int32_t i = parent + 1; i < (int32_t)tokens.size(); ++i)
      if (parents[(size_t)i] == parent && tokens[(size_t)i] == token) return i;
    return -1;
  }
  // The number of the node; -1: no room, or no such parent. order -1: the tree is that of its drafter alone.
  int32_t add(int32_t parent, int32_t token, float score, int32_t source, int32_t order = -1) {
    if (token < 0 || parent < 0 || parent >= count()) return -1;
    if (int32_t known = child(parent, token); known >= 0) {
      agreed[(size_t)known] += sources[(size_t)known] != source;
      return known;
    }
    if (count() >= std::min(limit, size)) return -1;
    int32_t rank = 0;
    for (int32_t i = parent + 1; i < (int32_t)count(); ++i) rank += parents[(size_t)i] == parent && sources[(size_t)i] == source;
    orders.push_back(order < 0 ? (int32_t)count() : order);
    tokens.push_back(token), parents.push_back(parent), scores.push_back(score), sources.push_back(source);
    agreed.push_back(0), ranks.push_back(rank), depths.push_back(depths[(size_t)parent] + 1);
    return (int32_t)count() - 1;
  }
  void copy(const Tree& from, size_t node, int32_t parent) {  // a node of another tree, under a parent of this one
    tokens.push_back(from.tokens[node]), parents.push_back(parent), scores.push_back(from.scores[node]);
    sources.push_back(from.sources[node]), agreed.push_back(from.agreed[node]);
    ranks.push_back(from.ranks[node]), depths.push_back(from.depths[node]), orders.push_back(from.orders[node]);
  }
};

// ---- sequences ----
struct Model;
struct TableRow {                // a row of a model's table, borrowed: another sequence may have taken it since (stamp)
  int32_t row = -1;
  uint64_t stamp = 0;
  int64_t copied = 0;            // its first entries, which are those of the sequence's slots
};
struct Sequence {                // one token sequence
  std::vector<int32_t> tokens;   // all tokens, those not yet in the cache included; -1: a mixed token, which is in the cache
  std::vector<int32_t> slots;    // of its first positions; each is counted as used once by this sequence
  int64_t cached = 0;            // positions that the model has run (at most slots.size())
  TableRow row;
};
struct Sequences : Object {      // State["sequences", ...]
  Model* model = nullptr;
  std::vector<Sequence> each;
  // A tree being drafted or followed (count 1).
  Ref<Tree> tree;
  int64_t ran = 0;                              // nodes that `expand` dealt with
  std::vector<int32_t> node_slots;              // of each such node; -1: it was not run, as it lies beyond the context
  std::vector<Value> node_logits, node_hidden;  // of each such node: views f32[vocab], f32[width]
  std::vector<int32_t> visited;                 // nodes followed, root first; `each[0].tokens` includes their tokens
  int64_t expand_rows = 0, expand_batch = 0;    // of the last `expand` or `step` in one call: its rows, the call's; 0: not known
  double expand_seconds = 0;                    // of that call
  std::vector<TableRow> tree_rows;              // table rows of the paths to the tree's second, third, ... leaf
  Sequences() {}
  Sequences(const Sequences&);                  // shares every slot
  Object* clone() const override { return new Sequences(*this); }
  ~Sequences() override;                        // releases slots and rows
  int32_t child(int32_t token) const {          // the node with that token after the path followed so far, when it was run; else -1
    const int32_t node = tree ? tree->child(visited.empty() ? -1 : visited.back(), token) : -1;
    return node >= 0 && node < ran && node_slots[(size_t)node] >= 0 ? node : -1;
  }
};

// ---- output ----
struct Output : Object {  // State["output"]: the tokens live in the instance, in the order in which they were emitted
  int64_t count = 0;
  Object* clone() const override { return new Output(*this); }
};

inline int64_t now_nanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
}  // namespace stemma
