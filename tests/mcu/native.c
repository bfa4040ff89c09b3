/* Reads inputs from standard input until it ends and writes the outputs' integers to standard output, in the machine's
 * byte order. */
#include <stdio.h>

#include "model.h"

int main(void) {
  static uint8_t input[MODEL_INPUT_HEIGHT * MODEL_INPUT_WIDTH * MODEL_INPUT_CHANNELS];
  static int32_t output[MODEL_OUTPUT_HEIGHT * MODEL_OUTPUT_WIDTH * MODEL_OUTPUT_CHANNELS];
  while (fread(input, sizeof input, 1, stdin) == 1) {
    model_run((const void*)input, output);
    if (fwrite(output, sizeof output, 1, stdout) != 1) return 1;
  }
  return 0;
}
