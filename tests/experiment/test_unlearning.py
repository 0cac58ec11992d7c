"""The unlearning evaluation: the plan of windows, the matcher's detection, the frontier."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy.sparse import csr_array

from data.tasks import unlearning_plan, UnlearningPlan
from data.windows import Windows
from made_tokenizers import Joined
from runtime.errors import RunnerError
from test_questions import questions_file
from tiny_models import CONTEXT, separable, SIZES, two_kinds

# ---- The plan: which windows ----
PARTS = Joined(lambda token: f" t{token}")


def plan_of_domains(E, names, per_domain=10, windows_of_each=4, heldout=3, seed=0):
    """Windows of `per_domain` documents of each domain for training and `heldout` held out. Domain i draws two thirds
    of its tokens from its own twenty and the rest from those of domain i + 1."""
    rng, rows, docs, domains = np.random.default_rng(seed), [], [], []
    for n in (per_domain, heldout):
        for i in range(n * len(names)):
            domain = i % len(names)
            own = 1 + 20 * domain + rng.integers(0, 20, (windows_of_each, CONTEXT))
            other = 1 + 20 * ((domain + 1) % len(names)) + rng.integers(0, 20, (windows_of_each, CONTEXT))
            rows.append(np.where(rng.random(own.shape) < 2 / 3, own, other))
            docs += [len(domains)] * windows_of_each
            domains.append(names[domain])
    tokens = np.concatenate(rows).astype(np.int32)
    tokens[:, 0] = 0
    n_train = per_domain * len(names) * windows_of_each
    return Windows(tokens, np.full(len(tokens), CONTEXT), np.array(docs), n_train,
                            [str(i) for i in range(len(domains))], domains)


NAMES, GROUPS = ["a", "b", "c", "d", "e", "f", "g"], ("forget", "neighbours", "retain")


@pytest.mark.parametrize("n_names, forget, near", [(7, "c", {"b", "d"}), (5, "a", {"b", "e"}), (3, "b", None),
                                                   (2, "a", set())])
def test_groups_of_windows(E, n_names, forget, near):
    """Neighbours are the domains that share words, half of the others at most and three; with two domains none."""
    windows = plan_of_domains(E, NAMES[:n_names])
    plan = unlearning_plan(windows, forget, PARTS, (1_000, 1_000))
    for every, ids, group in ((np.arange(windows.n_train), plan.dev, plan.dev_group),
                              (windows.heldout(), plan.test, plan.group)):
        assert ids.tolist() == every.tolist()                           # there are fewer than `most`
        by_group = {g: set(windows.domain_of(ids[group == g])) for g in GROUPS}
        assert by_group["forget"] == {forget} and sum(map(len, by_group.values())) == n_names
        assert len(by_group["neighbours"]) == min(3, (n_names - 1) // 2)
        assert near is None or near <= by_group["neighbours"]
    assert set(plan.clozes.window) <= set(plan.test) and len(plan.clozes.window) > 0


def test_windows_are_spread_over_the_files(E):
    windows = plan_of_domains(E, NAMES[:5])
    plan = unlearning_plan(windows, "b", PARTS, (10, 3))
    for ids, group, n, files in ((plan.dev, plan.dev_group, 10, 10), (plan.test, plan.group, 3, 3)):
        assert [(group == g).sum() for g in GROUPS] == [n] * 3 and (np.diff(ids) > 0).all()
        docs = windows.doc_ids[ids]
        assert len(set(docs[group == "forget"])) == files               # one window of each file
        assert all(len(set(docs[group == g])) == n for g in GROUPS[1:])         # of 20 and 6
    assert plan.dev.max() < windows.n_train <= plan.test.min()
    again = unlearning_plan(windows, "b", PARTS, (10, 3))
    assert all(np.array_equal(a, b) for a, b in zip(plan[:4], again[:4]))


def test_clozes_of_the_chosen_windows_alone(E):
    windows = plan_of_domains(E, NAMES[:5])
    plan = unlearning_plan(windows, "b", PARTS, (10, 3))
    clozes = plan.clozes
    assert set(clozes.window) <= set(plan.test)
    assert (clozes.options[:, 0] == windows.tokens[clozes.window, clozes.position + 1]).all()
    of = dict(zip(plan.test, plan.group))
    assert plan.cloze_group.tolist() == [of[w] for w in clozes.window]


def test_what_a_plan_sums_up(E):
    """Means by group, of windows and of clozes; by document in the sample's order; full windows; halves of the files."""
    windows = plan_of_domains(E, NAMES[:5], windows_of_each=3)
    plan = unlearning_plan(windows, "b", PARTS)
    rng = np.random.default_rng(0)
    losses, right = rng.random(len(plan.test)), rng.random(len(plan.clozes.window)) < 0.5
    found = E.group_means(plan, losses, right)
    before = rng.random(len(right)) < 0.5
    tested = E.group_means(plan, None, right, before)
    assert set(tested) == {f"cloze_{g}{end}" for g in GROUPS for end in ("", "_p")}
    run = SimpleNamespace(store=SimpleNamespace(windows=windows))
    by_document = E.group_losses(run, plan, losses, "standard")
    assert set(by_document) == {f"standard_{g}" for g in GROUPS}
    assert set(found) == {*GROUPS, *(f"cloze_{g}" for g in GROUPS)}
    for g in GROUPS:
        assert found[g] == pytest.approx(np.mean([v for v, of in zip(losses, plan.group) if of == g]))
        assert found[f"cloze_{g}"] == pytest.approx(np.mean([v for v, of in zip(right, plan.cloze_group) if of == g]))
        here = plan.cloze_group == g
        assert tested[f"cloze_{g}"] == found[f"cloze_{g}"]
        assert tested[f"cloze_{g}_p"] == E.mcnemar(right[here], before[here])
        files = by_document[f"standard_{g}"]
        for file, value in zip(windows.doc_ids[windows.sample()], files):
            members = [v for v, of, i in zip(losses, plan.group, plan.test) if of == g and windows.doc_ids[i] == file]
            assert value == pytest.approx(np.mean(members)) if members else np.isnan(value)
    windows.lengths[plan.test[plan.group == "forget"][0]] = 20
    full, others = plan.full(windows)
    assert full.tolist() == plan.test[plan.group == "forget"][1:].tolist() and len(others) == len(full)
    assert set(others) <= set(plan.test[plan.group == "retain"])
    half, docs = plan.halves(windows), windows.doc_ids[plan.dev]
    for side in (plan.dev_group == "forget", plan.dev_group != "forget"):
        files = np.unique(docs[side])
        assert set(docs[side & half]) == set(files[::2]) and set(docs[side & ~half]) == set(files[1::2])
    windows.lengths[:] = 20
    with pytest.raises(RunnerError, match="CONTEXT_LENGTH"):
        plan.full(windows)


