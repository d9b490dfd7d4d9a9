"""Write the quickstart's rows: free text in, one strict JSON record out.

    python examples/records/make_data.py

Training, validation and test rows share no sentence template, no name and no item, so that a score on the test rows
measures what was learnt and not what was remembered. Names, items and sentences are made up. Seeded: the files never
change unless this script does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

ROWS = {"train": 600, "validation": 60, "test": 80}
LEAD = "Order to JSON: "

FIRST = {
    "train": (
        "Amara Bruno Chen Dalia Emeka Farah Goran Hana Ivan Jolanta Kofi Leila Mateo Nadia Oskar Priya "
        "Quentin Rosa Samir Tomas Ulrike Viktor Wanda Yusuf Zofia Aiko Bilal Carmen Dmitri Elif Fatou Giulia "
        "Henrik Ines Jamal Katya Lars Mei Noor Olga Pedro Ruth Sven Thandi Umar Vera Wei Ximena Yara Zane "
        "Aleksander Beatriz Caspian Edith Florian Gustavo Hilde Idris Juliette Kirsten Leopold Magnus Nuria "
        "Orsolya Pascal Rafaela Sigrid Teodor Ursula Valentin Winifred Xavier Yolanda Zuzana Angus Haruki Igor "
        "Kenji Ludmila Miriam Naoko Oluwaseun Piotr Rashid Saskia Takumi"
    ).split(),
    "validation": "Astrid Boris Chidi Deniz Esther Felipe Greta Hugo Imani Jonas".split(),
    "test": "Agnes Benoit Clara Daichi Elena Fergus Gulnara Hassan Irina Joaquin Kamala Linus Marta Nikhil".split(),
}
LAST = {
    "train": (
        "Adeyemi Bauer Castillo Dubois Eriksen Fofana Garcia Haddad Ito Jansen Kowalski Lindqvist Moreau "
        "Nakamura Okonkwo Petrov Quispe Rossi Singh Tanaka Usman Vasquez Weber Xu Yilmaz Zhang Abdi Brandt "
        "Cohen Diallo Evans Fischer Gupta Hoang Ibrahim Jovanovic Kim Larsen Mensah Novak Ortiz Park Rahman "
        "Schmidt Torres Ueda Varga Walsh"
    ).split(),
    "validation": "Almeida Becker Chukwu Dahl Eze Ferrari Grant Holm Ivanov Jensen".split(),
    "test": "Andrade Bergman Celik Duval Egan Farouk Greco Horvat Iqbal Jacobs Keita Lund Mbeki Nilsson".split(),
}
ITEMS = {
    "train": (
        "standing desks|office chairs|desk lamps|steel shelves|coffee mugs|whiteboards|water bottles|"
        "notebooks|bicycle helmets|garden benches|paper towels|wall clocks|phone cases|wooden crates|"
        "picture frames|door handles|ceiling fans|rain jackets|work gloves|cotton towels|glass jars|"
        "floor mats|laptop stands|travel bags|tool boxes|bar stools|fire extinguishers|solar panels|"
        "copper pipes|paint brushes|tea kettles|camping tents|book shelves|desk fans|key rings|mail boxes|"
        "safety vests|lunch boxes|baking trays|flower pots"
    ).split("|"),
    "validation": "filing cabinets|hand mixers|yoga mats|ladders|headphones|soup bowls|pine boards|door mats".split(
        "|"
    ),
    "test": (
        "folding tables|wool blankets|bread knives|traffic cones|bird feeders|measuring cups|shower curtains|"
        "extension cords|oak barrels|table cloths"
    ).split("|"),
}
# Each holds all five facts once, in any order.
TEMPLATES = {
    "train": """
{name} ordered {qty} {item} on {date} for {amount}.
On {date}, {name} bought {qty} {item} at a total of {amount}.
Please book {qty} {item} for {name}, delivery {date}, total {amount}.
Hi, this is {name}. I'd like {qty} {item} by {date}. We agreed on {amount}.
{amount} was paid by {name} for {qty} {item}; they arrive on {date}.
Invoice for {name}: {qty} x {item}, due {date}, {amount}.
Dear team, {name} here. Send us {qty} {item} before {date}. The price is {amount}.
Receipt. Customer {name}. {qty} {item}. Total {amount}. Date {date}.
We sold {qty} {item} to {name} for {amount} on {date}.
{date}: {name}, {qty} {item}, {amount}.
{name} called and wants {qty} {item}. Ship on {date}. Charge {amount}.
The {qty} {item} for {name} cost {amount} and leave the warehouse on {date}.
Could you deliver {qty} {item} to {name} on {date}? The invoice says {amount}.
Order from {name}, {amount} in all: {qty} {item}, wanted on {date}.
For {amount} {name} gets {qty} {item}, to be handed over on {date}.
Note to self: {name} needs {qty} {item} on {date}, quoted {amount}.
{qty} {item} / {name} / {date} / {amount}
Good morning! {name} would like to confirm {qty} {item} for {amount}, arriving {date}.
As agreed with {name} on {date}: {qty} {item} at {amount}.
{name} signed for {qty} {item} worth {amount} on {date}.
Thanks for your order, {name}! Your {qty} {item} ({amount}) will reach you on {date}.
Purchase of {qty} {item}, buyer {name}, sum {amount}, delivery date {date}.
Ship {qty} {item} to {name} on {date} and bill {amount}.
It's {name} again. Make it {qty} {item} for {amount}, and please have them here on {date}.
Total {amount} for {qty} {item}. Customer: {name}. Needed by {date}.
By {date} we must send {name} the {qty} {item} that were sold for {amount}.
Payment of {amount} received from {name} for {qty} {item}, dispatch on {date}.
{name} took {qty} {item} from us on {date} and paid {amount}.
New order: {qty} {item}. Who: {name}. When: {date}. How much: {amount}.
When you see {name} on {date}, hand over {qty} {item} and collect {amount}.
The quote of {amount} for {qty} {item} was accepted by {name} on {date}.
Sold to {name} on {date}: {qty} {item}, {amount} paid in cash.
I spoke with {name}; they want {qty} {item} at {amount}, to be there on {date}.
Reminder: {qty} {item} go out to {name} on {date}, {amount} still open.
For {name}: {qty} {item}. Price {amount}. Deliver on {date}.
{name}'s order of {qty} {item} came to {amount} and was placed on {date}.
Hello, may I have {qty} {item} on {date}? I can pay {amount}. Regards, {name}
Delivery on {date}, {qty} {item}, recipient {name}, value {amount}.
We owe {name} {qty} {item}; they paid {amount} and expect them on {date}.
Contract with {name}: {amount} for {qty} {item}, effective {date}.
Item: {item}. Quantity: {qty}. Client: {name}. Date: {date}. Price: {amount}.
Date {date}, client {name}, product {item}, pieces {qty}, amount {amount}.
{name} asked for {qty} {item} last week; we ship them on {date} for {amount}.
Put {name} down for {qty} {item}, {amount}, on {date}.
Got {amount} from {name}. Pack {qty} {item} for {date}.
{qty} {item} were delivered to {name} on {date} at a price of {amount}.
{name}, your {qty} {item} are ready. Pick them up on {date} and bring {amount}.
Our driver takes {qty} {item} to {name} on {date}. Amount due: {amount}.
""",
    "validation": """
{name} has reserved {qty} {item} until {date}; the deposit covers {amount}.
Sales log, {date}. {qty} {item} went to {name}, earning {amount}.
Voice note: hey, {name} speaking, get me {qty} {item}, {amount} is fine, {date} works.
Amount: {amount}. Goods: {qty} {item}. Buyer: {name}. Day of delivery: {date}.
Since {name} paid {amount} up front, the {qty} {item} must arrive on {date}.
Attached is the bill of {amount} for the {qty} {item} that {name} received on {date}.
""",
    "test": """
