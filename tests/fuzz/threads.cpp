// Eight threads encode with one tokenizer, each with options of its own, on the shared pool: for
// ThreadSanitizer. What they give must be what one thread gives.
#include <thread>

#include "small.h"

namespace fastbert {
namespace {

std::vector<int32_t> ids_of(const Tokenizer& tokenizer, const Batch& batch, size_t max_length,
                            size_t n_threads) {
  EncodeOptions options;
  options.truncation = Truncation::kLongestFirst;
  options.max_length = max_length;
  options.stride = max_length / 4;
  options.overflow = max_length % 2 == 0;
  options.truncate_left = max_length % 3 == 0;
  options.reading.details = max_length % 4 < 2;
  const Rows rows = tokenizer.encode(batch, options, n_threads);
  std::vector<int32_t> ids(rows.n_tokens());
  rows.write(Column::kIds, {}, ids.data());
  return ids;
}

}  // namespace
}  // namespace fastbert

int main() {
  using namespace fastbert;
  const Tokenizer tokenizer(small_pieces(), normalizer(7), added_tokens(1), kCls, kSep);
  std::vector<std::string> texts;
  for (int i = 0; i < 6000; ++i) {
    texts.push_back("thing" + std::to_string(i) + " caf\u00e9s, \u65e5\u672c [MASK] \uac01 a.b");
  }
  Batch batch;
  for (const std::string& text : texts) {
    const size_t at = batch.texts.size();
    batch.texts.push_back({text.data(), text.size(), Encoding::kBytes});
    batch.inputs.push_back({{at, at + 1}, {}, false});
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 8; ++i) {
    threads.emplace_back([&, max_length = 6 + i] {
      const auto expected = ids_of(tokenizer, batch, max_length, 1);
      for (size_t n_threads : {0, 2, 3, 5}) {
        require(ids_of(tokenizer, batch, max_length, n_threads) == expected, "equal to one thread");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::puts("eight threads passed");
}
