"""The page of latents: what it shows is true of the latents, and it works in a real browser, whatever the tokens are."""
import json
import re
import shutil
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csc_array

from copies import copy_template, load_module, PROJECT, write_text_data
from data.windows import Windows
from pages.latents_page import latents_page, Passages
from pages.ratings import agreement, mean_by_latent, unpaired_test
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


class Letters:
    def __len__(self):
        return 200

    def batch_decode(self, ids):
        return [f"t{i}" for i, in ids]


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
    related = [{}] * len(firings)
    return latents_page(windows, Letters(), np.arange(len(firings)) * 3, z, logits, related, 99, detections, QUESTION_SIZE)


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

        passages = entry["passages"]
        top = [found(passage)[1][passage["peak"]] for passage in passages["top"]]
        assert top == sorted(top, reverse=True) and len({passage["file"] for passage in passages["top"]}) == len(top) == 8
        bands = [[found(passage)[1][passage["peak"]] for passage in band] for band in passages["stratified"]]
        assert all(min(upper) >= max(lower) for upper, lower in zip(bands, bands[1:]))
        seen = {found(passage)[0] for passage in [*passages["top"], *sum(passages["stratified"], []), *passages["random"]]}
        five = [found(passage) for passage in entry["question"]["passages"]]
        assert [shown.any() for _, shown in five] == [i == entry["question"]["answer"] == 2 for i in range(5)]
        assert entry["detected"] == [3, 2.5, 1, 0]
        assert five[entry["question"]["answer"]][0] not in seen
        assert page["strings"][entry["promoted"][0][0]] == "t199" and page["strings"][entry["suppressed"][0][0]] == "t3"


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
    page = latents_page(windows, Letters(), np.array([0]), z, np.arange(200.0)[None], [relatives], 3, [NO_TASKS], QUESTION_SIZE)
    token = windows.tokens[windows.n_train:, 1:].ravel()[max(strongest, other)]
    assert {i: page["strings"][string] for i, string in page["named"].items()} == {1: f"t{token}"}       # 2 never fires
    assert page["latents"][0]["related"] == {"kin": [[1, 0.5], [2, 0.25], ["<i>", 1.0]], "0": []}


