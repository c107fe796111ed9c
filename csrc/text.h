// Texts where they are: UTF-8, or the arrays of code points that Python keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastbert {

enum class Encoding : uint8_t {
  kUtf8,    // valid
  kBytes,   // UTF-8, or what should be
  kLatin1,  // code points of one byte
  kUcs2,    // of two
  kUcs4,    // of four
};

struct Text {
  const void* data = nullptr;
  size_t size = 0;  // code units
  Encoding encoding = Encoding::kUtf8;

  size_t n_bytes() const {
    return encoding == Encoding::kUcs2 ? 2 * size : encoding == Encoding::kUcs4 ? 4 * size : size;
  }
};

// A text that is no Unicode: a surrogate among its code points.
struct LoneSurrogate : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The text in UTF-8: where it is if it is that already, else in `buffer`. Bytes that are not UTF-8
// become U+FFFD as in Python's bytes.decode(errors="replace") if `replace`, else
// std::invalid_argument is thrown. Throws LoneSurrogate.
std::string_view to_utf8(const Text& text, bool replace, std::string& buffer);

}  // namespace fastbert
