"""Detection: planted latents are told by their profiles, random ones are not, nothing leaks."""
import json

import numpy as np
import pytest
import torch
import transformers
from scipy.sparse import csc_array

from data.windows import Windows
from pages.latents_page import Passages
from records import run_of, with_codes
from tiny_models import separable

WINDOWS, SEQ = 160, 64                                  # of training, and as many held out


@pytest.fixture(scope="module")
def planted():
    """Windows of random tokens in 40 files, and the firings (places, values) of three latents:
    where the token is 7, where it is 7 after 3, and anywhere."""
    rng, n = np.random.default_rng(0), WINDOWS
    tokens = rng.integers(10, 200, (2 * n, SEQ + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.02] = 7
    after = (rng.random((2 * n, SEQ)) < 0.02) & (tokens[:, 1:] != 7)
    tokens[:, :-1][after], tokens[:, 1:][after] = 3, 7
    tokens[:, 0] = 1
    lengths, docs = np.where(np.arange(2 * n) % 5 == 0, 40, SEQ + 1), np.arange(2 * n) // 4
    windows = Windows(tokens, lengths, docs, n, [f"f{i}" for i in range(80)], ["d"] * 80)

    held, places = tokens[n:, 1:].ravel(), windows.heldout_tokens()
    pairs = (held == 7) & (tokens[n:, :-1].ravel() == 3)
    fires = {"token": places[held[places] == 7], "pair": places[pairs[places]],
             "any": np.sort(rng.choice(places, 300, replace=False))}
    return windows, {name: (at, rng.uniform(0.1, 1, len(at)).astype(np.float32))
                     for name, at in fires.items()}


def detections_of(E, windows, firing, draws):
    """The Detection of a latent with these firings, once for each of `draws` random numbers."""
    excerpts, contexts = Passages(windows, E.DETECTION_TOKENS), E.token_contexts(windows)
    return [E.detection_of(excerpts, contexts, *firing, np.random.default_rng([0, i]))
            for i in range(draws)]


class Planted:
    """As much of a Run as eval_detection reads."""
    def __init__(self, detections):
        self.detections = detections


def metrics_of(E, *args):
    return E.eval_detection(Planted(detections_of(E, *args))).metrics


def test_detection_of_planted_latents(E, planted):
    windows, fires = planted
    token = metrics_of(E, windows, fires["token"], 8)       # it fires wherever the token stands
    assert token["detection"] == 1 and "detection_same_token" not in token
    pair = metrics_of(E, windows, fires["pair"], 20)
    assert pair["detection"] > 0.97 and pair["detection_same_token"] > 0.97
    assert abs(pair["detection_null"] - 0.2) < 0.15


def test_random_firings_are_told_as_often_as_by_chance(E, planted):
    windows, fires = planted
    found = metrics_of(E, windows, fires["any"], 40)
    for name in ("detection", "detection_null"):
        assert abs(found[name] - 0.2) < 0.08, (name, found)


def test_tasks_are_what_they_say(E, planted):
    """Of each task the first excerpt alone holds a firing, the others are of other files and
    windows; those of the same token hold it."""
    windows, fires = planted
    excerpts, (at, values) = Passages(windows, E.DETECTION_TOKENS), fires["pair"]
    active = np.zeros(len(excerpts.flat))
    active[at] = values
    for file in np.unique(excerpts.file(at)):
        tasks = E.detection_task(excerpts, at, active, file, np.random.default_rng(int(file)))
        for options, same in zip(tasks, (False, True), strict=True):
            assert len(options) == E.DETECTION_OPTIONS == 5
            parts = [slice(start, int(excerpts.stop(start))) for start in options]
            assert [bool(active[part].any()) for part in parts] == [True] + 4 * [False]
            files = excerpts.file(np.array(options))
            assert files[0] == file and file not in files[1:]
            assert len(set(np.array(options) // SEQ)) == 5
            assert not same or all(7 in excerpts.flat[part] for part in parts)


def test_profiles_do_not_see_the_files_of_the_tasks(E, planted):
    """What stands in the tasks' files changes no profile: the firings there may be any."""
    windows, (at, values) = planted[0], planted[1]["pair"]
    seen, profile = [], E.profile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(E, "profile", lambda contexts, places, others: seen.append((places, others))
                      or profile(contexts, places, others))
        found, = detections_of(E, windows, (at, values), 1)
    assert found.tasks == min(E.DETECTION_TASKS, len(found.task_files)) == 10
    excerpts = Passages(windows, E.DETECTION_TOKENS)
    for part in (part for pair in seen for part in pair):
        assert len(part) and not np.isin(excerpts.file(part), found.task_files).any()
    own, quiet = seen[0]
    assert np.isin(own, at).all() and not np.isin(quiet, at).any() and len(own) <= E.PROFILE_FIRINGS


def test_the_page_has_the_first_task_as_its_question(E, planted):
    windows, fires = planted
    found, = detections_of(E, windows, fires["token"], 1)
    excerpts = Passages(windows, E.DETECTION_TOKENS)
    assert excerpts.file(found.question[0]) in found.task_files
    assert sorted(found.order) == list(range(5)) and found.solved.tolist() == np.nansum(found.right, 0).tolist()
    few = tuple(part[:3] for part in fires["token"])         # in too few files for a task
    found, = detections_of(E, windows, few, 1)
    assert found.question is None and found.tasks == 0 and not len(found.task_files)
    assert found.solved.tolist() == [0, 0, 0] and not E.eval_detection(Planted([found])).metrics


def test_contexts_by_hand(E):
    tokens = np.array([[1, 10, 11, 12], [1, 20, 21, 22], [1, 30, 31, 32]], np.int32)
    windows = Windows(tokens, np.full(3, 4), np.arange(3), 1, ["a"] * 3, ["d"] * 3)
    found = E.token_contexts(windows)
    assert found.shape == (E.PROFILE_REACH, 6)
    assert found[:4].tolist() == [[20, 21, 22, 30, 31, 32], [1, 20, 21, 1, 30, 31],
                                  [1, 1, 20, 1, 1, 30], [1, 1, 1, 1, 1, 1]]


def test_the_guess_is_the_excerpt_with_the_best_place_and_ties_are_shared(E, planted):
    excerpts, contexts = Passages(planted[0], 16), E.token_contexts(planted[0])
    options = [int(start) for start in excerpts.starts[::700][:5]]
    weights = np.zeros((E.PROFILE_REACH, 200))
    assert E.guess(excerpts, contexts, weights, options) == pytest.approx(0.2)
    held = [set(excerpts.flat[start:excerpts.stop(start)].tolist()) for start in options]
    for token in range(200):
        weights[0] = np.arange(200) == token
        holders = [token in tokens for tokens in held]
        wanted = holders[0] / sum(holders) if any(holders) else 0.2
        assert E.guess(excerpts, contexts, weights, options) == pytest.approx(wanted)


@pytest.fixture
def planted_run(E, planted, make_store):
    """A run whose first latents are the planted ones, the others dead."""
    windows, fires = planted
    x = torch.randn(2 * WINDOWS, SEQ + 1, 8, generator=torch.Generator().manual_seed(0))
    store = make_store(x, WINDOWS, windows.tokens, windows.lengths, windows.doc_ids)
    torch.manual_seed(0)
    sae, at = E.TopK(8, 24, 4).eval().requires_grad_(False), list(fires.values())
    ends = np.cumsum([0] + [len(places) for places, _ in at])
    starts = np.append(ends, [ends[-1]] * (24 - len(at)))
    codes = csc_array((np.concatenate([values for _, values in at]),
                       np.concatenate([places for places, _ in at]), starts),
                      (WINDOWS * SEQ, 24))
    return with_codes(E, run_of(E, sae, store, live=(50, 10)), codes)


def test_detection_is_of_random_latents_alone(E, planted_run):
    """The page shows the latents of figures too, and says why each is there."""
    assert E.random_latents(planted_run).tolist() == [0, 1, 2]
    curves = {"evolution": {"latents": [2, 9]}, "most_stable": {"latents": [9, 7, 0]}}
    assert E.page_latents(planted_run, curves) == {
        0: ["random", "stable"], 1: ["random"], 2: ["random", "evolution"], 7: ["stable"],
        9: ["evolution", "stable"]}
    assert E.page_latents(planted_run, {}) == dict.fromkeys(range(3), ["random"])
    first, again = E.detections(planted_run), planted_run.detections
    assert len(first) == 3 and planted_run.detections is again
    for one, other in zip(first, again):
        np.testing.assert_equal(one, other)
    rates = [np.nanmean(part.right[:, 0]) for part in first]
    assert rates[0] == 1 and rates[1] > 0.9 and rates[2] < 0.7


def test_the_order_of_evaluations_changes_no_metric(E, spoken, settings, monkeypatch, tmp_path):
    """Whatever ran before, evaluations draw the same random numbers, and `detection` the same
    tasks, be they first asked for by the page or by the evaluation."""
    settings(TARGET_L0=4)
    monkeypatch.setattr(E, "training_result", lambda log, seconds: {})
    monkeypatch.setattr(E, "page_of_latents",
                        lambda run, temporal: [part.question for part in run.detections])
    orders, found = (("core", "temporal", "probes", "detection"),
                     ("detection", "probes", "temporal", "core"), ("detection",)), []
    for i, order in enumerate(orders):
        settings(EVALS=order)
        torch.manual_seed(i)
        np.random.seed(i)
        own = separable(spoken)[0]                      # a store of its own: nothing is cached
        run = run_of(E, own.sae, own.store, own.get_model(), own.layer, live=(10, 5),
                     log={"step": [1], "parameters": {}, "losses": {}})
        results = E.evaluate(run, 0.0, E.KnownTimes(tmp_path / "times.json"))
        results.get("core", {"metrics": {}})["metrics"].pop("avg_inference_tokens_per_second", 0)
        found.append({name: json.dumps(part, sort_keys=True) for name, part in results.items()})
    assert found[0] == found[1] and found[2].items() <= found[0].items()
    assert {"detection", "detection_null"} <= set(results["detection"]["metrics"])
    assert len(found[0]) == 6 and any(results["page"])


# ---- The control: nothing was learned ----
def test_a_reinitialised_model_knows_nothing(E):
    config = E.small_config(E.load_pretrained("embedded/model", "config.json"))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for p in model.parameters():
        p.data.fill_(0.5)
    fresh, again = E.reinitialised_model(model), E.reinitialised_model(model)
    assert all((p == 0.5).all() for p in model.parameters())
    weights = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        assert weights[name].shape == p.shape and weights[name].dtype == p.dtype
        assert not (weights[name] == 0.5).any()
        assert torch.equal(weights[name], again.get_parameter(name))
    large = [p.float() for p in weights.values() if p.dim() == 2]
    assert large and all(p.std() > 0.01 and abs(p.mean()) < 0.1 * p.std() for p in large)


def test_fewer_training_windows_leave_the_rest(planted):
    windows, few = planted[0], planted[0].fewer(3)
    assert few.n_train == 3 and np.array_equal(few.tokens[:3], windows.tokens[157:160])
    assert np.array_equal(few.tokens[few.heldout()], windows.tokens[windows.heldout()])
    assert np.array_equal(few.heldout_tokens(), windows.heldout_tokens())
    assert np.array_equal(few.doc_ids[few.heldout()], windows.doc_ids[windows.heldout()])
    assert windows.fewer(999).n_train == 160
