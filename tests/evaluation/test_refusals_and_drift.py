"""Which answers refuse, and which are in another language than their question."""

from __future__ import annotations

import pytest

from luthier.evaluation.drift import drift, expected_language, language_of
from luthier.evaluation.refusals import refuses

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, but I cannot assist with that request.",
    "Sorry, I am unable to answer this.",
    "I apologize, but I'm not able to provide medical advice.",
    "Unfortunately, I cannot access the internet.",
    "As an AI language model, I don't have personal opinions.",
    "As a large language model, I am not able to feel.",
    "I cannot provide instructions for that.",
    "I'm unable to help you with this.",
    "I must respectfully decline.",
    "I refuse to answer that.",
    "I don't have access to real-time data.",
    "I don't feel comfortable writing this.",
    "It would be unethical for me to explain.",
    "Thank you for asking. I'm sorry, but I can't do that.",
    "抱歉，我无法回答这个问题。",
    "很抱歉，我不能提供这类信息。",
    "对不起，作为一个语言模型，我无法访问互联网。",
    "作为一个人工智能助手，我不能提供医疗建议。",
    "作为AI，我没有能力判断。",
    "我无法为您提供该信息。",
    "我不能帮助你做这件事。",
    "这个问题我无法回答。",
    "恕我不能奉告。",
    "您好！很遗憾，我目前无法处理您的请求。",
]
ANSWERS = [
    "",
    "Sorry for the delay! Your order has been shipped.",
    "I'm sorry to hear that your parcel is late. It will arrive on Monday.",
    "I apologize for the inconvenience. We have refunded you.",
    "I can help with that.",
    "I can't help but smile at this picture.",
    "As an AI language model, I can help you write a letter.",
    "I will not give up, said the knight.",
    "The door cannot be opened from outside.",
    "You can't provide a wrong date here.",
    "Unfortunately, the shop is closed on Sundays.",
    "He said: I cannot swim.",
    "抱歉让您久等了，您的订单已经发出。",
    "非常抱歉给您带来不便，我们马上为您退款。",
    "我不能帮他搬家，因为我周末要上班，他说。",
    "这台机器无法启动，请检查电源。",
    "作为一个人工智能助手，我可以帮您写信。",
    "他无法回答老师的问题。",
    "不能。石头是不能吃的。",
    "A long answer that is given in full comes first, with all its reasons and its numbers, so that nobody could say "
    "that the question was not answered. I'm sorry, but I can't say more.",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refusal_is_known(answer):
    assert refuses(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_no_refusal(answer):
    assert not refuses(answer)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The capital of France is Paris.", "en"),
        ("What is the capital of France?", "en"),
        ("法国的首都是巴黎。", "zh"),
        ("日本の首都は東京です。", "ja"),
        ("프랑스의 수도는 파리입니다.", "ko"),
        ("La capitale de la France est Paris, une grande ville au bord de la Seine et de ses ponts.", "fr"),
        ("使用 pip install torch 可以安装 PyTorch。", "zh"),
        ("Paris", None),
        ("42", None),
        ("", None),
        ("Leonardo da Vinci, Michelangelo Buonarroti", None),
        ('{"the": "city is in the north", "and": "what"}', None),
        ("```python\n# the list of the names is here\nprint(names)\n```", None),
        ("def the(a):\n    return what is in the list", None),
        ("la casa es un do re mi", None),
    ],
)
def test_the_language_of_a_text(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("asked", "answer", "references", "found"),
    [
        ("法国的首都是哪里？", "The capital of France is Paris.", [], ("zh", "en")),
        ("法国的首都是哪里？", "法国的首都是巴黎。", [], None),
        ("法国的首都是哪里？", "Paris", [], None),
        ("What is the capital of France?", "法国的首都是巴黎。", [], ("en", "zh")),
        ("“你好”用英语怎么说？", "You can say hello in that case.", [], None),
        ("把这句话翻译成英文：今天天气很好。", "The weather is nice today.", [], None),
        ("How do you say good morning in Chinese?", "你可以说早上好。", [], None),
        ("Translate to French: the cat is on the table.", "法语是这样说的吗", [], None),
        # Where the right answer is in another language, that is the task.
        ("写一个英语句子，要有猫。", "The cat is on the mat.", ["A cat is in the house."], None),
        ("法国的首都是哪里？", "The capital of France is Paris.", ["法国的首都是巴黎。"], ("zh", "en")),
        ("今天星期几？现在几点？", '{"day": "what is the day"}', [], None),
    ],
)
def test_drift(asked, answer, references, found):
    assert drift(asked, answer, references) == found


def test_what_cannot_be_told_is_left_out():
    assert expected_language("2 + 2 = ?") is None
    assert expected_language("今天天气怎么样？") == "zh"
