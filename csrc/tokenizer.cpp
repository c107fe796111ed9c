#include "tokenizer.h"

#include <algorithm>
#include <limits>

#include "thread_pool.h"

namespace fastbert {
namespace {

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();
constexpr size_t kSingleSpecials = 2, kPairSpecials = 3;

size_t n_bytes(const Batch& batch, const Input& input) {
  size_t sum = 0;
  for (const Span span : {input.first, input.second}) {
    for (size_t i = span.begin; i < span.end; ++i) sum += batch.texts[i].n_bytes();
  }
  return sum;
}

}  // namespace

// One thread's work: an encoder, and rows of what it gives.
class Tokenizer::Worker {
 public:
  explicit Worker(const Tokenizer& tokenizer)
      : encoder_(tokenizer.knowledge_), cls_id_(tokenizer.cls_id_), sep_id_(tokenizer.sep_id_) {}

  // Adds the rows of inputs [begin, end) to `part`.
  void add(const Batch& batch, const EncodeOptions& options, size_t begin, size_t end, Part& part) {
    // Memory that is never written to costs nothing, moving what is written does.
    size_t bytes = 0;
    for (size_t i = begin; i < end; ++i) bytes += n_bytes(batch, batch.inputs[i]);
    part.tokens.ids.reserve(bytes / kBytesPerToken + kPairSpecials * (end - begin));
    part.rows.reserve(end - begin);
    batch_ = &batch;
    options_ = &options;
    part_ = &part;
    for (size_t i = begin; i < end; ++i) {
      try {
        if (take(batch.inputs[i], i)) continue;
        add_taken(i);
        add(batch.inputs[i], static_cast<int32_t>(i));
      } catch (const LoneSurrogate& error) {
        throw LoneSurrogate(place(i) + error.what());
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(place(i) + error.what());
      }
    }
    add_taken(end);
  }

  void add_one(const Text& text, const EncodeOptions& options, Ints& ids) {
    one_.texts.assign(1, text);
    one_.inputs.assign(1, {{0, 1}, {}, false});
    one_part_.rows.clear();
    one_part_.tokens.clear();
    add(one_, options, 0, 1, one_part_);
    ids.append(one_part_.tokens.ids.data(), one_part_.tokens.ids.size());
  }

 private:
  static constexpr size_t kBytesPerToken = 2;  // at least, of nearly all texts

  static std::string place(size_t index) { return "text " + std::to_string(index) + ": "; }

  // How many tokens of its own an input may have.
  size_t room_of(bool has_second) const {
    const size_t n_special =
        options_->add_special_tokens ? (has_second ? kPairSpecials : kSingleSpecials) : 0;
    // HF tokenizers subtracts in unsigned numbers: below the specials there is no limit.
    const bool truncates =
        options_->truncation != Truncation::kNone && options_->max_length >= n_special;
    return truncates ? options_->max_length - n_special : kNoLimit;
  }

  // Whether tokens past the room of a single text need not be looked at.
  bool can_stop(size_t room) const {
    return room == kNoLimit ||
           (!options_->overflow && !options_->truncate_left && options_->stride == 0 &&
            options_->truncation != Truncation::kOnlySecond);
  }

  // Whether input i is one of those that are encoded together with others later.
  bool take(const Input& input, size_t i) {
    if (input.has_second || batch_->is_split || options_->reading.details) return false;
    const Text& text = batch_->texts[input.first.begin];
    if (text.n_bytes() > Encoder::kShort || !can_stop(room_of(false))) return false;
    if (!encoder_.has_room()) add_taken(i);
    return encoder_.take(text, options_->reading);
  }

  // Encodes those, which are the ones before input `end`.
  void add_taken(size_t end) {
    const Frame frame{options_->add_special_tokens, cls_id_, sep_id_, room_of(false)};
    size_t begin = part_->tokens.ids.size();
    const std::vector<size_t>& ends = encoder_.encode_taken(frame, part_->tokens);
    size_t sample = end - ends.size();
    for (const size_t row_end : ends) {
      part_->rows.push_back({begin, row_end, static_cast<int32_t>(sample++)});
      begin = row_end;
    }
  }

  void add(const Input& input, int32_t sample) {
    const size_t room = room_of(input.has_second);
    const bool truncates = room != kNoLimit;
    if (!input.has_second && can_stop(room)) {
      begin_row(sample);
      encode(input.first, room, part_->tokens);
      end_row();
      return;
    }
    first_.clear();
    second_.clear();
    encode(input.first, kNoLimit, first_);
    if (input.has_second) encode(input.second, kNoLimit, second_);

    const Lengths full{first_.ids.size(), second_.ids.size()};
    const Lengths kept =
        truncates ? truncated(full, input.has_second, room, options_->truncation) : full;
    if (kept.first == full.first && kept.second == full.second) {
      add_row({0, full.first}, {0, full.second}, input.has_second, sample);
      return;
    }
    const auto firsts = windows(full.first, kept.first, options_->stride, options_->truncate_left);
    const auto seconds =
        windows(full.second, kept.second, options_->stride, options_->truncate_left);
    add_row(firsts[0], seconds[0], input.has_second, sample);
    if (!options_->overflow) return;
    // The order of HF tokenizers: the first window of the first text comes back at the end.
    for (size_t i = 1; i < firsts.size(); ++i) {
      for (const Window& second : seconds) add_row(firsts[i], second, input.has_second, sample);
    }
    for (size_t i = 1; i < seconds.size(); ++i) {
      add_row(firsts[0], seconds[i], input.has_second, sample);
    }
  }

