// One run of a program: its frames, what it waits for, what was measured of it.
#pragma once
#include <memory>

#include "model.hpp"

namespace stemma {

struct Frame {
  const Block* block = nullptr;
  size_t next = 0;  // instruction
  std::vector<Value> registers;
};
struct Usage {  // of one model
  int64_t calls = 0, rows = 0, outputs = 0;
  double seconds = 0;
};
struct Statistics {
  double seconds = 0, drafting = 0;
  int64_t emitted = 0, trees = 0, nodes = 0, followed = 0;
  std::vector<Usage> models;
};
enum class Waits : int32_t { NOTHING, ROOM, MODEL, HOST };
enum class Status : int32_t { RUNNING, FINISHED, FAILED, HOST };

struct Asked {  // a drafter in a turn, as the governor asked it
  int64_t source = 0;
  int32_t level = 0;             // the class of the tree before
  bool drafted = false, open = false;  // open: it drafts or learns, since `since`
  bool first = true;             // no other drafted before
  double gain = 0, since = 0, seconds = 0;  // gain: of the tree before; once it has drafted, the change
  int64_t limit = 0, recent = 0;  // nodes that it was allowed, root left out; of the governor then
  bool tried = false;             // limit is not the best known one
  std::vector<double> brought;    // by each of those nodes
};

struct Instance {
  int64_t id = 0;
  const Program* program = nullptr;
  Status status = Status::RUNNING;
  Waits waits = Waits::NOTHING;
  std::string error;
  std::vector<int64_t> dims;
  std::vector<int32_t> tokens;  // emitted
  std::vector<Value> results;
  // The instruction being run: `gathered` inputs stay while it waits; `stage` counts what it has done.
  bool gathered = false;
  int32_t stage = 0;
  std::vector<Value> in, out, moved;
  std::vector<std::unique_ptr<Frame>> frames;
  size_t depth = 0;
  Request request;
  int64_t room = 0;  // slots that it waits for
  const std::string* host_name = nullptr;  // of the Python function that it waits for
  const Attribute* host_type = nullptr;
  Value reply;
  int64_t turns = 0;           // of loops, without a model call, an emitted token or a host call in between
  double drafting_since = -1;  // value of `busy` at the last `plan`
  double learned = -1;         // and at the last `learn`
  std::vector<Asked> asked;    // since the last `plan`
  double busy = 0;             // seconds, calls of model 0 left out; without those since `resumed`
  int64_t resumed = 0;         // when it was last run
  Statistics statistics;
  std::vector<std::pair<int32_t, Object*>> lent;  // parameters that began with a state that the machine kept, and that state
  double busy_now() const { return busy + (double)(now_nanoseconds() - resumed) * 1e-9; }
  // Where the state of a parameter is that was lent, when it was only changed in place since; else null.
  const Value* lent_value(int32_t parameter) const {
    for (const auto& [number, object] : lent) {
      if (number != parameter) continue;
      for (size_t d = 0; d < depth; ++d)
        for (const Value& v : frames[d]->registers)
          if (v.state.p == object) return &v;
      for (const Value& v : in)
        if (v.state.p == object) return &v;
    }
    return nullptr;
  }
  ~Instance() { if (request.model) request.model->unpin(request); }
};

}  // namespace stemma
