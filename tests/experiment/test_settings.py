"""Rules of the settings: good values pass, bad ones are named with the good."""
import math
import re
from types import SimpleNamespace

import pytest

from copies import VARIANTS

WHOLE, ABOVE_0, NAMES = (1, 7), (0.01, 1, 3e4), ("x", "a/b")
NOT_WHOLE, NO_NAMES = (0, -1, 2.0, 2.5, 1e5, "2", None, True), ("", None, 3)
NOT_ABOVE_0 = (0, -1, -1.0, math.nan, math.inf, "1", None, True)
TWO_WHOLE = ((1, 1), (5, 16), (384, 8)), ((5,), (5, 16, 20), (), (0, 5), (5, 0), (5, 16.0), ("5", "16"), (True, 5), [5, 16], 5, None), (
    "two whole numbers from 1",)
RULES = {                                 # constant -> good values, bad ones, what the message must say
    "SAE_VARIANT": (VARIANTS, ("topkk", "", None, 3, ["topk"]), VARIANTS),
    "ABLATE": (((), ("sparsity",), ("auxk", "sparsity")), (("reconstruction",), ("attention",), ("auxk", "auxk"), (["auxk"],), ["auxk"], "auxk", None),
               ("tuple", "'auxk', 'sparsity'", "standard")),
    "MODEL_NAME": (NAMES, NO_NAMES, ("hub name",)), "DATASET": (NAMES, NO_NAMES, ("hub name",)),
    "LAYER": ((None, 0, 5), (-1, 2.0, "2", True), ("None", "whole number from 0")),
    "TRAIN_TOKENS": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "CONTEXT_LENGTH": ((8, 1024), (7, 4, 0, 64.0, "128", None), ("whole number from 8",)),
    "EXPANSION": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)), "TARGET_L0": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "SEEDS": (((0,), (5, 0, 2)), ((), (0, 0), 0, [0], (-1,), (0.5,), (2.0,), ("a",), ([0],), (True,), None),
              ("one or more different whole numbers",)),
    "TIME_BUDGET_MINUTES": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "EVALS": ((("core",), ("probes", "core"), ("sparse_probing", "unlearning")), ((), ("nope",), ("core", "core"), "core", ["core"], None),
              ("tuple", "'core'", "'temporal'", "'probes'", "'unlearning'", "'sparse_probing'")),
    "EPOCHS_SCALE": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "BATCH_TOKENS": ((128, 4096), (127, 16, 0, 512.0, "2048", None), ("whole number from 128",)),
    "LEARNING_RATE": ((None, 1e-3, 1), (0, -1e-3, "fast", math.nan, True), ("None", "number above 0")),
    "TRAIN_POSITIONS": ((None, (1, 2), (64, 127)), (
        (0, 5), (5, 5), (5, 3), (1,), (1, 2, 3), (), [1, 2], (1, 128), "12", 5, (True, 5), ("a", "b")),
                        ("None", "(low, high) within the window")),
    "WINDOW": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "ATTENTION": (("causal", "centred"), ("both", None, ["causal"]), ("causal, centred",)),
    "HEADS": (WHOLE, NOT_WHOLE, ("whole number from 1",)), "HEAD_WIDTH": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "CONSISTENT_FRACTION": ((0.01, 0.5, 1), (0, 1.01, -0.1, "1", math.nan, None), ("above 0, at most 1",)),
    "CONSISTENCY_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "CONTRAST_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "CONTRAST_SPAN": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "TSAE_READING": (("paper", "code"), ("paper, code", None), ("paper, code",)),
    "TEMPERATURE": (("learned", "scheduled", 0.1, 2), (0, -1, "fixed", math.nan, None, True),
                    ("learned or scheduled", "number above 0")),
    "DRIVE": (("u", "z"), ("uz", None), ("u, z",)), "REGULARISATION": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "BUFFER": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "BUFFER_POSITIONS": (("learned", "sinusoidal"), ("fixed", None, ["learned"]), ("learned, sinusoidal",)),
    "FORGET": (NAMES, NO_NAMES, ("hub name",)),
    "TRAIN_ON": (("both", "forget", "retain"), ("all", None, ("both",)), ("both, forget, retain",)),
    "FORGET_QUESTIONS": ((None, *NAMES), ("", 3), ("None", "hub name")),
    "RETAIN_QUESTIONS": ((None, *NAMES), ("", 3), ("None", "hub name")),
    "SELECTION": (("ratio", "frequency"), ("energy", None), ("ratio, frequency",)),
    "CLAMPED": (WHOLE, NOT_WHOLE, ("whole number from 1",)), "MATCHED": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "MATCHER": (("logistic", "attention"), ("linear", None), ("logistic, attention",)),
    "MATCHER_WINDOW": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "COMPOSITIONS": ((0.1, 1 / 3, 0.9), (0, 1, 1.0, -0.1, math.nan, "1", None), ("number above 0", "at most 0.9")),
    "LEVEL_WIDTHS": ((None, (288, 192), (96, 96)), ((96,), (96, 192), [288, 192], (288.0, 192), (96, 8), 96), ("level 1, level 2",)),
    "LEVEL_SPARSITY": (("topk", "l1"), ("none", None), ("topk, l1",)),
    "LEVEL1_L0_RATIO": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)), "COSINE_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "GROUP_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "SLOW_LATENTS": ((0.1, 0.9), (0, 1, -0.1, math.nan, "1", None), ("number above 0", "at most 0.9")),
    "SLOW_PLACES": ((0.1, 0.9), (0, 1, -0.1, math.nan, "1", None), ("number above 0", "at most 0.9")),
    "SLOW_DECAY": ((0.5, 0.999), (0, 1, -0.1, math.nan, "1", None), ("number above 0", "at most 0.9999")),
    "SLOW_PRIOR": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)), "PREDICTION_WEIGHT": (ABOVE_0, NOT_ABOVE_0, ("number above 0",)),
    "PREDICTED": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "COMPOSITION_SLOTS": ((0.01, 1 / 4, 1), (0, 1.1, -0.1, math.nan, "1", None), ("number above 0", "at most 1")),
    "COMPOSITION_HEADS": ((1, 8, 64), NOT_WHOLE, ("whole number from 1",)),
    "COMPOSITION_HEAD_WIDTH": ((1, 16), (0, -8, 8.0, "8", None), ("whole number from 1",)),
}
MODEL = SimpleNamespace(hidden_size=192)
PROTOCOL_RULES = {
    "EVAL_FILES": ((10, 300), (9, 0, 20.5, None), ("whole number from 10",)),
    "LIVE_MIN_FIRINGS": (WHOLE, NOT_WHOLE, ("whole number from 1",)), "LIVE_MIN_FILES": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "STABILITY_LAGS": TWO_WHOLE, "FAR_LAGS": TWO_WHOLE, "PROBING_SIZE": TWO_WHOLE, "SYNTHETIC_SAE": TWO_WHOLE, "DWELL_SAE": TWO_WHOLE,
    "BOUNDARY_TOKENS": (WHOLE, NOT_WHOLE, ("whole number from 1",)),
    "SYNTHETIC_TASKS": ((("boolean",), ("grammar", "arithmetic")), ((), ("logic",), ("boolean", "boolean"), ["boolean"], "boolean", None),
                        ("tuple", "'boolean'", "'arithmetic'", "'grammar'")),
}


