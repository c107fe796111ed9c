#include "added_tokens.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <utility>

#include "unicode.h"

namespace fastbert {
namespace {

std::vector<std::pair<std::string_view, int32_t>> places(const std::vector<AddedToken>& tokens) {
  std::vector<std::pair<std::string_view, int32_t>> entries;
  std::set<std::string_view> seen;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::string_view content = tokens[i].content;
    if (content.empty()) {
      throw std::invalid_argument("added token " + std::to_string(tokens[i].id) +
                                  " is empty once normalised: it would match everywhere");
    }
    if (seen.insert(content).second) entries.emplace_back(content, static_cast<int32_t>(i));
  }
  return entries;
}

// The first byte of the character before `at`, which is not 0.
size_t previous_char(std::string_view text, size_t at) {
  do {
    --at;
  } while (is_utf8_tail(text[at]));
  return at;
}

bool is_word_at(std::string_view text, size_t at) {
  return at < text.size() && is_word_char(decode_utf8(text.data() + at).c);
}

bool is_word_before(std::string_view text, size_t at) {
  return at > 0 && is_word_at(text, previous_char(text, at));
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), trie_(places(tokens_)), begins_{} {
  for (const AddedToken& token : tokens_) {
    begins_[static_cast<unsigned char>(token.content[0])] = true;
  }
  if (std::count(begins_, begins_ + 256, true) == 1) {
    only_begin_ = static_cast<int>(std::find(begins_, begins_ + 256, true) - begins_);
  }
}

size_t AddedTokens::next_begin(std::string_view text, size_t at) const {
  if (only_begin_ >= 0) return std::min(text.find(static_cast<char>(only_begin_), at), text.size());
  while (at < text.size() && !begins_[static_cast<unsigned char>(text[at])]) ++at;
  return at;
}

void AddedTokens::find(std::string_view text, bool with_special,
                       std::vector<Match>& matches) const {
  matches.clear();
  if (tokens_.empty()) return;
  size_t taken = 0;  // the end of the last match
  for (size_t at = 0; (at = next_begin(text, at)) < text.size();) {
    const Trie::Match found = trie_.longest(text.substr(at));
    if (found.value < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found.value)];
    size_t begin = at;
    size_t end = at + found.size;
    at = end;  // the search goes on after the content, whether the match counts or not
    if (token.special && !with_special) continue;
    if (token.single_word && (is_word_before(text, begin) || is_word_at(text, end))) continue;
    if (token.lstrip) {
      while (begin > taken) {
        const size_t before = previous_char(text, begin);
        if (!is_white_space(decode_utf8(text.data() + before).c)) break;
        begin = before;
      }
    }
    if (token.rstrip) {
      while (end < text.size()) {
        const Decoded next = decode_utf8(text.data() + end);
        if (!is_white_space(next.c)) break;
        end += next.size;
      }
    }
    if (end <= taken) continue;  // white space that the last match has swallowed
    matches.push_back({std::max(begin, taken), end, token.id});
    taken = end;
  }
}

}  // namespace fastbert
