// Instances of programs and the scheduler that runs them together.
//
// An instance keeps its own stack of frames, so it can wait anywhere: an operation that needs a model fills `request`, returns
// false and is called again, with the same inputs and a `stage` of its own, when that was served. A round of the scheduler runs
// every instance until it waits, then makes one call of each model for all that wait for it.
#pragma once
#include <map>
#include <memory>

#include "api.hpp"
#include "instance.hpp"

namespace stemma {

struct Machine {
  static constexpr int64_t MAX_TURNS = 1 << 20;
  static constexpr size_t MAX_DEPTH = 256, MIN_SCRATCH = 32;
  Blob blob;
  std::vector<std::unique_ptr<Model>> models;
  std::map<std::pair<const Program*, int32_t>, Value> kept;  // persistent values, by parameter
  std::map<int64_t, std::unique_ptr<Instance>> instances;
  Statistics statistics;
  Pages arena;
  void* native;  // of the library
  int64_t last_id = 0, deadline = 0, emitted = 0;

  Machine(void* library, const void* data, int64_t bytes, BlobReader::Find find)
      : blob(BlobReader(data, bytes, find).read()), native(library) {
    for (const ModelSpec& spec : blob.models) models.push_back(std::make_unique<Model>(spec, library));
    statistics.models.resize(models.size());
    for (const Program& p : blob.programs)
      for (const Block* b : blocks_of(p))
        for (const Instruction& i : b->code) scratch_ = std::max({scratch_, i.inputs.size(), i.outputs.size()});
  }
  ~Machine() {  // values first: they give slots and buffers back to the models
    instances.clear();
    kept.clear();
  }

  const std::string& text(int64_t number) const {
    if (number < 0 || number >= (int64_t)blob.strings.size()) fail("the program is damaged: a text is missing");
    return blob.strings[(size_t)number];
  }
  Model* model(const std::string& name) const {
    for (const auto& m : models)
      if (m->name == name) return m.get();
    fail("The program needs the model '%s', which the artifact lacks.", name.c_str());
  }
  Usage& usage(Statistics& of, const Model* model) const {
    size_t i = 0;
    while (models[i].get() != model) ++i;
    return of.models[i];
  }
  int64_t size(const Instance& instance, const Attribute& a) const {
    if (a.kind == Attribute::INT) return a.integer;
    if (a.kind != Attribute::SIZE) fail("the program is damaged: an attribute is no size");
    int64_t stack[64];
    int height = 0;
    for (const auto& [operation, value] : a.postfix) {
      if (operation < 2) {
        if (height == 64) fail("a size is too complicated");
        stack[height++] = operation == 0 ? value : instance.dims[(size_t)value];
        continue;
      }
      const int64_t y = stack[--height], x = stack[height - 1];
      if (operation == 4 && y == 0) fail("a size is divided by zero");
      // Unsigned arithmetic: a damaged size wraps around.
      stack[height - 1] = operation == 2   ? (int64_t)((uint64_t)x + (uint64_t)y)
                          : operation == 3 ? (int64_t)((uint64_t)x * (uint64_t)y)
                          : operation == 4 ? (y == -1 ? (int64_t)(0 - (uint64_t)x) : x / y - (x % y != 0 && (x < 0) != (y < 0)))
                          : operation == 5 ? std::min(x, y)
                                           : std::max(x, y);
    }
    return stack[0];
  }

  // ---- starting ----
  Instance& create(const Program& program) {
    auto made = std::make_unique<Instance>();
    made->id = ++last_id;
    made->program = &program;
    made->in.resize(std::max(scratch_, MIN_SCRATCH));
    made->out.resize(std::max(scratch_, MIN_SCRATCH));
    made->statistics.models.resize(models.size());
    Instance& instance = *made;
    instances[instance.id] = std::move(made);
    return instance;
  }
  Frame& enter(Instance& instance, const Block& block) {
    if (instance.depth == MAX_DEPTH) fail("the program is damaged: its blocks contain each other");
    if (instance.depth == instance.frames.size()) instance.frames.push_back(std::make_unique<Frame>());
    Frame& frame = *instance.frames[instance.depth++];
    frame.next = 0;
    if (frame.block != &block) {  // else its registers were emptied when it was left
      frame.block = &block;
      frame.registers.clear();
      frame.registers.resize((size_t)block.registers);
    }
    for (const auto& [r, value] : block.constants) frame.registers[(size_t)r] = value;
    return frame;
  }

