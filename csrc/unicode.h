// UTF-8, and what tokenizers do with each code point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastbert {

enum CharFlags : uint8_t {
  kRemoved = 1,      // deleted by clean_text
  kSpace = 2,        // made a space by clean_text
  kCjk = 4,          // gets a space on both sides
  kPunctuation = 8,  // a word of its own
  kMark = 16,        // deleted by strip_accents
  kDecomposes = 32,  // has a canonical decomposition
  kLowers = 64,      // has another lowercase
  kCombining = 128,  // has a canonical combining class other than 0
};

// The entry of code point c is values[pages[c >> 8] << 8 | (c & 0xFF)].
template <class T>
struct TwoStage {
  T operator[](char32_t c) const { return values[pages[c >> 8] << 8 | (c & 0xFF)]; }

  const uint16_t* pages;
  const T* values;
};

class UnicodeTables {
 public:
  // Those of HF tokenizers, which generate_unicode_tables.py has made.
  UnicodeTables();

  // `flags` and `combining` hold a byte for each code point: CharFlags, and canonical combining
  // classes. kDecomposes and kCombining are set here, from the other two arguments. What
  // `decompositions` says of Hangul syllables is not looked at. No character has a lowercase.
  // Throws std::invalid_argument where there is not a byte for each code point.
  UnicodeTables(std::string_view flags, std::string_view combining,
                const std::vector<std::pair<char32_t, std::u32string>>& decompositions);

  UnicodeTables(const UnicodeTables&) = delete;
  UnicodeTables& operator=(const UnicodeTables&) = delete;

  // A combination of CharFlags.
  uint8_t char_flags(char32_t c) const { return flags_[c]; }

  // Canonical combining class: 0 unless kCombining.
  uint8_t combining_class(char32_t c) const { return combining_[c]; }

  // Up to three jamo of a Hangul syllable, or the table's entry: all of the canonical
  // decomposition, not only its first step. Empty unless kDecomposes. `buffer` holds the jamo.
  std::u32string_view decomposition(char32_t c, char32_t (&buffer)[3]) const;

  // Empty unless kLowers.
  std::u32string_view lowercase(char32_t c) const;

 private:
  std::vector<uint16_t> own_pages_, own_index_;
  std::vector<uint8_t> own_flags_, own_combining_;
  std::u32string own_pool_;

  TwoStage<uint8_t> flags_, combining_;
  TwoStage<uint16_t> decomposition_index_, lowercase_index_;  // where images are in the pools
  const char32_t* decomposition_pool_;                        // the size of each image before it
  const char32_t* lowercase_pool_;
};

// `\s` and `\w` of the matcher of added tokens, which are not the classes of clean_text.
bool is_white_space(char32_t c);
bool is_word_char(char32_t c);

struct Decoded {
  char32_t c;
  uint32_t size;  // bytes
};

// The first character of valid UTF-8.
inline Decoded decode_utf8(const char* p) {
  const auto byte = [p](int i) { return static_cast<unsigned char>(p[i]); };
  const auto tail = [&byte](int i) { return static_cast<char32_t>(byte(i) & 0x3F); };
  if (byte(0) < 0x80) return {byte(0), 1};
  if (byte(0) < 0xE0) return {(byte(0) & 0x1FU) << 6 | tail(1), 2};
  if (byte(0) < 0xF0) return {(byte(0) & 0x0FU) << 12 | tail(1) << 6 | tail(2), 3};
  return {(byte(0) & 0x07U) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4};
}

inline bool is_ascii(char byte) { return static_cast<signed char>(byte) >= 0; }

// True on every byte of a character but its first.
inline bool is_utf8_tail(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// Writes 1 to 4 bytes at `out`; gives their end.
inline char* put_utf8(char32_t c, char* out) {
  if (c < 0x80) {
    *out++ = static_cast<char>(c);
    return out;
  }
  if (c < 0x800) {
    *out++ = static_cast<char>(0xC0 | c >> 6);
  } else {
    if (c < 0x10000) {
      *out++ = static_cast<char>(0xE0 | c >> 12);
    } else {
      *out++ = static_cast<char>(0xF0 | c >> 18);
      *out++ = static_cast<char>(0x80 | (c >> 12 & 0x3F));
    }
    *out++ = static_cast<char>(0x80 | (c >> 6 & 0x3F));
  }
  *out++ = static_cast<char>(0x80 | (c & 0x3F));
  return out;
}

void append_utf8(char32_t c, std::string& out);

// Number of characters of valid UTF-8.
size_t count_chars(std::string_view text);

}  // namespace fastbert
