"""atheris: the whole call against transformers, on texts and options made of random bytes."""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
with atheris.instrument_imports(include=["fastbert"]):
    from tokenizer_cases import DETAILS, NASTY, assert_same, both

PAIRS = [
    both(do_lower_case=lower, strip_accents=strip)
    for lower in (True, False)
    for strip in (True, False)
]


def test_one_input(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)

    def text() -> str:
        size = given.ConsumeIntInRange(0, 60)
        known = given.PickValueInList(NASTY) if given.ConsumeBool() else ""
        return known + given.ConsumeUnicodeNoSurrogates(size)

    def several() -> list[str]:
        return [text() for _ in range(given.ConsumeIntInRange(1, 4))]

    options = {
        "padding": given.PickValueInList([False, True, "max_length"]),
        "truncation": given.PickValueInList([False, True, "only_first", "only_second"]),
        "max_length": given.PickValueInList([None, 5, 16, 64]),
        "stride": given.PickValueInList([0, 0, 1, 7]),
        "return_overflowing_tokens": given.ConsumeBool(),
        "add_special_tokens": given.ConsumeBool(),
        "split_special_tokens": given.ConsumeBool(),
        "padding_side": given.PickValueInList(["left", "right"]),
    }
    if options["max_length"] is None:  # else transformers takes what the last call has left
        options["truncation"] = False
        options["padding"] = bool(options["padding"])
    pair = given.PickValueInList(PAIRS)
    match given.ConsumeIntInRange(0, 3):
        case 0:
            assert_same(pair, text(), **options, **DETAILS)
        case 1:
            assert_same(pair, text(), text(), **options, **DETAILS)
        case 2:
            assert_same(pair, several(), **options, **DETAILS)
        case 3:
            assert_same(pair, several(), is_split_into_words=True, **options, **DETAILS)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
