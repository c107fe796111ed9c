#include "wordpiece.h"

#include <stdexcept>

#include "unicode.h"

namespace fastbert {
namespace {

std::vector<std::pair<std::string_view, int32_t>> views(
    const std::vector<std::pair<std::string, int32_t>>& vocab) {
  return {vocab.begin(), vocab.end()};
}

}  // namespace

WordPiece::WordPiece(const std::vector<std::pair<std::string, int32_t>>& vocab,
                     const std::string& unknown, size_t max_chars)
    : trie_(views(vocab)), inner_(trie_.descend("##")), max_chars_(max_chars) {
  for (const auto& [token, id] : vocab) {
    if (token == unknown) unknown_id_ = id;
  }
  if (unknown_id_ < 0) {
    throw std::invalid_argument("the vocabulary of " + std::to_string(vocab.size()) +
                                " tokens lacks the unknown token " + unknown);
  }
}

// Calls on_piece(id, end) for each piece found. False if they do not make up the whole word.
template <class OnPiece>
bool WordPiece::split(std::string_view word, OnPiece&& on_piece) const {
  // A character has one byte at least, so only words of more bytes need a count.
  if (word.size() > max_chars_ && count_chars(word) > max_chars_) return false;
  uint32_t from = Trie::kRoot;
  for (size_t at = 0; at < word.size();) {
    if (from == Trie::kNowhere) return false;
    const Trie::Match match = trie_.longest(word.substr(at), from);
    if (match.value < 0) return false;
    at += match.size;
    on_piece(match.value, at);
    from = inner_;
  }
  return true;
}

void WordPiece::encode(std::string_view word, Ints& ids) const {
  const size_t n_before = ids.size();
  if (!split(word, [&](int32_t id, size_t) { ids.push_back(id); })) {
    ids.resize(n_before);
    ids.push_back(unknown_id_);
  }
}

void WordPiece::encode(std::string_view word, Ints& ids, Ints& ends) const {
  const size_t n_before = ids.size();
  const auto add = [&](int32_t id, size_t end) {
    ids.push_back(id);
    ends.push_back(static_cast<int32_t>(end));
  };
  if (!split(word, add)) {
    ends.resize(ends.size() - (ids.size() - n_before));
    ids.resize(n_before);
    add(unknown_id_, word.size());
  }
}

}  // namespace fastbert
