// The plain C API of stemma.h over the machine: files of an exported folder, the best variant, one program at a time.
#pragma once
#include "machine.hpp"
#include "stemma.h"

#include <fcntl.h>
#if defined(__linux__)
#include <sched.h>
#endif
#include <sys/stat.h>

extern "C" {
const char* stemma_variants(void);
int32_t stemma_supported(const char* variant);
void* stemma_open(const char* variant, const void* weights, int32_t threads, char* error, int64_t error_bytes);
void stemma_close(void* model);
}

namespace stemma {

class MappedFile {  // read-only
 public:
  MappedFile() {}
  MappedFile(const MappedFile&) = delete;
  ~MappedFile() { if (bytes > 0) munmap((void*)data, (size_t)bytes); }
  bool open(const std::string& path) {  // false: there is none; an Error when it cannot be read
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    struct stat info;
    const bool known = fstat(file, &info) == 0;
    void* at = known && info.st_size > 0 ? mmap(nullptr, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    ::close(file);
    if (known && info.st_size == 0) return true;
    if (at == MAP_FAILED) fail("%s cannot be read.", path.c_str());
    data = (const char*)at;
    bytes = (int64_t)info.st_size;
    return true;
  }
  const char* data = nullptr;
  int64_t bytes = 0;
};

inline std::string best_variant() {
  std::string rest = stemma_variants();
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string name = rest.substr(0, comma);
    if (stemma_supported(name.c_str())) return name;
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
  }
  fail("This machine has none of the instruction sets that the library was compiled for (%s).", stemma_variants());
}

inline int32_t usable_processors() {
#if defined(__linux__)
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof usable, &usable) == 0) return CPU_COUNT(&usable);
#endif
  return (int32_t)std::max<long>(sysconf(_SC_NPROCESSORS_ONLN), 1);
}

// vocabulary.bin: int64 number of tokens, their number + 1 offsets, the bytes.
class Vocabulary {
 public:
  void open(const std::string& path) {
    if (!file_.open(path)) return;
    if (file_.bytes >= 16) memcpy(&count_, file_.data, 8);
    bool valid = file_.bytes >= 16 && count_ >= 0 && count_ <= (file_.bytes - 16) / 8;
    int64_t last = 0;
    for (int64_t i = 0; valid && i <= count_; ++i) {
      valid = offset(i) >= last && offset(i) <= file_.bytes - 16 - 8 * count_;
      last = offset(i);
    }
    if (!valid) fail("%s is damaged.", path.c_str());
  }
  const char* text(int32_t token, int64_t* bytes) const {
    if (token < 0 || token >= count_) return nullptr;
    *bytes = offset(token + 1) - offset(token);
    return file_.data + 16 + 8 * count_ + offset(token);
  }

 private:
  int64_t offset(int64_t i) const {
    int64_t value;
    memcpy(&value, file_.data + 8 + 8 * i, 8);
    return value;
  }
  MappedFile file_;
  int64_t count_ = 0;
};

}  // namespace stemma

struct StemmaLoaded {
  stemma::MappedFile weights, programs;
  stemma::Vocabulary vocabulary;
  void* native = nullptr;
  void* machine = nullptr;
  std::string error;

  void load(const std::string& folder, int32_t threads) {
    using stemma::fail;
    if (!weights.open(folder + "/weights.bin")) fail("%s has no weights.bin.", folder.c_str());
    if (!programs.open(folder + "/programs.bin")) fail("%s has no programs.bin.", folder.c_str());
    vocabulary.open(folder + "/vocabulary.bin");
    if (threads == 0) threads = stemma::usable_processors();
    char text[512] = "";
    native = stemma_open(stemma::best_variant().c_str(), weights.data, threads, text, sizeof text);
    if (!native) fail("%s", text);
    machine = stemma_machine_open(native, programs.data, programs.bytes, text, sizeof text);
    if (!machine) fail("%s", text);
    if (core().models.empty()) fail("%s holds no language model.", folder.c_str());
  }
  ~StemmaLoaded() {
    if (machine) stemma_machine_close(machine);
    if (native) stemma_close(native);
  }
  stemma::Machine& core() const { return *(stemma::Machine*)machine; }
  const stemma::Model& model() const { return *core().models[0]; }

