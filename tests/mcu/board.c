/* Runs the inputs of vectors.h on a bare board and tells what came out, and what it took, by semihosting:
 *   out INTEGERS   of each input, in hexadecimal
 *   ticks N        of the board's timer, at 25 MHz, for one run
 *   stack N        bytes of stack that the runs have touched
 */
#include <stdint.h>

#include "model.h"
#include "vectors.h" /* COUNT, INPUT_TYPE, inputs */

enum { OUTPUTS = MODEL_OUTPUT_HEIGHT * MODEL_OUTPUT_WIDTH * MODEL_OUTPUT_CHANNELS, FILL = 0x5a5a5a5a };

extern uint32_t data_begin[], data_end[], data_source[], bss_begin[], bss_end[], stack_begin[], stack_end[];

void start(void);

static void stop(void) {
  for (;;) {
  }
}

__attribute__((section(".vectors"), used)) static const uintptr_t vectors[16] = {(uintptr_t)stack_end,
                                                                                 (uintptr_t)start,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop,
                                                                                 0,
                                                                                 0,
                                                                                 0,
                                                                                 0,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop,
                                                                                 0,
                                                                                 (uintptr_t)stop,
                                                                                 (uintptr_t)stop};

static uintptr_t semihosting(uint32_t operation, uintptr_t argument) {
  register uintptr_t r0 __asm__("r0") = operation;
  register uintptr_t r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static void write_text(const char* text) { semihosting(0x04, (uintptr_t)text); }

static void write_number(uint32_t x) {
  char text[10];
  for (int i = 0; i < 8; ++i) text[i] = "0123456789abcdef"[x >> (28 - 4 * i) & 15u];
  text[8] = ' ';
  text[9] = 0;
  write_text(text);
}

#define TIMER ((volatile uint32_t*)0x40000000u) /* control, value, reload; counts down */

int main(void) {
  static int32_t output[OUTPUTS];
  const uint32_t* touched = stack_begin;
  uint32_t ticks = 0;
  uintptr_t here;
  __asm__ volatile("mov %0, sp" : "=r"(here));
  TIMER[2] = UINT32_MAX;
  TIMER[1] = UINT32_MAX;
  TIMER[0] = 1;
  for (volatile uint32_t* word = stack_begin; (uintptr_t)word < here; ++word) *word = FILL;
  for (uint32_t i = 0; i < COUNT; ++i) {
    const uint32_t begun = TIMER[1];
    model_run(inputs + i * (sizeof inputs / COUNT / sizeof *inputs), output);
    ticks = begun - TIMER[1];
    write_text("\nout ");
    for (uint32_t k = 0; k < OUTPUTS; ++k) write_number((uint32_t)output[k]);
  }
  while (*touched == FILL) ++touched;
  write_text("\nticks ");
  write_number(ticks);
  write_text("\nstack ");
  write_number((uint32_t)(here - (uintptr_t)touched));
  write_text("\n");
  return 0;
}

void start(void) {
  const uint32_t* from = data_source;
  for (uint32_t* to = data_begin; to < data_end; ++to) *to = *from++;
  for (uint32_t* to = bss_begin; to < bss_end; ++to) *to = 0;
  (void)main();
  semihosting(0x18, 0x20026); /* exit: the application has ended */
}
