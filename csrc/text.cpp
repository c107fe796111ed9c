#include "text.h"

#include <algorithm>
#include <cstring>

#include "unicode.h"

namespace fastbert {
namespace {

constexpr char32_t kReplacement = 0xFFFD;

// The same as put_utf8, without branches that mixed text would make slow; may write kMost bytes.
template <class Unit>
char* put_unit(Unit unit, char* out) {
  const char32_t c = unit;
  if (sizeof(Unit) == 4 && c >= 0x10000) return put_utf8(c, out);
  const bool is_long = c >= 0x80, is_longer = c >= 0x800;
  const char32_t last = 0x80 | (c & 0x3F);
  out[0] = static_cast<char>(is_longer ? 0xE0 | c >> 12 : is_long ? 0xC0 | c >> 6 : c);
  out[1] = static_cast<char>(is_longer ? 0x80 | (c >> 6 & 0x3F) : last);
  if (sizeof(Unit) > 1) out[2] = static_cast<char>(last);
  return out + 1 + is_long + is_longer;
}

template <class Unit>
std::string_view transcode(const Unit* units, size_t size, std::string& buffer) {
  // Bytes that one code unit can take.
  constexpr size_t kMost = sizeof(Unit) + 1 - (sizeof(Unit) == 4);
  if (buffer.size() < kMost * size) buffer.resize(kMost * size);
  const auto is_surrogate = [](Unit unit) {
    return sizeof(Unit) > 1 && unit >> 11 == 0xD800 >> 11;
  };
  char* out = buffer.data();
  bool valid = true;
  const auto put = [&](Unit unit) {
    valid &= !is_surrogate(unit);
    out = put_unit(unit, out);
  };
  constexpr size_t kAtOnce = 16;  // few enough for ASCII between other characters
  size_t i = 0;
  for (; i + kAtOnce <= size; i += kAtOnce) {
    Unit all = 0;
    for (size_t j = 0; j < kAtOnce; ++j) all |= units[i + j];
    if (all < 0x80) {
      for (size_t j = 0; j < kAtOnce; ++j) out[j] = static_cast<char>(units[i + j]);
      out += kAtOnce;
    } else {
      for (size_t j = 0; j < kAtOnce; ++j) put(units[i + j]);
    }
  }
  for (; i < size; ++i) put(units[i]);
  if (!valid) {
    throw LoneSurrogate("must be valid Unicode, got a lone surrogate at character " +
                        std::to_string(std::find_if(units, units + size, is_surrogate) - units));
  }
  return {buffer.data(), static_cast<size_t>(out - buffer.data())};
}

// How many bytes at p belong to the character there, and whether it is whole. Of one that is not,
// the bytes that could have begun a character count: it becomes one U+FFFD.
struct Checked {
  size_t size;
  bool valid;
};

Checked check_char(const unsigned char* p, size_t left) {
  const unsigned char lead = p[0];
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The first tail byte is bounded so that nothing is overlong, a surrogate, or over U+10FFFF.
  const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < size; ++i) {
    if (i == left || p[i] < (i == 1 ? low : 0x80) || p[i] > (i == 1 ? high : 0xBF)) {
      return {i, false};
    }
  }
  return {size, true};
}

// The end of the valid characters from `at` on.
size_t valid_until(std::string_view text, size_t at) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  while (at < text.size()) {
    uint64_t eight;
    if (at + 8 <= text.size()) {
      std::memcpy(&eight, bytes + at, 8);
      if ((eight & 0x8080808080808080U) == 0) {
        at += 8;
        continue;
      }
    }
    const Checked checked = check_char(bytes + at, text.size() - at);
    if (!checked.valid) return at;
    at += checked.size;
  }
  return at;
}

std::string_view checked(std::string_view text, bool replace, std::string& buffer) {
  size_t at = valid_until(text, 0);
  if (at == text.size()) return text;
  if (!replace) {
    throw std::invalid_argument("must be UTF-8, got bytes that are not at byte " +
                                std::to_string(at));
  }
  buffer.clear();
  for (size_t begin = 0;;) {
    buffer.append(text.substr(begin, at - begin));
    if (at == text.size()) return buffer;
    append_utf8(kReplacement, buffer);
    const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
    begin = at + check_char(bytes + at, text.size() - at).size;
    at = valid_until(text, begin);
  }
}

}  // namespace

std::string_view to_utf8(const Text& text, bool replace, std::string& buffer) {
  switch (text.encoding) {
    case Encoding::kLatin1:
      return transcode(static_cast<const uint8_t*>(text.data), text.size, buffer);
    case Encoding::kUcs2:
      return transcode(static_cast<const uint16_t*>(text.data), text.size, buffer);
    case Encoding::kUcs4:
      return transcode(static_cast<const uint32_t*>(text.data), text.size, buffer);
    case Encoding::kBytes:
      return checked({static_cast<const char*>(text.data), text.size}, replace, buffer);
    default:
      return {static_cast<const char*>(text.data), text.size};
  }
}

}  // namespace fastbert