  // A new instance with these inputs; the others take their defaults.
  Instance& start(const std::string& name, const StemmaTensor* inputs, int64_t n) {
    const Program* program = nullptr;
    for (const Program& p : blob.programs)
      if (p.name == name) program = &p;
    if (!program) fail("The artifact has no program '%s'.", name.c_str());
    const std::vector<Parameter>& parameters = program->parameters;
    for (int64_t i = 0; i < n; ++i)
      if (std::none_of(parameters.begin(), parameters.end(),
          [&](const Parameter& p) { return p.type.dtype != STATE && p.name == inputs[i].name; }))
        fail("The program '%s' has no input '%s'.", name.c_str(), inputs[i].name);
    Instance& instance = create(*program);
    try {
      instance.dims.assign(program->dims.size(), -1);
      std::vector<Value> values(parameters.size());
      for (size_t k = 0; k < parameters.size(); ++k)
        for (int64_t i = 0; i < n; ++i)
          if (parameters[k].name == inputs[i].name) values[k] = given(instance, parameters[k], inputs[i]);
      Frame& frame = enter(instance, program->main);
      for (size_t k = 0; k < parameters.size(); ++k) {
        if (values[k].empty()) values[k] = initial(instance, parameters[k], (int32_t)k);
        frame.registers[(size_t)program->main.parameters[k]] = std::move(values[k]);
      }
    } catch (...) {
      release(instance.id);
      throw;
    }
    return instance;
  }
  void release(int64_t id) {
    const auto found = instances.find(id);
    if (found == instances.end()) return;
    take_back(*found->second);
    instances.erase(found);
  }
  void take_back(Instance& instance) {
    for (const auto& [number, object] : instance.lent)
      if (const Value* v = instance.lent_value(number)) kept.insert({{instance.program, number}, *v});
    instance.lent.clear();
  }
  static Value given(Instance& instance, const Parameter& p, const StemmaTensor& t) {
    Value v;
    v.dtype = p.type.dtype, v.rank = t.rank;
    if (t.dtype != p.type.dtype || t.rank != (int32_t)p.type.shape.size())
      fail("The input '%s' has the wrong type or number of axes.", t.name);
    for (size_t d = 0; d < p.type.shape.size(); ++d) {
      const auto& [named, value] = p.type.shape[d];
      if (t.shape[d] < 0 || t.shape[d] > (int64_t)1 << 40) fail("The input '%s' has a wrong size.", t.name);
      if (named && instance.dims[(size_t)value] < 0) instance.dims[(size_t)value] = t.shape[d];
      const int64_t wanted = named ? instance.dims[(size_t)value] : value;
      if (t.shape[d] != wanted)
        fail("The input '%s' has the size %lld where %lld is expected.", t.name, (long long)t.shape[d], (long long)wanted);
      v.shape[d] = t.shape[d];
    }
    v.storage = Ref<Storage>(new Storage(v.bytes()));
    if (v.bytes()) memcpy(v.storage->data, t.data, (size_t)v.bytes());
    return v;
  }
  // The default, the value kept from the last run, or zeros or an empty state for the first run. A state is lent, so that it is
  // changed without a copy; while an instance has it, others begin with a copy of what it is now.
  Value initial(Instance& instance, const Parameter& p, int32_t number) {
    if (const auto found = kept.find({instance.program, number}); found != kept.end()) {
      if (p.type.dtype != STATE) return found->second;
      const Value v = std::move(found->second);
      kept.erase(found);
      instance.lent.emplace_back(number, v.state.p);
      return v;
    }
    for (const auto& [id, other] : instances)
      if (other->program == instance.program)
        if (const Value* v = other->lent_value(number)) return state_value(v->state->clone());
    if (p.type.dtype == STATE) return state_value(p.kind == "output" ? new Output : make_state(p.kind, p.arguments));
    if (!p.given && p.kept < 0) fail("The program '%s' needs the input '%s'.", instance.program->name.c_str(), p.name.c_str());
    Value v;
    v.dtype = p.type.dtype, v.rank = (int32_t)p.type.shape.size();
    for (size_t d = 0; d < p.type.shape.size(); ++d)
      if ((v.shape[d] = p.type.shape[d].first ? instance.dims[(size_t)p.type.shape[d].second] : p.type.shape[d].second) < 0)
        fail("The program '%s' needs the input '%s'.", instance.program->name.c_str(), p.name.c_str());
    v.storage = Ref<Storage>(new Storage(v.bytes()));
    const double number_given = p.given == 1 ? (double)p.integer : p.given == 2 ? p.number : 0;
    for (int64_t i = 0; i < v.elements(); ++i) switch (v.dtype) {
        case F32: v.f32()[i] = (float)number_given; break;
        case I32: v.i32()[i] = (int32_t)p.integer; break;
        case I64: v.i64()[i] = p.integer; break;
        default: v.flags()[i] = p.integer != 0;
      }
    return v;
  }

