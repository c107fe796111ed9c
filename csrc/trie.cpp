#include "trie.h"

#include <algorithm>
#include <stdexcept>

namespace fastbert {

// Places nodes one after the other, each family of children where its labels all fall on free
// nodes. Free nodes of the last few blocks are in a ring, so that none of the used ones is visited.
class Trie::Builder {
 public:
  explicit Builder(std::vector<Node>& nodes) : nodes_(nodes) {
    add_block();
    take(kRoot);
  }

  // A base that is nobody's yet, with all of nodes base ^ label free.
  uint32_t find_base(const std::vector<uint8_t>& labels) {
    for (uint32_t free = first_; free != kNowhere; free = next_[free]) {
      const uint32_t base = free ^ labels[0];
      const bool fits =
          !base_used_[base] && std::all_of(labels.begin(), labels.end(),
                                           [&](uint8_t label) { return is_free_[base ^ label]; });
      if (fits) return claim(base, labels);
    }
    add_block();
    return claim(static_cast<uint32_t>(nodes_.size()) - kBlock, labels);
  }

 private:
  static constexpr uint32_t kBlock = 256;
  static constexpr uint32_t kOpenBlocks =
      16;  // older ones are full but for nodes not worth a search

  uint32_t claim(uint32_t base, const std::vector<uint8_t>& labels) {
    base_used_[base] = true;
    for (const uint8_t label : labels) {
      take(base ^ label);
      nodes_[base ^ label].label = label;
    }
    return base;
  }

  void add_block() {
    const auto begin = static_cast<uint32_t>(nodes_.size());
    if (begin + kBlock > 1U << 22) throw std::invalid_argument("too many tokens for the trie");
    nodes_.resize(begin + kBlock);
    is_free_.resize(begin + kBlock, false);
    base_used_.resize(begin + kBlock, false);
    base_used_[0] = true;  // a leaf's: nothing may look like its child
    next_.resize(begin + kBlock, kNowhere);
    previous_.resize(begin + kBlock, kNowhere);
    for (uint32_t i = begin; i < begin + kBlock; ++i) {
      is_free_[i] = true;
      previous_[i] = last_;
      (last_ == kNowhere ? first_ : next_[last_]) = i;
      last_ = i;
    }
    const uint32_t open = kOpenBlocks * kBlock;
    while (first_ != kNowhere && first_ + open < begin + kBlock) take(first_);
  }

  void take(uint32_t node) {
    is_free_[node] = false;
    (previous_[node] == kNowhere ? first_ : next_[previous_[node]]) = next_[node];
    (next_[node] == kNowhere ? last_ : previous_[next_[node]]) = previous_[node];
  }

  std::vector<Node>& nodes_;
  std::vector<bool> is_free_, base_used_;
  std::vector<uint32_t> next_, previous_;
  uint32_t first_ = kNowhere, last_ = kNowhere;
};

Trie::Trie(std::vector<std::pair<std::string_view, int32_t>> entries) {
  std::sort(entries.begin(), entries.end());
  Builder builder(nodes_);

  // entries[begin, end) share their first `depth` bytes, which lead to `node`.
  struct Family {
    uint32_t node;
    size_t begin, end, depth;
  };
  std::vector<Family> todo{{kRoot, 0, entries.size(), 0}};
  std::vector<uint8_t> labels;
  std::vector<size_t> bounds;
  std::vector<std::pair<uint32_t, int32_t>> found;
  while (!todo.empty()) {
    Family family = todo.back();
    todo.pop_back();
    if (family.begin != family.end && entries[family.begin].first.size() == family.depth) {
      nodes_[family.node].has_value = true;
      found.emplace_back(family.node, entries[family.begin++].second);
    }
    if (family.begin == family.end) continue;
    labels.clear();
    bounds.clear();
    for (size_t i = family.begin; i < family.end; ++i) {
      const auto label = static_cast<uint8_t>(entries[i].first[family.depth]);
      if (labels.empty() || labels.back() != label) {
        labels.push_back(label);
        bounds.push_back(i);
      }
    }
    bounds.push_back(family.end);
    const uint32_t base = builder.find_base(labels);
    nodes_[family.node].base = base;
    for (size_t i = 0; i < labels.size(); ++i) {
      todo.push_back({base ^ labels[i], bounds[i], bounds[i + 1], family.depth + 1});
    }
  }
  values_.resize(nodes_.size());
  for (const auto& [node, value] : found) values_[node] = value;
}

uint32_t Trie::descend(std::string_view path) const {
  uint32_t node = kRoot;
  for (const char c : path) {
    const uint32_t byte = static_cast<unsigned char>(c);
    const uint32_t child = nodes_[node].base ^ byte;
    if (nodes_[child].label != byte) return kNowhere;
    node = child;
  }
  return node;
}

}  // namespace fastbert
