"""The page of latents: what it shows is true of the latents, and it works in a real browser, whatever the tokens are."""
import json
import re
import shutil
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from copies import copy_template, load_module, PROJECT, write_text_data
from data.windows import Windows
from made_tokenizers import byte_level, Joined, sentencepiece
from pages import own_text
from pages.latents_page import fires_together, latents_page, nearest_directions, PageLatent, Passages
from pages.ratings import agreement, check_ratings, LEAST_RATED, load_labels, load_ratings, mean_by_latent, unpaired_test, write_page
from processes import run

CHROMIUM, DRIVER = (next(filter(None, map(shutil.which, names)), None) for names in (
    ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)))
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: the page is not tested "
                                    "in a browser (Debian: apt-get install chromium chromium-driver)")
HOSTILE = ["<script>document.title = 'broken'</script>", "</script><img src=x onerror=alert(1)>", "\"'`&lt;", "<!--",
           " \u05e9\u05dc\u05d5\u05dd\u202e\u200f", "\x00\x07\x1b[31m\x9f", "\n\t      ", "\ufeff\u200b", "{{DATA}} ${x}"]


# --- what is shown is true ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def planted():
    """Windows of random tokens in 40 files, and places where tokens are 7, 7 after 3, and any."""
    rng, (n, seq) = np.random.default_rng(0), (160, 64)
    tokens = rng.integers(10, 200, (2 * n, seq + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.02] = 7
    after = (rng.random((2 * n, seq)) < 0.02) & (tokens[:, 1:] != 7)
    tokens[:, :-1][after], tokens[:, 1:][after] = 3, 7
    tokens[:, 0] = 1
    lengths = np.where(np.arange(2 * n) % 5 == 0, 40, seq + 1)
    windows = Windows(tokens, lengths, np.arange(2 * n) // 4, n, [f"f{i}" for i in range(80)], ["d"] * 80)
    held, places = tokens[n:, 1:].ravel(), windows.heldout_tokens()
    before = tokens[n:, :-1].ravel()
    fires = {"token": places[held[places] == 7], "pair": places[(held[places] == 7) & (before[places] == 3)],
             "any": np.sort(rng.choice(places, 300, replace=False))}
    return windows, {name: (at, rng.uniform(0.1, 1, len(at)).astype(np.float32)) for name, at in fires.items()}


LETTERS = Joined(lambda token: f"t{token}")
QUESTION_SIZE = 16
NO_TASKS = SimpleNamespace(task_files=np.array([], int), question=None, order=np.arange(5), tasks=0, solved=np.zeros(3))


def one_question(windows, at):
    """Detection's record of a latent that fires at places `at`: the first one's file is the tasks', and its passage stands among
    four of other files where the latent does not fire."""
    text, fires = Passages(windows, QUESTION_SIZE), np.zeros(windows.tokens[windows.n_train:, 1:].size, bool)
    fires[at] = True
    quiet = [int(s) for s in text.starts[::7] if not fires[s:text.stop(s)].any() and text.file(s) != text.file(at[0])]
    return SimpleNamespace(task_files=text.file(at[:1]), question=[int(text.start(at[0], 8)), *quiet[:4]],
                           order=np.array([3, 1, 0, 4, 2]), tasks=3, solved=np.array([2.5, 1, 0]))


def page_of(windows, detections, *firings):
    logits, n = np.arange(200.0)[None].repeat(len(firings), 0), windows.tokens[windows.n_train:, 1:].size
    z = csc_array((np.concatenate([values for _, values in firings]), np.concatenate([at for at, _ in firings]),
                   np.repeat(np.cumsum([0] + [len(at) for at, _ in firings]), 3)[2:]), (n, 3 * len(firings)))
    shown = [PageLatent(3 * i, ["random"], row, {}, [(3 * i + 1, 0.5)], 0.1 * i, detection)
             for i, (row, detection) in enumerate(zip(logits, detections))]
    live = np.arange(z.shape[1]) % 3 == 0
    return latents_page(windows, LETTERS, shown, z, live, QUESTION_SIZE)


def test_passages_are_what_they_say(planted):
    windows, fires = planted
    page = page_of(windows, [one_question(windows, at) for at, _ in fires.values()], *fires.values())
    tokens = windows.tokens[windows.n_train:]
    for entry, (at, values) in zip(page["latents"], fires.values()):
        assert entry["rate"] == pytest.approx(len(at) / len(windows.heldout_tokens()), rel=0.01)
        assert sum(entry["histogram"]) == len(at) and entry["max"] == pytest.approx(values.max(), rel=0.01)
        dense = np.zeros(tokens[:, 1:].size)
        dense[at] = values
        dense = dense.reshape(len(tokens), -1)

        def found(passage):         # the rows of windows that hold just this
            ids = [int(page["strings"][i][1:]) for i in passage["tokens"]]
            start, file = passage["at"], int(page["files"][passage["file"]][1:])
            rows = [r for r in np.flatnonzero(windows.doc_ids[windows.n_train:] == file)
                    if tokens[r, start:start + len(ids)].tolist() == ids]
            assert len(rows) == 1 and start + len(ids) <= windows.lengths[windows.n_train + rows[0]]
            shown = np.zeros(len(ids))
            for i, value in passage["values"]:
                shown[i] = value
            assert np.allclose(shown, dense[rows[0], start - 1:start - 1 + len(ids)], rtol=0.01)
            return file, shown

        token_of = lambda row: int(page["strings"][row[0]][1:])
        fired, held = tokens[:, 1:].ravel()[at], tokens[:, 1:].ravel()[windows.heldout_tokens()]
        for row in entry["fired_on"]:
            n = (fired == token_of(row)).sum()
            assert row[1:] == pytest.approx([n / len(at), n / (held == token_of(row)).sum()], rel=0.01)
        shares = [row[1] for row in entry["fired_on"]]
        assert shares == sorted(shares, reverse=True) and len(shares) == min(6, len(set(fired.tolist())))

        passages = entry["passages"]
        top = [found(passage)[1][passage["peak"]] for passage in passages["top"]]
        assert top == sorted(top, reverse=True) and len({passage["file"] for passage in passages["top"]}) == len(top) == 8
        bands = [[found(passage)[1][passage["peak"]] for passage in band] for band in passages["stratified"]]
        assert all(min(upper) >= max(lower) for upper, lower in zip(bands, bands[1:]))
        assert all(low <= min(band) and max(band) <= high for band, (low, high) in zip(bands, passages["ranges"], strict=True))
        seen = {found(passage)[0] for passage in [*passages["top"], *sum(passages["stratified"], []), *passages["random"]]}
        five = [found(passage) for passage in entry["question"]["passages"]]
        assert [shown.any() for _, shown in five] == [i == entry["question"]["answer"] == 2 for i in range(5)]
        assert entry["detected"] == [3, 2.5, 1, 0]
        assert five[entry["question"]["answer"]][0] not in seen
        assert page["strings"][entry["promoted"][0][0]] == "t199" and page["strings"][entry["suppressed"][0][0]] == "t3"
        effects = np.arange(3, 200)             # the logits of the tokens that occur: 3, 7, 10 to 199
        effects = effects[np.isin(effects, tokens)] - effects[np.isin(effects, tokens)].mean()
        assert [entry["logits"][end] for end in ("low", "high")] == pytest.approx([effects.min(), effects.max()], rel=0.01)
        assert sum(entry["logits"]["counts"]) == page["n_common"] == len(effects) and entry["logits"]["counts"][0] < 3
    assert sum(entry["energy"] for entry in page["latents"]) == pytest.approx(1, abs=0.01)
    assert [entry["stability"] for entry in page["latents"]] == pytest.approx([0, 0.1, 0.2])
    n = [len(at) for at, _ in fires.values()]
    assert page["activity"] == "200200200" and page["n_live"] == 3
    assert page["rate"][::3] == pytest.approx(np.array(n) / len(windows.heldout_tokens()), rel=0.01) and page["rate"][1] == page["max"][1] == 0
    assert sum(page["rates"]["counts"]) == 3 and page["rates"]["low"] == -4


def test_neighbours_against_loops(planted):
    """Correlations and shares of firing together, cosines of directions; a latent is no neighbour of itself."""
    windows, fires = planted
    rng, places, n = np.random.default_rng(3), windows.heldout_tokens(), windows.tokens[windows.n_train:, 1:].size
    a = fires["any"][0]
    columns = [a, a[::2], np.sort(np.union1d(a[::3], rng.choice(places, 200, replace=False))), np.array([], int), fires["token"][0]]
    z = csc_array((np.full(sum(map(len, columns)), 0.5), np.concatenate(columns), np.cumsum([0, *map(len, columns)])), (n, 5))
    dense = np.zeros((n, 5))
    for i, at in enumerate(columns):
        dense[at, i] = 1
    on = dense[places]
    for latent, rows in zip((0, 2, 3), fires_together(z, np.array([0, 2, 3]), len(places))):
        with np.errstate(invalid="ignore"):
            r = np.nan_to_num(np.corrcoef(on.T)[latent])
        others = sorted((i for i in range(5) if i != latent and r[i] > 0), key=lambda i: -r[i])
        assert [row[0] for row in rows] == others
        for other, share, correlation in rows:
            assert share == pytest.approx(on[:, other][on[:, latent] == 1].mean()) and correlation == pytest.approx(r[other])
    assert z.data.tolist() == [0.5] * z.nnz             # it is left as it was

    directions = torch.tensor([[2.0, 0.0], [0.5, 3.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    found = nearest_directions(directions, np.array([0, 2]), most=3)
    assert [[other for other, _ in rows] for rows in found] == [[2, 1, 4], [1, 0, 4]]
    assert [cosine for _, cosine in found[0]] == pytest.approx([0.5 ** 0.5, 0.5 / 9.25 ** 0.5, 0])
    assert len(nearest_directions(directions, np.array([1]), most=9)[0]) == 4


@pytest.mark.parametrize("maker", [sentencepiece, byte_level])
def test_passages_read_as_the_text_does(maker):
    """Wherever they begin, spaces are there; and a character of several tokens stands in each that holds a part of it."""
    tokenizer, text = maker(), "the file is read 😀 here and then the next value"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = np.array([[tokenizer.bos_token_id, *ids]] * 2, np.int32)
    windows = Windows(tokens, np.full(2, len(ids) + 1), np.arange(2), 1, ["a", "b"], ["d"] * 2)
    passages = Passages(windows, 6)
    read, smile = passages.reader(tokenizer), text.index("😀")
    inside = 0
    for start in range(len(ids) - 6):
        part = read(start, 6)
        assert len(part) == 6 and part[0] and "".join(part).strip(" ") in text
        inside += part[0] == "😀"
        if part[0] == "😀":
            assert "".join(part).startswith(text[smile:smile + 4])
    assert inside == {sentencepiece: 4, byte_level: 3}[maker]


def test_a_latent_without_tasks_has_no_question(planted):
    windows, fires = planted
    at, values = (part[:2] for part in fires["token"])
    entry, = page_of(windows, [NO_TASKS], (at, values))["latents"]
    assert "question" not in entry and "detected" not in entry and len(entry["passages"]["top"]) <= 2


def test_passages_do_not_depend_on_the_question(planted):
    windows, fires = planted
    record = one_question(windows, fires["token"][0])
    pages = [page_of(windows, [SimpleNamespace(**vars(record) | change)], fires["token"])
             for change in ({}, {"order": np.arange(5), "solved": np.zeros(3)})]
    for page in pages:
        del page["latents"][0]["question"], page["latents"][0]["detected"]
    assert pages[0] == pages[1]


def test_relatives_are_named_by_their_strongest_tokens(planted):
    windows, fires = planted
    at, values = fires["token"]
    strongest, other = at[values.argmax()], fires["any"][0][0]
    size = windows.tokens[windows.n_train:, 1:].size
    z = csc_array((np.append(values, [1.0, 2.0]), np.append(at, sorted([strongest, other])), np.array([0, len(at), len(at) + 2, len(at) + 2])),
                  (size, 3))
    relatives = {"kin": [(1, 0.5), (2, 0.25), ("<i>", 1.0)], "0": []}
    shown = [PageLatent(0, ["random"], np.arange(200.0), relatives, [(1, 0.5), (2, 0.1)])]
    page = latents_page(windows, LETTERS, shown, z, np.array([True, True, False]), QUESTION_SIZE)
    token = windows.tokens[windows.n_train:, 1:].ravel()[max(strongest, other)]
    own = windows.tokens[windows.n_train:, 1:].ravel()[strongest]
    assert {i: page["strings"][string] for i, string in page["named"].items()} == {0: f"t{own}", 1: f"t{token}"}    # 2 never fires
    assert page["latents"][0]["related"] == {"kin": [[1, 0.5], [2, 0.25], ["<i>", 1.0]], "0": []}


# --- a run and its page -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A copy with a trained run_1, a run_0 of which the latents come in another order, and hostile tokens in both."""
    base = tmp_path_factory.mktemp("page")
    folder = copy_template(base / "idea", DATASET=str(write_text_data(base / "texts.jsonl")), EVALS=("core", "temporal", "detection"), SAE_VARIANT="temporal",
                           EPOCHS_SCALE=0.05)
    finished = run(folder, base / "cache")
    assert finished.code == 0, finished.tail
    shutil.copy(PROJECT / "plot.py", folder)
    (folder / "run_0").mkdir()
    shutil.copy(folder / "run_1" / "final_info.json", folder / "run_0")
    features = json.loads((folder / "run_1" / "features.json").read_text())
    first = features["latents"][0]["passages"]["top"][0]
    for token, text in zip(dict.fromkeys(first["tokens"]), HOSTILE):
        features["strings"][token] = text
    features["files"][first["file"]] = "<b>file</b>"
    features["latents"][0]["related"] = {"parents": [[features["latents"][1]["latent"], 0.5], [10 ** 6, 0.25], ["<i>", 1]]}
    features["named"] |= {features["latents"][1]["latent"]: list(dict.fromkeys(first["tokens"]))[3]}
    (folder / "run_1" / "features.json").write_text(json.dumps(features))
    (folder / "run_0" / "features.json").write_text(json.dumps(features | {"latents": features["latents"][::-1]}))
    plot = load_module(folder / "plot.py")
    for loaded in plot.load_runs():
        plot.write_page(folder / loaded.folder, loaded.label, loaded.config, loaded.metrics)
    return folder


def data_of(folder, name="run_1"):
    text = (folder / name / "features.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.S)[1])


def test_the_data_of_a_run(lab):
    features = json.loads((lab / "run_1" / "features.json").read_text())
    info = json.loads((lab / "run_1" / "final_info.json").read_text())
    curves = info["temporal"]["curves"][0]
    reasons = {"random": rated_of(features), "evolution": curves["evolution"]["latents"], "stable": curves["most_stable"]["latents"]}
    assert [len(ids) for ids in reasons.values()] == [50, 16, 10] and features["n_live"] >= 50 and features["seed"] == 0
    assert {entry["latent"] for entry in features["latents"]} == set().union(*reasons.values())
    for entry in features["latents"]:
        assert entry["why"] == [why for why, ids in reasons.items() if entry["latent"] in ids]
        assert "detected" not in entry or "random" in entry["why"]          # neither rated nor in the means
    for latent, stability in zip(curves["most_stable"]["latents"], curves["most_stable"]["stability"]):
        entry, = (entry for entry in features["latents"] if entry["latent"] == latent)
        assert entry["stability"] == pytest.approx(stability, rel=0.01, abs=1e-4)
    for entry, *names in (("detection", "detection", "detection_same_token", "detection_null"), ("core", "detection_reinitialised")):
        for name in names:
            assert 0 <= info[entry]["metrics"][name] <= 1 and f"{name}_mean" not in info[entry]["means"]
    tasks, solved, *_ = np.sum([entry["detected"] for entry in features["latents"] if "detected" in entry], 0)
    assert solved / tasks == pytest.approx(info["detection"]["metrics"]["detection"], abs=0.01)
    for entry in features["latents"][1:]:
        weights = [weight for _, weight in entry["related"]["attention by offset"]]
        assert len(weights) == 5 and sum(weights) == pytest.approx(1, abs=0.02)


def rated_of(features):
    """The latents that people rate."""
    return [entry["latent"] for entry in features["latents"] if "random" in entry.get("why", ["random"])]


def test_pages_are_whole_and_small(lab):
    for name in ("run_0", "run_1"):
        path = lab / name / "features.html"
        assert path.stat().st_size <= 3_000_000
        text = path.read_text()
        assert text.count("<script") == 3 and "{{SHARED}}" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
    data = data_of(lab)
    assert set(HOSTILE[:3]) <= set(data["features"]["strings"])
    assert [entry["latent"] for entry in data["baseline"]["features"]["latents"]] == rated_of(data["features"])[::-1] and "baseline" not in data_of(lab, "run_0")


@pytest.fixture(scope="session")
def browser(lab, tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser tests")
    from selenium.common.exceptions import SessionNotCreatedException
    for attempt in range(3):        # a loaded machine may be too slow for the first start
        options = selenium.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                     "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
                     "--window-size=1400,900", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.page_load_strategy = "none"         # `visit` waits by itself: the driver may miss a load and hang
        try:
            driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
            break
        except SessionNotCreatedException:
            if attempt == 2:
                raise
    driver.downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)})
    yield driver
    driver.quit()


def visit(browser, lab, place="", name="run_1"):
    address = (lab / name / "features.html").as_uri() + place
    leave(browser, lambda: browser.get("about:blank"), "location.href == 'about:blank'")
    leave(browser, lambda: browser.get(address), "location.protocol == 'file:' && document.title != 'Latents'")


def reload(browser):
    leave(browser, browser.refresh, "document.title != 'Latents'")


def leave(browser, go, arrived):
    """Starts a navigation, and waits until another document is there, whole, of which `arrived` holds."""
    from selenium.common.exceptions import WebDriverException

    def there():
        with suppress(WebDriverException):          # between two documents there is nothing to ask
            return js(browser, f"!window.left && document.readyState == 'complete' && {arrived}")
    browser.execute_script("window.left = true")
    go()
    wait(there)


def press(browser, *keys):
    from selenium.webdriver import ActionChains
    ActionChains(browser, duration=0).send_keys(*keys).perform()


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)
    return found


def js(browser, code, *args):
    return browser.execute_script("return " + code, *args)


def heading(browser):
    return js(browser, "document.querySelector('#detail h2').textContent")


def silent(browser):
    assert browser.get_log("browser") == []


@needs_chromium
def test_every_latent_is_shown(browser, lab):
    visit(browser, lab)
    latents = [entry["latent"] for entry in data_of(lab)["features"]["latents"]]
    assert js(browser, "[...document.querySelectorAll('#list .id')].map(x => Number(x.textContent))") == latents
    shown = browser.execute_async_script("""
        const [latents, done] = arguments, shown = [], detail = document.getElementById("detail");
        addEventListener("hashchange", () => {
          const rest = detail.cloneNode(true);
          rest.querySelectorAll(".passage").forEach(passage => passage.remove());
          shown.push([detail.querySelector("h2").textContent, detail.innerText, detail.querySelectorAll("svg").length, rest.textContent]);
          if (shown.length < latents.length) location.hash = `latent-${latents[shown.length]}`; else done(shown);
        });
        location.hash = `latent-${latents[0]}`;""", latents)
    of_tokens = " ".join(map(str, data_of(lab)["features"]["strings"]))       # which may be any word of a program
    for entry, (title, text, drawings, rest) in zip(data_of(lab)["features"]["latents"], shown, strict=True):
        assert title == f"Latent {entry['latent']}" and drawings >= 4
        assert not [found for found in re.findall(r"undefined|NaN|\[object|null|Infinity", rest) if found not in of_tokens], text
        for why, words in (("random", "drawn at random"), ("evolution", "in the figure feature_evolution.png"), ("stable", "ten most stable")):
            assert (words in text.split("How often")[0].split("Why it is here")[1]) == (why in entry["why"])
    silent(browser)


@needs_chromium
def test_every_number_has_a_sentence_and_every_chart_its_axes(browser, lab):
    entry = next(entry for entry in data_of(lab)["features"]["latents"][1:] if entry.get("detected", [0])[0] > 1)
    visit(browser, lab, f"#latent-{entry['latent']}")
    text = js(browser, "document.querySelector('.facts').innerText")
    tasks, own, _, chance = entry["detected"]
    assert re.search(rf"Asked {tasks} questions, on which of five passages it fires, a classifier .* answered {own:g} rightly\. Guessing answers "
                     rf"{tasks / 5:g}; a classifier of random places answered {chance:g}\.", text), text
    for sentence in (r"It fires on .+ % of the .+ held-out tokens, in \d+ of \d+ files\.", r"its value is .+ on average and .+ at most \(the mean squared length of an activation is 1\)\.",
                     r"It has .+ % of the sum of all latents' squared values", r"more often it is active again 5 to 16 tokens later than with the positions of the window shuffled"):
        assert re.search(sentence, text), (sentence, text)
    charts = js(browser, """[...document.querySelectorAll('#detail .card:has(.chart)')].map(card => ({title: card.querySelector('h3').innerText,
        note: card.querySelector('.note').innerText, y: [...card.querySelectorAll('.y span')].map(x => x.innerText), unit: card.querySelector('.unit').innerText,
        x: [...card.querySelectorAll('.x span')].map(x => x.innerText), bars: card.querySelectorAll('rect').length}))""")
    assert [chart["title"].lower() for chart in charts] == ["values where it fires", "mean value by position", "effects on logits",
                                                            "firing rate among all latents", "attention by offset"]
    for chart in charts:
        assert chart["note"].endswith((".", "1.")) and chart["unit"] and len(chart["x"]) >= 2 and chart["bars"] >= 5, chart
        assert chart["y"][1] == "0" and chart["y"][0] not in ("", "0"), chart
    assert charts[0]["x"][0] == "0" and float(charts[0]["x"][-1]) == entry["max"] and charts[1]["x"][-1] == "31"
    ends = [float(x.replace("\u2212", "-")) for x in charts[2]["x"]]
    assert [ends[0], ends[-1]] == [entry["logits"]["low"], entry["logits"]["high"]]


@needs_chromium
def test_neighbours_are_linked_where_they_are_on_the_page(browser, lab):
    latents = data_of(lab)["features"]["latents"]
    here = {entry["latent"] for entry in latents}
    linked = next(entry for entry in latents if here & {row[0] for row in entry["similar"]} and entry["together"])
    visit(browser, lab, f"#latent-{linked['latent']}")
    for title, key in (("Points the same way", "similar"), ("Fires together with", "together")):
        rows = js(browser, """[...[...document.querySelectorAll('#detail .card')].find(card => card.querySelector('h3').textContent === arguments[0])
            .querySelectorAll('tbody tr')].map(row => [row.querySelector('a')?.hash || '', row.cells[0].innerText, row.cells[row.cells.length - 1].innerText])""", title)
        assert [row[0] for row in rows] == [f"#latent-{row[0]}" if row[0] in here else "" for row in linked[key]]
        assert [int(row[1]) for row in rows] == [row[0] for row in linked[key]]
        assert [float(row[2].replace("\u2212", "-")) for row in rows] == [row[-1] for row in linked[key]]
    browser.execute_script("const link = document.querySelector('#detail td a'); link.focus(); link.click()")
    wait(lambda: heading(browser) != f"Latent {linked['latent']}")
    assert js(browser, "document.activeElement.id") == "detail"


@needs_chromium
def test_hostile_tokens_are_text(browser, lab):
    first = data_of(lab)["features"]["latents"][0]["latent"]
    visit(browser, lab, f"#latent-{first}")
    text = js(browser, "document.querySelector('.passage').innerText")
    for shown in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], "U+202E", "U+0007", "U+001B", "U+009F", "U+FEFF", "\u21b5", HOSTILE[8]):
        assert shown in text, (shown, text)
    assert not re.search("[\x00-\x08\x1b\u200b\u202e\ufeff]", text)
    assert js(browser, "document.title").startswith(f"Latent {first}") and not js(browser, "document.querySelector('img')")
    assert js(browser, "[...document.querySelectorAll('.from')].some(x => x.title.startsWith('<b>file</b>, position'))")
    relatives = js(browser, "[...document.querySelectorAll('.cards.wide .chip')].map(x => [x.tagName, x.className, x.innerText])")
    assert [(tag, name) for tag, name, _ in relatives] == [("A", "chip"), ("SPAN", "chip silent"), ("SPAN", "chip")]
    assert relatives[0][2].split()[1:] == ["<!--", "0.5"] and relatives[2][2].split()[0] == "<i>"
    press(browser, "r")
    wait(lambda: js(browser, "document.querySelectorAll('#rate .passage').length"))
    silent(browser)


def listed(browser):
    return js(browser, "[...document.querySelectorAll('#list .id')].map(x => Number(x.textContent))")


def said(browser):
    return js(browser, "document.getElementById('count').textContent")


@needs_chromium
def test_finding_ones_way(browser, lab):
    from selenium.webdriver import Keys
    latents = [entry["latent"] for entry in data_of(lab)["features"]["latents"]]
    visit(browser, lab, f"#latent-{latents[3]}")
    assert heading(browser) == f"Latent {latents[3]}"
    for key, at in (("j", 4), ("j", 5), ("k", 4)):
        press(browser, key)
        wait(lambda: heading(browser) == f"Latent {latents[at]}")
        assert js(browser, "location.hash") == f"#latent-{latents[at]}"
        assert js(browser, "document.querySelector('#list [aria-current] .id').textContent") == str(latents[at])
    browser.back()
    wait(lambda: heading(browser) == f"Latent {latents[5]}")
    press(browser, "/", "<script>")
    hits = len(listed(browser))
    assert 1 <= hits < len(latents) and f"{hits} of {len(latents)}" in said(browser)
    rates = {entry["latent"]: entry["rate"] for entry in data_of(lab)["features"]["latents"]}
    press(browser, Keys.ESCAPE)
    browser.execute_script("const s = document.getElementById('sort'); s.value = 'rate'; s.onchange()")
    assert [rates[latent] for latent in listed(browser)] == sorted(rates.values(), reverse=True)
    browser.execute_script("const s = document.getElementById('which'); s.value = 'stable'; s.onchange()")
    assert sorted(listed(browser)) == [entry["latent"] for entry in data_of(lab)["features"]["latents"] if "stable" in entry["why"]]
    browser.execute_script("document.activeElement.blur()")
    press(browser, Keys.ESCAPE)
    assert len(listed(browser)) == len(latents)
    ground = js(browser, "getComputedStyle(document.body).backgroundColor")
    press(browser, "t", "t")
    assert js(browser, "getComputedStyle(document.body).backgroundColor") != ground
    press(browser, "t")
    silent(browser)


@needs_chromium
def test_latents_by_number(browser, lab):
    """Exactly that one, by search and by address; of one that is not here the page says so, and what it knows."""
    from selenium.webdriver import Keys
    features = data_of(lab)["features"]
    latents, width = [entry["latent"] for entry in features["latents"]], len(features["activity"])
    inner = next(n for n in range(10, width) if n in latents and any(str(n) in str(other) and n != other for other in latents))
    absent = next(n for n in range(10, width) if n not in latents and any(str(n) in str(other) for other in latents))
    for form in (f"#latent-{inner}", f"#latent={inner}", f"#{inner}"):
        visit(browser, lab, form)
        assert heading(browser) == f"Latent {inner}" and js(browser, "document.querySelector('.facts').innerText")
    for form in (f"#latent-{absent}", f"#latent={absent}"):
        visit(browser, lab, form)
        text = js(browser, "document.getElementById('detail').innerText")
        assert heading(browser) == f"Latent {absent}" and f"Latent {absent} is not on this page." in text
        assert f"{len(latents)} latents: 50 drawn at random" in text and "pages.own_text run_1" in text
        assert {"0": "never fires", "1": "too seldom", "2": "is live, but"}[features["activity"][absent]] in text
        assert js(browser, "document.querySelectorAll('#list [aria-current]').length") == 0
    press(browser, "j")
    wait(lambda: heading(browser) == f"Latent {latents[0]}")
    visit(browser, lab, "#latent-999999")
    assert f"There is no latent 999999: this SAE has {width} numbered 0 to {width - 1}." in js(
        browser, "document.getElementById('detail').innerText").replace(f"{width},", str(width))

    press(browser, "/", str(inner))
    assert listed(browser) == [inner]
    press(browser, Keys.ENTER)
    wait(lambda: heading(browser) == f"Latent {inner}")
    press(browser, "/", *[Keys.BACKSPACE] * 9, str(absent))
    assert listed(browser) == [] and f"Latent {absent} is not on this page" in said(browser)
    press(browser, Keys.ENTER)
    wait(lambda: heading(browser) == f"Latent {absent}")
    press(browser, "/", *[Keys.BACKSPACE] * 9, '"1"')                      # the text, not the number
    assert len(listed(browser)) > 1
    press(browser, Keys.ESCAPE)
    assert listed(browser) == latents and js(browser, "document.getElementById('search').value") == ""
    press(browser, "no such thing")
    assert listed(browser) == []
    press(browser, Keys.ESCAPE, Keys.ESCAPE)                                # the second one leaves the field
    assert listed(browser) == latents and js(browser, "document.activeElement === document.body")
    silent(browser)


@needs_chromium
def test_keys_leave_reading_alone(browser, lab):
    """Arrows scroll, but where the focus is in the list; Esc closes the dialog."""
    from selenium.webdriver import Keys
    latents = [entry["latent"] for entry in data_of(lab)["features"]["latents"]]
    visit(browser, lab, f"#latent-{latents[3]}")
    press(browser, *[Keys.ARROW_DOWN] * 5)
    wait(lambda: js(browser, "scrollY > 50"))
    assert heading(browser) == f"Latent {latents[3]}"
    browser.execute_script("document.querySelector('#list [tabindex=\"0\"]').focus()")
    for key, at in ((Keys.ARROW_DOWN, 4), (Keys.ARROW_DOWN, 5), (Keys.ARROW_UP, 4), (Keys.END, -1), (Keys.HOME, 0)):
        press(browser, key)
        wait(lambda: heading(browser) == f"Latent {latents[at]}")
        assert js(browser, "document.activeElement.hash") == f"#latent-{latents[at]}"
    press(browser, "?")
    assert js(browser, "document.getElementById('help').open")
    press(browser, Keys.ESCAPE)
    wait(lambda: not js(browser, "document.getElementById('help').open"))
    visit(browser, lab, "#rate")
    press(browser, "j", Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert js(browser, "place") == 1
    press(browser, "k", Keys.ARROW_LEFT)
    assert js(browser, "place") == 0
    silent(browser)


@needs_chromium
def test_the_tab_key_skips_and_the_list_is_one_stop(browser, lab):
    from selenium.webdriver import Keys
    visit(browser, lab)
    focused = "document.activeElement.className + '#' + document.activeElement.id + ' ' + document.activeElement.textContent.slice(0, 4)"
    stops = []
    for _ in range(11):
        press(browser, Keys.TAB)
        stops.append(js(browser, focused).split()[0])
    assert stops[:8] == ["skip#", "#to-browse", "#to-rate", "#keys", "#theme", "#search", "#which", "#sort"]
    assert js(browser, "document.querySelectorAll('#list a[tabindex=\"0\"]').length") == 1 and stops[9:] == ["#on", "#breaks"]
    place = js(browser, "location.hash")
    for where, target in (("", "detail"), ("#rate", "rate")):
        visit(browser, lab, where)
        browser.execute_script("document.querySelector('.skip').focus()")
        press(browser, Keys.ENTER)
        assert js(browser, "document.activeElement.id") == target and js(browser, "location.hash") == (where or place)
    press(browser, Keys.TAB)
    assert js(browser, "document.getElementById('rate').contains(document.activeElement)")


CONTRASTS = """
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const over = colors => { for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); } return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
    const light = rgb => rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);
    const grounds = node => { const found = []; for (; node; node = node.parentElement) found.unshift(getComputedStyle(node).backgroundColor); return ["white", ...found]; };
    const contrast = node => {
      const ground = grounds(node), [a, b] = [light(over([...ground, getComputedStyle(node).color])), light(over(ground))].sort();
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const lowest = nodes => Math.min(...[...nodes].map(contrast));
    return {hottest: Math.max(...[...document.querySelectorAll(".token[style]")].map(node => Number(node.style.getPropertyValue("--v")))),
            text: lowest(document.querySelectorAll(".token")), marks: lowest(document.querySelectorAll(".token i")),
            rest: lowest([...document.querySelectorAll("p, dd, dt, small, td, th, h2, h3, a, .badge, .chart span, summary, button:not(:disabled)")].filter(x => x.offsetParent && x.innerText))};"""


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("place", ["", "#rate"])
def test_contrast(browser, lab, theme, place):
    """4.5 to 1 for text, the hottest shade included; 3 to 1 for marks of what cannot be seen."""
    visit(browser, lab, place)
    browser.execute_script("setTheme(arguments[0])", theme)
    browser.execute_script("""
        for (const node of document.querySelectorAll(".passage .token")) node.style.setProperty("--v", 0.9);
        document.querySelector(".passage .text").append(el("span", {className: "token", style: "--v: 0.9"}, visible("\\n\\t    \\u200b")));""")
    try:
        found = browser.execute_script(CONTRASTS)
        assert found["hottest"] == 0.9 and found["text"] >= 4.5 and found["marks"] >= 3 and found["rest"] >= 4.5, found
    finally:
        browser.execute_script("setTheme('light dark')")


@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 820, 1400])
def test_nothing_sticks_out(browser, lab, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for place in ("", f"#latent-{data_of(lab)['features']['latents'][0]['latent']}", "#rate"):
            visit(browser, lab, place)
            assert js(browser, "document.documentElement.scrollWidth") <= width, place
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(scope="session")
def rated(browser, lab):
    """One rater's exported file: everything rated by keys, half before a reload."""
    from selenium.webdriver import Keys
    visit(browser, lab, "#rate")
    assert js(browser, "document.getElementById('done').textContent") == "0 of 100 rated"
    assert js(browser, "document.getElementById('remaining').textContent") == "about 75 min left"
    assert js(browser, "document.getElementById('export').disabled")
    browser.execute_script("save()")                    # as if it could be pressed
    assert "Nothing was exported" in js(browser, "document.getElementById('said').textContent")
    assert not list(browser.downloads.iterdir())
    text = js(browser, "document.getElementById('rate').innerText")
    assert "all 100 about 75 minutes" in text and f"from {LEAST_RATED} rated latents of a run on" in text
    assert "Latent" not in text.replace("Latents of run_1", "")     # blind: neither number nor rate
    browser.execute_script("const r = document.getElementById('rater'); r.value = 'Ada L.'; r.onchange({target: r})")
    press(browser, "2", "n", "l", "a <b>label</b>", Keys.ENTER)
    for _ in range(6):
        press(browser, *["1", "y", Keys.ENTER] * 8)
    wait(lambda: js(browser, "document.getElementById('done').textContent") == "49 of 100 rated")
    reload(browser)
    assert js(browser, "document.getElementById('done').textContent") == "49 of 100 rated"
    assert re.fullmatch(r"about \d min left at your pace", js(browser, "document.getElementById('remaining').textContent"))
    assert js(browser, "place") == 49 and js(browser, "document.getElementById('rater').value") == "Ada L."
    for _ in range(6):
        press(browser, *["3", "p", Keys.ENTER] * 8)
    press(browser, *["3", "p", Keys.ENTER] * 3)
    wait(lambda: js(browser, "document.getElementById('done').textContent") == "100 of 100 rated")
    assert js(browser, "document.getElementById('progress').value") == 100
    assert "export" in js(browser, "document.getElementById('remaining').textContent")
    browser.execute_script("document.getElementById('export').click()")
    path = browser.downloads / "human_ratings_Ada_L_.json"
    wait(path.exists)
    silent(browser)
    return path


@needs_chromium
def test_export_and_import(browser, lab, rated, tmp_path):
    found = json.loads(rated.read_text())
    assert found["run"] == "run_1" and found["rater"] == "Ada L." and len(found["answers"]) == 100
    data = data_of(lab)
    pages = {"run_1": rated_of(data["features"]), "run_0": rated_of(data["baseline"]["features"])}
    assert len(data["features"]["latents"]) > 50        # the others are not rated
    assert {(row["run"], row["latent"]) for row in found["answers"]} == {
        (name, latent) for name, latents in pages.items() for latent in latents}
    for half in (found["answers"][:50], found["answers"][50:]):         # mixed, as many of both
        assert sum(row["run"] == "run_0" for row in half) == 25
    order = [row["latent"] for row in found["answers"] if row["run"] == "run_1"]
    assert order != sorted(order)
    assert found["answers"][0] | {"run": 0, "latent": 0} == {"run": 0, "latent": 0, "score": "no", "choice": 1, "label": "a <b>label</b>"}

    browser.execute_script("window.confirm = () => true; document.getElementById('again').click()")
    assert js(browser, "document.getElementById('done').textContent") == "0 of 100 rated"
    broken = {"other.json": json.dumps(found | {"hashes": {"run_1": "0" * 16}}), "cut.json": rated.read_text()[:500],
              "answers.json": json.dumps(found | {"answers": [{"run": "run_1", "latent": -1, "score": "yes"}]}),
              "none.json": json.dumps(found | {"answers": []})}
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
        browser.find_element("id", "import").send_keys(str(tmp_path / name))
        wait(lambda: f"{name} was not taken" in js(browser, "document.getElementById('said').textContent"))
        assert js(browser, "document.getElementById('done').textContent") == "0 of 100 rated"
    browser.find_element("id", "import").send_keys(str(rated))
    wait(lambda: js(browser, "document.getElementById('done').textContent") == "100 of 100 rated")
    reload(browser)
    assert js(browser, "exported().answers") == found["answers"] and js(browser, "exported().seed") == found["seed"]
    silent(browser)


def not_rated(lab):
    """The latents of run_1's page that were not drawn at random."""
    features = json.loads((lab / "run_1" / "features.json").read_text())
    return {entry["latent"] for entry in features["latents"]} - set(rated_of(features))


@needs_chromium
def test_two_raters_through_plot(lab, rated, capsys):
    found = json.loads(rated.read_text())
    answers = {(name, entry["latent"]): entry["question"]["answer"] for name in ("run_0", "run_1")
               for entry in json.loads((lab / name / "features.json").read_text())["latents"] if "question" in entry}
    other = [row | {"choice": answers.get((row["run"], row["latent"])), "score": "yes" if row["run"] == "run_1" else "no"}
             for row in found["answers"]]
    files = {"": found, "_b": found | {"rater_id": "b", "answers": other}, "_schema": found | {"schema": "x"},
             "_run": found | {"run": "run_2"}, "_hash": found | {"hashes": found["hashes"] | {"run_0": "0"}},
             "_row": found | {"answers": [{"run": "run_1", "latent": 1, "choice": 77}]}, "_list": [], "_none": found | {"answers": []},
             "_chosen": found | {"answers": [{"run": "run_1", "latent": next(iter(not_rated(lab))), "score": "yes"}]}}
    for name, content in files.items():
        (lab / "run_1" / f"human_ratings{name}.json").write_text(json.dumps(content))
    (lab / "run_1" / "human_ratings_cut.json").write_text(json.dumps(found)[:100])
    plot = load_module(lab / "plot.py")
    runs = plot.load_runs()
    text, figure, said = plot.ratings_text(runs), plot.fig_latents(runs), capsys.readouterr().out
    skipped = re.findall(r"human_ratings_(\w+)\.json: skipped, ", said)
    assert sorted(skipped) == ["chosen", "cut", "hash", "list", "none", "row", "run", "schema"]
    assert "human_ratings_none.json: skipped, it holds no answers" in said
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| run_")]
    rows = {row[0][:5]: row for row in table}
    scale = {"no": 0, "partly": 0.5, "yes": 1}
    for name, row in rows.items():
        first, second = ([one for one in rater if one["run"] == name] for rater in (found["answers"], other))
        mean = np.mean([scale[one["score"]] for one in first + second])
        right = [np.mean([a["choice"] == answers[name, a["latent"]], 1]) for a in first if (name, a["latent"]) in answers]
        assert row[1:3] == ["2", "50"]
        assert float(row[3].split()[0]) == pytest.approx(mean, abs=6e-4)
        assert float(row[6].split()[0]) == pytest.approx(np.mean(right), abs=6e-4)
    label, = (row for row in found["answers"] if row.get("label"))
    assert load_labels(lab / "run_1") == ({label["latent"]: ["a <b>label</b>"]} if label["run"] == "run_1" else {})
    assert float(rows["run_1"][4].split()[0]) > 0.3 and rows["run_0"][4] == rows["run_0"][7] == ""
    figure.savefig(lab / "latents.png")
    assert {len(axis.containers) for axis in figure.axes} == {2} and "Nobody has rated" not in text      # both runs in both


@pytest.mark.parametrize("n", [LEAST_RATED - 1, LEAST_RATED])
def test_few_ratings_make_no_mean(lab, tmp_path, n):
    """No mean, no interval, no p and no alpha of a run with fewer than five rated latents."""
    hashes = {name: data_of(lab, name)["hash"] for name in ("run_1", "run_0")}
    rows = [{"run": run, "latent": latent, "score": ("yes", "no")[i % 2], "choice": 0} for run in hashes
            for i, latent in enumerate([entry["latent"] for entry in data_of(lab)["features"]["latents"] if "question" in entry][:n])]
    for rater in "ab":
        content = {"schema": "temporal-sae-runner/ratings/1", "run": "run_1", "hashes": hashes, "rater_id": rater, "answers": rows}
        assert check_ratings(content, lab / "run_1")
        (tmp_path / rater).mkdir()
    kept = {path: path.read_bytes() for path in (lab / "run_1").glob("human_ratings*.json")}
    for path in kept:
        path.unlink()
    try:
        for rater in "ab":
            (lab / "run_1" / f"human_ratings_{rater}.json").write_text(json.dumps(content | {"rater_id": rater}))
        plot = load_module(lab / "plot.py")
        table = plot.ratings_text(plot.load_runs())
    finally:
        for path in (lab / "run_1").glob("human_ratings*.json"):
            path.unlink()
        for path, text in kept.items():
            path.write_bytes(text)
    row, = (line for line in table.splitlines() if line.startswith("| run_1"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:3] == ["2", str(n)]
    if n < LEAST_RATED:
        assert cells[3:8] == ["fewer than 5", "", "", "fewer than 5", ""]
    else:
        assert all(cells[i] for i in (3, 4, 5, 6, 7)) and "p " in cells[4] and cells[5] == "1.000"


def test_a_file_without_answers_is_none(lab, tmp_path, capsys):
    (tmp_path / "run_1").mkdir()
    shutil.copy(lab / "run_1" / "features.json", tmp_path / "run_1")
    content = {"schema": "temporal-sae-runner/ratings/1", "run": "run_1", "hashes": {"run_1": data_of(lab)["hash"]}, "rater_id": "a", "answers": []}
    (tmp_path / "run_1" / "human_ratings_a.json").write_text(json.dumps(content))
    label = [{"run": "run_1", "latent": rated_of(data_of(lab)["features"])[0], "label": "only a label"}]
    (tmp_path / "run_1" / "human_ratings_b.json").write_text(json.dumps(content | {"answers": label}))
    load_ratings([tmp_path / "run_1"])
    assert load_labels(tmp_path / "run_1") == {label[0]["latent"]: ["only a label"]}
    assert capsys.readouterr().out.splitlines() == ["run_1/human_ratings_a.json: skipped, it holds no answers",
                                                    "run_1/human_ratings_b.json: 0 latents rated"]


@needs_chromium
def test_labels_that_people_gave_are_shown(browser, lab):
    latent = rated_of(data_of(lab)["features"])[1]
    kept = (lab / "run_1" / "features.html").read_text()
    content = {"schema": "temporal-sae-runner/ratings/1", "run": "run_1", "hashes": {"run_1": data_of(lab)["hash"]}, "rater_id": "a",
               "answers": [{"run": "run_1", "latent": latent, "label": " <b>imports</b> "}]}
    path = lab / "run_1" / "human_ratings_label.json"
    try:
        path.write_text(json.dumps(content))
        write_page(lab / "run_1", "run_1: labelled", {"CONTEXT_LENGTH": 32}, {})
        visit(browser, lab, f"#latent-{latent}")
        assert "People call it\n\u201c<b>imports</b>\u201d" in js(browser, "document.querySelector('.facts').innerText")
        press(browser, "/", "<b>imports")
        assert listed(browser) == [latent]
        silent(browser)
    finally:
        path.unlink()
        (lab / "run_1" / "features.html").write_text(kept)


def test_without_ratings_plot_says_how(lab):
    plot = load_module(lab / "plot.py")
    plot.load_ratings = lambda folders: {}
    text = plot.ratings_text(plot.load_runs())
    assert "Nobody has rated" in text and "human_ratings_NAME.json" in text


# --- a text of one's own --------------------------------------------------------------------------------------------------
TOKENS = ["the", " file", " ", "\U0001f600", "", "", " is", "\n", " </script>"]


def own_values(width):
    """[token, latent]: latents 1 to 6 and the last one fire, latent 3 most strongly, within the smiling face."""
    values = np.zeros((len(TOKENS), width), np.float32)
    values[4, 3], values[3, 3], values[8, 3] = 2.5, 1.0, 0.5
    values[0, 1], values[1, 2], values[1, 4], values[1, 5], values[1, 6] = 0.75, 0.5, 0.4, 0.3, 0.2
    values[1, width - 1] = 0.1
    return values


class LoadedRun:
    """A stand-in for what runtime.load's load_run returns."""
    def __init__(self, width):
        self.values, self.text = own_values(width), None

    def latents_of(self, text):
        self.text = text
        return TOKENS, self.values


@pytest.fixture
def own(lab, monkeypatch):
    """own(*arguments) runs the command with a stand-in for the run; the stand-in, and the data of its page."""
    width = len(json.loads((lab / "run_1" / "features.json").read_text())["activity"])
    monkeypatch.chdir(lab)

    def command(*arguments):
        loaded = LoadedRun(width)
        monkeypatch.setitem(sys.modules, "runtime.load", SimpleNamespace(load_run=lambda folder: loaded))
        monkeypatch.setattr(sys, "argv", ["own_text", *arguments])
        own_text.main()
        return loaded
    return command


def test_the_strongest_latents_of_a_text():
    values = own_values(20)
    assert own_text.strongest_latents(values).tolist() == [3, 1, 2, 4, 5, 6, 19] and own_text.strongest_latents(values, 2).tolist() == [3, 1]
    rows = own_text.strongest_by_token(values, 3)
    assert [[latent for latent, _ in row] for row in rows] == [[1], [2, 4, 5], [], [3], [3], [], [], [], [3]]
    assert rows[4] == [(3, 2.5)]


def test_own_text_as_a_command(lab, own, capsys):
    loaded = own("run_1", "the file")
    features = json.loads((lab / "run_1" / "features.json").read_text())
    here = {entry["latent"] for entry in features["latents"]}
    lines = capsys.readouterr().out.splitlines()
    assert loaded.text == "the file" and lines[0] == "run_1/own_text.html: 9 tokens, 7 latents fire; the strongest:" and len(lines) == 8
    assert [int(line.split()[1]) for line in lines[1:]] == [3, 1, 2, 4, 5, 6, len(features["activity"]) - 1]
    assert "2.5 on '\U0001f600' (token 4), fires 3 times" in lines[1] and "0.75 on 'the' (token 1), fires once" in lines[2]
    for line in lines[1:]:
        latent = int(line.split()[1])
        assert line.endswith(f"features.html#latent-{latent}" if latent in here else "not on features.html")
    (lab / "text.txt").write_text("from a file \u00e9", encoding="utf-8")
    assert own("run_1", "text.txt").text == "from a file \u00e9" and own("run_1", "no-such.txt").text == "no-such.txt"
    for text in ("x" * 10_000, "\u00e9" * 200, "a\0b"):                    # no names of files
        assert own("run_1", text).text == text
    for wrong in ((), ("run_1",), ("run_1", "a", "b")):
        with pytest.raises(SystemExit, match="python -m pages.own_text run_1"):
            own(*wrong)


def test_own_text_without_a_page_and_without_firings(tmp_path):
    values = np.zeros((9, 5), np.float32)
    ids = own_text.strongest_latents(values)
    assert not len(ids) and own_text.latent_lines(TOKENS, values[:, ids], ids) == []
    page = own_text.own_text_page(TOKENS, values[:, ids], ids, own_text.strongest_by_token(values), "run_1")
    assert '"latents":[]' in page and '"has_page":false' in page and page.count("</script>") == 3


@needs_chromium
def test_the_page_of_ones_own_text(browser, lab, own):
    features = json.loads((lab / "run_1" / "features.json").read_text())
    shown = features["latents"][2]["latent"]                            # 3 stands for one that is on the page
    features["latents"][2]["latent"] = 3
    kept = (lab / "run_1" / "features.json").read_text()
    try:
        (lab / "run_1" / "features.json").write_text(json.dumps(features))
        own("run_1", "the file")
    finally:
        (lab / "run_1" / "features.json").write_text(kept)
    leave(browser, lambda: browser.get("about:blank"), "location.href == 'about:blank'")
    leave(browser, lambda: browser.get((lab / "run_1" / "own_text.html").as_uri()), "document.title == 'Your text, run_1'")
    assert js(browser, "document.getElementById('which').innerText") == "Latent 3 on this text"
    pieces = js(browser, "[...document.querySelectorAll('#text .token')].map(x => [x.innerText, x.title, x.style.getPropertyValue('--v')])")
    assert [text for text, _, _ in pieces] == ["the", " file", " ", "\U0001f600", " is", "\u21b5", " </script>"]
    assert pieces[3][1].endswith("3 tokens \u00b7 value 1, 2.5, 0 \u00b7 position 4\u20136") and float(pieces[3][2]) == 0.9 and pieces[0][2] == ""
    rows = js(browser, "[...document.querySelectorAll('#latents tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))")
    assert [int(row[0]) for row in rows] == [3, 1, 2, 4, 5, 6, len(features["activity"]) - 1] and rows[0][2:5] == ["2.5", "\U0001f600", "3 of 9"]
    assert float(rows[1][5].split()[0]) == pytest.approx(75 / features["max"][1], rel=0.01) if features["max"][1] else rows[1][5] == "\u2013"
    browser.execute_script("document.querySelectorAll('#latents button')[1].click()")
    assert js(browser, "document.getElementById('which').innerText") == "Latent 1 on this text"
    assert js(browser, "[...document.querySelectorAll('#text .token')].map(x => x.style.length)") == [1, 0, 0, 0, 0, 0, 0]
    tokens = js(browser, "[...document.querySelectorAll('#tokens tbody tr')].map(row => row.innerText)")
    assert len(tokens) == 9 and "same character" in tokens[4] and "3 2.5" in tokens[4].replace("\u00a0", " ").replace("32.5", "3 2.5")
    for width in (390, 1400):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
        assert js(browser, "document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    link = js(browser, "document.querySelector('#latents a').href")
    assert link == (lab / "run_1" / "features.html").as_uri() + "#latent-3"
    silent(browser)
    visit(browser, lab, f"#latent-{shown}")


# --- statistics of ratings ----------------------------------------------------------------------------------------------
def test_agreement():
    same = {i: {"a": i % 3 / 2, "b": i % 3 / 2} for i in range(9)}
    assert agreement(same) == pytest.approx(1)
    rng = np.random.default_rng(0)
    chance = {i: {"a": rng.choice([0, 0.5, 1]), "b": rng.choice([0, 0.5, 1])} for i in range(2000)}
    assert abs(agreement(chance)) < 0.06
    assert agreement({1: {"a": 1.0}, 2: {"b": 0.0}}) is None        # nobody in common
    few = {i: {"a": i % 3 / 2, "b": i % 3 / 2} for i in range(LEAST_RATED - 1)}
    assert agreement(few) is None and agreement(few | {9: {"a": 1.0, "b": 1.0}}) == pytest.approx(1)
    assert agreement({i: {"a": 1.0, "b": 1.0} for i in range(9)}) is None   # no variation
    assert agreement({}) is None


def test_intervals_and_tests_of_latents():
    rng = np.random.default_rng(1)
    rated = {1: {"a": 1.0, "b": 0.0}} | {i: {"a": 1.0} for i in range(2, LEAST_RATED + 1)}
    assert mean_by_latent(rated).values.tolist() == [0.5, 1.0, 1.0, 1.0, 1.0] and LEAST_RATED == 5
    del rated[2]
    assert mean_by_latent(rated) is None and mean_by_latent({}) is None
    inside = 0
    for _ in range(40):
        draws = rng.random(50) < 0.7
        _, low, high = mean_by_latent({i: {"a": float(hit)} for i, hit in enumerate(draws)})
        inside += low <= 0.7 <= high
    assert inside >= 33
    a, b = rng.normal(0, 1, 50), rng.normal(1, 1, 50)
    difference, low, high, p = unpaired_test(a, b)
    assert low < difference < high < 0 and p < 0.01 and difference == pytest.approx(a.mean() - b.mean())
    assert unpaired_test(a, a.copy())[3] > 0.9
