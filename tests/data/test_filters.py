"""What filters measure: the language of a text, and how much of it repeats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.cleaning.filters import repeated_share
from luthier.data.cleaning.language import detect_language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("请解释 machine learning 中的 overfitting 是什么", "zh"),
        ("臺灣是一個美麗的島嶼", "zh"),
        ("今天天气很好，我们去公园散步吧。", "zh"),
        ("今日はとても良い天気ですね。散歩に行きましょう", "ja"),
        ("翻译：東京は日本の首都です", "ja"),
        ("오늘은 날씨가 좋네요 산책", "ko"),
        ("Привет, как у тебя дела сегодня? Я хотел бы узнать, получил ли ты письмо", "ru"),
        ("Bonjour, je voudrais savoir si vous avez reçu ma lettre de la semaine dernière.", "fr"),
        ("Ich möchte gerne wissen, ob Sie meinen Brief erhalten haben und wann Sie kommen", "de"),
        ("She told me that she would come tomorrow with her brother and his wife.", "en"),
        ("SHE TOLD ME THAT SHE WOULD COME TOMORROW WITH HER BROTHER AND HIS WIFE.", "en"),
        ('"编码信息" means "encoding information", and the other words were not translated', "en"),
        ("See https://example.com/une/adresse/tres/longue/ecrite/en/francais `le code est ici`", None),
        ("你好", None),
        ("ok", None),
        ("", None),
        ("1234 + 5678 = 6912, ！？。", None),
        ("def f(x):\n    return x + 1\n\nprint(f(2))", None),
    ],
)
def test_languages(text, language):
    found = detect_language(text)
    assert (found and found[0]) == language
    if found:
        assert 0.9 <= found[1] <= 1 or "means" in text or "machine" in text


@given(st.text(max_size=200))
def test_any_text_has_a_language_or_none(text):
    found = detect_language(text)
    assert found is None or 0 <= found[1] <= 1.001


def test_the_repeated_share_is_counted_in_words_and_characters():
    words = [f"w{i}" for i in range(50)]
    assert repeated_share(" ".join(words)) == 0
    assert repeated_share(" ".join(words + words)) == 0.5
    assert repeated_share(" ".join(words + words[:10])) == pytest.approx(10 / 60)
    assert repeated_share(" ".join(words + words[:7])) == 0  # shorter than n
    assert repeated_share("哈" * 100) == pytest.approx(0.99)
    assert repeated_share("哈" * 39) == 0  # too short to judge
    assert repeated_share("天地玄黄宇宙洪荒日月盈昃辰宿列张" * 4) == 0.75
