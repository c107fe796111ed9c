// String arrays of Apache Arrow, read where they are.
#pragma once

#include <cstdint>
#include <vector>

#include "text.h"

// The two structures of the Arrow C data interface, and the stream's, with its names:
// https://arrow.apache.org/docs/format/CDataInterface.html
extern "C" {
struct ArrowSchema {
  const char* format;
  const char* name;
  const char* metadata;
  int64_t flags;
  int64_t n_children;
  ArrowSchema** children;
  ArrowSchema* dictionary;
  void (*release)(ArrowSchema*);
  void* private_data;
};

struct ArrowArray {
  int64_t length;
  int64_t null_count;
  int64_t offset;
  int64_t n_buffers;
  int64_t n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

struct ArrowArrayStream {
  int (*get_schema)(ArrowArrayStream*, ArrowSchema* out);
  int (*get_next)(ArrowArrayStream*, ArrowArray* out);
  const char* (*get_last_error)(ArrowArrayStream*);
  void (*release)(ArrowArrayStream*);
  void* private_data;
};
}

namespace fastbert {

// Appends views of the array's values: of type utf8, large_utf8, utf8_view, and the same of binary.
// Throws std::invalid_argument when it is of another type or a value is null.
void add_arrow_texts(const ArrowSchema& schema, const ArrowArray& array, std::vector<Text>& texts);

}  // namespace fastbert
