// Reads a blob of programs (written by codegen/program.py). A damaged blob is an Error, whatever is damaged.
//
// All words are int64, little endian. "str" is the number of a string.
//   blob        MAGIC, VERSION | crc32 of the words after the third << 32 (0: none), total words, strings, models, functions,
//   programs
//   strings     n, (bytes, ceil(bytes / 8) words of text)*
//   models      n, (str name, function, vocab, width, mix, context, max rows, n sizes, code*, n buffers, (code, planes, row
//   bytes)*,
//               n eos, token*)*        codes: SizeCode and BufferCode below
//   functions   n, (str name, function, n sizes, n inputs, tensor*, n results, tensor*)*
//               tensor = dtype, rank, (0 constant | 1 size, value)*
//   programs    n, (str name, n dims, str*, n params, param*, n results, str*, block, n blocks, block*)*
//   param       str name, dtype, rank, (0 constant | 1 dim, value)*, str kind of state | -1, n args, (0 int | 1 str, value)*,
//               default (0 | 1 int | 2 double bits), result that keeps its value | -1
//   block       registers, n params, register*, n results, register*, n constants, constant*, n instructions, instruction*
//   constant    register, dtype, rank (0 | 1), n, word*
//   instruction str operation, n inputs, register*, n outputs, register*, n attributes, attribute*
//   attribute   0 | 1 int | 2 double bits | 3 str | 4 n attribute* | 5 block | 6 dtype n attribute* | 7 n (operation, value)*
#pragma once
#include "core.hpp"

namespace stemma {

enum SizeCode : int32_t { ROWS, OUTPUTS, SEQUENCES, CONTEXT, SLOTS, SIZE_CODES };
enum BufferCode : int32_t { TOKENS, POSITIONS, ROW_SLOTS, SEQUENCE, TABLE, SELECTED, STATE_MEMORY, LOGITS, HIDDEN, WEIGHTS,
    BUFFER_CODES };
struct BufferSpec {
  int32_t code;
  int64_t planes, row_bytes;  // of STATE_MEMORY: [planes, slots, row bytes]
};
struct ModelSpec {
  std::string name;
  int32_t function = 0;
  int64_t vocab = 0, width = 0, mix = 1, context = 0, rows = 0;
  std::vector<int32_t> sizes;
  std::vector<BufferSpec> buffers;
  std::vector<int32_t> eos;
};
struct TensorSpec {
  DType dtype = F32;
  std::vector<std::pair<bool, int64_t>> shape;  // (is the number of a size or dimension, value)
};
struct FunctionSpec {
  std::string name;
  int32_t function = 0;
  int64_t sizes = 0;
  std::vector<TensorSpec> inputs, results;
};
struct Parameter {
  std::string name;
  TensorSpec type;
  std::string kind;                // of a state
  std::vector<int64_t> arguments;  // its integer arguments; a string counts as 0
  int32_t given = 0;               // default: 0 none, 1 `integer`, 2 `number`
  int64_t integer = 0;
  double number = 0;
  int32_t kept = -1;  // the result that is its value in the next run
};
struct Program {
  std::string name;
  std::vector<std::string> dims, results;
  std::vector<Parameter> parameters;
  Block main;
  std::vector<Block> blocks;
};
struct Blob {
  std::vector<std::string> strings;
  std::vector<ModelSpec> models;
  std::vector<FunctionSpec> functions;
  std::vector<Program> programs;
};
constexpr int64_t BLOB_MAGIC = 0x3147504153544D53, BLOB_VERSION = 1, MAX_SIZES = 64;

class BlobReader {
 public:
  using Find = const OperationEntry* (*)(const std::string& name);
  // find: the operation of a name, or null
  BlobReader(const void* data, int64_t bytes, Find find) : find_(find), bytes_((const char*)data), words_(bytes / 8) {
    if (bytes < 24 || bytes % 8) damaged("its length is wrong");
  }
  Blob read() {
    if (word() != BLOB_MAGIC) damaged("it is no blob of programs");
    const int64_t version = word();
    if ((version & 0xFFFFFFFF) != BLOB_VERSION)
      fail("The programs have the format %lld, this library reads %lld: update Stemma.", (long long)(version & 0xFFFFFFFF),
          (long long)BLOB_VERSION);
    if (word() != words_) damaged("it is cut off");
    if (const uint32_t expected = (uint32_t)((uint64_t)version >> 32); expected && crc32() != expected)
      damaged("its checksum is wrong");
    Blob blob;
    for (int64_t n = count(1); n > 0; --n) blob.strings.push_back(bytes());
    blob_ = &blob;
    for (int64_t n = count(11); n > 0; --n) blob.models.push_back(model());
    for (int64_t n = count(5); n > 0; --n) blob.functions.push_back(function());
    for (int64_t n = count(10); n > 0; --n) blob.programs.push_back(program());
    if (at_ != words_) damaged("something follows the last program");
    return blob;
  }