  // ---- replies of host functions ----
  void reply(Instance& instance, const StemmaTensor* value, const char* error) {
    if (instance.waits != Waits::HOST) return;
    try {
      if (error) fail("%s", error);
      const Attribute& type = *instance.host_type;
      Value v;
      v.dtype = (DType)type.integer, v.rank = (int32_t)type.items.size();
      bool fits = value && value->dtype == v.dtype && value->rank == v.rank;
      for (int32_t d = 0; fits && d < v.rank; ++d) fits = (v.shape[d] = size(instance, type.items[(size_t)d])) == value->shape[d];
      if (!fits)
        fail("The host function '%s' returned a value of another type than the program declares.", instance.host_name->c_str());
      v.storage = Ref<Storage>(new Storage(v.bytes()));
      if (v.bytes()) memcpy(v.storage->data, value->data, (size_t)v.bytes());
      instance.reply = std::move(v);
      instance.waits = Waits::NOTHING;
    } catch (const Error& failure) {
      end(instance, Status::FAILED, failure.text);
    }
  }

  // ---- running one instance ----
  static void take(Frame& frame, int32_t input, Value& into) {
    if (input >= 0) into = frame.registers[(size_t)input];
    else into = std::move(frame.registers[(size_t)(-1 - input)]);
  }
  // Runs until the instance waits, is done, fails, or the time is over.
  void run(Instance& instance) {
    instance.resumed = now_nanoseconds();
    try {
      while (instance.waits == Waits::NOTHING && instance.status == Status::RUNNING) {
        Frame& frame = *instance.frames[instance.depth - 1];
        if (frame.next == frame.block->code.size()) {
          if (!leave(instance, frame)) break;
          continue;
        }
        const Instruction& code = frame.block->code[frame.next];
        if (code.kind == Instruction::PLAIN) {
          execute(instance, frame, code);
        } else if (code.kind == Instruction::PLAN) {
          if (!instance.gathered) instance.drafting_since = instance.busy_now();
          execute(instance, frame, code);
        } else {
          region(instance, frame, code);
        }
      }
    } catch (const Error& error) {
      end(instance, Status::FAILED, error.text);
    } catch (const std::bad_alloc&) {
      end(instance, Status::FAILED, "There is not enough memory.");
    }
    const double took = (double)(now_nanoseconds() - instance.resumed) * 1e-9;
    instance.busy += took;
    instance.statistics.seconds += took;
  }

