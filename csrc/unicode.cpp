#include "unicode.h"

#include <algorithm>

#include "unicode_tables.h"

namespace fastbert {
namespace {

constexpr uint8_t kMatcherWhiteSpace = 1;
constexpr uint8_t kMatcherWord = 2;

template <class T>
T lookup(const uint8_t* pages, const T* values, char32_t c) {
  return values[pages[c >> 8] << 8 | (c & 0xFF)];
}

std::u32string_view image(const char32_t* pool, uint16_t start) {
  return {pool + start + 1, pool[start]};
}

}  // namespace

uint8_t char_flags(char32_t c) { return lookup(flags_pages, flags, c); }

uint8_t combining_class(char32_t c) { return lookup(combining_pages, combining, c); }

std::u32string_view decomposition(char32_t c, char32_t (&buffer)[3]) {
  constexpr char32_t kFirst = 0xAC00, kLast = 0xD7A3, kVowels = 21, kTails = 28;
  if (c < kFirst || c > kLast) {
    return image(decomposition_pool, lookup(decomposition_index_pages, decomposition_index, c));
  }
  const char32_t syllable = c - kFirst;
  const char32_t tail = syllable % kTails;
  buffer[0] = 0x1100 + syllable / (kVowels * kTails);
  buffer[1] = 0x1161 + syllable / kTails % kVowels;
  buffer[2] = 0x11A7 + tail;
  return {buffer, tail == 0 ? 2U : 3U};
}

std::u32string_view lowercase(char32_t c) {
  return image(lowercase_pool, lookup(lowercase_index_pages, lowercase_index, c));
}

bool is_white_space(char32_t c) {
  return (lookup(matcher_pages, matcher, c) & kMatcherWhiteSpace) != 0;
}

bool is_word_char(char32_t c) { return (lookup(matcher_pages, matcher, c) & kMatcherWord) != 0; }

void append_utf8(char32_t c, std::string& out) {
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
    return;
  }
  char bytes[4];
  size_t size = 0;
  if (c < 0x800) {
    bytes[size++] = static_cast<char>(0xC0 | c >> 6);
  } else {
    if (c < 0x10000) {
      bytes[size++] = static_cast<char>(0xE0 | c >> 12);
    } else {
      bytes[size++] = static_cast<char>(0xF0 | c >> 18);
      bytes[size++] = static_cast<char>(0x80 | (c >> 12 & 0x3F));
    }
    bytes[size++] = static_cast<char>(0x80 | (c >> 6 & 0x3F));
  }
  bytes[size++] = static_cast<char>(0x80 | (c & 0x3F));
  out.append(bytes, size);
}

size_t count_chars(std::string_view text) {
  return text.size() - static_cast<size_t>(std::count_if(text.begin(), text.end(), is_utf8_tail));
}

}  // namespace fastbert
