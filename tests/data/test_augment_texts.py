"""Synonyms and slips of typing: what changes, and what must not."""

from __future__ import annotations

import csv
import json
import random
import re
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from luthier import DataAugmentor
from luthier.data.augmentation import noise_injection, synonym_replacement
from luthier.data.augmentation.lexicons import chinese, english
from luthier.data.augmentation.noise import _FIXED_HAN, KINDS
from luthier.data.augmentation.text import dominant_language
from luthier.errors import UserError


def digits(text):
    return [c for c in text if c.isdigit()]


def every_synonym(text, **options):
    """All results of many seeds, with every word changed that can."""
    return {synonym_replacement(text, random.Random(i), 1.0, **options) for i in range(30)}


def test_synonyms_keep_form_part_of_speech_and_case():
    assert every_synonym("She bought a car.") == {"She purchased an automobile."}
    assert "Calculate" not in "".join(every_synonym("Calculate the sum."))
    # "bikes" may be a verb, and nothing before it says that it is none
    assert every_synonym("Two kids buy 3 larger bikes.") == {
        "Two children purchase 3 bigger bikes.",
        "Two youngsters purchase 3 bigger bikes.",
    }


def test_a_word_of_two_parts_of_speech_changes_only_where_the_sentence_tells_which():
    assert every_synonym("They need to store it") == {"They need to store it"}  # to store: not a shop
    assert every_synonym("He walked to the store") == {"He walked to the shop"}
    assert every_synonym("He wants to start") == {"He wants to begin"}
    assert every_synonym("from start to end") == {"from start to end"}


def test_synonyms_in_chinese_respect_words_and_part_of_speech():
    assert every_synonym("但是送餐太慢") <= {"可是送餐太慢", "不过送餐太慢"}
    # 但是 inside nothing else; 于是 and 不但 are other words, 高兴 in 高兴娜 is a part of a name
    assert every_synonym("不但是他") == {"不但是他"}
    assert synonym_replacement("这家餐馆非常好吃", random.Random(0), 1.0) != "这家餐馆非常好吃"


def test_what_the_answer_refers_to_stays():
    text = "Was the large car cheap? 这家餐厅很干净"
    for changed in every_synonym(text, keep="The cars were fine. 餐厅干净"):
        assert "car" in changed and "餐厅" in changed and "干净" in changed and "large" not in changed


FIXED = [
    '"buy a car"',
    "`buy a car`",
    "```\nbuy a car\n```",
    "$buy + car$",
    "https://car.example/buy",
    "{car}",
    "<car>",
    "“购买汽车但是”",
    "《但是汽车》",
    "car_buy",
    "buy_2",
    "<|car|>",
    "def buy(car): return car;",
    "buy(car)",
    "me@car.buy",
    "CAR",
    "buyCar",
]


@pytest.mark.parametrize("fixed", FIXED)
def test_code_quotes_links_and_placeholders_stay(fixed):
    text = f"Usually it is cheap\n{fixed}\n通常很便宜"
    for i in range(20):
        rng = random.Random(i)
        assert fixed in synonym_replacement(text, rng, 1.0)
        assert fixed in noise_injection(text, rng, 1.0)


def test_dollars_are_no_latex():
    assert every_synonym("It costs $5, usually, or $6") == {"It costs $5, normally, or $6"}


def test_names_stay():
    assert noise_injection("Mark met Natalia in London", random.Random(1), 1.0) == "Mark met Natalia in London"
    assert every_synonym("Natalia Store in Big Sur") == {"Natalia Store in Big Sur"}


def test_every_english_pair_is_of_the_table_and_no_entry_names_itself():
    for form, entries in english._table().items():
        for entry in entries:
            assert form not in entry.substitutes and entry.substitutes and entry.pos in "nvar"
    for (word, pos), others in chinese._table().items():
        assert word not in others and pos in "nvadctr"


def test_chinese_entries_have_the_part_of_speech_that_jieba_gives():
    """An entry whose word jieba never tags so would be dead."""
    tags = chinese._jieba().word_tag_tab
    dead = [w for (w, pos) in chinese._table() if tags.get(w, "x")[0] != pos]
    assert len(dead) / len(chinese._table()) < 0.2


# --- noise ---


def test_noise_touches_chinese_where_splitting_at_spaces_does_nothing():
    text = "这家店的外卖送得太慢了，味道一般"
    for kind in KINDS:
        changed = {noise_injection(text, random.Random(i), 0.1, kinds=[kind]) for i in range(20)}
        assert text not in changed and len(changed) > 3, kind
    assert "，" in noise_injection(text, random.Random(0), 1.0)


def test_kinds_of_english_slips():
    def of(kind, text="remember"):
        return {noise_injection(text, random.Random(i), kinds=kind) for i in range(60)}

    assert all(len(w) == 9 and re.search(r"(.)\1", w) for w in of("insert"))
    assert all(len(w) == 7 and w[0] == "r" and w[-1] == "r" for w in of("delete"))
    assert all(len(w) == 8 and sorted(w) == sorted("remember") for w in of("swap"))
    assert all(len(w) == 8 and sum(a != b for a, b in zip(w, "remember", strict=True)) == 1 for w in of("keyboard"))
    assert of("homophone") == {"remember"} and of("homophone", "lost their way") == {"lost there way"}


def test_homophones_sound_the_same_and_are_common():
    from pypinyin import lazy_pinyin

    text = "外面下雨了请带伞"
    for i in range(30):
        changed = noise_injection(text, random.Random(i), 0.1, kinds=["homophone"])
        (at,) = [j for j, (a, b) in enumerate(zip(text, changed, strict=True)) if a != b]
        assert lazy_pinyin(changed[at]) == lazy_pinyin(text[at])
        changed[at].encode("gb2312")