  void execute(Instance& instance, Frame& frame, const Instruction& code) {
    if (!instance.gathered) {
      for (size_t i = 0; i < code.inputs.size(); ++i) take(frame, code.inputs[i], instance.in[i]);
      instance.gathered = true;
      instance.stage = 0;
    }
    Call call{*this, instance, code, instance.in.data(), instance.out.data()};
    try {
      if (!code.operation(call)) return;
    } catch (Error& error) {
      if (error.text.rfind("the program is damaged", 0) == 0) error.text += " (" + text(code.name) + ")";
      throw;
    }
    instance.gathered = false;
    ++frame.next;
    for (size_t i = 0; i < code.inputs.size(); ++i) instance.in[i].clear();
    for (size_t i = 0; i < code.outputs.size(); ++i) {
      if (code.outputs[i] >= 0) frame.registers[(size_t)code.outputs[i]] = std::move(instance.out[i]);
      else instance.out[i].clear();
    }
  }
  void region(Instance& instance, Frame& frame, const Instruction& code) {
    size_t first = 0, which = 0;
    if (code.kind == Instruction::COND) {
      Value test;
      take(frame, code.inputs[0], test);
      which = truth(test) ? 0 : 1;
      first = 1;
    }
    Frame& inner = enter(instance, instance.program->blocks[(size_t)code.attributes[which].integer]);
    for (size_t i = first; i < code.inputs.size(); ++i)
      take(frame, code.inputs[i], inner.registers[(size_t)inner.block->parameters[i - first]]);
  }
  static bool truth(const Value& v) {
    if (v.rank) fail("the program is damaged: a condition has several values");
    return *v.flags();
  }
  // The end of a block: another turn of its loop, or its results go to the block around it. False: the instance must stop here.
  bool leave(Instance& instance, Frame& frame) {
    const Block& block = *frame.block;
    std::vector<Value>& moved = instance.moved;
    moved.clear();
    const auto move_out = [&](size_t i) {
      Value& v = frame.registers[(size_t)block.results[i]];
      if (block.last[i]) moved.push_back(std::move(v));
      else moved.push_back(v);
    };
    if (instance.depth == 1) {
      for (size_t i = 0; i < block.results.size(); ++i) move_out(i);
      for (size_t i = 0; i < instance.program->parameters.size(); ++i)
        if (const int32_t result = instance.program->parameters[i].kept; result >= 0)
          kept[{instance.program, (int32_t)i}] = moved[(size_t)result];
      for (Value& v : moved) v.state = Ref<Object>();
      instance.results = std::move(moved);
      end(instance, Status::FINISHED, "");
      return false;
    }
    Frame& outer = *instance.frames[instance.depth - 2];
    const Instruction& code = outer.block->code[outer.next];
    const bool loop = code.kind == Instruction::LOOP;
    if (loop && truth(frame.registers[(size_t)block.results[0]])) {
      // What a turn does not change stays where it is.
      const auto stays = [&](size_t i) { return block.last[i + 1] && block.results[i + 1] == block.parameters[i]; };
      for (size_t i = 0; i < block.parameters.size(); ++i)
        if (!stays(i)) move_out(i + 1);
      auto next = moved.begin();
      for (size_t i = 0; i < block.parameters.size(); ++i)
        if (!stays(i)) frame.registers[(size_t)block.parameters[i]] = std::move(*next++);
      for (int32_t i : block.restored)
        frame.registers[(size_t)block.constants[(size_t)i].first] = block.constants[(size_t)i].second;
      frame.next = 0;
      if (++instance.turns > MAX_TURNS)
        fail("A loop ran %lld times without a model call or a token: it may never end.", (long long)MAX_TURNS);
      return instance.turns % 1024 || !deadline || now_nanoseconds() < deadline;
    }
    for (size_t i = loop; i < block.results.size(); ++i) move_out(i);
    for (Value& v : frame.registers) v.clear();
    --instance.depth;
    ++outer.next;
    for (size_t i = 0; i < code.outputs.size(); ++i)
      if (code.outputs[i] >= 0) outer.registers[(size_t)code.outputs[i]] = std::move(moved[i]);
    return true;
  }
  void end(Instance& instance, Status status, const std::string& error) {
    if (instance.request.model) instance.request.model->unpin(instance.request);
    take_back(instance);
    instance.status = status;
    instance.error = error;
    instance.waits = Waits::NOTHING;
    instance.request = Request();
    instance.in.clear(), instance.out.clear(), instance.moved.clear(), instance.frames.clear();
    instance.reply = Value();
    instance.depth = 0;
  }

