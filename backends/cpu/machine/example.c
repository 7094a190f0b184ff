/* Continues a prompt of token ids: ./example FOLDER MAX_NEW_TOKENS TEMPERATURE id id ...

   cc main.c -o example -L. -lNAME -Wl,-rpath,'$ORIGIN' && ./example . 32 0 1 15 208 */
#include <stdio.h>
#include <stdlib.h>

#include "stemma.h"

struct Printer {
  StemmaLoaded* model;
  int as_text;
};

/* Prints tokens as they come: their text where there is a vocabulary, else their ids. */
static int print_tokens(void* user, const int32_t* tokens, int64_t count) {
  struct Printer* printer = user;
  for (int64_t i = 0; i < count; i++) {
    int64_t bytes = 0;
    const char* text = printer->as_text ? stemma_token_text(printer->model, tokens[i], &bytes) : NULL;
    if (text)
      fwrite(text, 1, (size_t)bytes, stdout);
    else
      printf("%d ", (int)tokens[i]);
  }
  fflush(stdout);
  return 0; /* anything else ends the run here */
}

int main(int argc, char** argv) {
  if (argc < 5) {
    fprintf(stderr, "usage: %s FOLDER MAX_NEW_TOKENS TEMPERATURE id id ...\n", argv[0]);
    return 2;
  }
  char error[512];
  StemmaLoaded* model = stemma_load(argv[1], 0, error, sizeof error);
  if (!model) {
    fprintf(stderr, "error: %s\n", error);
    return 1;
  }

  int64_t n = argc - 4;
  int32_t* ids = malloc((size_t)n * sizeof *ids);
  for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)strtol(argv[4 + i], NULL, 10);

  StemmaOption options[] = {
      {"max_new_tokens", strtod(argv[2], NULL)},
      {"temperature", strtod(argv[3], NULL)},
      {"seed", 1},
  };
  struct Printer printer = {model, getenv("STEMMA_IDS") == NULL}; /* STEMMA_IDS=1: print ids, not text */
  int64_t count = stemma_generate(model, "generate", ids, n, options, 3, print_tokens, &printer);
  printf("\n");
  if (count < 0)
    fprintf(stderr, "error: %s\n", stemma_error(model));
  else
    fprintf(stderr, "[%lld tokens]\n", (long long)count);
  free(ids);
  stemma_free(model);
  return count < 0;
}
