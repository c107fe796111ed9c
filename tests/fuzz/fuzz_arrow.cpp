// Arrow arrays made as Arrow says, of any lengths, offsets and nulls: the values come back.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arrow.h"
#include "small.h"

namespace fastbert {
namespace {

// The array in buffers of just the size that it needs.
struct Array {
  std::vector<char> validity, places, data, more_data;

  std::vector<std::string> read(const char* format, size_t n, size_t offset, bool has_nulls) {
    const auto pointer = [](std::vector<char>& buffer) -> const void* { return buffer.data(); };
    const void* buffers[] = {has_nulls ? pointer(validity) : nullptr, pointer(places),
                             pointer(data), pointer(more_data)};
    ArrowArray array{};
    array.length = static_cast<int64_t>(n);
    array.null_count = has_nulls ? -1 : 0;
    array.offset = static_cast<int64_t>(offset);
    array.buffers = buffers;
    ArrowSchema schema{};
    schema.format = format;
    std::vector<Text> texts;
    add_arrow_texts(schema, array, texts);
    std::vector<std::string> result;
    for (const Text& text : texts) {
      require(text.encoding == Encoding::kBytes, "bytes are checked");
      result.emplace_back(static_cast<const char*>(text.data), text.size);
    }
    return result;
  }
};

template <class T>
void append(const T& value, std::vector<char>& to) {
  const auto* bytes = reinterpret_cast<const char*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

template <class Offset>
void add_contiguous(const std::vector<std::string>& values, Array& array) {
  for (const std::string& value : values) {
    append(static_cast<Offset>(array.data.size()), array.places);
    array.data.insert(array.data.end(), value.begin(), value.end());
  }
  append(static_cast<Offset>(array.data.size()), array.places);
}

void add_views(const std::vector<std::string>& values, Array& array) {
  bool more = false;  // the buffers take turns
  for (const std::string& value : values) {
    char rest[12] = {};
    if (value.size() <= sizeof rest) {
      std::copy(value.begin(), value.end(), rest);
    } else {
      more = !more;
      auto& data = more ? array.more_data : array.data;
      const int32_t place[] = {more, static_cast<int32_t>(data.size())};
      std::copy_n(value.data(), 4, rest);
      std::memcpy(rest + 4, place, sizeof place);
      data.insert(data.end(), value.begin(), value.end());
    }
    append(static_cast<int32_t>(value.size()), array.places);
    array.places.insert(array.places.end(), rest, rest + sizeof rest);
  }
}

}  // namespace
}  // namespace fastbert

// An input is the format, the offset, how many bits of nulls follow, and values between 0xFF.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fastbert;
  if (size < 4) return 0;
  constexpr const char* kFormats[] = {"u", "z", "U", "Z", "vu", "vz"};
  std::vector<std::string> values(1);
  for (size_t i = 4; i < size; ++i) {
    if (data[i] == 0xFF) {
      values.emplace_back();
    } else {
      values.back().push_back(static_cast<char>(data[i]));
    }
  }
  const size_t offset = std::min<size_t>(data[1], values.size());
  const bool has_nulls = data[2] & 1;
  bool any_null = false;

  Array array;
  array.validity.resize((values.size() + 7) / 8, static_cast<char>(0xFF));
  if (has_nulls) {
    const size_t null = data[3] % (values.size() + 8);  // or padding behind the values
    if (null / 8 < array.validity.size()) {
      array.validity[null / 8] = static_cast<char>(~(1 << null % 8));
    }
    any_null = null >= offset && null < values.size();
  }
  const size_t format = data[0] % 6;
  if (format < 2) add_contiguous<int32_t>(values, array);
  if (format == 2 || format == 3) add_contiguous<int64_t>(values, array);
  if (format > 3) add_views(values, array);
  for (auto* buffer : {&array.validity, &array.places, &array.data, &array.more_data}) {
    buffer->shrink_to_fit();
  }
  try {
    const auto read = array.read(kFormats[format], values.size() - offset, offset, has_nulls);
    values.erase(values.begin(), values.begin() + static_cast<ptrdiff_t>(offset));
    require(!any_null && read == values, "the values are read");
  } catch (const std::invalid_argument&) {
    require(any_null, "refused just if null");
  }
  return 0;
}