def test_every_setting_has_a_rule_here(E):
    config, protocol = (set(re.findall(r"^([A-Z][A-Z_0-9, ]*) = ", E.SOURCE.split(f"# region {name}\n")[1].split("# endregion")[0],
                                       flags=re.M)) for name in ("Config", "Protocol"))
    assert config == set(RULES) and set(PROTOCOL_RULES) <= protocol


@pytest.mark.parametrize("name", [*RULES, *PROTOCOL_RULES])
def test_rules_of_the_settings(E, monkeypatch, name):
    good, bad, parts = (RULES | PROTOCOL_RULES)[name]
    for value in good:
        monkeypatch.setattr(E, name, value)
        if name == "CONTEXT_LENGTH":
            monkeypatch.setattr(E, "BATCH_TOKENS", 1024)
        E.check_config()
        if name not in ("TARGET_L0", "EXPANSION"):
            E.check_sizes(MODEL)
    for value in bad:
        monkeypatch.setattr(E, name, value)
        with pytest.raises(E.RunnerError) as error:
            E.check_config()
            E.check_sizes(MODEL)
        said = str(error.value)
        assert said.startswith(f"{name} = {value!r} ") and all(part in said for part in parts), said


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_may_be_ablated(E, monkeypatch, variant):
    """Every loss but the reconstruction, and every component; nothing of another variant."""
    made = E.SAE_VARIANTS[variant]
    losses = {loss for stage in E.curriculum_of(made) for loss in stage.weights}
    assert "auxk" in losses
    monkeypatch.setattr(E, "SAE_VARIANT", variant)
    for name in sorted(losses | set(made.components) | {"trace", "attention", "gate", "contrastive", "l0_target"}):
        monkeypatch.setattr(E, "ABLATE", (name,))
        if name != "reconstruction" and name in losses | set(made.components):
            E.check_config()
        else:
            with pytest.raises(E.RunnerError, match="ABLATE"):
                E.check_config()


def test_only_what_composes_is_evaluated_so(E, monkeypatch):
    monkeypatch.setattr(E, "EVALS", ("composition",))
    with pytest.raises(E.RunnerError, match="EVALS"):
        E.check_config()
    monkeypatch.setattr(E, "SAE_VARIANT", "compositional")
    E.check_config()


def test_a_variant_without_levels_is_told_at_once(E, monkeypatch):
    monkeypatch.setattr(E, "EVALS", ("core", "hierarchy"))
    with pytest.raises(E.RunnerError, match="EVALS.*for standard"):
        E.check_config()
    monkeypatch.setattr(E, "SAE_VARIANT", "hierarchical")
    E.check_config()


@pytest.mark.parametrize("name, value", [("LEVEL_WIDTHS", (96, 144)), ("LEVEL_WIDTHS", (96, 4)), ("LEVEL_WIDTHS", 7),
                                         ("LEVEL_SPARSITY", "l2"), ("LEVEL1_L0_RATIO", 0), ("GROUP_WEIGHT", -1)])
def test_wrong_constants_are_refused(E, monkeypatch, name, value):
    monkeypatch.setattr(E, name, value)
    with pytest.raises(E.RunnerError, match=name):
        E.check_config()


@pytest.mark.parametrize("variant, evaluation", [("compositional", "composition"), ("hierarchical", "hierarchy")])
def test_latents_of_one_token_are_compared_only_where_there_are_two(E, settings, variant, evaluation):
    settings(SAE_VARIANT=variant, EVALS=(evaluation,), TARGET_L0=1)
    with pytest.raises(E.RunnerError, match="TARGET_L0 = 1 .*whole number from 2"):
        E.check_config()
    settings(TARGET_L0=2)
    E.check_config()
    settings(EVALS=("core",), TARGET_L0=1)
    E.check_config()
