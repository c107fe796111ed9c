// Text in blocks of 64 bytes: where words can end, and what is more than plain ASCII.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert {

constexpr size_t kBlock = 64;

// Bit i is about byte i. No bit in the first two: an ASCII letter or digit.
struct Block {
  uint64_t boundary;  // ASCII white space or punctuation
  uint64_t other;     // not ASCII, or a control character, which is removed
  uint64_t space;     // ASCII white space
};

// Looks at the `size` bytes of `text` in size / 64 + 1 blocks. What follows them in the last one
// counts as one space, then nothing. Copies the text to `copy`, ASCII in lower case if `lower`,
// and spaces behind it, up to the end of the last block.
using Classify = void (*)(const char* text, size_t size, bool lower, char* copy, Block* blocks);

// The fastest one that this CPU runs. All do the same.
Classify best_classify();

// What that one is made of, for people to read.
const char* best_instructions();

// For tests: by name, "plain", "avx2" or "avx512"; nullptr where this CPU does not run it.
Classify find_classify(const char* name);

}  // namespace fastbert