 private:
  [[noreturn]] static void damaged(const char* what) { fail("The programs of this artifact are damaged: %s.", what); }
  uint32_t crc32() const {  // as zlib's
    uint32_t table[256], crc = 0xFFFFFFFF;
    for (uint32_t i = 0; i < 256; ++i) {
      table[i] = i;
      for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320 : 0);
    }
    for (int64_t i = 24; i < words_ * 8; ++i) crc = crc >> 8 ^ table[(crc ^ (uint8_t)bytes_[i]) & 255];
    return ~crc;
  }
  int64_t word() {
    if (at_ >= words_) damaged("it ends too early");
    int64_t value;
    memcpy(&value, bytes_ + at_++ * 8, 8);
    return value;
  }
  int64_t word(int64_t low, int64_t high, const char* what) {
    const int64_t value = word();
    if (value < low || value > high) damaged(what);
    return value;
  }
  int64_t count(int64_t each) { return word(0, (words_ - at_) / each, "a number of entries is wrong"); }
  double number() {
    const int64_t bits = word();
    double value;
    memcpy(&value, &bits, 8);
    return value;
  }
  std::string bytes() {
    const int64_t n = word(0, (words_ - at_) * 8, "a text is too long");
    std::string text(bytes_ + at_ * 8, (size_t)n);
    at_ += (n + 7) / 8;
    return text;
  }
  int32_t text_number() { return (int32_t)word(0, (int64_t)blob_->strings.size() - 1, "the number of a text is wrong"); }
  const std::string& text() { return blob_->strings[(size_t)text_number()]; }

  ModelSpec model() {
    ModelSpec m;
    m.name = text();
    m.function = (int32_t)word(0, 1 << 20, "the number of a function is wrong");
    m.vocab = word(1, 1 << 30, "a vocabulary is wrong");
    m.width = word(0, 1 << 24, "a width is wrong");
    m.mix = word(1, 1 << 10, "a number of mixed tokens is wrong");
    m.context = word(1, 1 << 30, "a context is wrong");
    m.rows = word(1, 1 << 20, "a number of rows is wrong");
    int64_t n = word(0, MAX_SIZES, "a model has too many sizes");
    while (n-- > 0) m.sizes.push_back((int32_t)word(0, SIZE_CODES - 1, "the code of a size is wrong"));
    bool seen[BUFFER_CODES] = {};
    for (n = count(3); n > 0; --n) {
      BufferSpec b;
      b.code = (int32_t)word(0, BUFFER_CODES - 1, "the code of a buffer is wrong");
      const bool state = b.code == STATE_MEMORY;
      b.planes = word(state, state ? 1 << 24 : INT64_MAX, "the planes of a state are wrong");
      b.row_bytes = word(state, state ? 1 << 24 : INT64_MAX, "the rows of a state are wrong");
      seen[b.code] = true;
      m.buffers.push_back(b);
    }
    if (!seen[LOGITS] || !seen[TOKENS] || (m.mix > 1) != seen[WEIGHTS] || (m.width > 0) != seen[HIDDEN])
      damaged("a model lacks a buffer");
    for (n = count(1); n > 0; --n) m.eos.push_back((int32_t)word());
    return m;
  }
  TensorSpec tensor_spec(int64_t names, bool states) {
    TensorSpec t;
    t.dtype = (DType)word(F32, states ? STATE : BOOL, "an element type is wrong");
    for (int64_t rank = word(0, t.dtype == STATE ? 0 : MAX_RANK, "a rank is wrong"); rank > 0; --rank) {
      const bool named = word(0, 1, "a size is wrong");
      t.shape.emplace_back(named, word(0, named ? names - 1 : (int64_t)1 << 40, "a size is wrong"));
    }
    return t;
  }
  FunctionSpec function() {
    FunctionSpec f;
    f.name = text();
    f.function = (int32_t)word(0, 1 << 20, "the number of a function is wrong");
    f.sizes = word(0, MAX_SIZES, "a function has too many sizes");
    for (int64_t n = count(2); n > 0; --n) f.inputs.push_back(tensor_spec(f.sizes, false));
    for (int64_t n = count(2); n > 0; --n) f.results.push_back(tensor_spec(f.sizes, false));
    return f;
  }

