#include "arrow.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastbert {
namespace {

// What Arrow says is UTF-8 is checked as other bytes are: nothing has made sure of it.
Text to_text(const char* data, size_t size) { return {data, size, Encoding::kBytes}; }

// Value i is bytes offsets[i] to offsets[i + 1].
template <class Offset>
void add_contiguous(const ArrowArray& array, std::vector<Text>& texts) {
  const auto* offsets = static_cast<const Offset*>(array.buffers[1]) + array.offset;
  const auto* data = static_cast<const char*>(array.buffers[2]);
  for (int64_t i = 0; i < array.length; ++i) {
    texts.push_back(to_text(data + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i])));
  }
}

// A value of up to 12 bytes is in its view, a longer one in the buffer whose number the view holds.
void add_views(const ArrowArray& array, std::vector<Text>& texts) {
  struct View {
    int32_t size;
    char inlined[12];  // or the first 4 bytes, the number of the buffer, the place in it
  };
  const auto* views = static_cast<const View*>(array.buffers[1]) + array.offset;
  for (int64_t i = 0; i < array.length; ++i) {
    const View& view = views[i];
    const char* data = view.inlined;
    if (view.size > 12) {
      int32_t place[2];
      std::memcpy(place, view.inlined + 4, sizeof place);
      data = static_cast<const char*>(array.buffers[2 + place[0]]) + place[1];
    }
    texts.push_back(to_text(data, static_cast<size_t>(view.size)));
  }
}

void check_no_nulls(const ArrowArray& array) {
  const auto* valid = static_cast<const uint8_t*>(array.buffers[0]);
  if (valid == nullptr || array.null_count == 0) return;
  for (int64_t i = 0; i < array.length; ++i) {
    const int64_t bit = array.offset + i;
    if ((valid[bit / 8] >> bit % 8 & 1) == 0) {
      throw std::invalid_argument("texts must not be null, got a null at " + std::to_string(i) +
                                  " of an Arrow array");
    }
  }
}

}  // namespace

void add_arrow_texts(const ArrowSchema& schema, const ArrowArray& array, std::vector<Text>& texts) {
  const std::string_view format = schema.dictionary == nullptr ? schema.format : "dictionary";
  const bool views = format == "vu" || format == "vz";
  const bool large = format == "U" || format == "Z";
  if (!views && !large && format != "u" && format != "z") {
    throw std::invalid_argument(
        "texts must be an Arrow array of strings, got one of Arrow format '" + std::string(format) +
        "'");
  }
  if (array.length == 0) return;
  check_no_nulls(array);
  texts.reserve(texts.size() + static_cast<size_t>(array.length));
  if (views) {
    add_views(array, texts);
  } else if (large) {
    add_contiguous<int64_t>(array, texts);
  } else {
    add_contiguous<int32_t>(array, texts);
  }
}

}  // namespace fastbert