  void encode(Span texts, size_t limit, Tokens& out) {
    encoder_.encode(batch_->texts.data() + texts.begin, texts.end - texts.begin, batch_->is_split,
                    limit, options_->reading, out);
  }

  void begin_row(int32_t sample) {
    part_->rows.push_back({part_->tokens.ids.size(), 0, sample});
    add_special(cls_id_);
  }

  // The end of the row, as long as no second text follows.
  void end_row() {
    add_special(sep_id_);
    part_->rows.back().second = part_->tokens.ids.size();
  }

  void add_row(Window first, Window second, bool has_second, int32_t sample) {
    begin_row(sample);
    add_window(first_, first);
    end_row();
    if (!has_second) return;
    add_window(second_, second);
    add_special(sep_id_);
  }

  void add_special(int32_t id) {
    if (!options_->add_special_tokens) return;
    part_->tokens.ids.push_back(id);
    if (!options_->reading.details) return;
    part_->tokens.spans.push_back(0);
    part_->tokens.spans.push_back(0);
    part_->tokens.words.push_back(-1);
  }

  void add_window(const Tokens& tokens, Window window) {
    const auto add = [window](Ints& to, const Ints& from, size_t width) {
      to.append(from.data() + width * window.begin, width * (window.end - window.begin));
    };
    const size_t n_before = part_->tokens.ids.size();
    add(part_->tokens.ids, tokens.ids, 1);
    if (!options_->reading.details) return;
    add(part_->tokens.spans, tokens.spans, 2);
    add(part_->tokens.words, tokens.words, 1);
    for (const auto& [index, text] : tokens.matched) {
      if (index >= window.begin && index < window.end) {
        part_->tokens.matched.emplace_back(n_before + index - window.begin, text);
      }
    }
  }

  Encoder encoder_;
  int32_t cls_id_, sep_id_;
  const Batch* batch_ = nullptr;
  const EncodeOptions* options_ = nullptr;
  Part* part_ = nullptr;
  Tokens first_, second_;  // of a pair, or of a text that is cut to windows
  Batch one_;
  Part one_part_;
};

Tokenizer::Tokenizer(std::shared_ptr<const WordPiece> pieces, const Normalizer& normalizer,
                     const std::vector<AddedToken>& added, int32_t cls_id, int32_t sep_id)
    : knowledge_(std::move(pieces), normalizer, added), cls_id_(cls_id), sep_id_(sep_id) {}

Tokenizer::~Tokenizer() {
  for (std::atomic<Worker*>& slot : idle_) delete slot.load();
}

std::unique_ptr<Tokenizer::Worker> Tokenizer::borrow() const {
  for (std::atomic<Worker*>& slot : idle_) {
    if (slot.load(std::memory_order_relaxed) == nullptr) continue;
    if (Worker* worker = slot.exchange(nullptr)) return std::unique_ptr<Worker>(worker);
  }
  return std::make_unique<Worker>(*this);
}

void Tokenizer::give_back(std::unique_ptr<Worker> worker) const {
  for (std::atomic<Worker*>& slot : idle_) {
    Worker* empty = nullptr;
    if (slot.compare_exchange_strong(empty, worker.get())) {
      worker.release();
      return;
    }
  }
}

std::string Tokenizer::normalize(std::string_view text) const {
  Normalized normalized;
  knowledge_.normalizer.normalize(text, normalized);
  return normalized.text;
}

void Tokenizer::encode_one(const Text& text, const EncodeOptions& options, Ints& ids) const {
  std::unique_ptr<Worker> worker = borrow();
  worker->add_one(text, options, ids);
  give_back(std::move(worker));
}

Rows Tokenizer::encode(const Batch& batch, const EncodeOptions& options, size_t n_threads) const {
  // Inputs bounds[i] to bounds[i + 1] are one part, of about as many bytes as any other.
  constexpr size_t kPartBytes = 1 << 16;  // fewer are not worth waking a thread
  constexpr size_t kPartsPerThread = 8;   // so that one that is late holds up nobody
  std::vector<size_t> bounds{0};
  if (n_threads != 1) {
    size_t total = 0;
    for (const Text& text : batch.texts) total += text.n_bytes();
    if (n_threads == 0) n_threads = total < 2 * kPartBytes ? 1 : n_available_cpus();
    const size_t n_parts =
        n_threads == 1 ? 1 : std::min(1 + total / kPartBytes, kPartsPerThread * n_threads);
    size_t bytes = 0;
    for (size_t i = 0; i < batch.inputs.size() && bounds.size() < n_parts; ++i) {
      bytes += n_bytes(batch, batch.inputs[i]);
      if (bytes * n_parts >= total * bounds.size()) bounds.push_back(i + 1);
    }
  }
  if (bounds.back() != batch.inputs.size()) bounds.push_back(batch.inputs.size());

  std::vector<Part> parts(bounds.size() - 1);
  ThreadPool::instance().run(parts.size(), n_threads, [&](size_t i) {
    std::unique_ptr<Worker> worker = borrow();
    worker->add(batch, options, bounds[i], bounds[i + 1], parts[i]);
    give_back(std::move(worker));
  });
  return Rows(std::move(parts), options.add_special_tokens, n_threads);
}

}  // namespace fastbert