  Program program() {
    Program p;
    p.name = text();
    for (int64_t n = count(1); n > 0; --n) p.dims.push_back(text());
    for (int64_t n = count(7); n > 0; --n) p.parameters.push_back(parameter((int64_t)p.dims.size()));
    for (int64_t n = count(1); n > 0; --n) p.results.push_back(text());
    dims_ = (int64_t)p.dims.size();
    regions_ = 0;
    p.main = block();
    for (int64_t n = count(5); n > 0; --n) p.blocks.push_back(block());
    if (regions_ > (int64_t)p.blocks.size()) damaged("a block is missing");
    if (p.main.parameters.size() != p.parameters.size() || p.main.results.size() != p.results.size())
      damaged("a program's block is another one's");
    for (const Parameter& parameter : p.parameters)
      if (parameter.kept >= (int64_t)p.results.size()) damaged("a result that is kept is missing");
    check(p, p.main);
    for (const Block& b : p.blocks) check(p, b);
    return p;
  }
  Parameter parameter(int64_t dims) {
    Parameter p;
    p.name = text();
    p.type = tensor_spec(dims, true);
    const int64_t kind = word(-1, (int64_t)blob_->strings.size() - 1, "the kind of a state is wrong");
    if ((kind >= 0) != (p.type.dtype == STATE)) damaged("a parameter's type is wrong");
    if (kind >= 0) p.kind = blob_->strings[(size_t)kind];
    for (int64_t n = count(2); n > 0; --n) {
      const bool named = word(0, 1, "an argument of a state is wrong");
      const int64_t value = named ? text_number() : word();
      p.arguments.push_back(named ? 0 : value);
    }
    p.given = (int32_t)word(0, 2, "a default is wrong");
    if (p.given == 1) p.integer = word();
    if (p.given == 2) p.number = number();
    p.kept = (int32_t)word(-1, INT32_MAX, "a result that is kept is wrong");
    return p;
  }

