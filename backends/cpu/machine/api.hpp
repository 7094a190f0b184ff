// The C interface of the machine. One thread at a time uses a machine, or the model that it was opened on.
#pragma once
#include <stdint.h>

#define STEMMA_API extern "C" __attribute__((visibility("default")))

// A dense tensor. dtype: 0 f32, 1 i32, 2 i64, 3 bool (bytes); rank at most 4.
typedef struct {
  const char* name;
  int32_t dtype, rank;
  int64_t shape[4];
  const void* data;
} StemmaTensor;

// A machine for the programs of `blob` (copied) on a model of stemma_open; null with the reason in `error`.
STEMMA_API void* stemma_machine_open(void* model, const void* blob, int64_t bytes, char* error, int64_t error_bytes);
STEMMA_API void stemma_machine_close(void* machine);
// At most that many tokens in the cache of each model (beside what memory and kernels allow).
STEMMA_API void stemma_machine_limit(void* machine, int64_t slots);
// Starts a program: the id of the instance, or -1 with the reason in `error`. Inputs are copied; those not given take defaults.
STEMMA_API int64_t stemma_machine_start(void* machine, const char* program, const StemmaTensor* inputs, int64_t n, char* error,
    int64_t error_bytes);
// Runs all instances: 0 all are done, 1 `tokens` were emitted or `nanoseconds` are over (<= 0: no limit), 2 a host
// function is wanted.
STEMMA_API int32_t stemma_machine_advance(void* machine, int64_t tokens, int64_t nanoseconds);
// 0 running, 1 finished, 2 failed, 3 waits for a host function, -1 no such instance; *emitted: tokens so far.
STEMMA_API int32_t stemma_machine_status(void* machine, int64_t id, int64_t* emitted);
// Copies up to `room` emitted tokens from number `from` on; how many.
STEMMA_API int64_t stemma_machine_tokens(void* machine, int64_t id, int64_t from, int32_t* out, int64_t room);
// Why it failed; "" if it did not.
STEMMA_API const char* stemma_machine_error(void* machine, int64_t id);
// The host function that an instance waits for and its arguments (valid until the reply); how many, or -1.
STEMMA_API int64_t stemma_machine_request(void* machine, int64_t id, const char** name, StemmaTensor* arguments, int64_t room);
// The function's result, or an error with which the instance fails; 0, or 1 when it fails or waited for nothing.
STEMMA_API int32_t stemma_machine_reply(void* machine, int64_t id, const StemmaTensor* value, const char* error);
// A result of a finished instance, valid until it is released; 0, or 1 when there is no such tensor.
STEMMA_API int32_t stemma_machine_result(void* machine, int64_t id, const char* name, StemmaTensor* out);
// Forgets an instance; one that still runs is cancelled.
STEMMA_API void stemma_machine_release(void* machine, int64_t id);
// Measurements of an instance or (-1) of all: 0 seconds, 1 tokens emitted, 2 trees, 3 tree nodes run, 4 nodes followed, 5 seconds
// of drafting, 6 models, then for each model calls, rows, outputs, seconds; of all also cache slots in use per model, after that.
// How many there are; at most `room` are written.
STEMMA_API int64_t stemma_machine_statistics(void* machine, int64_t id, double* out, int64_t room);
