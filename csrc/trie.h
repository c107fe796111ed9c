// A map from byte strings to non-negative numbers that finds the longest key in front of a text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastbert {

// A double-array trie: the child of a node for byte b, if there is one, is at nodes_[base ^ b] and
// bears the label b. No two nodes share a base, so the label alone tells whose child it is.
class Trie {
 public:
  struct Match {
    int32_t value;  // -1: no key fits
    size_t size;    // bytes
  };
  static constexpr uint32_t kRoot = 0;
  static constexpr uint32_t kNowhere = UINT32_MAX;

  // Keys must be distinct and not empty. Throws std::invalid_argument when there are too many.
  explicit Trie(std::vector<std::pair<std::string_view, int32_t>> entries);

  // The node at the end of `path`, or kNowhere.
  uint32_t descend(std::string_view path) const;

  // The longest key that is `from`'s path and then the beginning of `text`; size counts in `text`.
  Match longest(std::string_view text, uint32_t from = kRoot) const {
    uint32_t node = from, last = kNowhere;  // of those with a value
    size_t size = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const uint32_t byte = static_cast<unsigned char>(text[i]);
      const uint32_t child = nodes_[node].base ^ byte;
      if (nodes_[child].label != byte) break;
      node = child;
      if (nodes_[node].has_value) {
        last = node;
        size = i + 1;
      }
    }
    return {last == kNowhere ? -1 : values_[last], size};
  }

 private:
  class Builder;

  static constexpr uint32_t kNoLabel = 256;
  // Small, since the time that a word takes is the time that its nodes take to come from memory.
  struct Node {
    uint32_t base : 22;  // 0: a leaf
    uint32_t has_value : 1;
    uint32_t label : 9;
    Node() : base(0), has_value(0), label(kNoLabel) {}
  };
  std::vector<Node> nodes_;
  std::vector<int32_t> values_;  // of each node
};

}  // namespace fastbert
