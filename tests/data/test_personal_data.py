"""Personal data: what is found, what is left alone, and placeholders that tell values apart."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.cleaning import find_personal_data
from luthier.data.cleaning.personal import KINDS, Masker, is_bank_card, is_id_card, mask_personal_data, veil

# Built here, so that no scanner takes this file for a leak.
OPENAI, AWS, GITHUB = "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0", "AKIA" + "IOSFODNN7EXAMPLE", "ghp" + "_" + "a1B2c3" * 6
JWT = "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0" + ".dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA1234\nabcd==\n-----END RSA PRIVATE KEY-----"

FOUND = [
    ("phone", "电话13812345678，谢谢", "13812345678"),
    ("phone", "我的手机号是138-1234-5678。", "138-1234-5678"),
    ("phone", "请打 138 1234 5678 找我", "138 1234 5678"),
    ("phone", "+86 13912345678", "+86 13912345678"),
    ("phone", "8613912345678 或 +8613912345678", "+8613912345678"),
    ("phone", "座机：010-62785001", "010-62785001"),
    ("phone", "公司电话（0755）86013388转801", "（0755）86013388"),
    ("phone", "传真 021-6278 5001", "021-6278 5001"),
    ("phone", "Call me at (415) 555-2671 tonight", "(415) 555-2671"),
    ("phone", "Call 415-555-2671.", "415-555-2671"),
    ("phone", "1-415-555-2671", "1-415-555-2671"),
    ("phone", "ring +44 20 7946 0958, please", "+44 20 7946 0958"),
    ("phone", "WhatsApp: +14155552671", "+14155552671"),
    ("phone", "+49 (0)30 901820", "+49 (0)30 901820"),
    ("id_card", "身份证号11010519491231002X，请核对", "11010519491231002X"),
    ("id_card", "ID: 440308199901010013", None),  # wrong check digit
    ("email", "邮箱zhangsan@qq.com。", "zhangsan@qq.com"),
    ("email", "Write to John.Doe+news@mail.example.co.uk, thanks", "John.Doe+news@mail.example.co.uk"),
    ("email", "<li.si@example.com>", "li.si@example.com"),
    ("bank_card", "卡号6222021234567890128", "6222021234567890128"),
    ("bank_card", "卡号6222021234567890129", None),  # wrong check digit
    ("bank_card", "my card 4111 1111 1111 1111 expired", None),  # a stand-in: two different digits
    ("bank_card", "my card 4539 1488 0343 6467 expired", "4539 1488 0343 6467"),
    ("bank_card", "card: 4539148803436467", "4539148803436467"),
    ("bank_card", "Amex 3782 822463 10005", "3782 822463 10005"),
    ("ip", "服务器192.168.1.23上", "192.168.1.23"),
    ("ip", "from 203.0.113.77:8080 at noon", "203.0.113.77"),
    ("ip", "http://10.20.30.40/admin", "10.20.30.40"),
    ("ip", "at 2001:db8:85a3::8a2e:370:7334 now", "2001:db8:85a3::8a2e:370:7334"),
    ("credentials", "postgres://admin:s3cret@db.example.com/x", "admin:s3cret"),
    ("key", f"OPENAI_API_KEY={OPENAI}", OPENAI),
    ("key", f"use {AWS} here", AWS),
    ("key", f"token {GITHUB}", GITHUB),
    ("key", f"Authorization: Bearer {JWT}", JWT),
    ("key", f"key:\n{PEM}\n", PEM),
    ("key", 'api_key = "f3a9c27b8d1e4056"', "f3a9c27b8d1e4056"),
    ("key", "密钥：Zx81kq92LmP0", "Zx81kq92LmP0"),
    ("password", "password: Tr0ub4dor&3", "Tr0ub4dor&3"),
    ("password", "我的密码是Abc12345xyz，别告诉别人", "Abc12345xyz"),
]


@pytest.mark.parametrize(("kind", "text", "value"), FOUND, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(FOUND)])
def test_what_is_found(kind, text, value):
    found = find_personal_data(text)
    assert [(f.kind, f.value) for f in found] == ([(kind, value)] if value else [])
    for item in found:
        assert text[item.start : item.end] == item.value
        assert mask_personal_data(text) == text.replace(item.value, f"[{kind.upper()}]")


@pytest.mark.parametrize(
    "text",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "一共 13800000000 元，其中 15912345678 元是借的",
        "The company made $13812345678 last year, 13812345678 dollars in all",
        "13812345678 * 2 = 27624691356",
        "订单号：13812345678，运单号 4539148803436467",
        "Order number 4539148803436467 shipped on 2023-05-17 10:30:45",
        "ISBN 978-7-302-51123-4 and 9787302511234",
        "时间戳1672531199000，日期20230517，2023-05-17",
        "price 1,234,567.89 and 3.14159265358979, phone book",
        "version 10.2.13.4, v1.22.33.44, see section 12.3.4.15, pip install x==10.20.30.40",
        "第 12.13.14.15 节；Chrome/120.0.0.0；DNS 8.8.8.8；127.0.0.1；255.255.255.0；0.0.0.0",
        "12:30:45, std::vector<int>::iterator, dead::beef, a::b::c, 00:1A:2B:3C:4D:5E",
        "f(x) = 5 +12345678901 - 3, (a +4915112345678)",
        "git@github.com:owner/repo.git, logo@2x.png, @app.route, a@b",
        "api_key = os.environ['KEY'], token = tokenizer.encode(text), max_tokens: 4096, password = input()",
        'api_key="YOUR_API_KEY_123", password: ********, token=<your-token-1>, secret = None',
        "sk-learn-is-a-well-known-library, task-force-one-two-three",
        "0.1234567890123456 110105194912310021 12345678901234567890",
        "400-820-8820 是客服热线，110、120、10086",
        "SELECT * FROM t WHERE id = 13812345678",
    ],
)
def test_what_is_no_personal_data(text):
    assert [(f.kind, f.value) for f in find_personal_data(text)] == []
    assert mask_personal_data(text) == text


def test_check_digits():
    assert is_id_card("11010519491231002X") and is_id_card("11010519491231002x")
    assert not is_id_card("110105194912310021") and not is_id_card("99010519491231002X")
    assert not is_id_card("11010519490231002X")  # 31 February
    assert is_bank_card("6222 0212 3456 7890 129") != is_bank_card("6222 0212 3456 7890 128")
    assert not is_bank_card("0000 0000 0000 0000") and not is_bank_card("1234567812345670")


def test_the_same_value_has_one_number_in_every_text_of_a_row():
    mask = Masker(numbered=True)
    assert mask("打13812345678或139 1234 5678") == "打[PHONE_1]或[PHONE_2]"
    assert (
        mask("是 138-1234-5678 吗？也可 +86 13912345678，或 a@b.cn") == "是 [PHONE_1] 吗？也可 [PHONE_2]，或 [EMAIL_1]"
    )
    assert mask.counts == {"phone": 4, "email": 1}
    assert Masker(numbered=True)("[PHONE_1] 之外还有 13812345678") == "[PHONE_1] 之外还有 [PHONE_2]"


def test_only_the_kinds_asked_for():
    text = "13812345678 a@b.cn"
    assert mask_personal_data(text, kinds=("email",)) == "13812345678 [EMAIL]"
    assert {f.kind for f in find_personal_data(text, kinds=("phone", "ip"))} == {"phone"}


def test_a_report_shows_no_whole_value():
    assert veil("电话13812345678。") == "电话13*******78。"


@given(st.text(alphabet="0123456789 -.+()@:/=abkeyAKI_市密码是元，\n", max_size=80))
def test_masking_twice_is_masking_once_and_what_is_not_found_stays(text):
    masked = mask_personal_data(text)
    assert mask_personal_data(masked) == masked
    if not find_personal_data(text):
        assert masked == text
    numbered = mask_personal_data(text, numbered=True)
    assert mask_personal_data(numbered, numbered=True) == numbered


@given(st.text())
def test_any_text_at_all(text):
    spans = [(f.start, f.end) for f in find_personal_data(text)]
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


@given(st.integers(0, 10**6))
def test_made_up_identity_numbers_phones_and_cards_are_found_in_chinese_and_english(seed):
    rng = random.Random(seed)
    born = f"{rng.randint(1940, 2015)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    body = f"{rng.choice(('110105', '310101', '440305', '510104'))}{born}{rng.randint(0, 999):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    identity = body + "10X98765432"[sum(w * int(d) for w, d in zip(weights, body, strict=True)) % 11]
    phone = f"1{rng.choice(('38', '39', '50', '77', '86', '98'))}{rng.randint(0, 10**8 - 1):08}"
    kinds = Counter(f.kind for f in find_personal_data(f"我叫张三，身份证{identity}，手机{phone}。"))
    wanted = {"id_card": 1} if phone.endswith("0000000") else {"id_card": 1, "phone": 1}
    assert kinds == wanted


@pytest.mark.parametrize("size", [200_000])
@pytest.mark.parametrize("unit", ["1", "1 ", "-", "a@", "a.", ":", "key=", "eyJ", "+1 ", "(", "://a:", "1.1."])
def test_no_text_takes_long(unit, size):
    mask_personal_data(unit * (size // len(unit)))


def test_real_rows_hold_what_a_reader_finds_there_and_no_more(shared_data):
    sums = [json.loads(line) for line in (shared_data / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    assert not [f for row in sums for text in row.values() for f in find_personal_data(text)]
    with (shared_data / "waimai_10k.csv").open(encoding="utf-8") as file:
        reviews = [row["review"] for row in csv.DictReader(file)]
    # Each read by eye: three riders' numbers among 11,987 reviews.
    assert Counter(f.kind for text in reviews for f in find_personal_data(text)) == {"phone": 3}
    rows = json.loads((shared_data / "alpaca_zh_demo.json").read_text("utf-8"))
    found = [f for row in rows for key in ("instruction", "input", "output") for f in find_personal_data(row[key])]
    assert [f.value for f in found] == ["192.168.0.1", "192.168.1.1"]


def test_the_kinds_are_those_documented():
    assert set(KINDS) == {"credentials", "key", "password", "email", "id_card", "bank_card", "phone", "ip"}
