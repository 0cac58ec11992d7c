"""A model under edits of its residual stream: forward passes, generations, losses."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.tasks import Clozes
from records import run_of
from small_saes import batch_of, close
from tiny_models import CONTEXT, FAMILIES, separable, two_kinds, VOCABULARY, WIDTH

# ---- Editing ----
class Blocks:
    """A run of a model, with a mean and a scale that show, and a temporal_context SAE whose latents need the past."""

    def __init__(self, E, store, model, layer=1):
        torch.manual_seed(0)
        store.mean, store.scale = 0.3 * torch.randn(WIDTH), 1.7
        sae = opened_wide(E)
        self.E, self.model, self.run = E, model, run_of(E, sae, store, model, layer)
        self.edit = lambda batch: 0.5 * sae.decode(sae.encode(batch)).detach()

    def wanted(self, tokens, edit=None):
        """Logits when edit(x) is added after block `layer`, the first position left alone: without a hook."""
        E, run, edit = self.E, self.run, edit or self.edit
        hidden = E.residual_after(self.model, run.layer, tokens)
        batch = batch_of(E, (hidden[:, 1:] - run.store.mean) / run.store.scale)
        changed = torch.cat([hidden[:, :1], hidden[:, 1:] + run.store.scale * edit(batch)], 1)
        return E.logits_from(self.model, run.layer, changed, tokens)

    def hooks(self):
        return sum(len(block._forward_hooks) for block in self.E.find_blocks(self.model))


def opened_wide(E):
    torch.manual_seed(3)
    sae = E.TemporalContext(WIDTH, 64, 4).eval().requires_grad_(False)
    E.anneal(sae, E.curriculum_of(E.TemporalContext)[0], 0.0)
    sae.gate.normal_()
    sae.W_q.mul_(4.0)
    return sae


@pytest.fixture(params=FAMILIES)
def blocks(request, E, models, make_store):
    return Blocks(E, make_store(torch.randn(6, 9, WIDTH), 4), models[request.param])


def some_tokens(rows=3, seq=14, seed=5):
    return torch.randint(1, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(seed))


def own_logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def test_editing_adds_to_the_residual_stream_but_not_at_the_first_position(E, blocks):
    tokens = some_tokens()
    own, wanted = own_logits(blocks.model, tokens), blocks.wanted(tokens)
    with E.editing(blocks.run, blocks.edit) as model, torch.no_grad():
        assert model is blocks.model
        got = model(input_ids=tokens, use_cache=False).logits
    close(got, wanted, 1e-4)
    close(got[:, 0], own[:, 0], 1e-5)
    assert ((got - own)[:, 1:].abs().amax(-1) > 1e-3).all()
    with E.editing(blocks.run, lambda batch: torch.zeros_like(batch.x)) as model, torch.no_grad():
        close(model(input_ids=tokens, use_cache=False).logits, own, 1e-5)


def test_what_an_edit_sees(E, blocks):
    """x without the first position, centred and scaled as the SAE knows it; positions from 1; each row a document."""
    tokens, seen = some_tokens(), []
    with E.editing(blocks.run, lambda batch: seen.append(batch) or torch.zeros_like(batch.x)) as model, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    (batch,), store = seen, blocks.run.store
    hidden = E.residual_after(blocks.model, blocks.run.layer, tokens)[:, 1:]
    close(batch.x * store.scale + store.mean, hidden, 1e-5)
    assert batch.positions.tolist() == list(range(1, 14)) and len(set(batch.doc_ids.tolist())) == 3
    assert batch.mask is None


def test_generation_with_a_cache_is_the_full_forward_pass(E, blocks):
    prompts = some_tokens(seq=5)
    with E.editing(blocks.run, blocks.edit) as model, torch.no_grad():
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=9, min_new_tokens=9,
                              do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    tokens, got = made.sequences, torch.stack(made.logits, 1)
    assert tokens.shape == (3, 14) and torch.equal(tokens[:, :5], prompts)
    wanted = blocks.wanted(tokens)[:, 4:-1]
    close(got, wanted, 1e-4)
    kept = wanted.clone()
    kept[..., 0] = -math.inf                                    # min_new_tokens forbids the end
    assert torch.equal(tokens[:, 5:], kept.argmax(-1))
    sae, last = blocks.run.sae, []                              # earlier positions do matter here
    for keep in (4, 13):
        hidden = E.residual_after(blocks.model, 1, tokens)[:, -keep:]
        last.append(sae.encode(batch_of(E, (hidden - blocks.run.store.mean) / blocks.run.store.scale)).dense()[:, -4:])
    assert not torch.allclose(last[0][:, 0], last[1][:, 0], atol=1e-3)
    close(last[0][:, 3], last[1][:, 3], 1e-4)


def by_hand(blocks, tokens, cut, edit):
    """Logits from a cache: the first `cut` tokens at once, then one by one."""
    with blocks.E.editing(blocks.run, edit) as model, torch.no_grad():
        out = model(input_ids=tokens[:, :cut], use_cache=True)
        logits = [out.logits]
        for t in range(cut, tokens.shape[1]):
            out = model(input_ids=tokens[:, t:t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("cut", [2, 3, 7])
def test_tokens_one_by_one(blocks, cut):
    tokens = some_tokens()
    close(by_hand(blocks, tokens, cut, blocks.edit), blocks.wanted(tokens), 1e-4)


def test_the_first_token_alone(blocks):
    tokens = some_tokens()
    simple = lambda batch: 0.3 * batch.x.cumsum(1)
    close(by_hand(blocks, tokens, 1, simple), blocks.wanted(tokens, simple), 1e-4)


def test_the_first_token_alone_for_a_temporal_variant(blocks):
    tokens = some_tokens()
    close(by_hand(blocks, tokens, 1, blocks.edit), blocks.wanted(tokens), 1e-4)


def test_padded_prompts_end_as_unpadded_ones(E, blocks):
    """An edit that looks at the whole row: with the mask it sees the tokens and not the padding."""
    def edit(batch):
        mean = E.zero_padding(batch, batch.x).sum(1, keepdim=True)
        count = batch.x.shape[1] if batch.mask is None else batch.mask.sum(1)[:, None, None]
        return 0.5 * (mean / count).expand_as(batch.x) + blocks.edit(batch)

    tokens, lengths = some_tokens(), torch.tensor([14, 5, 9])
    mask = torch.arange(14) < lengths[:, None]
    with E.editing(blocks.run, edit, mask=mask) as model, torch.no_grad():
        got = model(input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long(), use_cache=False).logits
    for row, n in enumerate(lengths.tolist()):
        close(got[row, n - 1], blocks.wanted(tokens[row:row + 1, :n], edit)[0, -1], 1e-4)
    with E.editing(blocks.run, edit) as model, torch.no_grad():
        blind = model(input_ids=tokens.masked_fill(~mask, 0), attention_mask=mask.long(), use_cache=False).logits
    assert (blind[1, 4] - got[1, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["nowhere", "edit", "body", "model"])
def test_no_hook_is_left(E, blocks, where):
    tokens, own = some_tokens(), own_logits(blocks.model, some_tokens())

    def edit(batch):
        if where == "edit":
            raise ZeroDivisionError
        return blocks.edit(batch)

    def use():
        with E.editing(blocks.run, edit) as model, torch.no_grad():
            assert blocks.hooks() == 1
            if where == "body":
                raise ZeroDivisionError
            model(input_ids=tokens + VOCABULARY * (where == "model"), use_cache=False)

    if where == "nowhere":
        use()
    else:
        with pytest.raises((ZeroDivisionError, IndexError)):
            use()
    assert blocks.hooks() == 0 and torch.equal(own_logits(blocks.model, tokens), own)


# ---- Losses and generations ----
def plain_losses(model, tokens, length):
    """Of one window in a plain forward pass: the loss of each token from the third on."""
    logits = model(input_ids=torch.tensor(tokens[None, :length], dtype=torch.long)).logits[0]
    return F.cross_entropy(logits[1:-1], torch.tensor(tokens[2:length], dtype=torch.long), reduction="none")


def test_context_is_put_after_the_first_token(E, make_store):
    ids, others = np.array([3, 5]), np.array([10, 20])
    store = make_store(torch.randn(24, 9, 2), 12, np.random.default_rng(0).integers(1, 50, (24, 9)))
    tokens = store.windows.tokens
    for n in (0, 2, 4):
        got = E.prepend_context(store.windows, ids, others, n)
        for row, (i, j) in enumerate(zip(ids, others)):
            assert got[row].tolist() == [tokens[j, 0], *tokens[j, 1:n + 1], *tokens[i, 1:]]


def padded_loss(E, run, tokens, n, edit):
    """Mean loss of the last n of tokens under an edit."""
    tokens = tokens.numpy()
    return E.mean_loss_of_last(E.edited_logits(run, edit, tokens, np.ones(tokens.shape, bool)), tokens, n)


def scores(E, run, ids, clozes, edit=lambda batch: torch.zeros_like(batch.x)):
    """Loss of each window, and whether each cloze is answered rightly, under an edit."""
    found = E.edited_scores(run, SimpleNamespace(clozes=clozes), edit, ids)
    return np.array(found["losses"]), np.array(found["right"])


def no_clozes():
    return Clozes(*np.zeros((2, 0), int), np.zeros((0, 4), int))


def test_padded_loss_without_an_edit_is_the_models_own(E, blocks):
    tokens, nothing = some_tokens(), lambda batch: torch.zeros_like(batch.x)
    own = own_logits(blocks.model, tokens).log_softmax(-1)
    for n in (1, 5, 12):
        wanted = -np.mean([own[row, t - 1, tokens[row, t]].item() for row in range(3) for t in range(14 - n, 14)])
        with torch.no_grad():
            assert padded_loss(E, blocks.run, tokens, n, nothing) == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        assert abs(padded_loss(E, blocks.run, tokens, 12, blocks.edit) - wanted) > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_scores_without_an_edit_are_the_models_own(E, spoken, models, family):
    """Losses, padding left out, and answers to clozes; 40 windows take more than one chunk."""
    rng, n = np.random.default_rng(0), 40
    lengths = np.where(np.arange(n) % 3 == 0, 20, np.where(np.arange(n) % 5 == 0, 34, CONTEXT))
    tokens = np.where(np.arange(CONTEXT) < lengths[:, None], two_kinds(n, np.arange(n) < 0), 0)
    run = spoken(tokens, 10, ["a"] * 20, lengths, family, layer=1)
    ids = np.delete(np.arange(2, n), [4, 9])
    window = np.sort(rng.choice(ids, 60))
    position = np.array([rng.integers(1, lengths[w] - 1) for w in window])
    options = np.array([rng.permutation(np.arange(1, VOCABULARY))[:4] for _ in window])
    options[:, 0] = tokens[window, position + 1]
    loss, right = scores(E, run, ids, Clozes(window, position, options))
    wanted = [plain_losses(models[family], tokens[i], lengths[i]).mean().item() for i in ids]
    assert loss.tolist() == pytest.approx(wanted, rel=1e-4)
    answers = []
    for w, p, choice in zip(window, position, options):
        logits = models[family](input_ids=torch.tensor(tokens[w:w + 1, :p + 1])).logits[0, -1]
        answers.append(logits[choice].argmax().item() == 0)
    assert right.tolist() == answers and 0 < sum(answers) < 60
    assert len(scores(E, run, ids, no_clozes())[1]) == 0       # nothing was asked


def test_scores_under_an_edit_are_those_of_the_edited_model(E, spoken):
    run, _, _, ids, _ = separable(spoken, layer=1)
    edit = lambda batch: 0.5 * run.sae.decode(run.sae.encode(batch))
    loss, own = scores(E, run, ids, no_clozes(), edit)[0], scores(E, run, ids, no_clozes())[0]
    for i, got in zip(ids, loss):
        with torch.no_grad():
            assert padded_loss(E, run, run.store.tokens([i]), CONTEXT - 2, edit) == pytest.approx(got, rel=1e-4)
    assert (np.abs(loss - own) > 1e-4).all()


def test_generations(E, blocks):
    """A model made to say one thing repeats itself; one that says anything does not; the draws are always the same."""
    head, prompts = blocks.model.get_output_embeddings(), some_tokens(rows=6, seq=64)      # of 64, 32 follow
    nothing = lambda batch: torch.zeros_like(batch.x)
    measured = lambda: tuple(E.repetition({"a": E.sampled(blocks.run, nothing, prompts)}).values())
    weight = head.weight.data.clone()
    bias = None if head.bias is None else head.bias.data.clone()
    try:
        head.weight.data.zero_()
        head.weight.data[7] = 0.0
        if bias is not None:
            head.bias.data.zero_()
        torch.manual_seed(9)
        repetition, spread = measured()
        assert repetition < 0.1 and 2.5 < spread
        torch.manual_seed(10)
        assert measured() == (repetition, spread)
        if bias is not None:
            head.bias.data[7] = 1e3
            repetition, spread = measured()
            assert repetition == pytest.approx(30 / 31) and spread == pytest.approx(0, abs=0.05)
    finally:
        head.weight.data = weight
        if bias is not None:
            head.bias.data = bias
