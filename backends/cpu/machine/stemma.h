/* Running a compiled model from C. Made by `stemma export model.stemma --c FOLDER`; link with libNAME.so of that folder.

   A model runs one call at a time: threads that share one take turns by a lock of their own, or load it twice.
   Token ids are int32_t. What goes wrong is told by a return value; stemma_error then has one sentence about it. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct StemmaLoaded StemmaLoaded;

/* An option of a program by name; whole numbers up to 2^53 and truth values (0 or 1) are given as numbers too. */
typedef struct {
  const char* name;
  double value;
} StemmaOption;

/* Called with new tokens as they come; any value but 0 ends the run early. */
typedef int (*StemmaCallback)(void* user, const int32_t* tokens, int64_t count);

/* Loads the model of a folder (weights.bin, programs.bin and, where there is one, vocabulary.bin) and starts `threads` threads
   (0: one per processor). NULL when that is not possible: the reason is in `error`, a buffer of `error_bytes` bytes. */
StemmaLoaded* stemma_load(const char* folder, int32_t threads, char* error, int64_t error_bytes);

/* Runs a decoding program ("generate") on a prompt of n >= 1 tokens, and calls `callback` (may be NULL) with what it emits.
   Options that are not given have their defaults. Returns the number of tokens emitted, or -1. */
int64_t stemma_generate(StemmaLoaded* model, const char* program, const int32_t* ids, int64_t n, const StemmaOption* options,
                        int64_t option_count, StemmaCallback callback, void* user);

/* The text of a token: `*bytes` bytes of UTF-8, perhaps a part of a character; none for special tokens. NULL without a
   vocabulary.bin, or for a token that the model does not have. Texts of tokens in a row are the text of the row. */
const char* stemma_token_text(StemmaLoaded* model, int32_t token, int64_t* bytes);

/* Why the last call with this model failed. Valid until the next one. */
const char* stemma_error(StemmaLoaded* model);

/* The number of tokens that the model knows, and of positions that prompt and answer may fill. */
int64_t stemma_vocabulary_size(StemmaLoaded* model);
int64_t stemma_context(StemmaLoaded* model);

/* Stops the threads and releases the memory. */
void stemma_free(StemmaLoaded* model);

#ifdef __cplusplus
}
#endif
