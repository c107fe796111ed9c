#include "knowledge.h"

#include <algorithm>
#include <utility>

namespace fastbert {
namespace {

std::vector<AddedToken> raw_ones(std::vector<AddedToken> tokens) {
  const auto normalized = [](const AddedToken& token) { return token.normalized; };
  tokens.erase(std::remove_if(tokens.begin(), tokens.end(), normalized), tokens.end());
  return tokens;
}

std::vector<AddedToken> normalized_ones(const std::vector<AddedToken>& tokens,
                                        const Normalizer& normalizer) {
  std::vector<AddedToken> result;
  Normalized content;
  for (const AddedToken& token : tokens) {
    if (!token.normalized) continue;
    result.push_back(token);
    normalizer.normalize(token.content, content);
    result.back().content = content.text;
  }
  return result;
}

}  // namespace

Knowledge::Knowledge(std::shared_ptr<const WordPiece> pieces_, const Normalizer& normalizer_,
                     const std::vector<AddedToken>& added)
    : pieces(std::move(pieces_)),
      normalizer(normalizer_),
      raw_added(raw_ones(added)),
      normalized_added(normalized_ones(added, normalizer)),
      char_ids(normalizer, *pieces) {
  for (char32_t c = 0; c < 128; ++c) {
    const int32_t id = char_ids[c];
    ascii_ids[c] = std::max(id, 0);
    ascii_count[c] = id >= 0;
  }
}

}  // namespace fastbert