def test_no_slip_turns_a_meaning_round():
    text = "他不买三个，没有卖两斤，不断说不错 never three there"
    for i in range(200):
        changed = noise_injection(text, random.Random(i), 1.0)
        for kept in ("不买三", "没", "两", "卖", "不断", "不错", "never", "three"):
            assert kept in changed
        assert changed.count("three") == 1
    # 蜂蜜 is honey, 蜜蜂 a bee
    assert noise_injection("蜜蜂", random.Random(0), 1.0, kinds=["swap"]) == "蜜蜂"
    assert noise_injection("味道", random.Random(0), 1.0, kinds=["swap"]) == "道味"


def test_a_word_of_one_character_is_not_left_out():
    changed = {noise_injection("我吃商品", random.Random(i), kinds=["delete"]) for i in range(20)}
    assert changed == {"我吃商", "我吃品"}
    assert all("差" in noise_injection("商品太差", random.Random(i), 1.0) for i in range(50))


def test_share_of_words():
    words = " ".join(["remember"] * 100)
    for ratio, slips in ((0.0, 0), (0.001, 1), (0.1, 10), (0.5, 50)):
        changed = noise_injection(words, random.Random(0), ratio)
        assert sum(w != "remember" for w in changed.split()) == slips


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_injection("a", None, 1.5), "noise_ratio=1.5"),
        (lambda: noise_injection("a", kinds=["typo"]), "no such kind of noise"),
        (lambda: noise_injection("a", kinds=[]), "no such kind of noise"),
        (lambda: noise_injection("a", language="fr"), "language='fr'"),
        (lambda: synonym_replacement("a", ratio=-1), "ratio=-1"),
        (lambda: DataAugmentor.back_translation("a"), "needs a translator"),
    ],
)
def test_wrong_options_are_told(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_one_language_alone():
    text = "usually it is cheap 通常很便宜"
    assert "通常很便宜" in synonym_replacement(text, random.Random(0), 1.0, language="en")
    assert "usually it is cheap" in synonym_replacement(text, random.Random(0), 1.0, language="zh")
    assert "通常很便宜" in noise_injection(text, random.Random(0), 1.0, language="en")
    assert "usually it is cheap" in noise_injection(text, random.Random(0), 1.0, language="zh")


def test_japanese_is_not_taken_for_chinese():
    text = "東京の大学で勉強しています、経験は通常です"
    assert noise_injection(text, random.Random(0), 1.0) == text == synonym_replacement(text, random.Random(0), 1.0)
    assert dominant_language(text) == "other"


WORDS = st.sampled_from(
    ["buy", "the", "large", "car", "usually", "there", "three", "12", "$5", "但是", "非常好吃", "三个", "不错", "购买",
     "“引”", "`x`", "\n", "é", "😀", "Ünal", "don't", "```", '"', "\\(", "{", "\u3000", "<|im_end|>", "a@b.c"]
)  # fmt: skip
TEXTS = st.one_of(
    st.lists(WORDS, max_size=15).map(" ".join), st.lists(WORDS, max_size=15).map("".join), st.text(max_size=80)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=TEXTS, keep=TEXTS, seed=st.integers(0, 9), ratio=st.sampled_from([0.0, 0.1, 1.0]))
@example(text="$" * 50, keep="", seed=0, ratio=1.0)
def test_any_text_comes_through_with_its_digits_and_the_same_twice(text, keep, seed, ratio):
    for vary in (synonym_replacement, noise_injection):
        once = vary(text, random.Random(seed), ratio, keep=keep)
        assert once == vary(text, random.Random(seed), ratio, keep=keep)
        assert digits(once) == digits(text)
        if ratio == 0:
            assert once == text
        if vary is noise_injection:
            assert all(once.count(c) == text.count(c) for c in _FIXED_HAN & set(text))


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=9), max_size=8), seed=st.integers(0, 5))
def test_words_of_the_answer_get_no_slip(words, seed):
    text = " ".join(words)
    assert noise_injection(text, random.Random(seed), 1.0, keep=text) == text


def test_a_long_text_takes_no_time_out_of_proportion():
    import time

    taken: list[float] = []
    synonym_replacement("非常便宜")
    noise_injection("非常便宜")
    for times in (1, 8):
        text = 'She usually buys a large car, 但是非常便宜。{x} \\( $ " “ < ` ' * 40 * times
        began = time.perf_counter()
        noise_injection(text, random.Random(0), 0.5)
        synonym_replacement(text, random.Random(0), 0.5)
        taken.append(time.perf_counter() - began)
    assert taken[1] < 8 * 4 * taken[0] + 0.05


# --- real rows ---


def test_real_rows(shared_data):
    gsm = [json.loads(line) for line in (shared_data / "gsm8k_test.jsonl").read_text().splitlines()[:120]]
    rows = [(r["question"], r["answer"]) for r in gsm]
    with (shared_data / "waimai_10k.csv").open(encoding="utf-8") as file:
        rows += [(r["review"], r["label"]) for _, r in zip(range(120), csv.DictReader(file), strict=False)]
    changed = 0
    for i, (text, answer) in enumerate(rows):
        varied = synonym_replacement(text, random.Random(i), keep=answer)
        noisy = noise_injection(text, random.Random(i), keep=answer)
        assert digits(varied) == digits(text) == digits(noisy)
        assert noisy != text or len(text) < 12
        changed += varied != text
    assert changed / len(rows) > 0.25