  int32_t register_number(int64_t registers) { return (int32_t)word(0, registers - 1, "the number of a register is wrong"); }
  Block block() {
    Block b;
    const int64_t registers = word(0, 1 << 20, "a number of registers is wrong");
    b.registers = (int32_t)registers;
    std::vector<bool> constant((size_t)registers), restored((size_t)registers);
    for (int64_t n = count(1); n > 0; --n) b.parameters.push_back(register_number(registers));
    for (int64_t n = count(1); n > 0; --n) b.results.push_back(register_number(registers));
    for (int64_t n = count(4); n > 0; --n) {
      const int32_t r = register_number(registers);
      b.constants.emplace_back(r, constant_value());
      constant[(size_t)r] = true;
    }
    for (int64_t n = count(4); n > 0; --n) b.code.push_back(instruction(registers));
    for (const Instruction& i : b.code) {
      for (int32_t r : i.inputs) if (r < 0) restored[(size_t)(-1 - r)] = true;
      for (int32_t r : i.outputs) if (r >= 0) restored[(size_t)r] = true;
    }
    for (int32_t r : b.parameters) restored[(size_t)r] = true;
    for (size_t i = 0; i < b.constants.size(); ++i)
      if (restored[(size_t)b.constants[i].first]) b.restored.push_back((int32_t)i);
    for (size_t i = 0; i < b.results.size(); ++i)
      b.last.push_back(!constant[(size_t)b.results[i]] && std::find(b.results.begin() + (int64_t)i + 1, b.results.end(),
          b.results[i]) == b.results.end());
    return b;
  }
  Value constant_value() {
    Value v;
    v.dtype = (DType)word(F32, BOOL, "an element type is wrong");
    v.rank = (int32_t)word(0, 1, "a constant has too many axes");
    const int64_t n = count(1);
    if (v.rank) v.shape[0] = n;
    if (!v.rank && n != 1) damaged("a constant has too many elements");
    v.storage = Ref<Storage>(new Storage(v.bytes()));
    for (int64_t i = 0; i < n; ++i) {
      switch (v.dtype) {
        case F32: v.f32()[i] = (float)number(); break;
        case I32: v.i32()[i] = (int32_t)word(); break;
        case I64: v.i64()[i] = word(); break;
        default: v.flags()[i] = word() != 0;
      }
    }
    return v;
  }
  Instruction instruction(int64_t registers) {
    Instruction code;
    code.name = text_number();
    const std::string& name = blob_->strings[(size_t)code.name];
    for (int64_t n = count(1); n > 0; --n)
      code.inputs.push_back((int32_t)word(-registers, registers - 1, "the number of a register is wrong"));
    for (int64_t n = count(1); n > 0; --n)
      code.outputs.push_back((int32_t)word(-1, registers - 1, "the number of a register is wrong"));
    for (int64_t n = count(1); n > 0; --n) code.attributes.push_back(attribute(0));
    if (name == "loop" || name == "cond") {
      code.kind = name == "loop" ? Instruction::LOOP : Instruction::COND;
      return code;
    }
    const OperationEntry* entry = find_(name);
    if (!entry)
      fail("The programs use the operation '%s', which this library lacks: update Stemma and compile again.", name.substr(0,
          64).c_str());
    const auto fits = [](int32_t wanted, size_t given) { return wanted < 0 || (size_t)wanted == given; };
    if (!fits(entry->inputs, code.inputs.size()) || !fits(entry->outputs, code.outputs.size()) || !fits(entry->attributes,
        code.attributes.size()))
      fail("The programs of this artifact are damaged: '%s' has a wrong number of inputs, results or attributes.", name.c_str());
    code.operation = entry->operation;
    code.kind = name == "plan" ? Instruction::PLAN : Instruction::PLAIN;
    return code;
  }
  Attribute attribute(int depth) {
    Attribute a;
    if (depth > 8) damaged("an attribute is nested too deeply");
    a.kind = (Attribute::Kind)word(Attribute::NONE, Attribute::SIZE, "the kind of an attribute is wrong");
    switch (a.kind) {
      case Attribute::NONE: break;
      case Attribute::INT: a.integer = word(); break;
      case Attribute::FLOAT: a.number = number(); break;
      case Attribute::TEXT: a.integer = text_number(); break;
      case Attribute::REGION:
        a.integer = word(0, INT32_MAX - 1, "the number of a block is wrong");
        regions_ = std::max(regions_, a.integer + 1);
        break;
      case Attribute::TYPE: a.integer = word(F32, BOOL, "an element type is wrong"); [[fallthrough]];
      case Attribute::LIST:
        for (int64_t n = count(1); n > 0; --n) a.items.push_back(attribute(depth + 1));
        break;
      case Attribute::SIZE: {
        int64_t height = 0;
        for (int64_t n = count(2); n > 0; --n) {
          const int32_t operation = (int32_t)word(0, 6, "an operation of a size is wrong");
          const int64_t value = operation == 1 ? word(0, dims_ - 1, "a size names no dimension") : word();
          height += operation < 2 ? 1 : -1;
          if (height < 1) damaged("a size is incomplete");
          a.postfix.emplace_back(operation, value);
        }
        if (height != 1) damaged("a size is incomplete");
      }
    }
    return a;
  }
  // Regions take and return what the instructions that run them give and expect.
  static void check(const Program& p, const Block& block) {
    for (const Instruction& i : block.code) {
      const bool loop = i.kind == Instruction::LOOP;
      if (!loop && i.kind != Instruction::COND) continue;
      if (i.attributes.size() != (loop ? 1u : 2u) || (!loop && i.inputs.empty())) damaged("a loop or condition is incomplete");
      for (const Attribute& a : i.attributes) {
        if (a.kind != Attribute::REGION) damaged("a loop or condition has no block");
        const Block& b = p.blocks[(size_t)a.integer];
        const size_t given = i.inputs.size() - (loop ? 0 : 1), returned = i.outputs.size() + (loop ? 1 : 0);
        if (b.parameters.size() != given || b.results.size() != returned || (loop && i.inputs.size() != i.outputs.size()))
          damaged("a loop or condition does not fit its block");
      }
    }
  }

  Find find_;
  const char* bytes_;
  int64_t words_, at_ = 0, dims_ = 0, regions_ = 0;
  Blob* blob_ = nullptr;
};

}  // namespace stemma
