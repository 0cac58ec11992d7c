"""Questions of four choices, asked of a model that answers by a rule."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.tasks import encoded_questions
from data.windows import first_token
from records import run_of


class Answers(torch.nn.Module):
    """A model that answers by a rule: the letter of the choice that says "right"; A where none does, where it is D and
    "trap" is in the question, or after an edit. Everywhere but at the last token it says something else."""

    def __init__(self, tokenizer, width):
        super().__init__()
        self.blocks, self.tokenizer = torch.nn.ModuleList([torch.nn.Linear(width, width)]), tokenizer
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=1))
        self.width, self.asked = width, 0
        self.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=10 ** 6)
        self.letters = {letter: tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"}

    def forward(self, input_ids, attention_mask, use_cache):
        plain = torch.ones(*input_ids.shape, self.width)
        with torch.no_grad():
            self.blocks[0].weight.copy_(torch.eye(self.width))
            self.blocks[0].bias.zero_()
        moved = (self.blocks[0](plain) - plain).abs().flatten(1).amax(1) > 1e-3
        logits = torch.zeros(*input_ids.shape, 1 + max(len(self.tokenizer), *self.letters.values()))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask)):
            n = int(mask.sum())
            assert mask[:n].all() and ids[0] == 0
            text = self.tokenizer.decode(ids[1:n])
            assert text.endswith("Answer:")
            said = next((line[0] for line in text.splitlines() if "right" in line), "A")
            if moved[row] or said == "D" and "trap" in text:
                said = "A"
            logits[row, n:, self.letters["B"]] = 9.0
            logits[row, :n - 1, self.letters["B"]] = 9.0
            logits[row, n - 1, self.letters[said]] = 1.0
            self.asked += 1
        return SimpleNamespace(logits=logits)


QUESTIONS = [{"question": "Which?", "choices": ["first", "the right one", "third", "a long winding one"], "answer": 1},
             {"question": "Which, in a trap?", "choices": ["right", "b", "c", "d"], "answer": 0},
             {"question": "And this?", "choices": ["a", "b", "c", "d"], "answer": 2},
             {"question": "Which at last?", "choices": ["no", "nor this", "neither", "but right"], "answer": 3}]


def questions_file(folder):
    """Returns the name of a data set of QUESTIONS, a file in a folder."""
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return str(path)


@pytest.fixture
def asked(tmp_path):
    return questions_file(tmp_path)


def test_a_question_counts_when_all_orders_are_right(E, make_store, asked, monkeypatch):
    """Questions 1 and 4 are known, the second but for 6 of 24 orders, the third by guessing A in 6 of 24. Behind all
    prompts is padding."""
    encoded = encoded_questions

    def padded(*of):
        for tokens, mask, *rest in encoded(*of):
            yield np.pad(tokens, ((0, 0), (0, 3)), constant_values=7), np.pad(mask, ((0, 0), (0, 3))), *rest

    monkeypatch.setattr(E, "encoded_questions", padded)
    store = make_store(torch.randn(6, 9, 8), 4)
    model = Answers(E.load_tokenizer(), 8)
    run = run_of(E, None, store, model)
    with torch.no_grad():
        assert E.right_answers(run, asked, lambda batch: torch.zeros_like(batch.x)).mean() == 0.5
        assert model.asked == 4 * 24
        assert not E.right_answers(run, asked, lambda batch: torch.ones_like(batch.x)).any()


def test_encoded_questions(E, asked):
    tokenizer = E.load_tokenizer()
    found = list(encoded_questions(asked, tokenizer))
    assert len(found) == 4
    for (tokens, mask, letters, answers), question in zip(found, QUESTIONS):
        assert tokens.shape == mask.shape and len(tokens) == len(answers) == 24
        assert [tokenizer.decode([letter]).strip() for letter in letters] == list("ABCD")
        assert (tokens[:, 0] == first_token(tokenizer)).all() and mask.sum(1).max() == mask.shape[1]
        prompts = [tokenizer.decode(row[keep][1:]) for row, keep in zip(tokens, mask)]
        assert len(set(prompts)) == 24
        for prompt, answer, keep in zip(prompts, answers, mask):
            assert (np.diff(keep.astype(int)) <= 0).all()           # padded at the end
            right = question["choices"][question["answer"]]
            assert f"{'ABCD'[answer]}. {right}\n" in prompt and prompt.endswith("\nAnswer:")
        assert np.bincount(answers).tolist() == [6, 6, 6, 6]


class Letters:
    """A tokenizer of characters, which takes "A. right" for one: prompts are not all of one length."""
    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        ids = [[ord(c) for c in one.replace("A. right", "@")] for one in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_prompts_of_different_lengths_are_padded_at_the_end(E, asked):
    found = list(encoded_questions(asked, Letters()))
    tokens, mask, letters, answers = found[1]
    assert letters == [ord(c) for c in "ABCD"] and (tokens[:, 0] == 1).all()
    lengths, short = mask.sum(1), answers == 0
    assert (lengths[short] == mask.shape[1] - 7).all() and (lengths[~short] == mask.shape[1]).all() and short.sum() == 6
    for row, n in zip(tokens, lengths):
        assert bytes(row[n - 7:n].tolist()) == b"Answer:" and not row[n:].any()
    assert (np.diff(mask.astype(int)) <= 0).all()
