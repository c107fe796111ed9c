// What Python sees of the tokenizer: conversions only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "arrow.h"
#include "thread_pool.h"
#include "tokenizer.h"
#include "vocab_trainer.h"

namespace py = pybind11;

namespace fastbert {
namespace {

// Releases the GIL. Of a thread that asks for it back while Python ends, Python before 3.14 unwinds
// the stack, through objects that may not be destroyed without the GIL: it waits here instead.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // no exception, but how pthread_exit() unwinds
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

bool is_list(py::handle object) {
  return PyList_Check(object.ptr()) || PyTuple_Check(object.ptr());
}

// Item i of a list, or of something like one; it stays alive by itself.
py::object item_of(py::handle list, size_t i) {
  const auto index = static_cast<py::ssize_t>(i);
  if (PyList_Check(list.ptr()) && index < PyList_GET_SIZE(list.ptr())) {
    return py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list.ptr(), index));
  }
  return py::reinterpret_steal<py::object>(PySequence_GetItem(list.ptr(), index));
}

// The code points of a str where Python keeps them, or its UTF-8 if that is at hand.
Text view_of_str(PyObject* str) {
  const auto size = static_cast<size_t>(PyUnicode_GET_LENGTH(str));
  if (PyUnicode_IS_ASCII(str)) return {PyUnicode_DATA(str), size, Encoding::kUtf8};
#ifndef Py_GIL_DISABLED
  const auto* compact = reinterpret_cast<const PyCompactUnicodeObject*>(str);
  if (compact->utf8 != nullptr) {
    return {compact->utf8, static_cast<size_t>(compact->utf8_length), Encoding::kUtf8};
  }
#endif
  const int kind = static_cast<int>(PyUnicode_KIND(str));
  return {PyUnicode_DATA(str), size,
          kind == PyUnicode_1BYTE_KIND   ? Encoding::kLatin1
          : kind == PyUnicode_2BYTE_KIND ? Encoding::kUcs2
                                         : Encoding::kUcs4};
}

// Views of Python's texts, which this keeps alive: lists may change while the GIL is released.
class Inputs {
 public:
  // bytes: whether texts may also be bytes or other buffers, and Arrow arrays.
  Inputs(const py::object& texts, const py::object& pairs, bool is_split, bool bytes)
      : bytes_(bytes) {
    batch_.is_split = is_split;
    if (bytes && is_arrow(texts)) {
      add_arrow(texts, false);
      if (!pairs.is_none()) add_arrow(pairs, true);
      return;
    }
    const size_t n = py::len(texts);
    batch_.inputs.resize(n);
    batch_.texts.reserve(pairs.is_none() ? n : 2 * n);
    alive_.reserve(batch_.texts.capacity());
    for (size_t i = 0; i < n; ++i) {
      fetch_ahead(texts, i);
      Input& input = batch_.inputs[i];
      const py::object text = item_of(texts, i);
      input.has_second = !pairs.is_none() || is_pair(text);
      if (!pairs.is_none()) {
        input.first = add(text, "text", i);
        input.second = add(item_of(pairs, i), "text_pair", i);
      } else if (input.has_second) {
        input.first = add(item_of(text, 0), "the first text of pair", i);
        input.second = add(item_of(text, 1), "the second text of pair", i);
      } else {
        input.first = add(text, "text", i);
      }
    }
  }

