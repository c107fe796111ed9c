// How many tokens of a text, or of a pair, fit, and the windows over a text that is too long.
#pragma once

#include <cstddef>
#include <vector>

namespace fastbert {

enum class Truncation { kNone, kLongestFirst, kOnlyFirst, kOnlySecond };

struct Lengths {
  size_t first, second;
};

// The lengths that bring first + second down to `room`. kLongestFirst shortens the longer text
// until both are equal, then both; of two equally long the second gets the odd token:
//
//   (9, 3) in 8 -> (5, 3);   (9, 7) in 9 -> (5, 4);   (7, 7) in 9 -> (4, 5)
//
// Throws std::invalid_argument when kOnlyFirst or kOnlySecond would leave nothing of that text.
Lengths truncated(Lengths lengths, bool has_second, size_t room, Truncation truncation);

struct Window {
  size_t begin, end;
};

// Windows of `size` tokens over a text of `length`, each sharing `stride` tokens with the one
// before it; from the end backwards if `from_end`. One window if the text fits. With size 0, an
// empty window and then all of the text, as HF tokenizers does it.
// Throws std::invalid_argument when stride >= size > 0.
std::vector<Window> windows(size_t length, size_t size, size_t stride, bool from_end);

}  // namespace fastbert