Just closed a deal with {name}: {qty} {item}, {amount}, out the door on {date}.
Hey! {qty} {item} please, for {date}. {amount} is what you told me. Cheers, {name}
Confirmation. On {date} the amount of {amount} was charged to {name} for {qty} {item}.
{name} is expecting {qty} {item} on {date}, and the bill comes to {amount}.
Customer {name} requests {qty} {item}; budget {amount}; latest date {date}.
The shop promised {name} that {qty} {item} would be there on {date} for only {amount}.
Record this sale: {date}, {amount}, {qty} {item}, {name}.
To whom it may concern: {name} bought {qty} {item} from us, paying {amount} on {date}.
""",
}
MONTHS = "January February March April May June July August September October November December".split()
CURRENCIES = {
    "USD": ("${}", "{} dollars", "USD {}"),
    "EUR": ("€{}", "{} euros", "EUR {}"),
    "GBP": ("£{}", "{} pounds", "GBP {}"),
}


def written_date(day: date, rng: random.Random) -> str:
    """A date as people write it, never in a form that could be read two ways."""
    month = MONTHS[day.month - 1]
    ordinal = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10 if day.day not in (11, 12, 13) else 0, "th")
    return rng.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{month} {day.day}{ordinal}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            day.isoformat(),
        )
    )


def amount(rng: random.Random) -> tuple[float | int, str, str]:
    """``(number, currency, as written)``"""
    currency = rng.choice(list(CURRENCIES))
    whole = rng.choice((rng.randrange(20, 1000), rng.randrange(1000, 10_000)))
    cents = rng.choice((0, 0, 0, rng.choice((25, 45, 75, 95, 99))))
    value = whole + cents / 100 if cents else whole
    digits = f"{value:,.2f}" if cents else f"{whole:,}"
    return value, currency, rng.choice(CURRENCIES[currency]).format(digits)


def rows(part: str, count: int) -> Iterator[dict[str, str]]:
    """``count`` different rows of a part, its templates in turn."""
    rng = random.Random(f"records/{part}")
    templates = [t for t in TEMPLATES[part].strip().split("\n") if t]
    seen = set()
    while len(seen) < count:
        template = templates[len(seen) % len(templates)]
        day = date(2024, 1, 1) + timedelta(days=rng.randrange(3 * 365))
        value, currency, written = amount(rng)
        record = {
            "name": f"{rng.choice(FIRST[part])} {rng.choice(LAST[part])}",
            "item": rng.choice(ITEMS[part]),
            "quantity": rng.randrange(2, 100),
            "date": day.isoformat(),
            "amount": value,
            "currency": currency,
        }
        text = template.format(
            name=record["name"],
            item=record["item"],
            qty=record["quantity"],
            date=written_date(day, rng),
            amount=written,
        )
        if text not in seen:
            seen.add(text)
            yield {"prompt": LEAD + text, "response": json.dumps(record, ensure_ascii=False)}


def files() -> dict[str, str]:
    """File names and what stands in them."""
    return {
        f"{part}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(part, count))
        for part, count in ROWS.items()
    }


if __name__ == "__main__":
    for name, text in files().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
