"""Questions and texts to classify, as SAEBench takes them."""
import random
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from data.documents import embedded_documents, PARQUET_FILES
from data.tasks import (
    _stretches, load_questions, PROBING_DATASETS, probing_examples, Question, question_prompts)
from data_sets import error_of, prose, rows, write

# ---- Questions ----
def questions(n, **more):
    return [{"question": f"Which is {i}? ", "choices": [f"{i}{letter}" for letter in "wxyz"], "answer": i % 4, **more}
            for i in range(n)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_questions_of_a_file(tmp_path, suffix):
    path = write(tmp_path / f"some{suffix}", questions(9, subject="human_aging"))
    found = load_questions(str(path))
    assert found[5] == Question("Which is 5? ", ["5w", "5x", "5y", "5z"], 1, "human_aging") and len(found) == 9
    assert all(type(question.answer) is int for question in found)


def test_the_test_split_of_a_folder_and_of_the_hub(tmp_path, hub):
    for name, n in (("auxiliary_train", 9), ("dev", 2), ("test", 5), ("latest", 3)):
        write(tmp_path / f"{name}-00000-of-00001.parquet", questions(n))
    assert len(load_questions(str(tmp_path))) == 5
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert len(load_questions(str(tmp_path))) == 14
    hub("cais/mmlu", "anatomy", dev=questions(2), validation=questions(3), test=questions(4, subject="anatomy"))
    hub("cais/wmdp", "wmdp-cyber", test=questions(6))
    hub("o/d", validation=questions(7))
    assert [(len(found), found[0].subject) for found in map(load_questions, (
        "cais/mmlu:anatomy", "cais/wmdp:wmdp-cyber", "o/d"))] == [(4, "anatomy"), (6, "cybersecurity"), (7, "")]


@pytest.mark.parametrize("change", [
    {"choices": None}, {"choices": ["a", "b", "c"]}, {"choices": [1, 2, 3, 4]}, {"choices": "abcd"},
    {"answer": 4}, {"answer": "A"}, {"answer": None}, {"question": None}])
def test_what_is_no_question(tmp_path, change):
    path = write(tmp_path / "some.json", [dict(row, **change) for row in questions(3)])
    assert "question, choices, answer" in error_of(load_questions, str(path))


def test_data_sets_without_questions(tmp_path):
    message = error_of(load_questions, str(write(tmp_path / "some.jsonl", rows(5))))
    assert "text, source" in message and "choices (4 texts)" in message
    error_of(load_questions, str(write(tmp_path / "none.json", [])))
    assert "without columns" in error_of(load_questions, "embedded")


def test_prompts_ask_every_order_once():
    question = Question(" Which? ", ["p", "q", "r", "s"], 2, "high_school_us_history")
    prompts, right = question_prompts(question)
    assert prompts[0] == ("The following are multiple choice questions (with answers) about high school us history.\n\n"
                          "Which?\nA. p\nB. q\nC. r\nD. s\nAnswer:") and right[0] == 2
    assert len(prompts) == len(set(prompts)) == 24 and Counter(right) == {0: 6, 1: 6, 2: 6, 3: 6}
    for prompt, index in zip(prompts, right):
        options = re.findall(r"^([A-D])\. (.)$", prompt, re.M)
        assert options[index] == ("ABCD"[index], "r") and sorted(text for _, text in options) == ["p", "q", "r", "s"]
    assert question_prompts(question._replace(subject=""))[0][0].startswith(
        "The following are multiple choice questions (with answers).\n\nWhich?\nA. p\n")


# ---- Texts to classify ----
def check(examples, n_train, n_test):
    assert len(examples.texts) == len(examples.labels) == len(examples.train)
    for label in range(len(examples.names)):
        of = examples.labels == label
        assert (of & examples.train).sum() == n_train and (of & ~examples.train).sum() == n_test
    assert examples.train.dtype == bool and examples.labels.max() == len(examples.names) - 1


def test_stretches_of_the_embedded_corpus():
    examples = probing_examples("embedded", 150, 40)
    check(examples, 150, 40)
    sizes = Counter(d.domain for d in embedded_documents())
    assert examples.names == [name for name, _ in sizes.most_common(5)]
    again, other = probing_examples("embedded", 150, 40), probing_examples("embedded", 150, 40, seed=1)
    assert again.texts == examples.texts != other.texts
    files = {d: text for d in embedded_documents() if d.domain in examples.names for text in [d.text]}
    places = Counter()
    for text, label, train in zip(examples.texts, examples.labels, examples.train):
        assert 0 < len(text) <= 700
        homes = [d for d, whole in files.items() if d.domain == examples.names[label] and d.heldout != train
                 and (whole.startswith(text) or f"\n{text}" in whole)]
        assert homes
        places[homes[0].name] += 1
    assert len(places) > 400                    # one stretch of a file before a second one


def test_stretches_share_nothing():
    text = "".join(f"{i:06d} {'x' * (i % 90)}{'y' * 900 * (i % 50 == 7)}\n" for i in range(400))
    for seed in range(20):
        found = _stretches(text, np.random.default_rng(seed))
        at = [text.index(stretch) for stretch in found]
        assert all(a == 0 or text[a - 1] == "\n" for a in at) and max(map(len, found)) == 700
        assert all(a + len(stretch) <= b for a, b, stretch in zip(at, at[1:], found)) and len(found) > 20
    assert len({_stretches(text, np.random.default_rng(seed))[0] for seed in range(20)}) > 5
    assert _stretches("short\n", np.random.default_rng(0)) == []


def test_the_data_sets_of_saebench_are_listed():
    assert {name: [list(classes) for classes in sources.values()]
            for name, (sources, _) in PROBING_DATASETS.items()} == {
        "LabHC/bias_in_bios_class_set1": [[0, 1, 2, 6, 9]], "LabHC/bias_in_bios_class_set2": [[11, 13, 14, 18, 19]],
        "LabHC/bias_in_bios_class_set3": [[20, 21, 22, 25, 26]],
        "canrager/amazon_reviews_mcauley_1and5": [[1, 2, 3, 5, 6]],
        "canrager/amazon_reviews_mcauley_1and5_sentiment": [[1, 5]],
        "codeparrot/github-code": [[".c", ".h", ".py", ".html", ".java", ".php", ".php3", ".php4", ".php5", ".phps",
                                    ".phpt"]],
        "fancyzhx/ag_news": [[0, 1, 2, 3]], "Helsinki-NLP/europarl": [["en"], ["fr"], ["de"], ["es"], ["nl"]]}


def expected_samples(table, text, label, value, group, n, seed):
    """SAEBench's: pandas, by group."""
    table = table[table[label] == value]
    parts = [table] if group is None else [part for _, part in table.groupby(group)]
    return [t for part in parts for t in part[text].sample(n=n // len(parts), random_state=seed)]


@pytest.mark.parametrize("name, source, text, label, group", [
    ("LabHC/bias_in_bios_class_set1", "LabHC/bias_in_bios", "hard_text", "profession", "gender"),
    ("LabHC/bias_in_bios_class_set3", "LabHC/bias_in_bios", "hard_text", "profession", "gender"),
    ("canrager/amazon_reviews_mcauley_1and5", "canrager/amazon_reviews_mcauley_1and5", "text", "category", "rating"),
    ("canrager/amazon_reviews_mcauley_1and5_sentiment", "canrager/amazon_reviews_mcauley_1and5", "text", "rating",
     None),
    ("fancyzhx/ag_news", "fancyzhx/ag_news", "text", "label", None)])
def test_samples_are_saebench_s(hub, name, source, text, label, group):
    rng = np.random.default_rng(0)
    columns = {"hard_text": None, "profession": range(28), "gender": (0, 1), "text": None, "category": range(8),
               "rating": (1.0, 5.0), "label": range(4)}
    splits = {split: [{column: f"{split} {i}" if values is None else rng.choice(list(values)).item()
                       for column, values in columns.items()} for i in range(2_000)]
              for split in ("dev", "train", "test")}
    hub(source, **splits)
    examples = probing_examples(name, 20, 6, seed=7)
    check(examples, 20, 6)
    classes = next(iter(PROBING_DATASETS[name][0].values()))
    assert examples.names == list(classes.values())
    for i, value in enumerate(classes):
        for split, n, train in (("train", 20, True), ("test", 6, False)):
            table = pd.DataFrame(splits[split])
            found = [examples.texts[j] for j in np.flatnonzero((examples.labels == i) & (examples.train == train))]
            assert found == expected_samples(table, text, label, value, group, n, 7)
    assert "too small" in error_of(probing_examples, name, 5_000, 6)


def test_github_code_as_saebench_takes_it(hub):
    suffixes = ["c", "h", "py", "html", "java", "php", "phpt", "js", "C"]
    files = [{"content": "L" * 150 + f"{i} " + "x" * (200 if i % 5 == 0 else 400), "path": f"a/b.{suffixes[i % 9]}"}
             for i in range(600)]
    hub("parquet", PARQUET_FILES["codeparrot/github-code"], train=files)
    examples = probing_examples("codeparrot/github-code", 12, 4)
    check(examples, 12, 4)
    assert examples.names == ["C", "Python", "HTML", "Java", "PHP"]
    language = dict(zip(suffixes, ("C", "C", "Python", "HTML", "Java", "PHP", "PHP")))
    pools = {name: [] for name in examples.names}
    for row in files:                                      # SAEBench's loop
        name = language.get(row["path"].split(".")[1])
        if name and len(row["content"]) > 534:
            pools[name].append(row["content"][150:])
            if all(len(pool) > 16 for pool in pools.values()):
                break
    random.seed(42)
    for i, pool in enumerate(pools.values()):
        random.shuffle(pool)
        assert [examples.texts[j] for j in np.flatnonzero(examples.labels == i)] == pool[:16]


def test_europarl_as_saebench_takes_it(hub):
    for pair in ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"):
        a, b = pair.split("-")
        asked = hub("Helsinki-NLP/europarl", pair, train=[
            {"translation": {a: f"{pair} {a} {i}", b: f"{pair} {b} {i}"}} for i in range(100)])
    examples = probing_examples("Helsinki-NLP/europarl", 12, 4)
    check(examples, 12, 4)
    assert examples.names == ["en", "fr", "de", "es", "nl"] and len(asked) == 5
    random.seed(42)
    for i, (name, pair) in enumerate(zip(examples.names, ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt"))):
        pool = [f"{pair} {name} {j}" for j in range(17)]
        random.shuffle(pool)
        assert [examples.texts[j] for j in np.flatnonzero(examples.labels == i)] == pool[:16]


def test_texts_of_local_files(tmp_path):
    some = [{"text": f"{i} {prose(i, 9)}", "label": ("b", "a", "c")[i % 3]} for i in range(90)] + [
        {"text": " ", "label": "a"}]
    path = str(write(tmp_path / "some.jsonl", some))
    examples = probing_examples(path, 20, 9)
    check(examples, 20, 9)
    assert examples.names == ["a", "b", "c"] and len(set(examples.texts)) == 87
    label_of = {row["text"]: row["label"] for row in some}
    assert [label_of[text] for text in examples.texts] == [examples.names[label] for label in examples.labels]
    assert probing_examples(path, 20, 9).texts == examples.texts != probing_examples(path, 20, 9, 1).texts
    assert max(int(text.split()[0]) for text in examples.texts[:10]) > 40          # of the whole file
    assert "'a' does not give 25 texts to train on and 9 others" in error_of(probing_examples, path, 25, 9)
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        write(tmp_path / "both" / f"{split}.csv", [{"text": f"{split} {i}", "label": i % 2} for i in range(40)])
    examples = probing_examples(str(tmp_path / "both"), 20, 7)
    check(examples, 20, 7)
    assert examples.names == ["0", "1"]
    assert all(text.startswith("train" if train else "test") for text, train in zip(examples.texts, examples.train))


def test_data_sets_that_cannot_be_classified(tmp_path):
    path = str(write(tmp_path / "some.jsonl", [{"text": "a", "topic": 1}]))
    message = error_of(probing_examples, path, 1, 1)
    assert message.endswith("text and label; this one has text, topic.") and "cannot be read" not in message
    path = str(write(tmp_path / "one.jsonl", [{"text": f"{i}", "label": 1} for i in range(9)]))
    assert "1 classes" in error_of(probing_examples, path, 1, 1)
