// All ways from a text to its tokens must agree: cold and warm caches, each Classify, any encoding
// of the text, any number of threads, with and without details, and the way through the whole
// normalised text, which has little in common with the fast one.
//
// An input is five bytes of options (see Case), then texts with 0xFF between them.
#include <algorithm>
#include <cstring>
#include <map>
#include <optional>

#include "small.h"
#include "unicode.h"

namespace fastbert {
namespace {

constexpr char kNever[] = "no text is ever going to hold this 0x5DEECE66D";

// Texts in memory of their very size, so that reading past one is seen.
template <class Unit>
using Units = std::vector<Unit>;

struct Case {
  static constexpr size_t kHeader = 5;

  Case(const uint8_t* data, size_t size)
      : normalizer_options(data[0] & 7),
        added(data[1] % 3),
        is_split(data[0] & 32),
        has_pairs(data[0] & 64),
        many(data[0] & 128 && data[4] < 4 && !(data[1] & 64)) {
    options.reading.split_special_tokens = data[0] & 8;
    options.reading.replace = data[0] & 16;
    options.reading.details = true;
    options.truncation = static_cast<Truncation>(data[1] >> 2 & 3);
    options.add_special_tokens = (data[1] & 16) == 0;
    options.truncate_left = data[1] & 32;
    options.overflow = data[1] & 64 && size < 256;  // rows may be as many as its square
    options.max_length = data[2];
    options.stride = data[3] % 16;

    // Filler puts the first text across the end of a chunk: inside a word, behind separators, or in
    // a run of characters that stand alone.
    const std::string filler = data[3] & 128 ? "\u65e5" : data[1] & 128 ? " " : "a";
    const size_t n_filler = data[4] >= 192 ? 8192 + 192 - data[4] : 0;
    std::string text;
    while (text.size() + filler.size() <= n_filler) text += filler;
    for (size_t i = kHeader; i < size; ++i) {
      if (data[i] != 0xFF) {
        text.push_back(static_cast<char>(data[i]));
      } else {
        texts.emplace_back(text.begin(), text.end());
        text.clear();
      }
    }
    texts.emplace_back(text.begin(), text.end());
  }

  int normalizer_options;
  int added;
  bool is_split;
  bool has_pairs;
  bool many;  // repeats the inputs until there is work for several threads
  EncodeOptions options;
  std::vector<Units<char>> texts;
};

// The code points of UTF-8; nothing if it is not valid. Knows no more than what UTF-8 is a code of:
// what decodes must encode to the same bytes.
std::optional<std::u32string> code_points(const Units<char>& text) {
  std::u32string result;
  for (size_t at = 0; at < text.size();) {
    char bytes[4] = {};
    std::copy_n(text.data() + at, std::min<size_t>(4, text.size() - at), bytes);
    const Decoded decoded = decode_utf8(bytes);
    if (decoded.c > 0x10FFFF || (decoded.c >= 0xD800 && decoded.c < 0xE000)) return {};
    std::string again;
    append_utf8(decoded.c, again);
    if (at + again.size() > text.size() || again != std::string(bytes, again.size())) return {};
    result.push_back(decoded.c);
    at += again.size();
  }
  return result;
}

template <class Unit>
Units<Unit> units(const std::u32string& points) {
  return {points.begin(), points.end()};
}

template <class Unit>
Text view(const Units<Unit>& units, Encoding encoding) {
  return {units.data(), units.size(), encoding};
}

struct Outcome {
  std::string error;
  std::vector<int32_t> ids, spans, words;
  std::vector<std::pair<size_t, std::string>> matched;

