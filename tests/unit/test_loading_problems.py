"""What ranks found, as one list."""

from __future__ import annotations

from sglang_minimax.loading.problems import Problems, joined


def problems(*lines: tuple[str, str], sentence: str | None = None) -> Problems:
    found = Problems()
    for group, line in lines:
        found.add(group, line)
    if sentence:
        found.say(sentence)
    return found


def test_nothing_is_nothing() -> None:
    assert not Problems()
    assert not joined([Problems(), Problems()])


def test_what_all_ranks_found_is_said_once() -> None:
    one = problems(("missing", "a"), sentence="No file.")
    both = joined([one, one])
    assert both.groups == {"missing": ["a"]}
    assert both.sentences == ["No file."]


def test_one_bad_rank_is_enough_and_named() -> None:
    both = joined([Problems(), problems(("misshapen", "a is [1]"), sentence="No file.")])
    assert both.groups == {"misshapen": ["a is [1] [rank 1]"]}
    assert both.sentences == ["No file. [rank 1]"]
    three = joined([Problems(), problems(("missing", "a")), problems(("missing", "a"))])
    assert three.groups == {"missing": ["a [ranks 1, 2]"]}


def test_a_line_of_one_rank_twice_is_not_two_ranks() -> None:
    twice = problems(("duplicate", "a"), ("duplicate", "a"))
    assert joined([twice, Problems()]).groups == {"duplicate": ["a [rank 0]"]}


def test_sentences_come_before_the_list() -> None:
    text = str(problems(("missing", "a"), sentence="No file.").error())
    first, second, third = text.splitlines()
    assert first == "No file."
    assert second.startswith("the weights do not fit the model (1 missing)")
    assert third == "  missing: a"


def test_a_sentence_alone_has_no_list() -> None:
    assert str(problems(sentence="No file.").error()) == "No file."


def test_one_takes_the_others() -> None:
    mine = problems(("missing", "a"))
    mine.take(problems(("missing", "b"), ("invalid", "c"), sentence="No."))
    assert mine.groups == {"missing": ["a", "b"], "invalid": ["c"]}
    assert mine.sentences == ["No."]