  int64_t generate(const char* name, const int32_t* ids, int64_t n, const StemmaOption* options, int64_t count, StemmaCallback callback, void* user) {
    using stemma::fail;
    const stemma::Program* program = nullptr;
    for (const stemma::Program& each : core().blob.programs)
      if (each.name == name) program = &each;
    if (!program) fail("There is no program '%s'.", name);
    if (n < 1 || n >= model().context) fail("The prompt has %lld tokens; it must have 1 to %lld.", (long long)n, (long long)model().context - 1);
    for (int64_t i = 0; i < n; ++i)
      if (ids[i] < 0 || ids[i] >= model().vocab) fail("The token id %d is not between 0 and %lld.", (int)ids[i], (long long)model().vocab - 1);
    std::vector<StemmaTensor> inputs;
    std::vector<int64_t> memory((size_t)count + 1);  // one number each, in its element type
    bool prompt = false;
    for (const stemma::Parameter& p : program->parameters) {
      if (!prompt && p.type.dtype == stemma::I32 && p.type.shape.size() == 1 && p.type.shape[0].first) {
        inputs.push_back({p.name.c_str(), stemma::I32, 1, {n}, ids});
        prompt = true;
      }
    }
    bool limited = false;
    for (int64_t i = 0; i < count; ++i) inputs.push_back(option(*program, options[i].name, options[i].value, n, &memory[(size_t)i], &limited));
    for (const stemma::Parameter& p : program->parameters)
      if (p.name == "max_new_tokens" && !limited)
        inputs.push_back(option(*program, "max_new_tokens", p.given ? (double)p.integer : 1e9, n, &memory[(size_t)count], &limited));
    char text[512] = "";
    const int64_t id = stemma_machine_start(machine, name, inputs.data(), (int64_t)inputs.size(), text, sizeof text);
    if (id < 0) fail("%s", text);
    struct Release {
      void* machine;
      int64_t id;
      ~Release() { stemma_machine_release(machine, id); }
    } release{machine, id};
    int64_t seen = 0, emitted = 0;
    std::vector<int32_t> tokens(256);
    for (int32_t status = 0; status == 0;) {
      if (stemma_machine_advance(machine, callback ? 1 : 0, 0) == 2) fail("The program '%s' calls functions of Python; it cannot run from C.", name);
      status = stemma_machine_status(machine, id, &emitted);
      if (status == 2) fail("The program '%s' stopped: %s", name, stemma_machine_error(machine, id));
      while (callback && seen < emitted) {
        const int64_t got = stemma_machine_tokens(machine, id, seen, tokens.data(), (int64_t)tokens.size());
        seen += got;
        if (callback(user, tokens.data(), got)) return seen;
      }
    }
    return emitted;
  }
  StemmaTensor option(const stemma::Program& program, const char* name, double value, int64_t prompt, int64_t* memory, bool* limited) const {
    for (const stemma::Parameter& p : program.parameters) {
      if (p.name != name || p.type.dtype == stemma::STATE || !p.type.shape.empty()) continue;
      if (p.name == "max_new_tokens") {
        value = std::min(value, (double)(model().context - prompt));
        *limited = true;
      }
      const stemma::DType t = p.type.dtype;
      const float single = (float)value;
      const int32_t small = (int32_t)value;
      const int64_t large = (int64_t)value;
      const uint8_t flag = value != 0;
      if (t == stemma::F32) memcpy(memory, &single, sizeof single);
      if (t == stemma::I32) memcpy(memory, &small, sizeof small);
      if (t == stemma::I64) memcpy(memory, &large, sizeof large);
      if (t == stemma::BOOL) memcpy(memory, &flag, sizeof flag);
      if (!(value == value) || ((t == stemma::I32 || t == stemma::I64) && (value != (double)large || std::abs(value) > (t == stemma::I32 ? 2147483647.0 : 9007199254740992.0))))
        stemma::fail("The option %s cannot be %g.", name, value);
      return {p.name.c_str(), t, 0, {}, memory};
    }
    stemma::fail("The program '%s' has no option %s that is one number.", program.name.c_str(), name);
  }
};

#define STEMMA_EMBED extern "C" __attribute__((visibility("default")))

STEMMA_EMBED StemmaLoaded* stemma_load(const char* folder, int32_t threads, char* error, int64_t error_bytes) {
  StemmaLoaded* made = new StemmaLoaded;
  try {
    made->load(folder, threads);
    return made;
  } catch (const stemma::Error& problem) {
    if (error && error_bytes > 0) snprintf(error, (size_t)error_bytes, "%s", problem.text.c_str());
  }
  delete made;
  return nullptr;
}
STEMMA_EMBED int64_t stemma_generate(StemmaLoaded* model, const char* program, const int32_t* ids, int64_t n, const StemmaOption* options,
                                     int64_t option_count, StemmaCallback callback, void* user) {
  try {
    model->error.clear();
    return model->generate(program, ids, n, options, option_count, callback, user);
  } catch (const stemma::Error& problem) {
    model->error = problem.text;
    return -1;
  }
}
STEMMA_EMBED const char* stemma_token_text(StemmaLoaded* model, int32_t token, int64_t* bytes) { return model->vocabulary.text(token, bytes); }
STEMMA_EMBED const char* stemma_error(StemmaLoaded* model) { return model->error.c_str(); }
STEMMA_EMBED int64_t stemma_vocabulary_size(StemmaLoaded* model) { return model->model().vocab; }
STEMMA_EMBED int64_t stemma_context(StemmaLoaded* model) { return model->model().context; }
STEMMA_EMBED void stemma_free(StemmaLoaded* model) { delete model; }