  bool operator==(const Outcome& other) const {
    return error == other.error && ids == other.ids && spans == other.spans &&
           words == other.words && matched == other.matched;
  }
};

constexpr size_t kNoLimit = SIZE_MAX;

Outcome read(Encoder& encoder, const std::vector<Text>& texts, bool is_split,
             const Reading& reading, size_t limit = kNoLimit) {
  Tokens tokens;
  try {
    encoder.encode(texts.data(), texts.size(), is_split, limit, reading, tokens);
  } catch (const std::invalid_argument& error) {
    return {error.what(), {}, {}, {}, {}};
  }
  const auto values = [](const Ints& ints) { return std::vector(ints.begin(), ints.end()); };
  return {{}, values(tokens.ids), values(tokens.spans), values(tokens.words), tokens.matched};
}

// What is known under one choice of options, by the way that texts take.
struct Ways {
  explicit Ways(int normalizer_options, int added_) : added(added_) {
    const auto pieces = small_pieces();
    auto tokens = added_tokens(added);
    fast.emplace(pieces, normalizer(normalizer_options), tokens);
    plain.emplace(pieces, normalizer(normalizer_options), tokens);
    plain->classify = find_classify("plain");
    tokenizer.emplace(pieces, normalizer(normalizer_options), tokens, kCls, kSep);
    tokens.push_back({kNever, 999, false, false, false, true, false});
    whole.emplace(pieces, normalizer(normalizer_options), tokens);
    warm.emplace(*fast);
    plain_warm.emplace(*plain);
    whole_warm.emplace(*whole);
  }

  int added;
  std::optional<Knowledge> fast, plain, whole;
  std::optional<Tokenizer> tokenizer;
  std::optional<Encoder> warm, plain_warm, whole_warm;  // by all inputs so far
};

Ways& ways_of(const Case& given) {
  static std::map<std::pair<int, int>, Ways> all;
  const auto key = std::pair(given.normalizer_options, given.added);
  return all.try_emplace(key, key.first, key.second).first->second;
}

void check_details(const Outcome& outcome, size_t n_chars, bool is_split) {
  require(outcome.spans.size() == 2 * outcome.ids.size(), "two numbers a span");
  require(outcome.words.size() == outcome.ids.size(), "a word for each token");
  for (size_t i = 0; i < outcome.ids.size(); ++i) {
    const int32_t begin = outcome.spans[2 * i], end = outcome.spans[2 * i + 1];
    require(0 <= begin && begin < end, "spans begin before they end");
    require(is_split || static_cast<size_t>(end) <= n_chars, "spans are in the text");
    const int32_t before = i == 0 ? 0 : outcome.words[i - 1];
    const int32_t step = outcome.words[i] - before;
    require(step >= 0 && (is_split || step <= 1), "words are counted");
    const bool same_text = i > 0 && (!is_split || step == 0);
    require(!same_text || outcome.spans[2 * i - 2] <= begin, "spans follow one another");
  }
}

// The tokens of some texts as one input, which all ways agree on.
Outcome check_ways(const Case& given, size_t begin, size_t end, Encoder& cold) {
  Ways& ways = ways_of(given);
  std::vector<Text> texts, wide, narrow, own;
  std::vector<std::u32string> points;
  std::vector<Units<uint8_t>> latin1;
  std::vector<Units<uint16_t>> ucs2;
  std::vector<Units<uint32_t>> ucs4;
  size_t n_chars = 0;
  for (size_t i = begin; i < end; ++i) {
    texts.push_back(view(given.texts[i], Encoding::kBytes));
    if (auto valid = code_points(given.texts[i])) points.push_back(*valid);
  }
  const bool valid = points.size() == end - begin;
  for (size_t i = 0; i < points.size(); ++i) {
    const char32_t most =
        points[i].empty() ? 0 : *std::max_element(points[i].begin(), points[i].end());
    n_chars = std::max(n_chars, points[i].size());
    ucs4.push_back(units<uint32_t>(points[i]));
    wide.push_back(view(ucs4.back(), Encoding::kUcs4));
    if (most < 0x100) {
      latin1.push_back(units<uint8_t>(points[i]));
      narrow.push_back(view(latin1.back(), Encoding::kLatin1));
    } else if (most < 0x10000) {
      ucs2.push_back(units<uint16_t>(points[i]));
      narrow.push_back(view(ucs2.back(), Encoding::kUcs2));
    } else {
      narrow.push_back(wide.back());
    }
    own.push_back(view(given.texts[begin + i], Encoding::kUtf8));
  }

  Reading reading = given.options.reading;
  const auto check = [&](Encoder& encoder, const std::vector<Text>& from, const Outcome& expected,
                         const char* what) {
    require(read(encoder, from, given.is_split, reading) == expected, what);
  };
  const Outcome expected = read(cold, texts, given.is_split, reading);
  require(expected.error.empty() == (valid || reading.replace), "refused just if not UTF-8");
  if (expected.error.empty() && valid) check_details(expected, n_chars, given.is_split);
  Outcome bare = expected;
  bare.spans.clear();
  bare.words.clear();
  bare.matched.clear();
  for (const bool details : {true, false}) {
    const Outcome& wanted = details ? expected : bare;
    reading.details = details;
    check(cold, texts, wanted, "a text again");
    check(cold, texts, wanted, "a text from the caches");
    check(*ways.warm, texts, wanted, "after other texts");
    check(*ways.plain_warm, texts, wanted, "without SIMD");
    if (given.added != 2) check(*ways.whole_warm, texts, wanted, "by the whole normalised text");
    if (!valid) continue;
    check(cold, wide, wanted, "of UCS-4");
    check(cold, narrow, wanted, "of the narrowest code units");
    check(cold, own, wanted, "of valid UTF-8");
    Outcome cut = read(cold, texts, given.is_split, reading, given.options.max_length);
    const size_t n = std::min(given.options.max_length, wanted.ids.size());
    require(cut.ids == std::vector(wanted.ids.begin(), wanted.ids.begin() + n), "up to a limit");
    require(!details || (cut.words.size() == n && cut.spans.size() == 2 * n), "details of as many");
  }
  return expected;
}

// All columns of rows.
struct Table {
  std::string error;
  std::vector<int64_t> offsets, samples, columns[8];
  std::vector<std::pair<size_t, std::string>> matched;
  size_t longest = 0;

