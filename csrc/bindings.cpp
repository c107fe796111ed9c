// What Python sees of the tokenizer: conversions only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer.h"

namespace py = pybind11;

namespace fastbert {
namespace {

// A NumPy array that owns what was the vector's.
py::array_t<int64_t> to_array(std::vector<int64_t>&& values) {
  auto owner = std::make_unique<std::vector<int64_t>>(std::move(values));
  const int64_t* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  py::capsule free(owner.get(), [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  owner.release();
  return py::array_t<int64_t>({size}, {static_cast<py::ssize_t>(sizeof(int64_t))}, data, free);
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

bool is_list(py::handle object) {
  return py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object);
}

// Views of Python strings, which this keeps alive: lists may change while the GIL is released.
class Inputs {
 public:
  Inputs(const py::sequence& texts, const py::object& pairs, bool is_split) : is_split_(is_split) {
    const size_t n = texts.size();
    inputs_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      const py::object text = texts[i];
      if (!pairs.is_none()) {
        add(text, "text", i, inputs_[i].first);
        add(py::sequence(pairs)[i], "text_pair", i, inputs_[i].second);
        inputs_[i].has_second = true;
      } else if (is_pair(text)) {
        add(py::sequence(text)[0], "the first text of pair", i, inputs_[i].first);
        add(py::sequence(text)[1], "the second text of pair", i, inputs_[i].second);
        inputs_[i].has_second = true;
      } else {
        add(text, "text", i, inputs_[i].first);
      }
    }
  }

  const std::vector<Input>& get() const { return inputs_; }

 private:
  // Two texts in one item: two strings, or two lists where a text is a list of words.
  bool is_pair(const py::object& item) const {
    if (!is_list(item) || py::len(item) != 2) return false;
    return !is_split_ || is_list(py::sequence(item)[0]);
  }

  void add(const py::object& item, const char* what, size_t index, Text& text) {
    text.is_split = is_split_;
    if (!is_split_) {
      add_word(item, what, index, text);
      return;
    }
    if (!is_list(item)) {
      throw py::type_error(std::string(what) + " " + std::to_string(index) +
                           " must be a list of words (str) when is_split_into_words is true, got " +
                           type_name(item));
    }
    for (const py::handle word : item) {
      add_word(py::reinterpret_borrow<py::object>(word), "a word of text", index, text);
    }
  }

  void add_word(const py::object& word, const char* what, size_t index, Text& text) {
    if (!PyUnicode_Check(word.ptr())) {
      throw py::type_error(std::string(what) + " " + std::to_string(index) + " must be str, got " +
                           type_name(word));
    }
    py::ssize_t size = 0;
    const char* data = PyUnicode_AsUTF8AndSize(word.ptr(), &size);
    if (data == nullptr) {
      const py::error_already_set error;
      if (!error.matches(PyExc_UnicodeEncodeError)) throw error;
      throw py::type_error(std::string(what) + " " + std::to_string(index) +
                           " must be valid Unicode, got a lone surrogate: " + error.what());
    }
    text.words.emplace_back(data, static_cast<size_t>(size));
    alive_.push_back(word);
  }

  bool is_split_;
  std::vector<Input> inputs_;
  std::vector<py::object> alive_;
};

Truncation to_truncation(const std::string& name) {
  if (name == "do_not_truncate") return Truncation::kNone;
  if (name == "longest_first") return Truncation::kLongestFirst;
  if (name == "only_first") return Truncation::kOnlyFirst;
  if (name == "only_second") return Truncation::kOnlySecond;
  throw py::value_error(
      "truncation must be 'longest_first', 'only_first', 'only_second' or 'do_not_truncate', got "
      "'" +
      name + "'");
}

py::dict encode(const Tokenizer& tokenizer, const py::sequence& texts, const py::object& pairs,
                bool is_split_into_words, bool add_special_tokens, bool split_special_tokens,
                const std::string& truncation, size_t max_length, size_t stride, bool truncate_left,
                bool overflow, bool positions, bool details, size_t num_threads) {
  const Inputs inputs(texts, pairs, is_split_into_words);
  EncodeOptions options;
  options.add_special_tokens = add_special_tokens;
  options.split_special_tokens = split_special_tokens;
  options.truncation = to_truncation(truncation);
  options.max_length = max_length;
  options.stride = stride;
  options.truncate_left = truncate_left;
  options.overflow = overflow;
  options.positions = positions;
  options.details = details;
  Rows rows;
  {
    const py::gil_scoped_release release;
    rows = tokenizer.encode(inputs.get(), options, num_threads);
  }
  py::dict result;
  result["ids"] = to_array(std::move(rows.ids));
  result["type_ids"] = to_array(std::move(rows.type_ids));
  result["offsets"] = to_array(std::move(rows.offsets));
  result["samples"] = to_array(std::move(rows.samples));
  if (positions) result["position_ids"] = to_array(std::move(rows.position_ids));
  if (details) {
    result["spans"] = to_array(std::move(rows.spans));
    result["words"] = to_array(std::move(rows.words));
    result["sequences"] = to_array(std::move(rows.sequences));
    py::dict matched;
    for (const auto& [index, text] : rows.matched) matched[py::int_(index)] = text;
    result["matched"] = matched;
  }
  return result;
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_tokenizer, m) {
  using namespace fastbert;
  m.doc() = "WordPiece tokenization in C++; fastbert.tokenizer is its interface.";

  py::class_<WordPiece, std::shared_ptr<WordPiece>>(m, "WordPiece")
      .def(py::init<const std::vector<std::pair<std::string, int32_t>>&, const std::string&,
                    size_t>(),
           py::arg("vocab"), py::arg("unknown"), py::arg("max_chars") = 100);

  py::class_<UnicodeTables, std::shared_ptr<UnicodeTables>>(m, "UnicodeTables")
      .def(py::init<>())
      .def(py::init<std::string_view, std::string_view,
                    const std::vector<std::pair<char32_t, std::u32string>>&>(),
           py::kw_only(), py::arg("flags"), py::arg("combining"), py::arg("decompositions"));

  py::class_<AddedToken>(m, "AddedToken")
      .def(py::init<std::string, int32_t, bool, bool, bool, bool, bool>(), py::kw_only(),
           py::arg("content"), py::arg("id"), py::arg("single_word"), py::arg("lstrip"),
           py::arg("rstrip"), py::arg("normalized"), py::arg("special"));

  py::class_<Tokenizer>(m, "Tokenizer")
      .def(py::init([](std::shared_ptr<WordPiece> pieces, std::shared_ptr<UnicodeTables> tables,
                       bool lowercase, bool strip_accents, bool chinese_chars,
                       std::vector<AddedToken> added, int64_t cls_id, int64_t sep_id) {
             return Tokenizer(
                 std::move(pieces),
                 Normalizer(std::move(tables), lowercase, strip_accents, chinese_chars),
                 std::move(added), cls_id, sep_id);
           }),
           py::arg("pieces"), py::kw_only(), py::arg("tables"), py::arg("lowercase"),
           py::arg("strip_accents"), py::arg("chinese_chars"), py::arg("added"), py::arg("cls_id"),
           py::arg("sep_id"))
      .def("normalize", &Tokenizer::normalize, py::arg("text"))
      .def("encode", &encode, py::arg("texts"), py::arg("pairs") = py::none(), py::kw_only(),
           py::arg("is_split_into_words") = false, py::arg("add_special_tokens") = true,
           py::arg("split_special_tokens") = false, py::arg("truncation") = "do_not_truncate",
           py::arg("max_length") = 0, py::arg("stride") = 0, py::arg("truncate_left") = false,
           py::arg("overflow") = false, py::arg("positions") = false, py::arg("details") = false,
           py::arg("num_threads") = 1);
}