  ~Inputs() {
    for (size_t i = 0; i < alive_.size(); ++i) {
      if (i + kAhead < alive_.size()) __builtin_prefetch(alive_[i + kAhead].ptr(), 1);
      alive_[i] = py::object();
    }
    for (Py_buffer& buffer : buffers_) PyBuffer_Release(&buffer);
    for (ArrowArray& array : arrays_) array.release(&array);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  const Batch& get() const { return batch_; }

 private:
  // Texts are all over memory: has one that is soon read brought near.
  static constexpr size_t kAhead = 16;
  static void fetch_ahead(const py::object& texts, size_t i) {
    if (!PyList_CheckExact(texts.ptr()) || i + kAhead >= py::len(texts)) return;
    const auto* text = reinterpret_cast<const char*>(PyList_GET_ITEM(texts.ptr(), i + kAhead));
    __builtin_prefetch(text);       // the count of references
    __builtin_prefetch(text + 48);  // what is behind them
  }

  // Two texts in one item: two strings, or two lists where a text is a list of words.
  bool is_pair(const py::object& item) const {
    if (!is_list(item) || py::len(item) != 2) return false;
    return !batch_.is_split || is_list(item_of(item, 0));
  }

  Span add(py::object item, const char* what, size_t index) {
    const size_t begin = batch_.texts.size();
    if (!batch_.is_split) {
      add_text(std::move(item), what, index);
    } else if (!is_list(item)) {
      throw py::type_error(std::string(what) + " " + std::to_string(index) +
                           " must be a list of words (str) when is_split_into_words is true, got " +
                           type_name(item));
    } else {
      for (size_t i = 0; i < py::len(item); ++i)
        add_text(item_of(item, i), "a word of text", index);
    }
    return {begin, batch_.texts.size()};
  }

  void add_text(py::object text, const char* what, size_t index) {
    if (PyUnicode_Check(text.ptr())) {
      batch_.texts.push_back(view_of_str(text.ptr()));
    } else if (bytes_ && PyObject_CheckBuffer(text.ptr())) {
      Py_buffer buffer;
      if (PyObject_GetBuffer(text.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw py::error_already_set();
      buffers_.push_back(buffer);
      batch_.texts.push_back({buffer.buf, static_cast<size_t>(buffer.len), Encoding::kBytes});
    } else {
      throw py::type_error(std::string(what) + " " + std::to_string(index) + " must be str" +
                           (bytes_ ? " or bytes" : "") + ", got " + type_name(text));
    }
    alive_.push_back(std::move(text));
  }

  static bool is_arrow(const py::object& texts) {
    return py::hasattr(texts, "__arrow_c_stream__") || py::hasattr(texts, "__arrow_c_array__");
  }

  // The texts of an array, or of a stream of arrays; the first of each input, or the second.
  void add_arrow(const py::object& texts, bool second) {
    const size_t begin = batch_.texts.size();
    if (!is_arrow(texts)) {
      throw py::type_error("text_pairs must be an Arrow array where texts is one, got " +
                           type_name(texts));
    }
    if (py::hasattr(texts, "__arrow_c_array__")) {
      const py::tuple capsules = texts.attr("__arrow_c_array__")();
      const auto& schema =
          *py::reinterpret_borrow<py::capsule>(capsules[0]).get_pointer<ArrowSchema>();
      auto& array = *py::reinterpret_borrow<py::capsule>(capsules[1]).get_pointer<ArrowArray>();
      add_arrow_texts(schema, array, batch_.texts);
      alive_.push_back(capsules);  // their destructors release what they hold
    } else {
      const py::capsule capsule = texts.attr("__arrow_c_stream__")();
      auto& stream = *capsule.get_pointer<ArrowArrayStream>();
      ArrowSchema schema{};
      check_stream(stream, stream.get_schema(&stream, &schema));
      const std::unique_ptr<ArrowSchema, void (*)(ArrowSchema*)> free(
          &schema, [](ArrowSchema* s) { s->release(s); });
      while (true) {
        ArrowArray array{};
        check_stream(stream, stream.get_next(&stream, &array));
        if (array.release == nullptr) break;
        arrays_.push_back(array);
        add_arrow_texts(schema, array, batch_.texts);
      }
    }
    const size_t n = batch_.texts.size() - begin;
    if (second && n != batch_.inputs.size()) {
      throw py::value_error(std::to_string(batch_.inputs.size()) + " texts do not go with " +
                            std::to_string(n) + " text_pairs");
    }
    batch_.inputs.resize(n);
    for (size_t i = 0; i < n; ++i) {
      (second ? batch_.inputs[i].second : batch_.inputs[i].first) = {begin + i, begin + i + 1};
      batch_.inputs[i].has_second = second;
    }
  }

  static void check_stream(ArrowArrayStream& stream, int status) {
    if (status == 0) return;
    const char* why = stream.get_last_error(&stream);
    throw py::value_error(std::string("an Arrow stream cannot be read: ") +
                          (why != nullptr ? why : "no reason given"));
  }

  bool bytes_;
  Batch batch_;
  std::vector<py::object> alive_;
  std::vector<Py_buffer> buffers_;
  std::vector<ArrowArray> arrays_;
};

// The one of `names` (as in the enum) that `name` is.
template <class Enum, size_t N>
Enum to_enum(const char* what, const std::string& name, const char* const (&names)[N]) {
  const auto* found = std::find(std::begin(names), std::end(names), std::string_view(name));
  if (found != std::end(names)) return static_cast<Enum>(found - names);
  std::string wanted;
  for (const char* one : names) wanted += std::string(wanted.empty() ? "'" : ", '") + one + "'";
  throw py::value_error(std::string(what) + " must be one of " + wanted + ", got '" + name + "'");
}

Truncation to_truncation(const std::string& name) {
  return to_enum<Truncation>("truncation", name,
                             {"do_not_truncate", "longest_first", "only_first", "only_second"});
}

Rows encode(const Tokenizer& tokenizer, const Inputs& inputs, const EncodeOptions& options,
            size_t num_threads) {
  const WithoutGil without_gil;
  return tokenizer.encode(inputs.get(), options, num_threads);
}

Rows encode_batch(const Tokenizer& tokenizer, const py::object& texts, const py::object& pairs,
                  bool is_split_into_words, bool bytes, const std::string& errors,
                  bool add_special_tokens, bool split_special_tokens, const std::string& truncation,
                  size_t max_length, size_t stride, bool truncate_left, bool overflow, bool details,
                  size_t num_threads) {
  EncodeOptions options;
  options.reading = {split_special_tokens, details,
                     to_enum<int>("errors", errors, {"strict", "replace"}) == 1};
  options.add_special_tokens = add_special_tokens;
  options.truncation = to_truncation(truncation);
  options.max_length = max_length;
  options.stride = stride;
  options.truncate_left = truncate_left;
  options.overflow = overflow;
  return encode(tokenizer, Inputs(texts, pairs, is_split_into_words, bytes), options, num_threads);
}

// Calls visit(T{}) with the T that a dtype is.
template <class Visit>
auto with_type(const py::dtype& dtype, Visit&& visit) {
  if (dtype.equal(py::dtype::of<int64_t>())) return visit(int64_t{});
  if (dtype.equal(py::dtype::of<int32_t>())) return visit(int32_t{});
  throw py::value_error("dtype must be int64 or int32, got " + std::string(py::str(dtype)));
}

Column to_column(const std::string& name) {
  return to_enum<Column>(
      "column", name,
      {"ids", "type_ids", "positions", "mask", "special", "spans", "words", "sequences"});
}

py::array offsets(const Rows& rows, size_t length, const py::dtype& dtype) {
  py::array out(dtype, std::vector<py::ssize_t>{static_cast<py::ssize_t>(rows.n_rows() + 1)});
  with_type(dtype, [&](auto zero) {
    rows.write_offsets(Layout{length}, static_cast<decltype(zero)*>(out.mutable_data()));
  });
  return out;
}

py::array column(const Rows& rows, const std::string& name, const py::dtype& dtype, size_t length,
                 int64_t fill, bool fill_left) {
  const Layout layout{length, fill, fill_left};
  const Column column = to_column(name);
  std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(rows.n_places(layout))};
  if (column == Column::kSpans) shape.push_back(2);
  py::array out(dtype, shape);
  with_type(dtype, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(out.mutable_data());
    const WithoutGil without_gil;
    rows.write(column, layout, data);
  });
  return out;
}

void write_packed(Rows& rows, py::array out, bool type_ids) {
  const auto n_tokens = static_cast<py::ssize_t>(rows.n_tokens());
  if (out.ndim() != 2 || out.shape(0) != 3 || out.shape(1) != n_tokens ||
      !(out.flags() & py::array::c_style)) {
    throw py::value_error("out must be contiguous, (3, " + std::to_string(n_tokens) + ")");
  }
  with_type(out.dtype(), [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(out.mutable_data());
    const WithoutGil without_gil;
    rows.write_packed(type_ids, data);
  });
}

// Past pybind11's own constructor, which keeps shape and strides in vectors first.
template <class T>
py::object array_of(const int32_t* begin, const int32_t* end) {
  const auto& numpy = py::detail::npy_api::get();
  const Py_intptr_t shape[] = {end - begin};
  auto out = py::reinterpret_steal<py::object>(
      numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, py::dtype::of<T>().release().ptr(), 1, shape,
                                  nullptr, nullptr, 0, nullptr));
  if (!out) throw py::error_already_set();
  std::copy(begin, end, reinterpret_cast<T*>(py::detail::array_proxy(out.ptr())->data));
  return out;
}