def test_what_is_kept_of_a_plan_is_of_its_groups(E, tmp_path):
    groups, ids = np.array(["forget", "retain"] * 2), np.arange(4)
    plan = UnlearningPlan(ids, groups, ids, groups, SimpleNamespace(options=ids), groups[:1])
    run = SimpleNamespace(store=SimpleNamespace(folder=tmp_path))

    def cached(plan, what, value):
        return E.cached_for_plan(run, plan, what, lambda: value)

    assert cached(plan, "own", 1) == cached(plan, "own", 2) == 1
    assert cached(plan._replace(dev_group=groups[::-1]), "own", 2) == 2
    assert cached(plan, "other", 3) == 3


def test_domains_that_cannot_be_forgotten(E):
    windows = plan_of_domains(E, NAMES[:5])
    domains = np.array(windows.domains)

    def fails(windows, *parts):
        with pytest.raises(RunnerError) as caught:
            unlearning_plan(windows, "b", PARTS)
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    train = windows.doc_ids[:windows.n_train].max() + 1
    domains[train:][domains[train:] == "b"] = "a"
    fails(windows._replace(domains=domains.tolist()), "FORGET = 'b'", "test")
    domains[:train][domains[:train] == "b"] = "a"
    fails(windows._replace(domains=domains.tolist()), "'b'")
    fails(windows._replace(domains=["b"] * len(domains)), "FORGET = 'b'", "another domain")
    fails(windows._replace(domains=["a" if d == "b" else "c" for d in windows.domains][:len(domains)]), "'b'")