  bool operator==(const Table& other) const {
    return error == other.error && offsets == other.offsets && samples == other.samples &&
           std::equal(columns, columns + 8, other.columns) && matched == other.matched;
  }

  std::vector<int64_t> row(Column column, size_t i) const {
    const auto& all = columns[static_cast<size_t>(column)];
    return {all.begin() + offsets[i], all.begin() + offsets[i + 1]};
  }
};

Table table_of(const Tokenizer& tokenizer, const Batch& batch, const EncodeOptions& options,
               size_t n_threads, bool padded = false) {
  Table table;
  try {
    const Rows rows = tokenizer.encode(batch, options, n_threads);
    table.longest = rows.longest(true);
    const Layout layout{padded ? table.longest + 1 : 0, -7, options.truncate_left};
    table.offsets.resize(rows.n_rows() + 1);
    table.samples.resize(rows.n_rows());
    rows.write_offsets(layout, table.offsets.data());
    rows.write_samples(table.samples.data());
    for (size_t i = 0; i < 8; ++i) {
      const auto column = static_cast<Column>(i);
      const bool is_detail = column == Column::kSpans || column == Column::kWords;
      if (is_detail && !options.reading.details) continue;
      const size_t n = static_cast<size_t>(table.offsets.back());
      table.columns[i].resize(column == Column::kSpans ? 2 * n : n);
      rows.write(column, layout, table.columns[i].data());
    }
    table.matched = rows.matched();
  } catch (const std::invalid_argument& error) {
    table.error = error.what();
  }
  return table;
}

// `parts` are the inputs, or the words of the only one.
void check_rows(const Case& given, const std::vector<std::pair<size_t, size_t>>& parts,
                const std::vector<Outcome>& outcomes) {
  Ways& ways = ways_of(given);
  const EncodeOptions& options = given.options;
  Batch batch;
  batch.is_split = given.is_split;
  size_t n_bytes = 1;
  for (const auto& text : given.texts) {
    batch.texts.push_back(view(text, Encoding::kBytes));
    n_bytes += text.size() + 1;
  }
  const size_t per_input = given.has_pairs ? 2 : 1;
  const auto span = [&](size_t part) { return Span{parts[part].first, parts[part].second}; };
  for (size_t i = 0; i + per_input <= parts.size(); i += per_input) {
    batch.inputs.push_back({span(i), given.has_pairs ? span(i + 1) : Span{}, given.has_pairs});
  }
  const size_t n_inputs = batch.inputs.size();
  if (given.many) {  // as few as fill three parts
    const size_t times = std::min<size_t>(3 * (1 << 16) / n_bytes + 1, 20000 / (n_inputs + 1));
    for (size_t i = 0; i < times * n_inputs; ++i) batch.inputs.push_back(batch.inputs[i]);
    const size_t n_texts = batch.texts.size();  // the parts are by their bytes
    for (size_t i = 0; i < times * n_texts; ++i) batch.texts.push_back(Text(batch.texts[i]));
  }

  const Table table = table_of(*ways.tokenizer, batch, options, 1);
  require(table_of(*ways.tokenizer, batch, options, 3) == table, "rows of three threads");
  EncodeOptions bare = options;
  bare.reading.details = false;
  require(table_of(*ways.tokenizer, batch, bare, 1).columns[0] == table.columns[0],
          "rows without details");
  const bool readable = std::all_of(outcomes.begin(), outcomes.begin() + n_inputs * per_input,
                                    [](const Outcome& outcome) { return outcome.error.empty(); });
  if (options.truncation == Truncation::kNone) {
    require(table.error.empty() == readable, "refused just if a text is");
  }
  if (!table.error.empty()) return;
  require(readable, "no text that is refused");

  const size_t n_special = options.add_special_tokens ? per_input + 1 : 0;
  const size_t n_before = options.add_special_tokens;
  const bool truncates = options.truncation != Truncation::kNone && options.max_length >= n_special;
  const Table padded = table_of(*ways.tokenizer, batch, options, 2, true);
  require(padded.samples.size() == table.samples.size(), "as many rows padded");
  for (size_t i = 0; i < table.samples.size(); ++i) {
    const auto ids = table.row(Column::kIds, i);
    require(ids.size() <= table.longest, "no row longer than the longest");
    // A window of no tokens is followed by the whole text, as in HF tokenizers: where there is room
    // for none, or for one in a pair.
    const bool whole = options.max_length < n_special + per_input && options.overflow;
    require(!truncates || whole || ids.size() <= options.max_length, "rows are cut");
    for (const Column column : {Column::kIds, Column::kMask, Column::kSequences}) {
      const auto row = table.row(column, i);
      auto wide = padded.row(column, i);
      const size_t n_fill = wide.size() - row.size();
      const auto at = options.truncate_left ? wide.begin() : wide.end() - n_fill;
      require(std::all_of(at, at + n_fill, [](int64_t id) { return id == -7; }), "filled");
      wide.erase(at, at + n_fill);
      require(row == wide, "padded equals packed");
    }
    const auto sequences = table.row(Column::kSequences, i);
    const auto special = table.row(Column::kSpecial, i);
    require(std::count(special.begin(), special.end(), 1) == static_cast<int64_t>(n_special),
            "special tokens");
    for (size_t k = 0; k < ids.size(); ++k) {
      require((sequences[k] == -1) == (special[k] == 1), "special tokens are of no text");
    }
    const bool is_first = i == 0 || table.samples[i] != table.samples[i - 1];
    if (options.truncate_left || !is_first || (truncates && given.has_pairs)) continue;
    // What is left is the beginning of each text.
    std::vector<int64_t> wanted;
    const size_t input = static_cast<size_t>(table.samples[i]) % n_inputs;
    for (size_t k = 0; k < per_input; ++k) {
      const auto& all = outcomes[input * per_input + k].ids;
      wanted.insert(wanted.end(), all.begin(), all.end());
      if (k == 0 && per_input == 2 && options.add_special_tokens) wanted.push_back(kSep);
    }
    if (truncates) wanted.resize(std::min(wanted.size(), options.max_length - n_special));
    require(ids.size() == wanted.size() + (n_before ? 2 : 0), "as many tokens as there are");
    require(std::equal(wanted.begin(), wanted.end(), ids.begin() + n_before), "the tokens of rows");
  }
}

}  // namespace
}  // namespace fastbert

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fastbert;
  if (size < Case::kHeader) return 0;
  const Case given(data, size);
  const size_t n = given.texts.size();
  std::vector<std::pair<size_t, size_t>> parts;
  if (!given.is_split) {
    for (size_t i = 0; i < n; ++i) parts.emplace_back(i, i + 1);
  } else if (given.has_pairs) {
    parts = {{0, n / 2}, {n / 2, n}};
  } else {
    parts = {{0, n}};
  }
  std::vector<Outcome> outcomes;
  Encoder cold(*ways_of(given).fast);
  for (const auto& [begin, end] : parts) outcomes.push_back(check_ways(given, begin, end, cold));
  check_rows(given, parts, outcomes);
  return 0;
}
