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
#include <string>
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
  virtual ~Object() {}
  virtual Object* clone() const { fail("this state cannot be copied"); }
};
template <class T> struct Ref {
  T* p = nullptr;
  Ref() {}
  Ref(T* q) : p(q) { if (p) ++p->references; }
  Ref(const Ref& o) : Ref(o.p) {}
  Ref(Ref&& o) noexcept : p(o.p) { o.p = nullptr; }
  Ref& operator=(Ref o) noexcept { std::swap(p, o.p); return *this; }
  ~Ref() { if (p && --p->references == 0) delete p; }
  T* operator->() const { return p; }
  T& operator*() const { return *p; }
  explicit operator bool() const { return p; }
};

enum DType : int32_t { F32 = 0, I32 = 1, I64 = 2, BOOL = 3, STATE = 4 };
inline int64_t item_bytes(DType t) { return t == I64 ? 8 : t == BOOL ? 1 : 4; }

struct Storage : Object {  // 64-byte aligned memory of tensors, or foreign memory that `keeper` keeps alive
  char* data;
  int64_t bytes;
  bool owned;
  explicit Storage(int64_t n) : bytes(n), owned(true) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, (size_t)(n ? (n + 63) / 64 * 64 : 64))) fail("there is no memory for %lld bytes", (long long)n);
    data = (char*)memory;
  }
  Storage(char* foreign, int64_t n) : data(foreign), bytes(n), owned(false) {}
  ~Storage() override { if (owned) free(data); }
};

constexpr int MAX_RANK = 4;
struct Value {
  DType dtype = F32;
  int32_t rank = 0;
  int64_t shape[MAX_RANK] = {};
  Ref<Storage> storage;  // tensors: contiguous, row-major, from byte `offset` on
  int64_t offset = 0;
  Ref<Object> state;     // states

  int64_t elements() const { int64_t n = 1; for (int i = 0; i < rank; ++i) n *= shape[i]; return n; }
  int64_t bytes() const { return elements() * item_bytes(dtype); }
  template <class T> T* data() const { return (T*)(storage->data + offset); }
  float* f32() const { return data<float>(); }
  int32_t* i32() const { return data<int32_t>(); }
  int64_t* i64() const { return data<int64_t>(); }
  uint8_t* flags() const { return data<uint8_t>(); }
  bool empty() const { return !storage && !state; }
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
template <class T> T& state_of(const Value& v) { return *(T*)v.state.p; }  // types were checked by the compiler
// The state to change in place: copied first when something else refers to it.
template <class T> T& own(Value& v) {
  if (v.state->references > 1) v.state = Ref<Object>(v.state->clone());
  return *(T*)v.state.p;
}
// A tensor to change in place: copied first when shared.
inline Value& own_tensor(Value& v) {
  if (v.storage->references > 1 || !v.storage->owned) {
    Ref<Storage> copy(new Storage(v.bytes()));
    memcpy(copy->data, v.storage->data + v.offset, (size_t)v.bytes());
    v.storage = copy;
    v.offset = 0;
  }
  return v;
}

// ---- programs ----
struct Attribute {  // one attribute of an operation
  enum Kind : int32_t { NONE, INT, FLOAT, TEXT, LIST, REGION, TYPE, SIZE } kind = NONE;
  int64_t integer = 0;           // INT (also bool); REGION: the block; TEXT: the string's number
  double number = 0;             // FLOAT
  std::vector<Attribute> items;  // LIST; TYPE: dtype, then the sizes; SIZE: postfix tokens (Machine::size evaluates them)
};
struct Machine;
struct Instance;
struct Call;
using Operation = bool (*)(Call&);  // false: the instance waits, and the operation is called again when what it waits for is there
struct Instruction {
  Operation operation = nullptr;
  int32_t name = 0;                      // the operation's name among the strings, for messages
  std::vector<int32_t> inputs, outputs;  // registers; an input of -1 - r is the last use of register r: its value is moved out
  std::vector<Attribute> attributes;     // in the order in which the operation declares them
};
struct Block {
  int32_t registers = 0;
  std::vector<int32_t> parameters, results;
  std::vector<std::pair<int32_t, Value>> constants;  // registers that are set when the block is entered
  std::vector<Instruction> code;
};

// What an operation sees: its inputs (which it may take over), its outputs, its attributes.
struct Call {
  Machine& machine;
  Instance& instance;
  const Instruction& code;
  Value* in;
  Value* out;
  int64_t integer(int i) const { return code.attributes[(size_t)i].integer; }
  double number(int i) const { return code.attributes[(size_t)i].number; }
  const std::string& text(int i) const;  // of a TEXT attribute
  int64_t size(int i) const;             // of an INT or SIZE attribute
  std::vector<int64_t> list(int i) const;  // of a LIST of INT or SIZE
};

// ---- trees ----
struct Tree : Object {
  int64_t size = 1, limit = 1;
  std::vector<int32_t> tokens, parents, sources, ranks, depths;  // rank: place among the siblings of one source; depth of the root: 0
  std::vector<float> scores;
  Object* clone() const override { Tree* t = new Tree(*this); t->references = 0; return t; }
  int64_t count() const { return (int64_t)tokens.size(); }
  int32_t child(int32_t parent, int32_t token) const {
    for (int32_t i = parent + 1; i < (int32_t)tokens.size(); ++i)
      if (parents[(size_t)i] == parent && tokens[(size_t)i] == token) return i;
    return -1;
  }
  int32_t add(int32_t parent, int32_t token, float score, int32_t source) {  // -1: no room, or no such parent
    if (token < 0 || parent < 0 || parent >= count()) return -1;
    if (int32_t known = child(parent, token); known >= 0) return known;
    if (count() >= std::min(limit, size)) return -1;
    int32_t rank = 0;
    for (int32_t i = parent + 1; i < (int32_t)count(); ++i) rank += parents[(size_t)i] == parent && sources[(size_t)i] == source;
    tokens.push_back(token), parents.push_back(parent), scores.push_back(score), sources.push_back(source);
    ranks.push_back(rank), depths.push_back(depths[(size_t)parent] + 1);
    return (int32_t)count() - 1;
  }
};

// ---- sequences ----
struct Model;
struct Sequence {                // one token sequence; its cached positions are 0 .. cached - 1
  std::vector<int32_t> tokens;   // all tokens, those not yet in the cache included
  int64_t cached = 0;
  int32_t row = -1;              // row of the model's table that holds its slots
};
struct Sequences : Object {      // State["sequences", ...]
  Model* model = nullptr;
  std::vector<Sequence> each;
  // A tree being drafted or followed (count 1). Node i's slot, its row of logits (and hidden state), whether it was run.
  Ref<Tree> tree;
  int64_t ran = 0;
  std::vector<int32_t> node_slots, node_rows;
  std::vector<Value> node_logits, node_hidden;  // views f32[vocab], f32[width]
  std::vector<int32_t> visited;                 // nodes followed, root first; `each[0].tokens` includes their tokens
  Object* clone() const override;               // forks: shares every slot
  ~Sequences() override;                        // releases slots and rows
};

// ---- output ----
struct Output : Object {  // State["output"]: the tokens live in the instance, in the order in which they were emitted
  int64_t count = 0;
  Object* clone() const override { Output* o = new Output(*this); o->references = 0; return o; }
};

int64_t now_nanoseconds();
}  // namespace stemma