# --- a run and its page -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A copy with a trained run_1, a run_0 of which the latents come in another order, and hostile tokens in both."""
    base = tmp_path_factory.mktemp("page")
    folder = copy_template(base / "idea", DATASET=str(write_text_data(base / "texts.jsonl")), EVALS=("core", "detection"), SAE_VARIANT="temporal",
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
    features["named"] = {features["latents"][1]["latent"]: list(dict.fromkeys(first["tokens"]))[3]}
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
    assert len(features["latents"]) == 50 and features["n_live"] >= 50 and features["seed"] == 0
    info = json.loads((lab / "run_1" / "final_info.json").read_text())
    for entry, *names in (("detection", "detection", "detection_same_token", "detection_null"), ("core", "detection_reinitialised")):
        for name in names:
            assert 0 <= info[entry]["metrics"][name] <= 1 and f"{name}_mean" not in info[entry]["means"]
    tasks, solved, *_ = np.sum([entry["detected"] for entry in features["latents"] if "detected" in entry], 0)
    assert solved / tasks == pytest.approx(info["detection"]["metrics"]["detection"], abs=0.01)
    for entry in features["latents"][1:]:
        weights = [weight for _, weight in entry["related"]["attention by offset"]]
        assert len(weights) == 5 and sum(weights) == pytest.approx(1, abs=0.02)


def test_pages_are_whole_and_small(lab):
    for name in ("run_0", "run_1"):
        path = lab / name / "features.html"
        assert path.stat().st_size <= 3_000_000
        text = path.read_text()
        assert text.count("<script") == 2 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
    data = data_of(lab)
    assert set(HOSTILE[:3]) <= set(data["features"]["strings"])
    assert len(data["baseline"]["features"]["latents"]) == 50 and "baseline" not in data_of(lab, "run_0")


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
          shown.push([detail.querySelector("h2").textContent, detail.innerText, detail.querySelectorAll("svg").length]);
          if (shown.length < latents.length) location.hash = `latent-${latents[shown.length]}`; else done(shown);
        });
        location.hash = `latent-${latents[0]}`;""", latents)
    for latent, (title, text, drawings) in zip(latents, shown, strict=True):
        assert title == f"Latent {latent}" and drawings >= 2
        assert not re.search(r"undefined|NaN|\[object|null", text), text
    silent(browser)


@needs_chromium
def test_hostile_tokens_are_text(browser, lab):
    first = data_of(lab)["features"]["latents"][0]["latent"]
    visit(browser, lab, f"#latent-{first}")
    text = js(browser, "document.querySelector('.passage').innerText")
    for shown in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], "U+202E", "U+0007", "U+001B", "U+009F", "U+FEFF", "\u21b5", HOSTILE[8]):
        assert shown in text, (shown, text)
    assert not re.search("[\x00-\x08\x1b\u200b\u202e\ufeff]", text)
    assert js(browser, "document.title").startswith(f"Latent {first}") and not js(browser, "document.querySelector('img')")
    assert js(browser, "[...document.querySelectorAll('.from')].some(x => x.title === '<b>file</b>')")
    relatives = js(browser, "[...document.querySelectorAll('.cards.wide .chip')].map(x => [x.tagName, x.className, x.innerText])")
    assert [(tag, name) for tag, name, _ in relatives] == [("A", "chip"), ("SPAN", "chip silent"), ("SPAN", "chip")]
    assert relatives[0][2].split()[1:] == ["<!--", "0.5"] and relatives[2][2].split()[0] == "<i>"
    press(browser, "r")
    wait(lambda: js(browser, "document.querySelectorAll('#rate .passage').length"))
    silent(browser)


@needs_chromium
def test_finding_ones_way(browser, lab):
    from selenium.webdriver import Keys
    latents = [entry["latent"] for entry in data_of(lab)["features"]["latents"]]
    visit(browser, lab, f"#latent-{latents[3]}")
    assert heading(browser) == f"Latent {latents[3]}"
    for key, at in (("j", 4), (Keys.ARROW_DOWN, 5), ("k", 4)):
        press(browser, key)
        wait(lambda: heading(browser) == f"Latent {latents[at]}")
        assert js(browser, "location.hash") == f"#latent-{latents[at]}"
        assert js(browser, "document.querySelector('#list [aria-current] .id').textContent") == str(latents[at])
    browser.back()
    wait(lambda: heading(browser) == f"Latent {latents[5]}")
    press(browser, "/", "<script>")
    hits = js(browser, "document.querySelectorAll('#list a').length")
    assert 1 <= hits < 50 and f"{hits} of 50" in js(browser, "document.getElementById('count').textContent")
    press(browser, *[Keys.BACKSPACE] * 8, "no such thing", Keys.ESCAPE)
    assert js(browser, "document.querySelectorAll('#list a').length") == 0
    visit(browser, lab, "#latent-999999")
    assert "999999 is not among" in js(browser, "document.getElementById('count').textContent")
    rates = {entry["latent"]: entry["rate"] for entry in data_of(lab)["features"]["latents"]}
    browser.execute_script("const s = document.getElementById('sort'); s.value = 'rate'; s.onchange()")
    shown = [rates[latent] for latent in js(browser, "[...document.querySelectorAll('#list .id')].map(x => Number(x.textContent))")]
    assert shown == sorted(rates.values(), reverse=True)
    ground = js(browser, "getComputedStyle(document.body).backgroundColor")
    press(browser, "t", "t")
    assert js(browser, "getComputedStyle(document.body).backgroundColor") != ground
    press(browser, "t")
    silent(browser)


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
    text = js(browser, "document.getElementById('rate').innerText")
    assert "Latent" not in text.replace("Latents of run_1", "")     # blind: neither number nor rate
    browser.execute_script("const r = document.getElementById('rater'); r.value = 'Ada L.'; r.onchange({target: r})")
    press(browser, "2", "n", "l", "a <b>label</b>", Keys.ENTER)
    for _ in range(6):
        press(browser, *["1", "y", Keys.ENTER] * 8)
    wait(lambda: js(browser, "document.getElementById('done').textContent") == "49 of 100 rated")
    reload(browser)
    assert js(browser, "document.getElementById('done').textContent") == "49 of 100 rated"
    assert js(browser, "place") == 49 and js(browser, "document.getElementById('rater').value") == "Ada L."
    for _ in range(6):
        press(browser, *["3", "p", Keys.ENTER] * 8)
    press(browser, *["3", "p", Keys.ENTER] * 3)
    wait(lambda: js(browser, "document.getElementById('done').textContent") == "100 of 100 rated")
    assert js(browser, "document.getElementById('progress').value") == 100
    browser.execute_script("document.getElementById('export').click()")
    path = browser.downloads / "human_ratings_Ada_L_.json"
    wait(path.exists)
    silent(browser)
    return path


@needs_chromium
def test_export_and_import(browser, lab, rated, tmp_path):
    found = json.loads(rated.read_text())
    assert found["run"] == "run_1" and found["rater"] == "Ada L." and len(found["answers"]) == 100
    pages = {"run_1": data_of(lab)["features"]["latents"], "run_0": data_of(lab)["baseline"]["features"]["latents"]}
    assert {(row["run"], row["latent"]) for row in found["answers"]} == {
        (name, entry["latent"]) for name, entries in pages.items() for entry in entries}
    for half in (found["answers"][:50], found["answers"][50:]):         # mixed, as many of both
        assert sum(row["run"] == "run_0" for row in half) == 25
    order = [row["latent"] for row in found["answers"] if row["run"] == "run_1"]
    assert order != sorted(order)
    assert found["answers"][0] | {"run": 0, "latent": 0} == {"run": 0, "latent": 0, "score": "no", "choice": 1, "label": "a <b>label</b>"}

    browser.execute_script("window.confirm = () => true; document.getElementById('again').click()")
    assert js(browser, "document.getElementById('done').textContent") == "0 of 100 rated"
    broken = {"other.json": json.dumps(found | {"hashes": {"run_1": "0" * 16}}), "cut.json": rated.read_text()[:500],
              "answers.json": json.dumps(found | {"answers": [{"run": "run_1", "latent": -1, "score": "yes"}]})}
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


@needs_chromium
def test_two_raters_through_plot(lab, rated, capsys):
    found = json.loads(rated.read_text())
    answers = {(name, entry["latent"]): entry["question"]["answer"] for name in ("run_0", "run_1")
               for entry in json.loads((lab / name / "features.json").read_text())["latents"] if "question" in entry}
    other = [row | {"choice": answers.get((row["run"], row["latent"])), "score": "yes" if row["run"] == "run_1" else "no"}
             for row in found["answers"]]
    files = {"": found, "_b": found | {"rater_id": "b", "answers": other}, "_schema": found | {"schema": "x"},
             "_run": found | {"run": "run_2"}, "_hash": found | {"hashes": found["hashes"] | {"run_0": "0"}},
             "_row": found | {"answers": [{"run": "run_1", "latent": 1, "choice": 77}]}, "_list": []}
    for name, content in files.items():
        (lab / "run_1" / f"human_ratings{name}.json").write_text(json.dumps(content))
    (lab / "run_1" / "human_ratings_cut.json").write_text(json.dumps(found)[:100])
    plot = load_module(lab / "plot.py")
    runs = plot.load_runs()
    text, figure, said = plot.ratings_text(runs), plot.fig_latents(runs), capsys.readouterr().out
    skipped = re.findall(r"human_ratings_(\w+)\.json: skipped, ", said)
    assert sorted(skipped) == ["cut", "hash", "list", "row", "run", "schema"]
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
    assert float(rows["run_1"][4].split()[0]) > 0.3 and rows["run_0"][4] == rows["run_0"][7] == ""
    figure.savefig(lab / "latents.png")
    assert {len(axis.containers) for axis in figure.axes} == {2} and "Nobody has rated" not in text      # both runs in both


def test_without_ratings_plot_says_how(lab):
    plot = load_module(lab / "plot.py")
    plot.load_ratings = lambda folders: {}
    text = plot.ratings_text(plot.load_runs())
    assert "Nobody has rated" in text and "human_ratings_NAME.json" in text


# --- statistics of ratings ----------------------------------------------------------------------------------------------
def test_agreement():
    same = {i: {"a": i % 3 / 2, "b": i % 3 / 2} for i in range(9)}
    assert agreement(same) == pytest.approx(1)
    rng = np.random.default_rng(0)
    chance = {i: {"a": rng.choice([0, 0.5, 1]), "b": rng.choice([0, 0.5, 1])} for i in range(2000)}
    assert abs(agreement(chance)) < 0.06
    assert agreement({1: {"a": 1.0}, 2: {"b": 0.0}}) is None        # nobody in common
    assert agreement({1: {"a": 1.0, "b": 1.0}}) is None             # no variation
    assert agreement({}) is None


def test_intervals_and_tests_of_latents():
    rng = np.random.default_rng(1)
    values, _, _ = mean_by_latent({1: {"a": 1.0, "b": 0.0}, 2: {"a": 1.0}})
    assert values.tolist() == [0.5, 1.0] and mean_by_latent({}) is None and mean_by_latent({1: {"a": 1.0}}) is None
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