// Of (text, max_length, split_special_tokens, truncate_left), the ids of one str and where they
// begin and end. None where encode() has something to say about the arguments, or the text. A
// function of Python's own kind: one of pybind11's takes longer to call than a short text to
// encode.
PyObject* encode_query(PyObject* self, PyObject* const* arguments, Py_ssize_t n_arguments) {
  constexpr size_t kLarge = 1 << 14;  // bytes that are worth letting other Python threads run for
  const auto& tokenizer =
      **static_cast<std::shared_ptr<const Tokenizer>*>(PyCapsule_GetPointer(self, nullptr));
  if (n_arguments != 4 || !PyUnicode_Check(arguments[0]) || !PyLong_Check(arguments[1])) {
    Py_RETURN_NONE;
  }
  const Py_ssize_t max_length = PyLong_AsSsize_t(arguments[1]);
  if (max_length < 3) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const int split_special_tokens = PyObject_IsTrue(arguments[2]);
  const int truncate_left = PyObject_IsTrue(arguments[3]);
  if (split_special_tokens < 0 || truncate_left < 0) return nullptr;
  EncodeOptions options;
  options.reading.split_special_tokens = split_special_tokens != 0;
  options.truncation = Truncation::kLongestFirst;
  options.max_length = static_cast<size_t>(max_length);
  options.truncate_left = truncate_left != 0;
  const Text view = view_of_str(arguments[0]);
  Ints ids;
  try {
    if (view.n_bytes() < kLarge) {
      tokenizer.encode_one(view, options, ids);
    } else {
      const WithoutGil without_gil;
      tokenizer.encode_one(view, options, ids);
    }
    const auto n = static_cast<int32_t>(ids.size());
    py::object out = array_of<int64_t>(ids.data(), ids.data() + n);
    const int32_t ends[] = {0, n};
    py::object cu_seqlens = array_of<int32_t>(std::begin(ends), std::end(ends));
    PyObject* both = PyTuple_New(2);
    if (both == nullptr) throw py::error_already_set();
    PyTuple_SET_ITEM(both, 0, out.release().ptr());
    PyTuple_SET_ITEM(both, 1, cu_seqlens.release().ptr());
    return both;
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
}

py::object query_function(const std::shared_ptr<Tokenizer>& tokenizer) {
  using Held = std::shared_ptr<const Tokenizer>;
  static PyMethodDef method{"encode_query",
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(encode_query)),
                            METH_FASTCALL, nullptr};
  const py::capsule self(new Held(tokenizer), [](void* held) { delete static_cast<Held*>(held); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

std::vector<std::string> train(const WordCounts& counts, const py::object& progress, size_t size,
                               int64_t min_frequency, size_t limit_alphabet,
                               const std::u32string& initial_alphabet,
                               const std::vector<std::string>& special_tokens) {
  const VocabOptions options{size, min_frequency, limit_alphabet, initial_alphabet, special_tokens};
  const WithoutGil without_gil;
  return train_vocab(counts.table(), options, [&progress](size_t n_tokens) {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();  // Ctrl-C
    progress(n_tokens);
  });
}

void bind_vocab_trainer(py::module_& m) {
  py::class_<WordCounts>(m, "WordCounts")
      .def(py::init([](bool lowercase, bool strip_accents, bool chinese_chars) {
             return WordCounts(Normalizer(std::make_shared<UnicodeTables>(), lowercase,
                                          strip_accents, chinese_chars));
           }),
           py::kw_only(), py::arg("lowercase"), py::arg("strip_accents"), py::arg("chinese_chars"))
      .def("add", &WordCounts::add, py::arg("texts"), py::arg("num_threads"),
           py::call_guard<WithoutGil>())
      .def("__len__", [](const WordCounts& counts) { return counts.table().size(); })
      .def("train", &train, py::arg("progress"), py::kw_only(), py::arg("size"),
           py::arg("min_frequency"), py::arg("limit_alphabet"), py::arg("initial_alphabet"),
           py::arg("special_tokens"));
}

}  // namespace
}  // namespace fastbert

PYBIND11_MODULE(_tokenizer, m) {
  using namespace fastbert;
  m.doc() = "WordPiece tokenization in C++; fastbert.tokenizer is its interface.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const LoneSurrogate& lone) {
      PyErr_SetString(PyExc_TypeError, lone.what());
    }
  });

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

  const py::object int64 = py::dtype::of<int64_t>();
  py::class_<Rows>(m, "Rows")
      .def_property_readonly("n_rows", &Rows::n_rows)
      .def_property_readonly("n_tokens", &Rows::n_tokens)
      .def_property_readonly("has_pairs", &Rows::has_pairs)
      .def("longest", &Rows::longest, py::arg("windows"))
      .def("offsets", &offsets, py::arg("length") = 0, py::kw_only(), py::arg("dtype") = int64)
      .def("samples",
           [](const Rows& rows) {
             py::array_t<int64_t> out(static_cast<py::ssize_t>(rows.n_rows()));
             rows.write_samples(out.mutable_data());
             return out;
           })
      .def("column", &column, py::arg("name"), py::kw_only(), py::arg("dtype") = int64,
           py::arg("length") = 0, py::arg("fill") = 0, py::arg("fill_left") = false)
      .def("write_packed", &write_packed, py::arg("out"), py::kw_only(), py::arg("type_ids"))
      .def("matched", &Rows::matched);

  py::class_<Tokenizer, std::shared_ptr<Tokenizer>>(m, "Tokenizer")
      .def(py::init([](std::shared_ptr<WordPiece> pieces, std::shared_ptr<UnicodeTables> tables,
                       bool lowercase, bool strip_accents, bool chinese_chars,
                       const std::vector<AddedToken>& added, int32_t cls_id, int32_t sep_id) {
             return std::make_shared<Tokenizer>(
                 std::move(pieces),
                 Normalizer(std::move(tables), lowercase, strip_accents, chinese_chars), added,
                 cls_id, sep_id);
           }),
           py::arg("pieces"), py::kw_only(), py::arg("tables"), py::arg("lowercase"),
           py::arg("strip_accents"), py::arg("chinese_chars"), py::arg("added"), py::arg("cls_id"),
           py::arg("sep_id"))
      .def("normalize", &Tokenizer::normalize, py::arg("text"))
      .def("encode", &encode_batch, py::arg("texts"), py::arg("pairs") = py::none(), py::kw_only(),
           py::arg("is_split_into_words") = false, py::arg("bytes") = false,
           py::arg("errors") = "strict", py::arg("add_special_tokens") = true,
           py::arg("split_special_tokens") = false, py::arg("truncation") = "do_not_truncate",
           py::arg("max_length") = 0, py::arg("stride") = 0, py::arg("truncate_left") = false,
           py::arg("overflow") = false, py::arg("details") = false, py::arg("num_threads") = 0)
      .def("query_function", &query_function);

  m.def("n_available_cpus", &n_available_cpus);
  m.def("instructions", &best_instructions);
  bind_vocab_trainer(m);
}
