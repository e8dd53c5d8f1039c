"""Expressions from files and from people: what `re` says, without hanging."""

import random
import re
import time

import pytest
from retune.training.common.patterns import PatternTable, TypedPattern
from retune.training.config.lora import LoraConfig
from retune.training.config.reset import ResetConfig

NAMES = ["to_q", "mid.to_q", "down.0.attn1.to_q", "down.10.attn2.to_out.0", "to_qq", "a b", "", "x_to_q", "aaab", "ab1"]


def by_re(patterns, name):
    """peft's rule, `get_pattern_key`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})\Z", name)), None)


@pytest.mark.parametrize(
    "pattern",
    ["to_q", "attn1.to_q", "^down.*", ".*attn[12]\\.to_(q|k|out\\.0)", "down\\.\\d+\\..*", "a{2,3}b", "(a|b)*1?",
     "^to_q$", "[^b]+b", "(?:a+)+b", "\\w+", "x??_to_q", "a*?b", "down\\.(0|1\\d)\\.attn\\d\\.[a-z_.0-9]+",
     "(a{0,2}){2}ab", "", "to_[a-q]", "\\S+ \\S", "(|a)ab1"],
)  # fmt: skip
def test_an_expression_matches_what_peft_matches(pattern):
    table = PatternTable({pattern: 1})
    assert [table.get(name) for name in NAMES] == [by_re({pattern: 1}, name) for name in NAMES]


def test_the_first_of_several_decides_as_in_peft():
    patterns = {"attn1.to_q": 1, ".*to_q": 2, "to_q": 3, "[d].*": 4, "mid.to_q": 5}
    table = PatternTable(patterns)
    assert [table.get(name) for name in NAMES] == [by_re(patterns, name) for name in NAMES]


def test_random_expressions_agree_with_re():
    draw = random.Random(0)
    atoms = ["a", "b", ".", "[ab]", "[^a]", "(a|b)", "(ab|)", "\\w", "\\.", "(a|)"]
    for _ in range(300):
        pattern = "".join(draw.choice(atoms) + draw.choice(["", "", "*", "+", "?", "{0,2}"]) for _ in range(4))
        table = PatternTable({pattern: 1})
        for _ in range(5):
            name = "".join(draw.choice("ab.") for _ in range(draw.randrange(7)))
            assert table.get(name) == by_re({pattern: 1}, name), (pattern, name)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "(a?){30}a{30}", "((a*)*)*b"])
def test_expressions_that_blow_up_elsewhere_end_at_once(pattern):
    start = time.process_time()
    table = PatternTable({pattern: 1})
    assert table.get("a" * 60 + "!") is None
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("(a{1000}){1000}", "more than 20000 states"),
        ("((((a{0}){60000}){60000}){60000}){60000}", "more than 20000 states"),
        ("(a)\\1", "no look-around or back reference"),
        ("(?=a)a", "no look-around or back reference"),
        ("(?i)a", "sets flags"),
        ("(" * 3000 + ")" * 3000, "no regular expression"),
        ("a{99999999999999999999}", "no regular expression"),
    ],
)
def test_what_it_cannot_do_is_said(pattern, message):
    with pytest.raises(ValueError, match=message):
        PatternTable({pattern: 1})


def test_all_searches_together_have_an_end():
    table = PatternTable({f"(.*x){{30}}{i}": i for i in range(200)})
    with pytest.raises(ValueError, match="take too long"):
        for number in range(100_000):
            table.get("x" * 200 + str(number))


def test_any_number_of_plain_names_is_looked_up_at_once():
    table = PatternTable({f"down.{i}.to_q": i for i in range(200_000)})
    start = time.process_time()
    assert all(table.get(f"unet.down.{i}.to_q") == i for i in range(20_000))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern", ["", "attn2", "^text_encoders", r"attn[12]\.to_(q|k)\b", "^(?!.*attn1).*to_q$", "(?i)ATTN"]
)
def test_a_typed_expression_finds_what_re_finds(pattern):
    typed = TypedPattern("blocks", pattern, "attn2")
    for name in ("input_blocks.1.attn1.to_q", "input_blocks.1.attn2.to_q", "text_encoders.l.to_k", "proj_in"):
        assert typed.search(name) == bool(re.search(pattern, name)), name


@pytest.mark.parametrize("pattern", ["(a|aa)+$", "((a{1,100}){1,10}){1,10}b"])
def test_a_typed_expression_that_blows_up_is_stopped_and_named(pattern, monkeypatch):
    monkeypatch.setattr("retune.training.common.patterns.SECONDS", 0.2)
    typed, start = TypedPattern("target_regex", pattern, "attn2"), time.process_time()
    with pytest.raises(ValueError, match=r"target_regex is .*, which takes more than 0.2 s"):
        for _ in range(1000):  # all searches share the time
            typed.search("a" * 200 + "!")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(" * 900 + ")" * 900, "not a regular expression"),
        ("a{99999999}", "99999999 repetitions; expected at most 2000 and 10000"),
        ("((a{0,300}){300}){300}", "27000000 repetitions"),
        ("a" * 3000, "of 3000 characters"),
    ],
)
def test_a_typed_expression_that_cannot_be_used_is_named(pattern, message):
    with pytest.raises(ValueError, match=message):
        TypedPattern("blocks", pattern, "attn2")
    with pytest.raises(ValueError, match=message):
        LoraConfig(run_name="r", steps=1, target_regex=pattern)  # although "attention" does not use it
    with pytest.raises(ValueError, match=message):
        ResetConfig(layers="QK", blocks=pattern)
