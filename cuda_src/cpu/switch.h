// SPDX-License-Identifier: Apache-2.0
// switch.h - the context switch of fibers.
#ifndef CUPYATTN_CPU_SWITCH_H
#define CUPYATTN_CPU_SWITCH_H

// ca_switch(save, load): keeps the callee-saved registers on the stack and the stack pointer in *save, then goes on
// where `load` was left. It ends in a return: fibers mostly wait at equal call depth, so the predictor stays right.
extern "C" __attribute__((visibility("hidden"))) void ca_switch(void** save, void* load);

// Words that ca_switch takes from a stack, and which of them is the address it goes on at.
#if defined(__x86_64__)
constexpr int SAVED_WORDS = 7, RETURN_WORD = 6;
#else
constexpr int SAVED_WORDS = 20, RETURN_WORD = 11;
#endif

#endif  // CUPYATTN_CPU_SWITCH_H
