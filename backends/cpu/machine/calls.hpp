// What a program gives to and asks of its caller: tokens, Python functions, compiled functions.
#pragma once
#include "machine.hpp"

namespace stemma {

inline bool op_emit(Call& call) {
  const int64_t n = call.in[1].elements();
  const int32_t* tokens = call.in[1].i32();
  Output& output = own<Output>(call.in[0]);
  Instance& instance = call.instance;
  if (output.count != (int64_t)instance.tokens.size()) fail("emit: the output was already continued in another way.");
  for (int64_t i = 0; i < n; ++i)
    if (tokens[i] >= 0) instance.tokens.push_back(tokens[i]);
  const int64_t more = (int64_t)instance.tokens.size() - output.count;
  output.count += more;
  instance.statistics.emitted += more, call.machine.statistics.emitted += more, call.machine.emitted += more;
  if (more) instance.turns = 0;
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_emitted(Call& call) {
  Value v = tensor(I32, {});
  *v.i32() = (int32_t)state_of<Output>(call.in[0]).count;
  call.out[0] = std::move(v);
  return true;
}
inline bool op_finish(Call& call) {
  state_of<Output>(call.in[0]);
  call.out[0] = std::move(call.in[0]);
  return true;
}
inline bool op_is_in(Call& call) {
  const int32_t* tokens = call.in[0].i32();
  Value v = tensor_like(BOOL, call.in[0]);
  for (int64_t i = 0, n = v.elements(); i < n; ++i) {
    bool found = false;
    for (const Attribute& a : call.attribute(0).items) found |= a.integer == tokens[i];
    v.flags()[i] = found;
  }
  call.out[0] = std::move(v);
  return true;
}

// The caller sees the request, and replies with a tensor of the declared type (checked in Machine::reply) or an error.
inline bool op_host(Call& call) {
  Instance& instance = call.instance;
  if (instance.stage == 0) {
    for (int64_t i = 0; i < call.count(); ++i) call.in[i].data<char>();
    if (call.attribute(1).kind != Attribute::TYPE || call.attribute(1).items.size() > MAX_RANK)
      fail("the program is damaged: a type is missing");
    instance.host_name = &call.text(0);
    instance.host_type = &call.attribute(1);
    instance.turns = 0;
    instance.waits = Waits::HOST;
    instance.stage = 1;
    return false;
  }
  instance.host_name = nullptr;
  call.out[0] = std::move(instance.reply);
  return true;
}

inline bool op_call(Call& call) {
  const std::string& name = call.text(0);
  const FunctionSpec* f = nullptr;
  for (const FunctionSpec& each : call.machine.blob.functions)
    if (each.name == name) f = &each;
  if (!f) fail("The program needs the compiled function '%s', which the artifact lacks.", name.c_str());
  if ((int64_t)f->inputs.size() != call.count()) fail("call: '%s' takes %zu inputs.", name.c_str(), f->inputs.size());
  int64_t sizes[MAX_SIZES];
  std::fill(sizes, sizes + MAX_SIZES, -1);
  std::vector<void*> buffers;
  for (size_t i = 0; i < f->inputs.size(); ++i) {
    const Value& v = call.in[i];
    const TensorSpec& t = f->inputs[i];
    buffers.push_back(v.data<char>());
    bool fits = v.dtype == t.dtype && v.rank == (int32_t)t.shape.size();
    for (size_t d = 0; fits && d < t.shape.size(); ++d) {
      const auto& [named, value] = t.shape[d];
      if (named && sizes[value] < 0) sizes[value] = v.shape[d];
      fits = v.shape[d] == (named ? sizes[value] : value);
    }
    if (!fits) fail("call: input %zu of '%s' has the wrong type or sizes.", i, name.c_str());
  }
  std::vector<Value> results;
  for (const TensorSpec& t : f->results) {
    Value v;
    v.dtype = t.dtype, v.rank = (int32_t)t.shape.size();
    for (size_t d = 0; d < t.shape.size(); ++d)
      if ((v.shape[d] = t.shape[d].first ? sizes[t.shape[d].second] : t.shape[d].second) < 0)
        fail("call: no input of '%s' shows the sizes of its results.", name.c_str());
    v.storage = Ref<Storage>(new Storage(v.bytes()));
    buffers.push_back(v.data<char>());
    results.push_back(std::move(v));
  }
  void* native = call.machine.native;
  const int64_t bytes = stemma_arena_bytes(native, f->function, sizes);
  if (bytes < 0) fail("call: the kernels of '%s' refuse these sizes.", name.c_str());
  Pages& arena = call.machine.arena;
  if (bytes > arena.bytes || !arena.data) arena = Pages::of(bytes + bytes / 4, "intermediate values");
  if (const int32_t status = stemma_call(native, f->function, sizes, buffers.data(), arena.data))
    fail("call: the kernels of '%s' failed with the status %d.", name.c_str(), (int)status);
  for (size_t i = 0; i < results.size() && i < call.code.outputs.size(); ++i) call.out[i] = std::move(results[i]);
  return true;
}

inline const OperationEntry CALLS_OPERATIONS[] = {
    {"emit", op_emit, 2, 1, 0},   {"emitted", op_emitted, 1, 1, 0}, {"finish", op_finish, 1, 1, 0},
    {"is_in", op_is_in, 1, 1, 1}, {"host", op_host, -1, 1, 2},      {"call", op_call, -1, -1, 2},
};

}  // namespace stemma