def test_bag_auroc_of_planted_text(E, settings, tmp_path):
    """Different words: 1; the same words: chance; one word in five of its own: .2 + .8 / 2; of four words at least
    one is with a chance of 1 - .8^4. Padding does not count."""
    rng, n, n_train = np.random.default_rng(0), 600, 300
    forget, ids = np.arange(n) % 2 == 0, np.arange(n)
    group = np.where(forget, "forget", "retain")
    plan = UnlearningPlan(ids[:n_train], group[:n_train], ids[n_train:], group[n_train:],
                          SimpleNamespace(options=ids), None)

    def bag_auroc(windows, last):
        settings(MATCHER_WINDOW=last)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # of activations: nothing is cached
        return E.bag_auroc(SimpleNamespace(store=SimpleNamespace(windows=windows, folder=folder)), plan)

    def windows(own, lengths=None):
        """One in `own` of FORGET's tokens is from 40 on, all others are from 1 to 39."""
        tokens = rng.integers(1, 40, (n, CONTEXT))
        tokens[forget] += 40 * (rng.random((n // 2, CONTEXT)) < own)
        lengths = np.full(n, CONTEXT) if lengths is None else lengths
        return Windows(tokens.astype(np.int32), lengths, np.arange(n), n_train, [""] * n, [""] * n)

    assert bag_auroc(windows(1.0), 4) > 0.999
    assert 0.44 < bag_auroc(windows(0.0), 4) < 0.56
    some = windows(0.2)
    one, four = (bag_auroc(some, last) for last in (1, 4))
    assert one == pytest.approx(0.6, abs=0.04) and four == pytest.approx(1 - 0.8 ** 4 / 2, abs=0.04)
    lengths = np.where(np.arange(n) % 3 == 0, 20, CONTEXT)
    padded = some._replace(lengths=lengths)
    rubbish = np.where(np.arange(CONTEXT) < lengths[:, None], some.tokens, 5).astype(np.int32)
    assert bag_auroc(padded, 4) == pytest.approx(bag_auroc(padded._replace(tokens=rubbish), 4), abs=1e-9)


# ---- An Unlearner as a whole, and detection ----
@pytest.fixture
def small(settings):
    settings(CLAMPED=6, MATCHED=24, FORGET="secret")


def unlearner_of(E, run, ids, forget):
    torch.manual_seed(0)
    group = np.where(forget, "forget", "retain")
    with torch.no_grad():
        return E.Unlearner(run, UnlearningPlan(ids, group, None, None, None, None))


def detection(unlearner, store, ids, forget):
    z = csr_array(unlearner.sae.encode(store.batch(ids)).dense().flatten(0, 1).numpy())
    return unlearner.matcher.scores(z, store.valid(ids), forget)


def test_what_an_unlearner_selects(E, spoken, small):
    run, ids, forget, _, _ = separable(spoken)
    unlearner, batch = unlearner_of(E, run, ids, forget), run.store.batch(ids)
    z = run.sae.encode(batch).dense().flatten(0, 1)
    of_token = np.repeat(forget, CONTEXT - 1)
    ranked = E.ranked_latents(csr_array(z.numpy()), of_token, E.RETAIN_FREQUENCY)[0]
    assert unlearner.clamped["forget"].tolist() == ranked[:6].tolist()
    assert not set(unlearner.clamped["random_latents"]) & set(ranked[:6].tolist())
    for latent in range(64):
        values = z[:, latent][z[:, latent] > 0]
        assert not len(values) or unlearner.q95[latent].item() == pytest.approx(np.quantile(values, 0.95), rel=1e-4)
    x = batch.x.flatten(0, 1)
    along = unlearner.edit("projection", 1.0)(batch).flatten(0, 1) + x
    apart = (along[of_token].mean(0) - along[~of_token].mean(0)).norm()
    assert apart < 1e-4 * (x[of_token].mean(0) - x[~of_token].mean(0)).norm()


@pytest.mark.parametrize("matcher", ["logistic", "attention"])
def test_separable_text_is_detected(E, settings, spoken, small, matcher):
    settings(MATCHER=matcher)
    run, ids, forget, fresh, of_fresh = separable(spoken)
    unlearner = unlearner_of(E, run, ids, forget)
    with torch.no_grad():
        found, rocs = detection(unlearner, run.store, fresh, of_fresh)
    assert found["auroc_pattern"] > 0.9 and found["accuracy_pattern"] > 0.8
    assert found["auroc_hybrid"] > 0.95 and found["accuracy_hybrid"] > 0.8
    assert found["auroc_pattern"] > found["auroc_one_position"] - 0.02
    assert found["false_positives_pattern"] < 0.06 and found["false_positives_hybrid"] < 0.2
    for name, roc in rocs.items():
        assert len(roc) == 101 and (np.diff(roc) >= 0).all() and roc[-1] == 1
        assert np.mean(roc) == pytest.approx(found[f"auroc_{name}"], abs=0.03)
    standard = unlearner.edit("standard", 1.0)(run.store.batch(fresh)).any(-1).float().mean(1)
    hybrid = unlearner.edit("hybrid", 1.0)(run.store.batch(fresh)).any(-1).float().mean(1)
    assert standard[torch.from_numpy(of_fresh)].mean() > standard[torch.from_numpy(~of_fresh)].mean()
    assert hybrid[torch.from_numpy(of_fresh)].mean() > 5 * hybrid[torch.from_numpy(~of_fresh)].mean()
    batch = run.store.batch(fresh)                      # a looser threshold clamps there too, and "standard" wherever any does
    for name in ("pattern", "hybrid"):
        where = [unlearner.edit(kind, 1.0)(batch).any(-1) for kind in (name, f"{name}_0.05", f"{name}_0.2", "standard")]
        assert all((looser | ~stricter).all() for stricter, looser in zip(where, where[1:]))
        assert found[f"false_positives_{name}"] <= found[f"false_positives_{name}_0.05"] <= found[f"false_positives_{name}_0.2"]


def test_text_that_is_alike_is_not_detected_and_thresholds_hold(E, spoken, small):
    """All windows from one distribution: chance, and at most about FALSE_POSITIVES of fresh tokens above the threshold."""
    assert E.FALSE_POSITIVES[0] == 0.01
    n, n_train = 240, 160
    forget = np.arange(n) // 4 % 2 == 0
    run = spoken(two_kinds(n, np.zeros(n, bool), low=2), n_train, ["open"] * (n // 2))
    unlearner = unlearner_of(E, run, np.arange(n_train), forget[:n_train])
    with torch.no_grad():
        found, _ = detection(unlearner, run.store, np.arange(n_train, n), forget[n_train:])
    for name in ("pattern", "one_position", "shuffled"):
        assert 0.42 < found[f"auroc_{name}"] < 0.58
    assert found["false_positives_pattern"] < 0.02 and found["false_positives_hybrid"] <= 0.15
    assert found["accuracy_pattern"] == pytest.approx(0.5, abs=0.02)


def test_padding_is_no_evidence(E, spoken, small):
    """What stands in the padding changes no threshold, no figure."""
    n, n_train = 96, 64
    forget, lengths = np.arange(n) // 4 % 2 == 0, np.where(np.arange(n) % 3 == 0, 40, CONTEXT)
    found = []
    for filler in (0, 7):
        tokens = np.where(np.arange(CONTEXT) < lengths[:, None], two_kinds(n, forget), filler)
        run = spoken(tokens, n_train, ["x"] * (n // 2), lengths)
        unlearner = unlearner_of(E, run, np.arange(n_train), forget[:n_train])
        with torch.no_grad():
            found.append(detection(unlearner, run.store, np.arange(n_train, n), forget[n_train:])[0]
                         | unlearner.matcher.thresholds)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, abs=1e-5), name


def test_padding_has_no_say_in_the_selection(E, settings, spoken, small):
    """Frequencies are those of the tokens that count; the limit is one that half of the latents keep."""
    n, lengths = 64, np.where(np.arange(64) % 2 == 0, 20, CONTEXT)
    forget = np.arange(n) // 4 % 2 == 0
    run = spoken(two_kinds(n, forget, low=40), n, ["x"] * (n // 2), lengths)
    keep = run.store.valid(np.arange(n))
    z, of_token = run.sae.encode(run.store.batch(np.arange(n))).dense()[keep].numpy(), forget.repeat(keep.sum(1))
    limit = np.median((z[~of_token] > 0).mean(0))
    settings(SELECTION="frequency", RETAIN_FREQUENCY=limit)
    wanted = E.ranked_latents(csr_array(z), of_token, E.RETAIN_FREQUENCY)[0][:6]
    assert ((z[~of_token] > 0).mean(0)[wanted] < limit).all()
    assert set(unlearner_of(E, run, np.arange(n), forget).clamped["forget"]) == set(wanted)


# ---- The evaluation ----
def test_the_strength_that_forgets_enough(E, settings):
    settings(FORGET_NATS=0.4)
    for slope in (0.0025, 0.04, 0.1, 3.0):
        calls = []
        found = E.strength_for(lambda s: calls.append(s) or slope * s)
        assert 0.4 / slope <= found <= 1.1 * 0.4 / slope and len(calls) <= 10
    assert 7 <= E.strength_for(lambda s: float(s >= 7)) <= 7.7
    assert E.strength_for(lambda s: 0.39) == 256 == E.strength_for(lambda s: math.nan)
    assert E.strength_for(lambda s: 1.0) <= 1.1 / 16
    assert E.strength_for(lambda s: s, low=0.01, high=0.3) == 0.3


def whole(E, spoken, settings):
    """eval_unlearning's (run, settings) on text of four domains, at the size of a test."""
    n, n_train = 128, 64
    rng, domain = np.random.default_rng(0), np.arange(n) // 2 % 4
    tokens = 1 + 10 * domain[:, None] + rng.integers(0, 19, (n, CONTEXT))
    tokens[:, 0] = 0
    settings(FORGET="0", CLAMPED=6, MATCHED=24, load_tokenizer=lambda: PARTS)
    return spoken(tokens, n_train, [str(i % 4) for i in range(n // 2)], layer=0)


STRATEGIES = "standard", "pattern", "hybrid", "pattern_0.2", "hybrid_0.2"
NAMES_OF_EDITS = *STRATEGIES, "random_latents", "random_directions", "projection"


def test_the_evaluation_end_to_end(E, spoken, settings, monkeypatch):
    run = whole(E, spoken, settings)
    settings(FORGET_NATS=0.02, FALSE_POSITIVES=(0.01, 0.2))     # a random model has little to forget
    result = E.Result(**E.run_evaluation(E.eval_unlearning, run))
    m, frontier = result.metrics, result.curves["frontier"]
    assert all(math.isfinite(value) for value in m.values()) and list(frontier) == list(NAMES_OF_EDITS)
    for name, rows in frontier.items():
        assert len(rows) == (5 if name in STRATEGIES else 1)
        factors = [row["strength"] / rows[0]["strength"] for row in rows]
        assert factors == pytest.approx([1, 0.25, 0.5, 2, 4][:len(rows)])
        for key, value in rows[0].items():
            assert m[f"{name}_{key}"] == value
        for group in ("forget", "neighbours", "retain"):
            files = [v for v in result.per_sequence[f"{name}_{group}"] if v is not None]
            assert np.mean(files) == pytest.approx(m[f"{name}_{group}"], abs=1e-6)      # two windows of each file
            assert len(result.per_sequence[f"{name}_{group}"]) == 32
        assert 0 <= m[f"{name}_repetition"] <= 1
    groups, docs = {g: result.per_sequence[f"standard_{g}"] for g in GROUPS}, np.arange(32) % 4
    known = {g: {int(d) for d, v in zip(docs, values) if v is not None} for g, values in groups.items()}
    assert known["forget"] == {0} and len(known["neighbours"]) == 1 and len(known["retain"]) == 2
    assert all(len(result.curves["roc"][name]) == 101 for name in ("pattern", "hybrid"))
    assert m["auroc_pattern"] > 0.6 and m["auroc_bag_of_tokens"] > 0.6
    asked_for, original = [], E.Unlearner.edit
    monkeypatch.setattr(E.Unlearner, "edit", lambda self, name, s: asked_for.append(name) or original(self, name, s))
    again = E.eval_unlearning(run).metrics
    assert again == m                                   # nothing is left to chance
    assert asked_for.count("projection") == 2           # no SAE changes it: what it does is kept; this one, and "unclamped"
    assert asked_for.count("standard") > 5


def test_the_bag_follows_the_matchers_window(E, spoken, settings, tmp_path):
    run, bags = whole(E, spoken, settings), {}
    settings(FORGET_NATS=1e9, FALSE_POSITIVES=(0.01,))
    settings(strength_for=lambda forgets: 1.0)
    plan = unlearning_plan(run.store.windows, "0", PARTS)
    for window in (4, 1):
        settings(MATCHER_WINDOW=window)
        bags[window] = E.eval_unlearning(run).metrics["auroc_bag_of_tokens"]
        elsewhere = SimpleNamespace(store=SimpleNamespace(windows=run.store.windows, folder=tmp_path / str(window)))
        assert bags[window] == E.bag_auroc(elsewhere, plan)
    assert bags[4] != bags[1]


def test_files_that_alternate_are_on_both_sides_of_the_split(E, spoken, small):
    forget = np.arange(96) // 2 % 2 == 1
    run = spoken(two_kinds(96, forget), 96, ["secret" if i % 2 else "open" for i in range(48)])
    unlearner_of(E, run, np.arange(96), forget)


def test_more_windows_of_forget_than_elsewhere(E, spoken, settings):
    run = whole(E, spoken, settings)
    run.store.windows = run.store.windows._replace(domains=["0" if i % 5 < 4 else "1" for i in range(64)])
    settings(FALSE_POSITIVES=(0.01,), strength_for=lambda forgets: 1.0)
    assert math.isfinite(E.eval_unlearning(run).metrics["standard_padded_32"])


def preflight(E, settings, tmp_path, config=None, **constants):
    settings(**dict(SAE_VARIANT="temporal_context", EVALS=("unlearning",), CONTEXT_LENGTH=48, EXPANSION=4, TARGET_L0=4)
             | constants)
    E.preflight(config or transformers.GPTNeoXConfig(**SIZES | dict(vocab_size=4096), intermediate_size=32), tmp_path)


def test_the_preflight_passes_with_the_other_settings(E, settings, tmp_path):
    preflight(E, settings, tmp_path, MATCHER="attention", SELECTION="frequency", TRAIN_ON="forget",
              BUFFER_POSITIONS="sinusoidal")
    assert not list(tmp_path.iterdir())


def test_the_preflight_passes_with_questions(E, settings, tmp_path):
    preflight(E, settings, tmp_path, FORGET_QUESTIONS=questions_file(tmp_path))


def test_windows_as_long_as_the_model_takes(E, settings, tmp_path):
    config = transformers.GPT2Config(vocab_size=4096, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    preflight(E, settings, tmp_path, config, CONTEXT_LENGTH=64)


def test_another_data_set_is_read_to_be_forgotten(E, settings, tmp_path, monkeypatch):
    def file_of(name):
        words, path = np.random.default_rng(0).integers(0, 30, (400, 32)), tmp_path / f"{name}.jsonl"
        texts = [f"{name} row {i}: " + " ".join(f"w{word}" for word in row) for i, row in enumerate(words)]
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return str(path)

    first, second = file_of("first"), file_of("second")
    settings(DATASET=first, FORGET=second, EVALS=("unlearning",), TRAIN_TOKENS=2_000, CONTEXT_LENGTH=32, EVAL_FILES=12)
    monkeypatch.setattr(E.Store, "collect", lambda self, get_model, layer: None)
    config = transformers.GPTNeoXConfig(**SIZES | {"vocab_size": 4_096}, intermediate_size=32)
    store, _ = E.open_store(config, 0, tmp_path / "cache")
    assert second in store.windows.domains