  // ---- the scheduler ----
  // 0: all are done; 1: `tokens` were emitted or the time is over; 2: a host function is wanted.
  int32_t advance(int64_t tokens, int64_t nanoseconds) {
    const int64_t started = now_nanoseconds(), goal = tokens > 0 ? emitted + tokens : INT64_MAX;
    deadline = nanoseconds > 0 ? started + nanoseconds : 0;
    int32_t answer;
    while ((answer = round(goal)) < 0) {}
    statistics.seconds += (double)(now_nanoseconds() - started) * 1e-9;
    return answer;
  }
  int32_t round(int64_t goal) {
    bool running = false, host = false, waiting = false;
    for (auto& [id, each] : instances) {
      Instance& instance = *each;
      if (instance.status != Status::RUNNING) continue;
      if (instance.waits == Waits::ROOM && instance.request.model->has_room(instance.room)) instance.waits = Waits::NOTHING;
      if (instance.waits == Waits::NOTHING) run(instance);
      if (instance.status != Status::RUNNING) continue;
      running |= instance.waits == Waits::NOTHING;  // the time is over
      waiting |= instance.waits == Waits::MODEL || instance.waits == Waits::ROOM;
      host |= instance.waits == Waits::HOST;
      if (emitted >= goal) return 1;
    }
    if (host) return 2;
    if (!running && !waiting) return 0;
    bool served = false;
    for (auto& m : models) served |= serve(*m);
    if (!served && !running) make_room();
    return deadline && now_nanoseconds() >= deadline ? 1 : -1;  // every `advance` comes this far, however short its time
  }
  // One call for those that wait for this model: short requests whole, then what fits of longer ones; whether there was any.
  bool serve(Model& model) {
    waiting_.clear();
    int64_t total = 0;
    for (auto& [id, each] : instances)
      if (each->waits == Waits::MODEL && each->request.model == &model) {
        waiting_.push_back(each.get());
        total += left(*each);
      }
    if (waiting_.empty()) return false;
    Instance* const oldest = waiting_.front();
    if (total > model.rows)
      std::stable_sort(waiting_.begin(), waiting_.end(), [](Instance* a, Instance* b) { return left(*a) < left(*b); });
    std::vector<std::pair<Instance*, int64_t>>& parts = parts_;
    parts.clear();
    int64_t room = model.rows;
    // The oldest one always moves on, however many others there are.
    const int64_t kept_back = total > model.rows ? std::min(left(*oldest), std::max<int64_t>(model.rows / 4, 1)) : 0;
    for (Instance* instance : waiting_) {
      const int64_t most = instance == oldest ? room : room - (passed(parts, oldest) ? 0 : kept_back);
      if (most <= 0) continue;
      const int64_t n = model.add(instance->request, most);
      room -= n;
      parts.emplace_back(instance, n);
    }
    int64_t rows = 0, took = 0;
    for (const auto& part : parts) rows += part.second;
    std::string problem;
    const int64_t outputs = model.run_outputs;
    try {
      took = model.run(arena);
    } catch (const Error& error) {
      problem = error.text;
    } catch (const std::bad_alloc&) {
      problem = "There is not enough memory for the logits.";
    }
    if (!problem.empty()) {
      for (auto& [instance, n] : parts) end(*instance, Status::FAILED, problem);
      return true;
    }
    count(statistics, model, rows, model.run_outputs - outputs, took);
    for (auto& [instance, n] : parts) {
      const double share = (double)took * (double)n / (double)rows;
      const bool done = left(*instance) == 0;
      count(instance->statistics, model, n, done ? instance->request.outputs : 0, share);
      instance->statistics.seconds += share * 1e-9;
      if (&model != models[0].get()) instance->busy += share * 1e-9;
      instance->turns = 0;
      if (done) instance->waits = Waits::NOTHING;
    }
    return true;
  }
  void count(Statistics& of, const Model& model, int64_t rows, int64_t outputs, double nanoseconds) const {
    Usage& u = usage(of, &model);
    ++u.calls, u.rows += rows, u.outputs += outputs, u.seconds += nanoseconds * 1e-9;
  }
  static int64_t left(const Instance& instance) { return (int64_t)instance.request.rows.size() - instance.request.done; }
  static bool passed(const std::vector<std::pair<Instance*, int64_t>>& parts, const Instance* instance) {
    for (const auto& part : parts)
      if (part.first == instance) return true;
    return false;
  }
  // Everything that could run waits for room in a cache: the youngest gives up its place.
  void make_room() {
    for (auto i = instances.rbegin(); i != instances.rend(); ++i) {
      Instance& instance = *i->second;
      if (instance.waits != Waits::ROOM) continue;
      const Model& m = *instance.request.model;
      char text[256];
      snprintf(text, sizeof text,
          "There is no room in the cache of the model '%s' for %lld more tokens: %lld of at most %lld are used.",
               m.name.c_str(), (long long)instance.room, (long long)m.used, (long long)m.limit);
      end(instance, Status::FAILED, text);
      return;
    }
  }

 private:
  static std::vector<const Block*> blocks_of(const Program& p) {
    std::vector<const Block*> found = {&p.main};
    for (const Block& b : p.blocks) found.push_back(&b);
    return found;
  }
  size_t scratch_ = 0;
  std::vector<Instance*> waiting_;
  std::vector<std::pair<Instance*, int64_t>> parts_;
};

inline const std::string& Call::text(int i) const {
  if (attribute(i).kind != Attribute::TEXT) fail("the program is damaged: an attribute is no text");
  return machine.text(attribute(i).integer);
}
inline int64_t Call::size(int i) const { return machine.size(instance, attribute(i)); }
inline std::vector<int64_t> Call::list(int i) const {
  std::vector<int64_t> found;
  for (const Attribute& a : attribute(i).items) found.push_back(machine.size(instance, a));
  return found;
}

}  // namespace stemma
