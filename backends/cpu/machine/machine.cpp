// The decoding machine's object: every operation, and the C interface.
#include "api.hpp"
#include "calls.hpp"
#include "choose.hpp"
#include "constraint.hpp"
#include "embed.hpp"
#include "governor.hpp"
#include "reflect.hpp"
#include "sequences.hpp"
#include "shapes.hpp"
#include "tables.hpp"
#include "tensors.hpp"
#include "trees.hpp"

namespace stemma {
namespace {

template <size_t N> void collect(std::unordered_map<std::string, const OperationEntry*>& into, const OperationEntry (&entries)[N]) {
  for (const OperationEntry& entry : entries)
    if (entry.name) into[entry.name] = &entry;
}
const OperationEntry* find_operation(const std::string& name) {
  static const std::unordered_map<std::string, const OperationEntry*> known = [] {
    std::unordered_map<std::string, const OperationEntry*> made;
    collect(made, SEQUENCES_OPERATIONS), collect(made, TREES_OPERATIONS), collect(made, CALLS_OPERATIONS);
    collect(made, TENSORS_OPERATIONS), collect(made, SHAPES_OPERATIONS), collect(made, CHOOSE_OPERATIONS), collect(made,
        CONSTRAINT_OPERATIONS);
    collect(made, TABLES_OPERATIONS), collect(made, GOVERNOR_OPERATIONS), collect(made, REFLECT_OPERATIONS);
    return made;
  }();
  const auto found = known.find(name);
  return found == known.end() ? nullptr : found->second;
}

void write_error(const std::string& text, char* error, int64_t bytes) {
  if (error && bytes > 0) snprintf(error, (size_t)bytes, "%s", text.c_str());
}
Instance* find_instance(void* machine, int64_t id) {
  const auto& all = ((Machine*)machine)->instances;
  const auto found = all.find(id);
  return found == all.end() ? nullptr : found->second.get();
}
void describe(const char* name, const Value& v, StemmaTensor* out) {
  out->name = name;
  out->dtype = v.dtype;
  out->rank = v.rank;
  for (int d = 0; d < MAX_RANK; ++d) out->shape[d] = d < v.rank ? v.shape[d] : 0;
  out->data = v.data<char>();
}

}  // namespace

Object* make_state(const std::string& kind, const std::vector<int64_t>& arguments) {
  for (const StateEntry& entry : TABLES_STATES)
    if (entry.kind && kind == entry.kind) return entry.make(arguments);
  for (const StateEntry& entry : GOVERNOR_STATES)
    if (entry.kind && kind == entry.kind) return entry.make(arguments);
  fail("The programs use the state '%s', which this library lacks: update Stemma and compile again.", kind.c_str());
}

}  // namespace stemma

using namespace stemma;

STEMMA_API void* stemma_machine_open(void* model, const void* blob, int64_t bytes, char* error, int64_t error_bytes) {
  try {
    return new Machine(model, blob, bytes, find_operation);
  } catch (const Error& problem) {
    write_error(problem.text, error, error_bytes);
  } catch (const std::exception& problem) {
    write_error(problem.what(), error, error_bytes);
  }
  return nullptr;
}
STEMMA_API void stemma_machine_close(void* machine) { delete (Machine*)machine; }
STEMMA_API void stemma_machine_limit(void* machine, int64_t slots) {
  for (auto& m : ((Machine*)machine)->models) m->limit = std::max<int64_t>(std::min(m->limit, slots), 1);
}
STEMMA_API int64_t stemma_machine_start(void* machine, const char* program, const StemmaTensor* inputs, int64_t n, char* error,
    int64_t error_bytes) {
  try {
    return ((Machine*)machine)->start(program, inputs, n).id;
  } catch (const Error& problem) {
    write_error(problem.text, error, error_bytes);
  } catch (const std::exception& problem) {
    write_error(problem.what(), error, error_bytes);
  }
  return -1;
}
STEMMA_API int32_t stemma_machine_advance(void* machine, int64_t tokens,
    int64_t nanoseconds) { return ((Machine*)machine)->advance(tokens, nanoseconds); }
STEMMA_API int32_t stemma_machine_status(void* machine, int64_t id, int64_t* emitted) {
  const Instance* instance = find_instance(machine, id);
  if (!instance) return -1;
  if (emitted) *emitted = (int64_t)instance->tokens.size();
  return instance->status == Status::RUNNING && instance->waits == Waits::HOST ? 3 : (int32_t)instance->status;
}
STEMMA_API int64_t stemma_machine_tokens(void* machine, int64_t id, int64_t from, int32_t* out, int64_t room) {
  const Instance* instance = find_instance(machine, id);
  if (!instance || from < 0) return 0;
  const int64_t n = std::min(room, (int64_t)instance->tokens.size() - from);
  for (int64_t i = 0; i < n; ++i) out[i] = instance->tokens[(size_t)(from + i)];
  return std::max<int64_t>(n, 0);
}
STEMMA_API const char* stemma_machine_error(void* machine, int64_t id) {
  const Instance* instance = find_instance(machine, id);
  return instance ? instance->error.c_str() : "There is no such instance.";
}
STEMMA_API int64_t stemma_machine_request(void* machine, int64_t id, const char** name, StemmaTensor* arguments, int64_t room) {
  const Instance* instance = find_instance(machine, id);
  if (!instance || instance->waits != Waits::HOST) return -1;
  if (name) *name = instance->host_name->c_str();
  const Frame& frame = *instance->frames[instance->depth - 1];
  const int64_t n = (int64_t)frame.block->code[frame.next].inputs.size();
  for (int64_t i = 0; i < n && i < room; ++i) describe("", instance->in[(size_t)i], arguments + i);
  return n;
}
STEMMA_API int32_t stemma_machine_reply(void* machine, int64_t id, const StemmaTensor* value, const char* error) {
  Instance* instance = find_instance(machine, id);
  if (!instance || instance->waits != Waits::HOST) return 1;
  ((Machine*)machine)->reply(*instance, value, error);
  return instance->status != Status::RUNNING;
}
STEMMA_API int32_t stemma_machine_result(void* machine, int64_t id, const char* name, StemmaTensor* out) {
  const Instance* instance = find_instance(machine, id);
  if (!instance || instance->status != Status::FINISHED) return 1;
  const std::vector<std::string>& names = instance->program->results;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] != name || !instance->results[i].storage) continue;
    describe(names[i].c_str(), instance->results[i], out);
    return 0;
  }
  return 1;
}
STEMMA_API void stemma_machine_release(void* machine, int64_t id) { ((Machine*)machine)->release(id); }
STEMMA_API int64_t stemma_machine_statistics(void* machine, int64_t id, double* out, int64_t room) {
  const Machine& m = *(Machine*)machine;
  const Instance* instance = id < 0 ? nullptr : find_instance(machine, id);
  if (id >= 0 && !instance) return 0;
  const Statistics& s = instance ? instance->statistics : m.statistics;
  std::vector<double> all = {s.seconds, (double)s.emitted, (double)s.trees, (double)s.nodes, (double)s.followed, s.drafting,
      (double)s.models.size()};
  for (const Usage& u : s.models) all.insert(all.end(), {(double)u.calls, (double)u.rows, (double)u.outputs, u.seconds});
  for (const auto& each : m.models)
    if (!instance) all.push_back((double)each->used);
  std::copy(all.begin(), all.begin() + std::min(room, (int64_t)all.size()), out);
  return (int64_t)all.size();
}
