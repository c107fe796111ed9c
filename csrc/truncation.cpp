#include "truncation.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastbert {
namespace {

Lengths longest_first(Lengths lengths, size_t room) {
  const bool swap = lengths.first > lengths.second;
  size_t shorter = std::min(lengths.first, lengths.second);
  size_t longer = shorter > room ? shorter : std::max(shorter, room - shorter);
  if (shorter + longer > room) {
    shorter = room / 2;
    longer = shorter + room % 2;
  }
  return swap ? Lengths{longer, shorter} : Lengths{shorter, longer};
}

}  // namespace

Lengths truncated(Lengths lengths, bool has_second, size_t room, Truncation truncation) {
  const size_t total = lengths.first + lengths.second;
  if (truncation == Truncation::kNone || total <= room) return lengths;
  if (room == 0) return {0, 0};
  if (truncation == Truncation::kLongestFirst) {
    return has_second ? longest_first(lengths, room) : Lengths{room, 0};
  }
  if (truncation == Truncation::kOnlySecond && !has_second) {
    throw std::invalid_argument("truncation='only_second' needs a text_pair to truncate");
  }
  const size_t excess = total - room;
  size_t& target = truncation == Truncation::kOnlyFirst ? lengths.first : lengths.second;
  if (target <= excess) {
    throw std::invalid_argument("the text to truncate has " + std::to_string(target) +
                                " tokens: too short to take away the " + std::to_string(excess) +
                                " that are over max_length");
  }
  target -= excess;
  return lengths;
}

std::vector<Window> windows(size_t length, size_t size, size_t stride, bool from_end) {
  if (length <= size) return {{0, length}};
  if (size == 0) return {{0, 0}, {0, length}};
  if (stride >= size) {
    throw std::invalid_argument("stride must be less than the " + std::to_string(size) +
                                " tokens that truncation leaves of the text, got " +
                                std::to_string(stride));
  }
  std::vector<Window> result;
  const size_t step = size - stride;
  if (from_end) {
    size_t end = length;
    for (; end > size; end -= step) result.push_back({end - size, end});
    result.push_back({0, end});
  } else {
    size_t begin = 0;
    for (; begin + size < length; begin += step) result.push_back({begin, begin + size});
    result.push_back({begin, length});
  }
  return result;
}

}  // namespace fastbert
