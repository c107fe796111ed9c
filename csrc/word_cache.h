// The pieces of words that came before, by all of their bytes: what is found is never another's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastbert {

// The first `size` (at most 8 N) bytes at `bytes`, zeros behind; all 8 N are read. A word that ends
// in a zero byte must not be a key.
template <size_t N>
struct WordKey {
  uint64_t parts[N];

  WordKey() : parts{} {}
  WordKey(const char* bytes, size_t size) {
    // A window over these bytes that begins `size` before the zeros is the mask.
    struct Ones {
      unsigned char bytes[16 * N] = {};
      constexpr Ones() {
        for (size_t i = 0; i < 8 * N; ++i) bytes[i] = 0xFF;
      }
    };
    static constexpr Ones kOnes;
    uint64_t mask[N];
    std::memcpy(parts, bytes, sizeof parts);
    std::memcpy(mask, kOnes.bytes + 8 * N - size, sizeof mask);
    for (size_t i = 0; i < N; ++i) parts[i] &= mask[i];
  }

  bool operator==(const WordKey& other) const {
    uint64_t difference = 0;
    for (size_t i = 0; i < N; ++i) difference |= parts[i] ^ other.parts[i];
    return difference == 0;
  }

  uint64_t hash() const {
    constexpr uint64_t kOdd[] = {0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                 0xD6E8FEB86659FD93};
    uint64_t sum = 0;
    for (size_t i = 0; i < N; ++i) sum ^= parts[i] * kOdd[i];
    return sum ^ sum >> 29;
  }
};

// Up to kMaxPieces ids and, of each piece, the byte of the word at which it ends.
template <size_t N, size_t kPieces>
struct WordEntry {
  static constexpr size_t kMaxSize = 8 * N;
  static constexpr size_t kMaxPieces = kPieces;

  WordKey<N> key;
  int32_t ids[kPieces] = {};
  uint8_t ends[kPieces] = {};
  uint8_t n_pieces = 0;
};

struct alignas(32) ShortWord : WordEntry<2, 3> {};
struct alignas(64) LongWord : WordEntry<4, 6> {};

// A table that never grows: a new word takes the place of the older one of two.
template <class Entry>
class WordCache {
 public:
  using Key = decltype(Entry::key);

  explicit WordCache(size_t log2_sets) : shift_(64 - log2_sets), sets_(size_t{1} << log2_sets) {}

  // The entry with this key, or nullptr.
  const Entry* find(const Key& key) const { return find(set_of(key), key); }

  // The same in two steps: between them the memory has time to come.
  const Entry* prefetch(const Key& key) const {
    const Entry* set = set_of(key);
#if defined(__GNUC__)
    __builtin_prefetch(set);
    if (sizeof(Entry) > 32) __builtin_prefetch(set + 1);
#endif
    return set;
  }
  static const Entry* find(const Entry* set, const Key& key) {
    return set[0].key == key ? set : set[1].key == key ? set + 1 : nullptr;
  }

  void insert(const Entry& entry) {
    Entry* set = sets_[index_of(entry.key)].entries;
    set[1] = std::exchange(set[0], entry);
  }

 private:
  // A whole cache line, or two: an allocator that knew of the entries only would place half of a
  // set in a line that no prefetch asks for.
  struct alignas(64) Set {
    Entry entries[2];
  };

  size_t index_of(const Key& key) const { return key.hash() >> shift_; }
  const Entry* set_of(const Key& key) const { return sets_[index_of(key)].entries; }

  size_t shift_;
  std::vector<Set> sets_;
};

}  // namespace fastbert
